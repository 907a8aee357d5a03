"""Recordings of what models compute, and the first layer in which two differ."""

import math
from pathlib import Path

import numpy
import pytest
import torch
from families import small_model, tokens
from safetensors.torch import load_file, save_file

from nemotron_h import NemotronHForCausalLM
from nemotron_h.inspection import recording as recordings
from nemotron_h.inspection.comparison import compare
from nemotron_h.inspection.recording import Recording, is_recording, read

ORACLE = Path(__file__).parents[1] / "data" / "oracle" / "dense"
IDS = tokens(1, 23)[0]


def record(folder, ids, dtype="float32"):
    model = NemotronHForCausalLM.from_pretrained(folder, dtype=dtype)
    return recordings.record(model, ids, whole=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("folder")
    small_model("moe", dtype=torch.float32).save_pretrained(path)
    return path


def whole(source, ids, **tensors):
    """What another program may have recorded."""
    return Recording(source, [None] * len(ids), ids, tensors=tensors)


def changed(folder, dest, name, change):
    """A copy of a folder with one tensor changed."""
    NemotronHForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(dest)
    stored = load_file(dest / "model.safetensors")
    stored[name] = change(stored[name])
    save_file(stored, dest / "model.safetensors", metadata={"format": "pt"})
    return dest


def test_what_is_recorded(folder):
    """Against transformers' own collection of hidden states, whose last one is after the last norm."""
    recording = record(folder, IDS)
    model = NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        outputs = model(IDS[None], output_hidden_states=True)
    assert list(recording.tensors) == [*(f"hidden_states.{i}" for i in range(8)), "norm_f", "logits"]
    for i, hidden in enumerate(outputs.hidden_states[:-1]):
        assert torch.equal(recording.tensors[f"hidden_states.{i}"], hidden[0]), i
    assert torch.equal(recording.tensors["norm_f"], outputs.hidden_states[-1][0])
    assert torch.equal(recording.tensors["logits"], outputs.logits[0])


@pytest.mark.parametrize(
    ("name", "first", "label"),
    [
        ("backbone.embeddings.weight", "hidden_states.0", "embeddings"),
        ("backbone.layers.3.mixer.o_proj.weight", "hidden_states.4", "layer 3 (attention)"),
        ("backbone.layers.4.mixer.experts.0.up_proj.weight", "hidden_states.5", "layer 4 (moe)"),
        ("backbone.layers.6.norm.weight", "hidden_states.7", "layer 6 (moe)"),
        ("backbone.norm_f.weight", "norm_f", "last norm"),
        ("lm_head.weight", "logits", "logits"),
    ],
)
def test_the_first_layer_that_differs(folder, tmp_path, name, first, label):
    other = changed(folder, tmp_path / "other", name, lambda tensor: tensor * 1.5)
    a, b = record(folder, IDS), record(other, IDS)
    comparison = compare(a, b)
    row = comparison.first_row
    assert (row.name, row.label) == (first, label)
    # by how much, worked out here
    difference, scale = (a.tensors[first] - b.tensors[first]).abs().max().item(), a.tensors[first].abs().max().item()
    assert row.difference == pytest.approx(difference / scale) and row.scale == pytest.approx(scale)
    before = [each for each in comparison.rows if each.difference == 0.0]
    assert [each.name for each in before] == [each.name for each in comparison.rows][: len(before)]
    assert compare(a, record(folder, IDS)).first_row is None


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recordings_come_back(folder, tmp_path, suffix, dtype):
    recording = record(folder, IDS, dtype)
    recording.save(tmp_path / f"r{suffix}")
    back = read(tmp_path / f"r{suffix}")
    assert is_recording(tmp_path / f"r{suffix}") and not is_recording(folder)
    assert back.ids == IDS.tolist()
    comparison = compare(back, recording)
    assert len(comparison.rows) == 10 and comparison.first_row is None and comparison.same_best_token == 1.0
    assert "layer 3 (attention)" in [row.label for row in comparison.rows]


def test_what_others_recorded(tmp_path):
    """llama.cpp's log-probabilities, against the model in the folder, and against one that is not it."""
    theirs = read(ORACLE / "llama_cpp.safetensors")
    comparison = compare(theirs, record(ORACLE, theirs.ids))
    assert [row.name for row in comparison.rows] == ["log_probs"] and comparison.same_best_token == 1.0
    assert comparison.rows[0].difference < 1e-5
    name = next(n for n in load_file(ORACLE / "model.safetensors") if n.endswith("layers.0.mixer.D"))
    other = changed(ORACLE, tmp_path / "other", name, lambda tensor: tensor * 1.1)
    assert compare(theirs, record(other, theirs.ids), 1e-4).first_row.label == "log-probabilities"


def test_a_batch_of_one_and_numpy(tmp_path):
    logits = numpy.random.default_rng(0).normal(size=(1, 3, 5)).astype("float32")
    numpy.savez(tmp_path / "r.npz", input_ids=numpy.array([[4, 5, 6]]), logits=logits, something_else=numpy.zeros(2))
    recording = read(tmp_path / "r.npz")
    assert recording.ids == [4, 5, 6] and recording.tensors["logits"].shape == (3, 5)
    logged = whole("b", recording.ids, log_probs=torch.tensor(logits[0]).double().log_softmax(-1))
    assert compare(recording, logged).rows[0].difference < 1e-6  # either side may have either


def test_numbers_that_are_none():
    def one(*values):
        return whole("x", IDS[:1].tolist(), logits=torch.tensor([list(values)]))

    def difference(a, b):
        return compare(a, b).rows[0].difference

    nan, inf = math.nan, math.inf
    assert difference(one(1.0, 2.0), one(1.0, nan)) == inf
    assert difference(one(1.0, nan), one(1.0, 2.0)) == inf
    assert difference(one(1.0, nan), one(1.0, nan)) == 0.0
    assert difference(one(1.0, -inf), one(1.0, -inf)) == 0.0
    assert difference(one(1.0, -inf), one(1.0, 3.0)) == inf
    assert difference(one(0.0, 0.0), one(0.0, 1.0)) == inf
    assert difference(one(0.0, 0.0), one(0.0, 0.0)) == 0.0
    assert difference(one(1.0, 2.0), one(1.0, 2.0, 3.0)) == inf
    row = compare(one(1.0, 2.0), one(1.0, nan), 1e9).first_row
    assert row is not None and row.name == "logits"


def test_what_cannot_be_compared(folder, tmp_path):
    a = record(folder, IDS)
    with pytest.raises(ValueError, match=r"are of different tokens \(23 and 22\)"):
        compare(a, record(folder, IDS[:-1]))
    with pytest.raises(ValueError, match="no tensor in common"):
        compare(a, whole("b", IDS.tolist(), **{"hidden_states.99": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"Token id 97 is outside the model's vocabulary of 97"):
        record(folder, torch.tensor([97]))
    with pytest.raises(ValueError, match=r"is neither .safetensors nor .npz"):
        a.save(tmp_path / "r.pt")
    save_file({"logits": torch.zeros(2, 3)}, tmp_path / "r.safetensors")
    with pytest.raises(ValueError, match="has no input_ids"):
        read(tmp_path / "r.safetensors")
    save_file({"input_ids": torch.zeros(2)}, tmp_path / "r.safetensors")
    with pytest.raises(ValueError, match=r"has neither logits, log_probs nor hidden_states.N"):
        read(tmp_path / "r.safetensors")
    (tmp_path / "r.npz").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path / "r.npz")


def test_long_texts_are_taken_whole(folder, monkeypatch):
    """Where the model takes a text in pieces, what is recorded is the whole of it."""
    from nemotron_h.generation import chunked_prefill as pieces

    at_once = record(folder, IDS)
    monkeypatch.setattr(pieces, "_STEP", 8)
    monkeypatch.setattr(pieces, "chunk_length", lambda *_: 8)
    comparison = compare(at_once, record(folder, IDS), 1e-5)
    assert len(comparison.rows) == 10 and comparison.first_row is None

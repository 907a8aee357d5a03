"""Tensors by name, and tables that are checked before anything is read: each error names the tensor."""

import json

import pytest
import torch
from families import small_config, small_model
from safetensors.torch import load_file, save_file

from nemotron_h.checkpoints import published
from nemotron_h.checkpoints.tensors import Entry, Plan, SafetensorsFolder, Spec

FLOAT = torch.float32


def write(folder, tensors, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return folder


@pytest.fixture
def abc(tmp_path):
    """Three tensors in two files, with their index."""
    a, b, c = torch.arange(24.0).view(2, 3, 4), torch.arange(5, dtype=torch.int64), torch.randn(7).bfloat16()
    write(tmp_path, {"a": a, "b": b}, "model-1.safetensors")
    write(tmp_path, {"c": c}, "model-2.safetensors")
    weight_map = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path, {"a": a, "b": b, "c": c}


def test_reads_by_name(abc, monkeypatch):
    monkeypatch.setattr(SafetensorsFolder, "_MAPPED", 0)  # each file is closed after each tensor
    path, tensors = abc
    folder = SafetensorsFolder(path)
    assert folder.specs == {name: Spec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    assert {name: spec.nbytes for name, spec in folder.specs.items()} == {"a": 96, "b": 40, "c": 14}
    for name in ("a", "c", "b", "a"):
        assert torch.equal(folder.read(name), tensors[name])
    assert torch.equal(folder.read("a", 1), tensors["a"][1])
    assert torch.equal(folder.read("b", slice(1, 9)), tensors["b"][1:])


def test_a_file_of_the_index_is_not_there(abc):
    path, _ = abc
    (path / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model-2.safetensors, which has the tensor c: fetch"):
        SafetensorsFolder(path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", r"is no JSON \(.*\): fetch or write it again"),
        ("[]", "has no names and values"),
        ("{}", "has no weight_map"),
    ],
)
def test_an_index_that_is_none(abc, text, problem):
    path, _ = abc
    (path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=f"model.safetensors.index.json {problem}"):
        SafetensorsFolder(path)


def test_a_tensor_in_two_files(abc):
    path, tensors = abc
    write(path, {"a": tensors["a"]})
    with pytest.raises(ValueError, match=r"has model.safetensors and an index that names model-1.safetensors, two"):
        SafetensorsFolder(path)
    (path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"has a in model-1.safetensors and in model.safetensors: take one of"):
        SafetensorsFolder(path)
    (path / "model.safetensors").unlink()
    assert SafetensorsFolder(path).specs.keys() == tensors.keys()


@pytest.mark.parametrize(("kept", "lost"), [(100, "a"), (-1, "b"), (-41, "a")])
def test_a_cut_file_names_the_first_tensor_that_is_gone(tmp_path, kept, lost):
    write(tmp_path, {"a": torch.ones(24), "b": torch.ones(10)})  # a's bytes come first
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    file.write_bytes(data[: header + 20] if kept > 0 else data[:kept])
    with pytest.raises(
        ValueError, match=rf"cannot be read, from the tensor {lost} on .*: fetch or write it again"
    ) as error:
        SafetensorsFolder(tmp_path)
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no safetensors at all", b"\xff" * 64])
def test_what_is_no_safetensors_file(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        SafetensorsFolder(tmp_path)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(ValueError, match=r"no \*.safetensors; name a folder"):
        SafetensorsFolder(tmp_path)


def joined(tmp_path):
    """ab is a over b; c goes as it is; rest is left out on purpose."""
    tensors = {"a": torch.ones(2, 3), "b": torch.zeros(1, 3), "c": torch.arange(4.0), "rest": torch.ones(1)}
    source = SafetensorsFolder(write(tmp_path / "source", tensors))
    entries = [
        Entry("ab", Spec((3, 3), torch.float16), {"a": (2, 3), "b": (1, 3)}, lambda *parts: torch.cat(parts)),
        Entry("c", Spec((4,), FLOAT), {"c": (4,)}),
    ]
    return Plan(source, entries, {"rest": "nobody reads it"})


def test_a_plan_makes_tensors_out_of_others(tmp_path):
    plan = joined(tmp_path)
    plan.check()
    assert plan.nbytes == 9 * 2 + 4 * 4
    ab = plan.entries[0].read(plan.source)
    assert ab.dtype == torch.float16 and ab.is_contiguous()
    assert ab.tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]
    assert list(plan.lines()) == [
        "ab [3, 3] float16 <- a, b",
        "c [4] float32 <- c",
        "not converted: rest (nobody reads it)",
    ]


def test_a_plan_refuses_what_does_not_fit(tmp_path):
    plan = joined(tmp_path)
    spec = plan.source.specs.pop("b")
    with pytest.raises(ValueError, match="lacks the tensor b, which its config asks for"):
        plan.check()
    assert "missing: b" in list(plan.lines()) and plan.missing() == ["b"]
    plan.source.specs["b"] = Spec((1, 4), FLOAT)
    with pytest.raises(ValueError, match=r"has b with shape \(1, 4\) where its config asks for \(1, 3\)"):
        plan.check()
    plan.source.specs |= {"b": spec, "extra.0": spec, "extra.1": spec}
    with pytest.raises(ValueError, match=r"has the tensor extra.0 \(and 1 others\), which no layer of its config has"):
        plan.check()
    assert "left over: extra.0 [1, 3]" in list(plan.lines())


def test_numbers_do_not_become_infinite(tmp_path):
    """What was infinite stays so; what the narrower dtype cannot hold is said with the tensor's name."""

    def stored(last, dtype):
        source = SafetensorsFolder(write(tmp_path, {"a": torch.tensor([1.0, torch.inf, last])}))
        return Entry("big", Spec((3,), dtype), {"a": (3,)}).read(source)

    assert stored(65504, torch.float16).tolist() == [1, torch.inf, 65504]
    assert stored(1e6, torch.bfloat16).isinf().tolist() == [False, True, False]
    with pytest.raises(ValueError, match="big has values that float16 cannot hold; write bfloat16 or float32"):
        stored(1e6, torch.float16)


def test_a_fingerprint_is_of_files_tensors_and_options(tmp_path):
    plan = joined(tmp_path)
    same = plan.fingerprint("x", 1)
    assert plan.fingerprint("x", 1) == same and plan.fingerprint("x", 2) != same
    fewer = Plan(plan.source, plan.entries[:1], plan.unused)
    assert fewer.fingerprint("x", 1) != same
    write(plan.source.path, {**load_file(plan.source.files[0]), "a": torch.zeros(2, 3)})
    assert plan.fingerprint("x", 1) != same


# -- folders of the family -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["dense", "moe", "latent", "mamba", "attention", "tied"])
def test_the_published_names_are_those_on_disk(family, tmp_path):
    mtp = {"num_nextn_predict_layers": 2, "mtp_hybrid_override_pattern": "*E"} if family == "latent" else {}
    model = small_model(family, dtype=FLOAT, **mtp)
    model.save_pretrained(tmp_path)
    on_disk = {name: tuple(t.shape) for name, t in load_file(tmp_path / "model.safetensors").items()}
    assert published.tensors(model.config) == on_disk


def test_other_names_are_read_as_the_published_ones(tmp_path):
    """As in memory, experts stacked; the embedding in the singular. Which row is whose expert is written out here."""
    model = small_model("moe", dtype=FLOAT)
    model.save_pretrained(tmp_path / "published")
    stacked = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert stacked["model.layers.1.mixer.experts.up_proj"].shape == (8, 24, 32)
    stacked["backbone.embedding.weight"] = stacked.pop("model.embeddings.weight")
    write(tmp_path / "memory", stacked)
    model.config.save_pretrained(tmp_path / "memory")
    read, expected = published.PublishedFolder(tmp_path / "memory"), load_file(tmp_path / "published/model.safetensors")
    assert read.specs.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(read.read(name), tensor), name
    for expert in range(8):
        row = stacked["model.layers.4.mixer.experts.down_proj"][expert]
        assert torch.equal(read.read(f"backbone.layers.4.mixer.experts.{expert}.down_proj.weight"), row)
    assert read.stored_name("backbone.layers.4.mixer.experts.3.down_proj.weight").endswith("experts.down_proj[3]")


def test_a_tensor_under_two_names(tmp_path):
    model = small_model("dense", dtype=FLOAT)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    write(tmp_path, {**tensors, "model.norm_f.weight": tensors["backbone.norm_f.weight"].clone()})
    with pytest.raises(ValueError, match=r"has backbone.norm_f.weight twice"):
        published.PublishedFolder(tmp_path)


def test_the_copied_head_of_a_tied_model_is_passed_over(tmp_path):
    model = small_model("tied", dtype=FLOAT)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    write(tmp_path, {**tensors, "lm_head.weight": tensors["backbone.embeddings.weight"].clone()})
    assert published.PublishedFolder(tmp_path).specs.keys() == tensors.keys()


@pytest.mark.parametrize("row", [0, 70, 96])
def test_another_head_of_a_tied_model_is_not_lost(tmp_path, row):
    model = small_model("tied", dtype=FLOAT)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["backbone.embeddings.weight"].clone()
    head[row, 3] += 1
    write(tmp_path, {**tensors, "lm_head.weight": head})
    with pytest.raises(ValueError, match=r"has a lm_head.weight that differs .*: set it to false in config.json, or"):
        published.PublishedFolder(tmp_path)


def test_only_folders_of_this_family(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json"):
        published.PublishedFolder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(small_config().to_dict() | {"model_type": "llama"}))
    with pytest.raises(ValueError, match="is a 'llama' model"):
        published.PublishedFolder(tmp_path)

"""`nemotron-h verify`: the exit code, the layer it names, and what it takes for either side."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from nemotron_h.checkpoints import formats
from nemotron_h.checkpoints.huggingface import from_huggingface

ORACLE = Path(__file__).parents[1] / "data" / "oracle" / "dense"


@pytest.fixture(scope="module")
def other(base_model, tmp_path_factory) -> str:
    """The same model, the attention of layer 2 changed."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(base_model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.layers.2.mixer.o_proj.weight"] *= 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.core
def test_two_folders(cli, cli_json, base_model, other) -> None:
    assert "compute the same, bit for bit, on 64 tokens in float32" in cli("verify", base_model, base_model).stdout
    text = cli("verify", base_model, other, code=1).stdout
    assert "The first that differs is layer 2 (attention): by " in text
    facts = cli_json("verify", base_model, other, "--tokens", "7", code=1)
    assert facts["tokens"] == 7 and facts["equal"] is False and facts["first"] == "hidden_states.3"
    assert [row["difference"] for row in facts["rows"][:3]] == [0.0, 0.0, 0.0]
    assert cli_json("verify", base_model, other, "--tolerance", "1e9")["equal"] is True


def test_recordings(cli, cli_json, refused, base_model, other, tmp_path) -> None:
    for name in ("a.npz", "a.safetensors"):
        file = str(tmp_path / "a new folder" / name)
        assert (
            f"{file} has what {base_model} computes of 9 tokens"
            in cli("verify", base_model, "--record", file, "--tokens", "9").stdout
        )
        assert cli_json("verify", file, base_model)["tokens"] == 9
        facts = cli_json("verify", file, other, code=1)
        assert facts["first"] == "hidden_states.3" and facts["reference"] == file
        assert cli_json("verify", other, file, code=1)["first"] == "hidden_states.3"  # B's tokens
        assert "is there already" in refused("verify", base_model, "--record", file)
    files = [str(tmp_path / "a new folder" / name) for name in ("a.npz", "a.safetensors")]
    assert cli_json("verify", *files)["equal"] is True
    assert len(list((tmp_path / "a new folder").iterdir())) == 2
    assert "has its own tokens; leave --text out" in refused("verify", file, base_model, "--text", "Hello")


def test_a_dump_of_another_program(cli) -> None:
    assert "compute the same to" in cli("verify", str(ORACLE / "llama_cpp.safetensors"), str(ORACLE)).stdout


def test_a_text(cli_json, base_model) -> None:
    text = "Anna has 12 apples."
    assert cli_json("verify", base_model, base_model, "--text", text)["tokens"] == len(
        AutoTokenizer.from_pretrained(base_model)(text)["input_ids"]
    )


def test_a_foreign_format_is_converted_for_it(cli_json, base_model, other, tmp_path, monkeypatch) -> None:
    """And what it is converted into does not stay."""
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "of").write_text(other)
    written = []

    def to_huggingface(path):
        conversion = from_huggingface((path / "of").read_text())
        write = conversion.write
        conversion.write = lambda folder, done: (written.append(folder), write(folder, done))[1]
        return conversion

    real = formats.module
    stand_in = SimpleNamespace(recognises=lambda path: (path / "of").exists(), to_huggingface=to_huggingface)
    monkeypatch.setattr(formats, "MODULES", {"foreign": "foreign"})
    monkeypatch.setattr(formats, "module", lambda name: stand_in if name == "foreign" else real(name))
    foreign = str(tmp_path / "foreign")
    facts = cli_json("verify", base_model, foreign, code=1)
    assert facts["first"] == "hidden_states.3" and facts["other"] == foreign
    assert cli_json("verify", foreign, other)["equal"] is True
    assert len(written) == 2 and not any(folder.parent.exists() for folder in written)


def test_refusals(refused, base_model, tmp_path) -> None:
    assert "nothing to compare with: name B, or write what A computes with --record" in refused("verify", base_model)
    assert "neither .safetensors nor .npz" in refused("verify", base_model, "--record", str(tmp_path / "x.pt"))
    assert "There is no" in refused("verify", base_model, str(tmp_path / "nowhere"))
    untold = shutil.copytree(base_model, tmp_path / "untold", ignore=shutil.ignore_patterns("tokenizer*"))
    said = refused("verify", str(untold), base_model, "--text", "hi")
    assert f"{untold} has no tokenizer; leave --text out" in said
    assert "'float7'" in refused("verify", base_model, base_model, "--dtype", "float7")
    save_file({"input_ids": torch.zeros(2, dtype=torch.int64)}, tmp_path / "empty.safetensors")
    assert "neither logits" in refused("verify", str(tmp_path / "empty.safetensors"), base_model)


def test_numbers_that_json_has_not(cli, base_model, tmp_path) -> None:
    folder = tmp_path / "nan"
    shutil.copytree(base_model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.norm_f.weight"][0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def refuse(constant):
        raise AssertionError(constant)

    text = cli("verify", base_model, str(folder), "--json", code=1).stdout
    facts = json.loads(text, parse_constant=refuse)
    assert facts["first"] == "norm_f" and facts["rows"][-1]["difference"] is None

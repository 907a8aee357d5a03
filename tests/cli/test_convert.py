"""`nemotron-h convert`: thin over the formats, so what it says, when it exits how, and which options go where."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron_h.checkpoints import formats, published, writing
from nemotron_h.checkpoints.tensors import Entry, Plan
from nemotron_h.checkpoints.writing import Conversion

SAID = []


def stand_in():
    """A format "twin": the published tensors in a file twin.safetensors, their names reversed."""

    def recognises(path):
        return (path / "twin.safetensors").exists()

    def from_huggingface(path, tensor_parallel=1, experts="grouped", shard_bytes=10):
        SAID.append((tensor_parallel, experts, shard_bytes))
        source = published.PublishedFolder(path)
        expected = published.tensors(source.config)
        entries = [Entry(name[::-1], source.specs[name], {name: shape}) for name, shape in expected.items()]
        plan = Plan(source, entries)

        def write(folder, done):
            with writing.atomic_write(folder / "twin.safetensors") as temporary:
                save_file({entry.name: entry.read(source) for entry in entries}, temporary)
            done(plan.nbytes)

        return Conversion("twin", plan, write, remarks=["Its names read backwards."])

    return SimpleNamespace(recognises=recognises, from_huggingface=from_huggingface)


@pytest.fixture
def twin(monkeypatch):
    real = formats.module
    monkeypatch.setattr(formats, "MODULES", {"twin": "twin"})
    monkeypatch.setattr(formats, "NAMES", ("huggingface", "twin"))
    monkeypatch.setattr(formats, "module", lambda name: stand_in() if name == "twin" else real(name))
    SAID.clear()


@pytest.mark.parametrize("command", ["convert", "verify", "doctor"])
def test_help_has_an_example(cli, command):
    text = cli(command, "--help").stdout
    assert f"Example: nemotron-h {command}" in text and "--json" in text
    assert command in cli("--help").stdout


def test_written(twin, cli, cli_json, base_model, tmp_path):
    text = cli("convert", base_model, str(tmp_path / "dest"), "--to", "twin", "--tensor-parallel", "2").stdout
    assert f"{tmp_path / 'dest'} is written: huggingface -> twin" in text
    assert "Its names read backwards." in text
    assert f"Check it: nemotron-h verify {base_model} {tmp_path / 'dest'}" in text
    assert SAID == [(2, "grouped", 10)]
    before, after = (load_file(f) for f in (Path(base_model) / "model.safetensors", tmp_path / "dest/twin.safetensors"))
    assert {name[::-1] for name in before} == after.keys()

    options = ("--experts", "sequential", "--shard-size", "3kB")
    facts = cli_json("convert", base_model, str(tmp_path / "other"), "--to", "twin", *options)
    assert SAID[-1] == (1, "sequential", 3000)
    assert (facts["from"], facts["to"], facts["tensors"]) == ("huggingface", "twin", len(before))
    assert facts["bytes"] == sum(tensor.nbytes for tensor in before.values())
    assert facts["bytes_on_disk"] == (tmp_path / "other/twin.safetensors").stat().st_size
    assert facts["fewer_bits"] is False
    assert facts["remarks"] == ["Its names read backwards."] and facts["next"].startswith("nemotron-h verify")


def test_the_same_format_in_another_dtype(cli_json, base_model, tmp_path):
    facts = cli_json("convert", base_model, str(tmp_path / "half"), "--to", "huggingface", "--dtype", "bfloat16")
    assert facts["from"] == facts["to"] == "huggingface" and facts["fewer_bits"] is True
    before, after = (load_file(folder / "model.safetensors") for folder in (Path(base_model), tmp_path / "half"))
    assert before.keys() == after.keys()
    assert after["lm_head.weight"].dtype == torch.bfloat16
    assert after["backbone.layers.0.mixer.A_log"].dtype == torch.float32
    assert (tmp_path / "half" / "tokenizer.json").read_bytes() == (Path(base_model) / "tokenizer.json").read_bytes()


def test_dry_run(twin, cli, cli_json, base_model, tmp_path):
    arguments = ("convert", base_model, str(tmp_path / "dest"), "--to", "twin", "--dry-run")
    lines = cli(*arguments).stdout.splitlines()
    shape = list(load_file(Path(base_model) / "model.safetensors")["lm_head.weight"].shape)
    assert f"thgiew.daeh_ml {shape} float32 <- lm_head.weight" in lines
    assert any("nothing was written" in line for line in lines)
    facts = cli_json(*arguments)
    assert facts["problem"] is None and facts["missing"] == facts["left_over"] == []
    assert len(facts["plan"]) == facts["tensors"]
    assert list(tmp_path.iterdir()) == []
    Path(arguments[2]).mkdir()  # nothing is written, so nothing can be in the way
    (Path(arguments[2]) / "file").write_text("mine")
    cli(*arguments)


def test_dry_run_of_what_does_not_fit(twin, cli, base_model, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    tensors = load_file(Path(base_model) / "model.safetensors")
    tensors["more"] = torch.ones(2, 3)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((Path(base_model) / "config.json").read_text())
    result = cli("convert", str(folder), str(tmp_path / "dest"), "--to", "twin", "--dry-run", code=2)
    assert "left over: more [2, 3]" in result.stdout
    assert "has the tensor more, which no layer of its config has" in result.stderr
    result = cli("convert", str(folder), str(tmp_path / "dest"), "--to", "twin", "--dry-run", "--json", code=2)
    facts = json.loads(result.stdout)
    assert facts["left_over"] == ["more"] and "the tensor more" in facts["problem"]
    assert not (tmp_path / "dest").exists()


def test_refusals(twin, refused, base_model, tmp_path):
    dest = str(tmp_path / "dest")
    assert "no format 'onnx'; write one of huggingface, twin" in refused("convert", base_model, dest, "--to", "onnx")
    assert "huggingface -> twin takes no --outtype" in refused(
        "convert", base_model, dest, "--to", "twin", "--outtype", "f16"
    )
    assert "huggingface -> twin takes no --dtype" in refused(
        "convert", base_model, dest, "--to", "twin", "--dtype", "float16"
    )
    assert "'five' is not a size" in refused("convert", base_model, dest, "--to", "twin", "--shard-size", "five")
    assert "There is no" in refused("convert", str(tmp_path / "nowhere"), dest, "--to", "twin")
    assert "is there already" in refused("convert", base_model, base_model, "--to", "twin")
    assert list(tmp_path.iterdir()) == []


def test_interrupted(twin, cli, base_model, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(writing.Entry, "read", interrupt)
        result = cli("convert", base_model, str(tmp_path / "dest"), "--to", "twin", code=130)
    assert f"Interrupted; run it again to go on from {tmp_path / '.dest.partial'}." in result.stderr
    assert not (tmp_path / "dest").exists()
    cli("convert", base_model, str(tmp_path / "dest"), "--to", "twin")
    assert [path.name for path in tmp_path.iterdir()] == ["dest"]


def test_the_bar_reaches_its_end(twin, base_model, tmp_path, monkeypatch):
    """On a terminal it counts the bytes; nowhere else is anything drawn."""
    from nemotron_h.cli import convert

    class Terminal:
        encoding = "utf-8"

        def __init__(self):
            self.text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            pass

        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with convert._progress("a -> b", 2_000_000) as done:
        done(1_500_000)
        done(500_000)
    assert "a -> b" in sys.stderr.text and "2.0/2.0 MB" in sys.stderr.text

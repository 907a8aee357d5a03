"""The scripts in conversion/: there and back, the dry run, and an error as one sentence."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from families import small_model
from safetensors.torch import load_file, save_file

SCRIPTS = Path(__file__).parents[2] / "conversion"


@pytest.mark.parametrize(
    ("script", "there", "back", "listed"),
    [
        ("megatron", ["--tensor-parallel", "2"], [], "decoder.final_norm.weight [32] bfloat16 <- backbone.norm_f"),
        ("megatron", ["--to", "megatron-legacy"], [], "mp_rank_00/decoder.final_norm.weight [32] bfloat16 <- "),
        ("gguf_export", ["--outtype", "f32"], ["--dtype", "bfloat16"], "output_norm.weight [32] float32 <- backbone."),
        ("modelopt", ["--to", "fp8", "--exclude", "*.up_proj,*.down_proj"], ["--to", "huggingface"], "weight_scale []"),
    ],
)
def test_there_and_back(script, there, back, listed, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf") if script == "gguf_export" else None
    model = small_model("attention", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "ours")
    expected = load_file(tmp_path / "ours" / "model.safetensors")
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def run(source, dest, *options):
        path = str(SCRIPTS / f"{script}.py")
        monkeypatch.setattr(sys, "argv", [path, str(tmp_path / source), str(tmp_path / dest), *options])
        runpy.run_path(path, run_name="__main__")

    run("ours", "theirs", *there, "--dry-run")
    assert listed in capsys.readouterr().out
    assert not (tmp_path / "theirs").exists()
    run("ours", "theirs", *there)
    run("theirs", "back", *back)
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == expected.keys()
    exact = [name for name in expected if script != "modelopt" or ".mixer.u" in name or ".mixer.d" in name]
    assert exact and all(torch.equal(found[name], expected[name]) for name in exact)
    with pytest.raises(SystemExit, match="theirs is there already"):
        run("ours", "theirs", *there)

    del expected["backbone.norm_f.weight"]
    save_file(expected, tmp_path / "ours" / "model.safetensors", metadata={"format": "pt"})
    for options in ([], ["--dry-run"]):
        with pytest.raises(SystemExit, match=r"lacks the tensor backbone.norm_f.weight, .*: fetch or write"):
            run("ours", "new", *there, *options)

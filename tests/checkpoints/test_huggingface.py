"""Folders rewritten: bit for bit, in another dtype, from other names."""

import json

import pytest
import torch
from families import small_model, tokens
from safetensors.torch import load_file, save_file

from nemotron_h import NemotronHForCausalLM
from nemotron_h.checkpoints import formats, published, writing

FLOAT32_ANYWAY = ("A_log", "D", "dt_bias", "gate.weight", "gate.e_score_correction_bias")


def rewrite(source, dest, **options):
    conversion = formats.conversion(source, "huggingface", **options)
    writing.convert(conversion, dest)
    return conversion


def contents(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("family", ["dense", "moe", "latent", "mamba", "attention", "tied"])
@pytest.mark.parametrize("shard_bytes", [None, 20_000])
def test_bit_for_bit(family, shard_bytes, tmp_path):
    mtp = {"num_nextn_predict_layers": 1} if family == "latent" else {}
    model = small_model(family, dtype=torch.float32, **mtp).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    rewrite(tmp_path / "source", tmp_path / "dest", shard_bytes=shard_bytes)
    before, after = contents(tmp_path / "source"), contents(tmp_path / "dest")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path / "dest", dtype="auto")
    ids = tokens(1, 19)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_another_dtype(tmp_path):
    small_model("moe", dtype=torch.float32).save_pretrained(tmp_path / "source")
    rewrite(tmp_path / "source", tmp_path / "half", dtype="bfloat16")
    before, after = contents(tmp_path / "source"), contents(tmp_path / "half")
    kept = 0
    for name, tensor in before.items():
        expected = torch.float32 if name.endswith(FLOAT32_ANYWAY) else torch.bfloat16
        assert after[name].dtype == expected, name
        assert torch.equal(after[name], tensor.to(expected))
        kept += expected == torch.float32
    assert kept == 3 * 3 + 2 * 3  # three Mamba layers and three MoE layers
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"
    # and back: what was float32 all along is as it was
    rewrite(tmp_path / "half", tmp_path / "whole", dtype="float32")
    back = contents(tmp_path / "whole")
    assert all(back[name].dtype == torch.float32 for name in back)
    assert all(torch.equal(back[name], before[name]) for name in before if name.endswith(FLOAT32_ANYWAY))
    # saving a model that was loaded in that dtype gives the same file
    NemotronHForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    saved = contents(tmp_path / "saved")
    assert saved.keys() == after.keys()
    assert all(saved[name].dtype == after[name].dtype and torch.equal(saved[name], after[name]) for name in saved)


def test_merges_of_other_tools(tmp_path):
    """Names as in memory become published ones, and the dry run names what they were."""
    model = small_model("moe", dtype=torch.float32)
    (tmp_path / "merged").mkdir()
    save_file(dict(model.state_dict()), tmp_path / "merged/model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(tmp_path / "merged")
    model.save_pretrained(tmp_path / "expected")
    conversion = rewrite(tmp_path / "merged", tmp_path / "dest")
    expected, found = contents(tmp_path / "expected"), contents(tmp_path / "dest")
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    line = (
        "backbone.layers.1.mixer.experts.5.up_proj.weight [24, 32] float32 <- model.layers.1.mixer.experts.up_proj[5]"
    )
    assert line in list(conversion.plan.lines())


def test_mtp_that_transformers_dropped(tmp_path):
    model = small_model("latent", dtype=torch.float32, num_nextn_predict_layers=1)
    model.save_pretrained(tmp_path / "source")
    tensors = contents(tmp_path / "source")
    without = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
    assert len(without) < len(tensors)
    save_file(without, tmp_path / "source/model.safetensors", metadata={"format": "pt"})
    conversion = rewrite(tmp_path / "source", tmp_path / "dest")
    assert "has no mtp.* tensors" in conversion.remarks[0]
    assert contents(tmp_path / "dest").keys() == without.keys()
    assert not published.PublishedFolder(tmp_path / "dest").config.has_mtp
    # but one of them alone is a mistake
    save_file(
        {**without, "mtp.layers.0.norm.weight": tensors["mtp.layers.0.norm.weight"]},
        tmp_path / "source/model.safetensors",
    )
    with pytest.raises(ValueError, match=r"lacks the tensor mtp\.layers\.0\.enorm\.weight"):
        rewrite(tmp_path / "source", tmp_path / "other")


def test_refusals(tmp_path):
    model = small_model("dense", dtype=torch.float32)
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="no dtype 'float7'"):
        formats.conversion(tmp_path / "source", "huggingface", dtype="float7")
    with pytest.raises(ValueError, match=r"huggingface -> huggingface takes no --tensor-parallel; leave it out"):
        formats.conversion(tmp_path / "source", "huggingface", tensor_parallel=2)
    with pytest.raises(ValueError, match="There is no format 'onnx'; write one of huggingface, megatron"):
        formats.conversion(tmp_path / "source", "onnx")
    with pytest.raises(ValueError, match=r"There is no .*nowhere"):
        formats.detect(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is in none of the formats huggingface, megatron"):
        formats.detect(tmp_path / "empty")
    NemotronHForCausalLM.from_pretrained(tmp_path / "source", quantize="int8").save_pretrained(tmp_path / "int8")
    with pytest.raises(ValueError, match=r"int8 is quantised \(nemotron_h_weight_only\)"):
        formats.conversion(tmp_path / "int8", "huggingface")


def test_a_missing_optional_package_hides_its_own_format_only(tmp_path, monkeypatch):
    small_model("dense", dtype=torch.float32).save_pretrained(tmp_path / "source")

    def module(name):
        if name == "gguf":
            raise ImportError("no gguf")
        return importlib_module(name)

    importlib_module = formats.module
    monkeypatch.setattr(formats, "module", module)
    assert formats.detect(tmp_path / "source") == "huggingface"

"""Tensor parallelism: two processes are one, in loss, gradients, generated ids and the files written."""

import json

import pytest
import torch
from families import small_model, tokens
from processes import launch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nemotron_h import parallel

pytestmark = pytest.mark.core

CASES = {
    "dense": ("dense", {}),
    "moe": ("moe", {}),
    "latent": ("latent", {}),
    "tied": ("tied", {"vocab_size": 98}),
    "biases": ("dense", {"mamba_proj_bias": True, "attention_bias": True, "mlp_bias": True, "use_conv_bias": False}),
    "one key head": ("dense", {"num_key_value_heads": 1, "attention_bias": True}),
}


def model_of(case):
    family, overrides = CASES[case]
    return small_model(family, dtype=torch.float32, **{"vocab_size": 98, **overrides})


def batch():
    ids = tokens(2, 21)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def answers(model):
    """Loss, gradients by name (whole, rows in the published order), logits and greedy ids."""
    loss = model(**batch()).loss
    loss.backward()
    orders = parallel._orders(model)
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            order = parallel._order_of(name, orders)
            gradients[name] = grad if order is None else order.published(grad)
    prompt = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model(**prompt).logits
        ids = model.generate(**prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
        static = model.generate(
            **prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, cache_implementation="static"
        )
    return {"loss": loss.item(), "gradients": gradients, "logits": logits, "ids": ids, "static": static}


def shards(model):
    return {name: tuple((p.to_local() if hasattr(p, "to_local") else p).shape) for name, p in model.named_parameters()}


def in_two(rank, folder):
    found = {}
    for case in CASES:
        model = AutoModelForCausalLM.from_pretrained(folder / case, tp_plan="auto")
        found[case] = {"shards": shards(model), **answers(model)}
        model.save_pretrained(folder / f"{case} saved")
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    for case in CASES:
        model_of(case).save_pretrained(folder / case)
    return folder, launch(in_two, folder)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(case, runs):
    one = answers(model_of(case))
    for rank in runs[1]:
        two = rank[case]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        torch.testing.assert_close(two["logits"], one["logits"], rtol=1e-5, atol=1e-5)
        assert two["gradients"].keys() == one["gradients"].keys()
        for name, expected in one["gradients"].items():
            scale = expected.abs().max().item()
            torch.testing.assert_close(two["gradients"][name], expected, rtol=0, atol=1e-5 * scale + 1e-9, msg=name)
        assert torch.equal(two["ids"], one["ids"])
        assert torch.equal(two["static"], one["ids"])


@pytest.mark.parametrize("case", CASES)
def test_the_saved_folder_is_the_loaded_one(case, runs):
    folder, _ = runs
    before = load_file(folder / case / "model.safetensors")
    after = load_file(folder / f"{case} saved" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    configs = [json.loads((folder / name / "config.json").read_text()) for name in (case, f"{case} saved")]
    assert configs[0] == configs[1]


def test_each_process_has_its_half(runs):
    for case, split in (
        ("dense", ("in_proj", "conv1d", "A_log", "mixer.D", "dt_bias", "mixer.norm", "out_proj", "_proj")),
        ("latent", ("in_proj", "conv1d", "A_log", "experts", "fc1_latent", "fc2_latent", "lm_head", "embeddings")),
    ):
        whole = {name: p.numel() for name, p in model_of(case).named_parameters()}
        for rank in runs[1]:
            for name, shape in rank[case]["shards"].items():
                size = torch.Size(shape).numel()
                if any(part in name for part in split):
                    assert 2 * size == whole[name], name
                elif name.endswith(("layers.0.norm.weight", "norm_f.weight", "gate.weight")):
                    assert size == whole[name], name

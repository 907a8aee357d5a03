"""Tensor parallelism: two processes are one, in loss, gradients, generated ids and the files written."""

import json
import re

import pytest
import torch
from families import FAMILIES, small_config, small_model, tokens
from processes import launch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from nemotron_h import NemotronHCache
from nemotron_h.parallel import tensor as parallel

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


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def batch():
    ids = tokens(2, 21)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def step(model):
    """Loss, and gradients by name: whole, rows in the published order."""
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
    return {"loss": loss.item(), "gradients": gradients}


def answers(model):
    """Logits, also after a snapshot, and greedy ids."""
    prompt = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model(**prompt).logits
        ids = model.generate(**prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
        static = model.generate(
            **prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, cache_implementation="static"
        )
        cache, other = NemotronHCache(model.config), NemotronHCache(model.config)
        model(prompt["input_ids"][:, :-1], cache=cache)
        other.restore(cache.snapshot())
        restored = model(prompt["input_ids"][:, -1:], cache=other).logits
    return {"logits": logits, "ids": ids, "static": static, "restored": restored}


def shards(model):
    return {name: tuple((p.to_local() if hasattr(p, "to_local") else p).shape) for name, p in model.named_parameters()}


def in_two(rank, folder):
    found = {}
    for case in CASES:
        model = AutoModelForCausalLM.from_pretrained(folder / case, tp_plan="auto")
        found[case] = {"shards": shards(model), **step(model), **answers(model)}
        model.save_pretrained(folder / f"{case} saved")
        exact = AutoModelForCausalLM.from_pretrained(folder / case, tp_plan="auto", dtype=torch.float64)
        found[case]["exact"] = step(exact)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    for case in CASES:
        model_of(case).save_pretrained(folder / case)
    return folder, launch(in_two, folder)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(case, runs):
    model = model_of(case)
    one, exact = {**step(model), **answers(model)}, step(model_of(case).double())
    for rank in runs[1]:
        two = rank[case]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        torch.testing.assert_close(two["logits"], one["logits"], rtol=1e-5, atol=1e-5)
        assert two["gradients"].keys() == one["gradients"].keys() == two["exact"]["gradients"].keys()
        for name, expected in one["gradients"].items():
            torch.testing.assert_close(two["gradients"][name], expected, rtol=1e-5, atol=1e-5, msg=name)
        torch.testing.assert_close(two["restored"], one["restored"], rtol=1e-5, atol=1e-5)
        assert torch.equal(two["ids"], one["ids"])
        assert torch.equal(two["static"], one["ids"])
        # float32 sums in another order; float64 shows that nothing else differs
        assert two["exact"]["loss"] == pytest.approx(exact["loss"], rel=1e-12)
        for name, expected in exact["gradients"].items():
            if not name.endswith("k_proj.bias"):  # nothing but rounding: softmax does not see it
                assert relative(two["exact"]["gradients"][name], expected) <= 1e-9, name


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


FOUR = {"mamba_num_heads": 8, "n_groups": 4, "vocab_size": 96}  # and two key heads
GRIDS = {"tp4": {"tp_size": 4}, "tp2 fsdp2": {"tp_size": 2, "fsdp_size": 2}}


def in_four(rank, folder):
    found = {}
    for name, sizes in GRIDS.items():
        model = AutoModelForCausalLM.from_pretrained(
            folder / "whole", dtype=torch.float64, distributed_config=DistributedConfig(**sizes)
        )
        found[name] = step(model)
        model.save_pretrained(folder / name)
    return found


@pytest.mark.skipif(
    not hasattr(PreTrainedModel, "_resolve_parallel_plans"), reason="one of TP and FSDP in this version"
)
def test_four_processes_with_fewer_key_heads_and_with_fsdp(tmp_path):
    small_model("latent", dtype=torch.float32, **FOUR).save_pretrained(tmp_path / "whole")
    ranks = launch(in_four, tmp_path, world=4)
    exact = step(small_model("latent", dtype=torch.float32, **FOUR).double())
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    for name in GRIDS:
        for rank in ranks:
            assert rank[name]["loss"] == pytest.approx(exact["loss"], rel=1e-12)
            for parameter, expected in exact["gradients"].items():
                assert relative(rank[name]["gradients"][parameter], expected) <= 1e-9, parameter
        saved = load_file(tmp_path / name / "model.safetensors")
        assert saved.keys() == whole.keys()
        assert all(torch.equal(saved[tensor].double(), whole[tensor].double()) for tensor in whole)


def test_rows_in_the_order_of_the_ranks():
    """Against slicing part by part, for every range that a process may read."""
    parts, world = (8, 8, 4, 4, 2), 2
    matrix = torch.arange(sum(parts) * 3.0).view(-1, 3)
    pieces = [part.chunk(world) for part in matrix.split(parts)]
    expected = torch.cat([piece[rank] for rank in range(world) for piece in pieces])
    order = parallel.RankOrder(parts, world)
    for source in (matrix, Slice(matrix)):
        rows = parallel._RankRows(source, order)
        assert rows.get_shape() == list(matrix.shape)
        assert torch.equal(rows[...], expected)
        for start in range(len(matrix)):
            for stop in range(start, len(matrix) + 1):
                assert torch.equal(rows[start:stop], expected[start:stop])
                assert torch.equal(rows[start:stop, 1:2], expected[start:stop, 1:2])
    assert torch.equal(order.published(expected), matrix)


class Slice:
    """What safetensors gives for a tensor that is not read yet; counts the rows that are."""

    def __init__(self, tensor):
        self.tensor, self.read = tensor, 0

    def get_shape(self):
        return list(self.tensor.shape)

    def __getitem__(self, index):
        found = self.tensor[index]
        self.read += len(found)
        return found


def test_a_process_reads_its_own_rows_alone():
    source = Slice(torch.zeros(26, 3))
    rows = parallel._RankRows(source, parallel.RankOrder((8, 8, 4, 4, 2), 2))
    assert len(rows[13:26]) == source.read == 13


@pytest.mark.parametrize(
    ("family", "overrides", "world", "words"),
    [
        ("dense", {"vocab_size": 96}, 3, "tp_size is 3, which does not divide n_groups=2"),
        ("dense", {}, 2, "tp_size is 2, which does not divide vocab_size=97"),
        (
            "attention",
            {"vocab_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2},
            3,
            "num_key_value_heads=2",
        ),
        ("moe", {"vocab_size": 98, "moe_intermediate_size": 25}, 2, "does not divide moe_intermediate_size=25"),
        ("dense", {"vocab_size": 98, "intermediate_size": 49}, 2, r"intermediate_size \(layer 1\)=49"),
        ("dense", {"vocab_size": 98, "quantization_config": {"quant_method": "x"}}, 2, "The model is quantised"),
    ],
)
def test_sizes_that_do_not_split_are_refused(family, overrides, world, words):
    with pytest.raises(ValueError, match=words):
        parallel.check_divides(small_config(family, **overrides), world)


def test_the_published_sizes_split():
    """Over as many as there are groups: 8."""
    sizes = {"vocab_size": 131072, "mamba_num_heads": 128, "n_groups": 8, "num_attention_heads": 40}
    for world in (2, 4, 8):
        parallel.check_divides(small_config("dense", **sizes, num_key_value_heads=8, intermediate_size=15680), world)
        parallel.check_divides(
            small_config(
                "latent",
                **(sizes | {"num_attention_heads": 32}),
                num_key_value_heads=2,
                moe_intermediate_size=1856,
                moe_shared_expert_intermediate_size=3712,
                moe_latent_size=1024,
            ),
            world,
        )


def test_plans_name_what_is_there():
    for family in FAMILIES:
        model = small_model(family)
        names = {re.sub(r"\.\d+\.", ".*.", name) for name, _ in [*model.named_modules(), *model.named_parameters()]}
        for plan in (model._tp_plan, model._ep_plan, model._fsdp_plan):
            assert {re.sub(r"\.\d+$", ".*", name) for name in names} >= {
                name for name in plan if not name.endswith(".*")
            }
        assert "lm_head" in model._tp_plan


def test_nothing_is_saved_in_the_order_of_the_ranks(tmp_path):
    model = small_model("dense")
    model.model.layers[0].mixer.in_proj.rank_order = parallel.RankOrder((48, 48, 32, 32, 6), 2)
    with pytest.raises(ValueError, match="these 2 tensor-parallel ranks"):
        model.save_pretrained(tmp_path, distributed_checkpoint=True)

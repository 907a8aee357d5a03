"""nemotron_h/ops/moe.py: the router against a sort in Python."""

from __future__ import annotations

import functools

import pytest
import torch
from comparing import assert_same, error, random

from nemotron_h import ops
from nemotron_h.ops import reference

CASES = {
    "4-of-8": {"experts": 8, "top_k": 4, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "scaling": 2.5},
    "unnormalised": {"experts": 8, "top_k": 3, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "scaling": 1.0},
    "groups": {"experts": 12, "top_k": 3, "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "scaling": 2.5},
    "groups-all-open": {
        "experts": 12,
        "top_k": 3,
        "n_group": 4,
        "topk_group": 4,
        "norm_topk_prob": True,
        "scaling": 1.0,
    },
    "groups-of-one": {"experts": 4, "top_k": 2, "n_group": 4, "topk_group": 3, "norm_topk_prob": True, "scaling": 1.0},
    "6-of-128": {"experts": 128, "top_k": 6, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "scaling": 2.5},
    "22-of-512": {"experts": 512, "top_k": 22, "n_group": 8, "topk_group": 4, "norm_topk_prob": True, "scaling": 5.0},
}


def by_expert(function, experts, **kwargs):
    """The weights scattered to their experts (T, E): what matters, whatever the order the chosen come in."""

    def call(logits, bias):
        indices, weights = function(logits, bias, **kwargs)
        assert indices.dtype == torch.int64 and indices.shape == weights.shape == (logits.shape[0], kwargs["top_k"])
        return torch.zeros(logits.shape, dtype=weights.dtype).scatter(1, indices, weights)

    return call


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_matches_the_reference_with_gradients(generator, case, dtype, tolerance):
    kwargs = CASES[case]
    logits = 2 * random(generator, 24, kwargs["experts"], dtype=dtype)
    # Large against the scores, so that it changes the choice, and of both signs.
    bias = 0.5 * random(generator, kwargs["experts"], dtype=dtype)
    run, expected = (by_expert(f, **kwargs) for f in (ops.router, reference.router))
    assert_same(run, expected, [logits, bias], tolerance, 10 * tolerance)


def test_the_bias_decides_the_choice_and_not_the_weight():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, 1.0])
    indices, weights = ops.router(logits, bias, top_k=2, n_group=1, topk_group=1, norm_topk_prob=False, scaling=1.0)
    assert sorted(indices[0].tolist()) == [0, 3]
    assert error(weights, logits.sigmoid().gather(1, indices)) == 0.0


def test_an_open_expert_below_zero_is_chosen_before_a_closed_one():
    # All biased scores are negative: masked with 0 instead of -inf, the closed group would win.
    logits = torch.tensor([[1.0, 0.9, -1.0, -1.1]])
    indices, _ = ops.router(
        logits, torch.full((4,), -5.0), top_k=2, n_group=2, topk_group=1, norm_topk_prob=True, scaling=1.0
    )
    assert sorted(indices[0].tolist()) == [0, 1]


def test_a_group_is_as_good_as_its_best_two():
    # The best single expert sits in group 1, the best pair in group 0.
    logits = torch.tensor([[0.8, 0.8, -3.0, 1.0, -3.0, -3.0]])
    indices, _ = ops.router(logits, torch.zeros(6), top_k=2, n_group=2, topk_group=1, norm_topk_prob=True, scaling=1.0)
    assert sorted(indices[0].tolist()) == [0, 1]


def test_low_precision_logits_are_weighed_in_float32(generator):
    kwargs = {"top_k": 3, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "scaling": 2.5}
    logits = random(generator, 5, 8, dtype=torch.bfloat16)
    _, weights = ops.router(logits, torch.zeros(8), **kwargs)
    assert weights.dtype == torch.float32
    assert error(weights.sum(-1), torch.full((5,), 2.5)) < 1e-6


def test_compiled_without_graph_breaks(generator):
    kwargs = {k: v for k, v in CASES["groups"].items() if k != "experts"}
    torch.compiler.reset()
    compiled = torch.compile(functools.partial(ops.router, **kwargs), fullgraph=True, backend="aot_eager")
    inputs = [random(generator, 5, 12), random(generator, 12)]
    run, expected = (by_expert(f, 12, **kwargs) for f in (compiled, ops.router))
    assert_same(run, expected, inputs, 1e-14)

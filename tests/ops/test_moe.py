"""nemotron_h/ops/moe.py: the router against a sort in Python."""

from __future__ import annotations

import functools

import pytest
import torch
from comparing import assert_same, error, random

from nemotron_h import ops
from nemotron_h.ops import reference

# experts, top_k, n_group, topk_group, norm_topk_prob, scaling
CASES = {
    "4-of-8": (8, 4, 1, 1, True, 2.5),
    "unnormalised": (8, 3, 1, 1, False, 1.0),
    "groups": (12, 3, 4, 2, True, 2.5),
    "groups-all-open": (12, 3, 4, 4, True, 1.0),
    "groups-of-one": (4, 2, 4, 3, True, 1.0),
    "6-of-128": (128, 6, 1, 1, True, 2.5),
    "22-of-512": (512, 22, 8, 4, True, 5.0),
}


def arguments(case):
    names = ("experts", "top_k", "n_group", "topk_group", "norm_topk_prob", "scaling")
    return dict(zip(names, CASES[case], strict=True))


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
    kwargs = arguments(case)
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
    kwargs = {k: v for k, v in arguments("groups").items() if k != "experts"}
    torch.compiler.reset()
    compiled = torch.compile(functools.partial(ops.router, **kwargs), fullgraph=True, backend="aot_eager")
    inputs = [random(generator, 5, 12), random(generator, 12)]
    run, expected = (by_expert(f, 12, **kwargs) for f in (compiled, ops.router))
    assert_same(run, expected, inputs, 1e-14)

"""nemotron_h/ops/experts.py: the routed experts in one call, against one expert after another in float64."""

from __future__ import annotations

import pytest
import torch
from comparing import error, random
from torch import Tensor

from nemotron_h.ops import conditions, native
from nemotron_h.ops.moe import routed_experts

E, D, INNER = 8, 20, 37
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
pytestmark = pytest.mark.skipif(native.library() is None, reason=native.reason())


def act(x: Tensor) -> Tensor:
    return torch.relu(x).square()


@pytest.fixture(autouse=True)
def _however_many_rows(monkeypatch):
    """Up to how many native.c is the fastest is a matter of measuring, and of the CPU."""
    monkeypatch.delenv(native.ENVIRONMENT_VARIABLE, raising=False)
    rows_an_expert_are_at_most(monkeypatch, 1000)


def rows_an_expert_are_at_most(monkeypatch, rows: int) -> None:
    monkeypatch.setattr(conditions, "_EXPERT_ROWS", rows)
    monkeypatch.setattr(conditions, "_EXPERT_ROWS_SLOW", rows)


def inputs(generator: torch.Generator, dtype: torch.dtype, tokens: int, k: int = 3) -> list[Tensor]:
    """x, both banks, the experts of each token (each once) and their weights, which are float32."""
    chosen = torch.stack([torch.randperm(E, generator=generator)[:k] for _ in range(tokens)])
    return [
        random(generator, tokens, D, dtype=dtype),
        random(generator, E, INNER, D, dtype=dtype),
        random(generator, E, D, INNER, dtype=dtype),
        chosen,
        random(generator, tokens, k, dtype=torch.float32),
    ]


def run(x: Tensor, up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor) -> Tensor | None:
    return routed_experts(x, up, down, act, chosen, weights)


def written_out(x: Tensor, up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    y = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(len(x)):
        for expert, weight in zip(chosen[t].tolist(), weights[t].double(), strict=True):
            hidden = act(up[expert].double() @ x[t].double())
            y[t] += weight * (down[expert].double() @ hidden)
    return y


@pytest.mark.core
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 7, 30])
def test_one_expert_after_another(generator, dtype, tokens):
    for k in (1, 3, E):
        given = inputs(generator, dtype, tokens, k)
        before = [t.clone() for t in given]
        y = run(*given)
        assert y is not None and y.dtype == dtype
        assert error(y, written_out(*given)) <= TOLERANCE[dtype], k
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_all_tokens_with_one_expert_and_experts_that_nobody_has(generator, dtype):
    """What nobody chose is not read."""
    x, up, down, chosen, weights = inputs(generator, dtype, 9)
    chosen[:] = torch.tensor([5, 0, 7])
    up[[1, 2, 3, 4, 6]] = down[[1, 2, 3, 4, 6]] = torch.nan
    y = run(x, up, down, chosen, weights)
    assert y is not None and error(y, written_out(x, up, down, chosen, weights)) <= TOLERANCE[dtype]


def test_indices_and_rows_of_any_layout(generator):
    x, up, down, chosen, weights = inputs(generator, torch.float32, 4)
    expected = run(x, up, down, chosen, weights)
    assert torch.equal(run(x, up, down, chosen.t().contiguous().t(), weights), expected)
    one = [x[:1], up, down, torch.stack([chosen, chosen], -1)[:1, :, 0], weights[:1]]
    assert not one[3].is_contiguous() and error(run(*one), written_out(*one)) <= 2e-6


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_whom_the_library_serves(generator, dtype, monkeypatch):
    given = inputs(generator, dtype, 3)
    names = ("x", "up", "down", "chosen", "weights")
    for index in (0, 1, 2, 4):
        wanting = [t.clone().requires_grad_() if i == index else t for i, t in enumerate(given)]
        assert run(*wanting) is None, names[index]
        with torch.no_grad():
            assert run(*wanting) is not None
    for wide in (torch.float64, torch.float16):
        assert run(*(t.to(wide) if i < 3 else t for i, t in enumerate(given))) is None
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    for index in range(3):
        assert run(*(t.to(other) if i == index else t for i, t in enumerate(given))) is None
    assert run(*(t.to("meta") for t in given)) is None
    assert run(given[0], given[1].mT.contiguous().mT, *given[2:]) is None
    rows_an_expert_are_at_most(monkeypatch, 1)
    assert run(*given) is None  # nine rows of eight experts
    assert run(*inputs(generator, dtype, 2)) is not None
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, "0")
    assert run(*inputs(generator, dtype, 2)) is None

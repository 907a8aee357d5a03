"""What the tests of ops share: outputs and gradients of a fast function beside its reference, as relative errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def random(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; infinite where a NaN is."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if not expected.numel():
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    if not actual.isfinite().all():
        return float("inf")
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def outputs_and_gradients(
    function: Callable[..., Any], inputs: Sequence[Tensor], weights: Iterable[Tensor] | None = None, **kwargs: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The outputs, the gradients by every floating input of their weighted sum, and the weights (drawn if None)."""
    inputs = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    outputs = function(*inputs, **kwargs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if weights is None:
        weights = [torch.randn(t.shape, dtype=torch.float64) for t in outputs]
    weights = list(weights)
    loss = sum((o.double() * w).sum() for o, w in zip(outputs, weights, strict=True))
    floating = [t for t in inputs if t.is_floating_point()]
    gradients = torch.autograd.grad(loss, floating, allow_unused=True, materialize_grads=True)
    return [o.detach() for o in outputs], list(gradients), weights


def assert_same(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Tensor],
    tolerance: float,
    gradient_tolerance: float | None = None,
    **kwargs: Any,
) -> None:
    """Outputs and gradients of `function` against those of `reference` on float64 copies of the inputs."""
    exact = [t.double() if t.is_floating_point() else t for t in inputs]
    expected, expected_gradients, weights = outputs_and_gradients(reference, exact, **kwargs)
    actual, gradients, _ = outputs_and_gradients(function, inputs, weights, **kwargs)
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert error(a, e) <= tolerance, f"output {index}: {error(a, e):.2e}"
    for index, (a, e) in enumerate(zip(gradients, expected_gradients, strict=True)):
        assert error(a, e) <= (gradient_tolerance or tolerance), f"gradient of input {index}: {error(a, e):.2e}"

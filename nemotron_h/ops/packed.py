"""y = x W^T + b with a packed weight, of which no more than a tile is ever in floating point.

The weight is a constant: the gradient goes to x and bias, and the backward makes the weight again where it would
otherwise keep it. Multiplies in x's dtype, half precision on a CPU without instructions for it in float32, which is
faster there; sums in float32 (float64 for float64). Autocast acts as on a linear layer.

Shape suffixes: N output features, K input features, J columns in the order in which a format has the inputs, R rows of
the input, S rows that meet an expert each, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .conditions import compute_dtype, is_slow, wants_gradient, without_autocast

# Weights that are in floating point at once: 4 MB of float32 on a CPU, where a tile is to stay in the cache; 16
# elsewhere, where the number of kernels counts (not measured).
_TILE = {"cpu": 2**20}
_TILE_ELSEWHERE = 2**22


class Format:
    """How a weight is packed: its parts (a tensor and its scales), and what some of its rows stand for."""

    name: str
    ends: tuple[str, ...] = ("", "_scale")  # of the parts' names
    inputs = 1  # in an element of the first part

    def rows(self, parts: tuple[Tensor, ...], x_dtype: torch.dtype, dtype: torch.dtype) -> Callable[[slice], Tensor]:
        """What gives those rows of one weight in `dtype`, (N, J), for an input that was in `x_dtype`."""
        raise NotImplementedError

    def columns(self, in_features: int) -> int:
        """J."""
        return in_features

    def few_rows(self, x_RK: Tensor, parts: tuple[Tensor, ...]) -> Tensor | None:
        """The product for a few rows, from the packed numbers themselves; None where nothing does that (well) here."""
        return None

    def experts(self, x_SK: Tensor, parts: tuple[Tensor, ...], expert_S: Tensor) -> Tensor | None:
        """`few_rows`, each row by its expert."""
        return None

    def ordered(self, x_RK: Tensor) -> Tensor:
        """(R, K) -> (R, J)."""
        return x_RK

    def restored(self, x_RJ: Tensor, in_features: int) -> Tensor:
        """(R, J) -> (R, K)."""
        return x_RJ


@torch.no_grad()
def dequantize(parts: tuple[Tensor, ...], in_features: int, dtype: torch.dtype, form: Format) -> Tensor:
    """The values (..., N, K) in `dtype`, exact or rounded once, a tile at a time."""
    *lead, n, _width = parts[0].shape
    out = torch.empty(*lead, n, in_features, dtype=dtype, device=parts[0].device)
    matrices = out.view(-1, n, in_features)
    stacks = [part.reshape(len(matrices), *part.shape[len(lead) :]) for part in parts]
    for matrix, *one in zip(matrices, *stacks, strict=True):
        values = form.rows(tuple(one), dtype, dtype)
        for here in tiles(n, in_features, matrix.device):
            matrix[here] = form.restored(values(here), in_features)
    return out


def packed_linear(x: Tensor, parts: tuple[Tensor, ...], bias: Tensor | None, form: Format) -> Tensor:
    """`F.linear(x, w, bias)` with w one packed weight (N, K): (..., N) in x's dtype (in autocast's, where it is on).

    Raises: ValueError for an x of another width than the weight's.
    """
    if form.columns(x.shape[-1]) != parts[0].shape[-1] * form.inputs:
        raise ValueError(
            f"The input has {x.shape[-1]} features and the {form.name} weight takes another number (it is stored as "
            f"{tuple(parts[0].shape)}): pass an input of the weight's in_features."
        )
    device = x.device.type
    if x.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    x_RK = x.reshape(-1, x.shape[-1])
    with without_autocast(x.device):
        y_RN = _Linear.apply(x_RK, form, *parts) if wants_gradient(x) else _forward(x_RK, form, parts)
    if bias is not None:
        y_RN = y_RN + bias.to(y_RN.dtype)
    return y_RN.view(*x.shape[:-1], y_RN.shape[-1])


def packed_experts_linear(x_SK: Tensor, parts: tuple[Tensor, ...], expert_S: Tensor, form: Format) -> Tensor:
    """Each row times the weight of its own expert, one chosen expert after the other; the others are not touched.

    Args:
        x_SK: (S, K), rows in the order of their experts.
        parts: each with E in front.
        expert_S: (S,) integers in [0, E), ascending.

    Returns: (S, N) in x's dtype (in autocast's, where it is on).
    """
    if x_SK.shape[0] == 0:
        return x_SK @ x_SK.new_zeros(x_SK.shape[1], parts[0].shape[1])
    if (y_SN := form.experts(x_SK, parts, expert_S)) is not None:
        return y_SN
    chosen, counts = expert_S.unique_consecutive(return_counts=True)
    rows = x_SK.split(counts.tolist())
    y = [
        packed_linear(row, tuple(part[expert] for part in parts), None, form)
        for expert, row in zip(chosen.tolist(), rows, strict=True)
    ]
    return torch.cat(y)


class _Linear(torch.autograd.Function):
    """`_forward` with a gradient for x that keeps the packed weight alone."""

    @staticmethod
    def forward(ctx: Any, x_RK: Tensor, form: Format, *parts: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*parts)
        ctx.form, ctx.in_features = form, x_RK.shape[-1]
        return _forward(x_RK, form, parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        parts = ctx.saved_tensors
        with without_autocast(grad_RN.device):
            return _backward(grad_RN, ctx.form, parts, ctx.in_features), None, *(None for _ in parts)


def _forward(x_RK: Tensor, form: Format, parts: tuple[Tensor, ...]) -> Tensor:
    if (y_RN := form.few_rows(x_RK, parts)) is not None:
        return y_RN
    dtype = _multiplied_in(x_RK)
    x_RJ, values = form.ordered(x_RK.to(dtype)), form.rows(parts, x_RK.dtype, dtype)
    y_RN = x_RK.new_empty(x_RK.shape[0], parts[0].shape[0])
    for here in tiles(parts[0].shape[0], x_RJ.shape[1], x_RK.device):
        y_RN[:, here] = x_RJ @ values(here).t()
    return y_RN


def _backward(grad_RN: Tensor, form: Format, parts: tuple[Tensor, ...], in_features: int) -> Tensor:
    dtype = _multiplied_in(grad_RN)
    values = form.rows(parts, grad_RN.dtype, dtype)
    columns = form.columns(in_features)
    # Summed over the tiles, so in more than half precision.
    grad_RJ = grad_RN.new_zeros(grad_RN.shape[0], columns, dtype=compute_dtype(grad_RN))
    for here in tiles(parts[0].shape[0], columns, grad_RN.device):
        grad_RJ += grad_RN[:, here].to(dtype) @ values(here)
    return form.restored(grad_RJ, in_features).to(grad_RN.dtype)


def tiles(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """All the rows, a few at a time."""
    step = max(1, _TILE.get(device.type, _TILE_ELSEWHERE) // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _multiplied_in(x: Tensor) -> torch.dtype:
    slow = x.device.type == "cpu" and (x.dtype == torch.float16 or is_slow(x.dtype))
    return torch.float32 if slow else x.dtype

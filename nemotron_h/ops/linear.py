"""y = x W^T + b in the form that is right for the device, the dtype and the number of rows.

Anything but a CPU, tensor subclasses, autocast and tracing go to `F.linear` as they are. On a CPU native.c is the
fastest for a few rows; for more torch is, where the CPU multiplies the dtype, and tiles of the weight in float32 where
it does not. What was measured, on which CPUs: benchmarks/README.md.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import conditions, native
from .conditions import BLOCKS, NATIVE, ONE_ROW, PLAIN, RECOMPUTED

# The float32 copy of as many output rows as this (8 MiB) stays in the last cache while it is multiplied.
_TILE = 1 << 21


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x (..., K) -> (..., N) in x's dtype, summed in float32 at least. The same function as `F.linear`."""
    form = conditions.linear(x, weight_NK, bias_N)
    if form == PLAIN:
        return F.linear(x, weight_NK, bias_N)
    if form == NATIVE:
        y = native.linear(x, weight_NK)
        return y if bias_N is None else y.add_(bias_N)
    # Two-dimensional: with a frozen weight torch turns a linear of a 3-D slice into a batched product that first
    # copies the whole weight.
    x_MK = x.reshape(-1, x.shape[-1])
    if form == RECOMPUTED:
        y_MN = _Tiles.apply(x_MK, weight_NK)
        y_MN = y_MN if bias_N is None else y_MN + bias_N
    elif form == BLOCKS:
        y_MN = in_tiles(x_MK, weight_NK, bias_N)
    elif form == ONE_ROW:
        with _without_onednn():
            y_MN = F.linear(x_MK, weight_NK, bias_N)
    else:
        y_MN = F.linear(x_MK, weight_NK, bias_N)
    return y_MN.view(*x.shape[:-1], y_MN.shape[-1])


def in_tiles(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x W^T + b in float32, a few output rows at a time; W in any dtype."""
    width = weight_NK.shape[0]
    x = x_MK.float()
    y_MN = x_MK.new_empty(x_MK.shape[0], width)
    step = max(64, _TILE // x_MK.shape[1])
    buffer = x.new_empty(min(step, width), x_MK.shape[1])
    for start in range(0, width, step):
        stop = min(start + step, width)
        part = F.linear(x, buffer[: stop - start].copy_(weight_NK[start:stop]))
        y_MN[:, start:stop] = part if bias_N is None else part.add_(bias_N[start:stop])
    return y_MN


class _Tiles(torch.autograd.Function):
    """`in_tiles` for training: the weight is converted again for the backward, a tile at a time."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x_MK, weight_NK)
        return in_tiles(x_MK, weight_NK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_MN: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x_MK, weight_NK = ctx.saved_tensors
        dx_MK = dweight_NK = None
        dy = dy_MN.float()
        step = max(64, _TILE // x_MK.shape[1])
        if ctx.needs_input_grad[0]:
            total = dy.new_zeros(x_MK.shape)
            for start in range(0, weight_NK.shape[0], step):
                total.addmm_(dy[:, start : start + step], weight_NK[start : start + step].float())
            dx_MK = total.to(x_MK.dtype)
        if ctx.needs_input_grad[1]:
            x = x_MK.float()
            dweight_NK = torch.empty_like(weight_NK)
            for start in range(0, weight_NK.shape[0], step):
                dweight_NK[start : start + step] = dy[:, start : start + step].T @ x
        return dx_MK, dweight_NK


_lock = threading.Lock()
_inside = 0
_before = True


@contextmanager
def _without_onednn() -> Iterator[None]:
    """ATen's own product of one bfloat16 row, where oneDNN's is slower.

    The switch is the process's: the first thread in turns it off and the last one out puts it back, so that no two
    threads restore each other's value. What another thread multiplies meanwhile is right, if slower.
    """
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = torch._C._get_mkldnn_enabled()
            torch._C._set_mkldnn_enabled(False)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                torch._C._set_mkldnn_enabled(_before)

"""y = x W^T + b by the fastest path that is right for the device, the dtype and the number of rows.

Anything but a CPU, tensor subclasses, autocast and tracing go to `F.linear` as they are. On a CPU, in ms, for a
15,680 x 4,480 weight on two Zen 3 cores (AVX2; reading 25 GB/s; ATen multiplies bfloat16 there without instructions for
it, at 20 GFLOP/s, float32 at 130 to 156):

    rows                                1     4     8    16    32    64   256   512   2048
    bfloat16  F.linear                  9    28    55   109         440  1741        16400
              native.linear             6     8    13    22    42   192   484   810
              float32 tiles            21    34    41    52    76   170   336   501    2400
    float32   F.linear                 14    79    81    96   183   245   496   552    1845..2600
              native.linear            10    13    20    32    54   243   529   926

and on two cores with AVX-512 without bfloat16 instructions, which oneDNN then emulates:

    rows                                1     4     8    16    32    64   256   512   1024
    bfloat16  F.linear                 11    25    34    53    98   174   677  1269  2371
              native.linear             5     5     8    16    29    58
              float32 tiles            21    36    26    34    42    61   170   276    610
    float32   F.linear                 11    21    24    27    36    46   131   271    456
              native.linear             9    10    13    17    25    43

With bfloat16 instructions (measured on Zen 4, AVX-512): one row F.linear 14, ATen's own
product 4.9; from two rows on oneDNN is 1.7 to 4.5 times faster than ATen's, so native takes the first rows only.
"""

from __future__ import annotations

import functools
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .blocks import wants_gradient

# The float32 copy of as many output rows as this (8 MiB) stays in the last cache while it is multiplied.
_TILE = 1 << 21
_HALF = (torch.bfloat16, torch.float16)


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x (..., K) -> (..., N) in x's dtype, summed in float32 at least. The same function as `F.linear`."""
    if (
        not weight_NK.is_cpu
        or type(weight_NK) not in (Tensor, torch.nn.Parameter)
        or type(x) not in (Tensor, torch.nn.Parameter)
        or weight_NK.layout is not torch.strided
        or weight_NK.dtype != x.dtype
        or not 0 < weight_NK.shape[-1] == x.shape[-1]  # F.linear says what is wrong
        or torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.is_autocast_enabled("cpu")
    ):
        return F.linear(x, weight_NK, bias_N)
    rows, dtype = x.shape[:-1].numel(), weight_NK.dtype
    slow = dtype in _HALF and not multiplies(dtype)
    if 0 < rows <= few_rows(dtype) and native.serves(x, weight_NK):
        y = native.linear(x, weight_NK)
        return y if bias_N is None else y.add_(bias_N)
    # Two-dimensional: with a frozen weight torch turns a linear of a 3-D slice into a batched product that first
    # copies the whole weight (3.7 s against 0.08 s at vocabulary 131,072).
    y_MN = _many_rows(x.reshape(-1, x.shape[-1]), weight_NK, bias_N, slow)
    return y_MN.view(*x.shape[:-1], y_MN.shape[-1])


def _many_rows(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, slow: bool) -> Tensor:
    rows, dtype = x_MK.shape[0], weight_NK.dtype
    if slow and rows > 4:
        if wants_gradient(x_MK, weight_NK, bias_N):
            y_MN = _Tiles.apply(x_MK, weight_NK)
            return y_MN if bias_N is None else y_MN + bias_N
        return in_tiles(x_MK, weight_NK.shape[0], lambda start, stop: weight_NK[start:stop], bias_N)
    if rows == 1 and dtype == torch.bfloat16 and not slow and not wants_gradient(x_MK, weight_NK, bias_N):
        with _without_onednn():
            return F.linear(x_MK, weight_NK, bias_N)
    return F.linear(x_MK, weight_NK, bias_N)


@functools.cache
def few_rows(dtype: torch.dtype) -> int:
    """Up to how many rows native.linear is the fastest."""
    most = 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32
    if dtype == torch.float32:
        return most
    return 0 if dtype != torch.bfloat16 else 4 if multiplies(dtype) else most


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions that multiply that half-precision dtype.

    oneDNN's word is not enough on x86: it takes bfloat16 on any AVX-512 and emulates it, at a fifth of float32's speed.
    """
    if dtype != torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    if platform.machine().lower() in ("x86_64", "amd64") and not (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    ):
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def in_tiles(x_MK: Tensor, width: int, tile: Any, bias_N: Tensor | None = None) -> Tensor:
    """x W^T in float32, a few output rows at a time: `tile(start, stop)` gives that part of W in any dtype."""
    x = x_MK.float()
    y_MN = x_MK.new_empty(x_MK.shape[0], width)
    step = max(64, _TILE // x_MK.shape[1])
    buffer = x.new_empty(min(step, width), x_MK.shape[1])
    for start in range(0, width, step):
        stop = min(start + step, width)
        part = F.linear(x, buffer[: stop - start].copy_(tile(start, stop)))
        y_MN[:, start:stop] = part if bias_N is None else part.add_(bias_N[start:stop])
    return y_MN


class _Tiles(torch.autograd.Function):
    """`in_tiles` for training: the weight is converted again for the backward, a tile at a time."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x_MK, weight_NK)
        return in_tiles(x_MK, weight_NK.shape[0], lambda start, stop: weight_NK[start:stop])

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
    """ATen's own product of one bfloat16 row, where oneDNN's is 2 times slower.

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

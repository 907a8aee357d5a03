"""Weights in FP8 and NVFP4, the formats of NVIDIA's ModelOpt: what they stand for, how they are made and multiplied.

    FP8     w = e4m3(q) s           q float8_e4m3fn (..., N, K); s float32 (...): one scale per matrix
    NVFP4   w = e2m1(q) e4m3(b) s   q uint8 (..., N, K/2), two inputs a byte, the even one in the low four bits;
                                    b float8_e4m3fn (..., N, K/16): one scale per 16 inputs; s float32 (...)

e2m1 is a sign bit above 0, 0.5, 1, 1.5, 2, 3, 4, 6. Values are the product in exact arithmetic (at most 30 bits),
rounded once, to the dtype that is asked for. They are looked up in a table of everything that a byte (NVFP4: a byte
with its scale) can stand for: exact at no cost, and on a CPU faster than torch's conversions from float8.

Shape suffixes: N output features, K input features, R rows of the input, S rows that meet an expert each, E experts.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from .conditions import compute_dtype, wants_gradient, without_autocast
from .int8_int4 import _multiplied_in, _tiles

FP8, NVFP4 = "fp8", "nvfp4"
GROUP = 16  # inputs that share a scale of NVFP4
E4M3, E2M1_MAX, E4M3_MAX = torch.float8_e4m3fn, 6.0, 448.0
_SMALLEST_SCALE = 2.0**-9  # e4m3's smallest positive number

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# With fewer bytes than this the table of NVFP4 would take longer than what it is for.
_TABLE_PAYS = 2**16
_PAIRS = {2: torch.int32, 4: torch.int64}  # an integer of two values of so many bytes


@torch.no_grad()
def dequantize_fp8(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values (..., N, K) in `dtype`, exact or rounded once.

    Args:
        q: (..., N, K) float8_e4m3fn.
        scale: as many as there are matrices, in any shape.
    """
    matrices = q.reshape(-1, *q.shape[-2:])
    out = torch.empty(matrices.shape, dtype=dtype, device=q.device)
    for matrix, one, values in zip(matrices, scale.reshape(-1), out, strict=True):
        table = _fp8_table(one, dtype)
        for here in _tiles(len(matrix), matrix.shape[1], q.device):
            values[here] = _look_up_fp8(matrix[here], table)
    return out.view(q.shape)


@torch.no_grad()
def dequantize_nvfp4(q: Tensor, block_scale: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values (..., N, K) in `dtype`, exact or rounded once.

    Args:
        q: (..., N, K/2) uint8.
        block_scale: (..., N, K/16) float8_e4m3fn.
        scale: as many as there are matrices, in any shape.
    """
    matrices, blocks = q.reshape(-1, *q.shape[-2:]), block_scale.reshape(-1, *block_scale.shape[-2:])
    shape = (*q.shape[:-1], 2 * q.shape[-1])
    out = torch.empty(len(matrices), *shape[-2:], dtype=dtype, device=q.device)
    for matrix, block, one, values in zip(matrices, blocks, scale.reshape(-1), out, strict=True):
        table = _nvfp4_table(matrix, one, dtype)
        for here in _tiles(len(matrix), shape[-1], q.device):
            values[here] = _look_up_nvfp4(matrix[here], block[here], one, dtype, table)
    return out.view(shape)


@torch.no_grad()
def quantize_fp8(weight: Tensor, peak: float | None = None) -> tuple[Tensor, Tensor]:
    """The nearest values of FP8 and their scale, the largest magnitude over 448.

    Args:
        weight: (N, K), floating.
        peak: a magnitude to take for the largest, where other weights share the scale.

    Returns: q (N, K) float8_e4m3fn and the scale, float32 without a dimension.

    Raises: ValueError for weights that are NaN or infinite.
    """
    scale = fp8_scale(largest(weight) if peak is None else peak).to(weight.device)
    q = torch.empty(weight.shape, dtype=E4M3, device=weight.device)
    for here in _tiles(len(weight), weight.shape[1], weight.device):
        # Clamped: what is off by a rounding at the end of the range would be NaN in this format.
        q[here] = (weight[here].to(compute_dtype(weight)) / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return q, scale


@torch.no_grad()
def quantize_nvfp4(weight: Tensor, peak: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest values of NVFP4 and their scales: a block's from its largest magnitude, which becomes 6.

    Args:
        weight: (N, K), floating, K a multiple of 16.
        peak: as in `quantize_fp8`.

    Returns: q (N, K/2) uint8, block_scale (N, K/16) float8_e4m3fn, scale float32 without a dimension.

    Raises: ValueError for weights that are NaN or infinite, and for another K.
    """
    n, k = weight.shape
    if k % GROUP:
        raise ValueError(f"A weight of {k} inputs has no NVFP4 form, which takes {GROUP} at a time: leave it out.")
    scale = nvfp4_scale(largest(weight) if peak is None else peak).to(weight.device)
    q = torch.empty(n, k // 2, dtype=torch.uint8, device=weight.device)
    block_scale = torch.empty(n, k // GROUP, dtype=E4M3, device=weight.device)
    for here in _tiles(n, 4 * k, weight.device):  # several copies of a tile are worked with at once
        blocks = weight[here].to(compute_dtype(weight)).unflatten(-1, (-1, GROUP))
        exact = blocks.abs().amax(-1) / (E2M1_MAX * scale)
        exact = exact.masked_fill(exact == 0, 1).clamp_(_SMALLEST_SCALE, E4M3_MAX)
        block_scale[here] = exact.to(E4M3)
        steps = block_scale[here].to(blocks.dtype) * scale
        codes = _round_e2m1(blocks / steps[..., None]).flatten(-2)
        q[here] = codes[:, 1::2] << 4 | codes[:, 0::2]
    return q, block_scale, scale


def fp8_scale(peak: float) -> Tensor:
    """The scale of FP8 weights whose largest magnitude is `peak`: float32, without a dimension."""
    return torch.tensor(peak / E4M3_MAX if peak else 1.0, dtype=torch.float32)


def nvfp4_scale(peak: float) -> Tensor:
    """The scale of NVFP4 weights whose largest magnitude is `peak`: float32, without a dimension."""
    return torch.tensor(peak / (E2M1_MAX * E4M3_MAX) if peak else 1.0, dtype=torch.float32)


def largest(weight: Tensor) -> float:
    """The largest magnitude. Raises ValueError for weights that are NaN or infinite."""
    low, high = torch.aminmax(weight)
    peak = max(-low.item(), high.item()) if torch.isfinite(low + high) else torch.inf
    if peak == torch.inf:
        raise ValueError(
            f"The weight of shape {tuple(weight.shape)} has values that are NaN or infinite, which FP8 and NVFP4 "
            "cannot hold: leave that module out, or fetch the checkpoint again."
        )
    return peak


def low_precision_linear(x: Tensor, parts: tuple[Tensor, ...], bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, w, bias)` with w an FP8 or NVFP4 weight, of which no more than a tile is ever in floating point.

    The weight is a constant: the gradient goes to x and bias, and the backward makes the weight again. w is rounded to
    x's dtype, so the product is that of the dequantised layer; it multiplies and sums as `quantized_linear` does.
    Activations are not quantised. Autocast acts as on a linear layer.

    Args:
        x: (..., K), floating.
        parts: of one (N, K) weight: (q, scale) for FP8, (q, block_scale, scale) for NVFP4.
        bias: (N,) or None.

    Returns: (..., N) in x's dtype (in autocast's, where it is on).

    Raises: ValueError for an x of another width than the weight's.
    """
    width = parts[0].shape[-1] * (1 if len(parts) == 2 else 2)
    if x.shape[-1] != width:
        raise ValueError(f"The input has {x.shape[-1]} features and the weight takes {width}: pass an input of those.")
    device = x.device.type
    if x.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    x_RK = x.reshape(-1, width)
    with without_autocast(x.device):
        y_RN = _Linear.apply(x_RK, *parts) if wants_gradient(x) else _forward(x_RK, parts)
    if bias is not None:
        y_RN = y_RN + bias.to(y_RN.dtype)
    return y_RN.view(*x.shape[:-1], y_RN.shape[-1])


def low_precision_experts_linear(x_SK: Tensor, parts: tuple[Tensor, ...], expert_S: Tensor) -> Tensor:
    """Each row times the weight of its own expert, one chosen expert after the other; the others are not touched.

    Args:
        x_SK: (S, K), rows in the order of their experts.
        parts: as in `low_precision_linear`, each with E in front.
        expert_S: (S,) integers in [0, E), ascending.

    Returns: (S, N) in x's dtype.
    """
    if not len(x_SK):
        return x_SK @ x_SK.new_zeros(x_SK.shape[1], parts[0].shape[1])
    chosen, counts = expert_S.unique_consecutive(return_counts=True)
    rows = x_SK.split(counts.tolist())
    y = [
        low_precision_linear(row, tuple(part[expert] for part in parts))
        for expert, row in zip(chosen.tolist(), rows, strict=True)
    ]
    return torch.cat(y)


class _Linear(torch.autograd.Function):
    """`_forward` with a gradient for x that keeps the packed weight alone."""

    @staticmethod
    def forward(ctx: Any, x_RK: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        return _forward(x_RK, parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.saved_tensors
        with without_autocast(grad_RN.device):
            return _backward(grad_RN, parts), *(None for _ in parts)


@torch.no_grad()
def _forward(x_RK: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
    dtype = _multiplied_in(x_RK)
    values, tiles = _rows(parts, x_RK.dtype)
    multiplied = x_RK.to(dtype)
    y_RN = x_RK.new_empty(len(x_RK), len(parts[0]))
    for here in tiles:
        y_RN[:, here] = multiplied @ values(here).to(dtype).t()
    return y_RN


@torch.no_grad()
def _backward(grad_RN: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
    dtype = _multiplied_in(grad_RN)
    values, tiles = _rows(parts, grad_RN.dtype)
    # Summed over the tiles, so in more than half precision.
    width = parts[0].shape[-1] * (1 if len(parts) == 2 else 2)
    grad_RK = grad_RN.new_zeros(len(grad_RN), width, dtype=compute_dtype(grad_RN))
    for here in tiles:
        grad_RK += grad_RN[:, here].to(dtype) @ values(here).to(dtype)
    return grad_RK.to(grad_RN.dtype)


def _rows(parts: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Any, Any]:
    """How to read some rows of one weight, and the slices to read it in."""
    q, scale = parts[0], parts[-1].reshape(())
    if len(parts) == 2:
        table = _fp8_table(scale, dtype)
        return lambda here: _look_up_fp8(q[here], table), _tiles(len(q), q.shape[1], q.device)
    pairs = _nvfp4_table(q, scale, dtype)
    return (
        lambda here: _look_up_nvfp4(q[here], parts[1][here], scale, dtype, pairs),
        _tiles(len(q), 2 * q.shape[1], q.device),
    )


def _fp8_table(scale: Tensor, dtype: torch.dtype) -> Tensor:
    at = _exact_device(scale.device)
    return _round_once(_e4m3(at) * scale.to(at).double(), dtype).to(scale.device)


def _look_up_fp8(q_NK: Tensor, table: Tensor) -> Tensor:
    return table.index_select(0, q_NK.reshape(-1).view(torch.uint8).int()).view(q_NK.shape)


def _nvfp4_table(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """All pairs of values by scale and byte, each pair as one integer; None where it would not pay."""
    at = _exact_device(q.device)
    if (q.numel() < _TABLE_PAYS and at == q.device) or dtype.itemsize not in _PAIRS:
        return None
    values = _e4m3(at)[:, None, None] * _e2m1_pairs(at) * scale.to(at).double()
    return _round_once(values, dtype).view(_PAIRS[dtype.itemsize]).view(-1).to(q.device)


def _look_up_nvfp4(q: Tensor, block_scale: Tensor, scale: Tensor, dtype: torch.dtype, table: Tensor | None) -> Tensor:
    n, half = q.shape
    block = block_scale.view(torch.uint8).int()
    if table is None:
        steps = _e4m3(q.device)[block] * scale.double()
        pairs = _e2m1_pairs(q.device)[q.int()].view(n, -1, GROUP)
        return _round_once(pairs * steps[..., None], dtype).view(n, 2 * half)
    index = (block << 8)[..., None] | q.view(n, -1, GROUP // 2)
    return table.index_select(0, index.view(-1)).view(dtype).view(n, 2 * half)


def _exact_device(device: torch.device) -> torch.device:
    """Where the tables are made: Apple's GPUs have no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def _round_once(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 in `dtype`, to the nearest, ties to even.

    torch goes to half precision by way of float32, which rounds twice. Rounded to odd there (the last bit set where
    anything was lost), the second rounding sees on which side of a tie the number was.
    """
    if dtype.itemsize >= 4:
        return exact.to(dtype)
    nearest = exact.float()
    lost, up = nearest.double() != exact, nearest.abs().double() > exact.abs()
    odd = (nearest.view(torch.int32) - up.int()) | lost.int()
    return odd.view(torch.float32).to(dtype)


def _round_e2m1(x: Tensor) -> Tensor:
    """The code, uint8, of the nearest value of e2m1; of the even code in the middle of two."""
    size = x.abs()
    code = (x < 0).to(torch.uint8) << 3
    for low, (below, above) in enumerate(itertools.pairwise(_E2M1)):
        middle = (below + above) / 2
        code += size >= middle if low % 2 else size > middle
    return code


@functools.cache
def _e4m3(device: torch.device) -> Tensor:
    """(256,) float64: what each byte of e4m3 is."""
    with torch.inference_mode(False):  # what is kept is for every mode
        return torch.arange(256, dtype=torch.uint8).view(E4M3).double().to(device)


@functools.cache
def _e2m1_pairs(device: torch.device) -> Tensor:
    """(256, 2) float64: what the two halves of a byte are, the low one first."""
    with torch.inference_mode(False):
        values = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.float64)
        byte = torch.arange(256)
        return torch.stack([values[byte & 15], values[byte >> 4]], dim=-1).to(device)

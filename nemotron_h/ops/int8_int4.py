"""Weights of 8 or 4 bits: how they are made, laid out and multiplied. Activations stay in floating point.

    int8   w = q s                 q int8 (..., N, K) in [-127, 127], s float32 (..., N): one scale per output row
    int4   w = (q - 8) s           q in 0..15, packed; s bfloat16 (..., N, J/32): one scale per 32 inputs of a row

int4 packing: J is K rounded up to a multiple of 64. 64 inputs take 8 int32: element [n, 8 b + i] holds, at bits 4 j to
4 j + 3, with j = 4 h + t, the q of input 64 b + 16 t + 2 i + h (i runs from 0 to 7, t from 0 to 3, h over 0 and 1).
Inputs past K have q = 8, which is 0. So a block is 16 lanes of 16 bits, and shifting them once gives 16 neighbouring
inputs, which a CPU multiplies in pairs (native.c).

Shape suffixes: N output features, K input features, J padded input features, L = J/8 lanes, R rows of the input, S rows
that meet an expert each, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import conditions, native
from .conditions import compute_dtype
from .packed import Format, dequantize, packed_experts_linear, packed_linear, tiles

BITS = (8, 4)
GROUP = 32  # inputs that share an int4 scale
BLOCK = 64  # inputs that are packed together

# What the weight of largest magnitude in a group is divided by for a scale: negative where it goes to q = 0, positive
# where it goes to q = 15. -8 is llama.cpp's q4_0 and 7 the symmetric grid; the others were added one by one, each time
# the one that lowers the error most; many more of them lower it hardly further.
_DIVISORS = (-8.0, 7.0, -8.5, -7.75, -8.25, -8.75, -7.25, -9.0)

# With more rows than this, multiplying tile by tile in float32 is faster than torch's own int8 product.
_PACKED_ROWS = 16


def packed_shapes(bits: int, out_features: int, in_features: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of q and scale of one (N, K) weight.

    Raises: ValueError for a number of bits other than 8 and 4.
    """
    _check_bits(bits)
    if bits == 8:
        return (out_features, in_features), (out_features,)
    padded = -(-in_features // BLOCK) * BLOCK
    return (out_features, padded // 8), (out_features, padded // GROUP)


def packed_dtypes(bits: int) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of q and scale."""
    _check_bits(bits)
    return (torch.int8, torch.float32) if bits == 8 else (torch.int32, torch.bfloat16)


@torch.no_grad()
def quantize_weight(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The nearest weights on the grid of 8 or 4 bits.

    int8: the scale is the row's largest magnitude over 127, so no weight is off by more than half a scale. int4: of
    several scales per group, rounded to bfloat16 first, the one whose weights have the least squared error. Works
    through a few rows at a time: what it allocates beside the result is less than 256 MB, however large the weight.

    Args:
        weight: (..., N, K), floating.
        bits: 8 or 4.

    Returns: q and scale, laid out as above.

    Raises: ValueError for another number of bits, and for weights that are NaN or infinite.
    """
    (n, k), dtypes = weight.shape[-2:], packed_dtypes(bits)
    q_shape, scale_shape = packed_shapes(bits, n, k)
    lead = weight.shape[:-2]
    rows_NK = weight.reshape(-1, k)
    q = torch.empty(len(rows_NK), *q_shape[1:], dtype=dtypes[0], device=weight.device)
    scale = torch.empty(len(rows_NK), *scale_shape[1:], dtype=dtypes[1], device=weight.device)
    finite = torch.ones((), dtype=torch.bool, device=weight.device)
    for here in tiles(len(rows_NK), 4 * k, weight.device):  # several copies of a tile are worked with at once
        tile_NK = rows_NK[here].to(compute_dtype(weight))
        q[here], scale[here], peaks = _quantize_int8(tile_NK) if bits == 8 else _quantize_int4(tile_NK)
        finite &= peaks.isfinite().all()
    if not finite:
        raise ValueError(
            f"The weight of shape {tuple(weight.shape)} has values that are NaN or infinite, which {bits} bits cannot "
            "hold: leave that module out with modules_to_not_convert, or fetch the checkpoint again."
        )
    return q.view(*lead, *q_shape), scale.view(*lead, *scale_shape)


def dequantize_weight(q: Tensor, scale: Tensor, bits: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """What the quantised weight stands for: (..., N, K) in `dtype`, rounded once, from float32 (float64).

    Args:
        q, scale: as `quantize_weight` gives them, or with leading dimensions taken off.
        in_features: K, which int4's packing does not tell.
    """
    return dequantize((q, scale), in_features, dtype, FORMATS[bits])


def quantized_linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """`F.linear(x, w, bias)` with w the quantised weight (ops/packed.py).

    Args:
        x: (..., K), floating.
        q, scale: of one (N, K) weight, from `quantize_weight`.
        bias: (N,) or None.

    Returns: (..., N) in x's dtype (in autocast's, where it is on).

    Raises: ValueError for a number of bits other than 8 and 4, and for an x of another width than the weight's.
    """
    _check_bits(bits)
    return packed_linear(x, (q, scale), bias, FORMATS[bits])


def quantized_experts_linear(x_SK: Tensor, q_ENK: Tensor, scale: Tensor, expert_S: Tensor) -> Tensor:
    """Each row times the weight of its own expert: `y[s] = w[expert[s]] x[s]`, one chosen expert after the other.

    Experts that no row chose are not touched. Gradient, precision and autocast as in `quantized_linear`.

    Args:
        x_SK: (S, K), in any order of experts.
        q_ENK, scale: the weights of all experts, from `quantize_weight` on (E, N, K); int8 or packed int4 by q's dtype.
        expert_S: (S,) integers in [0, E).

    Returns: (S, N) in x's dtype (in autocast's, where it is on).
    """
    form = FORMATS[8 if q_ENK.dtype == torch.int8 else 4]
    order_S = expert_S.argsort(stable=True)
    return packed_experts_linear(x_SK[order_S], (q_ENK, scale), expert_S[order_S], form)[order_S.argsort()]


class _Int8(Format):
    name, bits = "int8", 8

    def rows(self, parts: tuple[Tensor, ...], x_dtype: torch.dtype, dtype: torch.dtype) -> Callable[[slice], Tensor]:
        q, scale = parts
        return lambda here: _dequantize_rows(q[here], scale[here], self.bits, dtype)

    def few_rows(self, x_RK: Tensor, parts: tuple[Tensor, ...]) -> Tensor | None:
        q, scale = parts
        if conditions.packed_linear(x_RK, q, scale):
            return native.linear(x_RK, q, scale)
        # torch's int8 product rounds the scale to x's dtype, so it gets ones, and the scale multiplies afterwards, in
        # float32. It takes whole vectors of inputs alone: with 20 of them it is wrong, with 33 it crashes. An x in
        # float32 makes it slow.
        if (
            self.bits == 8
            and x_RK.device.type == "cpu"
            and x_RK.dtype == torch.bfloat16
            and 0 < x_RK.shape[0] <= _PACKED_ROWS
            and x_RK.shape[-1] % 32 == 0
            and q.is_contiguous()
            and not torch.compiler.is_compiling()
        ):
            product_RN = torch._weight_int8pack_mm(x_RK.contiguous(), q, torch.ones(len(q), dtype=x_RK.dtype))
            return (product_RN * scale).to(x_RK.dtype)
        return None

    def experts(self, x_SK: Tensor, parts: tuple[Tensor, ...], expert_S: Tensor) -> Tensor | None:
        q, scale = parts
        return native.linear(x_SK, q, scale, expert_S) if conditions.packed_experts(x_SK, q, scale, expert_S) else None


class _Int4(_Int8):
    name, bits, inputs = "int4", 4, 8

    def columns(self, in_features: int) -> int:
        return -(-in_features // BLOCK) * BLOCK

    def ordered(self, x_RK: Tensor) -> Tensor:
        return _to_packed_order(x_RK)

    def restored(self, x_RJ: Tensor, in_features: int) -> Tensor:
        return _from_packed_order(x_RJ, in_features)


FORMATS: dict[int, Format] = {8: _Int8(), 4: _Int4()}


def _quantize_int8(w_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, scale and what the scale was made from, which is NaN or infinite if any of the row is."""
    peak_N = w_NK.abs().amax(-1)
    scale_N = (peak_N / 127).float()
    q_NK = (w_NK / _nonzero(scale_N)[:, None]).round_().clamp_(-127, 127)
    return q_NK.to(torch.int8), scale_N, peak_N


def _quantize_int4(w_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `_quantize_int8`, by group."""
    rows, in_features = w_NK.shape
    groups = F.pad(w_NK, (0, -in_features % BLOCK)).view(rows, -1, GROUP)
    peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best_scale, least = torch.zeros_like(peak), torch.full_like(peak, torch.inf)
    for divisor in _DIVISORS:
        scale = (peak / divisor).bfloat16().to(peak.dtype)
        error = _round_int4(groups, scale).mul_(scale).sub_(groups).square_().sum(-1, keepdim=True)
        better = error < least
        best_scale, least = torch.where(better, scale, best_scale), torch.where(better, error, least)
    q = _round_int4(groups, best_scale).add_(8).to(torch.int32)
    q = q.view(rows, -1, 4, 8, 2).permute(0, 1, 4, 2, 3).reshape(rows, -1, 8, 8)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=q.device)[:, None]
    # The bits of the summands do not overlap, so the sum is their union; the topmost may set the sign.
    packed = (q << shifts).sum(-2, dtype=torch.int32)
    return packed.view(rows, -1), best_scale.view(rows, -1).bfloat16(), peak


def _round_int4(groups: Tensor, scale: Tensor) -> Tensor:
    return (groups / _nonzero(scale)).round_().clamp_(-8, 7)


def _nonzero(scale: Tensor) -> Tensor:
    """A scale to divide by: where all weights are 0 so is the scale, and any other will do."""
    return scale.masked_fill(scale == 0, 1)


def _dequantize_rows(q: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """A tile's weights: (N, K) for int8; for int4 (N, J) in the packed order, see below."""
    exact = torch.promote_types(dtype, torch.float32)
    if bits == 8:
        return (q.to(exact) * scale.to(exact)[:, None]).to(dtype)
    rows, lanes = q.shape
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=q.device)[:, None]
    w_N8L = ((q[:, None] >> shifts) & 15).to(exact).sub_(8)
    # In either half of a lane, t = 0 and 1 are inputs of the block's first group of 32, 2 and 3 of its second.
    scale_N2B = scale.to(exact).view(rows, -1, 2).transpose(1, 2)
    scale_N121L = scale_N2B[..., None].expand(-1, -1, -1, 8).reshape(rows, 1, 2, 1, lanes)
    return w_N8L.view(rows, 2, 2, 2, lanes).mul_(scale_N121L).view(rows, -1).to(dtype)


def _to_packed_order(x_RK: Tensor) -> Tensor:
    """(R, K) -> (R, J): inputs by place in the lane, then by block and lane, as `_dequantize_rows` has the weights.

    Taking an int4 weight apart along its lanes gives its inputs in this order; to bring a few rows of x into it costs
    nothing, to bring the weight out of it as much as all the rest.
    """
    x_RJ = F.pad(x_RK, (0, -x_RK.shape[-1] % BLOCK))
    return x_RJ.view(len(x_RJ), -1, 4, 8, 2).permute(0, 4, 2, 1, 3).reshape(len(x_RJ), -1)


def _from_packed_order(x_RJ: Tensor, in_features: int) -> Tensor:
    x_RBtih = x_RJ.view(len(x_RJ), 2, 4, -1, 8).permute(0, 3, 2, 4, 1)
    return x_RBtih.reshape(len(x_RJ), -1)[:, :in_features]


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits={bits!r}: weights are quantised to 8 or 4 bits.")

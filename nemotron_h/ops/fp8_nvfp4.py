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
from collections.abc import Callable

import torch
from torch import Tensor

from .conditions import compute_dtype
from .packed import Format, dequantize, packed_experts_linear, packed_linear, tiles

FP8, NVFP4 = "fp8", "nvfp4"
GROUP = 16  # inputs that share a scale of NVFP4
E4M3, E2M1_MAX, E4M3_MAX = torch.float8_e4m3fn, 6.0, 448.0
_SMALLEST_SCALE = 2.0**-9  # e4m3's smallest positive number

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# With fewer bytes than this the table of NVFP4 would take longer than what it is for.
_TABLE_PAYS = 2**16
_PAIRS = {2: torch.int32, 4: torch.int64}  # an integer of two values of so many bytes


def dequantize_fp8(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values (..., N, K) in `dtype`, exact or rounded once.

    Args:
        q: (..., N, K) float8_e4m3fn.
        scale: as many as there are matrices, in any shape.
    """
    return dequantize((q, scale), q.shape[-1], dtype, FORMATS[FP8])


def dequantize_nvfp4(q: Tensor, block_scale: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values (..., N, K) in `dtype`, exact or rounded once.

    Args:
        q: (..., N, K/2) uint8.
        block_scale: (..., N, K/16) float8_e4m3fn.
        scale: as many as there are matrices, in any shape.
    """
    return dequantize((q, block_scale, scale), 2 * q.shape[-1], dtype, FORMATS[NVFP4])


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
    for here in tiles(len(weight), weight.shape[1], weight.device):
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
    for here in tiles(n, 4 * k, weight.device):  # several copies of a tile are worked with at once
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
    """`F.linear(x, w, bias)` with w an FP8 or NVFP4 weight (ops/packed.py).

    w is rounded to x's dtype, so the product is that of the dequantised layer. Activations are not quantised.

    Args:
        x: (..., K), floating.
        parts: of one (N, K) weight: (q, scale) for FP8, (q, block_scale, scale) for NVFP4.
        bias: (N,) or None.

    Returns: (..., N) in x's dtype (in autocast's, where it is on).

    Raises: ValueError for an x of another width than the weight's.
    """
    return packed_linear(x, parts, bias, _format_of(parts))


def low_precision_experts_linear(x_SK: Tensor, parts: tuple[Tensor, ...], expert_S: Tensor) -> Tensor:
    """`packed_experts_linear` with the parts of `low_precision_linear`, each with E in front."""
    return packed_experts_linear(x_SK, parts, expert_S, _format_of(parts))


class _FP8(Format):
    name = "FP8"

    def rows(self, parts: tuple[Tensor, ...], x_dtype: torch.dtype, dtype: torch.dtype) -> Callable[[slice], Tensor]:
        q, scale = parts
        table = _fp8_table(scale.reshape(()), x_dtype)
        return lambda here: _look_up_fp8(q[here], table).to(dtype)


class _NVFP4(Format):
    name, inputs = "NVFP4", 2
    ends = ("", "_scale", "_scale_2")

    def rows(self, parts: tuple[Tensor, ...], x_dtype: torch.dtype, dtype: torch.dtype) -> Callable[[slice], Tensor]:
        q, block_scale, scale = parts
        scale = scale.reshape(())
        pairs = _nvfp4_table(q, scale, x_dtype)
        return lambda here: _look_up_nvfp4(q[here], block_scale[here], scale, x_dtype, pairs).to(dtype)


FORMATS: dict[str, Format] = {FP8: _FP8(), NVFP4: _NVFP4()}


def _format_of(parts: tuple[Tensor, ...]) -> Format:
    return FORMATS[FP8 if len(parts) == 2 else NVFP4]


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

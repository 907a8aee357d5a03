"""The functions of native.c with tensors in and out, and which tensors they may be handed.

Each has a torch implementation beside its caller, which computes the same. They take plain CPU tensors outside autograd
and tracing (`serves`), float32 and bfloat16.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._device import DeviceContext

from . import load
from .signatures import Block, Mamba, Weight

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_INT8, _INT4 = 2, 3
_NO_SUCH_EXPERT = 2


def serves(*tensors: Tensor | None) -> bool:
    """Whether these are tensors that C may read: plain, on the CPU, contiguous, nobody tracing or differentiating."""
    if torch.compiler.is_compiling():
        return False
    differentiating = torch.is_grad_enabled()
    for t in tensors:
        if t is not None:
            kind = type(t)
            if (kind is not Tensor and kind is not torch.nn.Parameter) or not t.is_cpu:
                return False
            if t.layout is not torch.strided or not t.is_contiguous() or t.is_neg():
                return False
            if differentiating and t.requires_grad:
                return False
    return (
        torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and (torch._C._len_torch_function_stack() == 0 or not _functions_are_watched())
        and (F.relu, F.silu, F.softplus) == _TORCHS
        and torch.autograd.forward_ad._current_level < 0
        and load.ready()  # last, and before `load.loaded` is used
    )


# What C computes as torch does, where they are torch's own, now and when this was imported.
_TORCHS: Any = F.relu, F.silu, F.softplus
if {f.__code__.co_filename for f in _TORCHS[:2]} != {F.__file__} or F.softplus is not torch._C._nn.softplus:
    _TORCHS = None


def _functions_are_watched() -> bool:
    """Whether a mode is to see torch's functions called; the one behind `torch.set_default_device` only creates."""
    return any(
        type(torch._C._get_function_stack_at(i)) is not DeviceContext
        for i in range(torch._C._len_torch_function_stack())
    )


def serves_rows(x: Tensor) -> bool:
    """Whether C may read a tensor whose rows may lie apart; the rest of `serves` is asked of what goes with it."""
    if torch.compiler.is_compiling():
        return False
    return type(x) is Tensor and x.is_cpu and x.layout is torch.strided and x.stride(-1) == 1 and not x.is_neg()


def linear(x_MK: Tensor, weight: Tensor, scale: Tensor | None = None, experts_M: Tensor | None = None) -> Tensor:
    """x W^T for few rows: (M, N) in x's dtype. Sums in float32.

    Args:
        x_MK: (M, K) float32 or bfloat16; M may be several dimensions.
        weight: (N, K) float32 or bfloat16, int8, or int32 with int4 in it (N, ceil(K / 64) * 8); see
            `ops/int8_int4.py`. With `experts_M`, (E, ...).
        scale: int8: float32 (N,); int4: bfloat16 (N, ceil(K / 64) * 2).
        experts_M: (M,) int64; row m meets weight[experts_M[m]].
    """
    native: Any = (load.loaded or load.find())[0]
    *lead, K = x_MK.shape
    N, M = weight.shape[-2], x_MK.numel() // K
    kind = _TYPES.get(weight.dtype, _INT8 if weight.dtype == torch.int8 else _INT4)
    stored, scales = K, None
    if scale is not None or kind >= _INT8:
        blocks = -(-K // 64)
        scales = weight.shape[:-1] if kind == _INT8 else (*weight.shape[:-1], 2 * blocks) if kind == _INT4 else None
        stored = 8 * blocks if kind == _INT4 else K
    if weight.shape[-1] != stored or (None if scale is None else scale.shape) != scales:
        raise ValueError(
            f"A weight stored as {tuple(weight.shape)}, its scales as {None if scale is None else tuple(scale.shape)}, "
            f"does not multiply rows of {K}: correct the layer's weight."
        )
    if experts_M is not None and experts_M.dtype != torch.int64:
        experts_M = experts_M.long()
    y_MN = x_MK.new_empty(*lead, N)
    failed = native.nh_linear(
        kind,
        _TYPES[x_MK.dtype],
        weight.data_ptr(),
        None if scale is None else scale.data_ptr(),
        x_MK.data_ptr(),
        y_MN.data_ptr(),
        M,
        N,
        K,
        None if experts_M is None else experts_M.data_ptr(),
        weight.shape[0],  # Tensor's `len` is Python, and this is called for every layer
    )
    if failed == _NO_SUCH_EXPERT:
        raise IndexError(f"Experts {experts_M} are asked for of {len(weight)}: the router gives their indices.")
    if failed:
        raise MemoryError(f"No memory for {M} rows of {K} inputs.")
    return y_MN


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension; x and weight float32 or both bfloat16."""
    width = x.shape[-1]
    y = torch.empty_like(x)
    (load.loaded or load.find())[0].nh_rms_norm(  # type: ignore[union-attr]
        _TYPES[x.dtype], x.data_ptr(), weight_D.data_ptr(), y.data_ptr(), x.numel() // width, width, eps
    )
    return y


def gated_rms_norm(y_RD: Tensor, z_RD: Tensor, weight_D: Tensor, eps: float, groups: int) -> Tensor:
    """`weight * RMSNorm(y * silu(z))` in groups: (R, D). y contiguous, the rows of z apart or not; all of one dtype."""
    rows, width = y_RD.shape
    out_RD = torch.empty_like(y_RD)
    native: Any = (load.loaded or load.find())[0]
    addresses = y_RD.data_ptr(), z_RD.data_ptr(), z_RD.stride(0), weight_D.data_ptr(), out_RD.data_ptr()
    if native.nh_gated_rms_norm(_TYPES[y_RD.dtype], *addresses, rows, width, groups, eps):
        raise MemoryError(f"No memory for groups of {width // groups}.")
    return out_RD


MOST_TAPS = 8  # of a convolution


def causal_conv(x_BLC: Tensor, weight_KC: Tensor, bias_C: Tensor, window_BWC: Tensor) -> Tensor:
    """silu of the convolution: (B, L, C). x and the window have one dtype; x's channels lie one after the other, its
    rows apart or not; weight and bias are float32; at most `MOST_TAPS` taps."""
    batch, length, channels = x_BLC.shape
    y_BLC = x_BLC.new_empty(x_BLC.shape)
    native: Any = (load.loaded or load.find())[0]
    native.nh_causal_conv(
        _TYPES[x_BLC.dtype],
        x_BLC.data_ptr(),
        x_BLC.stride(0),
        x_BLC.stride(1),
        window_BWC.data_ptr(),
        weight_KC.data_ptr(),
        bias_C.data_ptr(),
        y_BLC.data_ptr(),
        batch,
        length,
        channels,
        weight_KC.shape[0],
    )
    return y_BLC


def mamba_step(
    projected: Tensor,
    window_BCW: Tensor,
    state_BHPN: Tensor,
    conv_weight_CK: Tensor,
    conv_bias_C: Tensor | None,
    dt_bias_H: Tensor,
    A_log_H: Tensor,
    D_H: Tensor,
    norm_weight_I: Tensor,
    *,
    groups: int,
    time_step_limit: tuple[float, float],
    eps: float,
) -> Tensor:
    """A Mamba-2 mixer between its projections, for T tokens one after the other: y (B, T, I). The window and the state
    move on in place.

    Args:
        projected: (B, T, 2 I + 2 G N + H), what in_proj gave.
        window_BCW, state_BHPN: the cache's; the state float32; W less than `MOST_TAPS`.
    """
    native: Any = (load.loaded or load.find())[0]
    batch, heads, head_dim, state_size = state_BHPN.shape
    length = projected.shape[1]
    y_BTI = projected.new_empty(batch, length, heads * head_dim)
    sizes = Mamba(heads, head_dim, groups, state_size, window_BCW.shape[-1], *time_step_limit, eps)
    failed = native.nh_mamba_step(
        _TYPES[projected.dtype],
        sizes,
        batch,
        length,
        projected.data_ptr(),
        window_BCW.data_ptr(),
        conv_weight_CK.data_ptr(),
        None if conv_bias_C is None else conv_bias_C.data_ptr(),
        dt_bias_H.data_ptr(),
        A_log_H.data_ptr(),
        D_H.data_ptr(),
        state_BHPN.data_ptr(),
        norm_weight_I.data_ptr(),
        y_BTI.data_ptr(),
    )
    if failed:
        raise MemoryError(f"No memory for {batch} rows of {heads} heads.")
    return y_BTI


def weight(weight_NK: Tensor, in_features: int, scale: Tensor | None = None) -> Weight:
    """A weight as `linear` takes it, for `blocks`."""
    kind = _TYPES.get(weight_NK.dtype, _INT8 if weight_NK.dtype == torch.int8 else _INT4)
    return Weight(kind, weight_NK.shape[0], in_features, weight_NK.data_ptr(), 0 if scale is None else scale.data_ptr())


def blocks(layers: ctypes.Array[Block], count: int, x_BTD: Tensor) -> None:
    """T tokens through `count` layers; x (B, T, D) float32 or bfloat16, keys, values, windows and states in place."""
    native: Any = (load.loaded or load.find())[0]
    batch, length, width = x_BTD.shape
    if native.nh_blocks(_TYPES[x_BTD.dtype], ctypes.addressof(layers), count, batch, length, width, x_BTD.data_ptr()):
        raise MemoryError(f"No memory for {batch * length} rows of {width} in {count} layers.")


def attend(q_BATQ: Tensor, k_BALQ: Tensor, v_BALQ: Tensor, scale: float) -> Tensor:
    """The last T query positions over all keys up to their own: (B, A, T, Q). The rows of keys and values lie one after
    the other; their heads and batch rows may lie apart (a longer buffer)."""
    native: Any = (load.loaded or load.find())[0]
    batch, heads, queries, head_dim = q_BATQ.shape
    key_heads, length = k_BALQ.shape[1:3]
    y_BATQ = torch.empty_like(q_BATQ)
    strides = [t.stride(dim) for t in (k_BALQ, v_BALQ) for dim in (0, 1)]
    addresses = [t.data_ptr() for t in (q_BATQ, k_BALQ, v_BALQ, y_BATQ)]
    sizes = [batch, key_heads, heads // key_heads, queries, length, head_dim]
    if native.nh_attend(_TYPES[q_BATQ.dtype], *addresses, *sizes, *strides, scale):
        raise MemoryError(f"No memory for {heads} heads over {length} keys.")
    return y_BATQ

"""A Mamba-2 mixer between its two projections, for a few tokens, in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import conditions, native
from . import cuda_kernels as backends
from .causal_conv import causal_conv
from .conditions import may_write, wants_gradient
from .norms import gated_rms_norm
from .ssd import time_step


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
    activation: Any,
    time_step_limit: tuple[float, float],
    eps: float,
    mask_BL: Tensor | None = None,
) -> Tensor | None:
    """`causal_conv`, `time_step`, `ssd_step` and `gated_rms_norm` of a few tokens, where one call can do them all.

    The window and the state move on in place: read once, written once. On CUDA it is one token, by the
    packages' kernels.

    Args:
        projected: (B, L, I + C + H), what in_proj gave: z, then x, B and C, then the raw dt.
        window_BCW, state_BHPN: the cache's.
        mask_BL: 0 or False at pads, which leave their row's window and state alone.

    Returns: y (B, L, I) for out_proj; None, with nothing changed, where the four ops must be called: a gradient or a
        float64 tensor; on a CPU a mask, another activation than silu, mixed dtypes, a state that is not float32, no C
        compiler; on CUDA several tokens, no mamba-ssm; another device.
    """
    tensors = (
        projected, window_BCW, state_BHPN, conv_weight_CK, conv_bias_C, dt_bias_H, A_log_H, D_H, norm_weight_I
    )  # fmt: skip
    if backends.serves(projected) and not torch.compiler.is_compiling():
        y_BLI = _one_by_kernels(*tensors, groups, activation, time_step_limit, eps, mask_BL)
        if y_BLI is not None:
            return y_BLI
    if mask_BL is None and activation in ("silu", "swish") and conditions.mamba_step(*tensors, groups):
        return native.mamba_step(*tensors, groups=groups, time_step_limit=time_step_limit, eps=eps)
    return None


def _one_by_kernels(
    projected_B1K: Tensor,
    window_BCW: Tensor,
    state_BHPN: Tensor,
    conv_weight_CK: Tensor,
    conv_bias_C: Tensor | None,
    dt_bias_H: Tensor,
    A_log_H: Tensor,
    D_H: Tensor,
    norm_weight_I: Tensor,
    groups: int,
    activation: Any,
    time_step_limit: tuple[float, float],
    eps: float,
    mask_B1: Tensor | None,
) -> Tensor | None:
    """`mamba_step` of one token by mamba-ssm's one-token kernel, and causal-conv1d's where it serves."""
    parameters = (conv_weight_CK, conv_bias_C, dt_bias_H, A_log_H, D_H, norm_weight_I)
    if (
        projected_B1K.shape[1] != 1
        or window_BCW.dtype != projected_B1K.dtype
        or any(t is not None and t.dtype == torch.float64 for t in (state_BHPN, *parameters))
        or not may_write(window_BCW, state_BHPN)
        or wants_gradient(projected_B1K, *parameters)
    ):
        return None
    step = backends.kernel_for("ssd_step", projected_B1K)
    if step is None:
        return None
    batch, heads, head_dim, state_size = state_BHPN.shape
    inner, channels = heads * head_dim, conv_weight_CK.shape[0]
    z_B1I, xBC_B1C, dt_B1H = projected_B1K.split([inner, channels, heads], dim=-1)
    conv = backends.kernel_for(
        "causal_conv_step", projected_B1K, kernel_size=conv_weight_CK.shape[1], activation=activation
    )
    if conv is not None:
        mask_B1 = None if mask_B1 is None else mask_B1.bool()
        xBC_BC = conv(xBC_B1C[:, 0], window_BCW, conv_weight_CK, conv_bias_C, activation, mask_B1)
    else:
        xBC_B1C, new_BCW = causal_conv(
            xBC_B1C, conv_weight_CK, conv_bias_C, window_BCW=window_BCW, mask_BL=mask_B1, activation=activation
        )
        xBC_BC = xBC_B1C[:, 0]
        window_BCW.copy_(new_BCW)
    x_BI, B_BS, C_BS = xBC_BC.split([inner, groups * state_size, groups * state_size], dim=-1)
    y_BHP = step(
        x_BI.view(batch, heads, head_dim),
        time_step(dt_B1H, dt_bias_H, time_step_limit, mask_B1)[:, 0],
        -torch.exp(A_log_H),
        B_BS.view(batch, groups, state_size),
        C_BS.view(batch, groups, state_size),
        D_H,
        state_BHPN,
    )
    return gated_rms_norm(y_BHP.reshape(batch, 1, inner), z_B1I, norm_weight_I, eps, groups)

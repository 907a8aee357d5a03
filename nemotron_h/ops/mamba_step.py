"""A Mamba-2 mixer between its two projections, for a few tokens, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native

FEW_TOKENS = 16
"""Up to so many tokens that go on from a state are worked through one after the other: the state is read and written
once for them, and any split of them into calls gives the same bits. More go through the chunked form."""


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
    activation: object,
    time_step_limit: tuple[float, float],
    eps: float,
) -> Tensor | None:
    """`causal_conv`, `time_step`, `ssd_step` and `gated_rms_norm` of a few tokens, where one call can do them all.

    The window and the state move on in place: read once, written once. At the dims of the 9B a token takes 0.3 ms, the
    four ops 2.0 ms.

    Args:
        projected: (B, L, I + C + H), what in_proj gave: z, then x, B and C, then the raw dt.
        window_BCW, state_BHPN: the cache's.

    Returns: y (B, L, I) for out_proj; None, with nothing changed, where the four ops must be called: another device
        than a CPU, another activation than silu, mixed dtypes, a gradient, a state that is not float32, no C compiler.
    """
    dtype = projected.dtype
    same = (window_BCW, conv_weight_CK, conv_bias_C, norm_weight_I)
    exact = (dt_bias_H, A_log_H, D_H, state_BHPN)
    if (
        dtype in (torch.float32, torch.bfloat16)
        and activation in ("silu", "swish")
        and conv_weight_CK.shape[1] <= native.MOST_TAPS
        and all(t is None or t.dtype == dtype for t in same)
        and all(t.dtype == torch.float32 for t in exact)
        and window_BCW.shape == (projected.shape[0], conv_weight_CK.shape[0], conv_weight_CK.shape[1] - 1)
        and projected.shape[0] == state_BHPN.shape[0]
        and all(t.shape == state_BHPN.shape[1:2] for t in (A_log_H, dt_bias_H, D_H))
        and state_BHPN.shape[1] % groups == 0
        and norm_weight_I.shape[0] == state_BHPN.shape[1] * state_BHPN.shape[2]
        and conv_weight_CK.shape[0] == norm_weight_I.shape[0] + 2 * groups * state_BHPN.shape[3]
        and (conv_bias_C is None or conv_bias_C.shape == conv_weight_CK.shape[:1])
        and projected.shape[2] == norm_weight_I.shape[0] + conv_weight_CK.shape[0] + A_log_H.shape[0]
        and not (state_BHPN.requires_grad or window_BCW.requires_grad)  # a backward may need what they hold now
        and native.serves(projected, *same, *exact)
    ):
        return native.mamba_step(
            projected,
            window_BCW,
            state_BHPN,
            conv_weight_CK,
            conv_bias_C,
            dt_bias_H,
            A_log_H,
            D_H,
            norm_weight_I,
            groups=groups,
            time_step_limit=time_step_limit,
            eps=eps,
        )
    return None

"""The obvious recurrences, position by position in float64: slow on purpose, the oracle of every other file here.

Same signatures as the fast functions, so that a test calls both with the same arguments. Nothing is shared with them:
no chunk, no cumulative sum, no gather, no group broadcasting. Differentiable, so gradients are compared too.

Shape suffixes: B batch, L length, H heads, P head dim, G groups, N state, C channels, K kernel, W = K - 1, T tokens, E
    experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def time_step(
    dt_raw_BLH: Tensor, dt_bias_H: Tensor, limit: tuple[float, float], mask_BL: Tensor | None = None
) -> Tensor:
    """`clamp(log(1 + exp(dt_raw + dt_bias)), *limit)`, then 0 where the mask is 0. See `ops.ssd.time_step`."""
    u = dt_raw_BLH.double() + dt_bias_H.double()
    dt = torch.clamp(torch.logaddexp(u, torch.zeros_like(u)), min=limit[0], max=limit[1])
    return dt if mask_BL is None else torch.where(mask_BL.bool()[..., None], dt, torch.zeros_like(dt))


def ssd(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor,
    *,
    initial_state_BHPN: Tensor | None = None,
    seq_idx_BL: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One position after another, one row after another. `chunk_size` means nothing here. See `ops.ssd.ssd`."""
    batch, length, heads, head_dim = x_BLHP.shape
    groups, state_size = B_BLGN.shape[2:]
    group_of_head = [h // (heads // groups) for h in range(heads)]
    A, D = A_H.double(), D_H.double()
    rows, states = [], []
    for b in range(batch):
        zero_HPN = torch.zeros(heads, head_dim, state_size, dtype=torch.float64, device=x_BLHP.device)
        state_HPN = zero_HPN if initial_state_BHPN is None else initial_state_BHPN[b].double()
        outputs = []
        for t in range(length):
            if seq_idx_BL is not None and t > 0 and int(seq_idx_BL[b, t]) != int(seq_idx_BL[b, t - 1]):
                state_HPN = zero_HPN
            x_HP, dt_H = x_BLHP[b, t].double(), dt_BLH[b, t].double()
            B_HN, C_HN = B_BLGN[b, t].double()[group_of_head], C_BLGN[b, t].double()[group_of_head]
            state_HPN = torch.exp(dt_H * A)[:, None, None] * state_HPN + torch.einsum("h,hp,hn->hpn", dt_H, x_HP, B_HN)
            outputs.append(torch.einsum("hpn,hn->hp", state_HPN, C_HN) + D[:, None] * x_HP)
        rows.append(torch.stack(outputs))
        states.append(state_HPN)
    return torch.stack(rows).to(x_BLHP.dtype), torch.stack(states)


def ssd_step(
    x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor, D_H: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """`ssd` over a sequence of one. See `ops.ssd.ssd_step`."""
    y, state = ssd(
        x_BHP[:, None], dt_BH[:, None], A_H, B_BGN[:, None], C_BGN[:, None], D_H, initial_state_BHPN=state_BHPN
    )
    return y[:, 0], state


def causal_conv(
    x_BLC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    *,
    window_BCW: Tensor | None = None,
    mask_BL: Tensor | None = None,
    seq_idx_BL: Tensor | None = None,
    activation: str | Callable[[Tensor], Tensor] | None = "silu",
) -> tuple[Tensor, Tensor]:
    """A queue of the last K - 1 inputs that each valid position joins. See `ops.causal_conv.causal_conv`."""
    batch, length, channels = x_BLC.shape
    width = weight_CK.shape[1] - 1
    zero_C = torch.zeros(channels, dtype=torch.float64, device=x_BLC.device)
    rows, windows = [], []
    for b in range(batch):
        queue = [zero_C] * width if window_BCW is None else [window_BCW[b, :, w].double() for w in range(width)]
        outputs, document = [], None
        for t in range(length):
            if mask_BL is not None and not bool(mask_BL[b, t]):
                outputs.append(zero_C)
                continue
            if seq_idx_BL is not None:
                if document is not None and int(seq_idx_BL[b, t]) != document:
                    queue = [zero_C] * width
                document = int(seq_idx_BL[b, t])
            taps = [*queue, x_BLC[b, t].double()]
            y_C = zero_C if bias_C is None else bias_C.double()
            for k, tap_C in enumerate(taps):
                y_C = y_C + weight_CK[:, k].double() * tap_C
            if callable(activation):
                y_C = activation(y_C)
            elif activation is not None:
                y_C = y_C / (1 + torch.exp(-y_C))
            outputs.append(y_C)
            queue = taps[1:]
        rows.append(torch.stack(outputs))
        windows.append(torch.stack(queue, dim=1) if width else x_BLC.new_zeros(channels, 0))
    return torch.stack(rows).to(x_BLC.dtype), torch.stack(windows).to(x_BLC.dtype)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See `ops.gated_norm.rms_norm`."""
    h = x.double()
    return (weight_D.double() * h / torch.sqrt((h * h).sum(-1, keepdim=True) / h.shape[-1] + eps)).to(x.dtype)


def gated_rms_norm(y: Tensor, z: Tensor, weight_D: Tensor, eps: float, n_groups: int) -> Tensor:
    """One group after another. See `ops.gated_norm.gated_rms_norm`."""
    gated = y.double() * (z.double() / (1 + torch.exp(-z.double())))
    size = y.shape[-1] // n_groups
    parts = []
    for g in range(n_groups):
        here = slice(g * size, (g + 1) * size)
        parts.append(rms_norm(gated[..., here], weight_D[here], eps))
    return torch.cat(parts, dim=-1).to(y.dtype)


def router(
    logits_TE: Tensor,
    correction_bias_E: Tensor,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Sorts in Python, token by token. See `ops.moe.router`; the indices come best first."""
    dtype = torch.float64 if logits_TE.dtype == torch.float64 else torch.float32
    experts = logits_TE.shape[1]
    size = experts // n_group
    chosen_all, weights_all = [], []
    for t in range(logits_TE.shape[0]):
        probability = [1 / (1 + math.exp(-v)) for v in logits_TE[t].tolist()]
        biased = [p + b for p, b in zip(probability, correction_bias_E.tolist(), strict=True)]
        groups = [sum(sorted(biased[g * size : (g + 1) * size], reverse=True)[:2]) for g in range(n_group)]
        open_groups = sorted(range(n_group), key=lambda g: -groups[g])[:topk_group]
        candidates = [e for e in range(experts) if e // size in open_groups]
        chosen = sorted(candidates, key=lambda e: -biased[e])[:top_k]
        weights = torch.stack([1 / (1 + torch.exp(-logits_TE[t, e].double())) for e in chosen])
        if norm_topk_prob:
            weights = weights / (weights.sum() + 1e-20)
        chosen_all.append(torch.tensor(chosen))
        weights_all.append(weights * scaling)
    return torch.stack(chosen_all), torch.stack(weights_all).to(dtype)

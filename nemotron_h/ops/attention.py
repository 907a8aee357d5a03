"""Causal attention of the last L of S positions, without a mask that holds L x S numbers.

Shape suffixes: B batch, A query heads, K key heads, R = A / K, L query positions, S key positions, Q head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import conditions, native
from .conditions import FEW_TOKENS, is_slow, without_autocast

# Keys that are converted, where they must be, and multiplied at a time.
_KEYS = 4096


def causal_attention(q_BALQ: Tensor, k_BKSQ: Tensor, v_BKSQ: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T + causal mask) v for the last L of S positions: (B, A, L, Q) in q's dtype. No gradient.

    Query i sees keys 0 .. S - L + i. Query head a reads key head a // R. Softmax and sums in float32 at least.

    On a CPU the keys before the queries are worked through a few thousand at a time and joined by their log-sum-exp,
    and what is multiplied is float32 where the CPU has no instructions for the dtype. Elsewhere
    `F.scaled_dot_product_attention` has a form of its own for this mask.
    """
    batch, heads, length, head_dim = q_BALQ.shape
    key_heads, keys = k_BKSQ.shape[1:3]
    if q_BALQ.device.type != "cpu":
        bias = None
        if 1 < length < keys:
            from torch.nn.attention.bias import causal_lower_right

            bias = causal_lower_right(length, keys)
        return F.scaled_dot_product_attention(
            q_BALQ,
            k_BKSQ,
            v_BKSQ,
            attn_mask=bias,
            is_causal=length == keys > 1,
            scale=scale,
            enable_gqa=heads != key_heads,
        )
    q_BKRLQ = q_BALQ.unflatten(1, (key_heads, -1))
    if length <= FEW_TOKENS and conditions.attention(rows_BALQ := q_BALQ.contiguous(), k_BKSQ, v_BKSQ):
        return native.attend(rows_BALQ, k_BKSQ, v_BKSQ, scale)
    dtype = torch.float32 if is_slow(q_BALQ.dtype) else q_BALQ.dtype
    with without_autocast(q_BALQ.device):
        # What all queries see: query heads and positions are rows of one matrix, so no key is repeated.
        q_BKTQ = q_BKRLQ.to(dtype).flatten(2, 3)
        total: tuple[Tensor, Tensor] | None = None
        seen_by_all = keys - length if length > 1 else keys
        for start in range(0, seen_by_all, _KEYS):
            here = slice(start, min(start + _KEYS, seen_by_all))
            part = _flash(q_BKTQ, k_BKSQ[:, :, here].to(dtype), v_BKSQ[:, :, here].to(dtype), False, scale)
            total = part if total is None else _join(total, part)
        if length > 1:
            own = [
                t[:, :, keys - length :].to(dtype).repeat_interleave(heads // key_heads, 1) for t in (k_BKSQ, v_BKSQ)
            ]
            y_BALQ, lse_BAL = _flash(q_BALQ.to(dtype), own[0], own[1], True, scale)
            part = y_BALQ.view(batch, key_heads, -1, head_dim), lse_BAL.view(batch, key_heads, -1)
            total = part if total is None else _join(total, part)
    assert total is not None
    return total[0].to(q_BALQ.dtype).view(q_BALQ.shape)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """What `F.scaled_dot_product_attention` runs on a CPU, with the log-sum-exp of the scores beside it."""
    y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return y.contiguous(), lse.contiguous()


def _join(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two attentions of the same queries over different keys as one over both."""
    lse = torch.logaddexp(a[1], b[1])
    wa, wb = (torch.exp(part[1] - lse).unsqueeze(-1) for part in (a, b))
    return torch.addcmul(a[0] * wa, b[0], wb.to(b[0].dtype)).to(a[0].dtype), lse

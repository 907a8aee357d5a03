"""The Mamba-2 recurrence (state-space duality, arXiv 2405.21060), chunk by chunk and one token at a time.

    state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t^T          y_t = state_t C_t + D x_t

Shape suffixes: B batch, L length, H heads, P head dim, G groups, N state, R = H / G heads per group, Q length of a
chunk. Head h reads B and C of group h // R.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .documents import document_index
from .precision import compute_dtype, without_autocast

# The result does not depend on it. Measured (bf16 input, H128 P80 N128 G8, 2048 tokens, 2 cores): 32 and 64 are within
# noise, 128 is 1.2x slower and 256 is 2x slower, because the Q x Q x H decay no longer fits the cache.
DEFAULT_CHUNK_SIZE = 64


def time_step(
    dt_raw_BLH: Tensor, dt_bias_H: Tensor, limit: tuple[float, float], mask_BL: Tensor | None = None
) -> Tensor:
    """`clamp(softplus(dt_raw + dt_bias), *limit)` in float32 (float64 if either is float64), and 0 at pads.

    The limit is `config.time_step_limit`, (0, inf) in every published model, and not `time_step_min`, which only
    initialises. A pad (mask 0 or False) gets exactly 0 after the clamp: with dt = 0 the state neither decays nor takes
    anything in.

    Args:
        dt_raw_BLH: (B, L, H), or any (..., H) where there is no mask.
    """
    dtype = compute_dtype(dt_raw_BLH, dt_bias_H)
    dt_BLH = F.softplus(dt_raw_BLH.to(dtype) + dt_bias_H.to(dtype))
    low, high = limit
    if low > 0.0 or high != float("inf"):
        dt_BLH = dt_BLH.clamp(low, high)
    if mask_BL is not None:
        dt_BLH = dt_BLH.masked_fill(~mask_BL.bool()[..., None], 0.0)
    return dt_BLH


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
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """The recurrence over a whole sequence, as the paper's block decomposition (section 6, listing 1), walking the
    chunks.

    Computes in float32 (float64 if x, dt or A is float64), also under autocast. A position with dt = 0 leaves the state
    exactly as it was. Nothing is allocated per (position, position, head) but for one chunk at a time.

    Args:
        x_BLHP: (B, L, H, P).
        dt_BLH: (B, L, H), from `time_step`: not negative.
        A_H: (H,), negative: -exp(A_log).
        B_BLGN, C_BLGN: (B, L, G, N); H must be a multiple of G.
        D_H: (H,), the skip.
        initial_state_BHPN: the state before position 0; None is zeros. It belongs to position 0's document.
        seq_idx_BL: integers; a document starts where they change, and documents do not see each other.
        chunk_size: positions per chunk. The result does not depend on it.

    Returns: y (B, L, H, P) in x's dtype, and the state after the last position (B, H, P, N), the last document's own,
        in the computing dtype.
    """
    dtype = compute_dtype(x_BLHP, dt_BLH, A_H)
    batch, length, heads, head_dim = x_BLHP.shape
    state_BHPN = (
        torch.zeros(batch, heads, head_dim, B_BLGN.shape[-1], dtype=dtype, device=x_BLHP.device)
        if initial_state_BHPN is None
        else initial_state_BHPN.to(dtype)
    )
    A_H, D_H = A_H.to(dtype), D_H.to(dtype)
    doc_BL = None if seq_idx_BL is None else document_index(seq_idx_BL)
    y_chunks = []
    with without_autocast(x_BLHP.device):
        for start in range(0, length, chunk_size):
            here = slice(start, min(start + chunk_size, length))
            doc_BQ = None if doc_BL is None else doc_BL[:, here]
            carried_B1 = None if doc_BL is None else doc_BL[:, max(start - 1, 0), None]
            y_BQHP, state_BHPN = _chunk(
                x_BLHP[:, here].to(dtype),
                dt_BLH[:, here].to(dtype),
                A_H,
                B_BLGN[:, here].to(dtype),
                C_BLGN[:, here].to(dtype),
                D_H,
                state_BHPN,
                doc_BQ,
                carried_B1,
            )
            y_chunks.append(y_BQHP.to(x_BLHP.dtype))
    return torch.cat(y_chunks, dim=1), state_BHPN


def _chunk(
    x_BQHP: Tensor,
    dt_BQH: Tensor,
    A_H: Tensor,
    B_BQGN: Tensor,
    C_BQGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor,
    doc_BQ: Tensor | None,
    carried_B1: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One chunk: what its positions give each other, what the state before it gives them, and the state after it.

    `carried_B1` is the document that the incoming state belongs to.
    """
    batch, chunk, heads, head_dim = x_BQHP.shape
    groups, state_size = B_BQGN.shape[2:]
    per_group = heads // groups

    sum_BHQ, low_BHQ = _running_decay(dt_BQH * A_H)
    total_BH1 = sum_BHQ[..., -1:]
    # How much of the incoming state each position sees, and how much of each position the outgoing state keeps.
    seen_BHQ = torch.exp(sum_BHQ + low_BHQ)
    kept_BHQ = torch.exp((total_BH1 - sum_BHQ) + (low_BHQ[..., -1:] - low_BHQ))
    passed_BH = seen_BHQ[..., -1]
    causal_QQ = torch.ones(chunk, chunk, dtype=x_BQHP.dtype, device=x_BQHP.device).tril()
    if doc_BQ is not None and carried_B1 is not None:
        last_B1 = doc_BQ[:, -1:]
        seen_BHQ = seen_BHQ * (doc_BQ == carried_B1)[:, None]
        kept_BHQ = kept_BHQ * (doc_BQ == last_B1)[:, None]
        passed_BH = passed_BH * (last_B1 == carried_B1)
        causal_QQ = (causal_QQ * (doc_BQ[:, :, None] == doc_BQ[:, None, :]))[:, None]

    # Scores once per group, decay per head. Above the diagonal the difference of sums is positive and its exponential
    # may overflow; clamped at 0 it is 1 there, finite forward and backward, and the scores are 0.
    C_XQN = C_BQGN.transpose(1, 2).reshape(batch * groups, chunk, state_size)
    B_XQN = B_BQGN.transpose(1, 2).reshape(batch * groups, chunk, state_size)
    scores_BGQQ = torch.bmm(C_XQN, B_XQN.mT).view(batch, groups, chunk, chunk) * causal_QQ
    decay_BHQQ = torch.exp((sum_BHQ[..., :, None] - sum_BHQ[..., None, :]).clamp(max=0))
    mix_BGRQQ = decay_BHQQ.view(batch, groups, per_group, chunk, chunk) * scores_BGQQ[:, :, None]

    dt_BHQ = dt_BQH.transpose(1, 2)
    column_BQH1 = (dt_BHQ * torch.exp(-low_BHQ)).transpose(1, 2)[..., None]
    row_BQH1 = torch.exp(low_BHQ).transpose(1, 2)[..., None]
    inside = torch.bmm(
        mix_BGRQQ.reshape(batch * heads, chunk, chunk),
        (x_BQHP * column_BQH1).transpose(1, 2).reshape(batch * heads, chunk, head_dim),
    )
    inside_BQHP = inside.view(batch, heads, chunk, head_dim).transpose(1, 2)
    before = torch.bmm(C_XQN, state_BHPN.reshape(batch * groups, per_group * head_dim, state_size).mT)
    before_BQHP = before.view(batch, groups, chunk, per_group, head_dim).transpose(1, 2).flatten(2, 3)
    y_BQHP = inside_BQHP * row_BQH1 + before_BQHP * seen_BHQ.transpose(1, 2)[..., None] + x_BQHP * D_H[:, None]

    added_BQHP = x_BQHP * (dt_BHQ * kept_BHQ).transpose(1, 2)[..., None]
    added_XSQ = added_BQHP.reshape(batch, chunk, groups, per_group * head_dim).permute(0, 2, 3, 1).flatten(0, 1)
    new_state = torch.bmm(added_XSQ, B_XQN).view(batch, heads, head_dim, state_size)
    return y_BQHP, state_BHPN * passed_BH[..., None, None] + new_state


def _running_decay(a_BQH: Tensor) -> tuple[Tensor, Tensor]:
    """The running sum of a = dt A over the chunk as two numbers, (B, H, Q) each: rounded, and what rounding took away.

    The exponent between two positions is a difference of running sums. In float32 alone a stretch of strong decay (a
    sum of some thousands) costs every later pair in the chunk its last digits (1e-3 of the weight), so the sum runs in
    float64.
    """
    a_BHQ = a_BQH.transpose(1, 2)
    if a_BHQ.dtype == torch.float64 or a_BHQ.device.type == "mps":  # MPS has no float64
        sum_BHQ = a_BHQ.cumsum(-1)
        return sum_BHQ, torch.zeros_like(sum_BHQ)
    exact_BHQ = a_BHQ.double().cumsum(-1)
    sum_BHQ = exact_BHQ.to(a_BHQ.dtype)
    # The remainder counts as a constant: all of the gradient goes through the rounded sum, once.
    return sum_BHQ, (exact_BHQ - sum_BHQ).to(a_BHQ.dtype).detach()


def ssd_step(
    x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor, D_H: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence for one token: (y (B, H, P) in x's dtype, new state (B, H, P, N) in the computing dtype).

    Out of place. Computes in float32 (float64 if x, dt, A or the state is float64); the state may be held in less.
    """
    dtype = compute_dtype(x_BHP, dt_BH, A_H, state_BHPN)
    batch, heads, head_dim = x_BHP.shape
    groups, state_size = B_BGN.shape[1:]
    with without_autocast(x_BHP.device):
        x, dt_BH = x_BHP.to(dtype), dt_BH.to(dtype)
        decay_BH11 = torch.exp(dt_BH * A_H.to(dtype))[..., None, None]
        added_BGS1 = (x * dt_BH[..., None]).view(batch, groups, -1, 1)
        kept_BGSN = (state_BHPN.to(dtype) * decay_BH11).view(batch, groups, -1, state_size)
        state_BGSN = torch.addcmul(kept_BGSN, added_BGS1, B_BGN.to(dtype)[:, :, None, :])
        y = torch.matmul(state_BGSN, C_BGN.to(dtype)[..., None]).view(batch, heads, head_dim)
        y = torch.addcmul(y, x, D_H.to(dtype)[:, None])
    return y.to(x_BHP.dtype), state_BGSN.view(batch, heads, head_dim, state_size)

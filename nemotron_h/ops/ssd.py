"""The Mamba-2 recurrence (state-space duality, arXiv 2405.21060), chunk by chunk and one token at a time.

    state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t^T          y_t = state_t C_t + D x_t

Shape suffixes: B batch, L length, H heads, P head dim, G groups, N state, R = H / G heads per group, Q length of a
chunk; folded for batched products: X = B G, S = R P, Z = B H. Head h reads B and C of group h // R.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import conditions
from . import cuda_kernels as backends
from .causal_conv import document_index
from .conditions import BLOCKS, RECOMPUTED, compute_dtype, wants_gradient, without_autocast

# The result does not depend on it, and the time hardly: more of it is spent in products the longer a chunk is.
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
    """The recurrence over a whole sequence: the paper's block decomposition (section 6, listing 1), chunk by chunk.

    Computes in float32 (float64 if x, dt or A is float64), also under autocast. A position with dt = 0 leaves the state
    exactly as it was. Nothing is allocated per (position, position, head) but for one chunk at a time.

    Args:
        x_BLHP: (B, L, H, P).
        dt_BLH: (B, L, H), from `time_step`: not negative.
        A_H: (H,), negative: -exp(A_log).
        B_BLGN, C_BLGN: (B, L, G, N); H must be a multiple of G.
        D_H: (H,), the skip.
        initial_state_BHPN: the state before position 0; None is zeros. It belongs to position 0's document.
        seq_idx_BL: integers; a document starts where they change, and documents do not see each other. A pad must carry
            the number of the document before it (`document_index` with a mask sees to that).
        chunk_size: positions per chunk. The result does not depend on it.

    Returns: y (B, L, H, P) in x's dtype, and the state after the last position (B, H, P, N), the last document's own,
        in the computing dtype.
    """
    doc_BL = None if seq_idx_BL is None else document_index(seq_idx_BL)
    if backends.serves(x_BLHP) and (kernel := backends.kernel_for("ssd", x_BLHP)) is not None:
        return kernel(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, initial_state_BHPN=initial_state_BHPN, doc_BL=doc_BL)
    dtype = compute_dtype(x_BLHP, dt_BLH, A_H)
    batch, _, heads, head_dim = x_BLHP.shape
    if initial_state_BHPN is None:
        state_BHPN = torch.zeros(batch, heads, head_dim, B_BLGN.shape[-1], dtype=dtype, device=x_BLHP.device)
    else:
        state_BHPN = initial_state_BHPN.to(dtype)
    inputs = (x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, state_BHPN)
    with without_autocast(x_BLHP.device):
        form = conditions.scan(*inputs)
        if form == RECOMPUTED:
            return _Scan.apply(*inputs, doc_BL, chunk_size)
        return (_walk_in_place if form == BLOCKS else _walk)(*inputs, doc_BL, chunk_size)


def _walk(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor,
    doc_BL: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Chunk after chunk, as plain functions of tensors."""
    dtype = state_BHPN.dtype
    A_H, D_H = A_H.to(dtype), D_H.to(dtype)
    y_BLHP = x_BLHP.new_empty(x_BLHP.shape)
    for start in range(0, x_BLHP.shape[1], chunk_size):
        here = slice(start, min(start + chunk_size, x_BLHP.shape[1]))
        x_BQHP, dt_BQH, B_XQN, C_XQN = _cut(x_BLHP, dt_BLH, B_BLGN, C_BLGN, here, dtype)
        decay = _decay(dt_BQH, A_H, doc_BL, here)
        y_BLHP[:, here], state_BHPN = _chunk(x_BQHP, dt_BQH, B_XQN, C_XQN, D_H, state_BHPN, decay)
    return y_BLHP, state_BHPN


class _Buffers:
    """What a chunk of Q positions is worked out in. A chunk's tensors are a few MB each: made anew, most of their cost
    on a CPU is the kernel's zeroing of their pages."""

    def __init__(self, like: Tensor, batch: int, chunk: int, heads: int, head_dim: int, groups: int):
        def new(*shape: int) -> Tensor:
            return like.new_empty(shape)

        self.x_BHQP = new(batch, heads, chunk, head_dim)
        self.kept_x_XQRP = new(batch * groups, chunk, heads // groups, head_dim)
        self.scores_XQQ = new(batch * groups, chunk, chunk)
        self.mix_BHQQ = new(batch, heads, chunk, chunk)
        self.inside_ZQP = new(batch * heads, chunk, head_dim)
        self.before_XQS = new(batch * groups, chunk, heads // groups * head_dim)


def _walk_in_place(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor,
    doc_BL: Tensor | None,
    chunk_size: int,
    entered: list[Tensor] | None = None,
    apart: int = 1,
) -> tuple[Tensor, Tensor]:
    """`_walk` in buffers that every chunk uses again; the state that enters each `apart`-th chunk is appended to
    `entered`.

    What a position gives another, (score) exp(sum_i - sum_j) dt_j, and D on the diagonal are one matrix per head. The
    state is scaled and added to where it is.
    """
    dtype, (batch, length, heads, head_dim) = state_BHPN.dtype, x_BLHP.shape
    groups, per_group = B_BLGN.shape[2], heads // B_BLGN.shape[2]
    A_H, D_H = A_H.to(dtype), D_H.to(dtype)
    y_BLHP = x_BLHP.new_empty(x_BLHP.shape)
    state_BHPN = state_BHPN.clone(memory_format=torch.contiguous_format)
    state_XSN = state_BHPN.view(batch * groups, per_group * head_dim, -1)
    buffers = None
    for start in range(0, length, chunk_size):
        here = slice(start, min(start + chunk_size, length))
        chunk = here.stop - start
        if buffers is None or chunk < chunk_size:
            buffers = _Buffers(state_BHPN, batch, chunk, heads, head_dim, groups)
        if entered is not None and start // chunk_size % apart == 0:
            entered.append(state_BHPN.clone())
        x_BHQP = buffers.x_BHQP.copy_(x_BLHP[:, here].transpose(1, 2))
        dt_BQH = dt_BLH[:, here].to(dtype)
        dt_BHQ = dt_BQH.transpose(1, 2)
        B_XQN, C_XQN = (t[:, here].to(dtype).transpose(1, 2).flatten(0, 1) for t in (B_BLGN, C_BLGN))
        decay = _decay(dt_BQH, A_H, doc_BL, here)

        scores_BGQQ = torch.bmm(C_XQN, B_XQN.mT, out=buffers.scores_XQQ).view(batch, groups, chunk, chunk)
        scores_BGQQ *= decay.visible_BGQQ
        mix_BHQQ = torch.sub(decay.sum_BHQ[..., :, None], decay.sum_BHQ[..., None, :], out=buffers.mix_BHQQ)
        mix_BHQQ.clamp_(max=0).exp_()  # see _mixing
        mix_BHQQ.view(batch, groups, per_group, chunk, chunk).mul_(scores_BGQQ[:, :, None])
        mix_BHQQ.mul_((dt_BHQ * torch.exp(-decay.low_BHQ))[..., None, :]).mul_(torch.exp(decay.low_BHQ)[..., :, None])
        mix_BHQQ.diagonal(dim1=-2, dim2=-1).add_(D_H[:, None])
        torch.bmm(mix_BHQQ.flatten(0, 1), x_BHQP.flatten(0, 1), out=buffers.inside_ZQP)
        torch.bmm(C_XQN, state_XSN.mT, out=buffers.before_XQS)
        y_BGRQP = buffers.inside_ZQP.view(batch, groups, per_group, chunk, head_dim)
        before_BGRQP = buffers.before_XQS.view(batch, groups, chunk, per_group, head_dim).transpose(2, 3)
        y_BGRQP.addcmul_(before_BGRQP, decay.seen_BHQ.reshape(batch, groups, per_group, chunk, 1))
        y_BLHP[:, here] = y_BGRQP.flatten(1, 2).transpose(1, 2)

        x_XQRP = x_BHQP.view(batch * groups, per_group, chunk, head_dim).transpose(1, 2)
        weight_XRQ = (dt_BHQ * decay.kept_BHQ).reshape(batch * groups, per_group, chunk)
        kept_x_XQRP = torch.mul(x_XQRP, weight_XRQ.transpose(1, 2)[..., None], out=buffers.kept_x_XQRP)
        state_BHPN *= decay.passed_BH[..., None, None]
        state_XSN.baddbmm_(kept_x_XQRP.flatten(2).mT, B_XQN)
    return y_BLHP, state_BHPN


class _Scan(torch.autograd.Function):
    """The walk with a backward that walks the chunks again from the end, and so holds one chunk's decay at a time.

    Kept for it: the inputs, and the states that entered some of the chunks, the root of the number of chunks apart
    (nearest to the fewest that are held: so many kept, so many between two of them walked again). All the states
    of a long text would be several times as large as its inputs.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_BLHP: Tensor,
        dt_BLH: Tensor,
        A_H: Tensor,
        B_BLGN: Tensor,
        C_BLGN: Tensor,
        D_H: Tensor,
        state_BHPN: Tensor,
        doc_BL: Tensor | None,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        entered: list[Tensor] = []
        ctx.chunk_size, ctx.apart = chunk_size, math.ceil(math.sqrt(-(-x_BLHP.shape[1] // chunk_size)))
        results = _walk_in_place(
            x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, state_BHPN, doc_BL, chunk_size, entered, ctx.apart
        )
        ctx.save_for_backward(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, doc_BL, *entered)
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_BLHP: Tensor, dstate_BHPN: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, doc_BL, *entered = ctx.saved_tensors
        dtype = dstate_BHPN.dtype
        A, D = A_H.to(dtype), D_H.to(dtype)
        dx_BLHP, ddt_BLH = torch.empty_like(x_BLHP), torch.empty_like(dt_BLH)
        dB_BLGN, dC_BLGN = torch.empty_like(B_BLGN), torch.empty_like(C_BLGN)
        dA_H, dD_H = torch.zeros_like(A), torch.zeros_like(D)
        chunks = [
            slice(start, min(start + ctx.chunk_size, x_BLHP.shape[1]))
            for start in range(0, x_BLHP.shape[1], ctx.chunk_size)
        ]
        with without_autocast(x_BLHP.device):
            for first in reversed(range(0, len(chunks), ctx.apart)):
                stretch = chunks[first : first + ctx.apart]
                # The states that entered the stretch's chunks; the last one's own result is not needed.
                states = [entered[first // ctx.apart]]
                for here in stretch[:-1]:
                    x_BQHP, dt_BQH, B_XQN, _ = _cut(x_BLHP, dt_BLH, B_BLGN, C_BLGN, here, dtype)
                    states.append(_state_after(x_BQHP, dt_BQH, B_XQN, states[-1], _decay(dt_BQH, A, doc_BL, here)))
                for here in reversed(stretch):
                    x_BQHP, dt_BQH, B_XQN, C_XQN = _cut(x_BLHP, dt_BLH, B_BLGN, C_BLGN, here, dtype)
                    decay = _decay(dt_BQH, A, doc_BL, here)
                    dy_BQHP = dy_BLHP[:, here].to(dtype)
                    dx, ddt, da_BHQ, dB_XQN, dC_XQN, dstate_BHPN = _chunk_backward(
                        x_BQHP, dt_BQH, B_XQN, C_XQN, D, states.pop(), decay, dy_BQHP, dstate_BHPN
                    )
                    dA_H += (da_BHQ * dt_BQH.transpose(1, 2)).sum((0, 2))
                    dD_H += (dy_BQHP * x_BQHP).sum((0, 1, 3))
                    dx_BLHP[:, here] = dx
                    ddt_BLH[:, here] = ddt + da_BHQ.transpose(1, 2) * A
                    batch, chunk, groups, _ = B_BLGN[:, here].shape
                    dB_BLGN[:, here] = dB_XQN.view(batch, groups, chunk, -1).transpose(1, 2)
                    dC_BLGN[:, here] = dC_XQN.view(batch, groups, chunk, -1).transpose(1, 2)
        return dx_BLHP, ddt_BLH, dA_H.to(A_H.dtype), dB_BLGN, dC_BLGN, dD_H.to(D_H.dtype), dstate_BHPN, None, None


def _cut(
    x_BLHP: Tensor, dt_BLH: Tensor, B_BLGN: Tensor, C_BLGN: Tensor, here: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One chunk of the inputs in the computing dtype; B and C with batch and group as one dimension X, for bmm."""
    B_XQN, C_XQN = (t[:, here].to(dtype).transpose(1, 2).flatten(0, 1) for t in (B_BLGN, C_BLGN))
    return x_BLHP[:, here].to(dtype), dt_BLH[:, here].to(dtype), B_XQN, C_XQN


class _Decay(NamedTuple):
    """What time does to the state inside one chunk.

    The running sum of a = dt A is kept as two numbers, rounded (`sum`) and what the rounding took away (`low`): the
    exponent between two positions is a difference of running sums, and in float32 alone a stretch of strong decay (a
    sum of some thousands) costs every later pair in the chunk its last digits (1e-3 of the weight).
    """

    sum_BHQ: Tensor
    low_BHQ: Tensor
    seen_BHQ: Tensor  # how much of the incoming state each position sees
    kept_BHQ: Tensor  # how much of each position the outgoing state keeps
    passed_BH: Tensor  # how much of the incoming state the outgoing one keeps
    visible_BGQQ: Tensor  # 1 where a position (row) may see another (column); broadcasts over B and G


def _decay(dt_BQH: Tensor, A_H: Tensor, doc_BL: Tensor | None, here: slice) -> _Decay:
    a_BHQ = (dt_BQH * A_H).transpose(1, 2)
    if a_BHQ.dtype == torch.float64 or a_BHQ.device.type == "mps":  # MPS has no float64
        sum_BHQ = a_BHQ.cumsum(-1)
        low_BHQ = torch.zeros_like(sum_BHQ)
    else:
        exact_BHQ = a_BHQ.double().cumsum(-1)
        sum_BHQ = exact_BHQ.to(a_BHQ.dtype)
        # The remainder counts as a constant: all of the gradient goes through the rounded sum, once.
        low_BHQ = (exact_BHQ - sum_BHQ).to(a_BHQ.dtype).detach()
    seen_BHQ = torch.exp(sum_BHQ + low_BHQ)
    kept_BHQ = torch.exp((sum_BHQ[..., -1:] - sum_BHQ) + (low_BHQ[..., -1:] - low_BHQ))
    passed_BH = seen_BHQ[..., -1]
    chunk = dt_BQH.shape[1]
    visible_BGQQ = torch.ones(1, 1, chunk, chunk, dtype=a_BHQ.dtype, device=a_BHQ.device).tril()
    if doc_BL is not None:
        doc_BQ = doc_BL[:, here]
        carried_B1, last_B1 = doc_BL[:, max(here.start - 1, 0), None], doc_BQ[:, -1:]
        seen_BHQ = seen_BHQ * doc_BQ.eq(carried_B1)[:, None]
        kept_BHQ = kept_BHQ * doc_BQ.eq(last_B1)[:, None]
        passed_BH = passed_BH * last_B1.eq(carried_B1)
        visible_BGQQ = visible_BGQQ * doc_BQ[:, None, :, None].eq(doc_BQ[:, None, None, :])
    return _Decay(sum_BHQ, low_BHQ, seen_BHQ, kept_BHQ, passed_BH, visible_BGQQ)


def _mixing(B_XQN: Tensor, C_XQN: Tensor, decay: _Decay) -> tuple[Tensor, Tensor]:
    """The chunk as a masked attention: scores once per group (B, G, Q, Q), decay per head (B, G, R, Q, Q).

    Above the diagonal the difference of sums is positive and its exponential may overflow; clamped at 0 it is 1 there,
    finite forward and backward, and the scores are 0.
    """
    batch, heads, chunk = decay.sum_BHQ.shape
    groups = B_XQN.shape[0] // batch
    scores_BGQQ = torch.bmm(C_XQN, B_XQN.mT).view(batch, groups, chunk, chunk) * decay.visible_BGQQ
    between_BHQQ = torch.exp((decay.sum_BHQ[..., :, None] - decay.sum_BHQ[..., None, :]).clamp(max=0))
    return scores_BGQQ, between_BHQQ.view(batch, groups, heads // groups, chunk, chunk)


def _by_head(t_BQHP: Tensor) -> Tensor:
    """(B H, Q, P)."""
    return t_BQHP.transpose(1, 2).flatten(0, 1)


def _by_group(t_BQHP: Tensor, groups: int) -> Tensor:
    """(B G, Q, R P): the heads of a group side by side, as wide matrices."""
    return t_BQHP.unflatten(2, (groups, -1)).flatten(3).transpose(1, 2).flatten(0, 1)


def _from_groups(t_XQS: Tensor, batch: int, head_dim: int) -> Tensor:
    """(B G, Q, R P) back to (B, Q, H, P)."""
    return t_XQS.unflatten(0, (batch, -1)).unflatten(-1, (-1, head_dim)).transpose(1, 2).flatten(2, 3)


def _column(t_BHQ: Tensor) -> Tensor:
    """(B, Q, H, 1), to scale a (B, Q, H, P)."""
    return t_BHQ.transpose(1, 2)[..., None]


def _chunk(
    x_BQHP: Tensor, dt_BQH: Tensor, B_XQN: Tensor, C_XQN: Tensor, D_H: Tensor, state_BHPN: Tensor, decay: _Decay
) -> tuple[Tensor, Tensor]:
    """One chunk: what its positions give each other, what the state before it gives them, and the state after it."""
    batch, chunk, heads, head_dim = x_BQHP.shape
    groups = B_XQN.shape[0] // batch
    dt_BHQ = dt_BQH.transpose(1, 2)
    scores_BGQQ, between_BGRQQ = _mixing(B_XQN, C_XQN, decay)
    mix_ZQQ = (between_BGRQQ * scores_BGQQ[:, :, None]).view(batch * heads, chunk, chunk)
    inside = torch.bmm(mix_ZQQ, _by_head(x_BQHP * _column(dt_BHQ * torch.exp(-decay.low_BHQ))))
    inside_BQHP = inside.view(batch, heads, chunk, head_dim).transpose(1, 2)
    state_XSN = state_BHPN.reshape(batch * groups, -1, state_BHPN.shape[-1])
    before_BQHP = _from_groups(torch.bmm(C_XQN, state_XSN.mT), batch, head_dim)
    y_BQHP = x_BQHP * D_H[:, None] + inside_BQHP * _column(torch.exp(decay.low_BHQ))
    y_BQHP = torch.addcmul(y_BQHP, before_BQHP, _column(decay.seen_BHQ))

    return y_BQHP, _state_after(x_BQHP, dt_BQH, B_XQN, state_BHPN, decay)


def _state_after(x_BQHP: Tensor, dt_BQH: Tensor, B_XQN: Tensor, state_BHPN: Tensor, decay: _Decay) -> Tensor:
    groups = B_XQN.shape[0] // x_BQHP.shape[0]
    added_XQS = _by_group(x_BQHP * _column(dt_BQH.transpose(1, 2) * decay.kept_BHQ), groups)
    added_BHPN = torch.bmm(added_XQS.mT, B_XQN).view(state_BHPN.shape)
    return torch.addcmul(added_BHPN, state_BHPN, decay.passed_BH[..., None, None])


def _chunk_backward(
    x_BQHP: Tensor,
    dt_BQH: Tensor,
    B_XQN: Tensor,
    C_XQN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor,
    decay: _Decay,
    dy_BQHP: Tensor,
    dstate_BHPN: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `_chunk` by x, dt (but for dt A), a = dt A, B, C and the incoming state."""
    batch, chunk, heads, head_dim = x_BQHP.shape
    groups = B_XQN.shape[0] // batch
    dt_BHQ = dt_BQH.transpose(1, 2)
    state_XSN, dstate_XSN = (t.reshape(batch * groups, -1, t.shape[-1]) for t in (state_BHPN, dstate_BHPN))

    # y = mix (x dt) inside the chunk
    scores_BGQQ, between_BGRQQ = _mixing(B_XQN, C_XQN, decay)
    mix_BGRQQ = between_BGRQQ * scores_BGQQ[:, :, None]
    into_BHQ, out_of_BHQ = torch.exp(decay.low_BHQ), dt_BHQ * torch.exp(-decay.low_BHQ)
    dy_ZQP = _by_head(dy_BQHP * _column(into_BHQ))
    dmix_BGRQQ = torch.bmm(dy_ZQP, _by_head(x_BQHP * _column(out_of_BHQ)).mT).view(mix_BGRQQ.shape)
    dinput_ZQP = torch.bmm(mix_BGRQQ.view(batch * heads, chunk, chunk).mT, dy_ZQP)
    dinput_BQHP = dinput_ZQP.view(batch, heads, chunk, head_dim).transpose(1, 2)
    dscores_XQQ = ((dmix_BGRQQ * between_BGRQQ).sum(2) * decay.visible_BGQQ).flatten(0, 1)
    dC_XQN, dB_XQN = torch.bmm(dscores_XQQ, B_XQN), torch.bmm(dscores_XQQ.mT, C_XQN)

    # y += seen (C state)
    dbefore_XQS = _by_group(dy_BQHP * _column(decay.seen_BHQ), groups)
    dC_XQN += torch.bmm(dbefore_XQS, state_XSN)
    dstate_in_XSN = torch.bmm(dbefore_XQS.mT, C_XQN)
    before_XQS = torch.bmm(C_XQN, state_XSN.mT)
    saw_BHQ = _from_groups(dbefore_XQS * before_XQS, batch, head_dim).sum(-1).transpose(1, 2)

    # new state = passed state + (x dt kept)^T B
    dadded_BQHP = _from_groups(torch.bmm(B_XQN, dstate_XSN.mT), batch, head_dim)
    added_XQS = _by_group(x_BQHP * _column(dt_BHQ * decay.kept_BHQ), groups)
    dB_XQN += torch.bmm(added_XQS, dstate_XSN)
    dstate_in_BHPN = torch.addcmul(dstate_in_XSN.view(state_BHPN.shape), dstate_BHPN, decay.passed_BH[..., None, None])
    dkept_BHQ = (dadded_BQHP * x_BQHP).sum(-1).transpose(1, 2) * decay.kept_BHQ
    passed_BH1 = ((state_BHPN * dstate_BHPN).sum((2, 3)) * decay.passed_BH)[..., None]

    # a at position k counts for every pair i >= k > j. Summed so, not as the difference of row and column sums, which
    # are large and nearly equal where the decay is strong (float32 error of A's gradient 5e-5 that way, 3e-7 this way).
    pairs_BHQQ = (dmix_BGRQQ * mix_BGRQQ).view(batch, heads, chunk, chunk)
    after_QQ = torch.ones(chunk, chunk, dtype=pairs_BHQQ.dtype, device=pairs_BHQQ.device).triu()
    spans_BHQ = torch.matmul(after_QQ, pairs_BHQQ).tril(-1).sum(-1)
    stays_BHQ = dt_BHQ * dkept_BHQ
    da_BHQ = spans_BHQ + saw_BHQ.flip(-1).cumsum(-1).flip(-1) + (stays_BHQ.cumsum(-1) - stays_BHQ) + passed_BH1

    dx_BQHP = dy_BQHP * D_H[:, None] + dinput_BQHP * _column(out_of_BHQ)
    dx_BQHP = torch.addcmul(dx_BQHP, dadded_BQHP, _column(dt_BHQ * decay.kept_BHQ))
    ddt_BHQ = (dinput_BQHP * x_BQHP).sum(-1).transpose(1, 2) * torch.exp(-decay.low_BHQ) + dkept_BHQ
    return dx_BQHP, ddt_BHQ.transpose(1, 2), da_BHQ, dB_XQN, dC_XQN, dstate_in_BHPN


def ssd_step(
    x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor, D_H: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence for one token: (y (B, H, P) in x's dtype, new state (B, H, P, N) in the computing dtype).

    Out of place. Computes in float32 (float64 if x, dt, A or the state is float64); the state may be held in less.
    """
    if backends.serves(x_BHP):
        gradient = wants_gradient(x_BHP, dt_BH, A_H, B_BGN, C_BGN, D_H, state_BHPN)
        kernel = backends.kernel_for("ssd_step", x_BHP, gradient=gradient)
        if kernel is not None:
            state_BHPN = state_BHPN.to(torch.float32, copy=True)
            return kernel(x_BHP, dt_BH, A_H, B_BGN, C_BGN, D_H, state_BHPN), state_BHPN
    dtype = compute_dtype(x_BHP, dt_BH, A_H, state_BHPN)
    batch, heads, head_dim = x_BHP.shape
    groups, state_size = B_BGN.shape[1:]
    with without_autocast(x_BHP.device):
        x, dt_BH = x_BHP.to(dtype), dt_BH.to(dtype)
        decay_BH11 = torch.exp(dt_BH * A_H.to(dtype))[..., None, None]
        added_BGS1 = (x * dt_BH[..., None]).view(batch, groups, -1, 1)
        # In place on the product, which no backward needs: the state is read once and written once.
        state_BGSN = (state_BHPN.to(dtype) * decay_BH11).view(batch, groups, -1, state_size)
        state_BGSN.addcmul_(added_BGS1, B_BGN.to(dtype)[:, :, None, :])
        y = torch.matmul(state_BGSN, C_BGN.to(dtype)[..., None]).view(batch, heads, head_dim)
        y = torch.addcmul(y, x, D_H.to(dtype)[:, None])
    return y.to(x_BHP.dtype), state_BGSN.view(batch, heads, head_dim, state_size)

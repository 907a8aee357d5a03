"""The short causal depthwise convolution of a Mamba-2 mixer, with its window carried from call to call.

    y_t = activation(bias + sum_k weight[:, k] x_{t-(K-1)+k})

Shape suffixes: B batch, L length, C channels, K kernel, W = K - 1 window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import conditions, native
from . import cuda_kernels as backends
from .conditions import BLOCK, BLOCKS, NATIVE, RECOMPUTED, compute_dtype

Activation = str | Callable[[Tensor], Tensor] | None


def causal_conv(
    x_BLC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    *,
    window_BCW: Tensor | None = None,
    mask_BL: Tensor | None = None,
    seq_idx_BL: Tensor | None = None,
    activation: Activation = "silu",
) -> tuple[Tensor, Tensor]:
    """Convolve each channel with its own kernel over the last K inputs, and return the window for what comes next.

    Pads are not there: each valid position sees the K-1 valid inputs before it, wherever the pads are (left, right,
    between), then the incoming window. Documents do not see each other. Sums in float32 (float64 for float64).

    Args:
        x_BLC: (B, L, C).
        weight_CK: (C, K); the last column meets the current position.
        bias_C: (C,) or None.
        window_BCW: the last K-1 inputs before position 0, oldest first; None is zeros. It belongs to position 0's
            document.
        mask_BL: 0 or False at pads.
        seq_idx_BL: integers; a document starts where they change (a pad belongs to the document before it).
        activation: "silu", None or a function of a tensor.

    Returns: y (B, L, C) in x's dtype, 0 at pads; the new window (B, C, K-1): each row's last valid inputs of its last
        document, 0 before that document's start.

    Raises: ValueError for an activation name other than "silu".
    """
    act = _activation(activation)
    batch, length, channels = x_BLC.shape
    width = weight_CK.shape[1] - 1
    if window_BCW is None:
        window_BWC = x_BLC.new_zeros(batch, width, channels)
    else:
        window_BWC = window_BCW.to(x_BLC.dtype).transpose(1, 2)
    doc_BL = None if seq_idx_BL is None else document_index(seq_idx_BL, mask_BL)

    if mask_BL is not None:
        # Move each row's valid inputs to its front, convolve as if there were no pads, and move the outputs back.
        valid_BL = mask_BL.bool()
        rank_BL = valid_BL.long().cumsum(1)
        count_B1 = rank_BL[:, -1:]
        order_BL = valid_BL.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        x_BLC = _take(x_BLC, order_BL)
        doc_BL = None if doc_BL is None else doc_BL.gather(1, order_BL)

    doc_BE = None if doc_BL is None else torch.cat([doc_BL[:, :1].expand(-1, width), doc_BL], dim=1)
    kernel = None
    if backends.serves(x_BLC):
        kernel = backends.kernel_for(
            "causal_conv", x_BLC, kernel_size=width + 1, channels=channels, activation=activation
        )
    # Without a kernel and without pads only the last inputs of all are needed beside x.
    whole = kernel is not None or mask_BL is not None or torch.compiler.is_compiling()
    recent = length if whole else width
    seen_BEC = torch.cat([window_BWC, x_BLC[:, length - min(recent, length) :]], dim=1)
    if kernel is not None:
        y_BLC = kernel(seen_BEC, weight_CK, bias_C, activation, doc_BE)
    else:
        y_BLC = _convolve(window_BWC, x_BLC, weight_CK, bias_C, act, doc_BE)

    if mask_BL is None:
        new_BWC = seen_BEC[:, seen_BEC.shape[1] - width :]
        new_doc_BW = None if doc_BE is None else doc_BE[:, length:]
        last_doc_B1 = None if doc_BE is None else doc_BE[:, -1:]
    else:
        y_BLC = _take(y_BLC, (rank_BL - 1).clamp(min=0)).masked_fill(~valid_BL[..., None], 0)
        recent_BW = count_B1 + torch.arange(width, device=x_BLC.device)
        new_BWC = _take(seen_BEC, recent_BW)
        new_doc_BW = None if doc_BE is None else doc_BE.gather(1, recent_BW)
        last_doc_B1 = None if doc_BE is None else doc_BE.gather(1, (count_B1 + width - 1).clamp(min=0))
    if new_doc_BW is not None and last_doc_B1 is not None:
        new_BWC = new_BWC.masked_fill(new_doc_BW.ne(last_doc_B1)[..., None], 0)
    # A copy, not a view: a view would keep the whole sequence alive in the cache.
    return y_BLC, new_BWC.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def document_index(seq_idx_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
    """Number the documents of each row 0, 1, 2, ...: a document starts where `seq_idx` changes.

    The values of `seq_idx` need not grow, and one that comes back later is a new document. A pad position (mask 0)
    belongs to the document before it, or to the first one if nothing precedes it, whatever its own `seq_idx` says.
    Idempotent.

    Returns: (B, L) int64, non-decreasing along a row, 0 at position 0.
    """
    seq_idx_BL = seq_idx_BL.long()
    if mask_BL is not None:
        valid_BL = mask_BL.bool()
        here_L = torch.arange(seq_idx_BL.shape[1], device=seq_idx_BL.device)
        last_valid_BL = torch.where(valid_BL, here_L, -1).cummax(dim=1).values
        first_valid_B1 = valid_BL.long().argmax(dim=1, keepdim=True)
        seq_idx_BL = seq_idx_BL.gather(1, torch.where(last_valid_BL < 0, first_valid_B1, last_valid_BL))
    starts_BL = torch.zeros_like(seq_idx_BL)
    starts_BL[:, 1:] = seq_idx_BL[:, 1:] != seq_idx_BL[:, :-1]
    return starts_BL.cumsum(dim=1)


def _convolve(
    window_BWC: Tensor,
    x_BLC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    act: Callable[[Tensor], Tensor] | None,
    doc_BE: Tensor | None,
) -> Tensor:
    """The convolution of rows without pads, in whichever form serves: (B, L, C)."""
    form = conditions.convolution(window_BWC, x_BLC, weight_CK, bias_C, act, doc_BE)
    if form == RECOMPUTED:
        return _Convolution.apply(window_BWC, x_BLC, weight_CK, bias_C, act, doc_BE)
    if form == NATIVE:
        bias = x_BLC.new_zeros(len(weight_CK), dtype=torch.float32) if bias_C is None else bias_C.float()
        return native.causal_conv(x_BLC, weight_CK.float().t().contiguous(), bias, window_BWC.contiguous())
    if form == BLOCKS:
        return _taps_in_blocks(window_BWC, x_BLC, weight_CK, bias_C, act, doc_BE)
    return _taps(torch.cat([window_BWC, x_BLC], dim=1), weight_CK, bias_C, act, doc_BE)


def _activation(activation: Activation) -> Callable[[Tensor], Tensor] | None:
    if activation is None or callable(activation):
        return activation
    if activation in ("silu", "swish"):
        return F.silu
    raise ValueError(
        f"activation={activation!r} is not known to causal_conv: use 'silu', None or a function of a tensor."
    )


def _take(x_BLC: Tensor, index_BM: Tensor) -> Tensor:
    """Rows of each sequence: out[b, m] = x[b, index[b, m]]. One flat index_select: whole rows are copied, both ways."""
    batch, length, channels = x_BLC.shape
    offset_B1 = torch.arange(batch, device=x_BLC.device)[:, None] * length
    flat = x_BLC.reshape(batch * length, channels).index_select(0, (index_BM + offset_B1).flatten())
    return flat.view(batch, index_BM.shape[1], channels)


def _taps(
    seen_BEC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    act: Callable[[Tensor], Tensor] | None,
    doc_BE: Tensor | None,
) -> Tensor:
    """The convolution of W + L inputs as K shifted multiply-adds: (B, L, C) in the inputs' dtype."""
    dtype = compute_dtype(seen_BEC, weight_CK)
    kernel = weight_CK.shape[1]
    length = seen_BEC.shape[1] - kernel + 1
    weight_KC = weight_CK.to(dtype).t()
    seen = seen_BEC.to(dtype)
    total: Tensor | None = None if bias_C is None else bias_C.to(dtype)
    for k in range(kernel):
        tap_BLC = _tap(seen, doc_BE, k, 0, length, kernel)
        total = tap_BLC * weight_KC[k] if total is None else torch.addcmul(total, tap_BLC, weight_KC[k])
    assert total is not None
    return (total if act is None else act(total)).to(seen_BEC.dtype)


def _tap(seen_BEC: Tensor, doc_BE: Tensor | None, k: int, start: int, length: int, kernel: int) -> Tensor:
    """What weight k meets at `length` positions, 0 where it belongs to another document; `doc_BE` begins at `start`."""
    return _hide(seen_BEC[:, k : k + length], doc_BE, k, start, length, kernel)


def _hide(tap_BQC: Tensor, doc_BE: Tensor | None, k: int, start: int, length: int, kernel: int) -> Tensor:
    if doc_BE is None or k == kernel - 1:
        return tap_BQC
    here, own = (doc_BE[:, start + shift : start + shift + length] for shift in (k, kernel - 1))
    return tap_BQC.masked_fill(here.ne(own)[..., None], 0)


def _taps_in_blocks(
    window_BWC: Tensor,
    x_BLC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    act: Callable[[Tensor], Tensor] | None,
    doc_BE: Tensor | None,
) -> Tensor:
    """`_taps`, a few positions at a time in buffers that every block uses again: no float32 copy leaves the cache.

    native.c does not do documents, other activations and float16, and is not there everywhere; all positions at
    once, in torch, take longer.
    """
    dtype = compute_dtype(x_BLC, weight_CK)
    kernel = weight_CK.shape[1]
    batch, length, channels = x_BLC.shape
    weight_KC = weight_CK.to(dtype).t().contiguous()
    bias = torch.zeros(channels, dtype=dtype) if bias_C is None else bias_C.to(dtype)
    y_BLC = x_BLC.new_empty(x_BLC.shape)
    seen_BEC = torch.empty(batch, BLOCK + kernel - 1, channels, dtype=dtype)
    sum_BQC = torch.empty(batch, BLOCK, channels, dtype=dtype)
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        rows = stop - start
        _read_block(seen_BEC, window_BWC, x_BLC, start, stop)
        total = sum_BQC[:, :rows].copy_(bias)
        for k in range(kernel):
            total.addcmul_(_tap(seen_BEC, doc_BE, k, start, rows, kernel), weight_KC[k])
        y_BLC[:, start:stop] = F.silu(total, inplace=True) if act is F.silu else total if act is None else act(total)
    return y_BLC


def _read_block(seen_BEC: Tensor, window_BWC: Tensor, x_BLC: Tensor, start: int, stop: int) -> None:
    """The inputs of positions start to stop, after the W inputs before them, into the front of a buffer."""
    width = window_BWC.shape[1]
    before = min(start, width)  # of the inputs before the block, those that are not the window's
    seen_BEC[:, : width - before] = window_BWC[:, start : start + width - before]
    seen_BEC[:, width - before : width + stop - start] = x_BLC[:, start - before : stop]


class _Convolution(torch.autograd.Function):
    """`_convolve` with a backward that convolves again, a few positions at a time on a CPU.

    Kept for it: the inputs. Autograd by itself keeps them in float32 and, the same size again, what the activation met.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        window_BWC: Tensor,
        x_BLC: Tensor,
        weight_CK: Tensor,
        bias_C: Tensor | None,
        act: Callable[[Tensor], Tensor] | None,
        doc_BE: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(window_BWC, x_BLC, weight_CK, bias_C, doc_BE)
        ctx.act = act
        return _convolve(window_BWC, x_BLC, weight_CK, bias_C, act, doc_BE)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_BLC: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        window_BWC, x_BLC, weight_CK, bias_C, doc_BE = ctx.saved_tensors
        dtype, kernel = compute_dtype(x_BLC, weight_CK), weight_CK.shape[1]
        width, (batch, length, channels) = kernel - 1, x_BLC.shape
        weight_KC = weight_CK.to(dtype).t().contiguous()
        trained = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        dweight_KC = torch.zeros_like(weight_KC)
        dbias_C = torch.zeros(channels, dtype=dtype, device=x_BLC.device)
        dseen_BEC = x_BLC.new_empty(batch, width + length, channels)  # of the window, then of x
        step = min(BLOCK, max(length, 1)) if x_BLC.is_cpu else max(length, 1)
        seen = torch.empty(batch, step + width, channels, dtype=dtype, device=x_BLC.device)
        # What a block's positions give the inputs before it belongs to the block before: walked from the start, each
        # block hands the gradient of its last `width` inputs on to the next.
        dseen = torch.zeros_like(seen)
        for start in range(0, length, step):
            stop = min(start + step, length)
            rows = stop - start
            _read_block(seen, window_BWC, x_BLC, start, stop)
            dsum = dy_BLC[:, start:stop].to(dtype)
            taps = [_tap(seen, doc_BE, k, start, rows, kernel) for k in range(kernel)]
            if ctx.act is not None:
                total = torch.zeros_like(taps[0]) if bias_C is None else bias_C.to(dtype).expand_as(taps[0]).clone()
                for k, tap_BQC in enumerate(taps):
                    total.addcmul_(tap_BQC, weight_KC[k])
                dsum = torch.ops.aten.silu_backward(dsum, total)
            if trained:
                dbias_C += dsum.sum((0, 1))
            for k, tap_BQC in enumerate(taps):
                if trained:
                    dweight_KC[k] += (dsum * tap_BQC).sum((0, 1))
                # What `_tap` hid of another document gets nothing either.
                dsum_k = _hide(dsum, doc_BE, k, start, rows, kernel)
                dseen[:, k : k + rows].addcmul_(dsum_k, weight_KC[k])
            dseen_BEC[:, start:stop] = dseen[:, :rows]
            dseen[:, :width] = dseen[:, rows : rows + width].clone()
            dseen[:, width:] = 0
        dseen_BEC[:, length:] = dseen[:, :width]
        dbias = None if bias_C is None else dbias_C.to(bias_C.dtype)
        return (
            dseen_BEC[:, :width],
            dseen_BEC[:, width:],
            dweight_KC.t().to(weight_CK.dtype) if trained else None,
            dbias if trained else None,
            None,
            None,
        )

"""The cross-entropy of a linear head, without ever holding all its logits.

    loss_t = log sum_v exp(x_t . w_v) - x_t . w_label(t)

The vocabulary is walked a few columns at a time, once for the sums and once more for the gradients. Going over it by
columns, not by tokens, makes each row of the weight's gradient once, in one product: no float32 sum of the weight's
size is held beside it.

Shape suffixes: T tokens, D features, V vocabulary, N its columns in one tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cuda_kernels as backends
from .conditions import compute_dtype, is_slow, without_autocast

# Of a tile of logits in float32, and of a tile of the weight.
_TILE_BYTES = {"cpu": 64 << 20}
_TILE_BYTES_ELSEWHERE = 256 << 20
_FEWEST_COLUMNS = 128


def linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, *, ignore_index: int = -100) -> Tensor:
    """The sum of the tokens' cross-entropies, of logits `x @ weight.T`, in float32 (float64 if either is float64).

    Tokens whose label is `ignore_index` add nothing and are not computed. Under autocast the products are in its dtype,
    as the head's would be. On CUDA Liger's kernel does the work where `liger_kernel` is installed.

    Args:
        x_TD: (T, D), the hidden states.
        weight_VD: (V, D), the head's weight.
        labels_T: (T,) integers in [0, V), or `ignore_index`.

    Returns: a scalar; 0 if no token has a label, with gradients of 0.

    Raises: ValueError for a label outside the vocabulary.
    """
    device, (vocabulary, _) = x_TD.device, weight_VD.shape
    labels_T = labels_T.to(device)
    kept_T = labels_T.ne(ignore_index)
    tracing = torch.compiler.is_compiling()
    if not tracing:
        index_T = kept_T.nonzero().squeeze(1)
        labels_T = labels_T[index_T]
        if ((labels_T < 0) | (labels_T >= vocabulary)).any():
            wrong = labels_T[(labels_T < 0) | (labels_T >= vocabulary)][0].item()
            raise ValueError(
                f"The label {wrong} is not in the vocabulary of {vocabulary}: labels are token ids, or {ignore_index} "
                "where there is none."
            )
        if len(index_T) < len(x_TD):
            x_TD = x_TD.index_select(0, index_T)
    if torch.is_autocast_enabled(device.type):
        x_TD = x_TD.to(torch.get_autocast_dtype(device.type))
    if backends.serves(x_TD) and x_TD.dtype == weight_VD.dtype and (fused := backends.fused_linear_cross_entropy()):
        return fused(x_TD, weight_VD, labels_T)
    with without_autocast(device):
        if not tracing:
            return _LinearCrossEntropy.apply(x_TD, weight_VD, labels_T).sum()
        # No shapes that depend on values.
        loss_T = _LinearCrossEntropy.apply(x_TD, weight_VD, labels_T.masked_fill(~kept_T, 0))
        return loss_T.masked_fill(~kept_T, 0).sum()


def _tiles(x_TD: Tensor, weight_VD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Columns of the vocabulary and their part of the weight, in x's dtype."""
    budget = _TILE_BYTES.get(x_TD.device.type, _TILE_BYTES_ELSEWHERE)
    columns = max(_FEWEST_COLUMNS, budget // (4 * max(*x_TD.shape, 1)))
    for start in range(0, weight_VD.shape[0], columns):
        here = slice(start, min(start + columns, weight_VD.shape[0]))
        yield here, weight_VD[here].to(x_TD.dtype)


def _multiplied(x_TD: Tensor) -> Tensor:
    """x in the dtype that its products are made in: its own, or float32 where this CPU cannot multiply that."""
    return x_TD.float() if x_TD.is_cpu and is_slow(x_TD.dtype) else x_TD


def _place(labels_T: Tensor, here: slice) -> tuple[Tensor, Tensor]:
    """Where each label is among the tile's columns (T, 1), any place if it is not there; and whether it is."""
    place_T1 = (labels_T - here.start)[:, None]
    inside_T1 = (place_T1 >= 0) & (place_T1 < here.stop - here.start)
    return place_T1.clamp(0, here.stop - here.start - 1), inside_T1


class _LinearCrossEntropy(torch.autograd.Function):
    """(T,) losses. Kept for the backward: the inputs and one number per token."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:  # type: ignore[override]
        dtype, multiplied_TD = compute_dtype(x_TD, weight_VD), _multiplied(x_TD)
        largest_T = torch.full(labels_T.shape, -torch.inf, dtype=dtype, device=x_TD.device)
        sum_T, target_T = torch.zeros_like(largest_T), torch.zeros_like(largest_T)
        for here, weight_ND in _tiles(multiplied_TD, weight_VD):
            logits_TN = F.linear(multiplied_TD, weight_ND).to(dtype)
            place_T1, inside_T1 = _place(labels_T, here)
            target_T += (logits_TN.gather(1, place_T1) * inside_T1)[:, 0]
            higher_T = torch.maximum(largest_T, logits_TN.amax(1))
            sum_T = sum_T * torch.exp(largest_T - higher_T) + logits_TN.sub_(higher_T[:, None]).exp_().sum(1)
            largest_T = higher_T
        normaliser_T = largest_T + sum_T.log()
        ctx.save_for_backward(x_TD, weight_VD, labels_T, normaliser_T)
        return normaliser_T - target_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss_T: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x_TD, weight_VD, labels_T, normaliser_T = ctx.saved_tensors
        wants_x, wants_weight, _ = ctx.needs_input_grad
        multiplied_TD = _multiplied(x_TD)
        dx_TD = torch.zeros_like(x_TD, dtype=normaliser_T.dtype) if wants_x else None
        dweight_VD = torch.empty_like(weight_VD) if wants_weight else None
        with without_autocast(x_TD.device):
            for here, weight_ND in _tiles(multiplied_TD, weight_VD):
                logits_TN = F.linear(multiplied_TD, weight_ND).to(normaliser_T.dtype)
                dlogits_TN = logits_TN.sub_(normaliser_T[:, None]).exp_()
                place_T1, inside_T1 = _place(labels_T, here)
                # Each row has one place: read, lessened and written back, which is deterministic on every device.
                dlogits_TN.scatter_(1, place_T1, dlogits_TN.gather(1, place_T1) - inside_T1.to(dlogits_TN.dtype))
                multiplied_TN = dlogits_TN.mul_(dloss_T[:, None]).to(multiplied_TD.dtype)
                if dx_TD is not None:
                    if multiplied_TN.dtype == dx_TD.dtype:
                        dx_TD.addmm_(multiplied_TN, weight_ND)
                    else:
                        dx_TD += multiplied_TN @ weight_ND
                if dweight_VD is not None:
                    dweight_VD[here] = multiplied_TN.T @ multiplied_TD
        return None if dx_TD is None else dx_TD.to(x_TD.dtype), dweight_VD, None

"""The language-model head and its loss, with the logits or without: what `model.chunked_loss` and `skip_logits=True`
ask for.

Shape suffixes as in layers/__init__.py.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

from .. import ops
from ..layers.parts import is_called_plainly, project

logger = logging.getLogger("nemotron_h")
IGNORED = -100
# Of the float32 logits of a piece, for heads that have to be called.
_PIECE_BYTES = 256 << 20
# Of float32 logits in training; a batch that has more is told once that they need not be.
_WORTH_SAYING = 4 << 30
_said: set[str] = set()


def logits_and_loss(
    model: Any,
    x_BLD: Tensor,
    logits_to_keep: int | Tensor,
    labels: Tensor | None,
    *,
    shift_labels: Tensor | None = None,
    skip_logits: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor | None, Tensor | None]:
    """The logits (B, kept, V), in float32 or better, and the loss of `NemotronHForCausalLM.forward`, each None where it
    is not made; arguments as there, `x_BLD` the backbone's hidden states."""
    x_BLD = x_BLD[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
    has_labels = labels is not None or shift_labels is not None
    if has_labels:
        whole = isinstance(logits_to_keep, int) and logits_to_keep == 0
        skip = model.chunked_loss and model.training if skip_logits is None else skip_logits
        # Another loss than the library's may do anything with the logits, so it gets them.
        if whole and skip and model.loss_function is ForCausalLMLoss:
            number = kwargs.get("num_items_in_batch")
            return None, without_logits(model.lm_head, x_BLD, labels, shift_labels, num_items_in_batch=number)
        if model.training and skip_logits is None:
            say_once_that_logits_are_large(x_BLD.shape[:-1].numel(), model.vocab_size)
    # Two-dimensional whatever the head is by now (a resized or adapted one): see ops.linear.
    logits_TV = project(model.lm_head, x_BLD.reshape(-1, x_BLD.shape[-1]))
    logits_BLV = logits_TV.view(*x_BLD.shape[:-1], logits_TV.shape[-1])
    logits_BLV = logits_BLV.to(torch.promote_types(logits_BLV.dtype, torch.float32))
    if not has_labels:
        return logits_BLV, None
    return logits_BLV, model.loss_function(logits_BLV, labels, model.vocab_size, shift_labels=shift_labels, **kwargs)


def without_logits(
    head: nn.Module,
    x_BLD: Tensor,
    labels_BL: Tensor | None,
    shift_labels_BL: Tensor | None,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """`transformers`' ForCausalLMLoss of the head's logits, which never exist whole.

    A plain head's weight is read (`ops.linear_cross_entropy`). A head that is anything else by now (an adapter's, a
    quantised one, one with hooks) is called, for some tokens at a time, and again in the backward.

    Args:
        x_BLD: (B, L, D), what the head would be called with.
        labels_BL: (B, L), -100 where there is none; shifted by one in here.
        shift_labels_BL: (B, L), shifted already, in place of `labels_BL`.
        num_items_in_batch: what the sum is divided by; None: the number of labels.

    Returns: a scalar in float32 (float64 for a float64 model). NaN without any label and without `num_items_in_batch`,
        as of the library's.
    """
    if shift_labels_BL is None:
        assert labels_BL is not None
        shift_labels_BL = F.pad(labels_BL, (0, 1), value=IGNORED)[..., 1:]
    labels_T = shift_labels_BL.reshape(-1).to(x_BLD.device)
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    if labels_T.shape[0] != x_TD.shape[0]:
        raise ValueError(
            f"Labels of shape {tuple(shift_labels_BL.shape)} do not go with hidden states of shape "
            f"{tuple(x_BLD.shape)}: give one label per token."
        )
    total = _sum(head, x_TD, labels_T)
    if num_items_in_batch is None:
        return total / labels_T.ne(IGNORED).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def _sum(head: nn.Module, x_TD: Tensor, labels_T: Tensor) -> Tensor:
    if (
        is_called_plainly(head, nn.Linear)
        and head.bias is None
        and type(head.weight) in (Tensor, nn.Parameter)
        and head.weight.device == x_TD.device
    ):
        return ops.linear_cross_entropy(x_TD, head.weight, labels_T, ignore_index=IGNORED)
    if not torch.compiler.is_compiling():
        index_T = labels_T.ne(IGNORED).nonzero().squeeze(1)
        x_TD, labels_T = x_TD.index_select(0, index_T), labels_T[index_T]
    width = getattr(head, "out_features", None) or 1 << 17
    rows = max(1, _PIECE_BYTES // (4 * width))

    def piece(x_TD: Tensor, labels_T: Tensor) -> Tensor:
        logits_TV = project(head, x_TD)
        logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        return F.cross_entropy(logits_TV, labels_T.to(logits_TV.device), ignore_index=IGNORED, reduction="sum")

    total = x_TD.new_zeros((), dtype=torch.promote_types(x_TD.dtype, torch.float32))
    for x, labels in zip(x_TD.split(rows), labels_T.split(rows), strict=True):
        part = checkpoint(piece, x, labels, use_reentrant=False) if torch.is_grad_enabled() else piece(x, labels)
        total = total + part.to(total.device)
    return total


def say_once_that_logits_are_large(tokens: int, vocabulary: int) -> None:
    """Where training makes logits that nobody may ask for."""
    if 4 * tokens * vocabulary >= _WORTH_SAYING and "large" not in _said and not torch.compiler.is_compiling():
        _said.add("large")
        logger.warning(
            f"The logits of {tokens} tokens take {4 * tokens * vocabulary / (1 << 30):.1f} GiB, and the loss twice as "
            "much: with `model.chunked_loss = True` the loss is the same without them (`outputs.logits` is None). Set "
            "it on the model itself: on `model.get_base_model()` where PEFT has wrapped it."
        )

"""What the models are called with: the names of arguments, and rows of ids or of embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import TransformersKwargs

_FORWARD_KWARGS = frozenset(
    {*TransformersKwargs.__optional_keys__, "return_dict", "debug_io", "debug_io_dir", "prune_layers"}
)
# What trainers hand to the backbone with all the rest: a head's business, which cuts and compares afterwards.
FOR_A_HEAD = frozenset({"labels", "shift_labels", "logits_to_keep", "skip_logits", "num_items_in_batch"})
_RENAMED = {"num_logits_to_keep": "logits_to_keep"}


def check_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Refuse what no layer would read, so that a misspelt argument is not lost."""
    if unknown := sorted(set(kwargs) - _FORWARD_KWARGS):
        check_renamed(kwargs)
        value = kwargs[unknown[0]]
        shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(
            f"forward() got the unknown argument {unknown[0]}={shown}: leave it out; "
            "`help(NemotronHModel.forward)` lists what there is."
        )


def check_renamed(kwargs: Mapping[str, Any]) -> None:
    """Refuse the old name of an argument."""
    for old, new in _RENAMED.items():
        if old in kwargs:
            raise TypeError(f"{old}={kwargs[old]!r} is the old name of an argument: write {new}={kwargs[old]!r}.")


def embedded(embeddings: nn.Module, input_ids: Any, inputs_embeds: Any, config: Any) -> Tensor:
    """(B, L, D) embeddings of what the model was called with: ids (B, L), or the embeddings themselves.

    Raises:
        ValueError: neither of them or both, no tensor, another shape or dtype, no row, no token, an id that is not in
            the vocabulary. An accelerator says the last in its own way: asking it here would stall every token.
    """
    if (input_ids is None) == (inputs_embeds is None):
        got = "neither" if input_ids is None else "both"
        raise ValueError(f"The model takes one of `input_ids` and `inputs_embeds` and got {got}: pass exactly one.")
    name, given = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
    _check_axes(name, given, config)
    if given.numel() == 0:
        nothing = "a batch of 0 rows" if given.shape[0] == 0 else "the input has no tokens"
        raise ValueError(f"{name} has shape {tuple(given.shape)}, {nothing}: pass at least one.")
    if inputs_embeds is not None:
        return inputs_embeds
    if given.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids is of {given.dtype}: pass token ids as torch.int64 or torch.int32.")
    try:
        x_BLD: Tensor = embeddings(given)
    except IndexError:
        lowest, highest = map(int, given.aminmax())
        raise ValueError(
            f"input_ids has ids from {lowest} to {highest}, and not all of them are in the vocabulary: pass ids that "
            "the model's tokenizer has (-100 is for labels)."
        ) from None
    return x_BLD


def check_prompt(args: tuple[Any, ...], kwargs: dict[str, Any], config: Any) -> None:
    """That what `generate()` was called with is rows of ids or of embeddings; the rest is said by the forward."""
    given = {"input_ids": args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))}
    given["inputs_embeds"] = kwargs.get("inputs_embeds")
    for name, tokens in given.items():
        if tokens is not None:
            _check_axes(name, tokens, config)


def _check_axes(name: str, given: Any, config: Any) -> None:
    axes = 2 if name == "input_ids" else 3
    if isinstance(given, Tensor) and given.ndim == axes and (axes == 2 or given.shape[2] == config.hidden_size):
        return
    wanted = "(rows, tokens)" if axes == 2 else f"(rows, tokens, {config.hidden_size})"
    if not isinstance(given, Tensor):
        raise ValueError(f"{name} is a {type(given).__name__}: pass a tensor of {wanted}.")
    of_one_row = f", as {name}[None] for one row" if given.ndim == axes - 1 else ""
    raise ValueError(f"{name} has shape {tuple(given.shape)}: pass {wanted}{of_one_row}.")

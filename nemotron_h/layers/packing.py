"""Which tokens are padding, and which document each token belongs to, from what trainers and collators pass.

Everything below the model works with two tensors: `mask_BL` (bool, False at padding) and `seq_idx_BL` (document
number), each None where there is nothing to say, so that plain batches pay nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.import_utils import is_tracing

from ..cache.hybrid import cache_length
from ..ops import document_index


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


def whole_mask(attention_mask: Any, batch: int, length: int, cache: Cache | None) -> Any:
    """A 2-D attention mask with a row for each row of the batch; anything else as it is.

    Raises:
        ValueError: rows or columns that are not the batch's: a column is wanted for each cached and each new token.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return attention_mask
    rows, columns = attention_mask.shape
    if rows not in (1, batch):
        raise ValueError(f"attention_mask has {rows} rows for a batch of {batch}: pass one a row.")
    if not is_tracing(attention_mask) and columns < (wanted := int(cache_length(cache)) + length):
        raise ValueError(
            f"attention_mask has {columns} columns for {wanted - length} cached and {length} new tokens: pass {wanted}."
        )
    return attention_mask.expand(batch, columns)


def padding_mask(attention_mask: Any, length: int, cache: Cache | None = None) -> Tensor | None:
    """The new tokens' columns of a (B, past + L) attention mask as bool; None where nothing is padding.

    Masks that attention layers alone obey (4-D) say nothing of it. Whether a mask is all ones is asked of the CPU
    always, of an accelerator only before a multi-token step: in decoding the answer would stall it at every token.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    # Columns after the new tokens' (a mask as wide as a static cache) are nobody's yet. A traced step cannot ask a
    # static cache for its length; its mask ends with the new tokens.
    past = attention_mask.shape[1] - length if is_tracing(attention_mask) else int(cache_length(cache))
    mask_BL = attention_mask[:, past : past + length].bool()
    if is_tracing(mask_BL) or (length == 1 and mask_BL.device.type != "cpu"):
        return mask_BL
    return None if bool(mask_BL.all()) else mask_BL


def document_ids(
    x_BLD: Tensor,
    mask_BL: Tensor | None,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    cache: Cache | None,
) -> Tensor | None:
    """(B, L) document numbers of a packed batch, or None for one document a row.

    From `seq_idx`, else from `cu_seq_lens`, else from `position_ids`: a document begins at a token whose position is
    not above that of the token before it. Padding is skipped over, so that the positions that `generate()` counts
    for left-padded rows are not taken for a pack.

    Raises:
        ValueError: packed documents together with a cache, `cu_seq_lens` with more than one row or that do not run
            from 0 to L, numbers or positions of another length than the row's.
    """
    batch, length = x_BLD.shape[:2]
    cu_seq_lens = cu_seq_lens_k if cu_seq_lens_q is None else cu_seq_lens_q
    for name, given in (("seq_idx", seq_idx), ("position_ids", position_ids)):
        if given is not None and tuple(given.shape) not in {(length,), (1, length), (batch, length)}:
            raise ValueError(
                f"{name} has shape {tuple(given.shape)} for {batch} rows of {length} tokens: pass ({batch}, {length})."
            )
    if seq_idx is not None:
        seq_idx_BL = document_index(seq_idx.reshape(-1, length).expand(batch, length).to(x_BLD.device), mask_BL)
    elif cu_seq_lens is not None:
        if batch != 1:
            raise ValueError(
                f"cu_seq_lens describes one packed row and the batch has {batch}: flatten it to one row, or pass "
                "seq_idx."
            )
        if not is_tracing(cu_seq_lens):
            _check_cu_seq_lens(cu_seq_lens, cu_seq_lens_k, length)
        ends = cu_seq_lens.reshape(-1)[1:].to(x_BLD.device, torch.int64)
        positions = torch.arange(length, device=x_BLD.device)
        seq_idx_BL = document_index(torch.searchsorted(ends, positions, right=True).unsqueeze(0), mask_BL)
    elif position_ids is not None and length > 1:
        positions_BL = position_ids.reshape(-1, length).expand(batch, length).to(x_BLD.device)
        seq_idx_BL = _documents_of_positions(positions_BL, mask_BL)
    else:
        return None
    if not is_tracing(seq_idx_BL) and bool((seq_idx_BL == seq_idx_BL[:, :1]).all()):
        return None
    if cache is not None:
        if is_tracing(seq_idx_BL) and seq_idx is None and cu_seq_lens is None:
            # Whether positions restart cannot be asked while tracing, and a traced call with a cache is generation.
            return None
        raise ValueError(
            f"The row holds several packed documents and a cache of {int(cache_length(cache))} tokens was passed, "
            "which only one document can go on from: pass the documents without a cache, or one a row with padding."
        )
    return seq_idx_BL


def _check_cu_seq_lens(cu_seq_lens: Tensor, cu_seq_lens_k: Tensor | None, length: int) -> None:
    ends = cu_seq_lens.reshape(-1).tolist()
    if cu_seq_lens_k is not None and cu_seq_lens_k.reshape(-1).tolist() != ends:
        raise ValueError(
            f"cu_seq_lens_q {ends} and cu_seq_lens_k {cu_seq_lens_k.reshape(-1).tolist()} differ: documents attend to "
            "themselves, so pass the same twice."
        )
    if not ends or ends[0] != 0 or ends[-1] != length or sorted(ends) != ends:
        raise ValueError(f"cu_seq_lens is {ends} for a row of {length} tokens: it must rise from 0 to {length}.")


def _documents_of_positions(position_ids_BL: Tensor, mask_BL: Tensor | None) -> Tensor:
    previous_BL = position_ids_BL[:, :-1]
    if mask_BL is None:
        starts_BL = position_ids_BL[:, 1:] <= previous_BL
    else:
        index_BL = torch.arange(position_ids_BL.shape[1], device=position_ids_BL.device).expand_as(position_ids_BL)
        last_token_BL = torch.where(mask_BL, index_BL, -1).cummax(dim=1).values[:, :-1]
        previous_BL = position_ids_BL.gather(1, last_token_BL.clamp(min=0))
        starts_BL = mask_BL[:, 1:] & (last_token_BL >= 0) & (position_ids_BL[:, 1:] <= previous_BL)
    return torch.nn.functional.pad(starts_BL.cumsum(dim=1), (1, 0))


def same_document(seq_idx_BL: Tensor, mask_BL: Tensor | None) -> Any:
    """Mask function for `transformers.masking_utils`: a query sees the tokens of its own document only."""

    def visible(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        same = seq_idx_BL[batch_idx, q_idx] == seq_idx_BL[batch_idx, kv_idx]
        return same if mask_BL is None else same & mask_BL[batch_idx, kv_idx]

    return visible


def varlen_kwargs(config: Any, seq_idx_BL: Tensor) -> dict[str, Any]:
    """What flash attention wants of a packed row instead of a mask: cumulative lengths. Empty for the others.

    Raises:
        ValueError: more than one packed row.
    """
    if not is_flash_attention_requested(config):
        return {}
    if seq_idx_BL.shape[0] != 1:
        raise ValueError(
            f"Flash attention takes packed documents in one row and the batch has {seq_idx_BL.shape[0]}: "
            'flatten the batch to one row, or load with attn_implementation="sdpa".'
        )
    _, lengths = torch.unique_consecutive(seq_idx_BL[0], return_counts=True)
    cu_seq_lens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    return {
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": longest,
        "max_length_k": longest,
    }

"""Which document each token of a packed row belongs to, from what trainers and collators pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.import_utils import is_tracing

from ..cache.hybrid import cache_length
from ..ops import document_index


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

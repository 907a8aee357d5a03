"""What a batch of rows says beside its tokens: padding, documents, and who attends to whom.

A Mamba layer reads each row from its beginning to its end. It can leave padding out and start anew where a document
begins, and nothing else: a mask that says those two things, in whatever form, is read; any other is refused.

Shape suffixes: B batch, L new tokens, S cached and new tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_tracing

from ..cache.hybrid import NemotronHCache, cache_length, grows
from ..compat import causal_mask
from .attention import eager_attention
from .packing import document_ids, same_document, varlen_kwargs

# Half precision's own -10000 is -9984; -65504 and what is below is meant as minus infinity.
_HIDES = -9000.0


@dataclass(frozen=True)
class Inputs:
    """What a forward's layers are told beside their hidden states, read once.

    Everything is None where there is nothing to say, so that plain batches pay nothing.

    Attributes:
        attention_mask: (B, S), false at padding; or a mask that attention layers alone obey; or the masks that
            `create_masks_for_generate` made.
        mask_BL: (B, L) bool, False at padding, which has no time step and leaves windows and states alone.
        seq_idx_BL: (B, L) number of the document that each token belongs to; None for one document a row.
        past: tokens before these; None while tracing, where nobody can ask a static cache.
    """

    attention_mask: Any
    mask_BL: Tensor | None
    seq_idx_BL: Tensor | None
    past: int | None

    def visible(
        self, config: Any, kinds: list[str], x_BLD: Tensor, cache: Cache | None, training: bool
    ) -> dict[str, Any]:
        """What the attention layers among layers of these kinds are called with: a mask, that they are plainly causal,
        or the lengths of packed documents."""
        if isinstance(self.attention_mask, dict):
            return {"attention_mask": self.attention_mask["attention"], "plainly_causal": False}
        if "attention" not in kinds:
            return {"attention_mask": None, "plainly_causal": False}
        if self.seq_idx_BL is None:
            if self._is_plainly_causal(config, x_BLD, cache, training):
                return {"attention_mask": None, "plainly_causal": True}
            return {"attention_mask": causal_mask(config, x_BLD, self.attention_mask, cache), "plainly_causal": False}
        if varlen := varlen_kwargs(config, self.seq_idx_BL):
            return {"attention_mask": None, "plainly_causal": False, **varlen}
        same = same_document(self.seq_idx_BL, self.mask_BL)
        mask = causal_mask(config, x_BLD, None, None, and_mask_function=same)
        return {"attention_mask": mask, "plainly_causal": False}

    def _is_plainly_causal(self, config: Any, x_BLD: Tensor, cache: Cache | None, training: bool) -> bool:
        """Whether "sdpa", where it is the library's own, may run without its mask: inference over rows without padding,
        keys that end with the queries. Whether a mask is all ones is asked of an accelerator before a multi-token step
        only."""
        mask = self.attention_mask
        return (
            config._attn_implementation == "sdpa"
            and ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", eager_attention) is sdpa_attention_forward
            and F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
            and not torch.is_grad_enabled()
            and self.past is not None
            and not (training and config.attention_dropout)
            and grows(cache)
            and (
                mask is None
                or (mask.ndim == 2 and (x_BLD.shape[1] > 1 or mask.device.type == "cpu") and bool(mask.all()))
            )
        )


def read_inputs(
    kinds: list[str],
    x: Tensor,
    cache: Cache | None,
    attention_mask: Any,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
) -> Inputs:
    """The `Inputs` of layers of these kinds, from what a model was called with; `x` is (B, L) ids or (B, L, D).

    Raises:
        ValueError: a mask that says something else than padding and documents, or does not go with the cache, and
            documents that do not (`read_mask`, `document_ids`).
    """
    batch, length = x.shape[:2]
    past = None if _is_traced(x) else int(cache_length(cache))
    if isinstance(attention_mask, dict):
        if "mamba" not in attention_mask:
            raise ValueError(
                f"attention_mask is a dict of {', '.join(map(repr, attention_mask))}: pass a (batch, tokens) mask, "
                "or what NemotronHForCausalLM.create_masks_for_generate makes."
            )
        mask_BL = attention_mask["mamba"]
    else:
        attention_mask, seq_idx = read_mask(attention_mask, seq_idx, batch, length, past, cache, kinds)
        mask_BL = padding_mask(attention_mask, length, past)
    seq_idx_BL = document_ids(x, mask_BL, position_ids, seq_idx, cu_seq_lens_q, cu_seq_lens_k, cache)
    return Inputs(attention_mask, mask_BL, seq_idx_BL, past)


def masks_for_generate(
    config: Any, x_BLD: Tensor, attention_mask: Tensor | None, cache: Cache | None
) -> dict[str, Any]:
    """The masks of both kinds of layers, for `forward` to take as its `attention_mask`; of `x_BLD` only the shape, the
    dtype and the device count.

    Raises:
        ValueError: a mask that `read_mask` refuses, or that tells documents apart.
    """
    (batch, length), kinds = x_BLD.shape[:2], config.layers_block_type
    past = None if _is_traced(x_BLD) else int(cache_length(cache))
    attention_mask, seq_idx = read_mask(attention_mask, None, batch, length, past, cache, kinds)
    if seq_idx is not None:
        raise ValueError(
            "attention_mask tells several documents apart, and generate() goes on from one a row: pass them as "
            "rows of their own."
        )
    attention = causal_mask(config, x_BLD, attention_mask, cache) if "attention" in kinds else None
    # A token that generate() appends is never padding.
    return {"attention": attention, "mamba": None if length == 1 else padding_mask(attention_mask, length, past)}


def _is_traced(x: Tensor) -> bool:
    # `is_tracing` asks an accelerator for its streams, of which a CPU tensor's answer does not depend.
    if type(x) is Tensor and x.is_cpu:
        return torch.compiler.is_compiling() or torch.jit.is_tracing()
    return bool(is_tracing(x))


def read_mask(
    attention_mask: Any,
    seq_idx: Tensor | None,
    batch: int,
    length: int,
    past: int | None,
    cache: Cache | None,
    kinds: list[str],
) -> tuple[Any, Tensor | None]:
    """A mask as (B, S), false at padding, and the documents that it tells apart, (B, L), joined with `seq_idx`.

    | mask | what it says |
    |---|---|
    | (B, S) bool, or 0 and 1 | padding |
    | (B, S) 1, 2, 3, ... and 0 | documents by number, and padding |
    | (B, S) of 0 and large negative numbers | added to scores: padding where it is not 0 |
    | (B, 1 or heads, L, S) or (B, L, S), bool or added | documents as blocks; padding where nobody else looks |

    Without Mamba layers among `kinds` a mask with a row for each token is handed on as it is: attention obeys any.

    Raises:
        ValueError: a mask that Mamba layers cannot obey (a tree, a window, a look ahead, a bias), one that hides cached
            tokens which they have seen, or shows padding which they have not.
    """
    if attention_mask is None:
        return _padding_of(cache, length), seq_idx
    mamba = "mamba" in kinds
    if not isinstance(attention_mask, Tensor):
        if mamba:
            raise ValueError(
                f"attention_mask is a {type(attention_mask).__name__}, which Mamba layers cannot read: pass a (batch, "
                "tokens) mask, or a 4-D tensor."
            )
        return attention_mask, seq_idx
    if attention_mask.ndim == 2:
        attention_mask = whole_mask(attention_mask, batch, length, past)
        if past is None:
            return attention_mask, seq_idx
        if length == 1 and not attention_mask.is_cpu and not attention_mask.is_floating_point():
            return attention_mask, seq_idx  # the answer would stall an accelerator at every token
        mask_BS, documents_BS = _read_columns(attention_mask)
        documents = None if documents_BS is None else documents_BS[:, past : past + length]
        if past and documents_BS is not None:
            raise ValueError(
                f"attention_mask numbers several documents and the cache holds {past} tokens of one: pass the "
                "documents without a cache."
            )
    elif attention_mask.ndim in (3, 4) and mamba:
        mask_BS, documents = _read_rows(attention_mask, batch, length, past, cache is not None)
    elif attention_mask.ndim == 4:
        return attention_mask, seq_idx
    else:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: pass (batch, tokens), or 4-D with a row for each "
            "token."
        )
    if past and mamba:
        _check_seen(mask_BS, cache, past)
    if documents is None or seq_idx is None:
        return mask_BS, seq_idx if documents is None else documents
    # Both count: a document begins where either says so.
    seq_idx_BL = seq_idx.reshape(-1, length).to(documents.device)
    return mask_BS, documents * (int(seq_idx_BL.max()) + 1) + seq_idx_BL


def whole_mask(attention_mask: Any, batch: int, length: int, past: int | None) -> Any:
    """A 2-D attention mask with a row for each row of the batch; anything else as it is.

    Raises:
        ValueError: rows or columns that are not the batch's: a column is wanted for each cached and each new token.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return attention_mask
    rows, columns = attention_mask.shape
    if rows not in (1, batch):
        raise ValueError(f"attention_mask has {rows} rows for a batch of {batch}: pass one a row.")
    if past is not None and columns < past + length:
        raise ValueError(
            f"attention_mask has {columns} columns for {past} cached and {length} new tokens: pass {past + length}."
        )
    return attention_mask.expand(batch, columns)


def padding_mask(attention_mask: Any, length: int, past: int | None = 0) -> Tensor | None:
    """The new tokens' columns of a (B, past + L) attention mask as bool; None where nothing is padding.

    Masks that attention layers alone obey (4-D) say nothing of it. Whether a mask is all ones is asked of the CPU
    always, of an accelerator only before a multi-token step: in decoding the answer would stall it at every token.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    # Columns after the new tokens' (a mask as wide as a static cache) are nobody's yet. A traced mask ends with the
    # new tokens.
    first = attention_mask.shape[1] - length if past is None else past
    mask_BL = attention_mask[:, first : first + length].bool()
    if past is None or (length == 1 and mask_BL.device.type != "cpu"):
        return mask_BL
    return None if bool(mask_BL.all()) else mask_BL


def _read_columns(mask_BS: Tensor) -> tuple[Tensor, Tensor | None]:
    """A 2-D mask's padding, and the numbers of its documents, if it has several in a row."""
    if mask_BS.dtype == torch.bool or not mask_BS.numel():
        return mask_BS, None
    low, high = (float(value) for value in mask_BS.aminmax())
    if mask_BS.is_floating_point() and (low < 0 or low == high == 0):
        return _added(mask_BS), None
    if low < 0 or math.isnan(low) or (mask_BS.is_floating_point() and bool((mask_BS != mask_BS.round()).any())):
        raise ValueError(
            f"attention_mask has values from {low:g} to {high:g}: pass 1 for tokens and 0 for padding, the numbers of "
            "documents, or 0 and minus infinity."
        )
    if high <= 1:
        return mask_BS, None
    number_BS = mask_BS.long()
    token_BS = number_BS > 0
    so_far_BS = number_BS.cummax(dim=1).values
    if bool((token_BS & (number_BS < so_far_BS)).any()):
        raise ValueError("attention_mask numbers a document lower than one before it: number them 1, 2, 3, ...")
    several = bool((token_BS & (number_BS != so_far_BS[:, -1:])).any())
    return token_BS, so_far_BS if several else None


def _added(mask: Tensor) -> Tensor:
    """What a mask that is added to scores shows."""
    shown = mask == 0
    if not bool((shown | (mask <= _HIDES)).all()):
        value = mask[~(shown | (mask <= _HIDES))][0]
        raise ValueError(
            f"attention_mask adds {float(value):g} to a score, which Mamba layers have none of: pass 0 where a token "
            "is seen and minus infinity where it is not, or a mask of bools."
        )
    return shown


def _read_rows(mask: Tensor, batch: int, length: int, past: int | None, goes_on: bool) -> tuple[Tensor, Tensor | None]:
    """A mask with a row for each new token -> (B, S), and the documents of the new tokens, if there are several."""
    if past is None:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, and what Mamba layers make of it cannot be asked while "
            "tracing: pass a (batch, tokens) mask and seq_idx."
        )
    columns = past + length
    seen = mask if mask.ndim == 4 else mask[:, None]
    if seen.shape[0] not in (1, batch) or seen.shape[2] != length or seen.shape[3] < columns:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)} for {batch} rows of {length} new and {past} cached tokens: "
            f"pass ({batch}, 1, {length}, {columns})."
        )
    if seen.shape[1] > 1 and bool((seen != seen[:, :1]).any()):
        _refuse(mask, "its heads see different tokens")
    seen = seen[:, 0]
    if seen.is_floating_point():
        seen_BLS = _added(seen)
    elif seen.dtype == torch.bool or bool(((seen == 0) | (seen == 1)).all()):
        seen_BLS = seen.bool()
    else:
        _refuse(mask, f"it has the value {int(seen.max())}")
    seen_BLS = seen_BLS.expand(batch, -1, -1)
    if bool(seen_BLS[:, :, columns:].any()):
        _refuse(mask, f"it shows columns from {columns} on, which no token has")
    before_BLP, own_BLL = seen_BLS[:, :, :past], seen_BLS[:, :, past:columns]

    # Padding sees nothing, not itself, or (as transformers fills such rows) everything: nobody may look at it.
    pad_BL = own_BLL.triu(1).any(-1) | ~own_BLL.diagonal(dim1=1, dim2=2)
    if length == 1 and not bool(pad_BL.any()):
        token_BL, start_BL = ~pad_BL, torch.zeros_like(pad_BL, dtype=torch.int64)
    else:
        token_BL, start_BL = ~pad_BL, own_BLL.long().argmax(-1)
        _check_rows(mask, own_BLL, token_BL, start_BL)
    if past:
        first_BP = (before_BLP & token_BL[:, :, None]).any(1)
        differ_BL = token_BL & (before_BLP != first_BP[:, None]).any(-1)
        if bool(differ_BL.any()):
            _refuse(mask, "its tokens see different parts of the cache")
        if bool((token_BL.any(1) & ~first_BP.any(1)).any()):
            _refuse(mask, "a new document begins while the cache holds another")
        mask_BS = torch.cat([first_BP | ~token_BL.any(1, keepdim=True), token_BL], dim=1)
    else:
        mask_BS = token_BL
    last_B1 = torch.where(token_BL, start_BL, 0).amax(1, keepdim=True)
    if not bool((token_BL & (start_BL != last_B1)).any()):
        return mask_BS, None
    if goes_on and not past:
        # Tokens that see but themselves before the one document: padding that looks at itself, as the cache goes on.
        alone_BL = token_BL & (start_BL != last_B1) & (own_BLL.sum(-1) == 1)
        if bool((~token_BL | alone_BL | (start_BL == last_B1)).all()):
            return token_BL & ~alone_BL, None
    return mask_BS, start_BL


def _check_rows(mask: Tensor, own_BLL: Tensor, token_BL: Tensor, start_BL: Tensor) -> None:
    """Each token sees its document from the beginning up to itself, padding left out, or the mask is refused."""
    at_L = torch.arange(token_BL.shape[1], device=token_BL.device)
    expected_BLL = (at_L >= start_BL[:, :, None]) & (at_L <= at_L[:, None]) & token_BL[:, None, :]
    wrong_BL = (own_BLL != expected_BLL).any(-1)
    wrong_BL |= start_BL.gather(1, start_BL) != start_BL
    wrong_BL |= start_BL < torch.where(token_BL, start_BL, 0).cummax(1).values
    wrong_BL &= token_BL
    if bool(wrong_BL.any()):
        row, token = wrong_BL.nonzero()[0].tolist()
        _refuse(mask, f"token {token} of row {row} does not see its document from the beginning up to itself")


def _refuse(mask: Tensor, why: str) -> NoReturn:
    raise ValueError(
        f"attention_mask of shape {tuple(mask.shape)} cannot be obeyed by Mamba layers ({why}): they take padding, and "
        "documents one after the other; pass a mask that says that, or one document a row."
    )


def _check_seen(mask_BS: Tensor, cache: Any, past: int) -> None:
    """That a mask hides the cached tokens that Mamba layers have left out, and no others."""
    if not isinstance(cache, NemotronHCache) or not cache.padding_is_known:
        return
    shown_BP = mask_BS[:, :past].bool()
    if cache.padding_BP is None:
        if bool(shown_BP.all()):
            return
        wrong_BP = ~shown_BP
    else:
        pad_BP = F.pad(cache.padding_BP, (0, past - cache.padding_BP.shape[1])).to(shown_BP.device)
        wrong_BP = shown_BP == pad_BP
    if bool(wrong_BP.any()):
        row, column = wrong_BP.nonzero()[0].tolist()
        said, was = ("shows", "padding") if bool(shown_BP[row, column]) else ("hides", "a token")
        raise ValueError(
            f"attention_mask {said} column {column} of row {row}, which was {was} when the cache's Mamba layers read "
            "it: pass the mask of before with a column for each new token, or begin with a new cache."
        )


def _padding_of(cache: Any, length: int) -> Tensor | None:
    """Without a mask: the one that says of the cached tokens what the cache knows, where any of them was padding."""
    if not isinstance(cache, NemotronHCache) or cache.padding_BP is None or torch.compiler.is_compiling():
        return None
    new = int(cache_length(cache)) + length - cache.padding_BP.shape[1]
    return F.pad(~cache.padding_BP, (0, new), value=True)


def remember_padding(cache: Any, mask_BL: Tensor | None, past: int | None) -> None:
    """Keep in the cache which of the tokens that it has just seen were padding."""
    if mask_BL is None or past is None:
        return
    if isinstance(cache, NemotronHCache) and cache.padding_is_known:
        before = mask_BL.new_zeros(len(mask_BL), 0) if cache.padding_BP is None else cache.padding_BP
        before = F.pad(before, (0, past - before.shape[1]))
        cache.padding_BP = torch.cat([before, ~mask_BL.bool()], dim=1)


__all__ = ["Inputs", "masks_for_generate", "read_inputs", "remember_padding"]

"""Long prompts in bounded memory: inference over a long row goes through the model a piece of the row at a time.

Any split of a row is the same function (the cache carries the state from piece to piece), so what a piece leaves
behind is the cache and the hidden states that somebody asked for. Nothing else of the model's grows with the length;
for padded rows transformers' attention does, which makes a mask and repeats the keys for each piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers.utils.import_utils import is_tracing

from ..cache.hybrid import GrowingLayer, NemotronHCache, Uninterrupted, cache_length, check_room
from ..configuration import NemotronHConfig
from ..layers.masks import read_mask
from ..layers.packing import document_ids, padding_mask

# What the widest layer may hold of a piece: large enough that every layer's weights, read again for each piece, cost
# nothing beside the products (2,048 tokens of the 9B on a CPU), small beside the weights.
_BUDGET = {"cpu": 256 << 20}
_BUDGET_ELSEWHERE = 1 << 30
_STEP = 256
# No more at a time while somebody watches, so that a small model says something every second or two.
_WATCHED = 2048
_watcher: ContextVar[Callable[[int, int], None] | None] = ContextVar("watcher", default=None)


@contextmanager
def watched(done: Callable[[int, int], None]) -> Iterator[None]:
    """Within, `done(seen, total)` is called before a long row and after each piece of it, with numbers of tokens."""
    token = _watcher.set(done)
    try:
        yield
    finally:
        _watcher.reset(token)


def piece_length(config: NemotronHConfig, batch: int, device: torch.device, dtype: torch.dtype) -> int:
    """Tokens of each row that go through the model at a time, a multiple of 256 (fewer than that: 256)."""
    moe = config.num_experts_per_tok * ((config.moe_latent_size or config.hidden_size) + config.moe_intermediate_size)
    sizes = config.intermediate_size
    widest_mlp = max(sizes) if isinstance(sizes, (list, tuple)) else sizes or 0
    width = {
        # the projection, its convolved part, the scan's result and its normed form
        "mamba": config.in_proj_size + config.conv_dim + 2 * config.d_inner,
        "attention": 4 * config.num_attention_heads * config.head_dim,
        # before and after the squared ReLU, and between
        "mlp": 3 * widest_mlp,
        "moe": 3 * (config.moe_shared_expert_intermediate_size or 0) + 2 * moe,
    }
    widest = max(width[kind] for kind in set(config.layers_block_type))
    budget = _BUDGET.get(device.type, _BUDGET_ELSEWHERE)
    return max(_STEP, budget // (batch * widest * dtype.itemsize) // _STEP * _STEP)


def _asked(given: bool | None, configured: bool) -> bool:
    return bool(configured if given is None else given)


def wanted(
    model: Any,
    cache: Any,
    *,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Any,
    position_ids: Tensor | None,
    **kwargs: Any,
) -> int:
    """The length of the pieces that a row should go through the model in; 0 for all of it at once.

    All at once: with a gradient, traced, packed, with a mask that is not a column for each token, and where somebody
    wants what every layer gave.
    """
    tokens = inputs_embeds if input_ids is None else input_ids
    if not isinstance(tokens, Tensor) or tokens.ndim < 2 or tokens.shape[1] <= _STEP:
        return 0
    if not tokens.shape[0] or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return 0
    batch, length = tokens.shape[:2]
    piece = piece_length(model.config, batch, tokens.device, model.dtype)
    if _watcher.get() is not None:
        piece = min(piece, _WATCHED)
    recorded = ("output_hidden_states", "output_attentions", "output_router_logits")
    if (
        length <= piece
        or is_tracing(tokens)
        or not (attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2))
        or any(_asked(kwargs.get(name), getattr(model.config, name, False)) for name in recorded)
    ):
        return 0
    attention_mask, seq_idx = read_mask(attention_mask, None, batch, length, cache, model.config.layers_block_type)
    mask_BL = padding_mask(attention_mask, length, cache)
    documents = document_ids(tokens, mask_BL, position_ids, seq_idx, None, None, None)
    return piece if documents is None else 0


def run(
    model: Any,
    piece: int,
    keep: int,
    cache: Any,
    *,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """`model(...)` for a long row; of the hidden states only the last `keep` positions, or all for 0.

    Raises:
        ValueError: what the model would say of the whole row, before anything is in the cache.
    """
    tokens = input_ids if input_ids is not None else inputs_embeds
    assert tokens is not None
    batch, length = tokens.shape[:2]
    cache = NemotronHCache(model.config) if cache is None else NemotronHCache.adopt(cache, model.config)
    check_room(cache, batch, length)
    attention_mask, _ = read_mask(attention_mask, None, batch, length, cache, model.config.layers_block_type)
    past = int(cache_length(cache))
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.expected_length = past + length
    kept: list[Tensor] = []
    if (watcher := _watcher.get()) is not None:
        watcher(past, past + length)
    with Uninterrupted(cache, "a long prompt"):
        for start in range(0, length, piece):
            here = slice(start, min(start + piece, length))
            outputs = model(
                input_ids=None if input_ids is None else input_ids[:, here],
                inputs_embeds=None if inputs_embeds is None else inputs_embeds[:, here],
                attention_mask=None if attention_mask is None else attention_mask[:, : past + here.stop],
                cache=cache,
                **kwargs,
            )
            first = max(0, length - keep - start) if keep else 0
            if first < here.stop - start:
                kept.append(outputs.last_hidden_state[:, first:].clone())
            if watcher is not None:
                watcher(past + here.stop, past + length)
    outputs.last_hidden_state = torch.cat(kept, dim=1)
    return outputs

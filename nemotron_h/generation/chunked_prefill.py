"""Chunked prefill, long prompts in bounded memory: inference over a long row goes through the model a chunk at a time.

Any split of a row is the same function (the cache carries the state from chunk to chunk), so what a chunk leaves
behind is the cache and the hidden states that somebody asked for. Nothing else of the model's grows with the length;
for padded rows transformers' attention does, which makes a mask and repeats the keys for each chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor
from transformers.utils.import_utils import is_tracing

from ..cache.hybrid import NemotronHCache, Uninterrupted, check_room
from ..cache.layers import GrowingLayer
from ..configuration import NemotronHConfig
from ..layers.masks import Inputs, read_inputs

# What the widest layer may hold of a chunk: large enough that every layer's weights, read again for each chunk, cost
# nothing beside the products (2,048 tokens of the 9B on a CPU), small beside the weights.
_BUDGET = {"cpu": 256 << 20}
_BUDGET_ELSEWHERE = 1 << 30
_STEP = 256
# No more at a time while somebody watches, so that a small model says something every second or two.
_WATCHED = 2048
_watcher: ContextVar[Callable[[int, int], None] | None] = ContextVar("watcher", default=None)


@contextmanager
def watched(done: Callable[[int, int], None]) -> Iterator[None]:
    """Within, `done(seen, total)` is called before a long row and after each chunk of it, with numbers of tokens."""
    token = _watcher.set(done)
    try:
        yield
    finally:
        _watcher.reset(token)


def chunk_length(config: NemotronHConfig, batch: int, device: torch.device, dtype: torch.dtype) -> int:
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


def run(model: Any, keep: int, batch: dict[str, Any], settings: dict[str, Any]) -> Any:
    """`model(**batch, **settings)` for a long row, a chunk at a time; None where it should go through all at once.

    All at once: with a gradient, traced, packed, with a mask that is not a column for each token, and where somebody
    wants what every layer gave.

    Args:
        keep: the hidden states of so many last positions come back, of all for 0.

    Raises:
        ValueError: what the model would say of the whole row, before anything is in the cache.
    """
    tokens = batch["inputs_embeds"] if batch["input_ids"] is None else batch["input_ids"]
    if not isinstance(tokens, Tensor) or tokens.ndim < 2 or tokens.shape[1] <= _STEP:
        return None
    if not tokens.shape[0] or torch.is_grad_enabled() or torch.compiler.is_compiling() or is_tracing(tokens):
        return None
    config, mask = model.config, batch["attention_mask"]
    size = chunk_length(config, tokens.shape[0], tokens.device, model.dtype)
    if _watcher.get() is not None:
        size = min(size, _WATCHED)
    if (
        tokens.shape[1] <= size
        or not (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2))
        or any(batch[name] is not None for name in ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"))
        or any(_asked(settings.get(name), getattr(config, name, False)) for name in _RECORDED)
    ):
        return None
    cache = batch["cache"]
    if cache is not None:
        cache = NemotronHCache.adopt(cache, config)
        check_room(cache, *tokens.shape[:2])
    inputs = read_inputs(config.layers_block_type, tokens, cache, mask, batch["position_ids"])
    if inputs.seq_idx_BL is not None:
        return None
    return _in_chunks(model, size, keep, NemotronHCache(config) if cache is None else cache, inputs, batch, settings)


_RECORDED = ("output_hidden_states", "output_attentions", "output_router_logits")


def _asked(given: bool | None, configured: bool) -> bool:
    return bool(configured if given is None else given)


def _in_chunks(
    model: Any, size: int, keep: int, cache: Any, inputs: Inputs, batch: dict[str, Any], settings: dict[str, Any]
) -> Any:
    given = {name: batch[name] for name in ("input_ids", "inputs_embeds") if batch[name] is not None}
    length, past = next(iter(given.values())).shape[1], cast(int, inputs.past)
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.expected_length = past + length
    kept: list[Tensor] = []
    watcher = _watcher.get() or (lambda seen, total: None)
    watcher(past, past + length)
    with Uninterrupted(cache, "a long prompt"):
        for start in range(0, length, size):
            stop = min(start + size, length)
            mask = None if inputs.attention_mask is None else inputs.attention_mask[:, : past + stop]
            rows = {name: tokens[:, start:stop] for name, tokens in given.items()}
            outputs = model(**rows, attention_mask=mask, cache=cache, **settings)
            first = max(0, length - keep - start) if keep else 0
            if first < stop - start:
                kept.append(outputs.last_hidden_state[:, first:].clone())
            watcher(past + stop, past + length)
    outputs.last_hidden_state = torch.cat(kept, dim=1)
    return outputs

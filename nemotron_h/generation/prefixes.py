"""`generate(prompt_cache=...)`: a prompt goes on from the longest beginning of it that was kept (prompt_cache.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cache.hybrid import NemotronHCache
from ..compat import CACHE_NAME, rename_cache_kwarg
from .prompt_cache import PromptCache, owner_of

_ROWS = "a prompt cache keeps the state of one text at a time"


@torch.no_grad()
def generate(
    model: Any,
    prompt_cache: PromptCache,
    *args: Any,
    prompt_boundaries: Sequence[int] = (),
    **kwargs: Any,
) -> Any:
    """`model.generate(*args, **kwargs)`, the prompt begun from `prompt_cache`, which keeps what it comes by.

    Kept are the states at `prompt_boundaries` (numbers of prompt tokens), at the prompt's end, at the other points that
    `PromptCache.boundaries` names, and after what was generated (not where there are several rows by then). The result
    is the one without a prompt cache, up to rounding: a split prompt is the same function.

    Raises:
        ValueError: several prompts, padding, embeddings in place of ids, a cache that holds tokens, or no cache.
    """
    if not isinstance(prompt_cache, PromptCache):
        raise ValueError(f"prompt_cache= is a {type(prompt_cache).__name__}: pass a nemotron_h.PromptCache.")
    kwargs = rename_cache_kwarg(kwargs)
    ids = _prompt(args, kwargs)
    cache = _cache(model, args, kwargs)
    row, device = ids[0].tolist(), model.get_input_embeddings().weight.device
    wrong = [position for position in prompt_boundaries if not 0 < position <= len(row)]
    if wrong:
        raise ValueError(f"prompt_boundaries has {wrong[0]} and the prompt {len(row)} tokens: name positions in it.")

    owner = owner_of(model)
    at = prompt_cache.resume(cache, row[:-1], model, owner) if len(row) > 1 else 0
    for end in prompt_cache.boundaries(row, model, at, prompt_boundaries, owner):
        model(ids[:, at:end].to(device), logits_to_keep=1, use_cache=True, **{CACHE_NAME: cache})
        prompt_cache.tokens_computed += end - at
        at = end
        prompt_cache.store(cache, row[:at], model, owner)
    if (rows := max(_setting(model, args, kwargs, name) or 1 for name in ("num_beams", "num_return_sequences"))) > 1:
        cache.batch_repeat_interleave(rows)

    # What is left of the prompt is one token; up to 5.23 the library's chunks begin with what the cache has seen.
    settings = {"cache_implementation": None, "prefill_chunk_size": None}
    output = model.generate(*args, **{**kwargs, **settings, CACHE_NAME: cache})
    sequence = output if isinstance(output, Tensor) else output.sequences
    seen = int(cache.get_seq_length())
    if rows == 1 and len(row) <= seen <= sequence.shape[1]:
        prompt_cache.store(cache, sequence[0, :seen], model, owner)
    return output


def _prompt(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    if kwargs.get("inputs_embeds") is not None or not isinstance(ids, Tensor):
        raise ValueError("prompt_cache= tells prompts by their token ids: pass input_ids, not embeddings.")
    if ids.shape[0] != 1:
        raise ValueError(f"The batch has {ids.shape[0]} prompts, and {_ROWS}: call generate() for each.")
    if ids.shape[1] == 0:
        raise ValueError("The prompt has no tokens: pass at least one.")
    mask = kwargs.get("attention_mask")
    if mask is not None and not bool(mask.bool().all()):
        raise ValueError(
            f"The attention mask hides {int((mask == 0).sum())} of {ids.shape[1]} prompt tokens, and prompt_cache= "
            "takes a prompt without padding: leave the padding out."
        )
    return ids


def _setting(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """What generate() will use: the argument, else the given generation config's, else the model's own."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
    value = getattr(given, name, None) if given is not None else None
    return value if value is not None else getattr(model.generation_config, name, None)


def _cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NemotronHCache:
    if _setting(model, args, kwargs, "use_cache") is False:
        raise ValueError("prompt_cache= goes on from a cache, and use_cache is False: leave one of them out.")
    cache = kwargs.get(CACHE_NAME)
    if cache is not None:
        if not isinstance(cache, NemotronHCache):
            raise ValueError(f"prompt_cache= fills a NemotronHCache and got a {type(cache).__name__}: leave it out.")
        if seen := int(cache.get_seq_length()):
            raise ValueError(f"prompt_cache= fills an empty cache and this one holds {seen} tokens: pass a new one.")
        return cache
    implementation = _setting(model, args, kwargs, "cache_implementation")
    if implementation not in (None, "dynamic", "dynamic_full"):
        raise ValueError(
            f"prompt_cache= makes a growing cache and cache_implementation is {implementation!r}: pass an empty "
            "NemotronHCache(model.config, max_cache_len=..., offloading=...) as the cache."
        )
    return NemotronHCache(model.config)


__all__ = ["generate"]

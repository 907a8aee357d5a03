"""What `transformers` renames between the versions this package supports (5.17 to 5.24), in one place.

5.24 renamed `past_key_values` to `cache` in every forward and every output. The names of the running version are used
towards the library; towards the user every spelling works on every version.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from transformers import cache_utils
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

_C = TypeVar("_C")

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""Every spelling of the cache argument: transformers >= 5.24, transformers < 5.24, NVIDIA's remote code."""

CACHE_NAME: str = next(f.name for f in fields(MoeModelOutputWithPast) if f.name in CACHE_NAMES)
"""The spelling of the running `transformers`."""

_MASK_CACHE_NAME: str = next(n for n in inspect.signature(create_causal_mask).parameters if n in CACHE_NAMES)

# Before 5.24 a layer without a cache had no class of its own.
DummyLayer: type = getattr(cache_utils, "DummyLayer", object)


class _CroppableStaticLayer(cache_utils.StaticLayer):
    """Before 5.24 a static layer could not be cropped."""

    def crop(self, tokens_to_remove: int) -> None:
        # In place: the address is static. What is past the length is written over by the next update.
        self.cumulative_length.sub_(abs(tokens_to_remove))


FixedKeys: Any = cache_utils.StaticLayer if hasattr(cache_utils.StaticLayer, "crop") else _CroppableStaticLayer
"""Keys and values for so many tokens, which can forget the last of them."""


def pick_cache(**spellings: Cache | None) -> Cache | None:
    """The one cache among its spellings; two different ones are an error."""
    given = {name: cache for name, cache in spellings.items() if cache is not None}
    if len({id(cache) for cache in given.values()}) > 1:
        raise ValueError(f"Got different caches as {' and '.join(given)}: pass one of them, `{CACHE_NAME}=`.")
    return next(iter(given.values()), None)


def rename_cache_kwarg(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` with whichever spelling of the cache it has under the running version's name."""
    given = {name: kwargs[name] for name in CACHE_NAMES if name in kwargs}
    if not given:
        return kwargs
    rest = {name: value for name, value in kwargs.items() if name not in given}
    return {**rest, CACHE_NAME: pick_cache(**given)}


def causal_mask(
    config: Any, inputs_embeds: torch.Tensor, attention_mask: Any, cache: Cache | None, **kwargs: Any
) -> Any:
    """`transformers.masking_utils.create_causal_mask` with the cache under the running version's name."""
    kwargs[_MASK_CACHE_NAME] = cache
    return create_causal_mask(config=config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)


def _alias(name: str) -> property:
    return property(lambda self: getattr(self, CACHE_NAME), doc=f"`{CACHE_NAME}` under its other name.")


def with_every_cache_name(cls: type[_C]) -> type[_C]:
    """A class of outputs whose cache answers to every one of `CACHE_NAMES`."""
    for name in CACHE_NAMES:
        if name != CACHE_NAME and not hasattr(cls, name):
            setattr(cls, name, _alias(name))
    return cls


@with_every_cache_name
@dataclass
class NemotronHModelOutput(MoeModelOutputWithPast):
    """`MoeModelOutputWithPast` whose cache answers to `cache`, `past_key_values` and `cache_params`."""


@with_every_cache_name
@dataclass
class NemotronHCausalLMOutput(MoeCausalLMOutputWithPast):
    """`MoeCausalLMOutputWithPast` whose cache answers to `cache`, `past_key_values` and `cache_params`; with the
    backbone's hidden states (B, L, D) where `return_last_hidden_state` asked for them."""

    last_hidden_state: torch.Tensor | None = None


__all__ = [
    "CACHE_NAME",
    "CACHE_NAMES",
    "DummyLayer",
    "FixedKeys",
    "NemotronHCausalLMOutput",
    "NemotronHModelOutput",
    "causal_mask",
    "pick_cache",
    "rename_cache_kwarg",
]

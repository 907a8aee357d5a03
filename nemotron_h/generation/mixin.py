"""What `NemotronHForCausalLM.generate()` gains: one cache for every mode, exact drafts, prompts that go on from a kept
state, and refusals in a sentence where a mode cannot hold a recurrent state."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers.generation import GenerationMixin
from transformers.modeling_utils import PreTrainedModel

from ..cache.hybrid import NemotronHCache, Uninterrupted
from ..compat import CACHE_NAME, CACHE_NAMES, pick_cache, rename_cache_kwarg
from ..layers.arguments import check_prompt, check_renamed
from ..layers.masks import masks_for_generate
from ..training.peft_bridge import check_no_virtual_tokens
from . import batching, drafts, prefixes, speculation


class NemotronHGenerationMixin(GenerationMixin):
    """In front of the library's own; a class that has it names `GenerationMixin` last among its bases."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`transformers`' `generate()`; the cache goes by any of its names.

        Args:
            prompt_cache: a `nemotron_h.PromptCache`: the prompt goes on from the longest kept beginning of it, and is
                kept in turn, also at `prompt_boundaries=[lengths]`; see `generation.prefixes.generate`.
            use_mtp: draft with the MTP head, `num_assistant_tokens` at a time (unless given, `mtp_depths` or its own;
                more: its last depth again). The tokens are those without it, up to rounding; sampled ones are drawn
                from the same distribution.

        Raises:
            ValueError: a cache of `transformers`' own, which without attention layers does not know its length;
                `use_mtp` and a checkpoint without an MTP head, or more tokens at a time than the cache takes back.
        """
        check_renamed(kwargs)
        check_prompt(args, kwargs, self.config)
        kwargs = drafts.generation_options(self, args, kwargs)
        if (prompt_cache := kwargs.pop("prompt_cache", None)) is not None:
            check_no_virtual_tokens(self, "prompt_cache= keeps states by the tokens that led to them")
            return prefixes.generate(self, prompt_cache, *args, **kwargs)
        kwargs = rename_cache_kwarg(kwargs)
        cache = kwargs.get(CACHE_NAME)
        if cache is not None and "attention" not in self.config.layers_block_type:
            if not isinstance(cache, NemotronHCache):
                raise ValueError(
                    f"A {type(cache).__name__} does not know its length in a model without attention layers: pass "
                    "NemotronHCache(model.config)."
                )
        with Uninterrupted(cache, "generate()", if_moved=True):
            return super().generate(*args, **kwargs)

    @functools.wraps(PreTrainedModel.get_compiled_call)
    def get_compiled_call(self, *args: Any, **kwargs: Any) -> Any:
        compiled = super().get_compiled_call(*args, **kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            with Uninterrupted(kwargs.get(CACHE_NAME), "a compiled forward"):
                return compiled(*args, **kwargs)

        return call

    @functools.wraps(GenerationMixin.init_continuous_batching)
    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        batching.check(self.config)
        return super().init_continuous_batching(*args, **kwargs)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        cache, mask = kwargs.get(CACHE_NAME), kwargs.get("attention_mask")
        if kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length") is None and mask is not None:
            # A mask as long as the ids says that what the cache has seen is among them. Where drafts are checked, the
            # library does not cut it off.
            ids = args[0] if args else kwargs["input_ids"]
            if isinstance(cache, NemotronHCache) and (seen := int(cache.get_seq_length())):
                if mask.ndim == 2 and mask.shape[1] == ids.shape[1]:
                    kwargs["next_sequence_length"] = ids.shape[1] - seen
        # generate() hands the tokenizers that it needs for stop strings and assistants on to every step.
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if "prepare_inputs_for_generation" in vars(self) and CACHE_NAME in inputs:
            # PEFT has put itself in front. It looks for the cache under this name, to know the prompt's first step.
            inputs["past_key_values"] = inputs.pop(CACHE_NAME)
        return {name: value for name, value in inputs.items() if name not in ("tokenizer", "assistant_tokenizer")}

    def _assisted_decoding(self, input_ids: Tensor, **kwargs: Any) -> Any:
        check_no_virtual_tokens(self, "a draft is checked several tokens at a time")
        return speculation.decode(self, super()._assisted_decoding, input_ids, **kwargs)

    def _get_candidate_generator(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if drafts.is_asked(generation_config):
            return drafts.Drafter(self, generation_config, kwargs.get("logits_processor"))
        return super()._get_candidate_generator(generation_config, *args, **kwargs)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        implementation = generation_config.cache_implementation
        static = implementation in ("static", "offloaded_static")
        if (
            model_kwargs.get(CACHE_NAME) is None
            and generation_config.use_cache is not False
            and (static or implementation in (None, "dynamic", "dynamic_full", "offloaded", "quantized"))
        ):
            max_cache_length = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
            model_kwargs[CACHE_NAME] = NemotronHCache(
                self.config,
                max_cache_len=max_cache_length if static else None,
                offloading=(implementation or "").startswith("offloaded"),
                quantized=(generation_config.cache_config or {}) if implementation == "quantized" else None,
            )
            if generation_config.is_assistant:  # what it drafts may have to be taken back
                model_kwargs[CACHE_NAME].activate_past_recording()
                # Its masks are guessed from the ids, anew for every draft, where a drafted token may be the pad token.
                model_kwargs[CACHE_NAME].padding_is_known = False
            return
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    @staticmethod
    def create_masks_for_generate(
        config: Any,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The masks of both kinds of layers, made outside the compiled step: their growth would recompile it."""
        cache = pick_cache(**{name: kwargs.get(name) for name in CACHE_NAMES})
        return masks_for_generate(config, inputs_embeds, attention_mask, cache)

"""Speculation: `generate(prompt_lookup_num_tokens=...)`, `assistant_model=` and `use_mtp=`.

A draft of the next few tokens is checked by the model in one step, and what it would have said itself is kept; the
cache goes back over the rest. Drafts come from the text (`Lookup`), from the multi-token-prediction head (`mtp.py`), or
from an assistant through the library's candidate generators. The loop is this package's, because it is exact on every
supported version: logits processors and stopping criteria see what they see in plain `generate()`, once for every token
that is generated and in the same order; generation ends where it would end; and where a draft comes without
probabilities, the random draws are those of plain sampling, so that the same seed gives the same text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers.generation.candidate_generator import AssistedCandidateGenerator, CandidateGenerator
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..cache.hybrid import NemotronHCache, Uninterrupted
from ..cache.layers import MambaLayer
from ..cache.rollback import DRAFT, ROLLBACK
from ..compat import CACHE_NAME, with_every_cache_name

FIRST = ROLLBACK // 4
"""The longest draft that the step which sees the prompt checks: a long prompt comes in pieces, and the last one may be
a single token."""


@dataclass
class Speculation:
    """What a `generate()` with drafts came to.

    `steps` forwards of the model gave `tokens` tokens; `drafted` tokens were checked and `accepted` of them were kept.
    """

    steps: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance_rate(self) -> float:
        """The share of drafted tokens that were kept; 0 where none were drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        """1 is what plain decoding does."""
        return self.tokens / self.steps if self.steps else 0.0


@with_every_cache_name
@dataclass
class NemotronHGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate(return_dict_in_generate=True)` gives where it drafted: the library's output, and `speculation`."""

    speculation: Speculation | None = None


class Lookup(CandidateGenerator):
    """Drafts from the text itself: what came after the latest of the longest matches of its end.

    A draft that reaches the end of the text goes on in itself, as a text that repeats itself does. It has twice as many
    tokens as matched, at most `number`; `longest` is how many tokens of the end are compared.
    """

    def __init__(self, number: int, longest: int = 16):
        self.number, self.longest = number, longest

    def get_candidates(self, input_ids: Tensor, **_: Any) -> tuple[Tensor, None]:
        """`input_ids` (1, L), and after them the draft, if any; no probabilities."""
        ids = input_ids[0].cpu()
        length = ids.shape[0]
        found = (ids[:-1] == ids[-1]).nonzero()[:, 0]
        if not found.numel():
            return input_ids, None
        matched = 1
        while matched < min(self.longest, length - 1):
            before = found[found >= matched]
            before = before[ids[before - matched] == ids[-1 - matched]]
            if not before.numel():
                break
            found, matched = before, matched + 1
        start = int(found[-1]) + 1
        places = start + torch.arange(min(self.number, 2 * matched)) % (length - start)
        return torch.cat([input_ids, ids[places][None].to(input_ids)], dim=1), None

    def update_candidate_strategy(self, *_: Any) -> None:
        """Nothing: the next match decides."""


def check(model: Any, generation_config: Any, assistant: Any = None) -> None:
    """Refuse, before anything is generated, a draft that could not be taken back.

    Raises:
        ValueError: a draft longer than a cache goes back.
    """
    mamba = "mamba" in model.config.layers_block_type
    lookup, longest = generation_config.prompt_lookup_num_tokens, generation_config.max_matching_ngram_size
    if longest is not None and longest < 1:
        raise ValueError(f"max_matching_ngram_size={longest} compares nothing: pass at least 1, or leave it out.")
    if lookup is not None:
        _check_length("prompt_lookup_num_tokens", lookup, ROLLBACK if mamba else None)
    elif assistant is not None:
        own = "mamba" in (getattr(assistant.config, "layers_block_type", None) or ())
        limit = DRAFT if own else ROLLBACK if mamba else None
        number = getattr(assistant.generation_config, "num_assistant_tokens", None)
        if number is not None:
            _check_length("assistant_model.generation_config.num_assistant_tokens", number, limit)


def _check_length(name: str, value: int, limit: int | None) -> None:
    if value < 1:
        raise ValueError(f"{name}={value} drafts nothing: pass at least 1.")
    if limit is not None and value > limit:
        raise ValueError(f"{name}={value} drafts more tokens than a Mamba layer can take back: pass at most {limit}.")


def decode(model: Any, library: Callable[..., Any], input_ids: Tensor, **given: Any) -> Any:
    """`GenerationMixin._assisted_decoding` for a Nemotron-H: the arguments that it takes, by name.

    Args:
        library: the library's own, for what is left to it: several rows (refused there), generation that is kept in
            step over devices (`synced_gpus`), and drafts that are let pass (`assistant_ensemble_weight`).

    Raises:
        ValueError: `assistant_early_exit`, or what `check` refuses.
    """
    config, cache, mask = given["generation_config"], given.get(CACHE_NAME), given.get("attention_mask")
    # Everywhere but here the library cuts a prompt to what a given cache has not seen. It says how long a mask was that
    # it has dropped for hiding nothing.
    length = getattr(config, "_mask_length", -1) if mask is None else mask.shape[1]
    seen = int(cache.get_seq_length()) if length == input_ids.shape[1] and isinstance(cache, NemotronHCache) else 0
    if (early := config.assistant_early_exit) is not None:
        raise ValueError(
            f"assistant_early_exit={early!r} would draft with some of the model's own layers, which is not done here, "
            "as it made nothing faster: pass prompt_lookup_num_tokens=, assistant_model= or use_mtp=True."
        )
    if (
        given.get("synced_gpus")
        or input_ids.shape[0] > 1
        or getattr(config, "assistant_ensemble_weight", None) is not None
        or cache is None
    ):
        if seen and mask is None:  # by which the mixin's prepare_inputs_for_generation knows
            given["attention_mask"] = torch.ones_like(input_ids)
        return library(input_ids, **given)
    check(model, config, given.get("assistant_model"))
    cache = NemotronHCache.adopt(cache, model.config)
    before = [bool(getattr(layer, "record_past", False)) for layer in cache.layers]
    cache.activate_past_recording()
    try:
        return _Loop(model, input_ids, settles=not any(before), seen=seen, **given).run()
    finally:
        for layer, recorded in zip(cache.layers, before, strict=True):
            if not recorded and hasattr(layer, "deactivate_past_recording"):
                layer.deactivate_past_recording()


class _Loop:
    """One `generate()` of one row."""

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        settles: bool,
        seen: int = 0,
        synced_gpus: bool = False,
        streamer: Any = None,
        inputs_tensor: Any = None,
        assistant_model: Any = None,
        assistant_tokenizer: Any = None,
        tokenizer: Any = None,
        **model_kwargs: Any,
    ):
        self.model, self.ids, self.config = model, input_ids, generation_config
        self.cache = model_kwargs[CACHE_NAME]
        self.processors, self.criteria, self.streamer = logits_processor, stopping_criteria, streamer
        self.model_kwargs = model_kwargs
        # Whether a draft that was checked is done with: unless somebody else wants to go back over it later.
        self.settles = settles
        self.seen = seen  # so many of the ids are in the cache already
        self.stats = Speculation()
        self.outputs: Any = None
        self.matches = 0
        self.limit = ROLLBACK if any(isinstance(layer, MambaLayer) for layer in self.cache.layers) else None
        self.generator: Any
        if generation_config.prompt_lookup_num_tokens is not None:
            # The library's takes the first match of two tokens, and asks the processors about tokens that nobody
            # generated.
            longest = generation_config.max_matching_ngram_size
            self.generator = Lookup(generation_config.prompt_lookup_num_tokens, *([] if longest is None else [longest]))
        else:
            self.generator = model._get_candidate_generator(
                generation_config=generation_config,
                input_ids=input_ids,
                inputs_tensor=inputs_tensor,
                assistant_model=assistant_model,
                logits_processor=logits_processor,
                target_tokenizer=tokenizer,
                assistant_tokenizer=assistant_tokenizer,
                model_kwargs=model_kwargs,
            )
        own = "mamba" in (getattr(getattr(assistant_model, "config", None), "layers_block_type", None) or ())
        self.draft_limit = DRAFT if own else self.limit
        wanted = generation_config.return_dict_in_generate
        self.kept: dict[str, Any] = {
            "scores": () if wanted and generation_config.output_scores else None,
            "logits": () if wanted and generation_config.output_logits else None,
            "attentions": () if wanted and generation_config.output_attentions else None,
            "hidden_states": () if wanted and generation_config.output_hidden_states else None,
        }

    def run(self) -> Any:
        while not self._step():
            pass
        if self.streamer is not None:
            self.streamer.end()
        if isinstance(self.generator, AssistedCandidateGenerator):
            assistant = self.generator.assistant_model.generation_config
            if getattr(assistant, "num_assistant_tokens_schedule", None) == "heuristic":
                assistant.num_assistant_tokens = self._held(self.generator.num_assistant_tokens)
        if not self.config.return_dict_in_generate:
            return self.ids
        return NemotronHGenerateOutput(
            sequences=self.ids,
            speculation=self.stats,
            **self.kept,
            **{CACHE_NAME: self.model_kwargs.get(CACHE_NAME)},
        )

    def _step(self) -> bool:
        """One draft and its check; whether generation has ended. In between, the cache holds what may have to go."""
        with Uninterrupted(self.cache, "the check of a draft"):
            return self._draft_and_check()

    def _draft_and_check(self) -> bool:
        length, first = self.ids.shape[1], self.stats.steps == 0
        drafted, q_LV = self._draft(first)
        number = drafted.shape[1] - length
        outputs = self.outputs = self._check(drafted, number, first)
        logits_LV = outputs.logits[0, -number - 1 :].to(device=self.ids.device, dtype=torch.float32, copy=True)
        draft = drafted[0, length:].tolist()
        done, matches = False, 0
        for i in range(number + 1):
            raw, scores = logits_LV[i : i + 1], self.processors(self.ids, logits_LV[i : i + 1].clone())
            token = self._choose(scores, draft[i] if i < number else None, q_LV, i)
            self._keep(scores, raw)
            self.ids = torch.cat([self.ids, token[:, None]], dim=1)
            if self.streamer is not None:
                self.streamer.put(token.cpu())
            done = bool(self.criteria(self.ids, self.kept["scores"]).all())
            kept = i < number and int(token) == draft[i]
            matches += kept and not done
            self.stats.accepted += kept
            if done or not kept:
                break
        taken = self.ids.shape[1] - length
        # The last token is one that the cache has not seen, whether it was drafted or not.
        if number + 1 > taken:
            self.cache.crop(taken - number - 1)
        if self.settles:
            for layer in self.cache.layers:
                if isinstance(layer, MambaLayer):
                    layer.settle()
        self.stats.steps += 1
        self.stats.tokens += taken
        self.stats.drafted += number
        self.matches = matches
        self.generator.update_candidate_strategy(self.ids, logits_LV[None], matches)
        self._keep_states(outputs, number, taken, first)
        self.model_kwargs = self.model._update_model_kwargs_for_generation(
            outputs, self.model_kwargs, is_encoder_decoder=False, num_new_tokens=taken
        )
        return done

    def _draft(self, first: bool) -> tuple[Tensor, Tensor | None]:
        """The tokens with a draft after them (1, L + n), and the probabilities (n, V) that it was drawn from, if any.

        Never more than the cache goes back over, and one less than there is still to generate: cut by number alone, as
        a cut that looks at the tokens would not leave the distribution of what is sampled as it is.
        """
        most = self.config.max_length - self.ids.shape[1] - 1
        if self.limit is not None:
            most = min(most, FIRST if first else self.limit)
        if most < 1:
            return self.ids, None
        if hasattr(self.generator, "num_assistant_tokens"):
            self.generator.num_assistant_tokens = self._held(self.generator.num_assistant_tokens)
        drafted, logits_BLV = self._candidates(first)
        number = min(drafted.shape[1] - self.ids.shape[1], most)
        drafted = drafted[:, : self.ids.shape[1] + number].to(self.ids.device)
        if logits_BLV is None or not self.config.do_sample or number < 1:
            return drafted, None
        return drafted, logits_BLV[0, :number].to(self.ids.device).float().softmax(-1)

    def _held(self, number: int) -> int:
        """Schedules let drafts grow without an end."""
        return number if self.draft_limit is None else min(number, self.draft_limit)

    def _candidates(self, first: bool) -> tuple[Tensor, Tensor | None]:
        generator = self.generator
        if generator.requires_model_outputs:
            return generator.get_candidates(
                self.ids,
                model_kwargs=self.model_kwargs,
                model_outputs=self.outputs,
                is_first_iteration=first,
                n_last_matches=self.matches,
            )
        try:
            return generator.get_candidates(self.ids)
        except RuntimeError as error:
            # A draft in another tokenizer's tokens may have to go back further than is recorded: then from the start.
            if "crop(" not in str(error) or not getattr(generator, "assistant_kwargs", {}).get(CACHE_NAME):
                raise
            generator.assistant_kwargs[CACHE_NAME] = None
            return generator.get_candidates(self.ids)

    def _check(self, drafted: Tensor, number: int, first: bool) -> Any:
        """One forward over what the cache has not seen, logits for the draft and the token before it."""
        kwargs = dict(self.model_kwargs)
        if (mask := kwargs.get("attention_mask")) is not None and number:
            kwargs["attention_mask"] = torch.cat([mask, mask.new_ones(mask.shape[0], number)], dim=1)
        if (positions := kwargs.get("position_ids")) is not None and number:
            new = torch.arange(1, number + 1, dtype=positions.dtype, device=positions.device)
            kwargs["position_ids"] = torch.cat([positions, positions[..., -1:] + new], dim=-1)
        unseen = (drafted.shape[1] - self.seen if self.seen else None) if first else number + 1
        inputs = self.model.prepare_inputs_for_generation(
            drafted,
            next_sequence_length=unseen,
            is_first_iteration=first,
            **kwargs,
        )
        inputs["logits_to_keep"] = number + 1
        if self.generator.requires_model_outputs:
            inputs |= self.generator.model_kwargs_overrides
        # Experts run another way in single steps, as they do in plain generate().
        with contextlib.nullcontext() if first else self.model._optimize_model_for_decode():
            return self.model(**inputs)

    def _choose(self, scores: Tensor, drafted: int | None, q_LV: Tensor | None, i: int) -> Tensor:
        """The next token (1,), drawn as plain generate() draws it, or so that the draft changes nothing."""
        if not self.config.do_sample:
            return scores.argmax(-1)
        p_V = scores.softmax(-1)[0]
        if drafted is None or q_LV is None:
            return torch.multinomial(p_V[None], num_samples=1).squeeze(1)
        # Algorithm 1 of speculative sampling (2211.17192).
        q_V = q_LV[i]
        if torch.rand((), device=p_V.device) * q_V[drafted] < p_V[drafted]:
            return torch.tensor([drafted], device=p_V.device)
        left_V = (p_V - q_V).clamp(min=0)
        left_V = left_V if float(left_V.sum()) > 0 else p_V  # equal up to rounding
        return torch.multinomial(left_V[None], num_samples=1).squeeze(1)

    def _keep(self, scores: Tensor, raw: Tensor) -> None:
        for name, tensor in (("scores", scores), ("logits", raw)):
            if self.kept[name] is not None:
                self.kept[name] += (tensor,)

    def _keep_states(self, outputs: Any, number: int, taken: int, first: bool) -> None:
        """As plain generate() has them: one entry a token, what a step of one would have given; the prompt's first."""
        for name in ("attentions", "hidden_states"):
            states = getattr(outputs, name) if self.kept[name] is not None else None
            if not states or states[0] is None:
                continue
            for i in range(taken):
                end = states[0].shape[-2] - number + i
                rows = slice(0 if first and i == 0 else end - 1, end)
                keys = [state.shape[-1] - (number - i if name == "attentions" else 0) for state in states]
                entry = tuple(state[..., rows, :to] for state, to in zip(states, keys, strict=True))
                self.kept[name] += (entry,)


def report(output: Any) -> dict[str, float] | None:
    """What an output of `generate()` says of its drafts, as numbers to print; None where there were none."""
    found = getattr(output, "speculation", None)
    if found is None:
        return None
    return {
        **{field.name: getattr(found, field.name) for field in fields(found)},
        "acceptance_rate": round(found.acceptance_rate, 4),
        "tokens_per_step": round(found.tokens_per_step, 3),
    }


__all__ = ["Lookup", "NemotronHGenerateOutput", "Speculation", "report"]

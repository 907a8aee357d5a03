"""Drafts for speculation.py to check: with the MTP head (`generate(use_mtp=True)`)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..cache.hybrid import NemotronHCache
from ..cache.rollback import ROLLBACK
from ..layers.masks import read_inputs
from ..layers.parts import project
from ..mtp import check_head

MOST = ROLLBACK // 2
"""Tokens to draft at a time, at most: what a Mamba layer takes back, the model's or the head's."""

_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


def is_asked(generation_config: Any) -> bool:
    """Whether this generation drafts with the head; what `transformers` prefers to it goes before."""
    return (
        bool(getattr(generation_config, "use_mtp", None))
        and getattr(generation_config, "prompt_lookup_num_tokens", None) is None
    )


def generation_options(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of `generate()`, checked for `use_mtp`, with a number of drafts where none is given:
    `transformers` would fill in the 20 that it drafts with a model.

    Raises:
        ValueError: `use_mtp` and no head.
    """
    kwargs = dict(kwargs)
    given = args[1] if len(args) > 1 else kwargs.get("generation_config")
    configs = [config for config in (given, model.generation_config) if config is not None]

    def setting(name: str) -> Any:
        values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), None)

    if kwargs.get("use_mtp", setting("use_mtp")):
        check_head(model, "use_mtp=True")
        number = setting("num_assistant_tokens")
        kwargs["num_assistant_tokens"] = number = (model.mtp_depths or model.mtp.depths) if number is None else number
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= MOST:
            raise ValueError(
                f"num_assistant_tokens is {number!r}: with use_mtp draft 1 to {MOST} tokens at a time, which is what a "
                "cache can take back."
            )
    return kwargs


class Drafter(CandidateGenerator):
    """Drafts a few tokens of one row with the MTP head, for speculation.py to check.

    Every depth of the head has a cache of its own, of the pairs (hidden state, token after it) of the text so far. The
    entries that stand on drafted tokens are taken back after drafting. Depths beyond the head's go on in the cache of
    its last, one entry a token, as serving engines do it. Where the text goes on from a cache, the head sees what is
    new.
    """

    requires_model_outputs = True

    def __init__(self, model: Any, generation_config: Any, logits_processor: Any = None):
        check_head(model, "use_mtp=True")
        self.model = model
        self.number = generation_config.num_assistant_tokens
        self.max_length = generation_config.max_length
        self.do_sample = generation_config.do_sample
        # The others may count their calls (a thinking budget), and are the model's; these make drafts more like its.
        self.warpers = [warper for warper in logits_processor or () if isinstance(warper, _WARPERS)]
        # Asked of the model's forward; `output_hidden_states` would have every layer watched by hooks, and the fast
        # paths left.
        self.model_kwargs_overrides: dict[str, Any] = {"return_last_hidden_state": True}
        layers = copy.copy(model.config)
        layers.layers_block_type = model.config.mtp_layers_block_type
        self._caches = [NemotronHCache(layers) for _ in range(min(self.number, model.mtp.depths))]
        for cache in self._caches:
            cache.activate_past_recording()
        # Of each depth the output at the last position that stands on no drafted token: the next depth begins there.
        self._last: list[Tensor | None] = [None] * len(self._caches)
        self._begun = False

    @torch.no_grad()
    def get_candidates(
        self,
        input_ids: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        model_outputs: Any = None,
        is_first_iteration: bool = False,
        n_last_matches: Any = 0,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(1, L) ids -> them with drafts after them, and the drafts' logits (1, drafts, V) where they were drawn."""
        if is_first_iteration:  # the model has not seen the prompt yet
            return input_ids, None
        x_BLD = model_outputs.last_hidden_state
        certain = int(n_last_matches) + 1 if self._begun else x_BLD.shape[1]
        self._begun = True
        number = min(self.number, self.max_length - input_ids.shape[1] - 1)
        if number < 1:
            return input_ids, None
        mask = (model_kwargs or {}).get("attention_mask")
        x_BLD, ids_BL = _without_padding(x_BLD[:, :certain], input_ids[:, -certain:], mask)
        drafts, scores = self._draft(input_ids, x_BLD, ids_BL, number)
        return torch.cat([input_ids, *drafts], dim=1), torch.stack(scores, dim=1) if self.do_sample else None

    def _draft(
        self, input_ids: Tensor, x_BLD: Tensor, ids_BL: Tensor, number: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The drafts, (1, 1) each, and their scores (1, V), from the model's new hidden states and the tokens after
        them, of which the last has no hidden state yet."""
        drafts: list[Tensor] = []
        scores: list[Tensor] = []
        standing_on_drafts = [0] * len(self._caches)
        y_BLD = x_BLD
        for step in range(number):
            depth = min(step, len(self._caches) - 1)
            again = step > depth
            tokens_BL = torch.cat([ids_BL, *drafts], dim=1)[:, -1 if again else -x_BLD.shape[1] :]
            y_BLD = self._through(depth, y_BLD[:, -1:] if again else x_BLD, tokens_BL)
            standing_on_drafts[depth] += 1 if again else min(depth, y_BLD.shape[1])
            if not again:
                # The next depth's inputs: these, and the one before them, which stood on a draft the last time.
                before = self._last[depth]
                x_BLD = y_BLD if before is None else torch.cat([before, y_BLD], dim=1)
                if y_BLD.shape[1] > depth:
                    self._last[depth] = y_BLD[:, y_BLD.shape[1] - 1 - depth].unsqueeze(1)
            scores_BV = project(self.model.lm_head, y_BLD[:, -1]).to(input_ids.device, torch.float32)
            if self.do_sample:
                for warper in self.warpers:
                    scores_BV = warper(input_ids, scores_BV)
                token_BL = torch.multinomial(scores_BV.softmax(dim=-1), num_samples=1)
            else:
                token_BL = scores_BV.argmax(dim=-1, keepdim=True)
            drafts.append(token_BL.to(input_ids.device))
            scores.append(scores_BV)
        for cache, entries in zip(self._caches, standing_on_drafts, strict=True):
            cache.crop(-entries)
        return drafts, scores

    def _through(self, depth: int, x_BLD: Tensor, tokens_BL: Tensor) -> Tensor:
        trunk, cache = self.model.model, self._caches[depth]
        embeds_BLD = trunk.embeddings(tokens_BL).to(x_BLD.device)
        inputs = read_inputs(cache.kinds, x_BLD, cache, None)
        visible = inputs.visible(self.model.config, cache.kinds, x_BLD, cache, trunk.training)
        return self.model.mtp(x_BLD, embeds_BLD, depth, cache=cache, **visible)

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: Any) -> None:
        """The number of drafts stays."""


def _without_padding(x_BLD: Tensor, ids_BL: Tensor, attention_mask: Any) -> tuple[Tensor, Tensor]:
    """The pairs of a row of which neither token is padding; the mask's last column is that of the last of `ids_BL`."""
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2 or bool(attention_mask.all()):
        return x_BLD, ids_BL
    columns = attention_mask[0, -1 - ids_BL.shape[1] :].bool()
    pairs = columns[:-1] & columns[1:]
    return x_BLD[:, pairs.to(x_BLD.device)], ids_BL[:, pairs.to(ids_BL.device)]


__all__ = ["Drafter"]

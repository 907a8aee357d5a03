"""A conversation that keeps its state between turns: what `nemotron-h chat` holds on to.

A chat template writes past answers without their reasoning, so the text of a turn parts from the one before at the
place where the answer began, not at its end. A state is therefore kept there (and at the other points that a
`PromptCache` keeps), and a turn costs what it adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .chat import Chat, Reply, check_text, render_messages
from .prompt_cache import PromptCache
from .reasoning import ReasoningStreamer, reasoning_switch, switch_reasoning


@dataclass(frozen=True)
class Turn:
    """A reply, and what its prompt cost: `prompt_tokens` in all, of which `reused` were in a kept state."""

    reply: Reply
    prompt_tokens: int
    reused: int


class Conversation:
    """Questions and answers one after another, each turn's prompt the whole of them.

    Without a chat template, what is said continues the text as it is.

    Args:
        chat: the model with its tokenizer.
        system: a system text.
        think: reason before answering, or not.
        prompt_cache: where states are kept; one of its own unless given.
    """

    def __init__(
        self, chat: Chat, *, system: str | None = None, think: bool = True, prompt_cache: PromptCache | None = None
    ):
        if system and not chat.has_template:
            raise ValueError(
                f"This model has no chat template, so the system text {system!r} has no place; put it into the prompt."
            )
        check_text(system or "", "The system text")
        self.chat, self.system, self.think = chat, system, think
        self.prompt_cache = PromptCache() if prompt_cache is None else prompt_cache
        self.reset()

    def reset(self) -> None:
        """Forget what was said. States stay, so that a conversation that begins alike goes on from one."""
        self.messages: list[dict[str, str]] = [{"role": "system", "content": self.system}] if self.system else []
        self.text = ""

    def say(self, text: str, *, streamer: ReasoningStreamer | None = None, **generate_kwargs: Any) -> Turn:
        """Generate the answer to `text`, each piece going to `streamer` as it comes. An error leaves all as it was."""
        prompt, later = self._prompt(check_text(text, "The prompt"))
        ids, boundary = self._ids(prompt), self._common(prompt, later)
        cache = self.prompt_cache
        before = cache.tokens_reused
        reply = self.chat.generate(
            text,
            prompt,
            streamer=streamer,
            prompt_cache=cache,
            prompt_boundaries=[boundary] if boundary else [],
            **generate_kwargs,
        )
        if self.chat.has_template:
            self.messages += [
                {"role": "user", "content": text},
                {"role": "assistant", "content": reply.answer or ""},
            ]
        else:
            self.text = prompt + (reply.answer or "")
        return Turn(reply, len(ids), cache.tokens_reused - before)

    def _prompt(self, text: str) -> tuple[str, str]:
        """The turn's prompt, and that of a turn after it: what they begin with alike is worth keeping."""
        if not self.chat.has_template:
            return self.text + text, self.text + text
        tokenizer = self.chat.tokenizer
        now: list[dict[str, Any]] = [*self.messages, {"role": "user", "content": text}]
        later = [*now, {"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]

        def rendered(messages: list[dict[str, Any]]) -> str:
            messages, arguments, _ = switch_reasoning(messages, self.think, tokenizer)
            return render_messages(tokenizer, messages, arguments)

        reasoning_switch(now, self.think, tokenizer)  # for what it has to say of this turn
        return rendered(now), rendered(later)

    def _ids(self, text: str) -> list[int]:
        return list(self.chat.tokenizer(text, add_special_tokens=not self.chat.has_template)["input_ids"])

    def _common(self, prompt: str, later: str) -> int:
        """Tokens that both begin with."""
        ours, theirs = self._ids(prompt), self._ids(later)
        differ = (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
        return next(differ, min(len(ours), len(theirs)))


__all__ = ["Conversation", "Turn"]

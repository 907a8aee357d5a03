"""The reasoning trace: switching it on or off in a prompt, and telling it from the answer, whole or while it streams.

Three generations of chat templates switch it in three ways (`reasoning_switch`), but all of them open the trace in the
*prompt*: the generated text starts inside it and only its end, `</think>`, is generated. A text that never reaches
`</think>` is all reasoning and has no answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from transformers.generation.streamers import TextStreamer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

THINK, END_THINK = "<think>", "</think>"

Kind = Literal["reasoning", "answer"]


class Split(NamedTuple):
    """A generated text taken apart. `reasoning` is None where none was asked for, `answer` where none was reached."""

    reasoning: str | None
    answer: str | None


def split_reasoning(text: str, *, started: bool = True) -> Split:
    """Take `text` apart at the first `</think>`; whitespace around either part is dropped.

    `started` says that the prompt had already opened the trace (`opens_reasoning(prompt)`). Without it, the text is an
    answer unless it opens a trace of its own, with `<think>` before anything else.
    """
    text = text.lstrip()
    if text.startswith(THINK):
        text, started = text[len(THINK) :], True
    if not started:
        return Split(None, text.rstrip())
    head, end, tail = text.partition(END_THINK)
    return Split(head.strip(), tail.strip() if end else None)


def opens_reasoning(prompt: str) -> bool:
    """Whether what is generated after `prompt` starts inside a reasoning trace: it ends with `<think>`."""
    return prompt.rstrip().endswith(THINK)


def reasoning_switch(
    messages: list[dict[str, Any]], think: bool, chat_template: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """`messages` and template arguments that turn reasoning on or off, in the way `chat_template` understands.

    Nemotron 3 takes the argument `enable_thinking`; Nano 2 reads `/think` or `/no_think` in the system text;
    Nemotron-H-Reasoning reads `{'reasoning': True}` there. A template with none of them has no switch: the messages
    come back as they are.
    """
    if "enable_thinking" in chat_template:
        return messages, {"enable_thinking": think}
    if "/no_think" in chat_template:
        switch = "/think" if think else "/no_think"
    elif "'reasoning'" in chat_template:
        switch = str({"reasoning": think})
    else:
        return messages, {}
    first, rest = (messages[0], messages[1:]) if messages and messages[0]["role"] == "system" else ({}, messages)
    system = f"{first.get('content', '')} {switch}".strip()
    return [{**first, "role": "system", "content": system}, *rest], {}


class ReasoningStreamer(TextStreamer):
    """A streamer for `generate(streamer=...)` that tells the reasoning from the answer, token by token.

    Every piece of text goes to `on_text("reasoning" | "answer", piece)`; override it (the default prints). The pieces
    of each kind add up to exactly what `split_reasoning` says of the whole text. Where the prompt is handed to the
    streamer, as `generate()` does, it decides whether the text starts inside a trace; `started=` overrides that.

    `tokens` counts what was generated; `reasoning` and `answer` hold the text so far.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, started: bool | None = None, **decode_kwargs: Any):
        super().__init__(tokenizer, skip_prompt=True, **decode_kwargs)
        self._started = started
        self.next_tokens_are_prompt: bool = True
        # The markers may themselves be special tokens (Nemotron 3: ids 12 and 13), so `skip_special_tokens` would
        # take away the boundary: everything else that is special is dropped here, before decoding.
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        special.update(tokenizer.all_special_ids)
        self._dropped_ids = special - {tokenizer.convert_tokens_to_ids(marker) for marker in (THINK, END_THINK)}
        self._reset()

    def _reset(self) -> None:
        self.tokens = 0
        self.reasoning = ""
        self.answer = ""
        self._ids: list[int] = []
        self._done = 0  # ids[:done] are decoded and handed on
        self._kind: Kind | None = None  # None: still undecided, no text other than whitespace has come
        self._held = ""  # text that may yet turn out to be (part of) a marker, or whitespace at a part's end
        self._inside = bool(self._started)

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (the first call) or new tokens from `generate()`."""
        if value.ndim > 1 and value.shape[0] > 1:
            raise ValueError(f"A streamer follows one sequence; got a batch of {value.shape[0]}.")
        ids = value.reshape(-1).tolist()
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            self._reset()
            if self._started is None:
                # The end of the prompt says it all, and a long prompt costs nothing this way.
                self._inside = opens_reasoning(self._decode(ids[-16:]))
            return
        self.tokens += len(ids)
        self._ids.extend(id for id in ids if id not in self._dropped_ids)
        # A token's text depends on the one before it (leading spaces), so the last finished one is decoded again.
        context = max(self._done - 1, 0)
        before = self._decode(self._ids[context : self._done])
        text = self._decode(self._ids[context:])
        if text.endswith("�"):  # part of a character; the next tokens complete it
            return
        self._done = len(self._ids)
        self._feed(text[len(before) :])

    def end(self) -> None:
        """Hand on what was held back. Called by `generate()`."""
        context = max(self._done - 1, 0)
        before = self._decode(self._ids[context : self._done])
        self._feed(self._decode(self._ids[context:])[len(before) :], last=True)
        self.next_tokens_are_prompt = True
        self.on_end()

    def split(self) -> Split:
        """What has been streamed, in the form of `split_reasoning`."""
        if self._inside and self._kind != "answer":
            return Split(self.reasoning, None)
        return Split(self.reasoning if self._inside else None, self.answer)

    def on_text(self, kind: Kind, text: str) -> None:
        """A new piece of the reasoning or of the answer. Override this."""
        print(text, end="", flush=True)

    def on_end(self) -> None:
        """The text is complete. Override this."""
        print(flush=True)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, **{"skip_special_tokens": False, **self.decode_kwargs}))

    def _feed(self, text: str, last: bool = False) -> None:
        """Hand on as much of `_held + text` as cannot be taken back by what follows."""
        text = self._held + text
        self._held = ""
        if self._kind is None:
            text = text.lstrip()
            if THINK.startswith(text) and not last:  # empty, or the start of a marker
                self._held = text
                return
            if text.startswith(THINK):
                self._inside, text = True, text[len(THINK) :]
            self._kind = "reasoning" if self._inside else "answer"
        if self._kind == "reasoning" and END_THINK in text:
            head, _, text = text.partition(END_THINK)
            self._emit("reasoning", head.rstrip())
            self._kind = "answer"
        keep = len(text.rstrip())
        if not last and self._kind == "reasoning":
            keep = min(keep, len(text) - _overlap(text, END_THINK))
            keep = len(text[:keep].rstrip())
        self._emit(self._kind, text[:keep])
        self._held = "" if last else text[keep:]

    def _emit(self, kind: Kind, text: str) -> None:
        if not getattr(self, kind):
            text = text.lstrip()
        if text:
            setattr(self, kind, getattr(self, kind) + text)
            self.on_text(kind, text)


def _overlap(text: str, marker: str) -> int:
    """The length of the longest end of `text` that is a start of `marker`."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if marker.startswith(text[-n:])), 0)

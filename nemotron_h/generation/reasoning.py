"""The reasoning trace: switching it on or off in a prompt, and telling it from the answer, whole or while it streams.

Three generations of chat templates switch it in three ways (`reasoning_switch`), but all of them open the trace in the
*prompt*: the generated text starts inside it and only its end, `</think>`, is generated. A text that never reaches
`</think>` is all reasoning and has no answer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from transformers.generation.streamers import TextStreamer
from transformers.utils.chat_template_utils import render_jinja_template

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

THINK, END_THINK = "<think>", "</think>"

# How the published templates are switched: by an argument of the template, or by words in a message.
_ARGUMENT = "enable_thinking"
_WORDS = (
    {True: "/think", False: "/no_think"},
    {True: "{'reasoning': True}", False: "{'reasoning': False}"},
)

Message: TypeAlias = dict[str, Any]
Render: TypeAlias = Callable[[list[Message], Mapping[str, Any]], str | None]

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


class ReasoningSwitchWarning(UserWarning):
    """Reasoning is not what was asked for, or the switch's words are taken out of what somebody wrote."""


class Switched(NamedTuple):
    """`messages` and template arguments for a prompt, and what is to be said of them."""

    messages: list[Message]
    arguments: dict[str, Any]
    remark: str | None = None


def reasoning_switch(
    messages: list[Message],
    think: bool | None,
    chat_template: str | PreTrainedTokenizerBase,
    tools: list[Any] | None = None,
) -> tuple[list[Message], dict[str, Any]]:
    """`messages` and template arguments that turn reasoning on or off, in the way the chat template understands.

    Nemotron 3 takes the argument `enable_thinking`; Nano 2 reads `/think` or `/no_think` in the system or a user text;
    Nemotron-H-Reasoning reads `{'reasoning': True}` in the system text. Which it is, and whether it did what it should,
    is seen at the end of the prompt that comes of it. `think=None` leaves all as it is. An assistant message at the end
    (to be continued, or to be trained on) is no part of that prompt.

    Warns:
        ReasoningSwitchWarning: the template has no switch, a message overrules it, or the template takes letters of a
            message for it (in Nano 2, the `/think` of `https://x/think`).
    """
    switched = switch_reasoning(messages, think, chat_template, tools)
    if switched.remark is not None:
        warnings.warn(switched.remark, ReasoningSwitchWarning, stacklevel=2)
    return switched.messages, switched.arguments


def switch_reasoning(
    messages: list[Message],
    think: bool | None,
    chat_template: str | PreTrainedTokenizerBase,
    tools: list[Any] | None = None,
) -> Switched:
    """As `reasoning_switch`, with the remark in place of a warning."""
    if think is None:
        return Switched(messages, {})
    render = _renderer(chat_template, tools)
    switch = _find_switch(render)
    if switch is None:
        if render(messages, {}) is None:  # which whoever renders them is told
            return Switched(messages, {})
        return Switched(messages, {}, f"This chat template has no switch for reasoning: think={think} changes nothing.")
    overruled = None
    for placed, arguments in _placements(messages, switch.words, think):
        text = render(placed[:-1] if placed and placed[-1].get("role") == "assistant" else placed, arguments)
        if text is None:  # what is wrong with these messages, the tokenizer will say
            return Switched(placed, arguments)
        taken = _taken_out(messages, text, [_WORDS[0][think]] if switch.words is None else [*switch.words.values()])
        if _end(text) == switch.ends[think]:
            return Switched(placed, arguments, taken)
        overruled = overruled or Switched(placed, arguments, _overruled(messages, think, taken))
    assert overruled is not None
    return overruled


class _Switch(NamedTuple):
    words: dict[bool, str] | None  # None: the argument
    ends: dict[bool, str]  # which marker the prompt ends with, switched on and off


def _renderer(chat_template: Any, tools: list[Any] | None) -> Render:
    """A function that gives the prompt for messages and template arguments, or None where the template fails."""
    if isinstance(chat_template, str):
        template, special = chat_template, {"bos_token": "", "eos_token": ""}
    elif hasattr(chat_template, "get_chat_template"):
        template, special = chat_template.get_chat_template(tools=tools), chat_template.special_tokens_map
    else:
        raise ValueError(
            f"chat_template is a {type(chat_template).__name__}: pass the text of a template, or the tokenizer."
        )

    def render(messages: list[Message], arguments: Mapping[str, Any]) -> str | None:
        given = {**special, **arguments, "tools": tools, "add_generation_prompt": True}
        try:
            rendered, _ = render_jinja_template(conversations=[messages], chat_template=template, **given)
        except Exception:  # a template may raise whatever Python can
            return None
        return str(rendered[0])

    return render


def _end(prompt: str | None) -> str | None:
    """The marker that `prompt` ends with, "" for none."""
    return prompt and next((marker for marker in (THINK, END_THINK) if prompt.rstrip().endswith(marker)), "")


def _find_switch(render: Render) -> _Switch | None:
    """What opens the trace at the end of a prompt, or closes it, tried on the least conversation there is."""
    least: list[Message] = [{"role": "user", "content": "x"}]
    for words in (None, *_WORDS):
        ends = {think: _end(render(*next(_placements(least, words, think)))) for think in (True, False)}
        on, off = ends[True], ends[False]
        if on is not None and off is not None and on != off and on != END_THINK and off != THINK:
            return _Switch(words, {True: on, False: off})
    return None


def _placements(
    messages: list[Message], words: dict[bool, str] | None, think: bool
) -> Iterator[tuple[list[Message], dict[str, Any]]]:
    """Where a switch can stand. In the last user message it overrules earlier ones; not where one is in it already."""
    if words is None:
        yield messages, {_ARGUMENT: think}
        return
    word = words[think]
    if messages and messages[0].get("role") == "system":
        yield [_with(messages[0], word), *messages[1:]], {}
    else:
        yield [{"role": "system", "content": word}, *messages], {}
    last = max((i for i, message in enumerate(messages) if message.get("role") == "user"), default=None)
    if last is not None and not any(each in text for each in words.values() for text in _texts([messages[last]])):
        yield [*messages[:last], _with(messages[last], word), *messages[last + 1 :]], {}


def _with(message: Message, word: str) -> Message:
    content = message.get("content") or ""
    added = (
        [*content, {"type": "text", "text": f" {word}"}] if isinstance(content, list) else f"{content} {word}".strip()
    )
    return {**message, "content": added}


def _texts(messages: list[Message]) -> Iterator[str]:
    """What the system and the user say, where switches are read; content may be a list of parts."""
    for message in messages:
        if message.get("role") in ("system", "user"):
            content = message.get("content")
            for part in content if isinstance(content, list) else [content]:
                text = part.get("text") if isinstance(part, dict) else part
                if isinstance(text, str):
                    yield text


def _overruled(messages: list[Message], think: bool, taken: str | None) -> str:
    other = [words[not think] for words in _WORDS]
    by = next((word for text in reversed([*_texts(messages)]) for word in other if word in text), None)
    if by is None:
        return f"This chat template has no switch for reasoning after these messages: think={think} changes nothing."
    remark = (
        f"Reasoning stays {'off' if think else 'on'}: {by!r} in a message overrules think={think} in this chat "
        "template; leave it out of the text."
    )
    return f"{remark} {taken}" if taken else remark


def _taken_out(messages: list[Message], prompt: str, meant: list[str]) -> str | None:
    """Letters of a text that the template took for a switch. Alone at a text's beginning or end, one may be meant."""
    shown = prompt.rstrip().removesuffix(END_THINK)
    for text in _texts(messages):
        parts = text.split()
        for i, part in enumerate(parts):
            letters = any(word in part for word in _WORDS[0].values()) and part not in shown
            if letters and not (part in meant and i in (0, len(parts) - 1)):
                return f"The chat template takes its switch's letters out of {part!r}: the model does not see them."
    return None


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

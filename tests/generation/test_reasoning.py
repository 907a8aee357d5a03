"""Splitting reasoning from answer: whole, and streamed in every way the text can be cut into tokens."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from nemotron_h.bundled import WORD_PROBLEMS
from nemotron_h.generation import (
    ReasoningStreamer,
    ReasoningSwitchWarning,
    Split,
    opens_reasoning,
    reasoning_switch,
    split_reasoning,
)

TEXTS = {
    "usual": "17 + 4 = 21\n</think>\n\nThe answer is 21.",
    "never_ends": "17 + 4 = 21, and then",
    "no_answer": "17 + 4 = 21\n</think>\n\n",
    "empty": "",
    "whitespace": " \n\n",
    "opens_again": "<think>\nwell\n</think>yes",
    "nearly": "a </thin b </ think> c <think> d < </think> e </think> f",
    "empty_trace": "</think>\n\n42",
    "unicode": "naïve 東京 🙂\n\n</think>\n\n→ 3 × 4 🙂 ",
    "blank_lines": "one\n\n\ntwo \n</think>\n three\n\n\nfour\n\n",
}


@pytest.mark.core
@pytest.mark.parametrize(
    "text, started, expected",
    [
        ("17 + 4 = 21\n</think>\n\nThe answer is 21.", True, Split("17 + 4 = 21", "The answer is 21.")),
        ("17 + 4 = 21", True, Split("17 + 4 = 21", None)),
        ("The answer is 21.\n", False, Split(None, "The answer is 21.")),
        ("The tag </think> ends it.", False, Split(None, "The tag </think> ends it.")),
        ("<think>\nwell\n</think>\nyes", False, Split("well", "yes")),
        ("<think>\nwell\n</think>\nyes", True, Split("well", "yes")),
        ("</think>\n\n42", True, Split("", "42")),
        ("a</think>b</think>c", True, Split("a", "b</think>c")),
        ("", True, Split("", None)),
        ("", False, Split(None, "")),
    ],
)
def test_split(text: str, started: bool, expected: Split) -> None:
    assert split_reasoning(text, started=started) == expected


def byte_tokenizer(marker_tokens: bool) -> PreTrainedTokenizerFast:
    """One token per byte, so that streaming cuts inside characters and markers; the markers may be special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<SPECIAL_12>")
    if marker_tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    return tokenizer


class Recorder(ReasoningStreamer):
    def on_text(self, kind, text):
        self.pieces.append((kind, text))

    def on_end(self):
        self.ended = True


@pytest.mark.core
@pytest.mark.parametrize("marker_tokens", [False, True], ids=["markers_in_bytes", "markers_special"])
@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_streamed_is_split(text: str, step: int, started: bool, marker_tokens: bool) -> None:
    tokenizer = byte_tokenizer(marker_tokens)
    streamer = Recorder(tokenizer)
    prompt = "Question? <think>\n" if started else "Question? <think></think>"
    ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
    for _ in range(2):  # a streamer can be used again
        streamer.pieces, streamer.ended = [], False
        streamer.put(torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)]))
        for i in range(0, len(ids), step):
            streamer.put(torch.tensor(ids[i : i + step]))
        streamer.end()
        expected = split_reasoning(text, started=started)
        assert streamer.split() == expected
        assert streamer.tokens == len(ids)
        assert streamer.ended
        kinds = [kind for kind, _ in streamer.pieces]
        assert kinds == sorted(kinds, reverse=True)  # all reasoning before any answer
        for kind in ("reasoning", "answer"):
            assert "".join(piece for k, piece in streamer.pieces if k == kind) == (getattr(expected, kind) or "")


def test_streams_without_delay() -> None:
    """A letter is handed on as soon as it is there, not at the end of its word."""
    tokenizer = byte_tokenizer(False)
    streamer = Recorder(tokenizer, started=False)
    streamer.pieces = []
    streamer.put(torch.tensor([[0]]))
    for char in "abc":
        streamer.put(torch.tensor(tokenizer.encode(char, add_special_tokens=False)))
    assert [piece for _, piece in streamer.pieces] == ["a", "b", "c"]


def test_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 2"):
        Recorder(byte_tokenizer(False)).put(torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.core
@pytest.mark.parametrize(
    "prompt, opens", [("a <think>\n", True), ("a <think>", True), ("<think></think>", False), ("<think> a", False)]
)
def test_opens_reasoning(prompt: str, opens: bool) -> None:
    assert opens_reasoning(prompt) is opens


# The lines that switch, of each published protocol.
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
ALIGNED = TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"
REASONING_8B = (
    TURNS + "{% if messages[0].role == 'system' %}{% if \"{'reasoning': True}\" in messages[0].content %}<think>\n"
    "{% elif \"{'reasoning': False}\" in messages[0].content %}<think></think>{% endif %}{% endif %}"
)
NANO_2 = (
    "{% set ns = namespace(enable_thinking=true) %}{% for m in messages if m.role in ['user', 'system'] %}"
    "{% if '/think' in m.content %}{% set ns.enable_thinking = true %}"
    "{% elif '/no_think' in m.content %}{% set ns.enable_thinking = false %}{% endif %}{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content.replace('/think', '').replace('/no_think', '').strip() }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% if ns.enable_thinking is false %}<think></think>{% else %}<think>\n\n{% endif %}{% endif %}"
)
NEMOTRON_3 = (
    "{% set enable_thinking = enable_thinking if enable_thinking is defined else True %}"
    + TURNS
    + "{{ bos_token + '' }}"
    "{% if add_generation_prompt %}{{ '<think>\n' if enable_thinking else '<think></think>' }}{% endif %}"
)
SWITCHED = {"reasoning_8b": REASONING_8B, "nano_2": NANO_2, "nemotron_3": NEMOTRON_3}


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def prompt_of(template: str, messages: list, think: bool, tokenizer: bool = False, **more) -> str:
    """What the model is shown in the end, by the tokenizer's own method."""
    tok = byte_tokenizer(False)
    tok.bos_token, tok.chat_template = "<unk>", template
    before = copy.deepcopy(messages)
    switched, arguments = reasoning_switch(messages, think=think, chat_template=tok if tokenizer else template)
    assert messages == before
    return tok.apply_chat_template(switched, tokenize=False, **{"add_generation_prompt": True, **arguments, **more})


def ends_open(prompt: str) -> bool:
    return prompt.rstrip().endswith("<think>")


CONVERSATIONS = {
    "a question": [user("What is 2 + 2?")],
    "a system text": [system("Be brief."), user("What is 2 + 2?")],
    "an empty system text": [system(""), user("What is 2 + 2?")],
    "turns": [user("Hi"), assistant("Hello."), user("What is 2 + 2?")],
    "switched off before": [user("Hi /no_think"), assistant("Hello."), user("What is 2 + 2?")],
    "switched on before": [system("Be brief."), user("/think Hi"), assistant("Hello."), user("What is 2 + 2?")],
}


@pytest.mark.core
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("think", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", SWITCHED.values(), ids=SWITCHED)
def test_switched_on_and_off(template: str, messages: list, think: bool) -> None:
    for tokenizer in (False, True):
        prompt = prompt_of(template, messages, think, tokenizer)
        assert ends_open(prompt) is think
        assert prompt.endswith("<think></think>") is not think


@pytest.mark.core
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("think", [True, False])
def test_a_text_in_parts(think: bool) -> None:
    """Of the system too, which the switch is added to as a part of its own."""
    text = "{% macro text(c) %}{{ c if c is string else c | map(attribute='text') | join }}{% endmacro %}"
    joined = text + NANO_2.replace("m.content", "text(m.content)")
    messages = [system([{"type": "text", "text": "Be brief."}]), user([{"type": "text", "text": "What is 2 + 2?"}])]
    assert ends_open(prompt_of(joined, messages, think)) is think
    with pytest.raises(TemplateError):  # a template that takes no parts says it itself
        prompt_of(NANO_2, messages, think)
    with pytest.warns(ReasoningSwitchWarning, match=r"letters out of 'a/thinking'"):
        prompt_of(joined, [*messages, user([{"type": "image"}, {"type": "text", "text": "See a/thinking ."}])], True)


@pytest.mark.core
@pytest.mark.parametrize(
    ("text", "think", "sentence"),
    [
        (
            "See https://x/think for it",
            False,
            "stays on: '/think' in a message overrules think=False.*'https://x/think'",
        ),
        ("Read a/thinking.md", False, "stays on: '/think' in a message overrules think=False.*'a/thinking.md'"),
        ("Hi /think", False, "Reasoning stays on: '/think' in a message overrules think=False"),
        ("/no_think Hi", True, "Reasoning stays off: '/no_think' in a message overrules think=True"),
        ("https://x/think", True, "takes its switch's letters out of 'https://x/think'"),
        ("Is cd ~/no_thinking allowed?", False, "takes its switch's letters out of '~/no_thinking'"),
        ("What does /think do?", True, "takes its switch's letters out of '/think'"),
    ],
)
def test_a_message_that_overrules_the_switch_or_loses_letters_is_said(text: str, think: bool, sentence: str) -> None:
    with pytest.warns(ReasoningSwitchWarning, match=sentence) as said:
        prompt_of(NANO_2, [user(text)], think)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for template in (REASONING_8B, NEMOTRON_3):  # they read nothing in it
            prompt = prompt_of(template, [user(text)], think)
            assert ends_open(prompt) is think and text in prompt


@pytest.mark.core
def test_what_was_overruled_once_is_not_for_ever() -> None:
    """An earlier turn's text is overruled in turn; that its letters are lost is still said."""
    messages = [user("See https://x/think"), assistant("Seen."), user("What is 2 + 2?")]
    with pytest.warns(ReasoningSwitchWarning, match="letters out of 'https://x/think'"):
        assert prompt_of(NANO_2, messages, False).endswith("<think></think>")
    with pytest.warns(ReasoningSwitchWarning, match="letters out of 'a/think'"):
        assert prompt_of(NANO_2, [system("Of a/think"), user("Hi")], False).endswith("<think></think>")
    setting = [system("{'reasoning': True}"), user("Hi")]
    with pytest.warns(ReasoningSwitchWarning, match="'reasoning': True.* in a message overrules think=False"):
        assert ends_open(prompt_of(REASONING_8B, setting, False))


@pytest.mark.core
def test_the_bundled_template_says_what_it_does_not_show() -> None:
    """There `enable_thinking` overrules the words, so what asks for the other way is letters lost too."""
    template = (Path(WORD_PROBLEMS) / "chat_template.jinja").read_text()
    for text in ("See https://x/think now", "Hi /think"):
        with pytest.warns(ReasoningSwitchWarning, match="letters out of"):
            assert prompt_of(template, [user(text)], False).endswith("<think></think>")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ends_open(prompt_of(template, [user("Hi /think")], True))


@pytest.mark.core
@pytest.mark.parametrize("think", [True, False])
@pytest.mark.parametrize(
    "template", [ALIGNED, ALIGNED + "<think>\n", "{# enable_thinking, '/no_think', {'reasoning': True} #}" + ALIGNED]
)
def test_no_switch_is_said(template: str, think: bool) -> None:
    with pytest.warns(ReasoningSwitchWarning, match=f"no switch for reasoning: think={think} changes nothing") as said:
        assert reasoning_switch([user("Hi")], think, template) == ([user("Hi")], {})
    assert len(said) == 1


@pytest.mark.core
@pytest.mark.filterwarnings("error")
def test_nothing_asked_changes_nothing() -> None:
    messages = [user("See https://x/think /no_think")]
    for template in (ALIGNED, *SWITCHED.values()):
        assert reasoning_switch(messages, None, template) == (messages, {})


@pytest.mark.core
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("think", [True, False])
@pytest.mark.parametrize("template", [NANO_2, NEMOTRON_3])
def test_an_answer_that_is_continued(template: str, think: bool) -> None:
    """The prompt that it is judged by is the one before the answer; the answer is gone on with."""
    opened = "{% set last = messages[-1].content if messages[-1].role == 'assistant' else '' %}"
    more = {"add_generation_prompt": False, "continue_final_message": True}
    messages = [user("What is 2 + 2?"), assistant("It is")]
    assert prompt_of(opened + template, messages, think, **more).endswith("It is")
    switched, arguments = reasoning_switch(messages, think, template)
    without, same = reasoning_switch(messages[:-1], think, template)
    assert (switched, arguments) == ([*without, messages[-1]], same)
    text, _ = render_jinja_template([without], chat_template=template, add_generation_prompt=True, bos_token="", **same)
    assert ends_open(text[0]) is think


@pytest.mark.core
def test_what_is_no_template_is_said() -> None:
    for wrong, name in ((None, "NoneType"), ({"default": NANO_2}, "dict")):
        with pytest.raises(
            ValueError, match=f"chat_template is a {name}: pass the text of a template, or the tokenizer"
        ):
            reasoning_switch([user("Hi")], True, wrong)


@pytest.mark.core
def test_a_tokenizers_template_for_tools() -> None:
    tokenizer = byte_tokenizer(False)
    tokenizer.chat_template = {"default": NANO_2, "tool_use": NEMOTRON_3}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    assert reasoning_switch([user("Hi")], False, tokenizer)[0][0] == system("/no_think")
    tokenizer.bos_token = "<unk>"
    assert reasoning_switch([user("Hi")], False, tokenizer, tools=tools) == ([user("Hi")], {"enable_thinking": False})

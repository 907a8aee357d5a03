"""Splitting reasoning from answer: whole, and streamed in every way the text can be cut into tokens."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nemotron_h.generation import ReasoningStreamer, Split, opens_reasoning, reasoning_switch, split_reasoning

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


@pytest.mark.core
def test_switch() -> None:
    user = {"role": "user", "content": "Hi"}
    nano2, nemotron3, reasoning_8b = "..'/no_think' in ..", "{% if enable_thinking %}", "..{'reasoning': True}.."
    assert reasoning_switch([user], True, nemotron3) == ([user], {"enable_thinking": True})
    assert reasoning_switch([user], False, nano2) == ([{"role": "system", "content": "/no_think"}, user], {})
    assert reasoning_switch([{"role": "system", "content": "Be brief."}, user], True, nano2) == (
        [{"role": "system", "content": "Be brief. /think"}, user],
        {},
    )
    assert reasoning_switch([user], True, reasoning_8b)[0][0]["content"] == "{'reasoning': True}"
    assert reasoning_switch([user], True, "{{ messages }}") == ([user], {})

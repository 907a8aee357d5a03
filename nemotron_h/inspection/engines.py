"""Log-probabilities in the JSON that serving engines answer with.

| what | JSON |
|---|---|
| vLLM, the prompt | `prompt_logprobs: [null, {"<id>": {"logprob", "decoded_token"}, ...}]`, alone or in `choices[0]` |
| OpenAI completions (vLLM, SGLang) | `choices[0].logprobs: {"tokens", "token_logprobs"}`; with `echo` the prompt too |
| OpenAI chat, llama.cpp with it | `choices[0].logprobs.content: [{"token", "logprob", "id"?}]` |
| llama.cpp `/completion` | `completion_probabilities: [{"id", "token", "logprob"}]` (before 2025: `content`, `probs`) |
| a list | `[-0.1, ...]`, or `{"token_ids": [...], "logprobs": [...]}` |
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

LEAST = -9999.0
"""What servers write for minus infinity, which JSON has not."""


class Answer(NamedTuple):
    """Of each token its log-probability given those before it, None where there is none; `ids` with -1 where one is
    not said, None where none is."""

    logprobs: list[float | None]
    ids: list[int] | None = None
    tokens: list[str] | None = None


def parse(content: Any) -> Answer | None:
    """The log-probabilities in a JSON value; None where it has none that are known. Other shapes of known keys raise
    `KeyError`, `TypeError`, `AttributeError`, `IndexError` or `ValueError`."""
    if isinstance(content, list):
        return _list(content)
    if not isinstance(content, Mapping):
        return None
    if choices := content.get("choices"):
        inner = {"prompt_logprobs": content.get("prompt_logprobs"), **choices[0]}  # vLLM's chat answers have it beside
        return parse({name: value for name, value in inner.items() if name != "choices"})
    prompt = None if content.get("prompt_logprobs") is None else _vllm(content["prompt_logprobs"])
    found = ((read, content.get(key)) for key, read in _GENERATED.items())
    generated = next((read(value) for read, value in found if value is not None), None)
    ids = content.get("token_ids")
    if generated and generated.ids is None and isinstance(ids, list) and len(ids) == len(generated.logprobs):
        generated = generated._replace(ids=[int(id) for id in ids])
    return _joined(prompt, generated)


def _joined(prompt: Answer | None, generated: Answer | None) -> Answer | None:
    """vLLM gives the prompt's and the generated tokens apart; with `echo` the latter begin with the former."""
    if prompt is None or generated is None:
        return prompt or generated
    if len(generated.logprobs) > len(prompt.logprobs) and generated.logprobs[0] is None:
        return generated
    if prompt.ids is None or generated.ids is None:
        return prompt  # without ids nobody could tell where the generated ones belong
    logprobs, tokens = prompt.logprobs + generated.logprobs, (prompt.tokens or []) + (generated.tokens or [])
    return Answer(logprobs, prompt.ids + generated.ids, tokens if len(tokens) == len(logprobs) else None)


def value(written: Any) -> float | None:
    """A log-probability as it is written."""
    number = None if written is None else float(written)
    return -math.inf if number is not None and number <= LEAST else number


def rows(written: Sequence[Any]) -> Answer:
    """Of objects that have a token, its log-probability and its id."""
    entries = [_row(row or {}) for row in written]
    ids = [int(row["id"]) for row in entries if row.get("id") is not None]
    tokens = [str(row["token"]) for row in entries if row.get("token") is not None]
    return Answer(
        [value(row.get("logprob")) for row in entries],
        ids if len(ids) == len(entries) else None,
        tokens if len(tokens) == len(entries) else None,
    )


def _row(row: Mapping[str, Any]) -> Mapping[str, Any]:
    if "logprob" in row or not {"prob", "probs"} & row.keys():
        return row
    if "prob" in row:  # llama.cpp's post_sampling_probs
        return {**row, "logprob": math.log(row["prob"]) if row["prob"] > 0 else -math.inf}
    # llama.cpp before 2025
    prob = next((each["prob"] for each in row["probs"] if each["tok_str"] == row["content"]), None)
    return {"token": row["content"], "logprob": math.log(prob) if prob else None}


def _list(written: Sequence[Any]) -> Answer | None:
    if all(each is None or isinstance(each, int | float) for each in written):
        return Answer([value(each) for each in written])
    entries = [each for each in written if each is not None]
    if not all(isinstance(each, Mapping) for each in entries):
        return None
    if "logprob" in entries[0]:
        return rows(written)
    return _vllm(written) if all(str(key).lstrip("-").isdigit() for key in entries[0]) else None


def _openai(written: Any) -> Answer | None:
    if not isinstance(written, Mapping):
        return _list(written) if isinstance(written, list) else None
    if written.get("content") is not None:
        return rows(written["content"])
    if written.get("token_logprobs") is None:
        return None
    tokens = [str(token) for token in written["tokens"]]
    # vLLM's --return-tokens-as-token-ids
    ids = [int(id[1]) for token in tokens if (id := re.fullmatch(r"token_id:(\d+)", token))]
    return Answer([value(each) for each in written["token_logprobs"]], ids if len(ids) == len(tokens) else None, tokens)


def _vllm(written: Sequence[Any]) -> Answer:
    """Each position has the token that stood there first, then the likeliest ones, which may be the same."""
    ids: list[int] = []
    tokens: list[str] = []
    logprobs: list[float | None] = []
    for position, row in enumerate(written):
        if not row and position:
            raise ValueError(f"prompt_logprobs has nothing at position {position}")
        # the first token is not said
        id, entry = next(iter(row.items())) if row else (-1, {"logprob": None})
        entry = entry if isinstance(entry, Mapping) else {"logprob": entry}
        ids.append(int(id))
        tokens.append(str(entry.get("decoded_token") or ""))
        logprobs.append(value(entry["logprob"]))
    return Answer(logprobs, ids, tokens if any(tokens) else None)


_GENERATED: dict[str, Callable[[Any], Answer | None]] = {"completion_probabilities": rows, "logprobs": _openai}
"""Key of an answer -> what reads the tokens that were generated."""

"""Teacher-forced log-probabilities of a text, token by token: recorded from a model, read from a serving engine's JSON.

A `Dump` has, for each token of a text, its log-probability given the tokens before it; None where there is none (the
first token always). Two dumps of the same tokens tell whether training and serving compute the same: where they first
part, and by how much. Read are

| what | JSON |
|---|---|
| this module's own | `{"format": "nemotron-h logprobs", "tokens": [{"id", "token", "logprob"}], "layers": [...]}` |
| vLLM, the prompt | `prompt_logprobs: [null, {"<id>": {"logprob", "decoded_token"}, ...}]`, alone or in `choices[0]` |
| OpenAI completions (vLLM, SGLang) | `choices[0].logprobs: {"tokens", "token_logprobs"}`; with `echo` the prompt too |
| OpenAI chat, llama.cpp with it | `choices[0].logprobs.content: [{"token", "logprob", "id"?}]` |
| llama.cpp `/completion` | `completion_probabilities: [{"id", "token", "logprob"}]` (before 2025: `content`, `probs`) |
| a list | `[-0.1, ...]`, or `{"token_ids": [...], "logprobs": [...]}` |

An engine's dump may lack ids, or be of the end of the text alone (what it generated): it is laid against the tokens of
the other dump.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.foreign import plain

FORMAT = "nemotron-h logprobs"
_LEAST = -9999.0
"""What servers write for minus infinity, which JSON has not."""


@dataclass
class Layer:
    """What comes out of one layer: the norm and a digest (a fixed random projection) of each position, (L,) each."""

    name: str
    norms: list[float]
    digests: list[float]


@dataclass
class Dump:
    """`source` is how errors name it. `ids` is None where the JSON has no token ids."""

    source: str
    logprobs: list[float | None]
    ids: list[int] | None = None
    tokens: list[str] | None = None
    layers: list[Layer] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """What else the recording says of itself: model, dtype, versions."""

    def save(self, path: str | Path) -> None:
        """Written whole or not at all.

        Raises:
            ValueError: `path` is there already.
        """
        from ..files import atomic_write

        path = Path(path)
        if path.exists():
            raise ValueError(f"{path} is there already; name another file, or remove it.")
        nothing = [None] * len(self.logprobs)
        rows = [
            {"id": id, "token": token, "logprob": _LEAST if logprob == -math.inf else _number(logprob)}
            for id, token, logprob in zip(self.ids or nothing, self.tokens or nothing, self.logprobs, strict=True)
        ]
        layers = [
            {"name": each.name, "norms": [*map(_number, each.norms)], "digests": [*map(_number, each.digests)]}
            for each in self.layers
        ]
        content = {"format": FORMAT, **self.facts, "tokens": rows, "layers": layers}
        with atomic_write(path) as temporary:
            text = json.dumps(content, ensure_ascii=False, allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")


def _number(value: float | None) -> float | str | None:
    """JSON has no infinity and no NaN: a string, which `float` reads. As null a NaN would be no difference."""
    return value if value is None or math.isfinite(value) else str(value)


@dataclass(frozen=True)
class Parting:
    """The first place where two dumps differ by more than the tolerance."""

    position: int
    token: str | None
    reference: float | None
    other: float | None


@dataclass(frozen=True)
class LayerParting:
    """The first layer, in the model's order, that differs, and the first position in it."""

    name: str
    position: int


@dataclass(frozen=True)
class Comparison:
    """Differences are absolute, in nats, over the `compared` positions that both have.

    `k3` is the mean of r - 1 - ln r with r = exp(other - reference): the estimate of the Kullback-Leibler divergence
    that GRPO trainers log.
    """

    compared: int
    mean: float
    max: float
    k3: float
    first_token: Parting | None
    first_layer: LayerParting | None
    layers_compared: int

    @property
    def same(self) -> bool:
        return self.first_token is None and self.first_layer is None


def record(model: Any, ids: Sequence[int], *, tokenizer: Any = None, layers: bool = False) -> Dump:
    """Log-probabilities of `ids` (L,) by a loaded causal language model, in one forward, teacher-forced.

    Args:
        layers: also norm and digest of what comes out of the embeddings, of every layer and of the last norm.

    Raises:
        ValueError: fewer than two tokens, or ids outside the vocabulary.
    """
    import torch

    if len(ids) < 2:
        raise ValueError(f"The text has {len(ids)} token(s), and the first has no probability; give two or more.")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if outside := [id for id in ids if not 0 <= id < vocabulary]:
        raise ValueError(f"Token id {outside[0]} is outside the model's vocabulary of {vocabulary}; give other tokens.")
    kept: dict[str, list[Any]] = {}
    hooks = [module.register_forward_hook(_keep(kept, name)) for name, module in _watched(model)] if layers else []
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            row = torch.tensor([list(ids)], device=model.device)
            logits_LV = model(input_ids=row, use_cache=False).logits[0, :-1]
            # float64 of a few rows at a time: the vocabulary is large.
            rows = zip(logits_LV.split(256), row[0, 1:].split(256), strict=True)
            chosen_L = torch.cat([part.double().log_softmax(-1).gather(1, next[:, None])[:, 0] for part, next in rows])
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    recorded = []
    for name, pieces in kept.items():
        x_LD = torch.cat(pieces)
        # Random signs that depend on the width alone: what permutes or flips the stream keeps its norm, not this.
        signs_D = torch.randint(2, x_LD.shape[1:], generator=torch.Generator().manual_seed(x_LD.shape[1])) * 2.0 - 1
        digests = x_LD @ signs_D.double() / math.sqrt(x_LD.shape[1])
        recorded.append(Layer(name, _plain(x_LD.norm(dim=-1)), _plain(digests)))
    import transformers

    facts = {
        "model": str(model.config._name_or_path),
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    names = tokenizer.convert_ids_to_tokens(list(ids)) if tokenizer is not None else [str(id) for id in ids]
    return Dump("the model", [None, *_plain(chosen_L)], list(ids), names, recorded, facts)


def _plain(values: Any) -> list[float]:
    return [float(value) for value in values]


def _watched(model: Any) -> list[tuple[str, Any]]:
    if hasattr(model, "get_base_model"):  # PEFT's wrapper
        model = model.get_base_model()
    base = model.base_model
    kinds = model.config.layers_block_type
    named = [(f"layer {index} ({kinds[index]})", layer) for index, layer in enumerate(base.layers)]
    return [("embeddings", model.get_input_embeddings()), *named, ("last norm", base.norm_f)]


def _keep(kept: dict[str, list[Any]], name: str) -> Any:
    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        # Several times over where the model takes a long text in pieces.
        x_LD = (output[0] if isinstance(output, tuple) else output)[0]
        kept.setdefault(name, []).append(x_LD.detach().double().cpu())

    return hook


def read(path: str | Path) -> Dump:
    """A dump from a file, in any of the shapes of the module's table.

    Raises:
        ValueError: the file is no JSON, or has none of them.
    """
    try:
        content = json.loads(plain(Path(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); name a file that has one JSON value.") from error
    try:
        dump = _parse(content)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{path} has log-probabilities in an unknown shape ({error!r}); see nemotron_h.inspection.logprobs."
        ) from error
    if dump is None:
        raise ValueError(
            f"{path} has no log-probabilities that are known here (prompt_logprobs, logprobs, "
            "completion_probabilities); ask the server for them, or write a list."
        )
    dump.source = str(path)
    if not any(value is not None for value in dump.logprobs):
        raise ValueError(f"{path} has no log-probability at any token; ask the server for them.")
    return dump


def _parse(content: Any) -> Dump | None:
    if isinstance(content, list):
        if all(value is None or isinstance(value, int | float) for value in content):
            return Dump("", _values(content))
        if all(value is None or isinstance(value, Mapping) for value in content):
            rows = [value for value in content if value is not None]
            if rows and "logprob" in rows[0]:
                return _from_rows(content)
            return _from_vllm(content) if rows and all(str(key).lstrip("-").isdigit() for key in rows[0]) else None
        return None
    if not isinstance(content, Mapping):
        return None
    if content.get("format") == FORMAT:
        dump = _from_rows(content["tokens"])
        dump.layers = [
            Layer(each["name"], _plain(each["norms"]), _plain(each["digests"])) for each in content.get("layers", ())
        ]
        dump.facts = {name: value for name, value in content.items() if name not in ("format", "tokens", "layers")}
        return dump
    if choices := content.get("choices"):
        inner = dict(choices[0])
        inner.setdefault("prompt_logprobs", content.get("prompt_logprobs"))  # vLLM's chat answers have it beside
        return _parse({name: value for name, value in inner.items() if name != "choices"})
    if content.get("completion_probabilities") is not None:
        return _from_rows([_old_llama_cpp(row) for row in content["completion_probabilities"]])
    prompt, generated = content.get("prompt_logprobs"), content.get("logprobs")
    first = _from_vllm(prompt) if prompt is not None else None
    ids = content.get("token_ids")
    second: Dump | None = None
    if isinstance(generated, Mapping) and generated.get("content") is not None:
        second = _from_rows(generated["content"])
    elif isinstance(generated, Mapping) and generated.get("token_logprobs") is not None:
        second = _from_openai(generated)
    elif isinstance(generated, list):
        second = _parse(generated)
    if second is not None and second.ids is None and isinstance(ids, list) and len(ids) == len(second.logprobs):
        second.ids = [int(id) for id in ids]
    return _joined(first, second)


def _joined(prompt: Dump | None, generated: Dump | None) -> Dump | None:
    """vLLM gives the prompt's and the generated tokens apart; with `echo` the latter begin with the former."""
    if prompt is None or generated is None:
        return prompt or generated
    n = len(prompt.logprobs)
    if len(generated.logprobs) > n and generated.logprobs[0] is None:
        return generated
    if prompt.ids is None or generated.ids is None:
        return prompt  # without ids nobody could tell where the generated ones belong
    tokens = [*(prompt.tokens or []), *(generated.tokens or [])]
    return Dump(
        "",
        [*prompt.logprobs, *generated.logprobs],
        [*prompt.ids, *generated.ids],
        tokens if len(tokens) == n + len(generated.logprobs) else None,
    )


def _value(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    return -math.inf if number <= _LEAST else number


def _values(values: Sequence[Any]) -> list[float | None]:
    return [_value(value) for value in values]


def _from_rows(rows: Sequence[Any]) -> Dump:
    rows = [row if row is not None else {} for row in rows]
    ids = [int(row["id"]) for row in rows if row.get("id") is not None]
    tokens = [row.get("token") for row in rows]
    return Dump(
        "",
        [_value(row.get("logprob")) for row in rows],
        ids if len(ids) == len(rows) else None,
        [str(token) for token in tokens] if all(token is not None for token in tokens) else None,
    )


def _from_openai(logprobs: Mapping[str, Any]) -> Dump:
    tokens = [str(token) for token in logprobs["tokens"]]
    # vLLM's --return-tokens-as-token-ids
    ids = [re.fullmatch(r"token_id:(\d+)", token) for token in tokens]
    return Dump("", _values(logprobs["token_logprobs"]), [int(id[1]) for id in ids if id] if all(ids) else None, tokens)


def _old_llama_cpp(row: Mapping[str, Any]) -> Mapping[str, Any]:
    if "logprob" in row:
        return row
    if "prob" in row:  # post_sampling_probs
        return {**row, "logprob": math.log(row["prob"]) if row["prob"] > 0 else -math.inf}
    prob = next((each["prob"] for each in row["probs"] if each["tok_str"] == row["content"]), None)
    return {"token": row["content"], "logprob": math.log(prob) if prob else None}


def _from_vllm(rows: Sequence[Any]) -> Dump:
    """Each position has the token that stood there first, then the likeliest ones, which may be the same."""
    ids: list[int] = []
    tokens: list[str] = []
    logprobs: list[float | None] = []
    for position, row in enumerate(rows):
        if not row:
            if position:
                raise ValueError(f"prompt_logprobs has nothing at position {position}")
            ids.append(-1)  # the first token is not said
            tokens.append("")
            logprobs.append(None)
            continue
        id, entry = next(iter(row.items()))
        ids.append(int(id))
        tokens.append(str(entry.get("decoded_token") or "") if isinstance(entry, Mapping) else "")
        logprobs.append(_value(entry["logprob"] if isinstance(entry, Mapping) else entry))
    return Dump("", logprobs, ids, tokens if any(tokens) else None)


def compare(reference: Dump, other: Dump, tolerance: float = 0.0) -> Comparison:
    """Both on the positions that both have; a shorter one is the start or the end of the other's text.

    Args:
        tolerance: in nats for the tokens; for layers, over the reference's largest norm.

    Raises:
        ValueError: recorded of different tokens, or nothing in common.
    """
    n, m = len(reference.logprobs), len(other.logprobs)
    start = _start(reference, other) if n >= m else _start(other, reference)
    length = min(n, m)
    ours = reference.logprobs[start : start + length] if n >= m else reference.logprobs
    theirs = other.logprobs if n >= m else other.logprobs[start : start + length]
    pairs = [(at, a, b) for at, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a is not None and b is not None]
    if not pairs:
        raise ValueError(f"{reference.source} and {other.source} have no position in common; record the same text.")
    differences = [_difference(a, b) for _, a, b in pairs]
    first = None
    for (at, a, b), difference in zip(pairs, differences, strict=True):
        if not difference <= tolerance:
            named, shift = (reference, n >= m) if reference.tokens else (other, n < m)
            token = named.tokens[at + start * shift] if named.tokens else None
            first = Parting(at + start, token, a, b)
            break
    layer, layers = _first_layer(reference, other, tolerance)
    k3 = sum(_k3(b - a) if difference else 0.0 for (_, a, b), difference in zip(pairs, differences, strict=True))
    mean = sum(differences) / len(pairs)
    return Comparison(len(pairs), mean, max(differences), k3 / len(pairs), first, layer, layers)


def _difference(a: float, b: float) -> float:
    """NaN on one side alone is an infinite difference, and so is one infinity."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    return math.inf if math.isnan(a - b) else abs(a - b)


def _k3(log_ratio: float) -> float:
    return math.expm1(log_ratio) - log_ratio if -math.inf < log_ratio < 700 else math.inf


def _start(long: Dump, short: Dump) -> int:
    """Where in the longer text the shorter one begins; where its tokens fit at both ends, the closer numbers decide."""
    n, m = len(long.logprobs), len(short.logprobs)
    if long.ids is None or short.ids is None:
        return n - m  # an engine's answer, without ids: the end of the text, or all of it
    fits = []
    for start in dict.fromkeys((0, n - m)):
        # A negative id is one that the dump does not say.
        parting = [
            at for at, (a, b) in enumerate(zip(long.ids[start:], short.ids, strict=False)) if a != b and min(a, b) >= 0
        ]
        if not parting:
            fits.append(start)
    if fits and short.logprobs[0] is None:  # as of a text's first token alone
        return fits[0]
    if fits:
        return min(fits, key=lambda start: _distance(long.logprobs[start : start + m], short.logprobs))
    if n != m:
        raise ValueError(
            f"{short.source} has {m} tokens that are neither the start nor the end of the {n} of {long.source}; record "
            "the same text with the same tokenizer."
        )
    raise ValueError(
        f"{long.source} and {short.source} are of different tokens (at position {parting[0]}, {long.ids[parting[0]]} "
        f"and {short.ids[parting[0]]}); record the same text with the same tokenizer."
    )


def _distance(ours: Sequence[float | None], theirs: Sequence[float | None]) -> tuple[float, float]:
    """The share of differences that are infinite, and the mean of the others."""
    pairs = zip(ours, theirs, strict=True)
    differences = [_difference(a, b) for a, b in pairs if a is not None and b is not None]
    if not differences:
        return math.inf, math.inf
    finite = [difference for difference in differences if math.isfinite(difference)]
    return 1 - len(finite) / len(differences), sum(finite) / max(1, len(finite))


def _first_layer(reference: Dump, other: Dump, tolerance: float) -> tuple[LayerParting | None, int]:
    """Layers are compared on the positions from the start that both have."""
    theirs = {layer.name: layer for layer in other.layers}
    both = [(layer, theirs[layer.name]) for layer in reference.layers if layer.name in theirs]
    for ours, its in both:
        scale = max((value for value in ours.norms if math.isfinite(value)), default=0.0) or 1.0
        rows = zip(ours.norms, ours.digests, its.norms, its.digests, strict=False)
        for position, (norm, digest, its_norm, its_digest) in enumerate(rows):
            if not max(_difference(norm, its_norm), _difference(digest, its_digest)) <= tolerance * scale:
                return LayerParting(ours.name, position), len(both)
    return None, len(both)


__all__ = ["Comparison", "Dump", "Layer", "LayerParting", "Parting", "compare", "read", "record"]

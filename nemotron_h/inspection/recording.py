"""What a model computes of a text, recorded token by token, in a file where it is to be kept.

A `Recording` has the log-probability of each token given those before it, and tensors with a row for each:

| tensor | shape | |
|---|---|---|
| `hidden_states.0` | (L, D) | what comes out of the embeddings |
| `hidden_states.N` | (L, D) | what comes out of the N-th layer, from 1; the residual stream, before the last norm |
| `norm_f` | (L, D) | what comes out of the last norm |
| `logits` | (L, V) | |
| `log_probs` | (L, V) | natural logarithm, in place of `logits` |
| `embeddings`, `layer I (KIND)`, `last norm` | (L, 2) | norm and digest (a fixed random projection) of the same |

Any of them may be missing. There are two kinds of files, which anything may have written:

- `.safetensors` and `.npz` have `input_ids`, (L,) or (1, L), and the tensors but for the last row's;
- JSON has the log-probabilities and the last row's tensors: `{"format": "nemotron-h logprobs", "tokens": [{"id",
  "token", "logprob"}], "layers": [{"name", "norms", "digests"}]}`, or is what a serving engine answered (`engines.py`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.foreign import plain
from ..files import atomic_write
from . import engines

FORMAT = "nemotron-h logprobs"
SUFFIXES = (".safetensors", ".npz")
"""Of the files with whole tensors."""
HIDDEN = re.compile(r"hidden_states\.(\d+)")


@dataclass
class Recording:
    """`source` is how errors name it. `ids` is None where the file has no token ids, one of them -1 where it is not
    said. `logprobs` has None where there is none: at the first token always."""

    source: str
    logprobs: list[float | None]
    ids: list[int] | None = None
    tokens: list[str] | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    """The kinds of the layers, where a model was at hand."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else a JSON file says: model, dtype, versions."""

    def save(self, path: str | Path) -> None:
        """Whole tensors to .safetensors or .npz, as the name ends; where there are none, JSON.

        Raises:
            ValueError: another ending, or `path` is there already.
        """
        path = Path(path)
        check_new(path, SUFFIXES if self.whole() else None)
        write = _WRITERS[path.suffix] if self.whole() else _write_json
        with atomic_write(path) as temporary:
            write(self, temporary)

    def whole(self) -> dict[str, Tensor]:
        """The tensors that are no digests."""
        return {name: tensor for name, tensor in self.tensors.items() if order(name) is not None}


def check_new(path: Path, suffixes: Sequence[str] | None = None) -> None:
    """Raises `ValueError` where a recording cannot be written to `path`: it is there, or ends otherwise."""
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"{path} is neither {' nor '.join(suffixes)}; name a file that ends so.")
    if path.exists():
        raise ValueError(f"{path} is there already; name another file, or remove it.")


def order(name: str) -> float | None:
    """Where in the model a whole tensor is; None for one that is not known, or for digests."""
    if match := HIDDEN.fullmatch(name):
        return int(match[1])
    return {"norm_f": math.inf, "logits": math.inf, "log_probs": math.inf}.get(name)


@torch.no_grad()
def record(
    model: Any, ids: Sequence[int], *, tokenizer: Any = None, layers: bool = False, whole: bool = False
) -> Recording:
    """What a loaded causal language model computes of `ids` (L,), in one forward.

    Args:
        tokenizer: gives the tokens' names.
        layers: also norm and digest of what comes out of the embeddings, of every layer and of the last norm.
        whole: in their place those tensors themselves, and the logits.

    Raises:
        ValueError: fewer than two tokens, unless `whole`; ids outside the vocabulary.
    """
    import transformers

    ids = [int(id) for id in ids]
    if len(ids) < 2 and not whole:
        raise ValueError(f"The text has {len(ids)} token(s), and the first has no probability; give two or more.")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if outside := [id for id in ids if not 0 <= id < vocabulary]:
        raise ValueError(f"Token id {outside[0]} is outside the model's vocabulary of {vocabulary}; give other tokens.")
    kept: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_hook(_keep(kept, name if whole else label, whole))
        for name, label, module in (_watched(model) if layers or whole else ())
    ]
    training = model.training
    try:
        model.eval()
        row_L = torch.tensor(ids, device=model.device)
        logits_LV = model(input_ids=row_L[None], use_cache=False).logits[0]
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    # float64 of a few rows at a time: the vocabulary is large.
    rows = zip(logits_LV[:-1].split(256), row_L[1:].split(256), strict=True)
    chosen = [part.double().log_softmax(-1).gather(1, next[:, None])[:, 0].tolist() for part, next in rows]
    tensors = {name: torch.cat(chunks) for name, chunks in kept.items()} | (
        {"logits": logits_LV.cpu()} if whole else {}
    )
    facts = {
        "model": str(model.config._name_or_path),
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    names = tokenizer.convert_ids_to_tokens(ids) if tokenizer is not None else [str(id) for id in ids]
    kinds = tuple(model.config.layers_block_type)
    return Recording("the model", [None, *chain.from_iterable(chosen)], ids, names, tensors, kinds, facts)


def _watched(model: Any) -> list[tuple[str, str, Any]]:
    """The name of a whole tensor, that of its digests, and the module that gives it."""
    if hasattr(model, "get_base_model"):  # PEFT's wrapper
        model = model.get_base_model()
    base, kinds = model.base_model, model.config.layers_block_type
    modules = [model.get_input_embeddings(), *base.layers]
    named = [(f"hidden_states.{index}", label(index, kinds), module) for index, module in enumerate(modules)]
    return [*named, ("norm_f", "last norm", base.norm_f)]


def label(index: int, kinds: Sequence[str]) -> str:
    """What `hidden_states.INDEX` comes out of, in words."""
    if index == 0:
        return "embeddings"
    return f"layer {index - 1} ({kinds[index - 1]})" if index <= len(kinds) else f"layer {index - 1}"


def _keep(kept: dict[str, list[Tensor]], name: str, whole: bool) -> Callable[..., None]:
    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        # Several times over in a chunked prefill.
        x_LD = (output[0] if isinstance(output, tuple) else output)[0].detach()
        kept.setdefault(name, []).append(x_LD.cpu().clone() if whole else _digests(x_LD.double().cpu()))

    return hook


def _digests(x_LD: Tensor) -> Tensor:
    """Norm and digest of each position, (L, 2)."""
    width = x_LD.shape[1]
    # Random signs that depend on the width alone: what permutes or flips the stream keeps its norm, not this.
    signs_D = torch.randint(2, (width,), generator=torch.Generator().manual_seed(width)) * 2.0 - 1
    return torch.stack([x_LD.norm(dim=-1), x_LD @ signs_D.double() / math.sqrt(width)], dim=-1)


def is_recording(path: str | Path) -> bool:
    """Whether it is a file that has whole tensors, by its name."""
    return Path(path).is_file() and Path(path).suffix in SUFFIXES


def read(path: str | Path) -> Recording:
    """A recording from a file of either kind, or of an engine's.

    Raises:
        ValueError: it cannot be read, or has nothing that is known here.
    """
    return _read_tensors(Path(path)) if Path(path).suffix in SUFFIXES else _read_json(path)


def _read_tensors(path: Path) -> Recording:
    try:
        if path.suffix == ".npz":
            import numpy

            with numpy.load(path, allow_pickle=False) as arrays:
                tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        else:
            from safetensors.torch import load_file

            tensors = load_file(path)
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({error}): record it again.") from error
    ids = tensors.pop("input_ids", None)
    if ids is None:
        raise ValueError(f"{path} has no input_ids; record the tokens as well.")
    rows = {name: tensor.squeeze(0) if tensor.ndim == 3 else tensor for name, tensor in tensors.items()}
    if not (known := {name: tensor for name, tensor in rows.items() if order(name) is not None}):
        raise ValueError(f"{path} has neither logits, log_probs nor hidden_states.N; record one of them.")
    numbers = ids.reshape(-1).long().tolist()
    return Recording(str(path), [None] * len(numbers), numbers, tensors=known)


def _read_json(path: str | Path) -> Recording:
    try:
        content = json.loads(plain(Path(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); name a file that has one JSON value.") from error
    ours = isinstance(content, Mapping) and content.get("format") == FORMAT
    try:
        answer = engines.rows(content["tokens"]) if ours else engines.parse(content)
        layers = content.get("layers", ()) if ours else ()
        tensors = {
            each["name"]: torch.tensor(
                [[*map(float, each[part])] for part in ("norms", "digests")], dtype=torch.float64
            ).T
            for each in layers
        }
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{path} has log-probabilities in an unknown shape ({error!r}); see nemotron_h.inspection.engines."
        ) from error
    if answer is None:
        raise ValueError(
            f"{path} has no log-probabilities that are known here (prompt_logprobs, logprobs, "
            "completion_probabilities); ask the server for them, or write a list."
        )
    if not any(each is not None for each in answer.logprobs):
        raise ValueError(f"{path} has no log-probability at any token; ask the server for them.")
    facts = {key: each for key, each in content.items() if key not in ("format", "tokens", "layers")} if ours else {}
    return Recording(str(path), *answer, tensors=tensors, facts=facts)


def _write_json(recording: Recording, path: Path) -> None:
    nothing = [None] * len(recording.logprobs)
    columns = zip(recording.ids or nothing, recording.tokens or nothing, recording.logprobs, strict=True)
    rows = [
        {"id": id, "token": token, "logprob": engines.LEAST if logprob == -math.inf else _number(logprob)}
        for id, token, logprob in columns
    ]
    layers = [
        {"name": name, "norms": [*map(_number, norms)], "digests": [*map(_number, digests)]}
        for name, tensor in recording.tensors.items()
        if order(name) is None
        for norms, digests in [tensor.T.tolist()]
    ]
    content = {"format": FORMAT, **recording.facts, "tokens": rows, "layers": layers}
    path.write_text(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _number(value: float | None) -> float | str | None:
    """JSON has no infinity and no NaN: a string, which `float` reads. As null a NaN would be no difference."""
    return value if value is None or math.isfinite(value) else str(value)


def _write_npz(recording: Recording, path: Path) -> None:
    import numpy

    # numpy has no bfloat16
    whole = {name: each.float() if each.dtype == torch.bfloat16 else each for name, each in recording.whole().items()}
    arrays: dict[str, Any] = {name: each.numpy() for name, each in whole.items()}
    with open(path, "wb") as file:
        numpy.savez(file, input_ids=numpy.asarray(recording.ids), **arrays)


def _write_safetensors(recording: Recording, path: Path) -> None:
    from safetensors.torch import save_file

    whole = {name: tensor.contiguous() for name, tensor in recording.whole().items()}
    save_file({"input_ids": torch.tensor(recording.ids), **whole}, path)


_WRITERS = {".npz": _write_npz, ".safetensors": _write_safetensors}

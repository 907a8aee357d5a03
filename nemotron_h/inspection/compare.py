"""Whether two checkpoints are the same function: hidden states layer by layer, then logits, on the same tokens.

A `Recording` holds what a model computes of one text; it is made from a folder, or read from a file that anything may
have written (`.safetensors` or `.npz`):

| tensor | shape | |
|---|---|---|
| `input_ids` | (L,) or (1, L) | always |
| `hidden_states.0` | (L, D) | what comes out of the embeddings |
| `hidden_states.N` | (L, D) | what comes out of the N-th layer, from 1; the residual stream, before the last norm |
| `norm_f` | (L, D) | what comes out of the last norm |
| `logits` | (L, V) | |
| `log_probs` | (L, V) | natural logarithm, in place of `logits` |

Any of them but `input_ids` may be missing; what both recordings have is compared. One model is in memory at a time.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import atomic_write

SUFFIXES = (".safetensors", ".npz")
_HIDDEN = re.compile(r"hidden_states\.(\d+)")


@dataclass
class Recording:
    """`source` is how errors and tables name it; `tensors` has the names of the table above, but for `input_ids`."""

    source: str
    input_ids: Tensor
    tensors: dict[str, Tensor]
    kinds: tuple[str, ...] = ()
    """The kinds of the layers, where a model was at hand."""

    def save(self, path: str | Path) -> None:
        path = Path(path)
        tensors = {"input_ids": self.input_ids, **self.tensors}
        if path.suffix == ".npz":
            import numpy

            arrays: dict[str, Any] = {name: _exact(tensor).numpy() for name, tensor in tensors.items()}
            with atomic_write(path) as temporary, open(temporary, "wb") as file:
                numpy.savez(file, **arrays)
        elif path.suffix == ".safetensors":
            from safetensors.torch import save_file

            with atomic_write(path) as temporary:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        else:
            raise ValueError(f"{path} is neither .safetensors nor .npz; name a file that ends so.")


def _exact(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor  # numpy has no bfloat16


def is_recording(path: str | Path) -> bool:
    return Path(path).is_file() and Path(path).suffix in SUFFIXES


def read_recording(path: str | Path) -> Recording:
    """Raises `ValueError` for a file that is cut short, has no `input_ids` or nothing to compare."""
    try:
        if Path(path).suffix == ".npz":
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
    known = {name: _rows(tensor) for name, tensor in tensors.items() if _order(name) is not None}
    if not known:
        raise ValueError(f"{path} has neither logits, log_probs nor hidden_states.N; record one of them.")
    return Recording(str(path), ids.reshape(-1).long(), known)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.squeeze(0) if tensor.ndim == 3 else tensor


def _order(name: str) -> float | None:
    """Where in the model a recorded tensor is; None for one that is not known."""
    if match := _HIDDEN.fullmatch(name):
        return int(match[1])
    return {"norm_f": math.inf, "logits": math.inf, "log_probs": math.inf}.get(name)


@torch.no_grad()
def record(folder: str | Path, input_ids: Tensor, dtype: str | torch.dtype = "float32") -> Recording:
    """What the model in a folder computes of `input_ids` (L,).

    Raises:
        ValueError: ids outside its vocabulary; what `from_pretrained` raises.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    if (largest := int(input_ids.max())) >= model.config.vocab_size:
        raise ValueError(
            f"The tokens have id {largest} and {folder} a vocabulary of {model.config.vocab_size}: give other tokens."
        )
    kept: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            # Several times over where the model takes a long text in pieces.
            kept.setdefault(name, []).append((output[0] if isinstance(output, tuple) else output)[0].cpu().clone())

        return hook

    modules = [model.model.embeddings, *model.model.layers]
    hooks = [module.register_forward_hook(keep(f"hidden_states.{i}")) for i, module in enumerate(modules)]
    hooks.append(model.model.norm_f.register_forward_hook(keep("norm_f")))
    try:
        logits = model(input_ids[None], use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    tensors = {name: torch.cat(pieces) for name, pieces in kept.items()}
    return Recording(str(folder), input_ids, {**tensors, "logits": logits}, tuple(model.config.layers_block_type))


@dataclass(frozen=True)
class Row:
    """One tensor that both have. `difference` is the largest, over the reference's largest finite magnitude `scale`."""

    name: str
    label: str
    difference: float
    scale: float


@dataclass(frozen=True)
class Comparison:
    rows: tuple[Row, ...]
    same_best_token: float | None
    """How often both like the same next token best; None without logits."""

    def first_above(self, tolerance: float) -> Row | None:
        """The first, in the model's order, that differs by more; NaN on one side alone is an infinite difference."""
        return next((row for row in self.rows if not row.difference <= tolerance), None)


def compare(reference: Recording, other: Recording) -> Comparison:
    """What both recordings have, in the model's order.

    Raises:
        ValueError: recorded of different tokens, or nothing in common.
    """
    if not torch.equal(reference.input_ids, other.input_ids):
        raise ValueError(
            f"{reference.source} and {other.source} are of different tokens ({len(reference.input_ids)} and "
            f"{len(other.input_ids)}): record both of the same."
        )
    ours, theirs = _comparable(reference, other)
    names = sorted(ours.keys() & theirs.keys(), key=lambda name: (_order(name) or 0.0, name == "logits"))
    if not names:
        raise ValueError(f"{reference.source} and {other.source} have no tensor in common: record one of both.")
    kinds = reference.kinds or other.kinds
    rows = tuple(_row(name, ours[name], theirs[name], kinds) for name in names)
    same = None
    head = next((name for name in ("logits", "log_probs") if name in names), None)
    if head and ours[head].shape == theirs[head].shape:
        same = (ours[head].argmax(-1) == theirs[head].argmax(-1)).double().mean().item()
    return Comparison(rows, same)


def _comparable(a: Recording, b: Recording) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Their tensors; where one has logits and the other log-probabilities, both as the latter."""
    mine, other = dict(a.tensors), dict(b.tensors)
    if ("logits" in mine) != ("logits" in other):
        for tensors in (mine, other):
            if "logits" in tensors:
                tensors["log_probs"] = tensors.pop("logits").double().log_softmax(-1)
    return mine, other


def _row(name: str, reference: Tensor, other: Tensor, kinds: tuple[str, ...]) -> Row:
    label = {"norm_f": "last norm", "log_probs": "log-probabilities"}.get(name, name)
    if match := _HIDDEN.fullmatch(name):
        number = int(match[1])
        kind = f" ({kinds[number - 1]})" if 0 < number <= len(kinds) else ""
        label = f"layer {number - 1}{kind}" if number else "embeddings"
    finite = reference[reference.isfinite()].double().abs()
    scale = finite.max().item() if finite.numel() else 0.0
    if reference.shape != other.shape:
        return Row(name, f"{label}, {list(reference.shape)} and {list(other.shape)}", math.inf, scale)
    difference = (reference.double() - other.double()).abs()
    equal = (reference == other) | (reference.isnan() & other.isnan())  # infinities, which have no difference
    largest = difference.masked_fill(equal, 0.0).max().item()
    if not math.isfinite(largest):
        return Row(name, label, math.inf, scale)
    return Row(name, label, largest / scale if scale else (math.inf if largest else 0.0), scale)

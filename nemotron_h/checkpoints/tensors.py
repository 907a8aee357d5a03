"""Tensors by name, read one at a time, and plans that make a checkpoint of one layout out of another's.

A format is a table: which tensors of the source, with which shapes, make each tensor of the result (`Entry`). The
table is checked as a whole before anything is read or written (`Plan.check`), and can be printed (`Plan.lines`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..sizes import DTYPES, Shape, Spec
from .foreign import plain, weight_map

__all__ = ["DTYPES", "Entry", "Plan", "SafetensorsFolder", "Shape", "Spec", "Tensors", "concatenated", "narrowed"]


class Tensors(Protocol):
    """A checkpoint's tensors, whatever its files: known by name, read one at a time."""

    @property
    def path(self) -> Path:
        """The folder or file, as errors name it."""

    @property
    def specs(self) -> Mapping[str, Spec]: ...

    @property
    def files(self) -> Sequence[Path]:
        """What it is read from."""

    def read(self, name: str) -> Tensor:
        """A tensor, which the caller must not write into; no other stays in memory for it."""


class SafetensorsFolder:
    """The `*.safetensors` of a folder.

    Raises:
        ValueError: there are none; a file that the index names is not there; a file is cut short or is no
            safetensors file; two files have one tensor. Each names the file, and the first tensor that is gone with it.
    """

    _MAPPED = 64 << 20  # a file is closed after so many bytes were read from it, and its pages leave memory

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._where: dict[str, Path] = {}
        self.specs: dict[str, Spec] = {}
        self.files = self._files()
        for file in self.files:
            try:
                with safe_open(plain(file), framework="pt") as opened:
                    for name in opened.keys():
                        part = opened.get_slice(name)
                        dtype = DTYPES.get(part.get_dtype())
                        if dtype is None:
                            raise ValueError(f"{file} holds {name} as {part.get_dtype()}, which torch does not know.")
                        if name in self.specs:
                            raise ValueError(
                                f"{self.path} has {name} in {self._where[name].name} and in {file.name}: take one of "
                                "the files out."
                            )
                        self.specs[name] = Spec(tuple(part.get_shape()), dtype)
                        self._where[name] = file
            except (SafetensorError, OSError) as error:
                lost = _first_cut(file)
                lost = f", from the tensor {lost} on" if lost else ""
                raise ValueError(f"{file} cannot be read{lost} ({error}): fetch or write it again.") from error
        self._open: tuple[Path, Any] | None = None
        self._read_bytes = 0

    def _files(self) -> list[Path]:
        files = sorted(self.path.glob("*.safetensors"))
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            found = weight_map(index)
            files = [self.path / file for file in sorted(set(found.values()))]
            for name, file in found.items():
                if not (self.path / file).exists():
                    raise ValueError(f"{self.path} lacks {file}, which has the tensor {name}: fetch or write it again.")
            single = self.path / "model.safetensors"
            if single.exists() and single not in files:
                raise ValueError(
                    f"{self.path} has {single.name} and an index that names {files[0].name}, two models: take one out."
                )
        if not files:
            raise ValueError(f"{self.path} has no *.safetensors; name a folder with a model's weights.")
        return files

    def read(self, name: str, index: int | slice | None = None) -> Tensor:
        """A tensor, or only a part along the first dimension."""
        file = self._where[name]
        if self._open is None or self._open[0] != file or self._read_bytes > self._MAPPED:
            self._open, self._read_bytes = (file, safe_open(file, framework="pt").__enter__()), 0
        opened = self._open[1]
        value: Tensor = opened.get_tensor(name) if index is None else opened.get_slice(name)[index]
        self._read_bytes += value.nbytes
        return value


def _first_cut(file: Path) -> str | None:
    """The first tensor whose bytes are past the end of a safetensors file, where its header can still be read."""
    try:
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            size = file.stat().st_size
            header = json.loads(opened.read(min(length, size)))
        header.pop("__metadata__", None)
        ends = [(entry["data_offsets"], name) for name, entry in header.items()]
        return min(((end, name) for end, name in ends if end[1] > size - 8 - length), default=(None, None))[1]
    except Exception:  # whatever a damaged header makes of it: there is just no name to tell
        return None


@dataclass(frozen=True)
class Entry:
    """One tensor of the result.

    `sources` are the names it is made of and the shapes they must have, in the order in which `make` takes them;
    without `make` it is its only source as it is.
    """

    name: str
    spec: Spec
    sources: Mapping[str, Shape]
    make: Callable[..., Tensor] | None = None

    def read(self, source: Tensors) -> Tensor:
        """Its value, contiguous, with the shape and dtype that `spec` promises."""
        parts = [source.read(name) for name in self.sources]
        value = self.make(*parts) if self.make else parts[0]
        assert tuple(value.shape) == self.spec.shape, f"{self.name}: {tuple(value.shape)} is not {self.spec.shape}"
        return narrowed(value, self.spec.dtype, self.name).contiguous()


def concatenated(*parts: Tensor) -> Tensor:
    """The parts by rows; one alone is not copied."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def narrowed(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`value` in `dtype`. Raises `ValueError` where a number becomes infinite."""
    stored = value.to(dtype)
    if dtype.is_floating_point and torch.finfo(dtype).max < torch.finfo(value.dtype).max:
        if bool((stored.isinf() & value.isfinite()).any()):
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(f"{name} has values that {kind} cannot hold; write bfloat16 or float32.")
    return stored


@dataclass
class Plan:
    """Everything that a conversion writes. `unused` names source tensors that are left out on purpose, and why."""

    source: Tensors
    entries: list[Entry]
    unused: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Raises `ValueError` at the first source tensor that is missing, has another shape, or is left over."""
        specs, needed = self.source.specs, Counter(name for entry in self.entries for name in entry.sources)
        twice = [name for name, n in Counter(entry.name for entry in self.entries).items() if n > 1]
        assert not twice, f"{twice[0]} is written twice"
        where = self.source.path
        if missing := [name for name in needed if name not in specs]:
            raise ValueError(
                f"{where} lacks the tensor {missing[0]}{_others(missing)}, which its config asks for: "
                "fetch or write the checkpoint again."
            )
        for entry in self.entries:
            for name, shape in entry.sources.items():
                if specs[name].shape != tuple(shape):
                    raise ValueError(
                        f"{where} has {name} with shape {specs[name].shape} where its config asks for {tuple(shape)}: "
                        "correct the config, or fetch or write the checkpoint again."
                    )
        if left := self.left_over():
            raise ValueError(
                f"{where} has the tensor {left[0]}{_others(left)}, which no layer of its config has: correct the "
                "config, or take the tensor out."
            )

    def left_over(self) -> list[str]:
        """Source tensors that nothing is made of and that are not left out on purpose."""
        needed = {name for entry in self.entries for name in entry.sources} | set(self.unused)
        return [name for name in self.source.specs if name not in needed]

    def missing(self) -> list[str]:
        """Source tensors that entries are made of and that are not there."""
        return list(dict.fromkeys(n for entry in self.entries for n in entry.sources if n not in self.source.specs))

    @property
    def nbytes(self) -> int:
        return sum(entry.spec.nbytes for entry in self.entries)

    def lines(self) -> Iterator[str]:
        """For people: each tensor of the result with its shape, dtype and sources; then what is missing or left."""
        stored = getattr(self.source, "stored_name", str)
        for entry in self.entries:
            dtype = str(entry.spec.dtype).removeprefix("torch.")
            yield f"{entry.name} {list(entry.spec.shape)} {dtype} <- {', '.join(map(stored, entry.sources))}"
        for name in self.missing():
            yield f"missing: {name}"
        for name in self.left_over():
            yield f"left over: {name} {list(self.source.specs[name].shape)}"
        for name, reason in self.unused.items():
            if name in self.source.specs:
                yield f"not converted: {name} ({reason})"

    def fingerprint(self, *options: Any) -> str:
        """Differs where a file, a tensor or an option does: an interrupted run goes on only where it does not."""
        files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self.source.files]
        tensors = [(entry.name, entry.spec.shape, str(entry.spec.dtype), list(entry.sources)) for entry in self.entries]
        return hashlib.sha256(
            json.dumps([str(self.source.path.resolve()), files, tensors, options]).encode()
        ).hexdigest()


def _others(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} others)" if len(names) > 1 else ""

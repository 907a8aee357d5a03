"""Megatron-Core's distributed checkpoints (`torch_dist`), read and written with torch alone.

    DEST/latest_checkpointed_iteration.txt
    DEST/iter_0000001/.metadata            which tensor lies where: torch.distributed.checkpoint's own index
    DEST/iter_0000001/__N_0.distcp         tensors, one after the other, each as `torch.save` writes it
    DEST/iter_0000001/common.pt            Megatron's arguments
    DEST/iter_0000001/metadata.json        the format's name and version

A tensor is there as it is over all ranks together, so a folder can be read with any parallelism. The names are those of
`megatron_names`, and what ranks share out part by part is a tensor for each part:

    mixer.in_proj.weight.{z,x,B,C,dt}      mixer.conv1d.{weight,bias}.{x,B,C}
    mlp.experts.experts.linear_fc1.weight  [experts, rows, columns], one chunk per expert (`experts="grouped"`)
    mlp.experts.experts.{i}.linear_fc1...  one tensor per expert (`experts="sequential"`, Megatron's singletons)

Read as well: the two spellings of a rank's module (`local_experts.{i}`, `weight{i}`), the prefixes `model.` and
`module.`, an iteration's folder itself, and NeMo 2's (`weights/`). Optimizer, random and TransformerEngine states stay
behind. Memory: one tensor, or one expert of a grouped one.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor

from ...files import atomic_write
from ..foreign import inside, plain, read_json, shown, sound
from ..published import PublishedFolder, tensors
from ..tensors import Entry, Plan, Shape, Spec, concatenated
from ..torch_files import Unpickler, load
from ..writing import SHARD_BYTES, Conversion, Done, into_shards, write_text
from . import folders
from .folders import IS_STATE, ITERATION, MegatronFolder, Reasons, common_spec, from_published, iteration_folders
from .names import VOCAB_DIVISIBLE_BY, Weight, to_whole

OPTIONS = {
    **folders.OPTIONS,
    "tensor_parallel": "ranks that the vocabulary is padded for: 1, 2, 4 or 8",
    "experts": "grouped (one tensor for all experts of a layer) or sequential (one tensor each)",
    "shard_bytes": "bytes per file, about",
}

_METADATA = ".metadata"
_PREFIX = re.compile(r"^(?:(?:model\d*|module)\.)+")
_REASONS: Reasons = {
    "the state of an optimizer": lambda name: re.match(r"(chained_\d+\.)?optimizer\.", name) is not None,
    "the state of random numbers": lambda name: name.startswith(("rng_state", "rerun_state")),
    **IS_STATE,
}


def recognises(path: str | Path) -> bool:
    return _folder(Path(path)) is not None


def _folder(path: Path) -> Path | None:
    if not path.is_dir():
        return None
    return next((folder for folder in iteration_folders(path) if (folder / _METADATA).is_file()), None)


@dataclass(frozen=True)
class _Chunk:
    """A block of a tensor: where it begins in it, its shape, and its file with the bytes it takes there."""

    offsets: Shape
    shape: Shape
    file: Path
    start: int
    length: int


class DistFolder(MegatronFolder):
    """The tensors of a torch_dist folder, without prefixes; experts in one tensor are read one at a time (`name[i]`).

    `args` are Megatron's arguments, None where the folder has none.

    Raises:
        ValueError: another backend than torch_dist, a file that is not there, cut short, or of an unknown kind, or a
            tensor that is not there in full. Names the tensor.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        folder = _folder(self.path)
        if folder is None:
            raise ValueError(f"{path} has no {_METADATA} of a distributed checkpoint; name the folder that has it.")
        self.folder = folder
        if (folder / "metadata.json").exists():
            backend = read_json(folder / "metadata.json").get("sharded_backend")
            if backend not in ("torch_dist", None):
                raise ValueError(f"{folder} was written with {backend!r}; write it as torch_dist with Megatron first.")
        common = folder / "common.pt"
        contents = load(common) if common.exists() else None
        self.args = contents.get("args") if isinstance(contents, dict) else None
        self._chunks: dict[str, list[_Chunk]] = {}
        self._where: dict[str, tuple[str, int | None]] = {}
        self.specs: dict[str, Spec] = {}
        with sound(folder / _METADATA):
            self._read_index()
        files = {chunk.file for chunks in self._chunks.values() for chunk in chunks}
        self.files = [folder / _METADATA, *([common] if common.exists() else []), *sorted(files)]

    def _read_index(self) -> None:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

        try:
            with open(plain(self.folder / _METADATA), "rb") as opened:
                metadata = Unpickler(opened).load()
            entries, storage = metadata.state_dict_metadata, metadata.storage_data
        except Exception as error:  # of a damaged pickle anything comes
            what = shown(str(error))
            raise ValueError(f"{self.folder / _METADATA} cannot be read ({what}): fetch or write it again.") from error
        sizes: dict[str, int] = {}
        for stored, entry in entries.items():
            if not isinstance(entry, TensorStorageMetadata):
                continue  # an object: the states of random numbers, of TransformerEngine, of the run
            name = _PREFIX.sub("", stored)
            if name in self._chunks:
                raise ValueError(f"{self.folder} has {name} twice, with and without a prefix; take one out.")
            chunks = self._chunks[name] = []
            for chunk in entry.chunks:
                info = storage[MetadataIndex(stored, chunk.offsets)]
                if getattr(info, "transform_descriptors", None):
                    how = ", ".join(info.transform_descriptors)
                    raise ValueError(f"{self.folder} has {name} packed ({how}); write it without that.")
                if info.relative_path not in sizes:
                    file = inside(self.folder, info.relative_path, self.folder / _METADATA)
                    sizes[info.relative_path] = file.stat().st_size if file.exists() else -1
                file = self.folder / info.relative_path
                if (size := sizes[info.relative_path]) < info.offset + info.length:
                    what = "is not there" if size < 0 else "is cut short"
                    raise ValueError(f"{file}, which has the tensor {name}, {what}: fetch or write it again.")
                where = tuple(chunk.offsets), tuple(chunk.sizes)
                chunks.append(_Chunk(*where, file, info.offset, info.length))
            spec = Spec(tuple(entry.size), entry.properties.dtype)
            self._check_chunks(name, spec, chunks)
            self._name(name, spec)

    def _check_chunks(self, name: str, spec: Spec, chunks: list[_Chunk]) -> None:
        """Raises `ValueError` where a tensor is not there in full, or is larger than the bytes that hold it."""
        for chunk in chunks:
            numbers = (*chunk.offsets, *chunk.shape, chunk.start, chunk.length)
            fits = all(o + n <= m for o, n, m in zip(chunk.offsets, chunk.shape, spec.shape, strict=True))
            room = math.prod(chunk.shape) * spec.dtype.itemsize <= chunk.length
            if not fits or not room or any(type(number) is not int or number < 0 for number in numbers):
                raise ValueError(
                    f"{self.folder / _METADATA} has a part of the tensor {name} with shape {shown(chunk.shape)} in "
                    f"{chunk.length} bytes of {chunk.file.name}, which cannot be: fetch or write it again."
                )
        whole = sum(math.prod(chunk.shape) for chunk in chunks) == math.prod(spec.shape)
        if not whole or len({chunk.offsets for chunk in chunks}) < len(chunks):
            raise ValueError(f"{self.folder} has only a part of the tensor {name}: fetch or write it again.")

    def _name(self, name: str, spec: Spec) -> None:
        if (
            re.search(r"\.experts\.experts\.linear_fc\d\.weight$", name)
            and math.prod(spec.shape)
            and not _left_behind(name)
        ):
            for expert in range(spec.shape[0]):
                self._where[f"{name}[{expert}]"] = (name, expert)
                self.specs[f"{name}[{expert}]"] = Spec(spec.shape[1:], spec.dtype)
        else:
            self._where[name], self.specs[name] = (name, None), spec

    def read(self, name: str) -> Tensor:
        stored, expert = self._where[name]
        spec, chunks = self.specs[name], self._chunks[stored]
        begin: Shape = (0,) * len(spec.shape) if expert is None else (expert, *(0,) * len(spec.shape))
        size: Shape = spec.shape if expert is None else (1, *spec.shape)
        result: Tensor | None = None
        for chunk in chunks:
            low = [max(a, b) for a, b in zip(begin, chunk.offsets, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(begin, size, chunk.offsets, chunk.shape, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            part = self._load(name, chunk)
            if chunk.offsets == begin and chunk.shape == size:
                return part.reshape(spec.shape)
            if result is None:
                result = torch.empty(size, dtype=spec.dtype)
            here = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, begin, strict=True))
            there = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, chunk.offsets, strict=True))
            result[here] = part[there]
        assert result is not None, name
        return result.reshape(spec.shape)

    def spelled(self, name: str) -> str:
        return re.sub(r"\.(z|x|B|C|dt)$", "", name)

    def sources(self, weight: Weight, name: str) -> dict[str, Shape]:
        return _shapes(weight, name)

    def whole(self, weight: Weight, parts: tuple[Tensor, ...]) -> Tensor:
        return concatenated(*parts)

    def reasons(self, plan: Plan) -> Reasons:
        return _REASONS

    def _load(self, name: str, chunk: _Chunk) -> Tensor:
        try:
            with open(chunk.file, "rb") as file:
                view = cast(IO[bytes], _View(file, chunk.start, chunk.length))
                part: Tensor = torch.load(view, map_location="cpu", weights_only=True)
                part = part.reshape(chunk.shape)
        except Exception as error:  # torch has no error of its own for a broken file
            raise ValueError(
                f"{chunk.file} cannot be read where the tensor {name} is: fetch or write it again."
            ) from error
        if part.dtype != self.specs[name].dtype:
            raise ValueError(
                f"{chunk.file} has {part.dtype} where the tensor {name} is {self.specs[name].dtype}: fetch or write it "
                "again."
            )
        return part


def _left_behind(name: str) -> bool:
    return any(applies(name) for applies in _REASONS.values())


class _View(io.RawIOBase):
    """A part of a file as a file, for `torch.load`."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        count: int = self._file.readinto(view)  # type: ignore[attr-defined]
        self._at += count
        return count


to_huggingface = DistFolder.to_huggingface


def from_huggingface(
    path: str | Path,
    tensor_parallel: int = 1,
    experts: str = "grouped",
    vocab_divisible_by: int = VOCAB_DIVISIBLE_BY,
    shard_bytes: int = SHARD_BYTES,
) -> Conversion:
    """A torch_dist checkpoint, of a folder of this family; see `folders.from_published`.

    `tensor_parallel` decides how far the vocabulary is padded, with zeros, and what the arguments say; Megatron reads
    the result with any.
    """

    def entries(source: PublishedFolder, table: list[Weight]) -> Iterator[Entry]:
        return _dist_entries(source, table, experts)

    def write(plan: Plan, folder: Path, args: dict[str, Any], done: Done) -> None:
        _write_tensors(plan, folder, done, shard_bytes)
        common = {"args": argparse.Namespace(**args), "checkpoint_version": 3.0, "iteration": ITERATION}
        common["content_metadata"] = {"singleton_local_shards": experts == "sequential"}
        with atomic_write(folder / "common.pt") as temporary:
            torch.save(common, temporary)
        backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        backends |= {"common_backend": "torch", "common_backend_version": 1}
        (folder / "metadata.json").write_text(json.dumps(backends))

    return from_published(
        path,
        "megatron",
        tensor_parallel,
        experts,
        tensor_parallel,
        vocab_divisible_by,
        args={"ckpt_format": "torch_dist"},
        options=[shard_bytes],
        entries=entries,
        write=write,
    )


def _shapes(weight: Weight, name: str) -> dict[str, Shape]:
    """The tensors of a distributed checkpoint that hold a weight."""
    if weight.parts is None:
        return {name: weight.shape}
    return {f"{name}.{part}": (rows, *weight.shape[1:]) for part, rows in weight.parts.items()}


def _dist_entries(source: PublishedFolder, table: list[Weight], experts: str) -> Iterator[Entry]:
    config, shapes = source.config, tensors(source.config)
    for weight in table:
        name = weight.names[1 if weight.expert and experts == "sequential" else 0]
        sources = {published: shapes[published] for published in weight.of}
        first = 0
        for stored, shape in _shapes(weight, name).items():
            rows = slice(first, first + shape[0]) if weight.parts is not None else slice(None)
            first += shape[0]

            def make(*parts: Tensor, weight: Weight = weight, rows: slice = rows) -> Tensor:
                return to_whole(weight, config, *parts)[rows]

            yield Entry(stored, common_spec(source, sources, shape), sources, make)


def _write_tensors(plan: Plan, folder: Path, done: Done, shard_bytes: int) -> None:
    """What `torch.distributed.checkpoint.save` writes, without holding a tensor longer than it takes to write it.

    Each file stands for a rank. What it holds is kept beside it until all are there: an interrupted run goes on with
    the first file that is not whole.
    """
    from torch.distributed.checkpoint import FileSystemWriter, SavePlan
    from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.planner import WriteItem
    from torch.distributed.checkpoint.storage import WriteResult

    counts: dict[str, int] = {}
    for entry in plan.entries:
        counts[_stacked(entry)[0]] = counts.get(_stacked(entry)[0], 0) + 1
    groups = into_shards(plan.entries, shard_bytes)
    items = [[_write_item(entry, counts) for entry in entries] for entries in groups]
    plans, metadata = create_default_global_save_plan([SavePlan(part) for part in items])
    results: list[list[WriteResult]] = []
    for rank, (entries, save) in enumerate(zip(groups, plans, strict=True)):
        path, kept = folder / f"__{rank}_0.distcp", folder / f".written_{rank}.json"
        if kept.exists():
            places = json.loads(kept.read_text())
            done(sum(entry.spec.nbytes for entry in entries))
        else:
            places = []
            with atomic_write(path) as temporary, open(temporary, "wb") as file:
                for entry, item in zip(entries, save.items, strict=True):
                    began = file.tell()
                    assert item.tensor_data is not None
                    torch.save(_alone(entry.read(plan.source)).reshape(item.tensor_data.chunk.sizes), file)
                    places.append((began, file.tell() - began))
                    done(entry.spec.nbytes)
            write_text(kept, json.dumps(places))
        written: list[tuple[WriteItem, tuple[int, int]]] = list(zip(save.items, places, strict=True))
        results.append(
            [
                WriteResult(item.index, length, _StorageInfo(path.name, began, length))
                for item, (began, length) in written
            ]
        )
    FileSystemWriter(folder).finish(metadata, results)
    for kept in folder.glob(".written_*.json"):
        kept.unlink()


def _stacked(entry: Entry) -> tuple[str, int | None]:
    """The tensor that an entry is stored in, and its place along the first dimension where it shares it."""
    match = re.fullmatch(r"(.*)\[(\d+)\]", entry.name)
    return (match[1], int(match[2])) if match else (entry.name, None)


def _write_item(entry: Entry, counts: Mapping[str, int]) -> Any:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

    name, place = _stacked(entry)
    shape = entry.spec.shape
    offsets = torch.Size([0] * len(shape) if place is None else [place, *[0] * len(shape)])
    sizes = torch.Size(shape if place is None else (1, *shape))
    size = torch.Size(shape if place is None else (counts[name], *shape))
    data = TensorWriteData(ChunkStorageMetadata(offsets, sizes), TensorProperties(entry.spec.dtype), size)
    return WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data)


def _alone(tensor: Tensor) -> Tensor:
    """With nothing else in its storage, which `torch.save` writes as a whole."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

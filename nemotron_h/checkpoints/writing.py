"""Checkpoints written so that nothing is lost: beside the destination, tensor by tensor, and renamed when whole."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..files import atomic_write, cause, disk_full, is_full
from .tensors import DTYPES, Entry, Plan, Tensors

try:
    import fcntl
except ImportError:  # Windows: two runs into one destination are not told apart there
    fcntl = None  # type: ignore[assignment]

SHARD_BYTES = 5_000_000_000
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
)
"""What else of a model's folder belongs to the model: its tokenizer, its way of generating, its licence."""

Done = Callable[[int], None]
"""Called with a number of bytes that have been written since the last call."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MARK = ".conversion"


@dataclass
class Conversion:
    """A checkpoint that can be written: the table it is made by, and who writes it.

    `write(folder, done)` writes everything into an empty (or, going on, a partly written) folder; what lies there under
    its final name is whole. `file` names the one file of that folder that is the result, where the result is no folder.
    """

    to: str
    plan: Plan
    write: Callable[[Path, Done], None]
    options: Sequence[object] = ()
    file: str | None = None
    remarks: list[str] = field(default_factory=list)
    """One sentence each, for whoever asked for the conversion."""


def check_free(dest: Path) -> None:
    """Raises `ValueError` where something would be written over."""
    if dest.name in ("", ".."):
        raise ValueError(f"{dest} is a folder that is there; name one in it that is not.")
    if os.path.lexists(dest) and (dest.is_symlink() or not dest.is_dir() or any(dest.iterdir())):
        raise ValueError(f"{dest} is there already; name another destination, or remove it.")


def convert(conversion: Conversion, dest: str | Path, done: Done = lambda nbytes: None) -> None:
    """Check the table and write the result to `dest`, which is absent until it is whole.

    An interrupted run leaves `.<name of dest>.partial` beside it; the same conversion goes on from there.

    Raises:
        ValueError: `dest` is there, or what lies where it begins is no conversion's, or the source is not what its
            config says (see `Plan.check`).
        OSError: it cannot be written; what was written so far stays for the next run.
    """
    dest = Path(dest)
    check_free(dest)
    if conversion.file is not None and dest.is_dir():
        raise ValueError(f"{dest} is a folder and {conversion.to} is one file; name a file, or remove the folder.")
    conversion.plan.check()
    with _staged(
        dest, conversion.plan.fingerprint(conversion.to, *map(str, conversion.options)), conversion.file
    ) as folder:
        conversion.write(folder, done)


def partial(dest: Path) -> Path:
    """Where what is not whole lies."""
    return dest.with_name(f".{dest.name}.partial")


def check_partial(folder: Path) -> None:
    """Raises `ValueError` where a folder is there that is not what a conversion began: it would be emptied, or written
    into through a link. No conversion makes a link."""
    if not os.path.lexists(folder):
        return
    remedy = "which no conversion made: take it away, or name another destination"
    if folder.is_symlink() or not folder.is_dir():
        raise ValueError(f"{folder} is {'a link' if folder.is_symlink() else 'no folder'}, {remedy}.")
    there = list(folder.rglob("*"))
    if links := [each for each in there if each.is_symlink()]:
        raise ValueError(f"{folder} has the link {links[0].relative_to(folder)}, {remedy}.")
    mark = folder / _MARK
    if mark.exists() and not mark.is_file():
        raise ValueError(f"{folder} is a folder {remedy}.")
    said = mark.read_bytes() if mark.is_file() else b""
    begun = there in ([], [mark]) and not said  # stopped before there was anything in it
    if not begun and not re.fullmatch(rb"[0-9a-f]{64}", said):
        raise ValueError(f"{folder} is a folder {remedy}.")


@contextmanager
def _staged(dest: Path, fingerprint: str, file: str | None) -> Iterator[Path]:
    dest.parent.mkdir(parents=True, exist_ok=True)
    folder = partial(dest)
    check_partial(folder)
    folder.mkdir(exist_ok=True)
    with open(folder / _MARK, "a+") as mark:
        try:
            if fcntl is not None:
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"Another process is writing {dest}; wait for it, or name another destination.") from None
        mark.seek(0)
        if mark.read() != fingerprint:
            for entry in folder.iterdir():
                if entry.name != _MARK:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            mark.truncate(0)
            mark.write(fingerprint)
            mark.flush()
        try:
            yield folder
        except ValueError:
            shutil.rmtree(folder)  # of the source or an option: there is nothing to go on with
            raise
        except (OSError, RuntimeError) as error:
            stopped_by = cause(error)
            if is_full(stopped_by):
                raise disk_full(dest, f"make room and run it again: it goes on from {folder}") from error
            if stopped_by is not error:
                raise stopped_by from None
            raise
        check_free(dest)  # it may be somebody's by now
        if file is None:
            if dest.exists():
                dest.rmdir()
            (folder / _MARK).unlink()
            folder.rename(dest)
        else:
            os.replace(folder / file, dest)
            shutil.rmtree(folder)


def companions(source: Path) -> list[Path]:
    """The files of `COMPANIONS` that a folder has."""
    return sorted({file for pattern in COMPANIONS for file in source.glob(pattern) if file.is_file()})


def copy_companions(source: Path, folder: Path) -> None:
    for file in companions(source):
        shutil.copy2(file, folder / file.name)


def into_folder(
    plan: Plan,
    save: Callable[[Path], object],
    shard_bytes: int = SHARD_BYTES,
    options: Sequence[object] = (),
    *,
    to: str = "huggingface",
    beside: Iterable[Path] = (),
    files: Mapping[str, str] | None = None,
    remarks: list[str],
) -> Conversion:
    """The conversion into a folder of safetensors: its config, which `save` writes, and what else belongs to it.

    `beside` are the folders whose companions come along, the last one's where several have a file; `files` are texts.
    """

    def write(folder: Path, done: Done) -> None:
        for place in beside:
            copy_companions(place, folder)
        for name, text in (files or {}).items():
            write_text(folder / name, text)
        save(folder)
        write_safetensors(plan, folder, done, shard_bytes)

    return Conversion(to, plan, write, (*options, shard_bytes), remarks=remarks)


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_safetensors(plan: Plan, folder: Path, done: Done, shard_bytes: int = SHARD_BYTES) -> None:
    """The plan's tensors as `model.safetensors`, or as numbered shards with their index, one tensor in memory."""
    shards = into_shards(plan.entries, shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, entries in zip(names, shards, strict=True):
        if (folder / name).exists():
            done(sum(entry.spec.nbytes for entry in entries))
            continue
        with atomic_write(folder / name) as temporary:
            _write_shard(plan.source, entries, temporary, done)
    if len(shards) > 1:
        weight_map = {entry.name: name for name, entries in zip(names, shards, strict=True) for entry in entries}
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def into_shards(entries: Sequence[Entry], shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    room = shard_bytes
    for entry in entries:
        if shards[-1] and entry.spec.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= entry.spec.nbytes
    return shards


def _write_shard(source: Tensors, entries: Sequence[Entry], path: Path, done: Done) -> None:
    # safetensors' own save_file wants the whole shard in memory. Wide dtypes go first, as there, so that all align.
    entries = sorted(entries, key=lambda entry: -entry.spec.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.spec.nbytes
        dtype = _DTYPE_NAMES[entry.spec.dtype]
        header[entry.name] = {"dtype": dtype, "shape": list(entry.spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            file.write(tensor_bytes(entry.read(source)))
            done(entry.spec.nbytes)
        file.flush()
        os.fsync(file.fileno())


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data

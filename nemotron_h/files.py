"""A file is there whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary name in the folder of `path`; what is written there becomes `path` at the end, or is removed.

    Raises:
        OSError: it cannot be written; where the disk is full, that sentence.
    """
    temporary = path.with_name(f".{path.name}.writing")
    if temporary.is_symlink() or not (temporary.is_file() or not temporary.exists()):
        raise ValueError(f"{temporary} is in the way of {path}, and is no file that was begun here: take it away.")
    try:
        with said_if_full(path):
            yield temporary
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(dest: Path) -> Iterator[Path]:
    """A new folder beside `dest`; it becomes `dest` at the end, in the place of an empty one, or is removed.

    Raises:
        OSError: it cannot be written; where the disk is full, that sentence.
    """
    dest.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", dir=dest.parent))
    try:
        with said_if_full(dest):
            yield folder
        folder.chmod(0o755)
        if dest.exists():
            dest.rmdir()
        folder.rename(dest)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def said_if_full(dest: Path) -> Iterator[None]:
    """A full disk is said in a sentence, whoever of the writers stumbles on it.

    Raises:
        OSError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        if is_full(cause(error)):
            raise disk_full(dest, "make room and run it again") from error
        raise


def disk_full(dest: Path, remedy: str) -> OSError:
    full = OSError(f"The disk of {dest} is full; {remedy}.")
    full.errno = errno.ENOSPC  # for those further out; the text stays the sentence
    return full


def is_full(error: BaseException) -> bool:
    """Whether a disk had no room: safetensors and tokenizers, which are Rust, say it in words alone."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _NO_ROOM
    return any(f"(os error {number})" in str(error) for number in _NO_ROOM)


def cause(error: BaseException) -> BaseException:
    """What stopped the writing: `torch.save` raises a RuntimeError over it."""
    while isinstance(error, RuntimeError) and error.__context__ is not None:
        error = error.__context__
    return error

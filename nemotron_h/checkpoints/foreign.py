"""Files from elsewhere: what they may be, and where what they name may lie. Needs no torch."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any

_READ = (".json", ".jinja", ".safetensors", ".bin", ".txt", ".model", ".gguf", ".pt")
"""Endings of what is read from a model's folder, here or by transformers."""
_SMALL = ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json")
_FILES = ("configuration_files", "fast_tokenizer_files")
"""Keys under which transformers finds names of further files."""


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 4, 100, 100


def shown(value: object, limit: int = 80) -> str:
    """A value as a sentence has it: of a long one its beginning."""
    try:
        # Of what holds other things a few levels: one that holds itself often over has no end.
        text = _REPR.repr(value) if isinstance(value, list | dict | tuple) else repr(value)
    except (RecursionError, ValueError):  # nested too deep, or an integer of thousands of digits
        return f"a {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}..."


def plain(path: Path) -> Path:
    """`path`, a file or a link to one. Raises `ValueError` for a folder, a pipe or a device, which may never end."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no plain file: put the file itself there.")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file with names and values. Raises `ValueError` where it is none."""
    try:
        fields = json.loads(plain(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested deeper than any file of a model: fetch or write it again.") from None
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} is no JSON ({error}): fetch or write it again.") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} has no names and values: fetch or write it again.")
    return fields


def inside(folder: Path, name: Any, named_by: Path) -> Path:
    """The path of a file that `named_by` says is in `folder`; whether it is there is the caller's to ask.

    Raises:
        ValueError: the name leads out of the folder, or to something that is no plain file. The file itself may be a
            link, as in the hub's snapshots.
    """
    return plain(below(folder, name, named_by))


def below(folder: Path, name: Any, named_by: Path) -> Path:
    """As `inside`, of a file or a folder."""
    if not isinstance(name, str) or not 0 < len(name.encode(errors="replace")) < 256 or "\0" in name:
        raise ValueError(f"{named_by} names the file {shown(name)}, which is no name: fetch or write it again.")
    # Windows' rules as well, wherever this runs: drives, backslashes, "C:name".
    given = PureWindowsPath(name)
    outside = given.anchor or ".." in given.parts or "\\" in name
    if outside or not (folder / name).parent.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{named_by} names the file {shown(name)}, which leads out of its folder: put the file into the folder, "
            "and its name alone there."
        )
    return folder / name


def weight_map(index: Path) -> dict[str, str]:
    """Which file of the folder each tensor is in, as an index says. Raises `ValueError` where that cannot be."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{index} has no weight_map: fetch or write it again.")
    for name in {shown(file, 10_000): file for file in found.values()}.values():
        inside(index.parent, name, index)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 31


def _is_ids(value: Any) -> bool:
    return _is_id(value) or (isinstance(value, list) and all(map(_is_id, value)))


_ID = _is_id, "the id of a token"
_KINDS: dict[str, dict[str, tuple[Any, str]]] = {
    "generation_config.json": {
        "eos_token_id": (_is_ids, "ids of tokens"),
        "bos_token_id": _ID,
        "pad_token_id": _ID,
        **dict.fromkeys(("temperature", "top_k", "top_p", "max_new_tokens", "max_length"), (_is_number, "a number")),
    },
    "tokenizer_config.json": {
        "model_max_length": (_is_number, "a number"),
        "chat_template": (lambda value: isinstance(value, str | list | dict), "the text of a template"),
    },
}
"""What transformers opens in its own words, or in none."""


def check_folder(folder: Path) -> None:
    """Raises `ValueError` where a folder has no file under a name that a reader of it opens, but a folder, a small
    file that cannot be what it is called, or one that names files elsewhere."""
    for path in sorted(folder.iterdir()):
        if path.suffix in _READ:
            plain(path)
    for index in sorted(folder.glob("*.index.json")):
        weight_map(index)
    for file in (folder / name for name in _SMALL if (folder / name).exists()):
        fields = read_json(file)
        if not isinstance(kind := fields.get("model_type", ""), str):
            raise ValueError(f"{file} has the model_type {shown(kind)}: correct it.")
        for key, (usable, wanted) in _KINDS.get(file.name, {}).items():
            if (value := fields.get(key)) is not None and not usable(value):
                raise ValueError(f"{file} has the {key} {shown(value)}: give {wanted}, or leave it out.")
        for key in _FILES:
            for name in fields[key] if isinstance(fields.get(key), list) else [fields[key]] if key in fields else []:
                inside(folder, name, file)


@contextmanager
def sound(path: object) -> Iterator[None]:
    """What a damaged file makes of the reading of it, whatever that is, becomes a `ValueError` that names the file."""
    try:
        yield
    except BaseException as error:  # the tokenizers' panics are no Exception
        bare = isinstance(error, json.JSONDecodeError | UnicodeDecodeError)  # these name no file
        if isinstance(error, _SAID) and not bare:
            raise
        if type(error).__module__.startswith(("click", "typer")) or type(error).__name__ == "OutOfMemoryError":
            raise
        what = shown(str(error), 200) if str(error) else type(error).__name__
        raise ValueError(
            _damage(path) or f"{path} has something in its files that cannot be read ({what}): fetch or write it again."
        ) from error


_SAID = (ValueError, OSError, ImportError, KeyboardInterrupt, SystemExit, GeneratorExit)


def _damage(path: object) -> str:
    """What is wrong with the first JSON file of a folder that is at fault; empty where none is."""
    folder = Path(str(path))
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        try:
            read_json(file)
        except (ValueError, OSError) as error:
            return str(error)
    return ""

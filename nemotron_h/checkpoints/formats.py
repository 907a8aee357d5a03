"""The formats that `nemotron-h convert` knows, and how a folder or file is told to be one of them.

Each format is a module with

- `recognises(path)`: whether a folder or file is in this format; opens no more than it must;
- `to_huggingface(path, **options)`: the `Conversion` that writes the published folder;
- `from_huggingface(path, **options)`: the `Conversion` that writes this format from such a folder.

Options are keyword arguments; a module names those it takes in `OPTIONS` with one line of help each. Modules import
what is heavy or optional where they use it: a folder is told apart from its file names and the first bytes of a file.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from .foreign import check_folder, sound
from .writing import Conversion

# In the order in which a source is tried.
MODULES = {
    "megatron": "megatron",
    "megatron-legacy": "megatron.ranks",
    "mamba-ssm": "mamba_ssm",
    "gguf": "gguf",
    "fp8": "modelopt",
    "nvfp4": "modelopt",
}
HUGGINGFACE = "huggingface"
NAMES = (HUGGINGFACE, *MODULES)
_SPELLED = {"shard_bytes": "--shard-size"}  # where an option is called otherwise on the command line


def module(name: str) -> Any:
    return importlib.import_module(f".{MODULES.get(name, name)}", __package__)


def _recognises(name: str, path: Path) -> bool:
    try:
        return bool(module(name).recognises(path))
    except ImportError:  # an optional package of that format: the other formats do without it
        return False


def detect(path: str | Path) -> str:
    """The format of a folder or file. Raises `ValueError` where it is none of them."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"There is no {path}; name a folder or file.")
    with sound(path):
        if path.is_dir():
            check_folder(path)
        for name in MODULES:
            if _recognises(name, path):
                return name
    if (path / "config.json").exists():
        return HUGGINGFACE
    raise ValueError(f"{path} is in none of the formats {', '.join(NAMES)}; name the folder that has the weights.")


def conversion(path: str | Path, to: str, **options: Any) -> Conversion:
    """What writes `path` in the format `to`. One side is always Hugging Face's; both may be (see `huggingface`).

    Raises:
        ValueError: an unknown format, two foreign ones, an option that the format does not take, a wrong source.
    """
    if to not in NAMES:
        raise ValueError(f"There is no format {to!r}; write one of {', '.join(NAMES)}.")
    source = detect(path)
    if HUGGINGFACE not in (source, to):
        raise ValueError(f"{path} is in the format {source}: convert it to {HUGGINGFACE} first, and that to {to}.")
    direction = module(to).from_huggingface if source == HUGGINGFACE else module(source).to_huggingface
    taken = inspect.signature(direction).parameters
    if refused := [name for name, value in options.items() if name not in taken and value is not None]:
        option = _SPELLED.get(refused[0], "--" + refused[0].replace("_", "-"))
        raise ValueError(f"{source} -> {to} takes no {option}; leave it out.")
    if to in ("fp8", "nvfp4"):
        options["to"] = to
    with sound(path):
        given = {name: value for name, value in options.items() if name in taken and value is not None}
        return direction(Path(path), **given)

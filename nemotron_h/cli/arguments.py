"""What several commands share of their arguments: options, and which model a name means."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..generation.chat import Chat

ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="FOLDER|HUB_ID", help="The model.", show_default="the bundled one"),
]
DtypeOption = Annotated[
    str, typer.Option(help="auto (as stored), bfloat16, float16, float32 or float64.", metavar="DTYPE")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.", metavar="DEVICE")]
ThinkOption = Annotated[bool, typer.Option("--think/--no-think", help="Reason before the answer, or not.")]
SystemOption = Annotated[str | None, typer.Option(help="A system text.")]
MaxNewTokensOption = Annotated[int, typer.Option(min=1, help="Stop an answer after this many tokens.")]
TemperatureOption = Annotated[float | None, typer.Option(min=0.0, help="Sample; 0 is greedy.")]
TopPOption = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest mass.")]
TopKOption = Annotated[int | None, typer.Option(min=1, help="Sample from the k likeliest tokens.")]
GreedyOption = Annotated[
    bool, typer.Option("--greedy", help="Always take the likeliest token.  [default: as the model's config says]")
]
SeedOption = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]

DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")


def check_dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        raise ValueError(f"There is no dtype {dtype!r} for a model; write one of {', '.join(DTYPES)}.")
    return dtype


def find_model(name: str | None) -> tuple[str, bool]:
    """The folder (or file, or hub id) that `name` means, and whether it is on this machine.

    Only what looks like a hub id, `owner/name`, and is not a folder here is ever looked for on the network.
    """
    if name is None:
        from ..bundled import WORD_PROBLEMS

        return WORD_PROBLEMS, True
    from ..checkpoints.foreign import check_folder, read_json

    path = os.path.expanduser(name)
    if os.path.isdir(path):
        check_folder(Path(path))
    elif path.endswith(".json") and os.path.exists(path):
        read_json(Path(path))
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "config.json")):
        raise ValueError(f"The folder {path} has no config.json; name the folder of a model.")
    if os.path.exists(path):
        return path, True
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return name, False
    raise ValueError(f"There is no folder {name!r} here, and a hub id is written owner/name; check --model.")


@contextmanager
def hub_named(name: str, local: bool) -> Iterator[None]:
    """What the hub refuses is said with the name that was asked for, and so is what a damaged file leads to."""
    from ..checkpoints.foreign import sound

    try:
        with sound(name):
            yield
    except OSError as error:
        if local:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise OSError(
            f"{name} is no folder here and could not be had from the hub ({reason}); check the name, the connection "
            "and your access, or download it and name the folder."
        ) from error


def quiet(progress: bool = False) -> None:
    """transformers registers this family and says no more than errors; no bars either, unless `progress`."""
    from transformers.utils import logging

    import nemotron_h  # noqa: F401 - registers the family

    logging.set_verbosity_error()
    if not progress or not sys.stderr.isatty():
        logging.disable_progress_bar()


def load_chat(name: str | None, dtype: str, device: str) -> Chat:
    """The model with its tokenizer, and transformers kept quiet."""
    path, local = find_model(name)
    check_dtype(dtype)
    if name is None and dtype == "auto":
        dtype = "float32"  # what its figures were measured in; at its size bfloat16 saves nothing
    from ..generation.chat import Chat

    quiet(progress=name is not None)
    with hub_named(path, local):
        return Chat.load(path, dtype=dtype, device=device, local_files_only=local)


def decoded(written: bytes, what: str) -> str:
    """The text in these bytes of a file or of standard input, every line's end as \\n.

    Raises:
        ValueError: as `generation.chat.check_text`.
    """
    from ..generation.chat import check_text

    try:
        text = written.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{what} is not UTF-8: byte {error.start} is 0x{written[error.start]:02x}; write it in UTF-8."
        ) from None
    return check_text(text.replace("\r\n", "\n").replace("\r", "\n"), what)


def parse_size(text: str) -> int:
    """'22GiB', '24 GB' or a plain number of bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, flags=re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is not a size of memory; write it like 22GiB, 24GB or 25769803776.")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))


def sampling_arguments(
    greedy: bool, temperature: float | None, top_p: float | None, top_k: int | None
) -> dict[str, Any]:
    """The options as `generate()` takes them; with none of them, the model's own generation config decides."""
    given = {
        name: value
        for name, value in {"temperature": temperature, "top_p": top_p, "top_k": top_k}.items()
        if value is not None
    }
    if greedy and given:
        raise ValueError(
            f"--greedy does not go with --{' and --'.join(given).replace('_', '-')}; leave one of them out."
        )
    if greedy or temperature == 0:
        # the model's own sampling settings would only raise a warning that they are not used
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, **given} if given else {}

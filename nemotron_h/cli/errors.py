"""An error on the command line is one sentence and exit code 2; NEMOTRON_H_DEBUG=1 brings the traceback back.

A warning of this package's is one line on stderr.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import typer

Command = TypeVar("Command", bound=Callable[..., None])

DEBUG = "NEMOTRON_H_DEBUG"


def one_sentence(command: Command) -> Command:
    """`command`, with its errors said in words."""

    @functools.wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        try:
            with _warnings_in_a_line():
                command(*args, **kwargs)
        except Exception as error:
            # typer's own exits and usage errors are exceptions too, and already know how to be shown
            if os.environ.get(DEBUG, "0") not in ("", "0") or type(error).__module__.startswith(("click", "typer")):
                raise
            typer.echo(f"nemotron-h: {_sentence(error)}", err=True)
            raise typer.Exit(2) from None

    return run  # type: ignore[return-value]


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """This package's warnings without a file's name and a line of its source, each once; the others as they are."""
    said: set[str] = set()
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if not category.__module__.startswith("nemotron_h."):
                others(message, category, *where, **more)
            elif (text := str(message)) not in said:
                said.add(text)
                typer.echo(f"nemotron-h: {text}", err=True)

        warnings.showwarning = show
        yield


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError | ValueError | ImportError) and text:
        return text
    if type(error).__name__ == "OutOfMemoryError":
        return f"{text.split('.')[0]}; try a shorter text, --dtype bfloat16, or see `nemotron-h info` for what fits."
    return f"unexpected {type(error).__name__}: {text} (set {DEBUG}=1 for the traceback)"

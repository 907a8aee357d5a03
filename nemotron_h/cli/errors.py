"""An error on the command line is one sentence and exit code 2; NEMOTRON_H_DEBUG=1 brings the traceback back."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TypeVar

import typer

Command = TypeVar("Command", bound=Callable[..., None])

DEBUG = "NEMOTRON_H_DEBUG"


def one_sentence(command: Command) -> Command:
    """`command`, with its errors said in words."""

    @functools.wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        try:
            command(*args, **kwargs)
        except Exception as error:
            # typer's own exits and usage errors are exceptions too, and already know how to be shown
            if os.environ.get(DEBUG, "0") not in ("", "0") or type(error).__module__.startswith(("click", "typer")):
                raise
            typer.echo(f"nemotron-h: {_sentence(error)}", err=True)
            raise typer.Exit(2) from None

    return run  # type: ignore[return-value]


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError | ValueError | ImportError) and text:
        return text
    if type(error).__name__ == "OutOfMemoryError":
        return f"{text.split('.')[0]}; try a shorter text, --dtype bfloat16, or see `nemotron-h info` for what fits."
    return f"unexpected {type(error).__name__}: {text} (set {DEBUG}=1 for the traceback)"

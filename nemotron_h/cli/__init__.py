"""The command `nemotron-h`. Each command parses, calls the library and prints; what it does is the library's.

Importing this module imports no more than typer and rich: what else a command needs, it imports when it runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

from .._version import __version__
from . import chat, convert, demo, doctor, exec, generate, info, logprobs, publish, quantize, verify
from .errors import one_sentence

app = typer.Typer(
    name="nemotron-h",
    help="Run and look into NVIDIA Nemotron-H models. A small one that solves word problems is in the box.",
    epilog='Example: nemotron-h generate "Anna has 12 apples. She buys 7 more. How many apples does Anna have now?"',
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nemotron-h {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


for command in (generate, chat, demo, info, quantize, convert, verify, doctor, publish, exec, logprobs):
    settings = getattr(command, "SETTINGS", None)
    app.command(name=command.NAME, help=command.HELP, epilog=command.EXAMPLE, context_settings=settings)(
        one_sentence(command.run)
    )


def main() -> None:
    """The console script's entry."""
    app(prog_name="nemotron-h")


__all__ = ["app", "main"]

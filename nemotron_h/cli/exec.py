"""`nemotron-h exec`: another tool, with this package's classes in it and in the Python processes it starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

NAME = "exec"
HELP = (
    "Run any other tool (trl, lm_eval, accelerate launch, transformers serve, a Python script) with this package's "
    "classes registered in it and in the Python processes it starts. Everything after COMMAND belongs to COMMAND; its "
    "exit code is passed on. Not reached: a Python started with -S, -E or -I, and processes on other machines, unless "
    "PYTHONPATH is handed on to them."
)
EXAMPLE = "Example: nemotron-h exec trl sft --model_name_or_path my-nano-9b --dataset_name trl-lib/Capybara"
SETTINGS = {"allow_interspersed_args": False, "ignore_unknown_options": True}
"""How the command line is read: options after COMMAND are not this command's."""

ON_PATH = str(Path(__file__).parent / "on_path")
LOG = "NEMOTRON_H_EXEC_LOG"


def run(
    command: Annotated[str, typer.Argument(metavar="COMMAND", help="A program, or a .py file.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[ARGUMENTS]...", help="COMMAND's own.")] = None,
    log: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Append a line to FILE for every model class of this family that a process uses."
        ),
    ] = None,
) -> None:
    line = [*_find(command), *(arguments or [])]
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (ON_PATH, environment.get("PYTHONPATH"))))
    if log is not None:
        environment[LOG] = str(log)
    if environment.get(LOG):
        environment[LOG] = _writable(environment[LOG], LOG if log is None else "--log")
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "nt":  # there, exec starts a second process and does not wait for it
        raise typer.Exit(subprocess.call(line, env=environment))
    os.execve(line[0], line, environment)  # the tool takes this process over: signals and the exit code are its own


def _writable(log: str, given_by: str) -> str:
    """The file's whole path, once a line can be added: later, the loading of every model would fail on it."""
    try:
        with open(log, "a", encoding="utf-8"):
            return os.path.abspath(log)
    except OSError as error:
        raise ValueError(
            f"{given_by} {log} cannot be written ({error.strerror}); name a file, in a folder that is there."
        ) from None


def _find(command: str) -> list[str]:
    """What starts `command`, looked for beside this Python first: an environment need not be activated."""
    if command.endswith(".py") and os.path.isfile(command):
        return [sys.executable, command]
    beside = os.path.dirname(sys.executable)
    path = os.pathsep.join((beside, os.environ.get("PATH", os.defpath)))
    if found := shutil.which(command, path=path):
        return [os.path.abspath(found)]
    if os.path.isfile(command):
        raise ValueError(f"The file {command!r} is no program; make it executable (chmod +x), or name what runs it.")
    raise ValueError(f"There is no program {command!r} in {beside} or on PATH; install it, or name its file.")

"""`nemotron-h doctor`: who reads a folder as it is, and what each reader stumbles on. Nothing is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .arguments import JsonOption
from .output import echo_json

if TYPE_CHECKING:
    from ..inspection.readers import Verdict

NAME = "doctor"
HELP = (
    "Say for every known reader (vLLM, llama.cpp, transformers by version, ...) whether it reads a folder, and what it "
    "stumbles on. Exit code 1 where a current one does not."
)
EXAMPLE = "Example: nemotron-h doctor my-fine-tuned-nano-9b"


def run(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A Hugging Face folder of this family.")],
    as_json: JsonOption = False,
) -> None:
    import transformers

    from ..inspection.readers import examine, reader_of_transformers

    verdicts = examine(folder)
    installed = reader_of_transformers(transformers.__version__)
    refused = [each for each in verdicts if not each.reads and not each.older]
    if as_json:
        readers = [
            {
                "reader": each.reader,
                "reads": each.reads,
                "older": each.older,
                "installed": each.reader == installed,
                "findings": [
                    {"what": found.what, "remedy": found.remedy, "remark": found.remark} for found in each.findings
                ],
            }
            for each in verdicts
        ]
        echo_json({"folder": str(folder), "readers": readers, "healthy": not refused})
    else:
        _print(verdicts, installed, refused)
    if refused:
        raise typer.Exit(1)


def _print(verdicts: list[Verdict], installed: str, refused: list[Verdict]) -> None:
    console = Console(highlight=False)
    table = Table("reader", "reads it?", "what it stumbles on", "remedy", show_lines=True)
    for each in verdicts:
        name = each.reader + (" (installed)" if each.reader == installed else "")
        answer, style = ("yes", "green") if each.reads else ("no", "yellow" if each.older else "red")
        for number, found in enumerate(each.findings or (None,)):
            head = (Text(name), Text(answer, style=style)) if number == 0 else (Text(""), Text(""))
            remark = "remark: " if found and found.remark else ""
            table.add_row(*head, Text(remark + found.what if found else ""), Text(found.remedy if found else ""))
    console.print(table)
    if refused:
        console.print(Text(f"Not read by {', '.join(each.reader for each in refused)}.", style="red"))
    else:
        console.print(Text("Every current reader reads it.", style="green"))

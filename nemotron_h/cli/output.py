"""What several commands share of what they print: JSON, a model's text as it comes, how far a long prompt is."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..generation.chat import Reply


def echo_json(facts: dict[str, Any]) -> None:
    """One JSON object in a line; what is no number there, as infinity, is null."""
    typer.echo(json.dumps(_finite(facts), ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def prefill_shown() -> Iterator[None]:
    """How far a long prompt is, on a terminal's stderr and only as long as that takes; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..generation.chunked_prefill import watched

    columns = (TextColumn("prompt"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("")

    def show(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if done < total:
            bar.start()
        else:
            bar.stop()

    with watched(show):
        try:
            yield
        finally:
            bar.stop()


def show(console: Console, text: str, style: str = "") -> None:
    """Print a piece of a model's text: as it is, no markup, no line end, wrapped by the terminal."""
    console.print(Text(text, style=style), end="", soft_wrap=True)


def size(nbytes: float) -> str:
    """Bytes in the unit that leaves three or four digits."""
    for unit in ("B", "KiB", "MiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:,.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def streamer_for(console: Console, chat: Any) -> Any:
    """A streamer that shows the reasoning dimmed, then a blank line, then the answer."""
    from ..generation.reasoning import ReasoningStreamer

    class Streamer(ReasoningStreamer):
        def on_text(self, kind: str, text: str) -> None:
            if kind == "answer" and self.reasoning and self.answer == text:
                console.print("\n")
            show(console, text, "dim" if kind == "reasoning" else "")

        def on_end(self) -> None:
            console.print()

    # A model without a template continues a text: whatever markers that text has are text too.
    return Streamer(chat.tokenizer, started=None if chat.has_template else False)


def remarks(reply: Reply, notes: Console) -> None:
    """Where the token limit ended a reply."""
    if not reply.finished:
        notes.print(f"Cut off after {reply.tokens} tokens; --max-new-tokens raises the limit.", style="yellow")


def number_table(*columns: str) -> Table:
    """A table whose columns but the first are of numbers."""
    table = Table(*columns)
    for column in table.columns[1:]:
        column.justify = "right"
    return table

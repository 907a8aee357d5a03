"""`nemotron-h verify`: whether two checkpoints compute the same, and the first layer that does not."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .arguments import JsonOption, check_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from ..inspection.compare import Comparison, Recording

NAME = "verify"
HELP = (
    "Compare two checkpoints (in any format, or recorded) layer by layer on the same tokens, and name the first layer "
    "that differs. Exit code 1 where one does."
)
EXAMPLE = "Example: nemotron-h verify my-nano-9b my-nano-9b.gguf --tolerance 1e-3"

RECORDING_HELP = "A folder or file in any format, or a recording (.safetensors or .npz, see --record)."


def run(
    reference: Annotated[Path, typer.Argument(metavar="A", help=RECORDING_HELP)],
    other: Annotated[Path | None, typer.Argument(metavar="[B]", help="What is compared with it.")] = None,
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="How many random tokens are compared on.")] = 64,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="Compare on this text, in A's tokenizer.")] = None,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="What both are computed in; auto: as stored.")
    ] = "float32",
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="The largest difference, over the reference's largest magnitude.")
    ] = 1e-4,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what A computes to FILE (.safetensors or .npz).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    from ..checkpoints.foreign import sound
    from ..generation.chat import check_text
    from ..inspection import compare

    check_dtype(dtype)
    check_text(text or "", "--text")
    if other is None and record is None:
        raise ValueError("There is nothing to compare with: name B, or write what A computes with --record FILE.")
    if record is not None:
        if record.suffix not in compare.SUFFIXES:
            raise ValueError(f"{record} is neither .safetensors nor .npz; name a file that ends so.")
        if record.exists():
            raise ValueError(f"{record} is there already; name another file, or remove it.")
        record.parent.mkdir(parents=True, exist_ok=True)
    _keep_quiet()
    with tempfile.TemporaryDirectory(prefix="nemotron-h-verify-") as scratch:
        sources = {
            name: _prepare(path, Path(scratch) / name) for name, path in (("A", reference), ("B", other)) if path
        }
        recorded = {name: compare.read_recording(path) for name, path in sources.items() if compare.is_recording(path)}
        ids = next((each.input_ids for each in recorded.values()), None)
        if ids is not None and text is not None:
            raise ValueError("A recording has its own tokens; leave --text out.")
        if ids is None:
            with sound(reference):
                ids = _tokens(list(sources.values()), tokens, text, reference)
        recordings: dict[str, Recording] = {}
        for name, path in sources.items():
            with sound(reference if name == "A" else other):
                recordings[name] = recorded.get(name) or compare.record(path, ids, dtype)
            recordings[name].source = str(reference if name == "A" else other)
            if name == "A" and record is not None:
                recordings[name].save(record)
    facts: dict[str, Any] = {"reference": str(reference), "tokens": len(ids), "dtype": dtype}
    if record is not None:
        facts["recorded"] = str(record)
    if other is None:
        typer.echo(json.dumps(facts) if as_json else f"{record} has what {reference} computes of {len(ids)} tokens")
        return
    comparison = compare.compare(recordings["A"], recordings["B"])
    first = comparison.first_above(tolerance)
    if as_json:
        rows = [
            {"name": row.name, "label": row.label, "difference": _finite(row.difference), "scale": _finite(row.scale)}
            for row in comparison.rows
        ]
        facts |= {"other": str(other), "tolerance": tolerance, "rows": rows, "equal": first is None}
        facts |= {"same_best_token": comparison.same_best_token, "first": first.name if first else None}
        typer.echo(json.dumps(facts, ensure_ascii=False))
    else:
        _print(comparison, tolerance, facts | {"other": str(other)})
    if first is not None:
        raise typer.Exit(1)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None  # JSON has no infinity


def _keep_quiet() -> None:
    from transformers.utils import logging

    import nemotron_h  # noqa: F401 - registers the family

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _prepare(path: Path, scratch: Path) -> Path:
    """What can be loaded or read: `path` itself, or the folder that a foreign format becomes."""
    from ..checkpoints import formats, writing
    from ..inspection import compare

    if compare.is_recording(path):
        return path
    if formats.detect(path) in (formats.HUGGINGFACE, "fp8", "nvfp4"):  # the two load as they are
        return path
    writing.convert(formats.conversion(path, formats.HUGGINGFACE), scratch)
    return scratch


def _tokens(folders: list[Path], number: int, text: str | None, reference: Path) -> Tensor:
    """Random ids that every folder has, or those of a text; `reference` is how an error calls the first folder."""
    import torch

    from ..configuration import NemotronHConfig

    if text is not None:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folders[0], local_files_only=True)
        except (ValueError, OSError) as error:
            raise ValueError(f"{reference} has no tokenizer; leave --text out, for random tokens.") from error
        ids = tokenizer(text)["input_ids"]
        if not ids:
            raise ValueError(f"--text {text!r} has no tokens; write a longer one.")
        return torch.tensor(ids)
    fields = [NemotronHConfig.get_config_dict(str(folder), local_files_only=True)[0] for folder in folders]
    vocabulary = min(NemotronHConfig.from_dict(each).vocab_size for each in fields)
    return torch.randint(vocabulary, (number,), generator=torch.Generator().manual_seed(0))


def _print(comparison: Comparison, tolerance: float, facts: dict[str, Any]) -> None:
    console = Console(highlight=False)
    table = Table("", "largest difference", "over the largest value")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in comparison.rows:
        bad = not row.difference <= tolerance
        table.add_row(
            row.label, f"{row.difference * row.scale:.3g}", f"{row.difference:.3g}", style="red" if bad else None
        )
    console.print(table)
    first, worst = comparison.first_above(tolerance), max(row.difference for row in comparison.rows)
    a, b = escape(facts["reference"]), escape(facts["other"])
    if first is None:
        what = "[green]the same[/green]" + (", bit for bit" if worst == 0 else f" to {worst:.2g}")
        text = f"{a} and {b} compute {what}, on {facts['tokens']} tokens in {facts['dtype']}."
    else:
        text = (
            f"The first that differs is [red]{escape(first.label)}[/red]: by {first.difference:.3g} of its largest "
            f"value, where {tolerance:g} is allowed."
        )
    if comparison.same_best_token is not None:
        text += f" The likeliest next token is the same {comparison.same_best_token:.1%} of the time."
    console.print(text, soft_wrap=True)

"""`nemotron-h verify`: whether two checkpoints compute the same, and the first layer that does not."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .arguments import JsonOption, check_dtype, quiet
from .output import echo_json, number_table

if TYPE_CHECKING:
    from ..inspection.comparison import Comparison
    from ..inspection.recording import Recording

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
    from ..generation.chat import check_text
    from ..inspection import comparison, recording

    check_dtype(dtype)
    check_text(text or "", "--text")
    if other is None and record is None:
        raise ValueError("There is nothing to compare with: name B, or write what A computes with --record FILE.")
    if record is not None:
        recording.check_new(record, recording.SUFFIXES)
        record.parent.mkdir(parents=True, exist_ok=True)
    quiet()
    recorded = _recorded([path for path in (reference, other) if path], tokens, text, dtype, record)
    facts: dict[str, Any] = {"reference": str(reference), "tokens": len(recorded[0].logprobs), "dtype": dtype}
    if record is not None:
        facts["recorded"] = str(record)
    if other is None:
        if as_json:
            echo_json(facts)
        else:
            typer.echo(f"{record} has what {reference} computes of {facts['tokens']} tokens")
        return
    found = comparison.compare(recorded[0], recorded[1], tolerance)
    first, facts["other"] = found.first_row, str(other)
    if as_json:
        rows = [
            {"name": row.name, "label": row.label, "difference": row.difference, "scale": row.scale}
            for row in found.rows
        ]
        facts |= {"tolerance": tolerance, "rows": rows, "equal": first is None}
        echo_json(facts | {"same_best_token": found.same_best_token, "first": first.name if first else None})
    else:
        _print(found, facts)
    if first is not None:
        raise typer.Exit(1)


def _recorded(paths: list[Path], tokens: int, text: str | None, dtype: str, record: Path | None) -> list[Recording]:
    """What each of them computes, or has recorded, of the same tokens. One model is in memory at a time."""
    from ..checkpoints.foreign import sound
    from ..inspection import recording

    with tempfile.TemporaryDirectory(prefix="nemotron-h-verify-") as scratch:
        sources = [_prepare(path, Path(scratch) / str(number)) for number, path in enumerate(paths)]
        read = {path: recording.read(path) for path in sources if recording.is_recording(path)}
        ids = next((each.ids for each in read.values()), None)
        if ids is not None and text is not None:
            raise ValueError("A recording has its own tokens; leave --text out.")
        if ids is None:
            with sound(paths[0]):
                ids = _tokens(sources, tokens, text, paths[0])
        recorded = []
        for path, source in zip(paths, sources, strict=True):
            with sound(path):
                recorded.append(read.get(source) or _record(source, ids, dtype))
            recorded[-1].source = str(path)
            if record is not None and len(recorded) == 1:
                recorded[0].save(record)
    return recorded


def _record(folder: Path, ids: list[int], dtype: str) -> Recording:
    from transformers import AutoModelForCausalLM

    from ..inspection import recording

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return recording.record(model, ids, whole=True)


def _prepare(path: Path, scratch: Path) -> Path:
    """What can be loaded or read: `path` itself, or the folder that a foreign format becomes."""
    from ..checkpoints import formats, writing
    from ..inspection.recording import is_recording

    # FP8 and NVFP4 load as they are
    if is_recording(path) or formats.detect(path) in (formats.HUGGINGFACE, "fp8", "nvfp4"):
        return path
    writing.convert(formats.conversion(path, formats.HUGGINGFACE), scratch)
    return scratch


def _tokens(folders: list[Path], number: int, text: str | None, reference: Path) -> list[int]:
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
        return ids
    fields = [NemotronHConfig.get_config_dict(str(folder), local_files_only=True)[0] for folder in folders]
    vocabulary = min(NemotronHConfig.from_dict(each).vocab_size for each in fields)
    return torch.randint(vocabulary, (number,), generator=torch.Generator().manual_seed(0)).tolist()


def _print(found: Comparison, facts: dict[str, Any]) -> None:
    console = Console(highlight=False)
    table = number_table("", "largest difference", "over the largest value")
    for row in found.rows:
        bad = not row.difference <= found.tolerance
        table.add_row(
            row.label, f"{row.difference * row.scale:.3g}", f"{row.difference:.3g}", style="red" if bad else None
        )
    console.print(table)
    first, worst = found.first_row, max(row.difference for row in found.rows)
    a, b = escape(facts["reference"]), escape(facts["other"])
    if first is None:
        what = "[green]the same[/green]" + (", bit for bit" if worst == 0 else f" to {worst:.2g}")
        text = f"{a} and {b} compute {what}, on {facts['tokens']} tokens in {facts['dtype']}."
    else:
        text = (
            f"The first that differs is [red]{escape(first.label)}[/red]: by {first.difference:.3g} of its largest "
            f"value, where {found.tolerance:g} is allowed."
        )
    if found.same_best_token is not None:
        text += f" The likeliest next token is the same {found.same_best_token:.1%} of the time."
    console.print(text, soft_wrap=True)

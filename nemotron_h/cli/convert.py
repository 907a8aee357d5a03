"""`nemotron-h convert`: a checkpoint in another format, checked as a whole before anything is written."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .arguments import JsonOption, parse_size
from .output import size

if TYPE_CHECKING:
    from ..checkpoints.tensors import Plan
    from ..checkpoints.writing import Conversion, Done

NAME = "convert"
HELP = (
    "Write a checkpoint in another format: Hugging Face, Megatron, mamba-ssm, GGUF, FP8, NVFP4. "
    "What SOURCE is, it tells from its files."
)
EXAMPLE = "Example: nemotron-h convert my-nano-9b my-nano-9b.gguf --to gguf --outtype q8_0"


def run(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A folder or file, in any of the formats.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="The folder or file to write; not there yet.")],
    to: Annotated[
        str,
        typer.Option("--to", help="huggingface, megatron, megatron-legacy, mamba-ssm, gguf, fp8 or nvfp4."),
    ],
    tensor_parallel: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Megatron: ranks that a layer is split over.")
    ] = None,
    experts: Annotated[
        str | None, typer.Option(metavar="grouped|sequential", help="Megatron: how routed experts are laid out.")
    ] = None,
    expert_tensor_parallel: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Megatron files: ranks that an expert is split over.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="From Megatron: tokens, where it has the padded number.")
    ] = None,
    vocab_divisible_by: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Megatron: what the vocabulary is padded to a multiple of.")
    ] = None,
    outtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="GGUF: f32, f16, bf16 or q8_0 for the matrices.")
    ] = None,
    pre: Annotated[
        str | None, typer.Option(metavar="NAME", help="GGUF: how the tokenizer splits text, where it cannot be told.")
    ] = None,
    mtp: Annotated[
        bool | None, typer.Option("--mtp/--no-mtp", help="GGUF: the multi-token-prediction layers as well or not.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="FP8, NVFP4: modules left as they are; may be repeated.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="Hugging Face: bfloat16, float16, float32 or float64.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The model's config.json, where the source does not have it.")
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The largest file of a folder.", show_default="5GB")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="List every tensor, its source, what is missing and left over; write nothing."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    from ..checkpoints import formats, writing

    if not dry_run:
        writing.check_free(dest)
        writing.check_partial(writing.partial(dest))
    conversion = formats.conversion(
        source,
        to,
        tensor_parallel=tensor_parallel,
        experts=experts,
        expert_tensor_parallel=expert_tensor_parallel,
        vocab_size=vocab_size,
        vocab_divisible_by=vocab_divisible_by,
        outtype=outtype,
        pre=pre,
        mtp=mtp,
        exclude=exclude or None,
        dtype=dtype,
        config=config,
        shard_bytes=None if shard_size is None else parse_size(shard_size),
    )
    plan = conversion.plan
    facts: dict[str, Any] = {
        "source": str(source),
        "from": formats.detect(source),
        "to": to,
        "tensors": len(plan.entries),
        "bytes": plan.nbytes,
        "remarks": conversion.remarks,
    }
    if dry_run:
        _dry_run(conversion, facts, as_json)
        return
    start = time.perf_counter()
    try:
        with _progress(f"{facts['from']} -> {to}", plan.nbytes) as done:
            writing.convert(conversion, dest, done)
    except KeyboardInterrupt:
        typer.echo(f"nemotron-h: Interrupted; run it again to go on from {writing.partial(dest)}.", err=True)
        raise typer.Exit(130) from None
    facts |= {"dest": str(dest), "seconds": round(time.perf_counter() - start, 2), "bytes_on_disk": _on_disk(dest)}
    facts |= {"fewer_bits": _fewer_bits(plan), "next": shlex.join(["nemotron-h", "verify", str(source), str(dest)])}
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False))
    else:
        _print(facts)


def _dry_run(conversion: Conversion, facts: dict[str, Any], as_json: bool) -> None:
    """Raises `ValueError`, as the conversion would, where the table does not check out; the table is shown first."""
    plan = conversion.plan
    problem: ValueError | None = None
    try:
        plan.check()
    except ValueError as error:
        problem = error
    if as_json:
        facts |= {"plan": list(plan.lines()), "missing": plan.missing(), "left_over": plan.left_over()}
        typer.echo(json.dumps({**facts, "problem": problem and str(problem)}, ensure_ascii=False))
    else:
        for line in plan.lines():
            typer.echo(line)
        typer.echo(f"{facts['tensors']} tensors, {size(plan.nbytes)}; nothing was written")
        for remark in conversion.remarks:
            typer.echo(remark)
    if problem is not None:
        raise problem


@contextmanager
def _progress(title: str, total: int) -> Iterator[Done]:
    """A bar in bytes on a terminal's stderr; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(escape(title)), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda nbytes: bar.update(task, advance=nbytes)


def _fewer_bits(plan: Plan) -> bool:
    """Whether any tensor of the result is stored in a narrower type than what it is made of."""
    specs = plan.source.specs
    return any(
        entry.spec.dtype.itemsize < max((specs[name].dtype.itemsize for name in entry.sources), default=0)
        for entry in plan.entries
    )


def _on_disk(dest: Path) -> int:
    files = [dest] if dest.is_file() else [file for file in dest.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _print(facts: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{escape(facts['dest'])} is written: {facts['from']} -> {facts['to']}, {facts['tensors']:,} tensors, "
        f"[bold]{size(facts['bytes_on_disk'])}[/bold] in {facts['seconds']:.1f} s"
    )
    for remark in facts["remarks"]:
        console.print(escape(remark), style="yellow")
    doubt = " (it has fewer bits, so it will not be the same)" if facts["fewer_bits"] else ""
    console.print(f"Check it{doubt}: {escape(facts['next'])}", style="dim")

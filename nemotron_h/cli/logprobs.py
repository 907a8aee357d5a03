"""`nemotron-h logprobs`: whether training and serving give a text the same probability, token by token."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .arguments import DeviceOption, DtypeOption, JsonOption, decoded, load_chat
from .output import echo_json

if TYPE_CHECKING:
    from ..inspection.recording import Recording

NAME = "logprobs"
HELP = (
    "Record the log-probability of every token of a text, given the tokens before it, or compare two recordings: of "
    "two models, or of a model and a serving engine (vLLM, SGLang, llama.cpp, any OpenAI-style completions JSON). Exit "
    "code 1 where they differ by more than the tolerance."
)
EXAMPLE = "Example: nemotron-h logprobs my-nano-9b --compare vllm-answer.json --dtype bfloat16 --tolerance 0.05"


def run(
    source: Annotated[str, typer.Argument(metavar="MODEL|FILE", help="A folder or hub id; or a recording (.json).")],
    other: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="The same as --compare FILE.")] = None,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="The text, in the model's tokenizer.")] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file with the text; - is standard input.")
    ] = None,
    ids: Annotated[
        str | None, typer.Option(metavar="IDS|FILE", help="Token ids, as 1,2,3 or a file with a JSON list.")
    ] = None,
    record: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the recording to FILE (JSON).")] = None,
    compare: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Compare with this recording or engine's answer; its ids are the text."),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Also record each layer's norms and digests, to name the first that parts.")
    ] = False,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="The largest difference: in nats; for layers, over the largest norm.")
    ] = 1e-3,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    from ..inspection import comparison, recording

    if other is not None and compare is not None:
        raise ValueError(f"There are two files to compare with, {other} and {compare}; name one.")
    compare = compare or other
    if record is not None:
        recording.check_new(record)
    given = {"--text": text, "--file": file, "--ids": ids}
    if len(said := [name for name, value in given.items() if value is not None]) > 1:
        raise ValueError(f"The text is given by {' and by '.join(said)}; leave all but one out.")
    if Path(source).is_file():
        if said or record or layers:
            raise ValueError(f"{source} is a recording: {(said or ['--record or --layers'])[0]} is for a model.")
        ours = recording.read(source)
    else:
        theirs = recording.read(compare) if compare else None
        ours = _record(source, _Text(text, file, ids), theirs, layers, dtype, device)
        if record is not None:
            ours.save(record)
    facts: dict[str, Any] = {"reference": ours.source, "tokens": len(ours.logprobs), "mean_logprob": _mean(ours)}
    if record is not None:
        facts["recorded"] = str(record)
    if compare is None:
        _say(facts, ours, as_json)
        return
    found = comparison.compare(ours, recording.read(compare), tolerance)
    first = found.first_row
    facts |= {"other": str(compare), "tolerance": tolerance, **asdict(found.tokens)}
    facts["first_layer"] = {"name": first.label, "position": first.position(tolerance)} if first else None
    facts |= {"layers_compared": len(found.rows), "same": found.same}
    if as_json:
        echo_json(facts)
    else:
        typer.echo(_sentences(facts))
    if not found.same:
        raise typer.Exit(1)


class _Text:
    """What the options say that the text is."""

    def __init__(self, text: str | None, file: Path | None, ids: str | None):
        if file is not None:
            text = decoded(sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes(), f"--file {file}")
        elif text is not None:
            from ..generation.chat import check_text

            check_text(text, "--text")
        self.text, self.ids = text, None if ids is None else _ids(ids)


def _ids(written: str) -> list[int]:
    if Path(written).is_file():
        try:
            found = json.loads(Path(written).read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, list) and all(isinstance(id, int) for id in found):
            return found
        raise ValueError(f"{written} is no JSON list of token ids; write it like [1, 2, 3].")
    if not re.fullmatch(r"\s*\d+(\s*[,\s]\s*\d+)*\s*", written):
        raise ValueError(f"--ids {written!r} are no token ids and no file; write them like 1,2,3.")
    return [int(id) for id in re.findall(r"\d+", written)]


def _record(name: str, text: _Text, theirs: Recording | None, layers: bool, dtype: str, device: str) -> Recording:
    from ..inspection import recording

    chat = load_chat(name, dtype, device)
    ids = text.ids
    if text.text is not None:
        ids = chat.tokenizer(text.text)["input_ids"]
    if ids is None:
        ids = theirs.ids if theirs is not None else None
        if ids is None:
            raise ValueError("There is no text: give --text, --file or --ids, or --compare a file that has token ids.")
        if min(ids) < 0:
            raise ValueError(
                f"{theirs and theirs.source} does not say its first token; give the same text with --text, --file or "
                "--ids."
            )
    layers = layers or bool(theirs and theirs.tensors)
    ours = recording.record(chat.model, ids, tokenizer=chat.tokenizer, layers=layers)
    ours.source = name
    return ours


def _mean(recording: Recording) -> float:
    values = [value for value in recording.logprobs if value is not None]
    return sum(values) / len(values)


def _say(facts: dict[str, Any], recording: Recording, as_json: bool) -> None:
    if as_json:
        rows = {"ids": recording.ids, "logprobs": recording.logprobs}
        echo_json(facts | (rows if "recorded" not in facts else {}))
        return
    written = f", written to {facts['recorded']}" if "recorded" in facts else ""
    typer.echo(
        f"{facts['reference']}: {facts['tokens']} tokens, {facts['mean_logprob']:.4f} nats each on average (perplexity "
        f"{math.exp(min(-facts['mean_logprob'], 700)):.4g}){written}"
    )


def _sentences(facts: dict[str, Any]) -> str:
    numbers = f"mean {facts['mean']:.3g}, largest {facts['max']:.3g} nats, KL (k3) {facts['k3']:.3g}"
    lines = [f"{facts['reference']} and {facts['other']} on {facts['compared']} tokens: {numbers}."]
    if facts["same"]:
        lines.append(f"The same to {facts['tolerance']:g}.")
    if layer := facts["first_layer"]:
        lines.append(f"The first layer that parts is {layer['name']}, from position {layer['position']}.")
    elif facts["layers_compared"]:
        lines.append(f"All {facts['layers_compared']} recorded layers agree.")
    if token := facts["first_token"]:
        name = f" ({token['token']!r})" if token["token"] else ""
        lines.append(
            f"The first token that parts is at position {token['position']}{name}: {token['reference']:.4f} and "
            f"{token['other']:.4f}, where {facts['tolerance']:g} is allowed."
        )
    return "\n".join(lines)

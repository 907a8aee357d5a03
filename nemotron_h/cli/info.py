"""`nemotron-h info`: what a model is and what it takes, from its config alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .arguments import JsonOption, find_model, hub_named, parse_size
from .output import size

if TYPE_CHECKING:
    from ..configuration import NemotronHConfig

NAME = "info"
HELP = "Read a config alone (no weights) and say what the model is, what it weighs and whether it fits a GPU."
EXAMPLE = "Example: nemotron-h info nvidia/NVIDIA-Nemotron-Nano-9B-v2 --context 131072 --gpu-memory 22GiB"

KINDS = {
    "mamba": ("M", "Mamba-2", "cyan"),
    "attention": ("*", "attention", "yellow"),
    "mlp": ("-", "MLP", "dim"),
    "moe": ("E", "mixture of experts", "magenta"),
}
PARAMETERS = {
    "embeddings": "embeddings",
    "mamba": "Mamba-2",
    "attention": "attention",
    "mlp": "MLP",
    "moe_routed": "routed experts",
    "moe_shared": "shared experts",
    "moe_router": "routers",
    "moe_latent": "latent projections",
    "norms": "norms",
    "lm_head": "output head",
}


def run(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A folder, a config.json or a hub id; without it, the bundled model."),
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 131_072,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of the weights, the KV cache and the conv windows.")] = "bfloat16",
    gpu_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Say whether it fits: 22GiB, 80GB.")] = None,
    as_json: JsonOption = False,
) -> None:
    available = None if gpu_memory is None else parse_size(gpu_memory)
    facts = _facts(_read_config(model), context, batch, dtype, available)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print(facts, gpu_memory)


def _read_config(model: str | None) -> NemotronHConfig:
    from ..configuration import NemotronHConfig

    path, local = find_model(model)
    # Nothing but config.json is ever fetched, and that only for a hub id.
    with hub_named(path, local):
        fields, _ = NemotronHConfig.get_config_dict(path, local_files_only=local)
    fields = fields.get("llm_config", fields)  # the vision-language models keep the text model's config inside
    if fields.get("model_type", "nemotron_h") != "nemotron_h":
        raise ValueError(f"{path} is a {fields['model_type']!r} model; `nemotron-h info` knows nemotron_h alone.")
    return NemotronHConfig.from_dict(fields)


def _facts(config: NemotronHConfig, context: int, batch: int, dtype: str, available: int | None) -> dict[str, Any]:
    from .. import sizes

    parameters = sizes.count_parameters(config)
    memory = sizes.memory(config, context, batch, dtype)
    per_token = sizes.kv_bytes_per_token(config, dtype)
    facts: dict[str, Any] = {
        "layers": len(config.layers_block_type),
        "pattern": "".join(KINDS[kind][0] for kind in config.layers_block_type),
        "parameters": {**asdict(parameters), "total": parameters.total},
        "kv_bytes_per_token": per_token,
        "state_bytes_per_sequence": sizes.state_bytes_per_sequence(config, dtype),
        "state_dtype": str(config.mamba_ssm_cache_dtype),
        "memory": {
            "context": context,
            "batch": batch,
            "dtype": dtype,
            "weights": memory.weights,
            "kv": memory.kv,
            "states": memory.states,
            "total": memory.total,
        },
    }
    if available is not None:
        left = available - memory.weights - memory.states
        longest = left // (batch * per_token) if per_token else None  # without attention, any length fits or none
        facts["fit"] = {
            "gpu_memory": available,
            "fits": memory.fits(available),
            "longest_context": None if longest is None else max(longest, 0),
        }
    return facts


def _print(facts: dict[str, Any], gpu_memory: str | None) -> None:
    console = Console(highlight=False)
    pattern, parameters, memory = facts["pattern"], facts["parameters"], facts["memory"]
    styles = {letter: style for letter, _, style in KINDS.values()}
    picture = Text()
    for letter in pattern:
        picture.append(letter, style=styles[letter])
    counts = [f"{pattern.count(letter)} {title} ({letter})" for letter, title, _ in KINDS.values() if letter in pattern]
    console.print(f"[bold]{facts['layers']} layers[/bold]: {', '.join(counts)}")
    console.print(picture, "\n")

    table = Table("parameters", "", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    total = parameters["total"]
    for kind, title in PARAMETERS.items():
        if parameters[kind]:
            table.add_row(title, f"{parameters[kind]:,}", f"{parameters[kind] / total:.1%}")
    table.add_section()
    table.add_row("total", f"{total:,}", "")
    if parameters["active"] != total:
        table.add_row("active per token", f"{parameters['active']:,}", f"{parameters['active'] / total:.1%}")
    if parameters["mtp"]:
        table.add_row("MTP layers, besides", f"{parameters['mtp']:,}", "")
    console.print(table)

    console.print(f"KV cache: {facts['kv_bytes_per_token']:,} bytes per token")
    states = facts["state_bytes_per_sequence"]
    console.print(
        f"Mamba states: {size(states)} per sequence ({states:,} bytes; SSM state in {facts['state_dtype']})\n"
    )
    console.print(
        f"At {memory['context']:,} tokens, batch {memory['batch']}, {memory['dtype']}: "
        f"[bold]{size(memory['total'])}[/bold] = weights {size(memory['weights'])} + KV cache {size(memory['kv'])} "
        f"+ states {size(memory['states'])} (activations come on top)",
        soft_wrap=True,
    )
    if "fit" in facts:
        fit = facts["fit"]
        spare = abs(fit["gpu_memory"] - memory["total"])
        verdict = f"[green]fits[/green] {gpu_memory}, {size(spare)} to spare"
        if not fit["fits"]:
            verdict = f"[red]does not fit[/red] {gpu_memory}, {size(spare)} too much"
        if fit["longest_context"]:
            verdict += f"; the longest context that fits is {fit['longest_context']:,} tokens"
        console.print(verdict, soft_wrap=True)

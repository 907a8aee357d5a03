"""`nemotron-h quantize`: a model's folder in 8 or 4 bits, and how far it is from what it was made from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .arguments import JsonOption, find_model, hub_named, quiet
from .output import echo_json, size

if TYPE_CHECKING:
    from torch import Tensor

    from ..configuration import NemotronHConfig
    from ..quantization.int8_int4 import NemotronHQuantizationConfig

NAME = "quantize"
HELP = "Write a model in 8 or 4 bits to a folder, which loads like any other, and say how near it comes."
EXAMPLE = "Example: nemotron-h quantize nvidia/NVIDIA-Nemotron-Nano-9B-v2 nano-9b-int4 --to int4"

CHECKED_TOKENS = 384


def run(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="The model's folder or hub id.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="The folder to write; it must not be there yet.")],
    to: Annotated[str, typer.Option("--to", metavar="int8|int4", help="How many bits a weight gets.")],
    include_lm_head: Annotated[
        bool, typer.Option("--include-lm-head", help="The output head as well, which is left alone otherwise.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would weigh; read no weights.")] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare with the source afterwards, which is loaded for it.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    path, local = find_model(source)
    from ..checkpoints.writing import check_free

    check_free(dest)
    from ..quantization.int8_int4 import BITS, NemotronHQuantizationConfig, weight_bytes

    if to not in BITS:
        raise ValueError(f"There is no --to {to}; write --to int8 or --to int4.")
    wanted = NemotronHQuantizationConfig(to, include_output_embeddings=include_lm_head)
    with hub_named(path, local):
        config = _read_config(path, local)
    if include_lm_head and config.tie_word_embeddings:
        raise ValueError(f"The head of {path} is its embedding table, which is not quantized; drop --include-lm-head.")
    before, after = weight_bytes(config, wanted)
    facts: dict[str, Any] = {"source": path, "to": to, "bytes_before": before, "bytes_after": after}
    if not dry_run:
        with hub_named(path, local):
            logits = _write(path, local, dest, wanted, config.vocab_size if check else 0)
            facts["dest"] = str(dest)
            if logits is not None:
                facts |= _compare(path, local, logits)
    if as_json:
        echo_json(facts)
    else:
        _print(facts)


def _read_config(path: str, local: bool) -> NemotronHConfig:
    from ..checkpoints.published import check_source
    from ..configuration import NemotronHConfig

    fields, _ = NemotronHConfig.get_config_dict(path, local_files_only=local)
    if (kind := fields.get("model_type")) != "nemotron_h":
        raise ValueError(f"{path} is a {kind!r} model; `nemotron-h quantize` knows nemotron_h alone.")
    config: NemotronHConfig = NemotronHConfig.from_dict(fields)
    if stored := fields.get("quantization_config"):
        method = stored.get("quant_method")
        raise ValueError(f"{path} is quantized already ({method}); name the checkpoint that it was made from.")
    if local:
        check_source(path, {"config": config})
    return config


def _write(path: str, local: bool, dest: Path, wanted: NemotronHQuantizationConfig, vocab_size: int) -> Tensor | None:
    """Quantize while loading, then write; the logits of the check."""
    from transformers import AutoModelForCausalLM

    from ..files import atomic_folder

    quiet(progress=True)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=wanted, local_files_only=local)
    files = _files(path, local)
    with atomic_folder(dest) as folder:
        model.save_pretrained(folder)
        for file in files:
            shutil.copy2(file, folder / file.name)
    return _logits(model, vocab_size) if vocab_size else None


def _files(path: str, local: bool) -> list[Path]:
    from ..checkpoints.writing import COMPANIONS, companions

    if not local:
        from huggingface_hub import snapshot_download

        path = snapshot_download(path, allow_patterns=list(COMPANIONS))
    return companions(Path(path))


def _logits(model: Any, vocab_size: int) -> Tensor:
    import torch

    ids = torch.randint(vocab_size, (1, CHECKED_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids, use_cache=False).logits[0]


def _compare(path: str, local: bool, logits: Tensor) -> dict[str, float]:
    """Against the source itself, loaded now: the two are never in memory together."""
    from transformers import AutoModelForCausalLM

    from ..quantization.int8_int4 import agreement

    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=local)
    divergence, same = agreement(logits, _logits(model, logits.shape[-1]))
    return {"tokens_checked": len(logits), "kl": divergence, "same_best_token": same}


def _print(facts: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    before, after = facts["bytes_before"], facts["bytes_after"]
    written = f"{facts['dest']} is written" if "dest" in facts else f"{facts['source']} in {facts['to']} (not written)"
    console.print(f"{written}: {size(before)} of weights become [bold]{size(after)}[/bold] ({after / before:.0%})")
    if "kl" in facts:
        console.print(
            f"On {facts['tokens_checked']} random tokens, the mean KL divergence from the source is {facts['kl']:.4f}, "
            f"and the likeliest next token is the same {facts['same_best_token']:.1%} of the time."
        )

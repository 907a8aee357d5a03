"""`nemotron-h publish`: what training left in a folder, as a hub repository or a folder with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .arguments import JsonOption, hub_named, quiet
from .output import echo_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "publish"
HELP = (
    "Upload a model's or adapter's folder, a checkpoint of a Trainer too, to the hub or write it to a folder: weights, "
    "tokenizer, generation config and a model card, without what belongs to this machine alone."
)
EXAMPLE = (
    "Example: nemotron-h publish finetuned/checkpoint-500 me/my-nano-9b "
    "--base-model nvidia/NVIDIA-Nemotron-Nano-9B-v2 --data me/my-data --metric accuracy=0.87"
)


def run(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="A model's folder, or an adapter's.")],
    where: Annotated[
        str, typer.Argument(metavar="OWNER/NAME|DEST", help="A hub id; with --to-folder, a folder to write.")
    ],
    to_folder: Annotated[bool, typer.Option("--to-folder", help="DEST is a folder, which is not there yet.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="The base model with the adapter in its weights.")] = False,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="HUB_ID|none", help="What it was trained from. Needed, unless an adapter's config says it."
        ),
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="HUB_ID|WORDS", help="What it was trained on; once for each.")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="For the card; once for each.")] = None,
    license: Annotated[str | None, typer.Option(metavar="TAG", help="The hub's tag of the license.")] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository.", show_default="the owner's default")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    from ..checkpoints.foreign import check_folder
    from ..hub.card import is_hub_id
    from ..hub.publish import hub_id, publish

    if source.is_dir():
        check_folder(source)
    adapter = (source / "adapter_config.json").is_file()
    if not adapter and not (source / "config.json").is_file():
        raise ValueError(f"{source} has no config.json and no adapter_config.json; name what save_pretrained wrote.")
    if merge and not adapter:
        raise ValueError(f"{source} is a whole model, so there is nothing to --merge; leave it out.")
    if not to_folder and Path(where).exists():
        raise ValueError(
            f"{where!r} is here already, so it is not taken for a hub id; run this in another folder, or name a folder "
            "that is not there and add --to-folder."
        )
    if not to_folder and not is_hub_id(where):
        raise ValueError(f"{where!r} is no hub id, which is written OWNER/NAME; for a folder add --to-folder.")
    metrics = dict(map(_metric, metric or ()))
    given = None if base_model == "none" else base_model
    base = _base(source, given) if adapter else None
    trained = given or hub_id(base)
    if trained is None and (base_model is None or (adapter and not merge)):
        what = f"The adapter's base model is {base!r}, which is" if adapter else f"What {source} was trained from is"
        where = "on this machine alone" if adapter else "not known"
        without = "" if adapter and not merge else ", or write --base-model none for a card without it"
        raise ValueError(f"{what} {where}: name its hub id with --base-model{without}.")
    local = base is None or base != given  # the network is asked for what was typed alone
    with hub_named(base or str(source), local):
        model, tokenizer = _load(source, base, merge, local), _tokenizer(source, base, local)
    written = publish(
        model,
        Path(where) if to_folder else where,
        tokenizer=tokenizer,
        base_model=trained,
        data=data,
        metrics=metrics,
        license=license,
        private=private,
    )
    kind = "adapter" if adapter and not merge else "model"
    if as_json:
        echo_json({"source": str(source), "kind": kind, "published": written})
    else:
        Console(highlight=False, soft_wrap=True).print(f"The {kind} of {source} is at {written}", markup=False)


def _metric(text: str) -> tuple[str, float | str]:
    name, equals, value = text.rpartition("=")
    if not equals or not name or not value:
        raise ValueError(f"There is no value in --metric {text}; write NAME=VALUE.")
    return name, value


def _base(source: Path, given: str | None) -> str:
    """The folder that the adapter's config names, if it is there; else the hub id that was typed, or the config's."""
    base = _json(source / "adapter_config.json").get("base_model_name_or_path")
    if not base and given is None:
        raise ValueError(
            f"{source / 'adapter_config.json'} does not say its base_model_name_or_path; write it there, or name the "
            "base model's hub id with --base-model."
        )
    if base and Path(base).is_dir():
        return base
    if given is not None:
        return given
    from ..hub.publish import hub_id

    if base is None or hub_id(base) != base or not _in_the_cache(base):
        raise ValueError(
            f"The adapter's base model is {base!r}, which is not on this machine: name its hub id with --base-model."
        )
    return base


def _in_the_cache(name: str) -> bool:
    from transformers.utils import cached_file

    try:
        return cached_file(name, "config.json", local_files_only=True) is not None
    except OSError:
        return False


def _load(source: Path, base: str | None, merge: bool, local: bool) -> Any:
    import transformers

    from ..hub.card import TASKS

    quiet(progress=True)
    if base is None:
        name = (_json(source / "config.json").get("architectures") or [""])[0]
        found = (auto for end, (_, auto, _) in TASKS.items() if name.endswith(end))
        return getattr(transformers, next(found, "AutoModelForCausalLM")).from_pretrained(source, dtype="auto")
    try:
        from peft import PeftModel
    except ImportError:
        raise ImportError(f"{source} is an adapter, which PEFT reads: pip install peft.") from None
    task = _json(source / "adapter_config.json").get("task_type")
    found = (auto for _, auto, its in TASKS.values() if its == task)
    options: dict[str, Any] = {"dtype": "auto", "local_files_only": local}
    if (labels := _labels(source)) is not None:
        options["num_labels"] = labels
    model = getattr(transformers, next(found, "AutoModelForCausalLM")).from_pretrained(base, **options)
    model = PeftModel.from_pretrained(model, str(source))
    return model.merge_and_unload() if merge else model


def _json(file: Path) -> dict[str, Any]:
    from ..checkpoints.foreign import read_json

    return read_json(file)


def _labels(source: Path) -> int | None:
    """How many labels an adapter's head has, which is saved whole; None where it has no head."""
    from safetensors import safe_open

    if not (file := source / "adapter_model.safetensors").is_file():
        return None
    with safe_open(file, framework="pt") as tensors:
        heads = [name for name in tensors.keys() if name.endswith(".score.weight")]
        return tensors.get_slice(heads[0]).get_shape()[0] if heads else None


def _tokenizer(source: Path, base: str | None, local: bool) -> PreTrainedTokenizerBase | None:
    """That of the folder, else of the adapter's base; what has none is published without."""
    from transformers import AutoTokenizer

    if (source / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(source)
    if base is not None and (not Path(base).is_dir() or (Path(base) / "tokenizer_config.json").is_file()):
        return AutoTokenizer.from_pretrained(base, local_files_only=local)
    return None

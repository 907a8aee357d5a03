"""Publishing: a model, or an adapter, as a folder or hub repository that others can load, with a card that says how.

What `save_pretrained` writes is put together with what it leaves out: the tokenizer and its template, the generation
config, a model card; and what a reader elsewhere cannot use is taken out: paths of this machine, switches of the
trainer. `model.push_to_hub()` of transformers works as well, and does none of that.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, metadata_load

from ..checkpoints.writing import check_free
from ..files import atomic_folder, atomic_write, said_if_full
from .card import is_hub_id, model_card, task_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NOT_PUBLIC = ("is_local", "local_files_only", "_name_or_path", "name_or_path")
"""Keys that say where the files were on the machine that wrote them."""
_LABELS = ("id2label", "label2id")
"""Tables of a classifier's own words, which may look like anything."""
_REPLACED = (
    "config.json",
    "hf_quant_config.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-?????-of-?????.bin",
    "pytorch_model.bin.index.json",
)
"""What an earlier upload may have left in a repository, and a reader would take in place of the new one's weights."""


def publish(
    model: Any,
    where: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base_model: str | None = "auto",
    data: str | Sequence[str] | None = None,
    metrics: Mapping[str, float | str] | None = None,
    license: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload model",
) -> str:
    """Write a model of this family to a folder, or upload it; the address or path of the result is returned.

    Args:
        model: a model, or PEFT's wrapper of one, of which the active adapter alone is published; publish
            `model.merge_and_unload()` for a model with the adapter in it.
        where: a hub id, "owner/name", where weights of an earlier upload are replaced; anything else, or a `Path`, is
            a folder, which must be absent or empty.
        tokenizer: published beside the model, with its chat template.
        base_model: hub id of the model that was trained; None: the card names none. "auto" is the hub id that the
            model, or the adapter's base, was loaded by; where that was a folder, another one has to be given.
        data: what it was trained on: hub ids of data sets, or words.
        metrics: name -> value, for the card.
        license: the hub's tag of the license; without it, what the base model's card says, if that is at hand.
        private: whether a new repository is private; None: the owner's default.
        token: of the hub; None: the one that `hf auth login` keeps.

    Raises:
        ValueError: another kind of model; no `base_model` where it is not known, or none for an adapter; a `base_model`
            that is no hub id; a local path among what the card would say; a folder that is not empty.
    """
    adapter = hasattr(model, "peft_config")
    inner = _inner(model, adapter)
    source = _source(model, adapter)
    base_model = _base_model(base_model, source, adapter)
    data = [data] if isinstance(data, str) else list(data or ())
    for name, values in {"data": data, "metrics": (metrics or {}).values()}.items():
        for value in values:
            if isinstance(value, str) and _names_a_path(value):
                raise ValueError(f"{name}={value!r} is a path on this machine: write a hub id, or say it in words.")
    to_hub = isinstance(where, str) and is_hub_id(where) and not os.path.isdir(where)
    target = Path(where).expanduser()
    if not to_hub:
        check_free(target)
    name = str(where) if to_hub else target.absolute().name
    licensed = {"license": license} if license else _license(source, base_model)
    about: dict[str, Any] = {
        "tokenizer": tokenizer,
        "base_model": base_model,
        "data": data,
        "metrics": metrics,
        "licensed": licensed,
    }
    card = model_card(model, name, **about)

    def write(folder: Path) -> None:
        _write(model, inner, folder, tokenizer, base_model if adapter else None)
        (folder / "README.md").write_text(card, encoding="utf-8")

    if not to_hub:
        with atomic_folder(target) as folder:
            write(folder)
        return str(where)
    with tempfile.TemporaryDirectory() as scratch:
        with said_if_full(Path(scratch)):
            write(Path(scratch))
        return _upload(Path(scratch), str(where), private, token, commit_message)


def _inner(model: Any, adapter: bool) -> Any:
    """The model in PEFT's wrapper, or the model. Raises `ValueError` where `publish` does not take it."""
    if adapter and not hasattr(model, "get_base_model"):
        raise ValueError(
            f"{type(model).__name__} has adapters by add_adapter(), which publish() does not take: wrap the model with "
            "peft.get_peft_model() instead, or use model.push_to_hub()."
        )
    inner = model.get_base_model() if adapter else model
    kind = getattr(getattr(inner, "config", None), "model_type", type(inner).__name__)
    if kind != "nemotron_h":
        raise ValueError(f"This is a {kind!r} model; publish() knows nemotron_h alone: use model.push_to_hub().")
    return inner


def _upload(folder: Path, where: str, private: bool | None, token: str | None, commit_message: str) -> str:
    api = HfApi(token=token)
    repository = api.create_repo(where, private=private, exist_ok=True)
    api.upload_folder(
        repo_id=repository.repo_id,
        folder_path=folder,
        commit_message=commit_message,
        delete_patterns=list(_REPLACED),  # but what the folder has
    )
    return str(repository)


def _source(model: Any, adapter: bool) -> str | None:
    """What the model, or the adapter's base, was loaded from; None for a model that was made here."""
    if adapter:
        return model.peft_config[model.active_adapter].base_model_name_or_path or None
    return getattr(model.config, "_name_or_path", None) or None


def hub_id(name: str | None) -> str | None:
    """The name, where it is a hub id and nothing on this machine."""
    return name if name and is_hub_id(name) and not os.path.exists(name) else None


def _base_model(given: str | None, source: str | None, adapter: bool) -> str | None:
    """The hub id of the model that was trained. Raises `ValueError` where it is not known, or `given` is none."""
    if given == "auto":
        if hub_id(source) is None and (source or adapter):
            whose = "The adapter's base model" if adapter else "What the model was loaded from"
            none = "" if adapter else ", or write base_model=None for a card without it"
            raise ValueError(f"{whose} is {source!r}, which is no hub id: name its hub id with base_model={none}.")
        return source
    if given is None:
        if adapter:
            raise ValueError("base_model=None, and an adapter has a base model: name its hub id with base_model=.")
    elif hub_id(given) is None:
        what = "is a path on this machine" if _names_a_path(given) else "is no hub id, which is written owner/name"
        raise ValueError(f"base_model={given!r} {what}: write the hub id of the model that was trained.")
    return given


def _license(source: str | None, base_model: str | None) -> dict[str, str]:
    """What the card beside the source says of its license, a link to a file beside it made one to the hub's file."""
    card = Path(source or "", "README.md")
    if not source or not card.is_file():
        return {}
    head = metadata_load(card) or {}
    keys = ("license", "license_name", "license_link")
    said = {key: head[key] for key in keys if isinstance(head.get(key), str)}
    if "license" not in said:
        return {}
    if (link := said.get("license_link")) and "://" not in link:
        if base_model is None:  # of a file that is not published
            del said["license_link"]
        else:
            said["license_link"] = f"https://huggingface.co/{base_model}/blob/main/{link.removeprefix('./')}"
    return said


def _names_a_path(value: str) -> bool:
    """Of an argument: written as a path, or a file that is here."""
    return _is_path(value) or value.startswith(("./", "../", ".\\", "..\\")) or os.path.isfile(value)


def _is_path(value: str) -> bool:
    """Written as an absolute one, or with folders and there on this machine."""
    if len(value) > 1024 or "\n" in value:
        return False
    posix, absolute = PurePosixPath(value), PureWindowsPath(value).is_absolute()
    if absolute or value.startswith(("~/", "~\\")) or (posix.is_absolute() and len(posix.parts) > 2):
        return True
    return ("/" in value or os.sep in value) and os.path.exists(value)


def _write(model: Any, inner: Any, folder: Path, tokenizer: Any, adapters_base: str | None) -> None:
    if adapters_base is not None:
        active = model.active_adapter
        model.save_pretrained(str(folder), selected_adapters=[active])
        if (folder / active).is_dir():  # where PEFT puts what is not called "default"
            for file in (folder / active).iterdir():
                file.rename(folder / file.name)
            (folder / active).rmdir()
    else:
        model.save_pretrained(str(folder))
    if (generation := getattr(inner, "generation_config", None)) is not None:
        generation.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    for file in sorted(folder.glob("*.json")):
        # Tables of words, which may look like anything.
        if file.name in ("tokenizer.json", "vocab.json", "model.safetensors.index.json"):
            continue
        fields = json.loads(file.read_text(encoding="utf-8"))
        if file.name == "adapter_config.json":
            fields["base_model_name_or_path"] = adapters_base
            # AutoPeftModelForCausalLM imports the class from here where the task is not said; others may not have it.
            fields["auto_mapping"], fields["task_type"] = None, fields.get("task_type") or task_of(inner)[2]
        if file.name == "config.json":
            fields["use_cache"] = True  # trainers switch it off, and whoever generates would compute all again
        with atomic_write(file) as temporary:
            text = json.dumps(_public(fields), indent=2, ensure_ascii=False)
            temporary.write_text(text + "\n", encoding="utf-8")


def _public(value: Any) -> Any:
    """Without what says where something lies on this machine."""
    if isinstance(value, Mapping):
        return {
            key: each if key in _LABELS else _public(each)
            for key, each in value.items()
            if key not in _NOT_PUBLIC and not (isinstance(each, str) and _is_path(each))
        }
    if isinstance(value, list):
        return [_public(each) for each in value if not (isinstance(each, str) and _is_path(each))]
    return value


__all__ = ["publish"]

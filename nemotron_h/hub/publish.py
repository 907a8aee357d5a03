"""Publishing: a model, or an adapter, as a folder or hub repository that others can load, with a card that says how.

What `save_pretrained` writes is put together with what it leaves out: the tokenizer and its template, the generation
config, a model card; and what a reader elsewhere cannot use is taken out: paths of this machine, switches of the
trainer. `model.push_to_hub()` of transformers works as well, and does none of that.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.writing import check_free
from ..files import atomic_write, said_if_full

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_ABSOLUTE = re.compile(r"(?:~[/\\]|/[^/]+/|[A-Za-z]:[\\/]).+")
_RELATIVE = re.compile(r"\.\.?[/\\].*")
_IN_THE_CACHE = re.compile(r".*models--([\w.-]+?)--([\w.-]+)/snapshots/.*")
_NOT_PUBLIC = ("is_local", "local_files_only", "_name_or_path", "name_or_path")
"""Keys that say where the files were on the machine that wrote them."""
_LABELS = ("id2label", "label2id")
"""Tables of a classifier's own words, which may look like anything."""
_LICENSES_IN_WORDS = "other"
_LICENSE_LINE = re.compile(
    r"^(license(?:_name|_link)?):[ \t]*(['\"]?)([^\s'\"\[{|>][^'\"\r\n]*?)\2[ \t]*$", re.MULTILINE
)
# The end of a class's name -> the hub's tag, the Auto class, PEFT's task.
TASKS = {
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM", "CAUSAL_LM"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification", "SEQ_CLS"),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification", "TOKEN_CLS"),
    "Model": ("feature-extraction", "AutoModel", "FEATURE_EXTRACTION"),
}
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
    base_model: str | None = None,
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
        base_model: hub id of the model that was trained; without it, what the model was loaded from, if that is one.
        data: what it was trained on: hub ids of data sets, or words.
        metrics: name -> value, for the card.
        license: the hub's tag of the license; without it, what the base model's card says, if that is at hand.
        private: whether a new repository is private; None: the owner's default.
        token: of the hub; None: the one that `hf auth login` keeps.

    Raises:
        ValueError: another kind of model; an adapter of a base that has no hub id; a `base_model` that is none; a local
            path among what the card would say; a folder that is not empty.
    """
    adapter = hasattr(model, "peft_config")
    if adapter and not hasattr(model, "get_base_model"):
        raise ValueError(
            f"{type(model).__name__} has adapters by add_adapter(), which publish() does not take: wrap the model with "
            "peft.get_peft_model() instead, or use model.push_to_hub()."
        )
    inner = model.get_base_model() if adapter else model
    kind = getattr(getattr(inner, "config", None), "model_type", type(inner).__name__)
    if kind != "nemotron_h":
        raise ValueError(f"This is a {kind!r} model; publish() knows nemotron_h alone: use model.push_to_hub().")
    source = _source(model, adapter)
    if base_model is None:
        base_model = hub_id(source)
    elif hub_id(base_model) != base_model:
        what = "is a path on this machine" if _is_path(base_model) else "is no hub id, which is written owner/name"
        raise ValueError(f"base_model={base_model!r} {what}: write the hub id of the model that was trained.")
    if adapter and base_model is None:
        raise ValueError(
            f"The adapter's base model is {source!r}, which is on this machine alone: name its hub id with base_model=."
        )
    described = [data] if isinstance(data, str) else list(data or ())
    given: dict[str, list[Any]] = {
        "data": described,
        "metrics": [*(metrics or {}).values()],
    }
    for name, values in given.items():
        for value in values:
            if isinstance(value, str) and _is_path(value):
                raise ValueError(f"{name}={value!r} is a path on this machine: write a hub id, or say it in words.")
    said = {"license": license} if license else _license(source)
    to_hub = isinstance(where, str) and _HUB_ID.fullmatch(where) is not None and not os.path.isdir(where)
    target = Path(where).expanduser()
    if not to_hub:
        check_free(target)
    name = str(where) if to_hub else target.absolute().name
    card = model_card(
        model,
        name,
        tokenizer=tokenizer,
        base_model=base_model,
        data=described,
        metrics=metrics or {},
        license=said.get("license"),
        license_name=said.get("license_name"),
        license_link=said.get("license_link"),
    )
    if not to_hub:
        target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{name.split('/')[-1]}.", dir=None if to_hub else target.parent
    ) as scratch:
        folder = Path(scratch) / "model"
        with said_if_full(folder if to_hub else target):
            _write(model, inner, folder, tokenizer, base_model if adapter else None)
            (folder / "README.md").write_text(card, encoding="utf-8")
        if not to_hub:
            if target.exists():
                target.rmdir()
            folder.rename(target)
            return str(where)
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repository = api.create_repo(str(where), private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            commit_message=commit_message,
            delete_patterns=list(_REPLACED),  # but what the folder has
        )
        return str(repository)


def hub_id(name: str | None) -> str | None:
    """The hub id that a model was loaded by, where it was: of a folder in the hub's cache, the repository's."""
    if not name:
        return None
    if match := _IN_THE_CACHE.fullmatch(name.replace(os.sep, "/")):
        return f"{match[1]}/{match[2]}"
    return name if _HUB_ID.fullmatch(name) and not os.path.exists(name) else None


def _source(model: Any, adapter: bool) -> str | None:
    """What the model, or the adapter's base, was loaded from."""
    if adapter:
        return model.peft_config[model.active_adapter].base_model_name_or_path or None
    return getattr(model.config, "_name_or_path", None) or None


def _license(source: str | None) -> dict[str, str]:
    """What the card beside the source says of its license, a link to a file beside it made one to the hub's file."""
    card = Path(source or "", "README.md")
    if not source or not card.is_file():
        return {}
    head = re.match(r"---\r?\n(.*?)\n---", card.read_text(encoding="utf-8"), flags=re.DOTALL)
    said = {key: value for key, _, value in _LICENSE_LINE.findall(head[1] if head else "")}
    if "license" not in said:
        return {}
    link, base = said.get("license_link"), hub_id(source)
    if link and "://" not in link:
        if base is None:  # of a file that is not published
            del said["license_link"]
        else:
            said["license_link"] = f"https://huggingface.co/{base}/blob/main/{link.removeprefix('./')}"
    return said


def _is_path(value: str) -> bool:
    """Of this machine, or written as one."""
    if _ABSOLUTE.fullmatch(value) or _RELATIVE.fullmatch(value):
        return True
    path = os.path.expanduser(value)
    return len(value) < 1024 and (os.path.exists(path) if "/" in value or os.sep in value else os.path.isfile(path))


def _is_of_this_machine(value: Any) -> bool:
    """Of a string in a config, which may be anything else: a relative one counts where it is there."""
    if not isinstance(value, str):
        return False
    there = ("/" in value or os.sep in value) and len(value) < 1024 and os.path.exists(value)
    return there or _ABSOLUTE.fullmatch(value) is not None


def _task(inner: Any) -> tuple[str, str, str]:
    """The hub's tag, the Auto class and PEFT's task of a model's class."""
    return next((task for end, task in TASKS.items() if type(inner).__name__.endswith(end)), TASKS["ForCausalLM"])


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
            fields["auto_mapping"], fields["task_type"] = None, fields.get("task_type") or _task(inner)[2]
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
            if key not in _NOT_PUBLIC and not _is_of_this_machine(each)
        }
    if isinstance(value, list):
        return [_public(each) for each in value if not _is_of_this_machine(each)]
    return value


def model_card(
    model: Any,
    name: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base_model: str | None = None,
    data: Sequence[str] = (),
    metrics: Mapping[str, float | str] | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
) -> str:
    """The README.md of a model that is published as `name`, with the tags that the hub reads at its top."""
    adapter = hasattr(model, "peft_config")
    inner = model.get_base_model() if adapter else model
    task, _, _ = _task(inner)
    head: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": task,
        "license": license or _LICENSES_IN_WORDS,
        "license_name": license_name,
        "license_link": license_link,
        "base_model": base_model,
        "base_model_relation": None if base_model is None else ("adapter" if adapter else "finetune"),
        "datasets": [each for each in data if _HUB_ID.fullmatch(each)],
        "tags": ["nemotron-h", "mamba2", "hybrid", *(["lora"] if adapter else [])],
    }
    parts = [f"---\n{''.join(_yaml(head))}---\n", f"# {name.split('/')[-1]}\n", _what(model, adapter, base_model, data)]
    if metrics:
        rows = "".join(f"| {key} | {_number(value)} |\n" for key, value in metrics.items())
        parts.append(f"## Measured\n\n| | |\n|---|---|\n{rows}")
    parts.append(_how_to_load(inner, name, adapter, base_model))
    if tokenizer is not None and task == "text-generation":
        parts.append(_chat_format(tokenizer))
    if license in (None, _LICENSES_IN_WORDS):
        of = f"That of [{base_model}](https://huggingface.co/{base_model})" if base_model else "Not said"
        if license_name or license_link:
            of = f"[{license_name or license_link}]({license_link})" if license_link else str(license_name)
        parts.append(f"## License\n\n{of}.\n")
    return "\n".join(parts)


def _yaml(head: Mapping[str, Any]) -> Iterable[str]:
    """JSON's strings are YAML's."""
    for key, value in head.items():
        if isinstance(value, list) and value:
            yield f"{key}:\n" + "".join(f"- {json.dumps(each, ensure_ascii=False)}\n" for each in value)
        elif value and not isinstance(value, list):
            yield f"{key}: {json.dumps(value, ensure_ascii=False)}\n"


def _number(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _what(model: Any, adapter: bool, base_model: str | None, data: Sequence[str]) -> str:
    from ..configuration import LAYER_KINDS

    config = (model.get_base_model() if adapter else model).config
    counts = {kind: config.layers_block_type.count(kind) for kind in LAYER_KINDS}
    layers = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    of = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else None
    if adapter:
        own = sum(each.numel() for name, each in model.named_parameters() if "lora_" in name or each.requires_grad)
        text = f"A PEFT adapter of {own:,} weights for {of}, a Nemotron-H model"
    else:
        own = sum(each.numel() for each in model.parameters())
        text = f"A Nemotron-H model of {own:,} weights" + (f", trained from {of}" if of else "")
    text += f" ({config.num_hidden_layers} layers: {layers})."
    if data:
        text += f"\n\nTrained on: {', '.join(data)}."
    return text + "\n"


def _how_to_load(inner: Any, name: str, adapter: bool, base_model: str | None) -> str:
    task, auto, _ = _task(inner)
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
    imports = f"from transformers import {auto}, AutoTokenizer\n"
    if adapter:
        imports = f"from peft import PeftModel\n{imports}"
        labels = f", num_labels={inner.config.num_labels}" if task.endswith("classification") else ""
        load = (
            f'model = {auto}.from_pretrained("{base_model}"{labels}, dtype="auto")\n'
            f'model = PeftModel.from_pretrained(model, "{name}")\n'
        )
    else:
        load = f'model = {auto}.from_pretrained("{name}", dtype="auto")\n'
    text = (
        "## How to load\n\n"
        "With the package `nemotron-h`:\n\n"
        f"```python\nimport nemotron_h  # registers its classes with transformers\n{imports}\n{load}{tokenizer}```\n\n"
    )
    if method := _own_quantisation(inner, adapter):
        whose = "The base model's weights" if adapter else "The weights"
        return text + (
            f'{whose} are quantised (`quant_method` "{method}"), which the class of this family in `transformers` does '
            "not know: it would read them without their scales. The package is needed.\n"
        )
    if task.endswith("classification"):
        return text + "The package is needed: `transformers` has no class of this family with this head.\n"
    return text + (
        "Without it, leave the first line out: the class of this family in `transformers` (5.20 or newer) reads the "
        "same files. Up to 5.24 at least, that class keeps the time steps of Mamba layers above 0.001 while it reads a "
        "prompt, which the model was not trained with, so that its numbers differ a little.\n"
    )


def _own_quantisation(inner: Any, adapter: bool) -> str | None:
    """The method of weights that are published packed as this package alone reads them; of an adapter, of its base's.

    A base that was quantised while it was loaded is plain where others have it.
    """
    from ..checkpoints.modelopt import QUANT_METHOD as MODELOPT
    from ..quantization.int8_int4 import QUANT_METHOD

    stored = getattr(inner.config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, Mapping) else getattr(stored, "quant_method", None)
    if method not in (QUANT_METHOD, MODELOPT) or (adapter and not _stored_packed(inner)):
        return None
    return str(method)


def _stored_packed(inner: Any) -> bool:
    return getattr(getattr(inner, "hf_quantizer", None), "pre_quantized", True)


def _chat_format(tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        return "## Format\n\nThere is no chat template: prompts are continued as they are.\n"
    from ..generation.reasoning import switch_reasoning

    shown = {}
    for think in (True, False):
        messages: list[dict[str, Any]] = [{"role": "user", "content": "How are you?"}]
        messages, arguments, _ = switch_reasoning(messages, think, tokenizer)
        shown[think] = (
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **arguments),
            f"`{', '.join(f'{key}={value}' for key, value in arguments.items())}`"
            if arguments
            else f"`{messages[0]['content']}` as the system text",
        )
    fence = "`" * 4
    text = "## Chat format\n\n`tokenizer.apply_chat_template(messages, add_generation_prompt=True)` writes it"
    if shown[True][0] == shown[False][0]:
        return f"{text}:\n\n{fence}text\n{shown[True][0]}\n{fence}\n"
    return (
        f"{text}. With reasoning ({shown[True][1]}):\n\n{fence}text\n{shown[True][0]}\n{fence}\n\n"
        f"and without ({shown[False][1]}):\n\n{fence}text\n{shown[False][0]}\n{fence}\n"
    )


__all__ = ["hub_id", "model_card", "publish"]

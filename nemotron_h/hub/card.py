"""The model card: what the hub reads at its top, and how to load the model beneath."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..checkpoints.modelopt import QUANT_METHOD as MODELOPT
from ..configuration import LAYER_KINDS
from ..generation.reasoning import switch_reasoning
from ..quantization.int8_int4 import QUANT_METHOD

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LICENSES_IN_WORDS = "other"
# The end of a class's name -> the hub's tag, the Auto class, PEFT's task.
TASKS = {
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM", "CAUSAL_LM"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification", "SEQ_CLS"),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification", "TOKEN_CLS"),
    "Model": ("feature-extraction", "AutoModel", "FEATURE_EXTRACTION"),
}


def is_hub_id(name: str) -> bool:
    """Whether it is written as one, owner/name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def task_of(inner: Any) -> tuple[str, str, str]:
    """The hub's tag, the Auto class and PEFT's task of a model's class."""
    return next((task for end, task in TASKS.items() if type(inner).__name__.endswith(end)), TASKS["ForCausalLM"])


def model_card(
    model: Any,
    name: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base_model: str | None = None,
    data: Sequence[str] = (),
    metrics: Mapping[str, float | str] | None = None,
    licensed: Mapping[str, str] | None = None,
) -> str:
    """The README.md of a model that is published as `name`, with the tags that the hub reads at its top.

    Args:
        data: what it was trained on; hub ids become the hub's tags.
        licensed: `license`, the hub's tag, with `license_name` and `license_link` where that is "other".
    """
    adapter = hasattr(model, "peft_config")
    inner = model.get_base_model() if adapter else model
    task, _, _ = task_of(inner)
    tag, words, link = ((licensed or {}).get(key) for key in ("license", "license_name", "license_link"))
    head: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": task,
        "license": tag or _LICENSES_IN_WORDS,
        "license_name": words,
        "license_link": link,
        "base_model": base_model,
        "base_model_relation": None if base_model is None else ("adapter" if adapter else "finetune"),
        "datasets": [each for each in data if is_hub_id(each)],
        "tags": ["nemotron-h", "mamba2", "hybrid", *(["lora"] if adapter else [])],
    }
    parts = [f"---\n{''.join(_yaml(head))}---\n", f"# {name.split('/')[-1]}\n", _what(model, adapter, base_model, data)]
    if metrics:
        rows = "".join(f"| {key} | {_number(value)} |\n" for key, value in metrics.items())
        parts.append(f"## Measured\n\n| | |\n|---|---|\n{rows}")
    parts.append(_how_to_load(inner, name, adapter, base_model))
    if tokenizer is not None and task == "text-generation":
        parts.append(_chat_format(tokenizer))
    if tag in (None, _LICENSES_IN_WORDS):
        of = f"That of {_linked(base_model)}" if base_model else "Not said"
        if words or link:
            of = f"[{words or link}]({link})" if link else str(words)
        parts.append(f"## License\n\n{of}.\n")
    return "\n".join(parts)


def _yaml(head: Mapping[str, Any]) -> Iterable[str]:
    """JSON's strings are YAML's."""
    for key, value in head.items():
        if isinstance(value, list) and value:
            yield f"{key}:\n" + "".join(f"- {json.dumps(each, ensure_ascii=False)}\n" for each in value)
        elif value and not isinstance(value, list):
            yield f"{key}: {json.dumps(value, ensure_ascii=False)}\n"


def _linked(name: str | None) -> str:
    return f"[{name}](https://huggingface.co/{name})"


def _number(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _what(model: Any, adapter: bool, base_model: str | None, data: Sequence[str]) -> str:
    config = (model.get_base_model() if adapter else model).config
    counts = {kind: config.layers_block_type.count(kind) for kind in LAYER_KINDS}
    layers = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    if adapter:
        own = sum(each.numel() for name, each in model.named_parameters() if "lora_" in name or each.requires_grad)
        text = f"A PEFT adapter of {own:,} weights for {_linked(base_model)}, a Nemotron-H model"
    else:
        own = sum(each.numel() for each in model.parameters())
        text = f"A Nemotron-H model of {own:,} weights" + (
            f", trained from {_linked(base_model)}" if base_model else ""
        )
    text += f" ({config.num_hidden_layers} layers: {layers})."
    if data:
        text += f"\n\nTrained on: {', '.join(data)}."
    return text + "\n"


def _how_to_load(inner: Any, name: str, adapter: bool, base_model: str | None) -> str:
    task, auto, _ = task_of(inner)
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
    if method := _own_quantization(inner, adapter):
        whose = "The base model's weights" if adapter else "The weights"
        return text + (
            f'{whose} are quantized (`quant_method` "{method}"), which the class of this family in `transformers` does '
            "not know: it would read them without their scales. The package is needed.\n"
        )
    if task.endswith("classification"):
        return text + "The package is needed: `transformers` has no class of this family with this head.\n"
    return text + (
        "Without it, leave the first line out: the class of this family in `transformers` (5.20 or newer) reads the "
        "same files. Up to 5.24 at least, that class keeps the time steps of Mamba layers above 0.001 while it reads a "
        "prompt, which the model was not trained with, so that its numbers differ a little.\n"
    )


def _own_quantization(inner: Any, adapter: bool) -> str | None:
    """The method of weights that are published packed as this package alone reads them; of an adapter, of its base's.

    A base that was quantized while it was loaded is plain where others have it.
    """
    stored = getattr(inner.config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, Mapping) else getattr(stored, "quant_method", None)
    packed = getattr(getattr(inner, "hf_quantizer", None), "pre_quantized", True)
    return str(method) if method in (QUANT_METHOD, MODELOPT) and (packed or not adapter) else None


def _chat_format(tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        return "## Format\n\nThere is no chat template: prompts are continued as they are.\n"
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

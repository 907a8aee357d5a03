"""Nemotron-H models in Hugging Face `transformers`: importing this package registers them with the Auto classes.

The model classes are imported when the first config is made or one of them is asked for by name: until then, importing
this package costs next to nothing beside `transformers`.
"""

from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from ._version import __version__
from .configuration import NemotronHConfig, _before_first_use

if TYPE_CHECKING:
    from .cache import NemotronHCache
    from .lora import LoraCoverage, lora_config, lora_coverage
    from .modeling import (
        NemotronHForCausalLM,
        NemotronHForSequenceClassification,
        NemotronHForTokenClassification,
        NemotronHModel,
        NemotronHPreTrainedModel,
    )
    from .prompt_cache import PromptCache
    from .publishing import publish
    from .quantization import NemotronHQuantizationConfig

_AUTO = {
    "NemotronHModel": AutoModel,
    "NemotronHForCausalLM": AutoModelForCausalLM,
    "NemotronHForSequenceClassification": AutoModelForSequenceClassification,
    "NemotronHForTokenClassification": AutoModelForTokenClassification,
}
_MODELS = (*_AUTO, "NemotronHPreTrainedModel")
_LORA = ("LoraCoverage", "lora_config", "lora_coverage")


def _register_models() -> None:
    import transformers

    from . import modeling
    from . import quantization as quantization  # registers the method

    for name, auto in _AUTO.items():
        auto.register(NemotronHConfig, getattr(modeling, name), exist_ok=True)
    # TRL and `transformers serve` look up the name in config.architectures in `transformers` itself; whoever wants the
    # library's own classes finds them in transformers.models.nemotron_h.
    for name in _MODELS:
        setattr(transformers, name, getattr(modeling, name))
    transformers.NemotronHConfig = NemotronHConfig


# `exist_ok`: transformers has a class of its own under this model type, which a registered one precedes. A checkpoint's
# `auto_map` is passed over too, since transformers prefers a registered class to remote code. The Auto classes look a
# model up by its config, so no one asks for a model class before a config exists.
AutoConfig.register("nemotron_h", NemotronHConfig, exist_ok=True)
_before_first_use.append(_register_models)


def __getattr__(name: str) -> Any:
    value: Any
    if name == "NemotronHCache":
        from . import cache

        value = cache.NemotronHCache
    elif name == "NemotronHQuantizationConfig":
        from . import quantization

        value = quantization.NemotronHQuantizationConfig
    elif name in _LORA:
        from . import lora

        value = getattr(lora, name)
    elif name == "PromptCache":
        from . import prompt_cache

        value = prompt_cache.PromptCache
    elif name == "publish":
        from . import publishing

        value = publishing.publish
    elif name in _MODELS:
        from . import modeling

        value = getattr(modeling, name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


__all__ = [
    "LoraCoverage",
    "NemotronHCache",
    "NemotronHConfig",
    "NemotronHForCausalLM",
    "NemotronHForSequenceClassification",
    "NemotronHForTokenClassification",
    "NemotronHModel",
    "NemotronHPreTrainedModel",
    "NemotronHQuantizationConfig",
    "PromptCache",
    "__version__",
    "lora_config",
    "lora_coverage",
    "publish",
]

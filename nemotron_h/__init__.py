"""Nemotron-H models in Hugging Face `transformers`: importing this package registers them with the Auto classes.

The model classes are imported when the first config is made or one of them is asked for by name: until then, importing
this package costs next to nothing beside `transformers`.
"""

from importlib import import_module
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
    from .cache.hybrid import NemotronHCache
    from .generation.prompt_cache import PromptCache
    from .hub.publish import publish
    from .modeling import (
        NemotronHForCausalLM,
        NemotronHForSequenceClassification,
        NemotronHForTokenClassification,
        NemotronHModel,
        NemotronHPreTrainedModel,
    )
    from .quantization.int8_int4 import NemotronHQuantizationConfig
    from .training.lora import LoraCoverage, lora_config, lora_coverage

_AUTO = {
    "NemotronHModel": AutoModel,
    "NemotronHForCausalLM": AutoModelForCausalLM,
    "NemotronHForSequenceClassification": AutoModelForSequenceClassification,
    "NemotronHForTokenClassification": AutoModelForTokenClassification,
}
_MODELS = (*_AUTO, "NemotronHPreTrainedModel")
_HOME = {
    **dict.fromkeys(_MODELS, "modeling"),
    **dict.fromkeys(("LoraCoverage", "lora_config", "lora_coverage"), "training.lora"),
    "NemotronHCache": "cache.hybrid",
    "NemotronHQuantizationConfig": "quantization.int8_int4",
    "PromptCache": "generation.prompt_cache",
    "publish": "hub.publish",
}
"""Where a name is imported from when it is first asked for."""


def _register_models() -> None:
    import transformers

    from . import modeling

    import_module(f"{__name__}.quantization.int8_int4")  # registers the method
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
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
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

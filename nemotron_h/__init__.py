"""Nemotron-H models in Hugging Face `transformers`: importing this package registers them with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from ._version import __version__
from .cache import NemotronHCache
from .configuration import NemotronHConfig
from .modeling import (
    NemotronHForCausalLM,
    NemotronHForSequenceClassification,
    NemotronHForTokenClassification,
    NemotronHModel,
    NemotronHPreTrainedModel,
)

# `exist_ok`: transformers has a class of its own under this model type, which a registered one precedes. A checkpoint's
# `auto_map` is passed over too, since transformers prefers a registered class to remote code.
AutoConfig.register("nemotron_h", NemotronHConfig, exist_ok=True)
AutoModel.register(NemotronHConfig, NemotronHModel, exist_ok=True)
AutoModelForCausalLM.register(NemotronHConfig, NemotronHForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(NemotronHConfig, NemotronHForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(NemotronHConfig, NemotronHForTokenClassification, exist_ok=True)

__all__ = [
    "NemotronHCache",
    "NemotronHConfig",
    "NemotronHForCausalLM",
    "NemotronHForSequenceClassification",
    "NemotronHForTokenClassification",
    "NemotronHModel",
    "NemotronHPreTrainedModel",
    "__version__",
]

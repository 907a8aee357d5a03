"""NVIDIA's FP8 and NVFP4 checkpoints through `transformers`' quantizer interface: dequantised, or kept packed.

    from_pretrained(name)                         plain weights, in the dtype that is asked for; saved as a plain folder
    from_pretrained(name, quantized="packed")     packed weights, dequantised where they are used; saved as they were

Formats, names on disk and how modules are told apart: `checkpoints/modelopt.py`; arithmetic: `ops/fp8_nvfp4.py`.
In memory a packed linear layer has `weight`, `weight_scale`, `weight_scale_2` and `input_scale` as on disk; experts are
stacked: `up_proj`, `up_proj_scale`, `up_proj_scale_2`, `up_input_scale`, and the same of `down`. Scales of activations
and of an FP8 cache are kept for saving and not used.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoints import modelopt
from ..checkpoints.modelopt import FP8, INPUT_SCALE, KV_SCALES, QUANT_METHOD, SIDECAR, WEIGHT_SCALE, Recipe, canonical
from ..checkpoints.tensors import SafetensorsFolder, Shape, Spec
from ..configuration import NemotronHConfig
from ..layers.moe import NemotronHExperts
from ..ops.fp8_nvfp4 import FORMATS
from ..ops.packed import Format
from .packed import (
    PROJECTIONS,
    PackedExperts,
    PackedLinear,
    PackedQuantizer,
    PackedWeights,
    hub_arguments,
    register_method,
    to_plain,
)

PACKED = "packed"
# The end of a tensor's name on disk -> what stands in its place in the name of stacked experts.
_STACKED = {"weight": "{0}_proj", WEIGHT_SCALE: "{0}_proj_scale", "weight_scale_2": "{0}_proj_scale_2"}
_STACKED[INPUT_SCALE] = "{0}_input_scale"  # not up_proj_...: transformers 5.17 takes a name's beginning for the name


class NemotronHModelOptConfig(QuantizationConfigMixin):
    """`quantization_config` as ModelOpt writes it, kept word for word.

    Args:
        dequantize: make plain weights on loading; False is `quantized="packed"`. Not saved.
        fields: everything else.
    """

    def __init__(self, dequantize: bool = True, **fields: Any):
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.dequantize = dequantize
        self.fields = fields

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.fields)

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


class _LowPrecision(PackedWeights):
    """Parameters as they are on disk."""

    how: str

    @property
    def format(self) -> Format:
        return FORMATS[self.how]

    def _make(self, how: str, specs: Mapping[str, Spec], device: Any) -> None:
        self.how = how
        for name, spec in specs.items():
            self._hold(name, spec.shape, spec.dtype, device)


class LowPrecisionLinear(_LowPrecision, PackedLinear):
    """A linear layer whose weight is FP8 or NVFP4."""

    def __init__(self, plain: nn.Linear, how: str, specs: Mapping[str, Spec]):
        super().__init__(plain.in_features, plain.out_features)
        self._make(how, specs, plain.weight.device)
        self.bias = plain.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.how}"


class LowPrecisionExperts(_LowPrecision, PackedExperts):
    """Experts in FP8 or NVFP4."""

    def __init__(self, plain: NemotronHExperts, how: str, specs: Mapping[str, Spec]):
        super().__init__(plain)
        self._make(how, specs, plain.up_proj.device)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, {self.how}"


class _Stack(ConversionOps):
    """One tensor per expert -> one tensor; the library's own of 5.17 loses dimensions of size 1 on the way back."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Tensor]:
        return {target_patterns[0]: torch.stack(next(iter(input_dict.values())))}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Unstack()


class _Unstack(ConversionOps):
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Tensor]:
        value = next(iter(input_dict.values()))
        tensor = value[0] if isinstance(value, list) else value
        # Cloned: a slice shares its storage with the others, which a file cannot.
        return {target_patterns[0].replace("*", str(i)): part.clone() for i, part in enumerate(tensor.unbind(0))}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Stack()


class NemotronHModelOptQuantizer(PackedQuantizer):
    """Reads weights as they are on disk; afterwards, unless they are to stay packed, makes plain ones, one module at a
    time."""

    quantization_config: NemotronHModelOptConfig

    def __init__(self, quantization_config: NemotronHModelOptConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.dtype: torch.dtype | None = None
        self._added: list[WeightConverter] = []

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ValueError(
                "A NemotronHModelOptConfig describes weights that are quantised already, and these are not: write a "
                "quantised folder with `nemotron-h convert SOURCE DEST --to nvfp4`, and load that."
            )

    def _made_on_loading(self) -> str:
        if not self.quantization_config.dequantize:
            return ""
        return (
            'weights that are being dequantised cannot go: pass quantized="packed", or write a plain folder with '
            "`nemotron-h convert SOURCE DEST --to huggingface`."
        )

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """What an element will take: an NVFP4 byte becomes two values where the weights are dequantised."""
        module, _dot, name = param_name.rpartition(".")
        packed = model.get_submodule(module)
        if self.quantization_config.dequantize and isinstance(packed, _LowPrecision) and name in packed.weights():
            return (self.dtype or torch.bfloat16).itemsize * (1 if packed.how == FP8 else 2)
        return param.element_size()

    def replacements(
        self, model: Any, dtype: torch.dtype | None = None, checkpoint_files: Any = None, **_: Any
    ) -> Iterator[tuple[str, nn.Module]]:
        source = model.config.name_or_path
        self.dtype = dtype
        recipe = Recipe.read(self.quantization_config.fields, source)
        specs = {canonical(name): spec for name, spec in _specs(checkpoint_files, source).items()}
        shapes = dict(_published_shapes(model))
        if model.config.tie_word_embeddings:
            shapes.pop("lm_head.weight", None)
        found = modelopt.modules(shapes, specs, recipe, source)
        for name, module in list(model.named_modules()):
            place = canonical(name)
            if isinstance(module, NemotronHExperts):
                if packed := _packed_experts(place, module, found, source):
                    yield name, packed
            elif place in found and isinstance(module, nn.Linear):
                how, tensors = found[place]
                yield name, LowPrecisionLinear(module, how, tensors)
            elif (scale := KV_SCALES.get(place.rpartition(".")[2])) and f"{place}.{scale}" in specs:
                empty = torch.empty(specs[f"{place}.{scale}"].shape, dtype=torch.float32, device=module.weight.device)
                module.register_parameter(scale, nn.Parameter(empty, requires_grad=False))

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Before the experts' own, converters for all that belongs to their weights; longer names first."""
        self._added = [
            WeightConverter(f"mixer.experts.*.{name}.{end}", f"mixer.experts.{stacked.format(name[:-5])}", [_Stack()])
            for end, stacked in reversed(_STACKED.items())
            for name in PROJECTIONS
            if end != "weight"
        ]
        return [*self._added, *weight_conversions]

    def finish(self, model: Any, source: Any) -> Any:
        if self.quantization_config.dequantize:
            _drop_kv_scales(model)
            return to_plain(model, self.dtype or model.dtype)
        if (used := getattr(model, "_weight_conversions", None)) is not None:
            # Saving turns the list around, so what is to come first comes last.
            others = [conversion for conversion in used if conversion not in self._added]
            model._weight_conversions = [*others, *(made for made in reversed(self._added) if made in used)]
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        _drop_kv_scales(model)
        return super()._dequantize(model, dtype)


def _drop_kv_scales(model: nn.Module) -> None:
    for module in model.modules():
        if not isinstance(module, PackedWeights):
            for scale in KV_SCALES.values():
                module._parameters.pop(scale, None)


class _Files(SafetensorsFolder):
    def __init__(self, files: Iterable[str]) -> None:
        self._given = [Path(file) for file in files]
        super().__init__(self._given[0].parent)

    def _files(self) -> list[Path]:
        return self._given


def _specs(checkpoint_files: Any, source: Any) -> Mapping[str, Spec]:
    files = list(checkpoint_files or ())
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise ValueError(
            f"{source or 'The state dict'} is quantised by ModelOpt, and that is read from *.safetensors alone: name "
            "the folder that has them."
        )
    return _Files(files).specs


def _published_shapes(model: nn.Module) -> Iterable[tuple[str, Shape]]:
    """The matrices of a model, (N, K), by their names on disk (`canonical`), experts one by one."""
    for name, module in model.named_modules():
        if isinstance(module, NemotronHExperts):
            for projection in PROJECTIONS:
                shape = tuple(getattr(module, projection).shape[1:])
                for expert in range(module.num_experts):
                    yield f"{canonical(name)}.{expert}.{projection}.weight", shape
        elif isinstance(module, nn.Linear):
            yield f"{canonical(name)}.weight", tuple(module.weight.shape)


def _packed_experts(place: str, module: NemotronHExperts, found: Mapping[str, Any], source: Any) -> nn.Module | None:
    """The packed experts, still empty; None where they are plain.

    Raises: ValueError where they are not all alike, for they are stacked.
    """
    number = module.num_experts
    each = {
        name: [found.get(f"{place}.{expert}.{name}", (None, {})) for expert in range(number)] for name in PROJECTIONS
    }
    ways: set[Any] = {how for alike in each.values() for how, _tensors in alike}
    if ways == {None}:
        return None
    if len(ways) > 1 or any(way != alike[0] for alike in each.values() for way in alike):
        raise ValueError(
            f"{source} has experts in {place} that are quantised in different ways, which cannot be stacked: write "
            "a plain folder with `nemotron-h convert SOURCE DEST --to huggingface`, and load that."
        )
    specs = {
        _STACKED[end].format(name[:-5]): Spec((number, *spec.shape), spec.dtype)
        for name, alike in each.items()
        for end, spec in alike[0][1].items()
    }
    return LowPrecisionExperts(module, ways.pop(), specs)


def prepare(quantized: Any, source: Any, arguments: dict[str, Any]) -> None:
    """Make `arguments`, those of `from_pretrained(source, ...)`, say how weights that ModelOpt quantised are loaded.

    A config that is silent on the quantisation is completed from hf_quant_config.json, where there is one.

    Raises: ValueError for an unknown `quantized`, and for a model that ModelOpt did not quantise.
    """
    if quantized not in (None, PACKED):
        raise ValueError(f"quantized={quantized!r} is not known: write {PACKED!r}, or leave it out.")
    if source is None or arguments.get("gguf_file"):
        return
    given = arguments.get("config")
    config = given if isinstance(given, NemotronHConfig) else None
    stored = getattr(config, "quantization_config", None)
    if config is None and (quantized or _sidecar(source, arguments)):
        hub = hub_arguments(arguments)
        config = NemotronHConfig.from_pretrained(source if given is None else given, **hub)
        # What transformers would have read them with, had it read the config.
        for name in [name for name in arguments if name not in hub and name not in ("dtype", "torch_dtype")]:
            if hasattr(config, name) and name != "quantization_config" and not name.startswith("attn_impl"):
                setattr(config, name, arguments.pop(name))
        stored = getattr(config, "quantization_config", None)
    if stored is None and config is not None:
        stored = _sidecar(source, arguments)
    fields = stored if stored is None or isinstance(stored, dict) else stored.to_dict()
    if fields is None or not str(fields.get("quant_method", "")).startswith(QUANT_METHOD):
        if quantized:
            kind = "not quantised" if fields is None else f"quantised by {fields.get('quant_method')}"
            raise ValueError(f"quantized={quantized!r}, but {source} is {kind}, not by ModelOpt: leave quantized out.")
        return
    if config is not None:
        config = copy.deepcopy(config)
        config.quantization_config = {**fields, "quant_method": QUANT_METHOD, "dequantize": quantized is None}
        arguments["config"] = config


def _sidecar(source: Any, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    hub = hub_arguments(arguments)
    silent = {"_raise_exceptions_for_gated_repo", "_raise_exceptions_for_missing_entries"}
    silent.add("_raise_exceptions_for_connection_errors")
    try:
        file = cached_file(source, SIDECAR, **hub, **dict.fromkeys(silent, False))
    except OSError:
        return None  # no such repository, which loading says
    return None if file is None else modelopt.sidecar(modelopt._json(Path(file)))


register_method(QUANT_METHOD, NemotronHModelOptConfig, NemotronHModelOptQuantizer)

__all__ = [
    "PACKED",
    "LowPrecisionExperts",
    "LowPrecisionLinear",
    "NemotronHModelOptConfig",
    "NemotronHModelOptQuantizer",
    "prepare",
]

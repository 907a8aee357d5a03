"""Weight-only int8 and int4 through `transformers`' quantizer interface: on the fly at loading, saved, loaded again.

    from_pretrained(name, quantize="int8")        or "int4"
    from_pretrained(name, quantization_config=NemotronHQuantizationConfig(bits=4, modules_to_not_convert=["o_proj"]))

Quantised are the linear layers and the routed experts. Embeddings, norms, convolutions, the router, A_log, D, dt_bias,
classification heads and multi-token prediction never are, the language-modelling head only where it is asked for. The
formats are those of `ops/int8_int4.py`. On disk a weight `x.weight` is `x.weight` and `x.weight_scale`, under its
published name, and experts are one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.utils import is_torchao_available
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import ops
from ..configuration import NemotronHConfig
from ..layers.moe import NemotronHExperts
from ..ops.int8_int4 import FORMATS, packed_dtypes, packed_shapes
from ..ops.packed import Format
from .packed import (
    PackedExperts,
    PackedLinear,
    PackedQuantizer,
    PackedWeights,
    hub_arguments,
    register_method,
    wrong_shape,
)

QUANT_METHOD = "nemotron_h_weight_only"
BITS = {"int8": 8, "int4": 4}

# Whatever the config says: no weight of the published layers, or not called at all.
_NEVER = ("score", "mtp")
_HEAD = "lm_head"


class NemotronHQuantizationConfig(QuantizationConfigMixin):
    """How a model is, or is to be, quantised.

    Args:
        bits: 8 or "int8", 4 or "int4".
        modules_to_not_convert: modules left as they are, each by the end, the beginning or a middle part of its name:
            "o_proj", "layers.0", "mixer.experts". Regular expressions, between two dots.
        include_output_embeddings: the language-modelling head as well.

    Raises: ValueError for another number of bits, TypeError for an unknown argument.
    """

    def __init__(
        self,
        bits: int | str = 8,
        modules_to_not_convert: list[str] | None = None,
        include_output_embeddings: bool = False,
        **kwargs: Any,
    ):
        kwargs.pop("quant_method", None)
        if kwargs:
            name, value = next(iter(kwargs.items()))
            raise TypeError(
                f"NemotronHQuantizationConfig got the unknown argument {name}={value!r}: leave it out; "
                "`help(NemotronHQuantizationConfig)` lists what there is."
            )
        number = BITS.get(bits, 0) if isinstance(bits, str) else bits
        if number not in BITS.values():
            raise ValueError(f"bits={bits!r} is not known: write 8 (or 'int8') or 4 (or 'int4').")
        if isinstance(modules_to_not_convert, str):
            modules_to_not_convert = [modules_to_not_convert]
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.bits = int(number)
        self.modules_to_not_convert = modules_to_not_convert
        self.include_output_embeddings = include_output_embeddings


class _Integers(PackedWeights):
    bits: int

    @property
    def format(self) -> Format:
        return FORMATS[self.bits]

    def _make(self, bits: int, packed: bool, dtype: torch.dtype | None, device: Any) -> None:
        """Empty parameters: of the packed weights, or, until those are made from the plain ones, of the plain ones."""
        self.bits = bits
        for name, (*lead, n, k) in self.weights().items():
            q_shape, scale_shape = packed_shapes(bits, n, k)
            q_dtype, scale_dtype = packed_dtypes(bits)
            shape, kind = (q_shape, q_dtype) if packed else ((n, k), dtype or torch.get_default_dtype())
            self._hold(name, (*lead, *shape), kind, device)
            self._hold(f"{name}_scale", (*lead, *scale_shape), scale_dtype, device)


class QuantizedLinear(_Integers, PackedLinear):
    """A linear layer whose `weight` is packed integers and `weight_scale` their scales."""

    readable_weight = True  # by layers/fused.py, in place of a call
    weight_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        bias: bool = True,
        *,
        packed: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features)
        self._make(bits, packed, dtype, device)
        made = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", made)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


class QuantizedExperts(_Integers, PackedExperts):
    """Experts in int8 or int4."""

    up_proj: Tensor
    up_proj_scale: Tensor
    down_proj: Tensor
    down_proj_scale: Tensor

    def __init__(self, plain: NemotronHExperts, bits: int, packed: bool):
        super().__init__(plain)
        self._make(bits, packed, plain.up_proj.dtype, plain.up_proj.device)

    def extra_repr(self) -> str:
        experts, inner, width = self.weights()["up_proj"]
        return f"num_experts={experts}, width={width}, intermediate_size={inner}, bits={self.bits}"


class _Quantize(ConversionOps):
    """A plain weight, as read -> its integers and scales. What cannot be quantised is handed on, to be refused later:
    an error here would only be logged."""

    def __init__(self, quantizer: NemotronHQuantizer):
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], model: nn.Module | None = None, full_layer_name: str = "", **_: Any
    ) -> dict[str, Tensor]:
        _name, value = input_dict.popitem()
        weight = value.pop() if isinstance(value, list) else value
        assert model is not None
        module, _dot, parameter = full_layer_name.rpartition(".")
        if tuple(weight.shape) != model.get_submodule(module).weights()[parameter]:  # type: ignore[operator]
            return {full_layer_name: weight}
        try:
            q, scale = ops.quantize_weight(weight, self.quantizer.quantization_config.bits)
        except ValueError as error:
            self.quantizer.problems.append(f"{full_layer_name}: {error}")
            return {full_layer_name: weight}
        return {full_layer_name: q, f"{full_layer_name}_scale": scale}


class NemotronHQuantizer(PackedQuantizer):
    """Makes the packed weights from the plain ones, tensor by tensor, where the checkpoint is not quantised yet."""

    def __init__(self, quantization_config: NemotronHQuantizationConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.problems: list[str] = []
        self._pairs: list[tuple[WeightConverter, WeightConverter]] = []

    def _made_on_loading(self) -> str:
        if self.pre_quantized:
            return ""
        return (
            "a model that is being quantised cannot go: save it quantised first (`nemotron-h quantize`), and load that."
        )

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        module, _dot, name = param_name.rpartition(".")
        packed = model.get_submodule(module)
        return not self.pre_quantized and isinstance(packed, _Integers) and name in packed.weights()

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        if self.param_needs_quantization(model, param_name):
            return self.quantization_config.bits / 8
        return param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def replacements(self, model: Any, **loading: Any) -> Iterator[tuple[str, nn.Module]]:
        config = self.quantization_config
        if config.include_output_embeddings and model.config.tie_word_embeddings:
            raise ValueError(
                "include_output_embeddings=True, but the head of this model is its embedding table "
                "(tie_word_embeddings=True), which is not quantised: leave include_output_embeddings out."
            )
        for name, module in _to_quantize(model, config, check=not self.pre_quantized):
            yield name, _packed(module, config.bits, packed=self.pre_quantized)

    def check_read(self, model: Any, source: Any) -> None:
        if self.problems:
            raise ValueError(f"{source} cannot be quantised: {self.problems[0]}")
        for name, module in model.named_modules():
            if isinstance(module, _Integers):
                _check_packed(name, module, source)

    def finish(self, model: Any, source: Any) -> Any:
        """Saving turns back the conversions that loading used: where the scales were made here, theirs was not."""
        if (used := getattr(model, "_weight_conversions", None)) is not None:
            missing = [scales for values, scales in self._pairs if values in used and scales not in used]
            model._weight_conversions = [*used, *missing]
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """With the experts' converters, one for each that does the same with their scales."""
        converters = [conversion for conversion in weight_conversions if isinstance(conversion, WeightConverter)]
        self._pairs = [(converter, _for_scales(converter)) for converter in converters]
        return [*weight_conversions, *(scales for _values, scales in self._pairs)]


def _for_scales(converter: WeightConverter) -> WeightConverter:
    sources, targets = converter._original_source_patterns, converter._original_target_patterns
    made = WeightConverter(
        [f"{source}_scale" for source in sources], [f"{target}_scale" for target in targets], list(converter.operations)
    )
    made.scope_prefix, made.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
    return made


def _to_quantize(model: Any, config: NemotronHQuantizationConfig, check: bool) -> Iterator[tuple[str, nn.Module]]:
    """The modules of `model` that `config` means; `check` that each exclusion means something."""
    left_out = [_compile(pattern) for pattern in config.modules_to_not_convert or ()]
    names = {_canonical(name): name for name, _ in model.named_modules()}
    for pattern, expression in zip(config.modules_to_not_convert or (), left_out, strict=True):
        if check and not any(expression.search(name) for name in (*names, _HEAD, *_NEVER)):
            raise ValueError(
                f"modules_to_not_convert has {pattern!r}, which no module of {type(model).__name__} is called: correct "
                "it; `model.named_modules()` lists the names."
            )
    # A head of another class is new more often than not, and small.
    heads = {name for name, child in model.named_children() if isinstance(child, nn.Linear)} - {_HEAD}
    always = [_compile(name) for name in (*_NEVER, *heads, *(() if config.include_output_embeddings else (_HEAD,)))]
    for canonical, name in names.items():
        module = model.get_submodule(name)
        linear = isinstance(module, nn.Linear) and not isinstance(module, PackedWeights)
        if linear or isinstance(module, NemotronHExperts):
            if not any(expression.search(canonical) for expression in (*left_out, *always)):
                yield name, module


def _canonical(name: str) -> str:
    """A module's name as it is in every class of the family, on disk and in memory."""
    return name.removeprefix("model.").removeprefix("backbone.").removesuffix(".weight")


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(?:^|\.)(?:{_canonical(pattern)})(?:\.|$)")
    except re.error as error:
        raise ValueError(
            f"modules_to_not_convert has {pattern!r}, which is no regular expression ({error}): write a part of a "
            "module's name, such as 'o_proj'."
        ) from None


def _packed(module: Any, bits: int, packed: bool) -> PackedWeights:
    """The packed module, still empty, for a plain one."""
    if isinstance(module, NemotronHExperts):
        return QuantizedExperts(module, bits, packed)
    return QuantizedLinear(
        module.in_features, module.out_features, bits, module.bias is not None,
        packed=packed, device=module.weight.device, dtype=module.weight.dtype,
    )  # fmt: skip


def _check_packed(name: str, module: _Integers, source: str) -> None:
    bits = module.bits
    for weight, (*lead, n, k) in module.weights().items():
        q_shape, scale_shape = packed_shapes(bits, n, k)  # type: ignore[arg-type]
        q, scale = getattr(module, weight), getattr(module, f"{weight}_scale")
        if q.is_floating_point() and q.shape == (*lead, n, k):
            continue  # the checkpoint has none, which `from_pretrained` says
        if q.is_floating_point():
            raise ValueError(wrong_shape(source, f"{name}.{weight}", q.shape, (*lead, n, k)))
        for suffix, found, expected in (("", q, q_shape), ("_scale", scale, scale_shape)):
            if found.shape != (*lead, *expected):
                raise ValueError(wrong_shape(source, f"{name}.{weight}{suffix}", found.shape, (*lead, *expected)))


def weight_bytes(config: NemotronHConfig, quantization_config: NemotronHQuantizationConfig) -> tuple[int, int]:
    """Bytes of a causal model's weights as its config has them, and quantised. Nothing is read or allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).to(config.dtype or torch.bfloat16)
    plain = _bytes(model)
    for name, module in list(_to_quantize(model, quantization_config, check=True)):
        model.set_submodule(name, _packed(module, quantization_config.bits, packed=True))
    return plain, _bytes(model)


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def agreement(logits_TV: Tensor, reference_TV: Tensor) -> tuple[float, float]:
    """The mean KL divergence of a model's logits from a reference's, in nats, and how often both like the same best."""
    divergence, same = 0.0, 0
    for row_V, reference_V in zip(logits_TV, reference_TV, strict=True):  # one by one: a vocabulary is large
        log_q, log_p = row_V.double().log_softmax(-1), reference_V.double().log_softmax(-1)
        divergence += (log_p.exp() * (log_p - log_q)).sum().item()
        same += int(row_V.argmax() == reference_V.argmax())
    return divergence / len(logits_TV), same / len(logits_TV)


def config_for(quantize: Any, source: Any, arguments: dict[str, Any]) -> QuantizationConfigMixin:
    """What `from_pretrained(source, quantize=..., **arguments)` asks for, as a quantization config.

    torchao's weights, which have kernels for it, where all of a model without routed experts goes to CUDA and torchao
    is installed; the package's own everywhere else: torchao would leave the experts, most of such a model, as they are.

    Raises: ValueError for an unknown value, for two ways of saying it at once, for a model that is quantised already.
    """
    if not isinstance(quantize, str) or quantize not in BITS:
        raise ValueError(f"quantize={quantize!r} is not known: write 'int8' or 'int4', or leave it out.")
    if arguments.get("quantization_config") is not None:
        raise ValueError(
            f"Got quantize={quantize!r} and a quantization_config ({type(arguments['quantization_config']).__name__}): "
            "pass one of them."
        )
    config = _read_config(source, arguments)
    if stored := getattr(config, "quantization_config", None):
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        raise ValueError(
            f"quantize={quantize!r}, but {source} is quantised already ({stored.get('quant_method')}): leave quantize "
            "out, or name the checkpoint that it was made from."
        )
    if "moe" not in config.layers_block_type and _all_on_cuda(arguments.get("device_map")) and is_torchao_available():
        if torchao := _torchao(quantize, arguments.get("dtype", arguments.get("torch_dtype"))):
            return torchao
    return NemotronHQuantizationConfig(quantize)


def _read_config(source: Any, arguments: dict[str, Any]) -> NemotronHConfig:
    config = arguments.get("config")
    if isinstance(config, NemotronHConfig):
        return config
    return NemotronHConfig.from_pretrained(source if config is None else config, **hub_arguments(arguments))


def _all_on_cuda(device_map: Any) -> bool:
    if isinstance(device_map, dict):
        return bool(device_map) and all(_all_on_cuda(device) for device in device_map.values())
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.cuda.is_available()
    if device_map is None or device_map == "disk":
        return False
    return isinstance(device_map, int) or torch.device(device_map).type == "cuda"


def _torchao(quantize: str, dtype: Any) -> QuantizationConfigMixin | None:
    """torchao's config for it; its int4 product on CUDA takes bfloat16 alone."""
    from torchao.quantization import (  # type: ignore[import-not-found]
        Int4WeightOnlyConfig,
        Int8WeightOnlyConfig,
    )
    from transformers import TorchAoConfig

    if quantize == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    if dtype not in (None, "auto", "bfloat16", torch.bfloat16):
        return None
    return TorchAoConfig(Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d"))


def register() -> None:
    """Make `transformers` know the method (again: nothing)."""
    register_method(QUANT_METHOD, NemotronHQuantizationConfig, NemotronHQuantizer)


register()

__all__ = [
    "QUANT_METHOD",
    "NemotronHQuantizationConfig",
    "NemotronHQuantizer",
    "PackedExperts",
    "QuantizedExperts",
    "QuantizedLinear",
    "agreement",
    "config_for",
    "register",
    "weight_bytes",
]

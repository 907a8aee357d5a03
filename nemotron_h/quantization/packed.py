"""Layers with packed weights, and the quantizer that puts them in the place of plain ones before weights are read.

A format (`ops/packed.py`) says what is packed how; a method (int8_int4.py, modelopt.py) which layers have it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from ..configuration import NemotronHConfig
from ..layers.moe import NemotronHExperts
from ..ops.packed import Format, dequantize, packed_experts_linear, packed_linear

PROJECTIONS = ("up_proj", "down_proj")
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class PackedWeights(nn.Module):
    """Parameters that are packed weights with their scales: not trained, and not cast with the rest of the model."""

    # transformers draws what a checkpoint lacks, before `from_pretrained` refuses it, and cannot draw integers.
    _is_hf_initialized = True

    @property
    def format(self) -> Format:
        raise NotImplementedError

    def weights(self) -> dict[str, tuple[int, ...]]:
        """The names of the packed weights, each with the shape it had: (N, K) or (E, N, K)."""
        raise NotImplementedError

    def parts(self, weight: str) -> tuple[Tensor, ...]:
        """A weight and its scales, as the ops take them."""
        return tuple(self._parameters[weight + end] for end in self.format.ends)  # type: ignore[misc]

    def dequantized(self, weight: str, dtype: torch.dtype) -> Tensor:
        """The weight it stands for."""
        return dequantize(self.parts(weight), self.weights()[weight][-1], dtype, self.format)

    def plain(self, config: NemotronHConfig, dtype: torch.dtype) -> nn.Module:
        """The plain module with the weights that this one stands for."""
        with torch.device("meta"):
            made = self._empty(config)
        for name in self.weights():
            setattr(made, name, nn.Parameter(self.dequantized(name, dtype)))
        if getattr(self, "bias", None) is not None:
            made.bias = self.bias
        return made.train(self.training)

    def _empty(self, config: NemotronHConfig) -> nn.Module:
        raise NotImplementedError

    def _hold(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> None:
        empty = torch.empty(shape, dtype=dtype, device=device)
        self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        packed = {id(tensor) for name, tensor in self.named_parameters(recurse=False) if name != "bias"}

        def keep_dtype(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return tensor.to(new.device) if id(tensor) in packed and new.dtype != tensor.dtype else new

        return super()._apply(keep_dtype, recurse)


class PackedLinear(PackedWeights, nn.Linear):
    """A linear layer whose weight is packed. LoRA goes on top of it."""

    def __init__(self, in_features: int, out_features: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features

    def weights(self) -> dict[str, tuple[int, ...]]:
        return {"weight": (self.out_features, self.in_features)}

    def reset_parameters(self) -> None:
        """Nothing: there is no initialisation in these formats."""

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.parts("weight"), self.bias, self.format)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight it stands for, (N, K); float32 unless told."""
        return self.dequantized("weight", dtype or torch.float32)

    @property
    def W_q(self) -> Tensor:
        """The name by which PEFT knows (HQQ's) layers that have a `dequantize()`: DoRA needs the weight's norm."""
        return self.weight

    def _empty(self, config: NemotronHConfig) -> nn.Module:
        return nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)


class PackedExperts(PackedWeights):
    """`NemotronHExperts` with packed weights, of which only the chosen experts' are read."""

    def __init__(self, plain: NemotronHExperts):
        super().__init__()
        self.num_experts, self.act_fn = plain.num_experts, plain.act_fn
        self._shapes = {name: tuple(getattr(plain, name).shape) for name in PROJECTIONS}

    def weights(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def multiply(self, weight: str, x_SK: Tensor, experts_S: Tensor) -> Tensor:
        """Each row by its expert's "up_proj" or "down_proj": (S, N). Rows of one expert are next to each other."""
        return packed_experts_linear(x_SK, self.parts(weight), experts_S, self.format)

    def forward(
        self,
        x_TD: Tensor,
        indices_Tk: Tensor,
        weights_Tk: Tensor,
        multiply: Callable[[str, Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Each token through its k experts, summed by weight: (T, D). Adapters have a `multiply` of their own."""
        multiply = multiply or self.multiply
        experts_S = indices_Tk.flatten()
        order_S = experts_S.argsort(stable=True)
        experts_S, token_S = experts_S[order_S], order_S // indices_Tk.shape[1]
        hidden = multiply("up_proj", x_TD[token_S], experts_S)
        y_SD = multiply("down_proj", self.act_fn(hidden), experts_S)
        y_SD = y_SD * weights_Tk.flatten()[order_S, None]
        out_TD = torch.zeros_like(x_TD, dtype=weights_Tk.dtype).index_add(0, token_S, y_SD.to(weights_Tk.dtype))
        return out_TD.to(x_TD.dtype)

    def _empty(self, config: NemotronHConfig) -> nn.Module:
        return NemotronHExperts(config)


class PackedQuantizer(HfQuantizer):
    """Puts packed modules in the place of plain ones before the weights are read, and plain ones back."""

    requires_calibration = False
    quantization_config: Any

    def __init__(self, quantization_config: Any, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self._expected: dict[str, tuple[torch.Size, torch.dtype]] = {}

    def is_serializable(self, **_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """With adapters: the packed weights themselves stay as they are."""
        return True

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        if isinstance(device_map, dict):
            self._check_disk(device_map)
        return device_map

    def _check_disk(self, device_map: dict[str, Any]) -> None:
        """Raises: ValueError where a module is to go to disk whose weights are made on loading."""
        on_disk = [name for name, device in device_map.items() if device == "disk"]
        if on_disk and (made := self._made_on_loading()):
            raise ValueError(f"device_map puts {on_disk[0]!r} on disk, where {made}")

    def _made_on_loading(self) -> str:
        """What cannot go to disk, and the remedy; "" where all may."""
        raise NotImplementedError

    def replacements(self, model: Any, **loading: Any) -> Iterator[tuple[str, nn.Module]]:
        """The packed modules, still empty, by the names of the plain ones."""
        raise NotImplementedError

    def finish(self, model: Any, source: Any) -> Any:
        """After the weights were read and checked: the model."""
        raise NotImplementedError

    def check_read(self, model: Any, source: Any) -> None:
        """Raises: ValueError where what was read is not what the packed modules hold."""

    def _process_model_before_weight_loading(self, model: Any, **loading: Any) -> Any:
        for name, module in list(self.replacements(model, **loading)):
            model.set_submodule(name, module)
        self._expected = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        self._check_disk(getattr(model, "hf_device_map", None) or {})
        source = model.config.name_or_path
        self.check_read(model, source)
        self._check_plain_tensors(model, source)
        for module in model.modules():
            if isinstance(module, PackedWeights):
                for name, parameter in module.named_parameters(recurse=False):
                    parameter.requires_grad_(name == "bias")
        return self.finish(model, source)

    def _check_plain_tensors(self, model: Any, source: Any) -> None:
        """To transformers 5.17, the plain tensors of a quantised checkpoint are right in any dtype and any shape."""
        for name, tensor in model.state_dict(keep_vars=True).items():
            module, _, parameter = name.rpartition(".")
            if isinstance(model.get_submodule(module), PackedWeights) and parameter != "bias":
                continue
            shape, dtype = self._expected.get(name, (tensor.shape, tensor.dtype))
            if tensor.shape != shape:
                raise ValueError(wrong_shape(source, name, tensor.shape, shape))
            if tensor.dtype != dtype and tensor.device.type != "meta":
                tensor.data = tensor.data.to(dtype)

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        if isinstance(dtype, str):  # as saving leaves it in the config
            dtype = getattr(torch, dtype)
        dtype = dtype or model.dtype
        return to_plain(model, dtype).to(dtype)


def to_plain(model: Any, dtype: torch.dtype) -> Any:
    """The model with plain modules in the place of packed ones, one after the other; accelerate's hooks move over."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, PackedWeights):
            continue
        plain, hook = module.plain(model.config, dtype), getattr(module, "_hf_hook", None)
        if hook is not None:
            from accelerate.hooks import add_hook_to_module, remove_hook_from_module

            remove_hook_from_module(module)
            add_hook_to_module(plain, hook)
        model.set_submodule(name, plain)
    return model


def wrong_shape(source: Any, name: str, found: Any, expected: Any) -> str:
    return (
        f"{source} has {name} with shape {tuple(found)} where its config asks for {tuple(expected)}: correct "
        "config.json, or fetch the checkpoint again."
    )


def hub_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained` that say where a file of a repository is."""
    return {name: arguments[name] for name in _HUB if name in arguments}


def register_method(name: str, config: type, quantizer: type) -> None:
    """Make `transformers` know a quantisation method (again: nothing)."""
    if name not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(name)(config)
    if name not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(name)(quantizer)


__all__ = ["PackedExperts", "PackedLinear", "PackedQuantizer", "PackedWeights"]

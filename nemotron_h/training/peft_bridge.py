"""What PEFT is told about this package's models, as soon as both are imported, in either order.

PEFT decides by functions of its own that look at `config.model_type`, which is also that of `transformers`' own class.
So three of them get one in front that treats this package's models otherwise, and passes on everything else:

| PEFT's                             | for this package's models                                                       |
|------------------------------------|----------------------------------------------------------------------------------|
| `_check_lora_target_modules_mamba` | `out_proj` may be adapted; `conv1d` stays refused                               |
| `LoraModel._prepare_model`         | packed weights get adapters for them; `layer_replication` repeats layers' kinds |
| `_prepare_prompt_learning_config`  | prefix tuning is refused where there are Mamba layers                           |
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ..configuration import NemotronHConfig


def join_peft() -> None:
    """Tell PEFT what holds for this package's models: now if it is imported, or else when it is."""
    if "peft" in sys.modules:
        _tell_peft()
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())  # type: ignore[arg-type]


class _WhenImported:
    """A finder that finds `peft` where the others do, and has it told once it is there.

    PEFT may come after the model, and importing it on suspicion would take seconds. A method of the model's that PEFT
    happens to call would be told too late by some of the ways in (prompt learning, `PeftModel.from_pretrained`), and by
    others in the next version; the import comes before all of them.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        # The loader itself is kept: importlib.resources and inspect ask it for more than to load.
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _tell_peft()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _tell_peft() -> None:
    import peft

    _put_in_front(peft.tuners.tuners_utils, "_check_lora_target_modules_mamba", _adapts_out_proj)
    _put_in_front(peft.tuners.lora.LoraModel, "_prepare_model", _prepares_layers)
    _put_in_front(peft.peft_model, "_prepare_prompt_learning_config", _refuses_prefixes)


def _put_in_front(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    function = getattr(owner, name, None)
    if function is not None and not hasattr(function, "__wrapped__"):  # not there in every version, and put there once
        setattr(owner, name, functools.wraps(function)(make(function)))


def _adapts_out_proj(check: Callable[..., Any]) -> Callable[..., Any]:
    """`transformers`' own class hands the weight of `out_proj` to a fused kernel, past an adapter, so PEFT refuses the
    name. This package's classes call `out_proj` as a module, whatever kernel runs, and say so by an attribute."""

    def check_unless_called(peft_config: Any, model: Any, target_name: str) -> None:
        if target_name != "out_proj" or not getattr(model, "calls_out_proj", False):
            check(peft_config, model, target_name)

    return check_unless_called


def _prepares_layers(prepare: Callable[..., Any]) -> Callable[..., Any]:
    def prepare_ours(self: Any, peft_config: Any, model: Any) -> None:
        config = getattr(model, "config", None)
        if isinstance(config, NemotronHConfig):
            from .lora_quantized import ADAPTER_CLASSES  # needs PEFT

            peft_config._register_custom_module(ADAPTER_CLASSES)
            if peft_config.layer_replication:
                _repeat_kinds(config, peft_config.layer_replication)
        prepare(self, peft_config, model)

    return prepare_ours


def _repeat_kinds(config: NemotronHConfig, layer_map: list[tuple[int, int]]) -> None:
    """PEFT sets the number of layers in the config, which here follows from their kinds."""
    kinds, layers = config.layers_block_type, [i for start, end in layer_map for i in range(start, end)]
    if not isinstance(config.intermediate_size, int):
        config.intermediate_size = [config.mlp_intermediate_size(i) for i in layers if kinds[i] == "mlp"]
    config.layers_block_type = [kinds[i] for i in layers]


def _refuses_prefixes(prepare: Callable[..., Any]) -> Callable[..., Any]:
    def prepare_unless_prefix(peft_config: Any, model_config: Any) -> Any:
        kind = _kind(peft_config)
        if (
            isinstance(model_config, NemotronHConfig)
            and "mamba" in model_config.layers_block_type
            and kind in ("PREFIX_TUNING", "CARTRIDGE")
        ):
            raise ValueError(
                f"{kind} learns keys and values that stand before the prompt, and Mamba layers have neither: use "
                "peft.PromptTuningConfig or peft.PromptEncoderConfig, whose tokens every layer reads, or "
                "nemotron_h.lora_config."
            )
        return prepare(peft_config, model_config)

    return prepare_unless_prefix


def check_no_virtual_tokens(model: Any, reason: str) -> None:
    """Refuse, within `generate()`, what does not go with tokens that PEFT puts in front of the prompt and nobody sees.

    Raises:
        ValueError: the model is generating for a PEFT model with prompt tuning or the like.
    """
    # While it generates, a PEFT model puts its own method in the place of its base model's.
    wrapper = getattr(model.prepare_inputs_for_generation, "__self__", model)
    config = None if wrapper is model else getattr(wrapper, "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        raise ValueError(f"{reason}, and {_kind(config)} puts tokens of its own in front: leave it out of generate().")


def _kind(peft_config: Any) -> str:
    return getattr(peft_config.peft_type, "value", peft_config.peft_type)


__all__ = ["check_no_virtual_tokens", "join_peft"]

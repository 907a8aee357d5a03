"""LoRA through PEFT: configs that reach every kind of weight of this family, and what an adapter covers.

    model = peft.get_peft_model(model, nemotron_h.lora_config(model, kind="all-linear", r=16))
    print(nemotron_h.lora_coverage(model))

| kind       | adapted                                                                                               |
|------------|-------------------------------------------------------------------------------------------------------|
| attention  | q_proj, k_proj, v_proj, o_proj                                                                        |
| mixers     | those, and the Mamba layers' in_proj and out_proj                                                     |
| experts    | routed experts (3-D parameters), shared experts, latent projections                                   |
| all-linear | all of these and the MLP layers: every weight that multiplies, but the head, the router, and `mtp.*`  |

PEFT is imported when one of the functions is called, never with the package.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from peft import LoraConfig

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MAMBA = ("in_proj", "out_proj")
_MLP = ("mixer.up_proj", "mixer.down_proj")
_MOE = ("shared_experts.up_proj", "shared_experts.down_proj", "fc1_latent_proj", "fc2_latent_proj")
_ROUTED = ("experts.up_proj", "experts.down_proj")

KINDS: dict[str, tuple[str, ...]] = {
    "all-linear": (*_MAMBA, *_ATTENTION, *_MLP, *_MOE, *_ROUTED),
    "attention": _ATTENTION,
    "mixers": (*_MAMBA, *_ATTENTION),
    "experts": (*_MOE, *_ROUTED),
}
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}
# Options that PEFT cannot apply to a parameter, which is what the routed experts are.
_NOT_FOR_EXPERTS = ("lora_dropout", "use_dora", "lora_bias")
_INITS_FOR_EXPERTS = (True, False, "gaussian")

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# Called by no forward: adapters on it would have no gradient.
_IDLE = re.compile(r"(?:^|\.)mtp\.")


def lora_config(
    model: nn.Module,
    kind: str = "all-linear",
    *,
    r: int = 16,
    lora_alpha: float | None = None,
    report: bool = True,
    **options: Any,
) -> LoraConfig:
    """A PEFT `LoraConfig` for a model of this family, for `peft.get_peft_model`, TRL's `peft_config` or `add_adapter`.

    Args:
        model: any class of this package, plain or quantised; its layers decide which names are targeted.
        kind: which weights, see the module's table.
        r: the rank, of each routed expert as well.
        lora_alpha: 2 r unless told.
        report: print what is covered.
        options: anything else that `LoraConfig` takes but `target_modules` and `target_parameters`; `task_type` is
            known from the model.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: an unknown `kind`, one that the model has no weights of, a target beside it, or an option that PEFT
            cannot apply to routed experts.
    """
    peft = _import_peft()
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not known: write one of {', '.join(map(repr, KINDS))}.")
    for name in ("target_modules", "target_parameters"):
        if options.get(name) is not None:
            raise ValueError(
                f"Got kind={kind!r} and {name}={options[name]!r}: leave {name} out, or write a LoraConfig yourself."
            )
    modules, parameters = _targets(model, KINDS[kind])
    if not modules and not parameters:
        letters = getattr(getattr(model, "config", None), "hybrid_override_pattern", "") or "?"
        raise ValueError(
            f"kind={kind!r} means {', '.join(KINDS[kind])}, and {type(model).__name__} with layers "
            f"{''.join(sorted(set(letters)))} has none of them: choose another kind."
        )
    if parameters:
        _check_options_for_experts(kind, options)
    task = next((task for end, task in _TASKS.items() if type(model).__name__.endswith(end)), "FEATURE_EXTRACTION")
    if _has_idle(model) and modules:
        options["exclude_modules"] = _exclude(options.get("exclude_modules"))
    config = peft.LoraConfig(
        r=r,
        lora_alpha=2 * r if lora_alpha is None else lora_alpha,
        target_modules=modules,
        target_parameters=parameters or None,
        **{"task_type": task, **options},
    )
    if report:
        print(f"lora_config(kind={kind!r}, r={r}): {lora_coverage(model, config)}", flush=True)
    return config


def _check_options_for_experts(kind: str, options: dict[str, Any]) -> None:
    for name in _NOT_FOR_EXPERTS:
        if options.get(name):
            raise ValueError(
                f"{name}={options[name]!r} cannot be had on routed experts, which kind={kind!r} adapts: leave it out, "
                "or choose kind='mixers'."
            )
    init = options.get("init_lora_weights", True)
    if (init.lower() if isinstance(init, str) else init) not in _INITS_FOR_EXPERTS:
        raise ValueError(
            f"init_lora_weights={init!r} cannot be had on routed experts, which kind={kind!r} adapts: write one of "
            f"{', '.join(map(repr, _INITS_FOR_EXPERTS))}, or choose kind='mixers'."
        )


@dataclass(frozen=True)
class LoraCoverage:
    """What an adapter, or a config before there is one, reaches in a model.

    Attributes:
        layers: each layer's kind ("mamba", "attention", "mlp", "moe") and how many of its weights are adapted.
        adapted_parameters, parameters: sizes of the base model's weights that have an adapter, and of all of them.
        trained_parameters: size of what is trained: adapters and modules trained whole; 0 for a config.
        unmatched: names in the config that nothing in the model is called.
        idle: adapted weights that no forward uses (multi-token prediction): their adapters stay as they are.
    """

    layers: tuple[tuple[str, int], ...]
    adapted_parameters: int
    parameters: int
    trained_parameters: int
    unmatched: tuple[str, ...]
    idle: tuple[str, ...]

    @property
    def adapted_layers(self) -> int:
        return sum(count > 0 for _kind, count in self.layers)

    @property
    def layer_share(self) -> float:
        return self.adapted_layers / max(1, len(self.layers))

    @property
    def parameter_share(self) -> float:
        return self.adapted_parameters / max(1, self.parameters)

    def __str__(self) -> str:
        kinds = dict.fromkeys(kind for kind, _ in self.layers)
        by_kind = ", ".join(
            f"{kind} {sum(k == kind and n > 0 for k, n in self.layers)}/{sum(k == kind for k, _ in self.layers)}"
            for kind in kinds
        )
        text = (
            f"{self.adapted_layers} of {len(self.layers)} layers ({by_kind}); {self.adapted_parameters:,} of "
            f"{self.parameters:,} weights ({self.parameter_share:.1%}) have an adapter"
        )
        if self.trained_parameters:
            text += f", {self.trained_parameters:,} are trained"
        if self.unmatched:
            text += f"; MATCHED NOTHING: {', '.join(self.unmatched)}"
        if self.idle:
            text += f"; never trained, as no forward uses them: {', '.join(self.idle)}"
        return text


def lora_coverage(model: nn.Module, config: LoraConfig | None = None, adapter_name: str | None = None) -> LoraCoverage:
    """What the adapter of a model with one covers, or what `config` would cover in a model that has none yet.

    Args:
        model: a `PeftModel`, a model after `add_adapter`, or, with `config`, a plain one.
        adapter_name: the active adapter unless told.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: no adapter and no config, or no adapter of this name.
    """
    peft = _import_peft()
    found = getattr(model, "peft_config", {})
    if not found:
        if config is None:
            raise ValueError(
                f"{type(model).__name__} has no adapter: wrap it with peft.get_peft_model first, or pass the config."
            )
        return _coverage(model, list(_would_match(model, config)), config, trained=0)
    if adapter_name is None:
        active = getattr(model, "active_adapter", None) or getattr(model, "active_adapters", None)
        active = active() if callable(active) else active  # a method of a model after `add_adapter`
        adapter_name = active if isinstance(active, str) else (active or list(found))[0]
    if adapter_name not in found:
        raise ValueError(f"There is no adapter {adapter_name!r}: the model has {', '.join(map(repr, found))}.")
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return _coverage(base, list(_adapted(base, adapter_name)), found[adapter_name], trained)


def _import_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ImportError("LoRA needs PEFT, which is not installed: pip install 'peft>=0.18'.") from None
    return peft


def _has_idle(model: nn.Module) -> bool:
    return any(_IDLE.search(f"{name}.") for name, _ in model.named_modules())


def _targets(model: nn.Module, names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Those of the names that linear layers have, and those of parameters: whole, where an idle module has them too."""
    linear = [
        f".{_plain_name(name)}"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not _IDLE.search(name)
    ]
    modules = [short for short in names if any(name.endswith(f".{short}") for name in linear)]
    routed = {
        name: short
        for name in map(_plain_name, dict(model.named_parameters()))
        if not _IDLE.search(name)
        for short in _ROUTED
        if short in names and f".{name}".endswith(f".{short}")
    }
    return modules, list(routed) if _has_idle(model) else list(dict.fromkeys(routed.values()))


def _exclude(given: Any) -> str:
    """PEFT's `exclude_modules` with `mtp.*` beside what was asked for, as the regular expression that does both."""
    parts = [r"(?:.*\.)?mtp\..*"]
    if isinstance(given, str):
        parts.append(given)
    else:
        parts += [rf"(?:.*\.)?{re.escape(name)}" for name in given or ()]
    return "|".join(f"(?:{part})" for part in parts)


def _layer_kinds(model: nn.Module) -> str:
    return "".join(sorted(dict.fromkeys(getattr(getattr(model, "config", None), "hybrid_override_pattern", "") or "?")))


def _plain_name(name: str) -> str:
    """A module's name without what PEFT puts in between."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _adapted(base: nn.Module, adapter_name: str) -> Iterator[str]:
    """Names of the weights that have the adapter."""
    from peft.tuners.lora import LoraLayer

    for name, module in base.named_modules():
        if isinstance(module, LoraLayer) and (adapter_name in module.lora_A or adapter_name in module.lora_embedding_A):
            yield f"{_plain_name(name)}.{getattr(module, 'parameter_name', 'weight')}"


def _would_match(model: nn.Module, config: LoraConfig) -> Iterator[str]:
    """Names of the weights that PEFT would adapt."""
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    config = _maybe_include_all_linear_layers(copy.copy(config), model)
    for name, module in model.named_modules():
        found = check_target_module_exists(config, name) if config.target_modules and name else False
        # It answers with True or a match, or falsely with a mark for what is excluded; and it refuses a block of layers
        # by its name alone, which has no weight of its own.
        if (found is True or isinstance(found, re.Match)) and getattr(module, "weight", None) is not None:
            yield f"{name}.weight"
        for parameter, _ in module.named_parameters(recurse=False):
            if any(f".{name}.{parameter}".endswith(f".{target}") for target in config.target_parameters or ()):
                yield f"{name}.{parameter}"


def _coverage(base: nn.Module, adapted: list[str], config: LoraConfig, trained: int) -> LoraCoverage:
    sizes, same = _sizes(base)
    kinds = {
        int(_LAYER.search(f"{name}.").group(1)): kind  # type: ignore[union-attr]
        for name, module in base.named_modules()
        if (kind := getattr(module, "block_type", None)) and not _IDLE.search(name)
    }
    counts = dict.fromkeys(sorted(kinds), 0)
    used = [name for name in adapted if not _IDLE.search(name)]
    for name in used:
        if (layer := _LAYER.search(name)) and int(layer.group(1)) in counts:
            counts[int(layer.group(1))] += 1
    return LoraCoverage(
        layers=tuple((kinds[idx], count) for idx, count in counts.items()),
        adapted_parameters=sum(sizes[name] for name in {same.get(name, name) for name in used}),
        parameters=sum(size for name, size in sizes.items() if not _IDLE.search(name)),
        trained_parameters=trained,
        unmatched=tuple(_unmatched(config, adapted)),
        idle=tuple(name for name in adapted if _IDLE.search(name)),
    )


def _sizes(base: nn.Module) -> tuple[dict[str, int], dict[str, str]]:
    """The base model's weights: name -> number of elements, packed ones as what they stand for; and a tied weight's
    other names -> the one that it is counted under."""
    sizes: dict[str, int] = {}
    first: dict[int, str] = {}
    same: dict[str, str] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        name = _plain_name(name).replace(".original_module", "")
        if first.setdefault(id(parameter), name) == name:
            sizes[name] = parameter.numel()
        else:
            same[name] = first[id(parameter)]
    for name, module in base.named_modules():
        weights = getattr(module, "weights", None)
        for weight, shape in weights().items() if callable(weights) else ():
            weight = f"{_plain_name(name)}.{weight}"
            sizes[weight] = math.prod(shape)
            for extra in ("_scale", "_scale_2"):
                sizes.pop(weight + extra, None)
    return sizes, same


def _unmatched(config: LoraConfig, adapted: list[str]) -> Iterator[str]:
    modules = [f".{name.rpartition('.')[0]}" for name in adapted]
    targets = config.target_modules
    if isinstance(targets, str):
        if targets.lower() != "all-linear" and not any(re.fullmatch(targets, name[1:]) for name in modules):
            yield targets
    else:
        yield from sorted(name for name in targets or () if not any(m.endswith(f".{name}") for m in modules))
    for name in sorted(config.target_parameters or ()):
        if not any(f".{one}".endswith(f".{name}") for one in adapted):
            yield name


__all__ = ["KINDS", "LoraCoverage", "lora_config", "lora_coverage"]

"""What a setting of a config may be: layers, kinds of values, and how far sizes and counts are believed."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

# A config is believed up to here, far beyond any model: what is made of it (a name for each tensor of each expert,
# modules without weights) takes memory before any file is asked how much it has.
LARGEST_SIZE = 1 << 31
MOST_LAYERS = 10_000
MOST_EXPERTS = 1 << 18  # over all layers
MOST_LABELS = 1 << 20  # transformers makes a name for each

# The kinds of layer: published name -> (letter of the pattern, name that transformers' cache and mask code knows).
LAYER_KINDS = {
    "mamba": ("M", "linear_attention"),
    "attention": ("*", "full_attention"),
    "mlp": ("-", "mlp"),
    "moe": ("E", "moe"),
}
_KIND_OF = {name: kind for kind, names in LAYER_KINDS.items() for name in (kind, *names)}
_ALLOWED_LAYERS = ", ".join(f"{letter} ({kind})" for kind, (letter, _) in LAYER_KINDS.items())

# Read as infinity: the largest float32, bfloat16 and float64, also where a writer rounded them.
_AS_GOOD_AS_INFINITE = 3.3e38

# What must hold where the model has such a layer ("" = always): positive integers, positive numbers, and multiples.
_POSITIVE_INTEGERS = {
    "": "vocab_size hidden_size max_position_embeddings",
    "attention": "num_attention_heads num_key_value_heads head_dim",
    "mamba": "mamba_num_heads mamba_head_dim n_groups ssm_state_size conv_kernel chunk_size",
    "moe": "n_routed_experts num_experts_per_tok n_shared_experts moe_intermediate_size "
    "moe_shared_expert_intermediate_size n_group topk_group",
}
_POSITIVE_NUMBERS = {"": "layer_norm_epsilon", "mamba": "time_step_min time_step_max time_step_floor"}
_MULTIPLES = {
    "attention": ("num_attention_heads", "num_key_value_heads"),
    "mamba": ("mamba_num_heads", "n_groups"),
    "moe": ("n_routed_experts", "n_group"),
}
_BOOLS = (
    "tie_word_embeddings use_cache residual_in_fp32 rescale_prenorm_residual attention_bias mlp_bias use_conv_bias "
    "use_mamba_kernels moe_shared_expert_overlap norm_topk_prob output_router_logits"
).split()
_NUMBERS = "initializer_range hidden_dropout attention_dropout routed_scaling_factor".split()


def fail(problem: str, remedy: str) -> NoReturn:
    raise ValueError(f"{problem}; {remedy}.")


def check_layers(name: str, number: Any) -> None:
    """Raises `ValueError` where `number` is no number of layers that a model can have."""
    if type(number) is not int or not 0 < number <= MOST_LAYERS:
        fail(f"{name} is {shorten(number)}", f"give a number of layers up to {MOST_LAYERS}")


def shorten(value: object, limit: int = 140) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 4]}...{text[-1]}"


def check_positive(name: str, value: Any, what: str = "integer", types: tuple[type, ...] = (int,)) -> None:
    usable = isinstance(value, types) and not isinstance(value, bool)
    if not usable or not 0 < value <= sys.float_info.max:
        fail(f"{name} is {shorten(value)}", f"give a positive {what}")
    if what == "integer" and value > LARGEST_SIZE:
        fail(f"{name} is {shorten(value)}, larger than in any model", f"give a positive integer up to {LARGEST_SIZE}")


def check_optional(name: str, value: Any, what: str, usable: Callable[[Any], bool]) -> None:
    if value is not None and not usable(value):
        fail(f"{name} is {shorten(value)}", f"give {what}, or leave it out")


def is_bool(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)


def _is_labels(value: Any) -> bool:
    return all(str(key).removeprefix("-").isdecimal() and isinstance(name, str) for key, name in value.items())


def check_names(cls: type, given: Mapping[str, Any]) -> None:
    """That no setting is called as what the config's class does: it would stand in that one's place."""
    for name in given:
        taken = getattr(cls, name, None) if isinstance(name, str) else None
        if not isinstance(name, str) or name.startswith("__") or callable(taken) or name == "attribute_map":
            fail(f"A setting is called {shorten(name)}, which is no setting", "take it out of config.json")
    for name in ("text_config", "llm_config"):
        check_optional(name, given.get(name), "names and values", lambda value: isinstance(value, dict))


def check_for_library(given: Mapping[str, Any]) -> None:
    """What transformers' base class opens before this package can look at it."""
    for name in ("id2label", "label2id", "rope_scaling", "rope_parameters"):
        check_optional(name, given.get(name), "names and values", lambda value: isinstance(value, dict))
    check_optional("id2label", given.get("id2label"), "names of labels by number", _is_labels)
    stored = given.get("quantization_config")
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    check_optional("quant_method", method, "the name of a method", lambda it: isinstance(it, str) and len(it) < 100)
    for name in ("output_attentions", "output_hidden_states", "return_dict"):
        check_optional(name, given.get(name), "true or false", is_bool)
    check_optional("architectures", given.get("architectures"), "a list of names", _is_names)
    check_optional("num_labels", given.get("num_labels"), "their number", lambda n: is_int(n) and n <= MOST_LABELS)


def check_kinds(config: Any) -> None:
    """Switches, numbers and ids, which are looked at whatever layers the model has: Python takes "no" for true."""
    for name in _BOOLS:
        check_optional(name, getattr(config, name), "true or false", is_bool)
    for name in _NUMBERS:
        check_optional(name, getattr(config, name), "a number", _is_number)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, name)
        values = value if isinstance(value, (list, tuple)) else [value]
        for each in values:
            check_optional(name, each, "the id of a token", lambda id: is_int(id) and abs(id) <= LARGEST_SIZE)
    stored = getattr(config, "quantization_config", None)
    usable = isinstance(stored, dict) or hasattr(stored, "to_dict")
    check_optional("quantization_config", stored, "names and values", lambda _: usable)


def check_sizes(config: Any, kinds: Sequence[str]) -> None:
    """What the layers of these kinds are made of; "" is the model itself."""
    for kind in kinds:
        for name in _POSITIVE_INTEGERS.get(kind, "").split():
            check_positive(name, getattr(config, name))
        for name in _POSITIVE_NUMBERS.get(kind, "").split():
            check_positive(name, getattr(config, name), "number", (int, float))
        number, divisor = _MULTIPLES.get(kind, ("", ""))
        if number and getattr(config, number) % getattr(config, divisor):
            fail(
                f"{number} is {getattr(config, number)}, which {divisor} {getattr(config, divisor)} does not divide",
                f"use a multiple of {divisor}",
            )


def parse_layers(layers: str | Sequence[str], key: str = "hybrid_override_pattern") -> list[str]:
    """The published layer names of a pattern such as `"M-M*|M-"` or of a list in any dialect's names or letters.

    Raises `ValueError` that names the unknown layer, its position from 0, and what is allowed.
    """
    if not isinstance(layers, (str, list, tuple)):
        fail(f"{key} is {shorten(layers)}", "give a pattern such as 'M-M*-' or a list of layer names")
    if len(layers) > 2 * MOST_LAYERS:  # a pattern may have a boundary after each layer
        fail(f"{key} has {len(layers)} layers", f"give at most {MOST_LAYERS}")
    kinds = []
    for position, layer in enumerate(layers):
        if layer == "|" and isinstance(layers, str):  # Megatron's pipeline boundary; not a layer
            continue
        if not isinstance(layer, str) or layer not in _KIND_OF:
            fail(
                f"{key} has the unknown layer {shorten(layer)} at position {position} (from 0) of {shorten(layers)}",
                f"use {_ALLOWED_LAYERS}",
            )
        kinds.append(_KIND_OF[layer])
    if not kinds:
        fail(f"{key} is {shorten(layers)}, which has no layers", f"give at least one of {_ALLOWED_LAYERS}")
    return kinds


def layers_to_pattern(layers: Sequence[str]) -> str:
    """The pattern string, one letter per layer, of a list of published layer names."""
    return "".join(LAYER_KINDS[layer][0] for layer in layers)


def _read_float(value: Any) -> float:
    """A float in any of the spellings that were published, `{"__float__": "Infinity"}` and the string among them."""
    if isinstance(value, dict) and set(value) == {"__float__"}:
        value = value["__float__"]
    if isinstance(value, bool):
        raise TypeError("a bool is no bound")
    number = float(value)
    return math.copysign(math.inf, number) if abs(number) >= _AS_GOOD_AS_INFINITE else number


def read_time_step_limit(value: Any) -> tuple[float, float]:
    try:
        low, high = (_read_float(bound) for bound in value)
    except (TypeError, ValueError, OverflowError):
        fail(
            f"time_step_limit is {shorten(value)}", "give two numbers such as [0.0, 0.1], or leave it out for (0, inf)"
        )
    low = 0.0 if low == -math.inf else low  # softplus is positive: the same function
    if not 0.0 <= low < high:  # NaN fails as well
        fail(f"time_step_limit is {value!r}", "give two numbers with 0 <= lower < upper")
    return low, high

"""llama.cpp's keys of a model's settings, and the config that they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...config_values import check_layers
from ...configuration import LAYER_KINDS, NemotronHConfig
from ..tensors import Spec
from .names import MTP_LAYERS

# llama.cpp's key -> ours, by the layers that it matters to. What is one number for each layer there, or none of ours,
# is made in `keys` and read in `config_from`.
_KEYS = {
    "": {
        "block_count": "num_hidden_layers",
        "vocab_size": "vocab_size",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
    },
    "attention": {
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.value_length": "head_dim",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
        "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
        "rope.dimension_count": "head_dim",  # read, not used: there is no position encoding
        "rope.scaling.finetuned": "",
    },
    "mamba": {
        "ssm.conv_kernel": "conv_kernel",
        "ssm.inner_size": "d_inner",
        "ssm.state_size": "ssm_state_size",
        "ssm.time_step_rank": "mamba_num_heads",
        "ssm.group_count": "n_groups",
    },
    "moe": {
        "expert_count": "n_routed_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_count": "n_shared_experts",
        "expert_shared_feed_forward_length": "moe_shared_expert_intermediate_size",
        "expert_weights_norm": "norm_topk_prob",
        "expert_weights_scale": "routed_scaling_factor",
        "expert_group_count": "n_group",
        "expert_group_used_count": "topk_group",
        "expert_gating_func": "",
        "moe_latent_size": "moe_latent_size",
    },
}
_KINDS: dict[str, Callable[[Any], Any]] = {
    "layer_norm_epsilon": float,
    "routed_scaling_factor": float,
    "norm_topk_prob": bool,
}
_LEFT_OUT = {
    "n_shared_experts": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "moe_latent_size": None,
}
"""What a file means that lacks the key."""


def architecture(config: NemotronHConfig) -> str:
    return "nemotron_h_moe" if "moe" in config.layers_block_type else "nemotron_h"


def check(config: NemotronHConfig, path: Path) -> None:
    """Raises `ValueError` where llama.cpp would compute something else than this model, or nothing."""
    kinds = set(config.layers_block_type)
    low, high = config.time_step_limit
    problem = None
    if {"mlp", "moe"} <= kinds:
        problem = f"has MLP and MoE layers in one model ({config.hybrid_override_pattern})"
    elif "mamba" in kinds and (low, high) != (0.0, math.inf):
        problem = f"clamps its time steps (time_step_limit is {[low, high]})"
    elif {"mlp", "moe"} & kinds and config.mlp_hidden_act != "relu2":
        problem = f"has MLPs with {config.mlp_hidden_act!r} (mlp_hidden_act)"
    elif "mamba" in kinds and config.mamba_proj_bias:
        problem = "has biases in in_proj and out_proj (mamba_proj_bias)"
    elif "moe" in kinds and config.mlp_bias:
        problem = "has biases in its experts (mlp_bias)"
    if problem:
        raise ValueError(f"{path} {problem}, which llama.cpp does not compute; keep it in its Hugging Face folder.")


def keys(config: NemotronHConfig, mtp: bool) -> dict[str, Any]:
    """llama.cpp's name of each setting, without the architecture before it."""
    kinds = config.layers_block_type
    widths = [
        config.mlp_intermediate_size(index) if kind == "mlp" else config.moe_intermediate_size if kind == "moe" else 0
        for index, kind in enumerate(kinds)
    ]
    heads = [config.num_key_value_heads if kind == "attention" else 0 for kind in kinds]
    if mtp:
        widths, heads = [*widths, config.moe_intermediate_size], [*heads, config.num_key_value_heads]
    made: dict[str, Any] = {
        "block_count": len(heads),
        "feed_forward_length": widths,
        "attention.head_count_kv": heads,
        "rope.scaling.finetuned": False,
        "expert_gating_func": 2,  # sigmoid
    }
    found: dict[str, Any] = {}
    for kind, names in _KEYS.items():
        for key, name in names.items() if kind != "moe" or "moe" in kinds else ():
            value = made[key] if key in made else getattr(config, name)
            found[key] = _KINDS[name](value) if name in _KINDS else value
    if not config.moe_latent_size:
        found.pop("moe_latent_size", None)
    return found | ({"nextn_predict_layers": 1} if mtp else {})


def config_from(metadata: Mapping[str, Any], specs: Mapping[str, Spec], path: Path) -> NemotronHConfig:
    """The config, from llama.cpp's keys and the tensors that are there.

    Raises:
        ValueError: a key is missing, or has several values where a config has one.
    """
    architecture, missing = metadata["general.architecture"], object()

    def get(key: str, default: Any = missing) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        if value is missing:
            raise ValueError(f"{path} lacks the key {architecture}.{key}: fetch or write it again.")
        return value

    def each(key: str, count: int) -> list[int]:
        value = get(key)
        return list(value) if isinstance(value, Sequence) else [value] * count

    def one(key: str, default: Any = missing) -> Any:
        value = get(key, default)
        values = {v for v in value if v} if isinstance(value, Sequence) else {value}
        if len(values) != 1:
            raise ValueError(f"{path} has {sorted(values)} for {architecture}.{key}; a config has one for all layers.")
        return _short(values.pop())

    blocks, depths = get("block_count"), get("nextn_predict_layers", 0)
    check_layers(f"{architecture}.block_count of {path}", blocks)
    layers = blocks - depths
    widths, heads = each("feed_forward_length", blocks)[:layers], each("attention.head_count_kv", blocks)[:layers]
    with_width = "moe" if architecture == "nemotron_h_moe" else "mlp"
    kinds = [
        with_width if width else "attention" if head else "mamba" for width, head in zip(widths, heads, strict=True)
    ]
    epsilon = get("attention.layer_norm_rms_epsilon", None) or get("attention.layer_norm_epsilon")
    fields: dict[str, Any] = {
        "hybrid_override_pattern": "".join(LAYER_KINDS[kind][0] for kind in kinds),
        "vocab_size": specs["token_embd.weight"].shape[0] if "token_embd.weight" in specs else get("vocab_size"),
        "hidden_size": get("embedding_length"),
        "max_position_embeddings": get("context_length"),
        "layer_norm_epsilon": _short(epsilon),
        "tie_word_embeddings": "output.weight" not in specs,
        "use_conv_bias": "mamba" not in kinds or any(name.endswith("ssm_conv1d.bias") for name in specs),
        "attention_bias": any(name.endswith("attn_q.bias") for name in specs),
        "mlp_bias": any(name.endswith("ffn_up.bias") for name in specs),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    made = ("attention.value_length", "expert_feed_forward_length", "ssm.inner_size")
    for kind, names in _KEYS.items():
        for key, name in names.items() if kind in kinds else ():
            if name and name not in fields and key not in made:
                fields[name] = one(key, _LEFT_OUT.get(name, missing))
    if "mamba" in kinds:
        fields["mamba_head_dim"] = get("ssm.inner_size") // fields["mamba_num_heads"]
    if "mlp" in kinds:
        sizes = [width for width in widths if width]
        fields["intermediate_size"] = sizes[0] if len(set(sizes)) == 1 else sizes
    if "moe" in kinds:
        fields["moe_intermediate_size"] = one("expert_feed_forward_length", None) or one("feed_forward_length")
        for name in ("n_group", "topk_group", "moe_latent_size"):  # 0 stands for none
            fields[name] = fields[name] or _LEFT_OUT[name]
    if depths:
        fields |= {"num_nextn_predict_layers": depths, "mtp_layers_block_type": MTP_LAYERS}
    return NemotronHConfig(**fields)


def _short(value: Any) -> Any:
    """Of a float the shortest decimal number that is this float32: 1e-05 for 9.99999974737875e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value

"""What a Nemotron-H model weighs, from its config alone: parameters by kind, KV cache, Mamba states, memory.

Pure arithmetic, no weights. Tensors and shapes are those of the published checkpoints; the totals equal the published
ones exactly. All sizes are in bytes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from .configuration import NemotronHConfig

Shape = tuple[int, ...]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of the dtypes that checkpoints hold."""

_DTYPE_BYTES = {str(dtype).removeprefix("torch."): dtype.itemsize for dtype in DTYPES.values()}


@dataclass(frozen=True)
class Spec:
    """What is known of a tensor before it is read."""

    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def dtype_bytes(dtype: Any) -> int:
    """Bytes of one element of a dtype, given as a torch dtype or its name. Raises `ValueError` if it is unknown."""
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPE_BYTES:
        raise ValueError(f"dtype is {dtype!r}, whose size is not known; use one of {', '.join(_DTYPE_BYTES)}.")
    return _DTYPE_BYTES[name]


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by kind. The router's correction bias counts, although it is not trained."""

    embeddings: int
    mamba: int
    attention: int
    mlp: int
    moe_routed: int
    moe_shared: int
    moe_router: int
    moe_latent: int
    norms: int
    lm_head: int
    """0 where the head is tied to the embeddings."""
    mtp: int
    """All of the MTP layers, whatever their kind; in no other field and in no total but `total_with_mtp`."""
    active: int
    """Used for one token: `total` with `num_experts_per_tok` of the routed experts. The embedding table counts."""

    @property
    def total(self) -> int:
        """Everything but MTP, as model cards count."""
        return (
            self.embeddings + self.mamba + self.attention + self.mlp + self.moe_routed + self.moe_shared
            + self.moe_router + self.moe_latent + self.norms + self.lm_head
        )  # fmt: skip

    @property
    def total_with_mtp(self) -> int:
        """Everything, MTP layers included."""
        return self.total + self.mtp


@dataclass(frozen=True)
class Memory:
    """Bytes that a model takes for generation, without activations and what the framework needs for itself."""

    weights: int
    kv: int
    """Keys and values of every sequence at full context."""
    states: int
    """Convolution windows and SSM states of every sequence; they do not grow with the context."""

    @property
    def total(self) -> int:
        """Weights, KV cache and states together."""
        return self.weights + self.kv + self.states

    def fits(self, gpu_bytes: int) -> bool:
        """Whether `total` is at most `gpu_bytes`."""
        return self.total <= gpu_bytes


def _linear(inputs: int, outputs: int, bias: bool) -> int:
    return inputs * outputs + (outputs if bias else 0)


def _mlp(config: NemotronHConfig, width: int, inner: int) -> int:
    return _linear(width, inner, config.mlp_bias) + _linear(inner, width, config.mlp_bias)


def _mamba(config: NemotronHConfig) -> dict[str, int]:
    h, bias = config.hidden_size, config.mamba_proj_bias
    conv = config.conv_dim * (config.conv_kernel + (1 if config.use_conv_bias else 0))
    per_head = 3 * config.mamba_num_heads  # A_log, D, dt_bias
    projections = _linear(h, config.in_proj_size, bias) + _linear(config.d_inner, h, bias)
    return {"mamba": projections + conv + per_head + config.d_inner}  # d_inner: the gated norm


def _attention(config: NemotronHConfig) -> dict[str, int]:
    h, bias = config.hidden_size, config.attention_bias
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {"attention": _linear(h, queries, bias) + 2 * _linear(h, keys, bias) + _linear(queries, h, bias)}


def _moe(config: NemotronHConfig) -> dict[str, int]:
    h, latent, experts = config.hidden_size, config.moe_latent_size, config.n_routed_experts
    # An expert has no bias of its own: the published tensors are weights alone.
    return {
        "moe_routed": experts * 2 * (latent or h) * config.moe_intermediate_size,
        "moe_shared": _mlp(config, h, config.moe_shared_expert_intermediate_size),
        "moe_router": experts * (h + 1),
        "moe_latent": _mlp(config, h, latent) if latent else 0,
    }


def _layer(config: NemotronHConfig, kind: str, layer_idx: int) -> dict[str, int]:
    """Parameters of one layer by kind, its norm included."""
    if kind == "mlp":
        mixer = {"mlp": _mlp(config, config.hidden_size, config.mlp_intermediate_size(layer_idx))}
    else:
        mixer = {"mamba": _mamba, "attention": _attention, "moe": _moe}[kind](config)
    return {**mixer, "norms": config.hidden_size}


def count_parameters(config: NemotronHConfig) -> Parameters:
    """The model's parameters by kind. Exact: it is the sum over the published tensors."""
    table = config.vocab_size * config.hidden_size
    counts = Counter(embeddings=table, norms=config.hidden_size)  # the final norm
    counts["lm_head"] = 0 if config.tie_word_embeddings else table
    for layer_idx, kind in enumerate(config.layers_block_type):
        counts.update(_layer(config, kind, layer_idx))
    if config.has_mtp:
        depth = sum(sum(_layer(config, kind, 0).values()) for kind in config.mtp_layers_block_type)
        h = config.hidden_size
        depth += 3 * h + 2 * h * h  # enorm, hnorm, final_layernorm, eh_proj
        counts["mtp"] = config.num_nextn_predict_layers * depth
    kinds = {name: counts[name] for name in Parameters.__dataclass_fields__ if name != "active"}
    idle = 0
    if counts["moe_routed"]:
        idle = counts["moe_routed"] // config.n_routed_experts * (config.n_routed_experts - config.num_experts_per_tok)
    return Parameters(**kinds, active=sum(kinds.values()) - kinds["mtp"] - idle)


def kv_bytes_per_token(config: NemotronHConfig, dtype: Any = "bfloat16") -> int:
    """Bytes that one token adds to the KV cache of all attention layers."""
    layers = config.layers_block_type.count("attention")
    return layers * 2 * config.num_key_value_heads * config.head_dim * dtype_bytes(dtype)


def state_bytes_per_sequence(config: NemotronHConfig, conv_dtype: Any = "bfloat16", ssm_dtype: Any = None) -> int:
    """Bytes of one sequence's Mamba states: per layer, `conv_kernel - 1` columns of x, B, C and the SSM state.

    `ssm_dtype` is the config's `mamba_ssm_cache_dtype` unless given.
    """
    conv = config.conv_dim * (config.conv_kernel - 1) * dtype_bytes(conv_dtype)
    ssm = config.d_inner * config.ssm_state_size * dtype_bytes(ssm_dtype or config.mamba_ssm_cache_dtype)
    return config.layers_block_type.count("mamba") * (conv + ssm)


def memory(config: NemotronHConfig, context: int, batch: int = 1, dtype: Any = "bfloat16", mtp: bool = False) -> Memory:
    """Bytes for `batch` sequences of `context` tokens with weights, KV and convolution windows in `dtype`.

    The SSM state is in the config's `mamba_ssm_cache_dtype`. `mtp` adds the MTP layers' weights. A few tensors that are
    kept in float32 (`A_log`, `D`, `dt_bias`, the router) are counted in `dtype`: under 0.1% of every published model.
    Raises `ValueError` for a context or batch below 1 and for an unknown dtype.
    """
    for name, value in (("context", context), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} is {value!r}; give a positive integer.")
    parameters = count_parameters(config)
    return Memory(
        weights=(parameters.total_with_mtp if mtp else parameters.total) * dtype_bytes(dtype),
        kv=batch * context * kv_bytes_per_token(config, dtype),
        states=batch * state_bytes_per_sequence(config, dtype),
    )

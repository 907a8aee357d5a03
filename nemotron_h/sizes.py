"""What a Nemotron-H model weighs, from its config alone: parameters by kind, KV cache, Mamba states, memory.

Pure arithmetic, no weights. Tensors and shapes are those of the published checkpoints; the totals equal the published
ones exactly. All sizes are in bytes.
"""

from __future__ import annotations

import math
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


def layer_tensors(config: NemotronHConfig, kind: str, inner: int = 0) -> dict[str, Shape]:
    """The published tensors of one layer, without its prefix; `*` stands for the number of the expert, which all are of
    one shape. `inner` is the width of an MLP layer."""
    h = config.hidden_size
    shapes: dict[str, Shape] = {"norm.weight": (h,)}

    def linear(name: str, outputs: int, inputs: int, bias: bool = False) -> None:
        shapes[f"mixer.{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"mixer.{name}.bias"] = (outputs,)

    def mlp(prefix: str, inner: int, width: int, bias: bool) -> None:
        linear(f"{prefix}up_proj", inner, width, bias)
        linear(f"{prefix}down_proj", width, inner, bias)

    if kind == "mamba":
        linear("in_proj", config.in_proj_size, h, config.mamba_proj_bias)
        shapes["mixer.conv1d.weight"] = (config.conv_dim, 1, config.conv_kernel)
        if config.use_conv_bias:
            shapes["mixer.conv1d.bias"] = (config.conv_dim,)
        shapes |= {f"mixer.{name}": (config.mamba_num_heads,) for name in ("dt_bias", "A_log", "D")}
        shapes["mixer.norm.weight"] = (config.d_inner,)
        linear("out_proj", h, config.d_inner, config.mamba_proj_bias)
    elif kind == "attention":
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        for name, outputs, inputs in (("q", queries, h), ("k", keys, h), ("v", keys, h), ("o", h, queries)):
            linear(f"{name}_proj", outputs, inputs, config.attention_bias)
    elif kind == "mlp":
        mlp("", inner, h, config.mlp_bias)
    else:
        shapes["mixer.gate.weight"] = (config.n_routed_experts, h)
        shapes["mixer.gate.e_score_correction_bias"] = (config.n_routed_experts,)
        mlp("experts.*.", config.moe_intermediate_size, config.moe_latent_size or h, False)
        mlp("shared_experts.", config.moe_shared_expert_intermediate_size, h, config.mlp_bias)
        if latent := config.moe_latent_size:
            linear("fc1_latent_proj", latent, h, config.mlp_bias)
            linear("fc2_latent_proj", h, latent, config.mlp_bias)
    return shapes


_PARTS = {"norm.": "norms", "mixer.experts.": "moe_routed", "mixer.shared_experts.": "moe_shared"}
_PARTS |= {"mixer.gate.": "moe_router", "mixer.fc1_": "moe_latent", "mixer.fc2_": "moe_latent"}
"""Which parameters count as something else than the kind of their layer."""


def _layer(config: NemotronHConfig, kind: str, layer_idx: int) -> Counter[str]:
    """Parameters of one layer by kind, its norm included."""
    counts: Counter[str] = Counter()
    inner = config.mlp_intermediate_size(layer_idx) if kind == "mlp" else 0
    for name, shape in layer_tensors(config, kind, inner).items():
        part = next((part for start, part in _PARTS.items() if name.startswith(start)), kind)
        counts[part] += math.prod(shape) * (config.n_routed_experts if part == "moe_routed" else 1)
    return counts


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

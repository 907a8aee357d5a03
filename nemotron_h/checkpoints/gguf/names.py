"""The tensors of a GGUF file and the published ones in them; the table is at the top of the package."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...configuration import NemotronHConfig
from .. import published
from ..tensors import Shape

ELEMENTS = 8 << 20
"""So many at a time are widened or quantised: what is worked with is small beside the tensor."""

CONFIG, DTYPES = "huggingface.config", "huggingface.dtypes"
COMPANIONS = {"huggingface.generation_config": "generation_config.json"}
"""Keys that llama.cpp passes over: the files that they hold, and what tensors were stored in."""

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""gguf's names of the types that are dtypes of torch; the others are quantised."""

_MODEL = {
    "backbone.embeddings.weight": "token_embd.weight",
    "backbone.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "norm.weight": "attn_norm.weight",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.gate.weight": "ffn_gate_inp.weight",
    "mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
}
# These have a weight and, where the config says so, a bias.
_LINEARS = {
    "mixer.in_proj": "ssm_in",
    "mixer.out_proj": "ssm_out",
    "mixer.conv1d": "ssm_conv1d",
    "mixer.q_proj": "attn_q",
    "mixer.k_proj": "attn_k",
    "mixer.v_proj": "attn_v",
    "mixer.o_proj": "attn_output",
    "mixer.up_proj": "ffn_up",
    "mixer.down_proj": "ffn_down",
    "mixer.experts.up_proj": "ffn_up_exps",
    "mixer.experts.down_proj": "ffn_down_exps",
    "mixer.shared_experts.up_proj": "ffn_up_shexp",
    "mixer.shared_experts.down_proj": "ffn_down_shexp",
    "mixer.fc1_latent_proj": "ffn_latent_down",
    "mixer.fc2_latent_proj": "ffn_latent_up",
}
# The two layers of an MTP depth in llama.cpp's one block, where their names are not those of other layers.
MTP = {
    "mtp.layers.0.enorm.weight": "nextn.enorm.weight",
    "mtp.layers.0.hnorm.weight": "nextn.hnorm.weight",
    "mtp.layers.0.eh_proj.weight": "nextn.eh_proj.weight",
    "mtp.layers.1.norm.weight": "post_attention_norm.weight",
    "mtp.layers.1.final_layernorm.weight": "nextn.shared_head_norm.weight",
}
MTP_LAYERS = ["attention", "moe"]
_EXPERT = re.compile(r"(.*mixer\.experts)\.\d+\.(.*)")
# Always in float32, as llama.cpp's converter keeps them; all that is no .weight as well.
_FLOAT32 = ("norm.weight", "ssm_conv1d.weight", "ffn_gate_inp.weight")


def package() -> Any:
    """The package gguf, which is optional. Raises `ImportError`, in a sentence, where it is not there."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f"GGUF files need the package gguf ({error}); pip install 'nemotron-h[gguf]' brings it."
        ) from error
    return gguf


@dataclass(frozen=True)
class Row:
    """One tensor of the file: its shape there, and the published tensors in it. Several are experts, stacked."""

    name: str
    shape: Shape
    published: Mapping[str, Shape]
    heads: int = 0  # of q and k, whose rows are reordered

    @property
    def is_matrix(self) -> bool:
        return self.name.endswith(".weight") and len(self.shape) > 1 and not self.name.endswith(_FLOAT32)

    @property
    def is_a(self) -> bool:
        return self.name.endswith(".ssm_a")


def table(config: NemotronHConfig, mtp: bool = False) -> list[Row]:
    """Every tensor of a file of this config, in the order of the layers. See the top of this file.

    Raises:
        ValueError: the model has a tensor that llama.cpp does not read.
    """
    rows: dict[str, dict[str, Shape]] = {}
    for name, shape in published.tensors(config).items():
        if not name.startswith("mtp.") or mtp:
            rows.setdefault(_name(name, config.num_hidden_layers), {})[name] = shape
    if not config.use_conv_bias:  # llama.cpp adds it unasked
        for index, kind in enumerate(config.layers_block_type):
            if kind == "mamba":
                rows[f"blk.{index}.ssm_conv1d.bias"] = {}
    return [Row(name, _shape(name, parts, config), parts, _heads(name, config)) for name, parts in rows.items()]


def _heads(name: str, config: NemotronHConfig) -> int:
    if config.head_dim % 2:
        return 0
    kind = name.split(".")[-2]
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(kind, 0)


def halves_interleaved(part: Tensor, heads: int, back: bool = False) -> Tensor:
    """(heads * d, ...) with the rows of each head in the order 0, d/2, 1, d/2 + 1, ..., or back from that."""
    half = part.shape[0] // heads // 2
    sizes = (half, 2) if back else (2, half)
    return part.reshape(heads, *sizes, *part.shape[1:]).transpose(1, 2).reshape(part.shape)


def _name(name: str, layers: int) -> str:
    if name in _MODEL:
        return _MODEL[name]
    if name in MTP:
        return f"blk.{layers}.{MTP[name]}"
    index, suffix = name.split(".layers.", 1)[1].split(".", 1)
    block = layers if name.startswith("mtp.") else int(index)
    if match := _EXPERT.fullmatch(suffix):
        suffix = f"{match[1]}.{match[2]}"
    if suffix in _LAYER:
        return f"blk.{block}.{_LAYER[suffix]}"
    module, leaf = suffix.rsplit(".", 1)
    if module not in _LINEARS:
        raise ValueError(f"llama.cpp has no place for the tensor {name}; keep this model in its Hugging Face folder.")
    return f"blk.{block}.{_LINEARS[module]}.{leaf}"


def _shape(name: str, parts: Mapping[str, Shape], config: NemotronHConfig) -> Shape:
    if not parts:
        return (config.conv_dim,)
    shape = next(iter(parts.values()))
    if "_exps." in name:
        return (len(parts), *shape)
    if name.endswith("ssm_conv1d.weight"):
        return (shape[0], shape[2])
    if name.endswith((".ssm_a", ".ssm_d")):
        return (*shape, 1)
    if name.endswith("ssm_norm.weight"):
        return (config.n_groups, shape[0] // config.n_groups)
    return shape

"""`x + mixer(RMSNorm(x))`, the mixer chosen by the layer's kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import NemotronHAttention
from .mamba import NemotronHMamba2Mixer
from .moe import NemotronHMLP, NemotronHMoE
from .parts import NemotronHRMSNorm

if TYPE_CHECKING:
    from ..configuration import NemotronHConfig


def build_mixer(config: NemotronHConfig, kind: str, layer_idx: int) -> nn.Module:
    """The mixer of one layer; `kind` as in `config.layers_block_type`."""
    if kind == "mamba":
        return NemotronHMamba2Mixer(config, layer_idx)
    if kind == "attention":
        return NemotronHAttention(config, layer_idx)
    if kind == "mlp":
        return NemotronHMLP(config, config.mlp_intermediate_size(layer_idx))
    return NemotronHMoE(config)


class NemotronHBlock(GradientCheckpointingLayer):
    """`x + mixer(RMSNorm(x))`."""

    def __init__(self, config: NemotronHConfig, layer_idx: int):
        super().__init__()
        self.block_type = config.layers_block_type[layer_idx]
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = NemotronHRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = build_mixer(config, self.block_type, layer_idx)

    def forward(
        self, x_BLD: Tensor, attention_mask: Any = None, mask_BL: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        normed = self.norm(x_BLD.to(self.norm.weight.dtype))
        if self.block_type == "attention":
            y_BLD, _ = self.mixer(normed, attention_mask=attention_mask, **kwargs)
        else:
            y_BLD = self.mixer(normed, mask_BL=mask_BL, **kwargs)
        if self.residual_in_fp32:
            x_BLD = x_BLD.to(torch.promote_types(x_BLD.dtype, torch.float32))
        return x_BLD + y_BLD

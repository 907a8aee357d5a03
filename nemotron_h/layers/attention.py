"""Grouped-query attention without position encoding: softmax(q k^T / sqrt(head_dim) + mask) v.

Shape suffixes as in layers/__init__.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import ops
from .parts import project, residual_linear

if TYPE_CHECKING:
    from ..configuration import NemotronHConfig


class NemotronHAttention(nn.Module):
    """`transformers`' attention interface, or `ops.causal_attention` where no mask is needed."""

    def __init__(self, config: NemotronHConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = residual_linear(queries, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        x_BLD: Tensor,
        cache: Cache | None = None,
        attention_mask: Any = None,
        plainly_causal: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """With `plainly_causal` the queries are the last of the keys' positions and see all keys before them."""
        shape = (*x_BLD.shape[:-1], -1, self.head_dim)
        q_BALQ, k_BALQ, v_BALQ = (
            project(proj, x_BLD).view(shape).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            k_BALQ, v_BALQ = cache.update(k_BALQ, v_BALQ, self.layer_idx)
        if plainly_causal:
            y_BALQ = ops.causal_attention(q_BALQ, k_BALQ, v_BALQ, self.scaling)
            return project(self.o_proj, y_BALQ.transpose(1, 2).reshape(*x_BLD.shape[:-1], -1)), None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        y_BLAQ, weights = attend(
            self,
            q_BALQ,
            k_BALQ,
            v_BALQ,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return project(self.o_proj, y_BLAQ.reshape(*x_BLD.shape[:-1], -1)), weights


def eager_attention(
    module: nn.Module,
    q_BALQ: Tensor,
    k_BALQ: Tensor,
    v_BALQ: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    repeats = cast(int, module.num_key_value_groups)
    k_BALQ, v_BALQ = k_BALQ.repeat_interleave(repeats, dim=1), v_BALQ.repeat_interleave(repeats, dim=1)
    scores = q_BALQ @ k_BALQ.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    # float32 for half precision; a float64 model keeps float64
    dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = F.dropout(scores.softmax(-1, dtype=dtype).to(scores.dtype), p=dropout, training=module.training)
    return (weights @ v_BALQ).transpose(1, 2).contiguous(), weights

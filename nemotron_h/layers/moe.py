"""The MLP, and the mixture of experts (latent in Nemotron 3: 2512.20856).

    MLP(x) = down_proj(relu(up_proj(x))^2)
    MoE(x) = fc2_latent(sum over the chosen experts e of w_e MLP_e(fc1_latent(x))) + shared_experts(x)

Shape suffixes as in layers/__init__.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from .. import ops
from .parts import Float32Parameters, parameter_dtype, project, residual_linear, residual_std

if TYPE_CHECKING:
    from ..configuration import NemotronHConfig


class NemotronHMLP(nn.Module):
    def __init__(self, config: NemotronHConfig, intermediate_size: int):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.down_proj = residual_linear(intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.mlp_hidden_act]

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return project(self.down_proj, self.act_fn(project(self.up_proj, x)))


class NemotronHTopkRouter(Float32Parameters):
    """Sigmoid router in float32; the correction bias decides which experts are chosen, never their weight."""

    e_score_correction_bias: Tensor

    def __init__(self, config: NemotronHConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.n_group = config.n_group
        self.topk_group = config.topk_group
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        dtype = parameter_dtype()
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size, dtype=dtype))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=dtype))

    def initialize(self, config: NemotronHConfig) -> None:
        init.normal_(self.weight, std=config.initializer_range)
        init.zeros_(self.e_score_correction_bias)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, D) -> logits (T, E), weights (T, k), indices (T, k)."""
        with ops.without_autocast(x_TD.device):
            logits_TE = F.linear(x_TD.to(self.weight.dtype), self.weight)
        indices_Tk, weights_Tk = ops.router(
            logits_TE,
            self.e_score_correction_bias,
            top_k=self.top_k,
            n_group=self.n_group,
            topk_group=self.topk_group,
            norm_topk_prob=self.norm_topk_prob,
            scaling=self.routed_scaling_factor,
        )
        return logits_TE, weights_Tk, indices_Tk


@use_experts_implementation(has_gate=False)
class _LibraryExperts(nn.Module):
    """Squared-ReLU experts as 3-D parameters, run by `transformers`' experts interface (grouped GEMM and others)."""

    config: NemotronHConfig  # set by the decorator

    def __init__(self, config: NemotronHConfig):
        super().__init__()
        self.num_experts = config.n_routed_experts
        width, inner = config.moe_latent_size or config.hidden_size, config.moe_intermediate_size
        self.up_proj = nn.Parameter(torch.empty(self.num_experts, inner, width))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, width, inner))
        self.act_fn = ACT2FN[config.mlp_hidden_act]

    def initialize(self, config: NemotronHConfig) -> None:
        init.normal_(self.up_proj, std=config.initializer_range)
        init.normal_(self.down_proj, std=residual_std(config))

    def forward(self, x_TD: Tensor, indices_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        return self.one_by_one(x_TD, indices_Tk, weights_Tk)  # the interface's "eager"

    def one_by_one(self, x_TD: Tensor, indices_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        """One expert after the other, tokens gathered and scattered."""
        out_TD = torch.zeros_like(x_TD, dtype=weights_Tk.dtype)
        for expert in indices_Tk.unique().tolist():
            token, slot = torch.where(indices_Tk == expert)
            hidden = self.act_fn(F.linear(x_TD[token], self.up_proj[expert]))
            y = F.linear(hidden, self.down_proj[expert]) * weights_Tk[token, slot, None]
            out_TD = out_TD.index_add(0, token, y.to(out_TD.dtype))
        return out_TD.to(x_TD.dtype)


class NemotronHExperts(_LibraryExperts):
    def forward(self, x_TD: Tensor, indices_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        """(T, D), the experts of each token (T, k) and their weights (T, k) -> (T, D), their weighted sum."""
        if self.config._experts_implementation == "grouped_mm":  # the default; another was asked for
            y_TD = ops.routed_experts(x_TD, self.up_proj, self.down_proj, self.act_fn, indices_Tk, weights_Tk)
            if y_TD is not None:
                return y_TD
            if not self._grouped_gemm_runs():
                return self.one_by_one(x_TD, indices_Tk, weights_Tk)
        return super().forward(x_TD, indices_Tk, weights_Tk)

    def _grouped_gemm_runs(self) -> bool:
        """torch's grouped GEMM refuses float64, and rows that are not a multiple of 16 bytes."""
        dtype = self.up_proj.dtype
        if torch.compiler.is_compiling() and dtype != torch.bfloat16:
            # Traced, the library has a form of its own for all but bfloat16, which takes any dtype and width.
            return True
        return dtype != torch.float64 and all(size * dtype.itemsize % 16 == 0 for size in self.up_proj.shape[1:])


class NemotronHMoE(nn.Module):
    """Routed experts (in a latent space if `moe_latent_size`) plus shared experts that see every token."""

    def __init__(self, config: NemotronHConfig):
        super().__init__()
        self.gate = NemotronHTopkRouter(config)
        self.experts = NemotronHExperts(config)
        self.shared_experts = NemotronHMLP(config, config.moe_shared_expert_intermediate_size)
        if config.moe_latent_size:
            width, latent, bias = config.hidden_size, config.moe_latent_size, config.mlp_bias
            self.fc1_latent_proj: nn.Module = nn.Linear(width, latent, bias=bias)
            self.fc2_latent_proj: nn.Module = nn.Linear(latent, width, bias=bias)
        else:
            self.fc1_latent_proj = self.fc2_latent_proj = nn.Identity()

    def forward(self, x_BLD: Tensor, **_: Any) -> Tensor:
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        _logits, weights_Tk, indices_Tk = self.gate(x_TD)
        y_TD = self.experts(project(self.fc1_latent_proj, x_TD), indices_Tk, weights_Tk)
        y_TD = project(self.fc2_latent_proj, y_TD)
        return y_TD.view(x_BLD.shape) + self.shared_experts(x_BLD)

"""The Mamba-2 mixer (2405.21060, section 7).

    z, x, B, C, dt = split(in_proj(u))
    x, B, C        = split(silu(causal_conv([x, B, C])))
    dt             = clamp(softplus(dt + dt_bias), *time_step_limit)
    h[t]           = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]^T,         A = -exp(A_log), h[t] (P, N) for each head
    y[t]           = h[t] C[t] + D x[t]
    out            = out_proj(RMSNorm_grouped(y * silu(z)))

Shape suffixes as in layers/__init__.py.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from .. import ops
from ..cache.layers import MambaLayer
from .parts import (
    Float32Parameters,
    NemotronHConv1d,
    NemotronHRMSNormGated,
    is_called_plainly,
    parameter_dtype,
    project,
    residual_linear,
)

if TYPE_CHECKING:
    from ..configuration import NemotronHConfig


class NemotronHMamba2Mixer(Float32Parameters):
    def __init__(self, config: NemotronHConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.mamba_num_heads
        self.head_dim = config.mamba_head_dim
        self.n_groups = config.n_groups
        self.ssm_state_size = config.ssm_state_size
        self.intermediate_size = config.d_inner
        self.conv_dim = config.conv_dim
        # The result does not depend on it: the config's is what NVIDIA's kernel used, ours is what was fastest.
        self.chunk_size = min(config.chunk_size, ops.DEFAULT_CHUNK_SIZE)
        self.time_step_limit = cast(tuple[float, float], tuple(config.time_step_limit))

        self.in_proj = nn.Linear(config.hidden_size, config.in_proj_size, bias=config.mamba_proj_bias)
        self.conv1d = NemotronHConv1d(
            self.conv_dim, config.conv_kernel, bias=config.use_conv_bias, activation=config.mamba_hidden_act
        )
        dtype = parameter_dtype()
        self.dt_bias = nn.Parameter(torch.ones(self.num_heads, dtype=dtype))
        self.A_log = nn.Parameter(torch.zeros(self.num_heads, dtype=dtype))
        self.D = nn.Parameter(torch.ones(self.num_heads, dtype=dtype))
        self.norm = NemotronHRMSNormGated(self.intermediate_size, self.n_groups, config.layer_norm_epsilon)
        self.out_proj = residual_linear(self.intermediate_size, config.hidden_size, bias=config.mamba_proj_bias)

    def initialize(self, config: NemotronHConfig) -> None:
        """A ~ U(1, 16); dt log-uniform in [time_step_min, time_step_max], through the inverse of softplus."""
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        dt_H = torch.exp(torch.rand(self.num_heads) * (high - low) + low).clamp(min=config.time_step_floor)
        init.copy_(self.A_log, torch.empty(self.num_heads).uniform_(1, 16).log())
        init.copy_(self.dt_bias, dt_H + torch.log(-torch.expm1(-dt_H)))
        init.ones_(self.D)
        fan_in = self.conv1d.weight.shape[-1]
        init.uniform_(self.conv1d.weight, -(fan_in**-0.5), fan_in**-0.5)
        if self.conv1d.bias is not None:
            init.zeros_(self.conv1d.bias)

    def forward(
        self,
        x_BLD: Tensor,
        cache: Cache | None = None,
        mask_BL: Tensor | None = None,
        seq_idx_BL: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """(B, L, D) -> (B, L, D). `mask_BL` is False at padding, `seq_idx_BL` numbers packed documents."""
        length, gate = x_BLD.shape[1], self.intermediate_size
        memory: MambaLayer | None = cache.layers[self.layer_idx] if cache is not None else None
        if memory is not None and 0 < memory.keeps < length:
            return self._recording_the_last(x_BLD, cache, memory, mask_BL, seq_idx_BL)
        window_BCW = memory.window_BCW if memory is not None else None
        state_BHPN = memory.state_BHPN if memory is not None else None

        projected_BLK = project(self.in_proj, x_BLD)
        if memory is not None and memory.keeps:
            memory.open_record(length).add(self.replay, projected_BLK[..., gate:].clone(), mask_BL)
        y_BLI = None
        if window_BCW is not None and state_BHPN is not None and length <= ops.FEW_TOKENS and seq_idx_BL is None:
            if self._parts_are_plain():
                y_BLI = self._few(projected_BLK, window_BCW, state_BHPN, mask_BL)
        if y_BLI is None:
            z_BLI, inputs_BLK = projected_BLK[..., :gate], projected_BLK[..., gate:]
            y_BLHP, window_BCW, state_BHPN = self._scan(inputs_BLK, window_BCW, state_BHPN, mask_BL, seq_idx_BL)
            y_BLI = self.norm(y_BLHP.flatten(2), z_BLI)
        if memory is not None:
            assert window_BCW is not None and state_BHPN is not None
            memory.update(window_BCW, state_BHPN, length)
        return project(self.out_proj, y_BLI)

    def _recording_the_last(
        self, x_BLD: Tensor, cache: Cache | None, memory: MambaLayer, mask_BL: Tensor | None, seq_idx_BL: Tensor | None
    ) -> Tensor:
        """Only the last tokens may have to be forgotten; what comes before them leaves its state alone."""
        sizes = [x_BLD.shape[1] - memory.keeps, memory.keeps]
        (first, last), (mask, mask_last), (seq, seq_last) = (
            t.split(sizes, dim=1) if t is not None else (None, None) for t in (x_BLD, mask_BL, seq_idx_BL)
        )
        with memory.not_recording():
            y_BLD = self(first, cache, mask, seq)
        return torch.cat([y_BLD, self(last, cache, mask_last, seq_last)], dim=1)

    def _parts_are_plain(self) -> bool:
        """Whether the convolution's and the norm's weights may be read in place of calling them."""
        return (
            is_called_plainly(self.conv1d, NemotronHConv1d)
            and is_called_plainly(self.norm, NemotronHRMSNormGated)
            and self.norm.n_groups == self.n_groups
        )

    def _few(
        self, projected_BLK: Tensor, window_BCW: Tensor, state_BHPN: Tensor, mask_BL: Tensor | None = None
    ) -> Tensor | None:
        """What is between the projections for a few tokens in one call, window and state in place; None where the parts
        have to be called."""
        return ops.mamba_step(
            projected_BLK,
            window_BCW,
            state_BHPN,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            self.A_log,
            self.D,
            self.norm.weight,
            groups=self.n_groups,
            activation=self.conv1d.activation,
            time_step_limit=self.time_step_limit,
            eps=self.norm.variance_epsilon,
            mask_BL=mask_BL,
        )

    def _scan(
        self,
        inputs_BLK: Tensor,
        window_BCW: Tensor | None,
        state_BHPN: Tensor | None,
        mask_BL: Tensor | None,
        seq_idx_BL: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The raw x, B, C and dt of in_proj (B, L, C + H) -> y (B, L, H, P), the window and the state after them."""
        batch, length, _ = inputs_BLK.shape
        xBC_BLC, dt_BLH = inputs_BLK.split([self.conv_dim, self.num_heads], dim=-1)
        xBC_BLC, window_BCW = self.conv1d(xBC_BLC, window_BCW=window_BCW, mask_BL=mask_BL, seq_idx_BL=seq_idx_BL)
        x_BLI, B_BLGN, C_BLGN = xBC_BLC.split(
            [self.intermediate_size] + [self.n_groups * self.ssm_state_size] * 2, dim=-1
        )
        x_BLHP = x_BLI.view(batch, length, self.num_heads, self.head_dim)
        B_BLGN = B_BLGN.view(batch, length, self.n_groups, self.ssm_state_size)
        C_BLGN = C_BLGN.view(batch, length, self.n_groups, self.ssm_state_size)
        dt_BLH = ops.time_step(dt_BLH, self.dt_bias, self.time_step_limit, mask_BL)
        A_H = -torch.exp(self.A_log)
        few = length == 1 or (length <= ops.FEW_TOKENS and x_BLHP.device.type == "cpu" and not torch.is_grad_enabled())
        if few and state_BHPN is not None and seq_idx_BL is None:
            ys = []
            for x_BHP, dt_BH, B_BGN, C_BGN in zip(
                *(t.unbind(1) for t in (x_BLHP, dt_BLH, B_BLGN, C_BLGN)), strict=True
            ):
                y_BHP, state_BHPN = ops.ssd_step(x_BHP, dt_BH, A_H, B_BGN, C_BGN, self.D, state_BHPN)
                ys.append(y_BHP)
            y_BLHP = torch.stack(ys, dim=1) if length > 1 else ys[0].unsqueeze(1)
        else:
            y_BLHP, state_BHPN = ops.ssd(
                x_BLHP,
                dt_BLH,
                A_H,
                B_BLGN,
                C_BLGN,
                self.D,
                initial_state_BHPN=state_BHPN,
                seq_idx_BL=seq_idx_BL,
                chunk_size=self.chunk_size,
            )
        assert state_BHPN is not None
        return y_BLHP, window_BCW, state_BHPN

    @torch.no_grad()
    def replay(
        self, inputs_BLK: Tensor, mask_BL: Tensor | None, window_BCW: Tensor | None, state_BHPN: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The window and the state after tokens whose raw inputs (B, L, C + H) were recorded, one after the other. In
        place where ops.mamba_step does it, so the caller hands copies over."""
        for few_BLK, few_BL in zip(
            inputs_BLK.split(ops.FEW_TOKENS, dim=1),
            itertools.repeat(None) if mask_BL is None else mask_BL.split(ops.FEW_TOKENS, dim=1),
            strict=False,
        ):
            y_BLI = None
            if few_BL is None and window_BCW is not None and state_BHPN is not None:
                z_BLI = few_BLK.new_zeros(*few_BLK.shape[:2], self.intermediate_size)
                y_BLI = self._few(torch.cat([z_BLI, few_BLK], dim=-1), window_BCW, state_BHPN)
            if y_BLI is None:
                _, window_BCW, state_BHPN = self._scan(few_BLK, window_BCW, state_BHPN, few_BL, None)
        assert window_BCW is not None and state_BHPN is not None
        return window_BCW, state_BHPN

"""RMSNorm, and the gated, grouped RMSNorm at the end of a Mamba-2 mixer.

Shape suffixes: D features (`hidden_size`, or `d_inner` for the gated one), G groups, R rows (all leading dimensions).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import conditions, native
from .conditions import BLOCK, NATIVE, RECOMPUTED, compute_dtype


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension, in float32 (float64 for float64), in x's dtype.

    The weight multiplies before the result is rounded to x's dtype, as in NVIDIA's model and transformers'
    NemotronHRMSNorm (Llama rounds first). Source: RMSNorm, arXiv 1910.07467.
    """
    form = conditions.norm(x, None, weight_D, 1)
    if form == RECOMPUTED:
        return _Norm.apply(x, None, weight_D, eps, 1)
    if form == NATIVE:
        return native.rms_norm(x, weight_D, eps)
    dtype = compute_dtype(x)
    h = x.to(dtype)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (weight_D.to(dtype) * h).to(x.dtype)


def gated_rms_norm(y: Tensor, z: Tensor, weight_D: Tensor, eps: float, n_groups: int) -> Tensor:
    """`weight * RMSNorm(y * silu(z))`, each of `n_groups` equal parts of the last dimension normalised by itself.

    The gate comes before the norm, the weight after it, everything in float32 (float64 for float64); the result has
    y's dtype.
    Source: Mamba-2, arXiv 2405.21060, section 8 (the normalisation layer before the output projection); its order and
    groups are those of NVIDIA's `MambaRMSNormGated` (`norm_before_gate=False`).

    Args:
        y: (..., D), the output of the scan.
        z: (..., D), the gate before its silu.
        weight_D: (D,).
        n_groups: D must be a multiple of it.
    """
    form = conditions.norm(y, z, weight_D, n_groups)
    if form == RECOMPUTED:
        return _Norm.apply(y, z, weight_D, eps, n_groups)
    if form == NATIVE:
        width = y.shape[-1]
        return native.gated_rms_norm(y.view(-1, width), z.flatten(0, -2), weight_D, eps, n_groups).view(y.shape)
    dtype = compute_dtype(y, z)
    h = y.to(dtype) * F.silu(z.to(dtype))
    h_GD = h.unflatten(-1, (n_groups, -1))
    h_GD = h_GD * torch.rsqrt(h_GD.square().mean(-1, keepdim=True) + eps)
    return (weight_D.to(dtype) * h_GD.flatten(-2)).to(y.dtype)


class _Norm(torch.autograd.Function):
    """Either norm, with a backward that computes it again, a few rows at a time on a CPU.

    Kept for it: y, z and the weight. Autograd by itself keeps five float32 copies, and z may be a view of what is kept
    anyway.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, y: Tensor, z: Tensor | None, weight_D: Tensor, eps: float, n_groups: int
    ) -> Tensor:
        ctx.save_for_backward(y, z, weight_D)
        ctx.eps, ctx.n_groups = eps, n_groups
        return rms_norm(y, weight_D, eps) if z is None else gated_rms_norm(y, z, weight_D, eps, n_groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, z, weight_D = ctx.saved_tensors
        dtype, width = compute_dtype(y, z), y.shape[-1]
        y_RD, dout_RD = y.reshape(-1, width), dout.reshape(-1, width)
        z_RD = None if z is None else z.reshape(-1, width)
        weight, dweight_D = weight_D.to(dtype), torch.zeros(width, dtype=dtype, device=y.device)
        trained = ctx.needs_input_grad[2]
        dy_RD = torch.empty_like(y_RD, memory_format=torch.contiguous_format)
        dz_RD = None if z_RD is None else torch.empty_like(z_RD, memory_format=torch.contiguous_format)
        rows = y_RD.shape[0]
        step = BLOCK if y.is_cpu else max(rows, 1)
        for start in range(0, rows, step):
            here = slice(start, min(start + step, rows))
            y_, dout_ = y_RD[here].to(dtype), dout_RD[here].to(dtype)
            z_ = None if z_RD is None else z_RD[here].to(dtype)
            gate = None if z_ is None else F.silu(z_)
            h_RGD = (y_ if gate is None else y_ * gate).unflatten(-1, (ctx.n_groups, -1))
            scale_RG1 = torch.rsqrt(h_RGD.square().mean(-1, keepdim=True) + ctx.eps)
            normed_RGD = h_RGD * scale_RG1
            if trained:
                dweight_D += (dout_ * normed_RGD.flatten(-2)).sum(0)
            dnormed_RGD = (dout_ * weight).unflatten(-1, (ctx.n_groups, -1))
            along_RG1 = (dnormed_RGD * normed_RGD).mean(-1, keepdim=True)
            dh = dnormed_RGD.sub_(normed_RGD.mul_(along_RG1)).mul_(scale_RG1).flatten(-2)
            if z_ is not None and dz_RD is not None:
                dz_RD[here] = torch.ops.aten.silu_backward(dh * y_, z_)
                dh.mul_(gate)
            dy_RD[here] = dh
        dz = None if dz_RD is None or z is None else dz_RD.view(z.shape)
        return dy_RD.view(y.shape), dz, dweight_D.to(weight_D.dtype) if trained else None, None, None

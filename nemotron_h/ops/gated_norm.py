"""RMSNorm, and the gated, grouped RMSNorm at the end of a Mamba-2 mixer.

Shape suffixes: D features (`hidden_size`, or `d_inner` for the gated one), G groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import compute_dtype


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension, in float32 (float64 for float64), in x's dtype.

    The weight multiplies before the result is rounded to x's dtype, as in NVIDIA's model and transformers'
    NemotronHRMSNorm (Llama rounds first). Source: RMSNorm, arXiv 1910.07467.
    """
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
    dtype = compute_dtype(y, z)
    h = y.to(dtype) * F.silu(z.to(dtype))
    h_GD = h.unflatten(-1, (n_groups, -1))
    h_GD = h_GD * torch.rsqrt(h_GD.square().mean(-1, keepdim=True) + eps)
    return (weight_D.to(dtype) * h_GD.flatten(-2)).to(y.dtype)

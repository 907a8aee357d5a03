"""The parts that the mixers are made of: linear layers, norms, the convolution, parameters that stay float32.

Shape suffixes as in modeling.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops


def parameter_dtype() -> torch.dtype:
    """float32 for the parameters that keep it in a half-precision model, float64 in a float64 model."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def unchanged(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module is its class's forward and nothing else: no hook, no adapter, no forward of another
    library's. Only then may its parameters be read in place of a call."""
    return (
        type(module) is kind
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
    )


class Float32Parameters(nn.Module):
    """A module whose own parameters stay float32 when the model is cast to half precision.

    `dtype=` of `from_pretrained` is handled by `_keep_in_fp32_modules_strict`; this is for `.to(dtype)`, `.half()`,
    `.bfloat16()`, which would round A_log, D, dt_bias and the router away from what the checkpoint says.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_float32(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            rounded = new.is_floating_point() and new.dtype.itemsize < 4 <= tensor.dtype.itemsize
            return tensor.to(new.device, torch.float32) if rounded else new

        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(keep_float32, recurse=False)


class NemotronHLinear(nn.Linear):
    """`nn.Linear` by `ops.linear`: the same function, by the fastest path there is for so many rows."""

    writes_residual = False  # True where the result is added to the residual stream; initialisation asks

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return ops.linear(x, self.weight, self.bias)


class NemotronHRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class NemotronHRMSNormGated(nn.Module):
    """RMSNorm_grouped(y * silu(z)): the gate before the norm, the weight after it, `n_groups` groups."""

    def __init__(self, hidden_size: int, n_groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps
        self.n_groups = n_groups

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return ops.gated_rms_norm(y, z, self.weight, self.variance_epsilon, self.n_groups)


class NemotronHConv1d(nn.Conv1d):
    """The depthwise causal convolution, with its activation.

    A module that is called, where its weight could be read: what brings weights in for a module's call (offloading,
    sharding) would not know of the reading.
    """

    def __init__(self, channels: int, kernel_size: int, bias: bool, activation: str):
        super().__init__(channels, channels, kernel_size, groups=channels, padding=kernel_size - 1, bias=bias)
        self.activation = activation

    def forward(  # type: ignore[override]
        self,
        xBC_BLC: Tensor,
        window_BCW: Tensor | None = None,
        mask_BL: Tensor | None = None,
        seq_idx_BL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, L, C) after (B, C, W) -> (B, L, C), and the window for what comes next."""
        return ops.causal_conv(
            xBC_BLC,
            self.weight.squeeze(1),
            self.bias,
            window_BCW=window_BCW,
            mask_BL=mask_BL,
            seq_idx_BL=seq_idx_BL,
            activation=self.activation,
        )

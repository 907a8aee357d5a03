"""The parts that the mixers are made of: calls of linear layers, norms, the convolution, parameters that stay float32.

Shape suffixes as in layers/__init__.py.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from .. import ops

if TYPE_CHECKING:
    from ..configuration import NemotronHConfig


def parameter_dtype() -> torch.dtype:
    """float32 for the parameters that keep it in a half-precision model, float64 in a float64 model."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


_own_functions: dict[type[nn.Module], tuple[Any, Any, Any]] = {}


def has_own_forward(kind: type[nn.Module]) -> bool:
    """Whether a call of this class runs the functions that its own files define: libraries that speed models up or
    trace them put others in their place, some before this package is imported."""
    now = kind.forward, kind.__call__, kind._call_impl
    if _own_functions.get(kind) == now:
        return True
    files = {getattr(sys.modules.get(cls.__module__), "__file__", None) for cls in kind.__mro__}
    if not all(getattr(getattr(function, "__code__", None), "co_filename", "") in files for function in now):
        return False
    _own_functions[kind] = now
    return True


def is_called_plainly(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module is its class's forward and nothing else: no hook of any sort, no adapter, no forward
    of another library's, on this module or on its class. Only then may its parameters be read in place of a call."""
    attributes = module.__dict__
    return (
        type(module) is kind
        and not attributes["_forward_hooks"]
        and not attributes["_forward_pre_hooks"]
        and not attributes["_backward_hooks"]
        and not attributes["_backward_pre_hooks"]
        and "forward" not in attributes
        and "_call_impl" not in attributes
        and "_compiled_call_impl" not in attributes
        and has_own_forward(kind)
        and not torch_module._has_any_global_hook()
    )


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """`linear(x)`, by `ops.linear` where the call would be `nn.Linear`'s and nothing else.

    The layer itself stays a plain `nn.Linear`, which tools look for by its exact type. Where an adapter is around one
    (`base_layer`, in PEFT), or weights are brought in for the call (`_old_forward`, in accelerate), that is called, and
    the product inside it is the fast one for this call.
    """
    if torch.compiler.is_compiling():
        return linear(x)
    if _is_plain_linear(linear):
        return ops.linear(x, cast(Tensor, linear.weight), cast(Tensor | None, linear.bias))
    base = linear._modules.get("base_layer") or linear
    inside, lent = base.__dict__, "forward" if base is not linear and _is_plain_linear(base) else "_old_forward"
    before = inside.get(lent)
    if lent == "_old_forward" and (type(base) is not nn.Linear or not _is_the_class_forward(before)):
        return linear(x)
    inside[lent] = functools.partial(_fast_forward, base)
    try:
        return linear(x)
    finally:
        if before is None:
            inside.pop(lent, None)
        else:
            inside[lent] = before


def _is_plain_linear(module: nn.Module) -> bool:
    return is_called_plainly(module, nn.Linear) and F.linear is torch._C._nn.linear


def _is_the_class_forward(method: Any) -> bool:
    return getattr(method, "__func__", None) is nn.Linear.forward and has_own_forward(nn.Linear)


def _fast_forward(linear: Any, x: Tensor) -> Tensor:
    return ops.linear(x, linear.weight, linear.bias)


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


def residual_linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """A linear layer whose result is added to the residual stream; initialisation asks for the mark."""
    linear = nn.Linear(in_features, out_features, bias=bias)
    vars(linear)["writes_residual"] = True
    return linear


def residual_std(config: NemotronHConfig) -> float:
    """What writes to the residual stream starts smaller, by the depth (GPT-2, Megatron-LM)."""
    return config.initializer_range / (math.sqrt(config.num_hidden_layers) if config.rescale_prenorm_residual else 1.0)


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

"""Which implementation an op takes on a device, and why. The only place that looks for mamba-ssm and causal-conv1d.

The torch implementations serve every device and dtype. On CUDA the packages' kernels take over where they are installed
and compute the same: never for float64, never for a float32 scan (theirs multiplies in TF32), never while torch.compile
traces. They are looked for at the first use on a CUDA tensor, not at import. `NEMOTRON_H_KERNELS=0` keeps to torch.

The adapters below turn our argument conventions into the packages'. They are tested on a CPU, by mamba-ssm's own Triton
functions in an interpreter and causal-conv1d's own references (tests/kernels); they have not been run on a GPU yet.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .native import ENVIRONMENT_VARIABLE, switched_off

logger = logging.getLogger("nemotron_h")
_said: set[str] = set()

KERNEL_DEVICES = ("cuda",)
INSTALL = "pip install --no-build-isolation 'nemotron-h[kernels]'"

# mamba-ssm wants a power of two; 256 is what the published configs train with on a GPU.
_KERNEL_CHUNK_SIZE = 256


@dataclass(frozen=True)
class Choice:
    """What an op runs: `fn` is the kernel behind our own signature, None for the torch implementation."""

    name: str
    fn: Callable[..., Any] | None
    reason: str
    faulty: bool = False  # a package is missing or wrong, which is worth saying


@dataclass(frozen=True)
class _Kernel:
    """Where a kernel is found, what it does in words, the arguments it must take, its adapter and its exact dtypes."""

    package: str
    work: str
    module: str
    function: str
    arguments: tuple[str, ...]
    adapter: Callable[..., Any]
    dtypes: tuple[torch.dtype, ...]


def serves(x: Tensor) -> bool:
    """Whether a kernel is worth asking for at all. The whole cost of this file on a CPU."""
    return x.device.type in KERNEL_DEVICES


def which(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    gradient: bool = False,
    kernel_size: int = 4,
    channels: int = 8,
    activation: Any = "silu",
) -> Choice:
    """The implementation of `op` for tensors of this device and dtype, with the reason in words.

    Args:
        op: "ssd", "ssd_step", "causal_conv" or "causal_conv_step".
        gradient: a gradient is wanted.
        kernel_size, channels, activation: the convolution's.
    """
    kernel = _KERNELS[op]
    if device.type not in KERNEL_DEVICES:
        return Choice("torch", None, f"{kernel.package} has no kernel for {device.type}")
    if switched_off():
        return Choice("torch", None, f"{ENVIRONMENT_VARIABLE}={os.environ[ENVIRONMENT_VARIABLE]}")
    if dtype not in kernel.dtypes:
        return Choice("torch", None, f"{kernel.package}'s kernel is not exact in {str(dtype).removeprefix('torch.')}")
    if op.endswith("_step") and gradient:
        return Choice("torch", None, f"{kernel.package}'s one-token kernel has no backward")
    convolves = op.startswith("causal_conv")
    if convolves and not 2 <= kernel_size <= 4:
        return Choice("torch", None, f"causal-conv1d takes kernels of 2 to 4, not {kernel_size}")
    if op == "causal_conv" and channels % 8 != 0:
        return Choice("torch", None, f"causal-conv1d takes channels in eights, not {channels}")
    if convolves and activation not in (None, "silu", "swish"):
        return Choice("torch", None, f"causal-conv1d has no activation {activation!r}")
    function, problem = _find(op)
    if function is None:
        return Choice("torch", None, problem, faulty=True)
    return Choice(kernel.package, functools.partial(kernel.adapter, function), f"{kernel.package} is installed")


def kernel_for(op: str, x: Tensor, **features: Any) -> Callable[..., Any] | None:
    """`which(...).fn` for a tensor that `serves` accepted; None, so torch, while torch.compile traces."""
    if torch.compiler.is_compiling():
        return None
    choice = which(op, x.device, x.dtype, **features)
    if choice.faulty:
        _say_once(_KERNELS[op].package, choice.reason)
    return choice.fn


def report(device: torch.device | str | None = None, dtype: torch.dtype = torch.bfloat16) -> list[tuple[str, str, str]]:
    """(op, implementation, reason) for every op with a choice, on the GPU if there is one and no device is named."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    choices = {op: which(op, torch.device(device), dtype) for op in _KERNELS}
    return [(op, choice.name, choice.reason) for op, choice in choices.items()]


def fused_linear_cross_entropy() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Liger's summed cross-entropy of (x (T, D), weight (V, D), labels (T,)), or None where it is not installed.

    Nothing is said about its absence: ours needs as little memory.
    """
    if torch.compiler.is_compiling() or switched_off():
        return None
    loss = _liger()
    return None if loss is None else lambda x_TD, weight_VD, labels_T: loss(weight_VD, x_TD, labels_T)


@functools.cache
def _liger() -> Any:
    try:
        loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
        return loss(reduction="sum")
    except Exception:  # a build for another torch or triton fails in many ways
        return None


@functools.cache
def _find(op: str) -> tuple[Callable[..., Any] | None, str]:
    """The package's function, or None and what is wrong with the package and what helps. Looked up once a process."""
    kernel = _KERNELS[op]
    slower = f"{kernel.work} runs in torch on this GPU: the same numbers, slower"
    silence = f"{ENVIRONMENT_VARIABLE}=0 keeps to torch without this message"
    try:
        function = getattr(importlib.import_module(kernel.module), kernel.function)
        parameters = inspect.signature(function).parameters
    except ModuleNotFoundError as error:
        if error.name and kernel.module.split(".")[0] == error.name.split(".")[0]:
            return None, f"{kernel.package} is not installed, so {slower}. {INSTALL}; {silence}."
        return None, f"{kernel.package} cannot be imported ({error}), so {slower}. {INSTALL}; {silence}."
    except Exception as error:  # a build for another torch or CUDA fails in many ways, not as ImportError alone
        words = " ".join(str(error).split())[:200]
        return None, (
            f"{kernel.package} cannot be imported ({type(error).__name__}: {words}), so {slower}. Rebuild it for torch "
            f"{torch.__version__}: {INSTALL} --force-reinstall --no-deps; {silence}."
        )
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    missing = [] if takes_any else [name for name in kernel.arguments if name not in parameters]
    if missing:
        return None, (
            f"{kernel.module}.{kernel.function} does not take {', '.join(missing)} (needed: mamba-ssm 2.2 or "
            f"causal-conv1d 1.4, or later), so {slower}. {INSTALL} --upgrade; {silence}."
        )
    return function, ""


def _say_once(package: str, problem: str) -> None:
    if package not in _said:
        _said.add(package)
        logger.warning(problem)


def _ssd(
    mamba_chunk_scan_combined: Callable[..., Any],
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor,
    *,
    initial_state_BHPN: Tensor | None = None,
    doc_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    y_BLHP, state_BHPN = mamba_chunk_scan_combined(
        x_BLHP,
        dt_BLH.float(),
        A_H.float(),
        B_BLGN.to(x_BLHP.dtype),
        C_BLGN.to(x_BLHP.dtype),
        chunk_size=_KERNEL_CHUNK_SIZE,
        D=D_H.float(),
        initial_states=None if initial_state_BHPN is None else initial_state_BHPN.float(),
        # Numbered from 0, which the kernel takes for what precedes position 0.
        seq_idx=None if doc_BL is None else doc_BL.int(),
        dt_softplus=False,
        return_final_states=True,
    )
    return y_BLHP, state_BHPN.float()


def _ssd_step(
    selective_state_update: Callable[..., Any],
    x_BHP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor,
) -> Tensor:
    """y (B, H, P); the state moves on in place, in the dtype that it is held in. The kernel computes in float32."""
    heads, head_dim, state_size = state_BHPN.shape[1:]
    # Expanded, never copied: stride 0 is how the kernel knows that dt, its bias, A and D are one number per head. It
    # asks the bias for its stride before it asks whether there is one. The time step is ours and not the kernel's own
    # log(1 + exp(.)), which is 1e-5 off in float32 where dt_bias is -6 and 5e-3 where it is -12.
    return selective_state_update(
        state_BHPN,
        x_BHP,
        dt_BH.float()[..., None].expand(-1, -1, head_dim),
        A_H.float()[:, None, None].expand(heads, head_dim, state_size),
        B_BGN,
        C_BGN,
        D=D_H.float()[:, None].expand(heads, head_dim),
        dt_bias=_zero(x_BHP.device).expand(heads, head_dim),
        dt_softplus=False,
    )


@functools.cache
def _zero(device: torch.device) -> Tensor:
    return torch.zeros(1, 1, device=device)


def _taps(
    causal_conv1d_fn: Callable[..., Any],
    seen_BEC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    activation: str | None,
    doc_BE: Tensor | None,
) -> Tensor:
    # The window stands in front of the inputs and its own outputs are dropped: so one call serves with and without a
    # window, and with documents, which the kernel cannot combine with its own `initial_states`.
    y_BCE = causal_conv1d_fn(
        seen_BEC.transpose(1, 2),
        weight_CK,
        bias=bias_C,
        seq_idx=None if doc_BE is None else doc_BE.int().contiguous(),
        activation=activation,
    )
    return y_BCE[..., weight_CK.shape[1] - 1 :].transpose(1, 2)


def _taps_step(
    causal_conv1d_update: Callable[..., Any],
    x_BC: Tensor,
    window_BCW: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    activation: str | None,
    mask_B1: Tensor | None,
) -> Tensor:
    """y (B, C), 0 at pads; the window moves on in place, but for a pad's."""
    if mask_B1 is None:
        return causal_conv1d_update(x_BC, window_BCW, weight_CK, bias=bias_C, activation=activation)
    before_BCW = window_BCW.clone()
    y_BC = causal_conv1d_update(x_BC, window_BCW, weight_CK, bias=bias_C, activation=activation)
    torch.where(mask_B1[..., None], window_BCW, before_BCW, out=window_BCW)
    return torch.where(mask_B1, y_BC, 0)


_HALF = (torch.float16, torch.bfloat16)

_KERNELS = {
    "ssd": _Kernel(
        "mamba-ssm",
        "the Mamba-2 scan",
        "mamba_ssm.ops.triton.ssd_combined",
        "mamba_chunk_scan_combined",
        ("chunk_size", "D", "initial_states", "seq_idx", "dt_softplus", "return_final_states"),
        _ssd,
        _HALF,
    ),
    "ssd_step": _Kernel(
        "mamba-ssm",
        "the Mamba-2 scan",
        "mamba_ssm.ops.triton.selective_state_update",
        "selective_state_update",
        ("D", "dt_bias", "dt_softplus"),
        _ssd_step,
        (*_HALF, torch.float32),
    ),
    "causal_conv": _Kernel(
        "causal-conv1d",
        "the convolution before the scan",
        "causal_conv1d",
        "causal_conv1d_fn",
        ("bias", "seq_idx", "activation"),
        _taps,
        (*_HALF, torch.float32),
    ),
    "causal_conv_step": _Kernel(
        "causal-conv1d",
        "the convolution before the scan",
        "causal_conv1d",
        "causal_conv1d_update",
        # The last only to be known by: since they take it, they take a state of kernel - 1 columns.
        ("bias", "activation", "cache_seqlens"),
        _taps_step,
        (*_HALF, torch.float32),
    ),
}

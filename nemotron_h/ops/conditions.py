"""Which form of an op runs; asked here and nowhere else. (Which packages' kernels serve on a GPU: cuda_kernels.py.)

    PLAIN       functions of tensors, of which autograd, tracers and function transforms see each step
    RECOMPUTED  an autograd function: it keeps the inputs and its backward works the rest out again, a part at a time
    BLOCKS      a few rows at a time, so that float32 copies of low-precision inputs stay in a CPU's cache
    NATIVE      native.c: plain tensors on a CPU, nobody differentiating, tracing or watching

An op's autograd function calls the op again to run forward, which then gives one of the other forms.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native

PLAIN, RECOMPUTED, BLOCKS, NATIVE = "plain", "recomputed", "blocks", "native"
ROWS, ONE_ROW = "rows", "one row"  # of `linear`
BLOCK = 32  # rows of some ten thousand features
FEW_TOKENS = 16
"""Up to so many tokens that go on from a state are worked through one after the other: the state is read and written
once for them, and any split of them into calls gives the same bits. More go through the chunked form."""

# Rows an expert up to which native.c is the fastest: without instructions for bfloat16 the library's grouped products
# are slower; with them (not measured) theirs should win once weights are read for many rows.
_EXPERT_ROWS, _EXPERT_ROWS_SLOW = 4, 512
_PACKED_ROWS = 32  # rows up to which native.c multiplies int8 and int4 the fastest
_HALF = (torch.bfloat16, torch.float16)
_NATIVE = (torch.float32, torch.bfloat16)
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


# ------------------------------------------------------------------------------------------------ gradients and dtypes


def wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def recomputes(*tensors: Tensor | None) -> bool:
    """Whether a gradient is wanted of plain tensors, eagerly. Tracers and functorch differentiate the plain form of an
    op, and so does autograd where a tensor subclass has to see each step."""
    return (
        wants_gradient(*tensors)
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
        and all(t is None or type(t) in _PLAIN_TYPES for t in tensors)
    )


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any of the tensors is float64, else float32: never lower, whatever dtype the model was loaded in."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Under `torch.autocast` a float32 matmul is silently a bfloat16 one, which the SSM state cannot bear."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions that multiply that half-precision dtype.

    oneDNN's word is not enough on x86: it takes bfloat16 on any AVX-512 and emulates it, more slowly than float32.
    """
    if dtype != torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    if platform.machine().lower() in ("x86_64", "amd64") and not (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    ):
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_slow(dtype: torch.dtype) -> bool:
    """Whether a CPU has to emulate products in that dtype, so that converting to float32 is faster."""
    return dtype in _HALF and not multiplies(dtype)


# -------------------------------------------------------------------------------------------------------- op by op


def norm(y: Tensor, z: Tensor | None, weight_D: Tensor, n_groups: int) -> str:
    """Of RMSNorm(y), or of RMSNorm(y * silu(z)) in groups."""
    if recomputes(y, z, weight_D):
        return RECOMPUTED
    width = y.shape[-1]
    fits = (
        y.dtype in _NATIVE
        and weight_D.dtype == y.dtype
        and y.numel() > 0
        and width == weight_D.shape[0]
        and width % n_groups == 0
        and (z is None or (z.shape == y.shape and z.dtype == y.dtype and z.ndim > 1 and _may_lie_apart(z)))
    )
    return NATIVE if fits and native.serves(y, weight_D) else PLAIN


def _may_lie_apart(z: Tensor) -> bool:
    """Whether C may read z, whose rows lie in one step from each other, so that flattening copies nothing."""
    evenly = all(z.shape[dim] == 1 or z.stride(dim - 1) == z.shape[dim] * z.stride(dim) for dim in range(1, z.ndim - 1))
    return evenly and native.serves_rows(z) and not wants_gradient(z)


def convolution(
    window_BWC: Tensor,
    x_BLC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    act: Callable[[Tensor], Tensor] | None,
    doc_BE: Tensor | None,
) -> str:
    tensors = (x_BLC, window_BWC, weight_CK, bias_C)
    if recomputes(*tensors):
        return RECOMPUTED if act is None or act is F.silu else PLAIN
    (channels, kernel), dtype = weight_CK.shape, x_BLC.dtype
    fits = (
        act is F.silu
        and doc_BE is None
        and dtype in _NATIVE
        and dtype == weight_CK.dtype == window_BWC.dtype
        and (bias_C is None or (bias_C.dtype == dtype and bias_C.shape[0] == channels))
        and x_BLC.numel() > 0
        and kernel <= native.MOST_TAPS
        and channels == x_BLC.shape[2]
        and window_BWC.shape == (x_BLC.shape[0], kernel - 1, channels)
        and native.serves_rows(x_BLC)
        and not wants_gradient(x_BLC, window_BWC)
    )
    if fits and native.serves(weight_CK, bias_C):
        return NATIVE
    blocks = (
        x_BLC.shape[1] > BLOCK
        and not torch.compiler.is_compiling()
        and all(t is None or t.device.type == "cpu" for t in tensors)
        and not wants_gradient(*tensors)
    )
    return BLOCKS if blocks else PLAIN


def scan(*inputs: Tensor) -> str:
    """Traced, the plain form is differentiated by the tracer, which decides for itself what to recompute."""
    if recomputes(*inputs):
        return RECOMPUTED
    return PLAIN if torch.compiler.is_compiling() or wants_gradient(*inputs) else BLOCKS


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> str:
    """PLAIN, ROWS and ONE_ROW are torch's own product: of x as it is, of x in two dimensions, and without oneDNN.
    BLOCKS and RECOMPUTED convert the weight to float32, some of its rows at a time."""
    dtype = weight_NK.dtype
    if (
        not weight_NK.is_cpu
        or type(weight_NK) not in _PLAIN_TYPES
        or type(x) not in _PLAIN_TYPES
        or weight_NK.layout is not torch.strided
        or dtype != x.dtype
        or not 0 < weight_NK.shape[-1] == x.shape[-1]  # F.linear says what is wrong
        or torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.is_autocast_enabled("cpu")
    ):
        return PLAIN
    rows = x.shape[:-1].numel()
    if 0 < rows <= few_rows(dtype) and native.serves(x, weight_NK):
        return NATIVE
    slow = is_slow(dtype)
    if slow and rows > 4:
        return RECOMPUTED if wants_gradient(x, weight_NK, bias_N) else BLOCKS
    if rows == 1 and dtype == torch.bfloat16 and not slow and not wants_gradient(x, weight_NK, bias_N):
        return ONE_ROW
    return ROWS


@functools.cache
def few_rows(dtype: torch.dtype) -> int:
    """Up to how many rows native.linear is the fastest."""
    most = 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32
    if dtype == torch.float32:
        return most
    return 0 if dtype != torch.bfloat16 else 4 if multiplies(dtype) else most


def packed_linear(x_RK: Tensor, *packed: Tensor) -> bool:
    """Whether native.c multiplies a few rows by int8 or int4.

    It rounds a bfloat16 input to 16 bits of the largest of each 32, which is below its own rounding; of a float32 input
    it would be above it.
    """
    return x_RK.dtype == torch.bfloat16 and 0 < x_RK.shape[0] <= _PACKED_ROWS and native.serves(x_RK, *packed)


def packed_experts(x_SK: Tensor, q_ENK: Tensor, scale: Tensor, expert_S: Tensor) -> bool:
    """Whether native.c multiplies rows by int8 or int4 of an expert each."""
    few = x_SK.shape[0] <= _PACKED_ROWS * q_ENK.shape[0]
    return x_SK.dtype == torch.bfloat16 and few and native.serves(x_SK, q_ENK, scale, expert_S)


def experts(x_TD: Tensor, up_EFD: Tensor, down_EDF: Tensor, indices_Tk: Tensor, weights_Tk: Tensor) -> bool:
    """Whether native.c runs the routed experts; `transformers`' experts interface otherwise."""
    dtype = x_TD.dtype
    return (
        dtype in _NATIVE
        and dtype == up_EFD.dtype == down_EDF.dtype
        and indices_Tk.numel() <= (_EXPERT_ROWS_SLOW if is_slow(dtype) else _EXPERT_ROWS) * up_EFD.shape[0]
        and x_TD.device.type == "cpu"
        and native.serves(x_TD, up_EFD, down_EDF, weights_Tk)
    )


def attention(q_BALQ: Tensor, k_BKSQ: Tensor, v_BKSQ: Tensor) -> bool:
    """Whether native.c attends: a few queries, heads of a multiple of 16, the rows of keys and values one after the
    other."""
    head_dim = q_BALQ.shape[-1]
    return (
        q_BALQ.dtype in _NATIVE
        and q_BALQ.dtype == k_BKSQ.dtype == v_BKSQ.dtype
        and head_dim % 16 == 0
        and k_BKSQ.shape == v_BKSQ.shape
        and (q_BALQ.shape[0], head_dim) == (k_BKSQ.shape[0], k_BKSQ.shape[3])
        and q_BALQ.shape[1] % k_BKSQ.shape[1] == 0
        and k_BKSQ.stride()[2:] == v_BKSQ.stride()[2:] == (head_dim, 1)
        and type(k_BKSQ) is type(v_BKSQ) is Tensor
        and k_BKSQ.is_cpu
        and native.serves(q_BALQ)
    )


def mamba_step(
    projected: Tensor,
    window_BCW: Tensor,
    state_BHPN: Tensor,
    conv_weight_CK: Tensor,
    conv_bias_C: Tensor | None,
    dt_bias_H: Tensor,
    A_log_H: Tensor,
    D_H: Tensor,
    norm_weight_I: Tensor,
    groups: int,
) -> bool:
    """Whether native.c takes a few tokens through a Mamba-2 mixer: shapes that fit, a state in float32."""
    (batch, heads, head_dim, state_size), (channels, kernel) = state_BHPN.shape, conv_weight_CK.shape
    inner, dtype = heads * head_dim, projected.dtype
    same = (window_BCW, conv_weight_CK, conv_bias_C, norm_weight_I)
    exact = (dt_bias_H, A_log_H, D_H, state_BHPN)
    return (
        dtype in _NATIVE
        and kernel <= native.MOST_TAPS
        and all(t is None or t.dtype == dtype for t in same)
        and all(t.dtype == torch.float32 for t in exact)
        and window_BCW.shape == (projected.shape[0], channels, kernel - 1)
        and projected.shape[0] == batch
        and all(t.shape == (heads,) for t in (A_log_H, dt_bias_H, D_H))
        and heads % groups == 0
        and norm_weight_I.shape[0] == inner
        and channels == inner + 2 * groups * state_size
        and (conv_bias_C is None or conv_bias_C.shape == (channels,))
        and projected.shape[2] == inner + channels + heads
        and not (state_BHPN.requires_grad or window_BCW.requires_grad)  # a backward may need what they hold now
        and native.serves(projected, *same, *exact)
    )


def may_write(*tensors: Tensor) -> bool:
    """Whether a kernel may move these on in place: plain tensors, which no backward may need as they are now."""
    return (
        all(type(t) is Tensor and not t.requires_grad for t in tensors)
        and (torch.is_inference_mode_enabled() or not any(t.is_inference() for t in tensors))
        and torch._C._functorch.peek_interpreter_stack() is None
    )

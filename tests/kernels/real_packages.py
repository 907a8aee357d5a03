"""Import first: mamba-ssm and causal-conv1d as `ops/backends.py` finds them, for a process that is started for it.

Where Triton compiles they are as installed. Where it interprets, and that is what CI runs: mamba-ssm's own Triton
functions, and causal-conv1d's own reference functions in its kernels' place, from the folder that `fetch_packages.py`
filled, on CPU tensors, which are then served as CUDA tensors are.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from nemotron_h.ops import cuda_kernels as backends
from nemotron_h.ops import native

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
CALLS: Counter[str] = Counter()
"""How often each function of the packages was called."""


def _interpret() -> None:
    """What Triton's interpreter lacks for these kernels, put right."""
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    def operand(handle):
        # It holds bfloat16 as the 16 bits that they are, and would multiply those as integers.
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(operand(a), operand(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot

    tuned = triton.autotune

    def autotune(configs, *args, prune_configs_by=None, **kwargs):
        return tuned(configs[:1], *args, **kwargs)  # which is the fastest is asked of a GPU

    triton.autotune = autotune
    torch.cuda.device = lambda *args, **kwargs: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda *args: types.SimpleNamespace(multi_processor_count=1)


def _channel_last(function):
    """causal-conv1d's forward by its reference, refusing what csrc/causal_conv1d.cpp refuses."""

    @functools.wraps(function)
    def call(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, activation=None):
        assert 2 <= weight.shape[1] <= 4 and x.shape[1] % 8 == 0 and x.stride(1) == 1
        assert x.shape[2] == 1 or x.stride(0) % 8 == x.stride(2) % 8 == 0
        assert bias is None or (bias.dtype == weight.dtype and bias.stride(0) == 1)
        assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.is_contiguous())
        return function(x, weight, bias, initial_states, return_final_states, activation=activation, seq_idx=seq_idx)

    return call


def _window(function):
    """The same for its one-token update."""

    @functools.wraps(function)
    def call(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None):
        assert 2 <= weight.shape[1] <= 4 and conv_state.dtype == x.dtype
        assert conv_state.shape[:2] == x.shape[:2] and conv_state.shape[2] >= weight.shape[1] - 1
        assert bias is None or (bias.dtype == weight.dtype and bias.stride(0) == 1)
        return function(x, conv_state, weight, bias, activation)

    return call


def _import() -> None:
    import triton

    # mamba-ssm's own __init__ wants its CUDA extension, causal-conv1d's the module of its.
    package = sys.modules["mamba_ssm"] = types.ModuleType("mamba_ssm")
    package.__path__ = [str(Path(triton.__file__).parents[1] / "mamba_ssm")]
    sys.modules["causal_conv1d_cuda"] = types.ModuleType("causal_conv1d_cuda")
    import causal_conv1d
    from causal_conv1d import causal_conv1d_interface as interface

    causal_conv1d.causal_conv1d_fn = _channel_last(interface.causal_conv1d_ref)
    causal_conv1d.causal_conv1d_update = _window(interface.causal_conv1d_update_ref)


def _count() -> None:
    for kernel in backends._KERNELS.values():
        module = importlib.import_module(kernel.module)

        @functools.wraps(function := getattr(module, kernel.function))
        def counted(*args, _name=kernel.function, _function=function, **kwargs):
            CALLS[_name] += 1
            return _function(*args, **kwargs)

        setattr(module, kernel.function, counted)


if DEVICE == "cpu":
    _interpret()
    _import()
    backends.KERNEL_DEVICES = ("cpu", "cuda")
    native.serves = native.serves_rows = lambda *tensors: False  # as of CUDA tensors
_count()


@contextlib.contextmanager
def torch_only():
    """The same calls in torch."""
    before, backends.KERNEL_DEVICES = backends.KERNEL_DEVICES, ()
    try:
        yield
    finally:
        backends.KERNEL_DEVICES = before

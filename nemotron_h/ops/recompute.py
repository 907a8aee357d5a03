"""Ops that differentiate themselves: the backward keeps the inputs and works the rest out again, a part at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import wants_gradient


def recomputes(*tensors: Tensor | None) -> bool:
    """Whether a gradient is wanted of plain tensors, eagerly. Tracers and functorch differentiate the plain form of an
    op, and so does autograd where a tensor subclass has to see each step."""
    return (
        wants_gradient(*tensors)
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
        and all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
    )

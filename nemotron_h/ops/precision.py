"""Which floating type an op computes in, and how it keeps autocast from changing that."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any of the tensors is float64, else float32: never lower, whatever dtype the model was loaded in."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Under `torch.autocast` a float32 matmul is silently a bfloat16 one, which the SSM state cannot bear."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()

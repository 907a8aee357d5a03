"""The routed experts on a CPU: every expert that was chosen, read once, in one call.

Shape suffixes: T tokens, k chosen experts per token, S = T k, E experts, D width, F inner width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import native
from .linear import multiplies

# Rows an expert up to which native.c is the fastest. Without instructions for bfloat16 the library's grouped products
# run at 20 GFLOP/s, native.c at 100; with them (not measured) theirs should win once weights are read for many rows.
_ROWS = 4
_ROWS_SLOW = 512


def routed_experts(
    x_TD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    act: Callable[[Tensor], Tensor],
    indices_Tk: Tensor,
    weights_Tk: Tensor,
) -> Tensor | None:
    """sum_k weight (down act(up x)) of each token's experts: (T, D) in x's dtype, summed over k in the weights' dtype.

    Returns: None where `transformers`' experts interface is the one to run: another device than a CPU, a gradient,
        tracing, another dtype than float32 and bfloat16, many rows an expert, no C compiler.
    """
    dtype = x_TD.dtype
    if dtype not in (torch.float32, torch.bfloat16) or not dtype == up_EFD.dtype == down_EDF.dtype:
        return None
    slow = dtype == torch.bfloat16 and not multiplies(dtype)
    if indices_Tk.numel() > (_ROWS_SLOW if slow else _ROWS) * len(up_EFD):
        return None
    if x_TD.device.type != "cpu" or not native.serves(x_TD, up_EFD, down_EDF, weights_Tk):
        return None
    k = indices_Tk.shape[1]
    if len(x_TD) == 1:
        expert_S, order_S = indices_Tk[0].contiguous(), None
        x_SD = x_TD.expand(k, -1).contiguous()
    else:
        # Rows of one expert next to each other.
        expert_S, order_S = indices_Tk.flatten().sort(stable=True)
        x_SD = x_TD.index_select(0, order_S // k)
    y_SD = native.linear(act(native.linear(x_SD, up_EFD, experts_M=expert_S)), down_EDF, experts_M=expert_S)
    if order_S is None:
        return torch.mv(y_SD.to(weights_Tk.dtype).T, weights_Tk[0]).to(dtype)[None]
    y_SD = y_SD.to(weights_Tk.dtype).mul_(weights_Tk.flatten()[order_S, None])
    y_TD = torch.zeros(x_TD.shape, dtype=weights_Tk.dtype).index_add_(0, order_S // k, y_SD)
    return y_TD.to(dtype)

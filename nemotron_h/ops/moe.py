"""The router of the family's mixture-of-experts layers, and its experts on a CPU.

Shape suffixes: T tokens, E experts, g expert groups, k chosen experts per token, S = T k, D width, F inner width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import conditions, native
from .conditions import compute_dtype


def router(
    logits_TE: Tensor,
    correction_bias_E: Tensor,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Choose `top_k` experts for each token and weigh them.

    The correction bias takes part in the choice and never in the weight: it balances load without changing what the
    model computes (arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437, equations 12 to 16). A group's score is the sum of
    its two best biased scores; only the `topk_group` best groups are open. A closed group is masked with -inf, not
    with 0: with a negative correction bias an open expert may well score below 0, and a closed one would then be
    chosen.

    Args:
        logits_TE: (T, E), computed in float32 (float64 in a float64 model).
        correction_bias_E: (E,).
        n_group: E must be a multiple of it; 1 means no groups.
        norm_topk_prob: divide the weights by their sum.
        scaling: the weights are multiplied by it at the end.

    Returns: expert indices (T, k) int64 in no particular order, weights (T, k) float32 (float64 for float64).
    """
    dtype = compute_dtype(logits_TE)
    scores_TE = logits_TE.to(dtype).sigmoid()
    # The choice has no gradient, so nothing of it need be kept for the backward.
    choice_TE = scores_TE.detach() + correction_bias_E.detach().to(dtype)
    if n_group > 1 and topk_group < n_group:
        choice_TgE = choice_TE.unflatten(1, (n_group, -1))
        best_two = min(2, choice_TgE.shape[-1])
        group_scores_Tg = choice_TgE.topk(best_two, dim=-1).values.sum(-1)
        open_Tg = torch.zeros_like(group_scores_Tg, dtype=torch.bool)
        open_Tg = open_Tg.scatter(1, group_scores_Tg.topk(topk_group, dim=-1, sorted=False).indices, True)
        choice_TE = choice_TgE.masked_fill(~open_Tg[..., None], -torch.inf).flatten(1)
    indices_Tk = choice_TE.topk(top_k, dim=-1, sorted=False).indices
    weights_Tk = scores_TE.gather(1, indices_Tk)
    if norm_topk_prob:
        weights_Tk = weights_Tk / (weights_Tk.sum(-1, keepdim=True) + 1e-20)
    return indices_Tk, weights_Tk * scaling


def routed_experts(
    x_TD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    act: Callable[[Tensor], Tensor],
    indices_Tk: Tensor,
    weights_Tk: Tensor,
) -> Tensor | None:
    """Every expert that was chosen, read once, in one call.

    sum_k weight (down act(up x)) of each token's experts: (T, D) in x's dtype, summed over k in the weights' dtype.

    Returns: None where `transformers`' experts interface is the one to run: another device than a CPU, a gradient,
        tracing, another dtype than float32 and bfloat16, many rows an expert, no C compiler.
    """
    if not conditions.experts(x_TD, up_EFD, down_EDF, indices_Tk, weights_Tk):
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
        return torch.mv(y_SD.to(weights_Tk.dtype).T, weights_Tk[0]).to(x_TD.dtype)[None]
    y_SD = y_SD.to(weights_Tk.dtype).mul_(weights_Tk.flatten()[order_S, None])
    y_TD = torch.zeros(x_TD.shape, dtype=weights_Tk.dtype).index_add_(0, order_S // k, y_SD)
    return y_TD.to(x_TD.dtype)

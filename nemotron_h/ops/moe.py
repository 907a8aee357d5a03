"""The router of the family's mixture-of-experts layers.

Shape suffixes: T tokens, E experts, g expert groups, k chosen experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import compute_dtype


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

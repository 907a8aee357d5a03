"""Packing: several documents in one row, told apart by an integer per position.

Shape suffixes: B batch, L length.
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_index(seq_idx_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
    """Number the documents of each row 0, 1, 2, ...: a document starts where `seq_idx` changes.

    The values of `seq_idx` need not grow, and one that comes back later is a new document. A pad position (mask 0)
    belongs to the document before it, or to the first one if nothing precedes it, whatever its own `seq_idx` says.
    Idempotent.

    Returns: (B, L) int64, non-decreasing along a row, 0 at position 0.
    """
    seq_idx_BL = seq_idx_BL.long()
    if mask_BL is not None:
        valid_BL = mask_BL.bool()
        here_L = torch.arange(seq_idx_BL.shape[1], device=seq_idx_BL.device)
        last_valid_BL = torch.where(valid_BL, here_L, -1).cummax(dim=1).values
        first_valid_B1 = valid_BL.long().argmax(dim=1, keepdim=True)
        seq_idx_BL = seq_idx_BL.gather(1, torch.where(last_valid_BL < 0, first_valid_B1, last_valid_BL))
    starts_BL = torch.zeros_like(seq_idx_BL)
    starts_BL[:, 1:] = seq_idx_BL[:, 1:] != seq_idx_BL[:, :-1]
    return starts_BL.cumsum(dim=1)

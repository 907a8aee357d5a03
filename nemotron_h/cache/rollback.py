"""Going back: the last few tokens' inputs beside the state before them, and the state made of them again.

A recurrent state cannot be cut. A copy of it for every token would cost H P N numbers each; the inputs cost C + H.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Replay = Callable[[Tensor, "Tensor | None", "Tensor | None", "Tensor | None"], tuple[Tensor, Tensor]]
"""(inputs_BLK, mask_BL, window_BCW, state_BHPN) -> the window and the state after those inputs."""

ROLLBACK = 64
"""Tokens that a Mamba layer can take back while it records, where they came in one step."""

DRAFT = 32
"""Tokens that it can take back where they came one by one."""


_TENSORS = ("window_BCW", "state_BHPN", "inputs_BLK", "mask_BL")


class Record:
    """The state before the last few tokens, and what in_proj made of each: C + H numbers a token, where a state has
    H P N. Layers copied from each other share tensors, none of which is ever written into.

    `replay` is the mixer's: the calls that made the state, hooks and adapters included, make it again. It is shared by
    copies too, which are of what was seen and not of a model.
    """

    def __init__(self, window_BCW: Tensor | None, state_BHPN: Tensor | None):
        self.window_BCW, self.state_BHPN = window_BCW, state_BHPN
        self.inputs_BLK: Tensor | None = None
        self.mask_BL: Tensor | None = None
        self._replay: Replay | None = None

    @property
    def length(self) -> int:
        return 0 if self.inputs_BLK is None else self.inputs_BLK.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for name in _TENSORS if (tensor := getattr(self, name)) is not None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Record:
        new = copy.copy(self)
        for name in _TENSORS:
            setattr(new, name, copy.deepcopy(getattr(self, name), memo))
        return new

    def add(self, replay: Replay, inputs_BLK: Tensor, mask_BL: Tensor | None = None) -> None:
        """Take the raw inputs (B, L, C + H) of tokens, a tensor of their own; `replay` makes a state of them."""
        before = self.inputs_BLK
        if mask_BL is not None or self.mask_BL is not None:
            new = mask_BL.bool() if mask_BL is not None else inputs_BLK.new_ones(inputs_BLK.shape[:2], dtype=torch.bool)
            old = self.mask_BL
            if old is None and before is not None:
                old = new.new_ones(before.shape[:2])
            self.mask_BL = new if old is None else torch.cat([old, new], dim=1)
        self.inputs_BLK = inputs_BLK if before is None else torch.cat([before, inputs_BLK], dim=1)
        self._replay = replay

    def _after(self, length: int) -> tuple[Tensor | None, Tensor | None]:
        """The window and the state after the first `length` recorded tokens, in tensors of their own."""
        assert self.inputs_BLK is not None
        if length == 0:
            return tuple(None if t is None else t.clone() for t in (self.window_BCW, self.state_BHPN))  # type: ignore[return-value]
        assert self._replay is not None
        mask_BL = None if self.mask_BL is None else self.mask_BL[:, :length]
        return self._replay(
            self.inputs_BLK[:, :length],
            mask_BL,
            *(None if t is None else t.clone() for t in (self.window_BCW, self.state_BHPN)),
        )

    def _keep(self, where: slice) -> None:
        assert self.inputs_BLK is not None
        self.inputs_BLK = self.inputs_BLK[:, where].clone()
        self.mask_BL = None if self.mask_BL is None else self.mask_BL[:, where].clone()

    def advance(self, length: int) -> None:
        """Let the first `length` tokens be part of the state for good."""
        self.window_BCW, self.state_BHPN = self._after(length)
        self._keep(slice(length, None))

    def without_last(self, number: int) -> tuple[Tensor | None, Tensor | None]:
        """The window and the state before the last tokens, which are recorded no longer."""
        self._keep(slice(None, self.length - number))
        return self._after(self.length)

    def map_rows(self, rows: Any) -> None:
        for name in _TENSORS:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, rows(tensor))


def check_sign(tokens_to_remove: int) -> None:
    if tokens_to_remove > 0:
        raise ValueError(f"crop({tokens_to_remove}): pass the tokens to forget as a negative number.")

"""Whether two recordings of a text are of the same function: layer by layer, and token by token.

Both are compared in what both have. A recording of the start or the end of the other's text, as an engine answers, is
laid against the log-probabilities of its tokens; whole tensors are compared on the same tokens alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .recording import HIDDEN, Recording, label, order


@dataclass(frozen=True)
class Row:
    """A tensor that both have. `differences_L` has the largest of each position, over the reference's largest finite
    magnitude `scale`; NaN on one side alone is an infinite difference, and so is an infinity."""

    name: str
    label: str
    differences_L: Tensor
    scale: float

    @property
    def difference(self) -> float:
        """The largest of all positions."""
        return self.differences_L.max().item()

    def position(self, tolerance: float) -> int:
        """The first that differs by more."""
        return int((~(self.differences_L <= tolerance)).nonzero()[0])


@dataclass(frozen=True)
class Token:
    """Two log-probabilities of the token at a position of the longer text."""

    position: int
    token: str | None
    reference: float | None
    other: float | None


@dataclass(frozen=True)
class Tokens:
    """Log-probabilities, over the `compared` positions that both have; differences are absolute, in nats.

    `k3` is the mean of r - 1 - ln r with r = exp(other - reference): the estimate of the Kullback-Leibler divergence
    that GRPO trainers log.
    """

    compared: int = 0
    mean: float = 0.0
    max: float = 0.0
    k3: float = 0.0
    first_token: Token | None = None
    """The first that differs by more than the tolerance."""


@dataclass(frozen=True)
class Comparison:
    rows: tuple[Row, ...]
    """In the model's order."""
    tokens: Tokens
    same_best_token: float | None
    """How often both like the same next token best; None without logits."""
    tolerance: float

    @property
    def first_row(self) -> Row | None:
        """The first, in the model's order, that differs by more than the tolerance."""
        return next((row for row in self.rows if not row.difference <= self.tolerance), None)

    @property
    def same(self) -> bool:
        return self.first_row is None and self.tokens.first_token is None


def compare(reference: Recording, other: Recording, tolerance: float = 0.0) -> Comparison:
    """What both recordings have.

    Args:
        tolerance: in nats for log-probabilities; for tensors, over the reference's largest magnitude.

    Raises:
        ValueError: recorded of different tokens, or nothing in common.
    """
    tokens = _tokens(reference, other, tolerance)
    ours, theirs = _comparable(reference, other)
    names = [name for name in ours if name in theirs]
    if whole := [name for name in names if order(name) is not None]:
        if reference.ids != other.ids:
            raise ValueError(
                f"{reference.source} and {other.source} are of different tokens ({len(reference.logprobs)} and "
                f"{len(other.logprobs)}): record both of the same."
            )
        names = sorted(whole, key=lambda name: (order(name) or 0.0, name == "logits"))
    if not names and not tokens.compared:
        raise ValueError(
            f"{reference.source} and {other.source} have no tensor in common and no position that has a "
            "log-probability in both: record the same of the same text."
        )
    kinds = reference.kinds or other.kinds
    same = None
    head = next((name for name in ("logits", "log_probs") if name in names), None)
    if head and ours[head].shape == theirs[head].shape:
        same = (ours[head].argmax(-1) == theirs[head].argmax(-1)).double().mean().item()
    return Comparison(tuple(_row(name, ours[name], theirs[name], kinds) for name in names), tokens, same, tolerance)


def _comparable(a: Recording, b: Recording) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Their tensors; where one has logits and the other log-probabilities, both as the latter."""
    mine, other = dict(a.tensors), dict(b.tensors)
    if ("logits" in mine) != ("logits" in other):
        for tensors in (mine, other):
            if "logits" in tensors:
                tensors["log_probs"] = tensors.pop("logits").double().log_softmax(-1)
    return mine, other


def _row(name: str, reference: Tensor, other: Tensor, kinds: Sequence[str]) -> Row:
    words = {"norm_f": "last norm", "log_probs": "log-probabilities"}.get(name, name)
    if match := HIDDEN.fullmatch(name):
        words = label(int(match[1]), kinds)
    if order(name) is None:  # of digests, the positions from the start that both have
        reference, other = reference[: len(other)], other[: len(reference)]
    finite = reference[reference.isfinite()].double().abs()
    scale = finite.max().item() if finite.numel() else 0.0
    if reference.shape != other.shape:
        shapes = f"{words}, {list(reference.shape)} and {list(other.shape)}"
        return Row(name, shapes, torch.full((1,), math.inf), scale)
    differences = _differences(reference, other)
    relative = differences / scale if scale else differences.masked_fill(differences > 0, math.inf)
    return Row(name, words, relative.flatten(1).amax(1) if relative.ndim > 1 else relative, scale)


def _differences(a: Tensor, b: Tensor) -> Tensor:
    """Absolute, in float64; NaN on one side alone is an infinite difference, and so is one infinity."""
    equal = (a == b) | (a.isnan() & b.isnan())
    return (a.double() - b.double()).abs().nan_to_num(math.inf, posinf=math.inf).masked_fill(equal, 0.0)


def _tokens(reference: Recording, other: Recording, tolerance: float) -> Tokens:
    """The log-probabilities of both, on the positions that both have."""
    n, m = len(reference.logprobs), len(other.logprobs)
    start = _start(reference, other) if n >= m else _start(other, reference)
    shift_a, shift_b = (start, 0) if n >= m else (0, start)
    at, a, b = _both(reference.logprobs[shift_a:], other.logprobs[shift_b:])
    if not at:
        return Tokens()
    differences = _differences(a, b)
    log_ratio = b - a
    k3 = (log_ratio.expm1() - log_ratio).nan_to_num(math.inf, posinf=math.inf).masked_fill(differences == 0, 0.0)
    first = None
    if (above := (~(differences <= tolerance)).nonzero()).numel():
        index = int(above[0])
        position = at[index]
        named, shift = (reference.tokens, shift_a) if reference.tokens else (other.tokens, shift_b)
        token = named[position + shift] if named else None
        first = Token(position + start, token, a[index].item(), b[index].item())
    return Tokens(len(at), differences.mean().item(), differences.max().item(), k3.mean().item(), first)


def _both(a: Sequence[float | None], b: Sequence[float | None]) -> tuple[list[int], Tensor, Tensor]:
    """The positions at which both have a number, and the two numbers, as far as the shorter one goes."""
    found = [(at, x, y) for at, (x, y) in enumerate(zip(a, b, strict=False)) if x is not None and y is not None]
    numbers = torch.tensor([pair[1:] for pair in found], dtype=torch.float64).reshape(-1, 2)
    return [at for at, _, _ in found], numbers[:, 0], numbers[:, 1]


def _start(long: Recording, short: Recording) -> int:
    """Where in the longer text the shorter one begins; where its tokens fit at both ends, the closer numbers decide."""
    n, m = len(long.logprobs), len(short.logprobs)
    if long.ids is None or short.ids is None:
        return n - m  # an engine's answer, without ids: the end of the text, or all of it
    fits = []
    for start in dict.fromkeys((0, n - m)):
        pairs = enumerate(zip(long.ids[start:], short.ids, strict=False))
        # A negative id is one that is not said.
        parting = next((at for at, (a, b) in pairs if a != b and min(a, b) >= 0), None)
        if parting is None:
            fits.append(start)
    if fits and short.logprobs[0] is None:  # as of a text's first token alone
        return fits[0]
    if fits:
        return min(fits, key=lambda start: _distance(long.logprobs[start:], short.logprobs))
    if n != m:
        raise ValueError(
            f"{short.source} has {m} tokens that are neither the start nor the end of the {n} of {long.source}; record "
            "the same text with the same tokenizer."
        )
    raise ValueError(
        f"{long.source} and {short.source} are of different tokens (at position {parting}, {long.ids[parting or 0]} "
        f"and {short.ids[parting or 0]}); record the same text with the same tokenizer."
    )


def _distance(ours: Sequence[float | None], theirs: Sequence[float | None]) -> tuple[float, float]:
    """The share of differences that are infinite, and the mean of the others."""
    _, a, b = _both(ours, theirs)
    differences = _differences(a, b)
    finite = differences[differences.isfinite()]
    if not len(differences):
        return math.inf, math.inf
    return 1 - len(finite) / len(differences), finite.sum().item() / max(1, len(finite))

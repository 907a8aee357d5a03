"""A cache's state as a value: what each layer holds after some tokens; several joined into a batch, a batch split.

A recurrent state cannot be cut, so going back to an earlier point of a text takes a copy of the state there. For a
Mamba layer it has the same size after any number of tokens; keys and values are shared with the cache, not copied.

B batch, C convolution channels, W window, H Mamba heads, P head dim, N state size, K key heads, Q key dim, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[Tensor, Tensor]
Shape = tuple[int, ...]

NAMES = {"mamba": ("window", "state"), "attention": ("keys", "values")}
# What of a config their shapes are made of.
SIZES = {
    "mamba": ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel"),
    "attention": ("num_key_value_heads", "head_dim"),
}
LETTERS = {"mamba": "M", "attention": "*", "mlp": "-", "moe": "E"}


@dataclass(frozen=True)
class Snapshot:
    """A cache's tensors after `length` tokens: for each layer (window BCW, state BHPN), (keys BKLQ, values BKLQ) or
    None. Nothing writes into them. Tokens recorded for taking back are not part of it."""

    kinds: tuple[str, ...]
    length: int
    layers: tuple[Pair | None, ...]

    def tensors(self) -> Iterator[Tensor]:
        for pair in self.layers:
            yield from pair or ()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def apart(self) -> Snapshot:
        """The same in tensors of its own: keys and values of a cache lie in buffers that are larger, and go on."""
        layers = tuple(pair and (pair[0].clone(), pair[1].clone()) for pair in self.layers)
        return Snapshot(self.kinds, self.length, layers)

    @property
    def batch_size(self) -> int:
        """Rows, or -1 in the snapshot of an empty cache."""
        return next((tensor.shape[0] for tensor in self.tensors()), -1)


@torch.no_grad()
def join(
    snapshots: Sequence[Snapshot], attention_masks: Sequence[Tensor | None] | None = None
) -> tuple[Snapshot, Tensor]:
    """The sequences of all in one batch, in order, and the (B, L) attention mask of what it has seen.

    A shorter one gets columns on its left: zeros for keys and values, which the mask hides, and nothing for Mamba
    layers, whose state has no columns. This is what a left-padded batch leaves behind.

    Args:
        attention_masks: for a snapshot whose rows are padded already, its (rows, length) mask; None for no padding.

    Raises:
        ValueError: no cache, an empty one, another pattern, dtype, device or size among them, or a mask of another
            shape.
    """
    if not snapshots:
        raise ValueError("There are no caches to join: pass at least one.")
    given = list(attention_masks) if attention_masks is not None else [None] * len(snapshots)
    if len(given) != len(snapshots):
        raise ValueError(
            f"There are {len(given)} attention masks for {len(snapshots)} caches: pass one (or None) for each."
        )
    first, length = snapshots[0], max(snapshot.length for snapshot in snapshots)
    masks = []
    for number, (snapshot, mask) in enumerate(zip(snapshots, given, strict=True)):
        _check_joins(number, snapshot, first)
        shape = snapshot.batch_size, snapshot.length
        if mask is not None and tuple(mask.shape) != shape:
            raise ValueError(f"The attention mask of cache {number} is {tuple(mask.shape)} and its rows are {shape}.")
        device = next(snapshot.tensors()).device
        mask = torch.ones(shape, dtype=torch.int64, device=device) if mask is None else mask.to(device, torch.int64)
        masks.append(F.pad(mask, (length - snapshot.length, 0)))
    layers: list[Pair | None] = []
    for index, kind in enumerate(first.kinds):
        pairs = [(snapshot.layers[index], length - snapshot.length) for snapshot in snapshots]
        if pairs[0][0] is None:
            layers.append(None)
        else:
            window, state = (
                torch.cat([_padded(pair[which], kind, left) for pair, left in pairs if pair]) for which in (0, 1)
            )
            layers.append((window, state))
    return Snapshot(first.kinds, length, tuple(layers)), torch.cat(masks)


def _check_joins(number: int, snapshot: Snapshot, first: Snapshot) -> None:
    if snapshot.kinds != first.kinds:
        raise ValueError(f"Cache {number} is of another pattern than cache 0: join caches of one model.")
    if snapshot.length == 0:
        raise ValueError(f"Cache {number} is empty: join caches that have seen tokens.")
    for ours, theirs in zip(first.tensors(), snapshot.tensors(), strict=True):
        if (ours.dtype, ours.device) != (theirs.dtype, theirs.device):
            raise ValueError(
                f"Cache {number} has {theirs.dtype} tensors on {theirs.device} where cache 0 has {ours.dtype} on "
                f"{ours.device}: join caches of one model."
            )
    for index, kind in enumerate(first.kinds):
        here, there = (_row(each.layers[index], kind) for each in (first, snapshot))
        if here != there:
            raise ValueError(
                f"A row of layer {index} is {there} in cache {number} and {here} in cache 0: join caches of one model."
            )


def _row(pair: Pair | None, kind: str) -> list[tuple[int, ...]]:
    """The sizes that rows of one batch have in common."""
    shapes = [tuple(tensor.shape[1:]) for tensor in pair or ()]
    return [(shape[0], shape[-1]) for shape in shapes] if kind == "attention" else shapes


def _padded(tensor: Tensor, kind: str, left: int) -> Tensor:
    return F.pad(tensor, (0, 0, left, 0)) if kind == "attention" and left else tensor


@torch.no_grad()
def split(
    snapshot: Snapshot, sizes: Sequence[int] | None = None, attention_mask: Tensor | None = None
) -> list[Snapshot]:
    """Snapshots of `sizes` rows each (one each unless given), in order, in tensors of their own.

    With the (B, L) mask of what was seen, columns on the left that are padding in all rows of a part are cut
    off it, so that a row is what it would be alone. A part of several rows still needs its mask: the last columns,
    as many as it is long, of its rows of the mask.

    Raises:
        ValueError: an empty snapshot, sizes that are not its rows, or a mask of another shape.
    """
    rows, length = snapshot.batch_size, snapshot.length
    if length == 0:
        raise ValueError("The cache is empty: it has no rows to take apart.")
    sizes = [1] * rows if sizes is None else list(sizes)
    if sum(sizes) != rows or min(sizes) < 1:
        raise ValueError(f"The sizes {sizes} do not add up to the cache's {rows} rows, each at least 1.")
    if attention_mask is not None and tuple(attention_mask.shape) != (rows, length):
        raise ValueError(f"The attention mask is {tuple(attention_mask.shape)} and the cache {(rows, length)}.")
    parts, start = [], 0
    for size in sizes:
        here = slice(start, start + size)
        left = 0
        if attention_mask is not None:
            seen = attention_mask[here].bool().any(0)
            left = int(seen.int().argmax()) if bool(seen.any()) else 0
        layers: list[Pair | None] = []
        for kind, pair in zip(snapshot.kinds, snapshot.layers, strict=True):
            if pair is None:
                layers.append(None)
                continue
            a, b = (tensor[here, :, left:] if kind == "attention" else tensor[here] for tensor in pair)
            layers.append((a.clone(), b.clone()))
        parts.append(Snapshot(snapshot.kinds, length - left, tuple(layers)))
        start += size
    return parts


# ---- which sizes


def named(snapshot: Snapshot) -> dict[str, Tensor]:
    return {
        f"layers.{index}.{name}": tensor
        for index, (kind, pair) in enumerate(zip(snapshot.kinds, snapshot.layers, strict=True))
        if pair is not None
        for name, tensor in zip(NAMES[kind], pair, strict=True)
    }


def misfit(shapes: Mapping[str, Shape], config: Any, rows: int, length: int) -> str:
    """The first tensor whose shape is not what the config says, or ""."""
    # A layer that is split over processes holds a part of the heads, of which the config says nothing.
    split = torch.distributed.is_available() and torch.distributed.is_initialized()
    for index, kind in enumerate(config.layers_block_type):
        for name, size in _shapes(kind, config, length).items():
            found, wanted = shapes.get(f"layers.{index}.{name}"), (rows, *size)
            if found is None:
                continue
            if split and len(found) > 1:
                wanted = (rows, found[1], *size[1:])
            if found != wanted:
                return f"{name} of layer {index} is {found} and would be {wanted}"
    return ""


def _shapes(kind: str, config: Any, length: int) -> dict[str, Shape]:
    """Of a layer's tensors, without the rows."""
    if kind == "mamba":
        heads, width, state = config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size
        channels = heads * width + 2 * config.n_groups * state
        return {"window": (channels, config.conv_kernel - 1), "state": (heads, width, state)}
    if kind == "attention":
        size = config.num_key_value_heads, length, config.head_dim
        return {"keys": size, "values": size}
    return {}


def pattern(kinds: Sequence[str]) -> str:
    return "".join(LETTERS.get(kind, "?") for kind in kinds)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

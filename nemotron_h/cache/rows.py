"""Rows of caches: several joined into one batch, whatever their lengths, and taken apart again.

A shorter row gets columns on its left: zeros for keys and values, which the attention mask hides, and nothing for Mamba
layers, whose state has no columns. This is what a left-padded batch leaves behind.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .files import Pair, Snapshot, put, take
from .hybrid import NemotronHCache


@torch.no_grad()
def concat(
    caches: Sequence[NemotronHCache], attention_masks: Sequence[Tensor | None] | None = None
) -> tuple[NemotronHCache, Tensor]:
    """One growing cache with the rows of all, in order, and the (B, L) attention mask of what it has seen.

    Going on wants the mask with a column for each new token: `torch.cat([mask, mask.new_ones(B, new)], dim=1)`. Caches
    of static buffers are joined into one that grows; what is recorded is left behind.

    Args:
        attention_masks: for a cache whose rows are padded already, its (rows, length) mask; None for no padding.

    Raises:
        ValueError: no cache, an empty one, another pattern, dtype, device or size among them, or a mask of another
            shape.
    """
    if not caches:
        raise ValueError("There are no caches to join: pass at least one.")
    snapshots = [take(cache) for cache in caches]
    given = list(attention_masks) if attention_masks is not None else [None] * len(caches)
    if len(given) != len(caches):
        raise ValueError(
            f"There are {len(given)} attention masks for {len(caches)} caches: pass one (or None) for each."
        )
    first, length = snapshots[0], max(snapshot.length for snapshot in snapshots)
    masks = []
    for number, (snapshot, mask) in enumerate(zip(snapshots, given, strict=True)):
        if snapshot.kinds != first.kinds:
            raise ValueError(f"Cache {number} is of another pattern than cache 0: join caches of one model.")
        if snapshot.length == 0:
            raise ValueError(f"Cache {number} is empty: join caches that have seen tokens.")
        shape = snapshot.batch_size, snapshot.length
        if mask is not None and tuple(mask.shape) != shape:
            raise ValueError(f"The attention mask of cache {number} is {tuple(mask.shape)} and its rows are {shape}.")
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
                    f"A row of layer {index} is {there} in cache {number} and {here} in cache 0: join caches of one "
                    "model."
                )
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
    joined = caches[0].like()
    put(joined, Snapshot(first.kinds, length, tuple(layers)))
    return joined, torch.cat(masks)


def _row(pair: Pair | None, kind: str) -> list[tuple[int, ...]]:
    """The sizes that rows of one batch have in common."""
    shapes = [tuple(tensor.shape[1:]) for tensor in pair or ()]
    return [(shape[0], shape[-1]) for shape in shapes] if kind == "attention" else shapes


def _padded(tensor: Tensor, kind: str, left: int) -> Tensor:
    return F.pad(tensor, (0, 0, left, 0)) if kind == "attention" and left else tensor


@torch.no_grad()
def split(
    cache: NemotronHCache, sizes: Sequence[int] | None = None, attention_mask: Tensor | None = None
) -> list[NemotronHCache]:
    """Growing caches of `sizes` rows each (one each unless given), in order.

    With the (B, L) mask of what the cache has seen, columns on the left that are padding in all rows of a part are cut
    off it, so that a row is what it would be alone. A part of several rows still needs its mask: the last columns,
    as many as it is long, of its rows of the mask.

    Raises:
        ValueError: an empty cache, sizes that are not its rows, or a mask of another shape.
    """
    snapshot = take(cache)
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
        part = cache.like()
        put(part, Snapshot(snapshot.kinds, length - left, tuple(layers)))
        parts.append(part)
        start += size
    return parts


__all__ = ["concat", "split"]

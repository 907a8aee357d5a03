"""The hybrid cache: keys and values for attention layers, (convolution window, SSM state) for Mamba layers, nothing
for MLP and MoE layers, behind `transformers`' `Cache`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from ..configuration import NemotronHConfig
from . import files, snapshot
from .fingerprint import config_of, origin
from .layers import EmptyLayer, FixedLayer, GrowingLayer, MambaLayer, rows_of
from .quantized import check_rows
from .quantized import new_layer as new_quantized_layer
from .rollback import check_sign
from .snapshot import SIZES, Snapshot


class Uninterrupted:
    """A context in which a cache is between two states. Left by an exception (Ctrl-C, no memory), some of its layers
    may have gone on and others not: `check_whole` refuses it from there on.

    Args:
        cache: or None, where there is none.
        doing: what is going on inside, for the error.
        if_moved: only where the cache has seen tokens since.
    """

    def __init__(self, cache: Any, doing: str, if_moved: bool = False):
        self.cache, self.doing = cache, doing
        self.before = int(cache_length(cache)) if if_moved else None

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None or self.cache is None:
            return
        if self.before is None or self.before != int(cache_length(self.cache)):
            self.cache.interrupted = f"{self.doing} by {kind.__name__}"


def check_whole(cache: Any) -> None:
    """Raises `RuntimeError` for a cache that a call was interrupted in."""
    if interrupted := getattr(cache, "interrupted", None):
        raise RuntimeError(
            f"The cache was left in the middle of {interrupted}, so its layers may have seen different numbers of "
            "tokens: reset() it, restore() a snapshot into it, or begin with a new one."
        )


class NemotronHCache(Cache):
    """Cache of a Nemotron-H model; `generate()` and the model make one themselves.

    Args:
        config: which layers there are, and the SSM state's dtype (`mamba_ssm_cache_dtype`).
        max_cache_len: with it the cache is static: keys and values for that many tokens are allocated at the first
            update, and nothing moves afterwards (`torch.compile`, CUDA graphs). Without it, it grows.
        offloading: keep keys and values on the CPU between uses; without an accelerator that is where they are.
        quantized: keep keys and values in few bits, in `transformers`' quantised layers: its `cache_config`, as
            {"backend": "hqq", "nbits": 4}. Mamba states stay as they are.
    """

    interrupted: str | None = None
    """The call that an exception left the cache in the middle of, if any; `reset` and `restore` make it whole again."""

    padding_BP: torch.Tensor | None = None
    """Which of the first P tokens seen were padding, true there; None: none of them."""

    padding_is_known = True
    """False after `restore` and `load`: a snapshot does not say."""

    def __init__(
        self,
        config: NemotronHConfig,
        max_cache_len: int | None = None,
        offloading: bool = False,
        quantized: Mapping[str, Any] | None = None,
    ):
        if quantized is not None and max_cache_len is not None:
            raise ValueError(f"A quantised cache grows, and max_cache_len is {max_cache_len}: leave one of them out.")
        self.kinds = config.layers_block_type
        self.config, self.is_static = config, max_cache_len is not None
        super().__init__(
            layers=[_new_layer(kind, config, max_cache_len, quantized) for kind in config.layers_block_type],
            offloading=offloading and torch.accelerator.is_available(),
        )

    @classmethod
    def adopt(cls, cache: Cache, config: NemotronHConfig) -> Cache:
        """Give the Mamba layers of a cache that `transformers` made (`DynamicCache(config=...)`) the class they need.

        The cache is changed in place and returned; keys and values stay as they are.

        Raises:
            ValueError: the cache already holds another implementation's Mamba states, or keys without a state.
            RuntimeError: a call was interrupted in it.
        """
        check_whole(cache)
        if isinstance(cache, cls):
            if cache.config is config:
                return cache
            if cache.kinds != config.layers_block_type:
                raise ValueError(
                    f"The cache was made for the {len(cache.kinds)} layers of another pattern: pass "
                    "NemotronHCache(model.config)."
                )
            for name in (*SIZES["mamba"], *SIZES["attention"]):
                if getattr(cache.config, name) != getattr(config, name):
                    raise ValueError(
                        f"The cache was made for a model with {name}={getattr(cache.config, name)}, and this one "
                        f"has {getattr(config, name)}: pass NemotronHCache(model.config)."
                    )
            cache.config = config
            return cache
        if not isinstance(cache, Cache):
            raise ValueError(
                f"The cache is a {type(cache).__name__}, not a transformers Cache: pass NemotronHCache(model.config)."
            )
        layers = cache.layers
        for idx, kind in enumerate(config.layers_block_type):
            layer = layers[idx] if idx < len(layers) else None
            if kind == "mamba" and not isinstance(layer, MambaLayer):
                if layer is not None and any(getattr(layer, "has_previous_state", {}).values()):
                    raise ValueError(
                        f"Layer {idx} of the given {type(cache).__name__} holds Mamba states of another "
                        "implementation: start from an empty cache."
                    )
                seen = max((one.get_seq_length() for one in layers if isinstance(one, DynamicLayer)), default=0)
                if seen:
                    raise ValueError(
                        f"The given {type(cache).__name__} has keys of {seen} tokens that layer {idx}, a Mamba layer, "
                        "has no state of, as prefix tuning makes it: start from an empty cache."
                    )
                static = getattr(cache, "is_compileable", False) and len(layers) == len(config.layers_block_type)
                layer = _new_layer(kind, config, 0 if static else None)
            elif layer is None or kind in ("mlp", "moe"):  # before 5.24 those got a layer that cannot go back
                layer = _new_layer(kind, config, None)
            if idx < len(layers):
                layers[idx] = layer
            else:
                layers.append(layer)
        return cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far (padding counted); every layer has seen the same, so any index gives the same answer."""
        return cache_length(self)  # type: ignore[return-value]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        layer = _length_layer(self)
        if isinstance(layer, CacheLayerMixin):
            return layer.get_mask_sizes(query_length)
        return int(self.get_seq_length()) + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; refused, with nothing changed, where a Mamba layer cannot."""
        check_sign(tokens_to_remove)
        check_whole(self)
        for layer in self.layers:
            if isinstance(layer, MambaLayer):
                layer.check_crop(tokens_to_remove)
        with Uninterrupted(self, "crop()"):
            super().crop(tokens_to_remove)
            if self.padding_BP is not None:
                self.padding_BP = self.padding_BP[:, : int(self.get_seq_length())]

    def reset(self) -> None:
        """Hold nothing, whatever happened before."""
        self.interrupted = "reset()"
        super().reset()
        self.interrupted, self.padding_BP, self.padding_is_known = None, None, True

    @property
    def is_linear(self) -> list[bool]:
        """As the library has it, but False for all of a cache of nothing else: it takes such a cache not to know its
        length, and would show the model a whole prompt where only the rest is new."""
        linear = [isinstance(layer, MambaLayer) for layer in self.layers]
        return [False] * len(linear) if all(linear) else linear

    @torch.no_grad()
    def snapshot(self) -> Snapshot:
        """What the cache holds now, for `restore`. Costs a copy of the Mamba states and of static keys and values;
        those that grow are shared.

        Recorded tokens are not part of it: after `restore`, nothing before that point can be taken back.

        Raises:
            ValueError: a layer keeps its keys and values in a form that cannot be taken out, such as quantised ones.
            RuntimeError: a call was interrupted in the cache.
        """
        check_whole(self)
        length = int(self.get_seq_length())
        return Snapshot(tuple(self.kinds), length, tuple(layer.held(length) for layer in self.layers))

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Hold what the snapshot holds, whatever was here; it may be restored any number of times, into any cache of
        the pattern, static or growing. A static cache keeps its tensors where they are.

        Raises:
            ValueError: another pattern, other sizes than the cache's config has, too many tokens for a static cache,
                other rows than its buffers have, or another dtype of the SSM state; nothing has changed then.
        """
        self._check_fits(snapshot)
        self.interrupted = "restore()"
        for layer, pair in zip(self.layers, snapshot.layers, strict=True):
            layer.hold(pair, snapshot.length)
        self.interrupted, self.padding_BP, self.padding_is_known = None, None, False

    def _check_fits(self, given: Snapshot) -> None:
        if tuple(self.kinds) != given.kinds:
            raise ValueError(
                f"The snapshot is of a model with the pattern {snapshot.pattern(given.kinds)} and the cache is of one "
                f"with {snapshot.pattern(self.kinds)}: restore it into a cache of its own model."
            )
        shapes = {name: tuple(tensor.shape) for name, tensor in snapshot.named(given).items()}
        if wrong := snapshot.misfit(shapes, self.config, given.batch_size, given.length):
            raise ValueError(f"The snapshot's {wrong} in the cache's config: restore it into a cache of its own model.")
        for layer, pair in zip(self.layers, given.layers, strict=True):
            layer.check_hold(pair, given.length)

    def save(self, path: str | Path, *, model: Any, token_ids: Any = None, keep_ids: bool = False) -> None:
        """Write what the cache holds to a safetensors file, atomically.

        Args:
            model: whose cache it is, or its config (then any weights may load it).
            token_ids: (B, L) the tokens it has seen, or (L,) of one row; their number is checked, and a digest of them
                kept.
            keep_ids: write the ids themselves too.

        Raises:
            ValueError: the cache is empty or of another model, or has seen another number of tokens.
        """
        files.write(self.snapshot(), path, origin=origin(model), token_ids=token_ids, keep_ids=keep_ids)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: Any,
        *,
        token_ids: Any = None,
        max_cache_len: int | None = None,
        offloading: bool = False,
    ) -> NemotronHCache:
        """A new cache with what a file holds, on the model's devices; going on from it is going on from the saved one.

        Nothing before this point can be taken back: recorded tokens are not saved.

        Args:
            model: the model, or its config (then the weights and the dtype are not checked, and the tensors are on the
                CPU).
            token_ids: the tokens that the file should be the state after; checked where the file knows them.
            max_cache_len: make the cache static, with space for so many tokens.

        Raises:
            ValueError: in one sentence, a file that is cut or no saved cache, of another format version, model, dtype
                or text.
            FileNotFoundError: there is no such file.
        """
        found = files.read(path, model, token_ids=token_ids)
        cache = NemotronHCache(config_of(model)[0], max_cache_len=max_cache_len, offloading=offloading)
        cache.restore(found)
        return cache

    @classmethod
    def concat(
        cls, caches: Sequence[NemotronHCache], attention_masks: Sequence[torch.Tensor | None] | None = None
    ) -> tuple[NemotronHCache, torch.Tensor]:
        """One growing cache with the sequences of all, in order, shorter ones padded on the left, and the (B, L)
        attention mask of what it has seen.

        Going on wants the mask with a column for each new token: `torch.cat([mask, mask.new_ones(B, new)], dim=1)`.
        Caches of static buffers are joined into one that grows; what is recorded is left behind.

        Args:
            attention_masks: for a cache whose rows are padded already, its (rows, length) mask; None for no padding.

        Raises:
            ValueError: no cache, an empty one, another pattern, dtype, device or size among them, or a mask of another
                shape.
        """
        joined, mask_BL = snapshot.join([cache.snapshot() for cache in caches], attention_masks)
        return caches[0]._with(joined), mask_BL

    def split(
        self, sizes: Sequence[int] | None = None, attention_mask: torch.Tensor | None = None
    ) -> list[NemotronHCache]:
        """Growing caches of `sizes` rows each (one each unless given), in order; see `snapshot.split`."""
        return [self._with(part) for part in snapshot.split(self.snapshot(), sizes, attention_mask)]

    def _with(self, held: Snapshot) -> NemotronHCache:
        cache = NemotronHCache(self.config, offloading=self.offloading)
        cache.restore(held)
        return cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, next to each other. Raises `ValueError` for a static cache."""
        self._check_rows_can_change()
        with Uninterrupted(self, "batch_repeat_interleave()"):
            super().batch_repeat_interleave(repeats)
            if self.padding_BP is not None:
                self.padding_BP = self.padding_BP.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """The rows of these indices, in their order. Raises `ValueError` for a static cache."""
        self._check_rows_can_change()
        with Uninterrupted(self, "batch_select_indices()"):
            super().batch_select_indices(indices)
            if self.padding_BP is not None:
                self.padding_BP = self.padding_BP[indices.to(self.padding_BP.device)]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """The rows of these indices, as many as there are. Raises `ValueError` for quantised layers that cannot."""
        check_whole(self)
        check_rows(self.layers, reorder=True)
        with Uninterrupted(self, "reorder_cache()"):
            super().reorder_cache(beam_idx)
            if self.padding_BP is not None:
                self.padding_BP = self.padding_BP[beam_idx.to(self.padding_BP.device)]

    def _check_rows_can_change(self) -> None:
        check_whole(self)
        check_rows(self.layers, reorder=False)
        if self.is_static:
            raise ValueError(
                "The cache is static, so its number of rows cannot change: repeat or select the rows of a growing "
                "NemotronHCache(model.config), or of the inputs."
            )

    @property
    def max_batch_size(self) -> int:
        return self.batch_size

    @property
    def batch_size(self) -> int:
        """Rows held, or -1 before the first update."""
        return batch_rows(self)

    def nbytes(self) -> int:
        """Bytes of the cached tensors, recorded ones included; not the space that keys and values still have."""
        return sum(layer.nbytes() for layer in self.layers)


def _length_layer(cache: Cache) -> CacheLayerMixin | MambaLayer | None:
    mamba = None
    for layer in cache.layers:
        if isinstance(layer, CacheLayerMixin):
            return layer
        if mamba is None and isinstance(layer, MambaLayer):
            mamba = layer
    return mamba


def batch_rows(cache: Cache) -> int:
    """Rows held, or -1 before the first update; also of a cache that `transformers` made."""
    for layer in cache.layers:
        if (rows := rows_of(layer)) is not None:
            return rows
    return -1


def cache_length(cache: Cache | None) -> int | torch.Tensor:
    """Tokens a cache has seen; 0 for none. Also for an adopted `DynamicCache` without attention layers."""
    layer = None if cache is None else _length_layer(cache)
    return 0 if layer is None else layer.get_seq_length()


def grows(cache: Cache | None) -> bool:
    """Whether the keys an attention layer gets back from `update` end with the new ones, no unused buffer after."""
    return cache is None or all(
        type(layer) in (GrowingLayer, DynamicLayer) for layer in cache.layers if isinstance(layer, CacheLayerMixin)
    )


def check_room(cache: Cache, batch: int, length: int) -> None:
    """Refuse a cache that these tokens do not fit, before any layer has taken them.

    Raises:
        ValueError: another number of rows than the cache holds, or more tokens than the buffers of a static cache hold.
    """
    if torch.compiler.is_compiling():
        return
    rows = batch_rows(cache)
    if rows not in (-1, batch):
        raise ValueError(f"The cache holds {rows} rows and the batch has {batch}: use a cache for each batch.")
    room = next((layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer)), None)
    if room is not None and (needed := int(cache_length(cache)) + length) > room:
        raise ValueError(f"The static cache has room for {room} tokens and {needed} are needed: make it longer.")


def _new_layer(
    kind: str, config: NemotronHConfig, max_cache_len: int | None, quantized: Mapping[str, Any] | None = None
) -> Any:
    if kind == "mamba":
        return MambaLayer(getattr(torch, config.mamba_ssm_cache_dtype), static=max_cache_len is not None)
    if kind == "attention" and quantized is not None:
        return new_quantized_layer(quantized)
    if kind == "attention":
        return GrowingLayer() if max_cache_len is None else FixedLayer(max_cache_len)
    return EmptyLayer()


__all__ = ["MambaLayer", "NemotronHCache"]

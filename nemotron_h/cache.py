"""The hybrid cache: keys and values for attention layers, (convolution window, SSM state) for Mamba layers, nothing
for MLP and MoE layers, behind `transformers`' `Cache`.

B batch, C convolution channels, W window (kernel - 1 columns), H Mamba heads, P head dim, N state size, L new tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
)

from .compat import DummyLayer

if TYPE_CHECKING:
    from .configuration import NemotronHConfig


class MambaLayer(LinearAttentionCacheLayerMixin):
    """The memory of one Mamba-2 layer: the last `conv_kernel - 1` convolution inputs and the SSM state.

    Args:
        state_dtype: dtype of the SSM state at rest; a float64 model keeps float64.
        static: keep the tensors' addresses (CUDA graphs, `torch.compile`), so states are copied in place. A dynamic
            layer takes the new tensors as they are, which lets gradients flow through the cache.
    """

    supports_early_init = False

    def __init__(self, state_dtype: torch.dtype = torch.float32, static: bool = False):
        super().__init__()
        self.state_dtype = state_dtype
        self.static = static
        # A tensor in a static layer: a Python int would recompile the decoding step for every token.
        self.cumulative_length: int | torch.Tensor = torch.tensor(0) if static else 0

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        return self.static

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def window_BCW(self) -> torch.Tensor | None:
        """(B, C, W) convolution inputs before the next token, or None before the first one."""
        return self.conv_states[0] if self.has_previous_state[0] else None

    @property
    def state_BHPN(self) -> torch.Tensor | None:
        """(B, H, P, N) SSM state after the last token, or None before the first one."""
        return self.recurrent_states[0] if self.has_previous_state[0] else None

    def update(self, window_BCW: torch.Tensor, state_BHPN: torch.Tensor, num_tokens: int) -> None:  # type: ignore[override]
        """Take the window and state after `num_tokens` more tokens (padding counted)."""
        self.update_conv_state(window_BCW)
        self.update_recurrent_state(state_BHPN)
        self.cumulative_length += num_tokens
        self.has_previous_state[0] = True

    def lazy_initialization(
        self,
        conv_states: torch.Tensor | None = None,
        recurrent_states: torch.Tensor | None = None,
        state_idx: int = 0,
        **kwargs: Any,
    ) -> None:
        if conv_states is not None:
            self.dtype, self.device = conv_states.dtype, conv_states.device
            self.conv_kernel_size[state_idx] = conv_states.shape[-1] + 1
            self.conv_states[state_idx] = self._buffer(conv_states, conv_states.dtype)
            self.is_conv_states_initialized[state_idx] = True
            if isinstance(self.cumulative_length, torch.Tensor):
                self.cumulative_length = self._buffer(self.cumulative_length.to(self.device), torch.int64)
        if recurrent_states is not None:
            dtype = torch.float64 if recurrent_states.dtype == torch.float64 else self.state_dtype
            self.recurrent_states[state_idx] = self._buffer(recurrent_states, dtype)
            self.is_recurrent_states_initialized[state_idx] = True

    def _buffer(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        buffer = torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)
        if self.static and not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(buffer)
        return buffer

    def _store(self, states: dict[int, torch.Tensor | None], state_idx: int, new: torch.Tensor) -> torch.Tensor:
        old = states[state_idx]
        assert old is not None
        if self.static:
            old.copy_(new)
        else:
            # Contiguous, so that a window does not keep the whole projection alive that it is a slice of.
            states[state_idx] = new.to(dtype=old.dtype).contiguous()
        return states[state_idx]  # type: ignore[return-value]

    def update_conv_state(self, conv_states: torch.Tensor, state_idx: int = 0, **kwargs: Any) -> torch.Tensor:
        if not self.is_conv_states_initialized[state_idx]:
            self.lazy_initialization(conv_states=conv_states, state_idx=state_idx)
        return self._store(self.conv_states, state_idx, conv_states)

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: Any) -> torch.Tensor:
        if not self.is_recurrent_states_initialized[state_idx]:
            self.lazy_initialization(recurrent_states=recurrent_states, state_idx=state_idx)
        return self._store(self.recurrent_states, state_idx, recurrent_states)

    def get_seq_length(self) -> int | torch.Tensor:
        return self.cumulative_length

    def reset(self) -> None:
        super().reset()
        self.cumulative_length *= 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove == 0:
            return
        raise RuntimeError(
            f"A Mamba layer's state cannot forget its last tokens, and crop({tokens_to_remove}) asks for that: "
            "deepcopy the cache before the tokens that may have to go."
        )

    def activate_past_recording(self) -> None:
        raise RuntimeError(
            "A Mamba layer's state cannot be rolled back, so assisted, prompt-lookup and MTP decoding are not "
            "available: call generate() without them."
        )

    def _map_rows(self, rows: Any) -> None:
        for states in (self.conv_states, self.recurrent_states):
            if states[0] is not None:
                states[0] = rows(states[0])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if not self.static:
            return self.batch_select_indices(beam_idx)
        for states in (self.conv_states, self.recurrent_states):
            if (tensor := states[0]) is not None:
                tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_rows(lambda tensor: tensor[indices.to(tensor.device)])


class _Room:
    """Buffers with room for more tokens than they hold. Layers copied from each other share one, and only the layer
    that has seen exactly `filled` tokens may go on in it: what another one still sees is never overwritten."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        self.keys, self.values, self.filled = keys, values, 0


class GrowingLayer(DynamicLayer):
    """Keys and values that grow, in place in buffers with room (the library's own copies all of them at every token);
    `reset` empties them (the library's own zeroes them and keeps their length).

    With a gradient, and while tracing, they are concatenated.
    """

    keys: Any
    values: Any
    is_initialized: bool

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._room: _Room | None = None
        self._views: tuple[torch.Tensor, torch.Tensor] | None = None
        self.expected_length = 0  # tokens that will come: buffers are made for that many

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        before = self.get_seq_length()
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            self._room = self._views = None
            # Also where the keys are frozen: a backward by the queries reads them, and writing after them counts.
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        after = before + key_states.shape[-2]
        room = self._room
        ours = self._views is not None and self.keys is self._views[0] and self.values is self._views[1]
        if (
            room is None
            or not ours
            or room.filled != before
            or after > room.keys.shape[-2]
            or (room.keys.is_inference() and not torch.is_inference_mode_enabled())
        ):
            # An eighth more, so that a token costs the copying of nine on average, and a prefill nothing.
            length = max(self.expected_length, after if before == 0 else after + after // 8 + 64)
            shapes = ((*t.shape[:-2], length, t.shape[-1]) for t in (key_states, value_states))
            room = self._room = _Room(
                *(t.new_empty(s) for t, s in zip((key_states, value_states), shapes, strict=True))
            )
            if before:
                room.keys[..., :before, :] = self.keys
                room.values[..., :before, :] = self.values
        room.keys[..., before:after, :] = key_states
        room.values[..., before:after, :] = value_states
        room.filled = after
        self._views = room.keys[..., :after, :], room.values[..., :after, :]
        self.keys, self.values = self._views
        return self._views

    def next_column(self) -> tuple[torch.Tensor, torch.Tensor, int] | None:
        """Buffers (B, K, room, Q) of keys and values and the position where one more token may be written into them, to
        be followed by `wrote_column()`; None where they have to grow or are somebody's."""
        room = self._room
        if room is None or self._views is None or self.keys is not self._views[0] or self.values is not self._views[1]:
            return None
        position = self.keys.shape[-2]
        if room.filled != position or position >= room.keys.shape[-2]:
            return None
        if room.keys.is_inference() and not torch.is_inference_mode_enabled():
            return None
        return room.keys, room.values, position

    def wrote_column(self) -> None:
        assert self._room is not None
        self._room.filled += 1
        after = self._room.filled
        self._views = self._room.keys[..., :after, :], self._room.values[..., :after, :]
        self.keys, self.values = self._views

    def offload(self) -> None:
        self._room = self._views = None
        super().offload()

    def reset(self) -> None:
        self.keys = self.values = self._room = self._views = None
        self.expected_length = 0
        self.is_initialized = False


class EmptyLayer(DummyLayer):  # type: ignore[misc, valid-type]
    """The memory of an MLP or MoE layer: none."""

    supports_early_init = False
    is_compileable = True
    is_croppable = True
    is_sliding = False

    def __init__(self) -> None:
        self.is_initialized = True
        self.keys = self.values = None

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[None, None]:
        if key_states is not None or value_states is not None:
            raise RuntimeError("An MLP or MoE layer has no cache: update the layers that attend or scan.")
        return None, None

    def offload(self) -> None: ...
    def prefetch(self) -> None: ...
    def reset(self) -> None: ...
    def crop(self, tokens_to_remove: int) -> None: ...
    def reorder_cache(self, beam_idx: torch.LongTensor) -> None: ...
    def batch_repeat_interleave(self, repeats: int) -> None: ...
    def batch_select_indices(self, indices: torch.Tensor) -> None: ...
    def get_max_length(self) -> int:
        return -1


class NemotronHCache(Cache):
    """Cache of a Nemotron-H model; `generate()` and the model make one themselves.

    Args:
        config: which layers there are, and the SSM state's dtype (`mamba_ssm_cache_dtype`).
        max_cache_len: with it the cache is static: keys and values for that many tokens are allocated at the first
            update, and nothing moves afterwards (`torch.compile`, CUDA graphs). Without it, it grows.
        offloading: keep keys and values on the CPU between uses; without an accelerator that is where they are.
    """

    def __init__(self, config: NemotronHConfig, max_cache_len: int | None = None, offloading: bool = False):
        self.kinds = config.layers_block_type
        super().__init__(
            layers=[_new_layer(kind, config, max_cache_len) for kind in config.layers_block_type],
            offloading=offloading and torch.accelerator.is_available(),
        )

    @classmethod
    def adopt(cls, cache: Cache, config: NemotronHConfig) -> Cache:
        """Give the Mamba layers of a cache that `transformers` made (`DynamicCache(config=...)`) the class they need.

        The cache is changed in place and returned; keys and values stay as they are.

        Raises:
            ValueError: the cache already holds another implementation's Mamba states.
        """
        if isinstance(cache, cls):
            if cache.kinds != config.layers_block_type:
                raise ValueError(
                    f"The cache was made for the {len(cache.kinds)} layers of another pattern: pass "
                    "NemotronHCache(model.config)."
                )
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
                static = getattr(cache, "is_compileable", False) and len(layers) == len(config.layers_block_type)
                layer = _new_layer(kind, config, 0 if static else None)
            elif layer is None:
                layer = _new_layer(kind, config, None)
            if idx < len(layers):
                layers[idx] = layer
            else:
                layers.append(layer)
        return cache

    def _length_layer(self) -> CacheLayerMixin | MambaLayer | None:
        mamba = None
        for layer in self.layers:
            if isinstance(layer, CacheLayerMixin):
                return layer
            if mamba is None and isinstance(layer, MambaLayer):
                mamba = layer
        return mamba

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far (padding counted); every layer has seen the same, so any index gives the same answer."""
        layer = self._length_layer()
        return 0 if layer is None else layer.get_seq_length()  # type: ignore[return-value]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        layer = self._length_layer()
        if isinstance(layer, CacheLayerMixin):
            return layer.get_mask_sizes(query_length)
        return int(self.get_seq_length()) + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; refused, with nothing changed, where a Mamba layer would have to."""
        for layer in self.layers:
            if isinstance(layer, MambaLayer):
                layer.crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    @property
    def max_batch_size(self) -> int:
        return self.batch_size

    @property
    def batch_size(self) -> int:
        """Rows held, or -1 before the first update."""
        for layer in self.layers:
            tensor = layer.conv_states[0] if isinstance(layer, MambaLayer) else getattr(layer, "keys", None)
            if tensor is not None and tensor.numel():
                return tensor.shape[0]
        return -1

    def nbytes(self) -> int:
        """Bytes that the cached tensors occupy."""
        total = 0
        for layer in self.layers:
            tensors = (
                (*layer.conv_states.values(), *layer.recurrent_states.values())
                if isinstance(layer, MambaLayer)
                else (layer.keys, layer.values)
            )
            total += sum(tensor.nbytes for tensor in tensors if tensor is not None)
        return total


def cache_length(cache: Cache | None) -> int | torch.Tensor:
    """Tokens a cache has seen; 0 for none. Also for an adopted `DynamicCache` without attention layers."""
    if cache is None:
        return 0
    if isinstance(cache, NemotronHCache):
        return cache.get_seq_length()
    layer = NemotronHCache._length_layer(cache)  # type: ignore[arg-type]
    return 0 if layer is None else layer.get_seq_length()


def grows(cache: Cache | None) -> bool:
    """Whether the keys that an attention layer gets back from `update` end with the new ones: no room after them."""
    return cache is None or all(
        type(layer) in (GrowingLayer, DynamicLayer) for layer in cache.layers if isinstance(layer, CacheLayerMixin)
    )


def check_room(cache: Cache, batch: int, length: int) -> None:
    """Refuse a cache that these tokens do not fit, before any layer has taken them.

    Raises:
        ValueError: another number of rows than the cache holds, or more tokens than a static cache has room for.
    """
    if torch.compiler.is_compiling():
        return
    rows = NemotronHCache.batch_size.fget(cache)  # type: ignore[attr-defined]
    if rows not in (-1, batch):
        raise ValueError(f"The cache holds {rows} rows and the batch has {batch}: use a cache for each batch.")
    room = next((layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer)), None)
    if room is not None and (needed := int(cache_length(cache)) + length) > room:
        raise ValueError(f"The static cache has room for {room} tokens and {needed} are needed: make it longer.")


def _new_layer(kind: str, config: NemotronHConfig, max_cache_len: int | None) -> Any:
    if kind == "mamba":
        return MambaLayer(getattr(torch, config.mamba_ssm_cache_dtype), static=max_cache_len is not None)
    if kind == "attention":
        return GrowingLayer() if max_cache_len is None else StaticLayer(max_cache_len)
    return EmptyLayer()


__all__ = ["MambaLayer", "NemotronHCache"]

"""The hybrid cache: keys and values for attention layers, (convolution window, SSM state) for Mamba layers, nothing
for MLP and MoE layers, behind `transformers`' `Cache`.

B batch, C convolution channels, W window (kernel - 1 columns), H Mamba heads, P head dim, N state size, L new tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
)

from ..compat import DummyLayer, new_static_layer

if TYPE_CHECKING:
    from ..configuration import NemotronHConfig
    from .files import Snapshot


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
        self._record: _Record | None = None

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        # Also while recording: the library leaves the mask of a static cache out where this is false.
        return self.static

    @property
    def is_croppable(self) -> bool:
        return self.record_past

    @property
    def keeps(self) -> int:
        """How many of the last tokens are recorded, so that `crop` can take them back; 0 while nothing is."""
        return ROLLBACK if self.record_past and not torch.compiler.is_compiling() else 0

    def activate_past_recording(self) -> None:
        """From here on the inputs of the last `ROLLBACK` tokens are kept beside the state before them.

        What was seen before, or is a longer prompt's beginning, is not recorded and cannot be taken back.
        """
        self.record_past = True

    @contextmanager
    def not_recording(self) -> Iterator[None]:
        """Tokens seen inside are not recorded, and those before them are no longer."""
        self._record, before = None, self.record_past
        self.record_past = False
        try:
            yield
        finally:
            self.record_past = before

    def open_record(self, length: int) -> _Record:
        """The record that the inputs of `length` tokens, which are about to be seen, are to be added to."""
        record = self._record
        if record is None:
            # Copies: native.c moves the layer's own on in place.
            window, state = (None if t is None else t.clone() for t in (self.window_BCW, self.state_BHPN))
            self._record = _Record(window, state)
        else:
            # A draft comes token by token, and all of it may have to go; of what came before a step of several tokens,
            # which all may, a few. The shorter the record, the less there is to replay.
            most, kept = (ROLLBACK // 2, ROLLBACK // 4) if length > 1 else (ROLLBACK - DRAFT // 2, DRAFT)
            if record.length > most or record.length + length > ROLLBACK:
                record.advance(record.length - min(record.length, kept, ROLLBACK - length))
        assert self._record is not None
        return self._record

    def deactivate_past_recording(self) -> None:
        """Nothing is recorded from here on, and nothing can be taken back."""
        self.record_past, self._record = False, None

    def settle(self) -> None:
        """What was seen so far stays: it cannot be taken back any more, nor is it replayed when later tokens are."""
        self._record = None

    @property
    def recorded(self) -> int:
        """How many tokens `crop` can take back."""
        return 0 if self._record is None else self._record.length

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
        # The layer's own tensors have moved on in place.
        if window_BCW is not self.conv_states[0] or state_BHPN is not self.recurrent_states[0]:
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
        self._record = None

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises `RuntimeError` where `crop` could not take so many tokens back, `ValueError` for a positive number."""
        _check_sign(tokens_to_remove)
        number = -tokens_to_remove
        if number == 0:
            return
        if self._record is not None and number <= self._record.length:
            if self._record.can_replay:
                return
            raise RuntimeError(
                f"crop({tokens_to_remove}) asks a Mamba layer to make its state again, and the model that made it is "
                "gone: keep the model as long as its cache."
            )
        if not self.record_past:
            raise RuntimeError(
                f"crop({tokens_to_remove}) asks a Mamba layer to forget tokens, and it has recorded none: call "
                "activate_past_recording() before the tokens that may have to go, or deepcopy the cache."
            )
        raise RuntimeError(
            f"crop({tokens_to_remove}) asks a Mamba layer to forget {number} tokens and {self.recorded} are recorded "
            f"(at most the last {ROLLBACK}, none before activate_past_recording()): draft fewer tokens at a time."
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `abs(tokens_to_remove)` tokens: the state is made again from the one before the record.

        Raises: RuntimeError where so many are not recorded; nothing has changed then.
        """
        self.check_crop(tokens_to_remove)
        if tokens_to_remove == 0:
            return
        assert self._record is not None
        window, state = self._record.without_last(abs(tokens_to_remove))
        if window is None or state is None:
            LinearAttentionCacheLayerMixin.reset(self)
            self._record = None
        else:
            self.update_conv_state(window)
            self.update_recurrent_state(state)
        self.cumulative_length -= abs(tokens_to_remove)

    def _map_rows(self, rows: Any) -> None:
        for states in (self.conv_states, self.recurrent_states):
            if states[0] is not None:
                states[0] = rows(states[0])
        if self._record is not None:
            self._record.map_rows(rows)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if not self.static:
            return self.batch_select_indices(beam_idx)
        for states in (self.conv_states, self.recurrent_states):
            if (tensor := states[0]) is not None:
                tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))
        if self._record is not None:
            self._record.map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_rows(lambda tensor: tensor[indices.to(tensor.device)])


def _check_sign(tokens_to_remove: int) -> None:
    if tokens_to_remove > 0:
        raise ValueError(f"crop({tokens_to_remove}): pass the tokens to forget as a negative number.")


ROLLBACK = 64
"""Tokens that a Mamba layer can take back while it records, where they came in one step."""

DRAFT = 32
"""Tokens that it can take back where they came one by one."""


class _Record:
    """The state before the last few tokens, and what in_proj made of each: C + H numbers a token, where a state has
    H P N. Layers copied from each other share tensors, none of which is ever written into."""

    def __init__(self, window_BCW: torch.Tensor | None, state_BHPN: torch.Tensor | None):
        self.window_BCW, self.state_BHPN = window_BCW, state_BHPN
        self.inputs_BLK: torch.Tensor | None = None
        self.mask_BL: torch.Tensor | None = None
        self._mixer: Any = None  # a weak reference: a copied cache must not copy the model

    @property
    def length(self) -> int:
        return 0 if self.inputs_BLK is None else self.inputs_BLK.shape[1]

    @property
    def can_replay(self) -> bool:
        return self._mixer is not None and self._mixer() is not None

    @property
    def nbytes(self) -> int:
        tensors = (self.window_BCW, self.state_BHPN, self.inputs_BLK, self.mask_BL)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def add(self, mixer: Any, inputs_BLK: torch.Tensor, mask_BL: torch.Tensor | None = None) -> None:
        """Take the raw inputs (B, L, C + H) of tokens, a tensor of their own; `mixer.replay` makes a state of them."""
        before = self.inputs_BLK
        if mask_BL is not None or self.mask_BL is not None:
            new = mask_BL.bool() if mask_BL is not None else inputs_BLK.new_ones(inputs_BLK.shape[:2], dtype=torch.bool)
            old = self.mask_BL
            if old is None and before is not None:
                old = new.new_ones(before.shape[:2])
            self.mask_BL = new if old is None else torch.cat([old, new], dim=1)
        self.inputs_BLK = inputs_BLK if before is None else torch.cat([before, inputs_BLK], dim=1)
        self._mixer = weakref.ref(mixer)

    def _after(self, length: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The window and the state after the first `length` recorded tokens, in tensors of their own."""
        assert self.inputs_BLK is not None
        if length == 0:
            return tuple(None if t is None else t.clone() for t in (self.window_BCW, self.state_BHPN))  # type: ignore[return-value]
        mixer = self._mixer()
        mask_BL = None if self.mask_BL is None else self.mask_BL[:, :length]
        return mixer.replay(
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

    def without_last(self, number: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The window and the state before the last tokens, which are recorded no longer."""
        self._keep(slice(None, self.length - number))
        return self._after(self.length)

    def map_rows(self, rows: Any) -> None:
        for name in ("window_BCW", "state_BHPN", "inputs_BLK", "mask_BL"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, rows(tensor))


class _Room:
    """Buffers with room for more tokens than they hold. Layers copied from each other share one, and only the layer
    that has seen exactly `filled` tokens may go on in it: what another one still sees is never overwritten."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        self.keys, self.values, self.filled = keys, values, 0
        self.seen = 0  # so many tokens may be in somebody else's sight


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
        self.record_past = False

    def activate_past_recording(self) -> None:
        """From here on `crop` goes back in place: tokens written after this and cropped are written over."""
        self.record_past = True
        self.share()

    def deactivate_past_recording(self) -> None:
        self.record_past = False

    def share(self) -> None:
        """What is held now is seen by somebody else too: it is never written over."""
        if self._room is not None:
            self._room.seen = self._room.filled

    def __copy__(self) -> GrowingLayer:
        self.share()
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def crop(self, tokens_to_remove: int) -> None:
        room, views = self._room, self._views
        ours = room is not None and views is not None and self.keys is views[0] and self.values is views[1]
        super().crop(tokens_to_remove)
        if ours and self.record_past and room is not None and self.keys is not None:
            length = self.keys.shape[-2]
            if room.seen <= length < room.filled == views[0].shape[-2]:  # type: ignore[index]
                room.filled, self._views = length, (self.keys, self.values)

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

    def next_columns(self, number: int) -> tuple[torch.Tensor, torch.Tensor, int] | None:
        """Buffers (B, K, room, Q) of keys and values and the position from which more tokens may be written into them,
        to be followed by `wrote_columns`; None where they have to grow or are somebody's."""
        room = self._room
        if room is None or self._views is None or self.keys is not self._views[0] or self.values is not self._views[1]:
            return None
        position = self.keys.shape[-2]
        if room.filled != position or position + number > room.keys.shape[-2]:
            return None
        if room.keys.is_inference() and not torch.is_inference_mode_enabled():
            return None
        return room.keys, room.values, position

    def wrote_columns(self, number: int) -> None:
        assert self._room is not None
        self._room.filled += number
        after = self._room.filled  # narrow: half of what slicing costs
        self._views = self._room.keys.narrow(-2, 0, after), self._room.values.narrow(-2, 0, after)
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


_SIZES = (
    *("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel"),
    *("num_key_value_heads", "head_dim"),
)
"""What the shapes in a cache depend on."""


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
            for name in _SIZES:
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
        """Forget the last `-tokens_to_remove` tokens; refused, with nothing changed, where a Mamba layer cannot."""
        _check_sign(tokens_to_remove)
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

    def like(self) -> NemotronHCache:
        """An empty cache of the same pattern, that grows."""
        return NemotronHCache(self.config, offloading=self.offloading)

    def snapshot(self) -> Snapshot:
        """What the cache holds now, for `restore`. Costs a copy of the Mamba states; keys and values are shared.

        Recorded tokens are not part of it: after `restore`, nothing before that point can be taken back.
        """
        from .files import take

        return take(self)

    def restore(self, snapshot: Snapshot) -> None:
        """Hold what the snapshot holds, whatever was here; it may be restored any number of times, into any cache of
        the pattern, static or growing.

        Raises:
            ValueError: another pattern, state dtype, or what a static cache has no room for; nothing has changed then.
        """
        from .files import put

        put(self, snapshot)

    def save(self, path: str | Path, *, model: Any, token_ids: Any = None) -> None:
        """Write what the cache holds to a safetensors file, whole or not at all; see `snapshots.save`."""
        from .files import save

        save(self, path, model=model, token_ids=token_ids)

    @classmethod
    def load(cls, path: str | Path, model: Any, **options: Any) -> NemotronHCache:
        """The cache in a file that `save` wrote; see `snapshots.load` for `token_ids=`, `max_cache_len=` and errors."""
        from .files import load

        return load(path, model, **options)

    @classmethod
    def concat(
        cls, caches: Sequence[NemotronHCache], attention_masks: Sequence[torch.Tensor | None] | None = None
    ) -> tuple[NemotronHCache, torch.Tensor]:
        """The rows of several caches in one, shorter ones padded on the left, and its mask; see `rows.concat`."""
        from .rows import concat

        return concat(caches, attention_masks)

    def split(
        self, sizes: Sequence[int] | None = None, attention_mask: torch.Tensor | None = None
    ) -> list[NemotronHCache]:
        """A cache for each row, or for each so many; see `rows.split`."""
        from .rows import split

        return split(self, sizes, attention_mask)

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
        from .quantized import check_rows

        check_whole(self)
        check_rows(self.layers, reorder=True)
        with Uninterrupted(self, "reorder_cache()"):
            super().reorder_cache(beam_idx)
            if self.padding_BP is not None:
                self.padding_BP = self.padding_BP[beam_idx.to(self.padding_BP.device)]

    def _check_rows_can_change(self) -> None:
        from .quantized import check_rows

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
        for layer in self.layers:
            tensor = layer.conv_states[0] if isinstance(layer, MambaLayer) else getattr(layer, "keys", None)
            if tensor is not None and tensor.numel():
                return tensor.shape[0]
        return -1

    def nbytes(self) -> int:
        """Bytes of the cached tensors, recorded ones included; not the room that keys and values have still to grow."""
        from .quantized import nbytes as quantised_nbytes

        total = 0
        for layer in self.layers:
            tensors = (
                (*layer.conv_states.values(), *layer.recurrent_states.values())
                if isinstance(layer, MambaLayer)
                else (layer.keys, layer.values)
            )
            total += sum(tensor.nbytes for tensor in tensors if tensor is not None)
            for name in ("_quantized_keys", "_quantized_values"):
                if (held := getattr(layer, name, None)) is not None:
                    total += quantised_nbytes(held)
            if isinstance(layer, MambaLayer) and layer._record is not None:
                total += layer._record.nbytes
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


def _new_layer(
    kind: str, config: NemotronHConfig, max_cache_len: int | None, quantized: Mapping[str, Any] | None = None
) -> Any:
    if kind == "mamba":
        return MambaLayer(getattr(torch, config.mamba_ssm_cache_dtype), static=max_cache_len is not None)
    if kind == "attention" and quantized is not None:
        from .quantized import new_layer

        return new_layer(quantized)
    if kind == "attention":
        return GrowingLayer() if max_cache_len is None else new_static_layer(max_cache_len)
    return EmptyLayer()


__all__ = ["MambaLayer", "NemotronHCache"]

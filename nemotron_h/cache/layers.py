"""What one layer remembers. Beside what `transformers` asks of a layer of a cache, each answers for itself:

    nbytes()                 the bytes of its tensors
    held(length)             what it holds after so many tokens, as a pair of tensors that nothing writes into, or None
    check_hold(pair, length) raises ValueError for a pair that it cannot hold
    hold(pair, length)       holds that pair, whatever it held before

B batch, C convolution channels, W window (kernel - 1 columns), H Mamba heads, P head dim, N state size, K key heads,
Q key dim, L new tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from ..compat import DummyLayer, FixedKeys
from .rollback import DRAFT, ROLLBACK, Record, check_sign
from .snapshot import Pair, short


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
        self.cumulative_length: int | Tensor = torch.tensor(0) if static else 0
        self._record: Record | None = None

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

    def open_record(self, length: int) -> Record:
        """The record that the inputs of `length` tokens, which are about to be seen, are to be added to."""
        record = self._record
        if record is None:
            # Copies: native.c moves the layer's own on in place.
            window, state = (None if t is None else t.clone() for t in (self.window_BCW, self.state_BHPN))
            self._record = Record(window, state)
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
    def window_BCW(self) -> Tensor | None:
        """(B, C, W) convolution inputs before the next token, or None before the first one."""
        return self.conv_states[0] if self.has_previous_state[0] else None

    @property
    def state_BHPN(self) -> Tensor | None:
        """(B, H, P, N) SSM state after the last token, or None before the first one."""
        return self.recurrent_states[0] if self.has_previous_state[0] else None

    def update(self, window_BCW: Tensor, state_BHPN: Tensor, num_tokens: int) -> None:  # type: ignore[override]
        """Take the window and state after `num_tokens` more tokens (padding counted)."""
        # The layer's own tensors have moved on in place.
        if window_BCW is not self.conv_states[0] or state_BHPN is not self.recurrent_states[0]:
            self.update_conv_state(window_BCW)
            self.update_recurrent_state(state_BHPN)
        self.cumulative_length += num_tokens
        self.has_previous_state[0] = True

    def lazy_initialization(
        self,
        conv_states: Tensor | None = None,
        recurrent_states: Tensor | None = None,
        state_idx: int = 0,
        **kwargs: Any,
    ) -> None:
        if conv_states is not None:
            self.dtype, self.device = conv_states.dtype, conv_states.device
            self.conv_kernel_size[state_idx] = conv_states.shape[-1] + 1
            self.conv_states[state_idx] = self._buffer(conv_states, conv_states.dtype)
            self.is_conv_states_initialized[state_idx] = True
            if isinstance(self.cumulative_length, Tensor):
                self.cumulative_length = self._buffer(self.cumulative_length.to(self.device), torch.int64)
        if recurrent_states is not None:
            dtype = torch.float64 if recurrent_states.dtype == torch.float64 else self.state_dtype
            self.recurrent_states[state_idx] = self._buffer(recurrent_states, dtype)
            self.is_recurrent_states_initialized[state_idx] = True

    def _buffer(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        buffer = torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)
        if self.static and not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(buffer)
        return buffer

    def _store(self, states: dict[int, Tensor | None], state_idx: int, new: Tensor) -> Tensor:
        old = states[state_idx]
        assert old is not None
        if self.static:
            old.copy_(new)
        else:
            # Contiguous, so that a window does not keep the whole projection alive that it is a slice of.
            states[state_idx] = new.to(dtype=old.dtype).contiguous()
        return states[state_idx]  # type: ignore[return-value]

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        if not self.is_conv_states_initialized[state_idx]:
            self.lazy_initialization(conv_states=conv_states, state_idx=state_idx)
        return self._store(self.conv_states, state_idx, conv_states)

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        if not self.is_recurrent_states_initialized[state_idx]:
            self.lazy_initialization(recurrent_states=recurrent_states, state_idx=state_idx)
        return self._store(self.recurrent_states, state_idx, recurrent_states)

    def get_seq_length(self) -> int | Tensor:
        return self.cumulative_length

    def reset(self) -> None:
        super().reset()
        self.cumulative_length *= 0
        self._record = None

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises `RuntimeError` where `crop` could not take so many tokens back, `ValueError` for a positive number."""
        check_sign(tokens_to_remove)
        number = -tokens_to_remove
        if number == 0:
            return
        if self._record is not None and number <= self._record.length:
            return
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

    def _map_rows(self, rows: Any, in_place: bool = False) -> None:
        for states in (self.conv_states, self.recurrent_states):
            if (tensor := states[0]) is not None:
                states[0] = tensor.copy_(rows(tensor)) if in_place else rows(tensor)
        if self._record is not None:
            self._record.map_rows(rows)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)), in_place=self.static)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def nbytes(self) -> int:
        held = (*self.conv_states.values(), *self.recurrent_states.values())
        recorded = 0 if self._record is None else self._record.nbytes
        return recorded + sum(tensor.nbytes for tensor in held if tensor is not None)

    def held(self, length: int) -> Pair | None:
        window, state = self.window_BCW, self.state_BHPN
        return None if window is None or state is None else (window.clone(), state.clone())

    def check_hold(self, pair: Pair | None, length: int) -> None:
        if pair is None:
            return
        if pair[1].dtype not in (self.state_dtype, torch.float64):
            raise ValueError(
                f"The snapshot's SSM states are {short(pair[1].dtype)} and the cache keeps {short(self.state_dtype)}: "
                "set mamba_ssm_cache_dtype in the config to the snapshot's, or compute it again."
            )
        if self.static:
            for buffer, saved in zip((self.conv_states[0], self.recurrent_states[0]), pair, strict=True):
                _check_buffer(buffer, saved, None)

    def hold(self, pair: Pair | None, length: int) -> None:
        if not self.static:
            # New tensors: those it has may be another's, or inference mode's. Copies, which it may move on in place.
            self.conv_states[0] = self.recurrent_states[0] = None
            self.is_conv_states_initialized[0] = self.is_recurrent_states_initialized[0] = False
            pair = None if pair is None else (pair[0].clone(), pair[1].clone())
        self.reset()
        if pair is not None:
            self.update(*pair, length)


class _Buffers:
    """Buffers with space for more tokens than they hold. Layers copied from each other share one, and only the layer
    that has seen exactly `filled` tokens may go on in it: what another one still sees is never overwritten."""

    def __init__(self, keys: Tensor, values: Tensor, filled: int):
        self.keys, self.values, self.filled = keys, values, filled
        self.seen = 0  # so many tokens may be in somebody else's sight


class GrowingLayer(DynamicLayer):
    """Keys and values that grow, in place in buffers with space for more (the library's own copies all of them at every
    token); `reset` empties them (the library's own zeroes them and keeps their length).

    With a gradient, and while tracing, they are concatenated.
    """

    keys: Any
    values: Any
    is_initialized: bool

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._buffers: _Buffers | None = None
        self._views: tuple[Tensor, Tensor] | None = None
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
        if self._buffers is not None:
            self._buffers.seen = self._buffers.filled

    def __copy__(self) -> GrowingLayer:
        self.share()
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def crop(self, tokens_to_remove: int) -> None:
        buffers, views, ours = self._buffers, self._views, self._sees_its_buffers()
        super().crop(tokens_to_remove)
        if ours and self.record_past and buffers is not None and self.keys is not None:
            length = self.keys.shape[-2]
            if buffers.seen <= length < buffers.filled == views[0].shape[-2]:  # type: ignore[index]
                buffers.filled, self._views = length, (self.keys, self.values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            self._buffers = self._views = None
            # Also where the keys are frozen: a backward by the queries reads them, and writing after them counts.
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        number = key_states.shape[-2]
        columns = self.next_columns(number)
        if columns is None:
            before = self.get_seq_length()
            after = before + number
            # An eighth more, so that a token costs the copying of nine on average, and a prefill nothing.
            length = max(self.expected_length, after if before == 0 else after + after // 8 + 64)
            keys, values = (t.new_empty(*t.shape[:-2], length, t.shape[-1]) for t in (key_states, value_states))
            if before:
                keys[..., :before, :] = self.keys
                values[..., :before, :] = self.values
            self._buffers = _Buffers(keys, values, before)
        else:
            keys, values, before = columns
        keys[..., before : before + number, :] = key_states
        values[..., before : before + number, :] = value_states
        self.wrote_columns(number)
        return self.keys, self.values

    def _sees_its_buffers(self) -> bool:
        """Whether nobody has put other keys or values in their place."""
        views = self._views
        return views is not None and self.keys is views[0] and self.values is views[1]

    def next_columns(self, number: int) -> tuple[Tensor, Tensor, int] | None:
        """Buffers (B, K, space, Q) of keys and values and the position from which more tokens may be written into them,
        to be followed by `wrote_columns`; None where they have to grow or are somebody's."""
        buffers = self._buffers
        if buffers is None or not self._sees_its_buffers():
            return None
        position = self.keys.shape[-2]
        if buffers.filled != position or position + number > buffers.keys.shape[-2]:
            return None
        if buffers.keys.is_inference() and not torch.is_inference_mode_enabled():
            return None
        return buffers.keys, buffers.values, position

    def wrote_columns(self, number: int) -> None:
        assert self._buffers is not None
        self._buffers.filled += number
        after = self._buffers.filled  # narrow: half of what slicing costs
        self._views = self._buffers.keys.narrow(-2, 0, after), self._buffers.values.narrow(-2, 0, after)
        self.keys, self.values = self._views

    def offload(self) -> None:
        self._buffers = self._views = None
        super().offload()

    def reset(self) -> None:
        self.keys = self.values = self._buffers = self._views = None
        self.expected_length = 0
        self.is_initialized = False

    def nbytes(self) -> int:
        return 0 if self.keys is None else self.keys.nbytes + self.values.nbytes

    def held(self, length: int) -> Pair | None:
        if length == 0 or not self.is_initialized or self.keys is None:
            return None
        self.share()  # whoever goes on from these buffers writes after what the snapshot sees
        return self.keys, self.values

    def check_hold(self, pair: Pair | None, length: int) -> None: ...

    def hold(self, pair: Pair | None, length: int) -> None:
        self.reset()
        if pair is not None:
            self.lazy_initialization(*pair)
            self.keys, self.values = pair


class FixedLayer(FixedKeys):
    """Keys and values in buffers of `max_cache_len` tokens that never move."""

    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0

    def held(self, length: int) -> Pair | None:
        if length == 0 or not self.is_initialized:
            return None
        return self.keys[..., :length, :].clone(), self.values[..., :length, :].clone()

    def check_hold(self, pair: Pair | None, length: int) -> None:
        if length > self.max_cache_len:
            raise ValueError(
                f"The snapshot holds {length} tokens and the static cache has room for {self.max_cache_len}: make it "
                "longer."
            )
        if pair is not None and self.is_initialized:
            for buffer, saved in zip((self.keys, self.values), pair, strict=True):
                _check_buffer(buffer, saved, (*buffer.shape[:-2], length, buffer.shape[-1]))

    def hold(self, pair: Pair | None, length: int) -> None:
        if pair is None:
            self.reset()
            self.cumulative_length.zero_()
            return
        if not self.is_initialized:
            self.lazy_initialization(*pair)
        for buffer, saved in zip((self.keys, self.values), pair, strict=True):
            buffer[..., :length, :] = saved
        self.cumulative_length.fill_(length)


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
    def batch_select_indices(self, indices: Tensor) -> None: ...
    def get_max_length(self) -> int:
        return -1

    def nbytes(self) -> int:
        return 0

    def held(self, length: int) -> None: ...
    def check_hold(self, pair: Pair | None, length: int) -> None: ...
    def hold(self, pair: Pair | None, length: int) -> None: ...


def _check_buffer(buffer: Tensor | None, saved: Tensor, shape: Sequence[int] | None) -> None:
    """Raises `ValueError` where what was saved does not go into a buffer, or its part of that shape."""
    if buffer is None:
        return
    wanted = tuple(buffer.shape if shape is None else shape)
    if wanted != tuple(saved.shape) or buffer.dtype != saved.dtype:
        raise ValueError(
            f"The snapshot has {short(saved.dtype)} {tuple(saved.shape)} and the static cache's buffers take "
            f"{short(buffer.dtype)} {wanted}: restore it into a new cache."
        )


def rows_of(layer: Any) -> int | None:
    """The sequences that a layer holds, also one that `transformers` made; None before the first token."""
    if (states := getattr(layer, "conv_states", None)) is not None:
        tensor = states[0]
    else:
        tensor = getattr(layer, "keys", None)
    return None if tensor is None or not tensor.numel() else int(tensor.shape[0])

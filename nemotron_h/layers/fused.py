"""A few tokens through several layers in one call.

A layer's parts called one by one cost some 100 us of Python and dispatch; where a model is small, that is most of a
token. `steps` gives the layers as they are, or, for a few tokens on a CPU, stretches of them that native.c runs at
once, with the results of the calls bit for bit.

A stretch is made from what hangs on its modules: attributes, parameters, hooks, and the functions of their classes.
Right before it runs, all of that is compared with what it was made from, and where anything differs it is made again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle
from transformers import Cache
from transformers.activations import ReLUSquaredActivation

from ..cache.layers import GrowingLayer, MambaLayer
from ..ops import FEW_TOKENS, native
from ..ops.conditions import few_rows
from ..ops.int8_int4 import packed_dtypes, packed_shapes
from .attention import NemotronHAttention
from .block import NemotronHBlock
from .mamba import NemotronHMamba2Mixer
from .moe import NemotronHMLP
from .parts import NemotronHConv1d, NemotronHRMSNorm, NemotronHRMSNormGated, is_called_plainly

_DTYPES = (torch.float32, torch.bfloat16)
_plans: weakref.WeakKeyDictionary[nn.ModuleList, tuple[list[nn.Module], list[_Run | _Called]]] = (
    weakref.WeakKeyDictionary()
)


def steps(
    layers: nn.ModuleList, x_BLD: Tensor, cache: Cache | None, mask_BL: Tensor | None, plainly_causal: bool
) -> Iterable[Callable[..., Tensor]]:
    """What to call one after the other, each as a layer is called, to take x through the layers."""
    if (
        torch.compiler.is_compiling()
        or x_BLD.dtype not in _DTYPES
        or x_BLD.shape[1] > FEW_TOKENS
        or x_BLD.shape[:2].numel() > few_rows(x_BLD.dtype)
        or cache is None
        or mask_BL is not None
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or getattr(cache, "offloading", False)
        or not _is_ours(cache)
        or not native.serves(x_BLD)
        or torch_module._has_any_global_hook()
        or F.linear is not torch._C._nn.linear
    ):
        return layers
    return _stretches(layers, plainly_causal)


def _is_ours(cache: Cache) -> bool:
    """Whether what is seen goes into the cache's layers and nowhere else: nobody's `update` in between."""
    return type(cache).update is Cache.update and "update" not in cache.__dict__


def _stretches(layers: nn.ModuleList, plainly_causal: bool) -> Iterator[Callable[..., Tensor]]:
    known = _plans.get(layers)
    now = list(layers._modules.values())
    if known is None or known[0] != now:
        known = _plans[layers] = now, _plan(now)
    for step in known[1]:
        stretch: list[Any] = [step]
        if not step.is_as_it_was():
            # From here on this part as it is now; with its neighbours again, as far as they go, the next time.
            _plans.pop(layers, None)
            stretch = _plan(step.blocks)
        for part in stretch:
            if isinstance(part, _Run) and (plainly_causal or not part.attends):
                yield part
            else:
                yield from part.blocks


def _plan(blocks: Iterable[Any]) -> list[_Run | _Called]:
    """Neighbours that `_Run` takes as one of it, the others as they are."""
    found: list[_Run | _Called] = []
    run: list[_Parts] = []
    for block in [*blocks, None]:
        parts = _Parts(block) if block is not None else None
        if run and (parts is None or not parts.fit or (parts.dtype, parts.width) != (run[0].dtype, run[0].width)):
            found.append(_Run(run))
            run = []
        if parts is not None and parts.fit:
            run.append(parts)
        elif parts is not None:
            found.append(_Called([parts]))
    return found


class _Called:
    """Layers that are called, with what was looked at last: there was the reason, and as long as it is as it was
    nothing else need be asked. (Another reason that goes away, or a second one, costs speed and no number.)"""

    def __init__(self, members: list[_Parts]) -> None:
        self.blocks = [parts.block for parts in members]
        seen = [module for parts in members for module in parts.modules]
        self._modules = seen if isinstance(self, _Run) else seen[-1:]
        self._attributes = [module.__dict__ for module in self._modules]
        self._classes = list(dict.fromkeys(map(type, self._modules)))
        # nn.Linear's own are its sizes, of which its forward reads none.
        speaking = [module.__dict__ for module in self._modules if type(module) is not nn.Linear]
        own = [(sorted(set(there) - _OF_EVERY_MODULE), there) for there in speaking]
        self._own = [(itemgetter(*names), there) for names, there in own if names]
        self._with_parameters = [there for there in self._attributes if there["_parameters"]]
        self._with_children = [module.__dict__ for module in seen if module._modules]
        self._then, self._then_hooks, self._then_tensors = self._now(), self._hooks(), self._tensors()

    def _now(self) -> list[Any]:
        """What decides what the layers compute, beside tensors and hooks. A list, which C compares for every token."""
        return [
            *map(type, self._modules),
            *map(_FORWARD, self._classes),
            *map(_CALL, self._classes),
            *map(_CALL_IMPL, self._classes),
            *map(len, self._attributes),
            *chain.from_iterable(map(dict.values, map(_CHILDREN, self._with_children))),
            *[read(there) for read, there in self._own],
        ]

    def _tensors(self) -> list[Tensor | None]:
        return [*chain.from_iterable(map(dict.values, map(_PARAMETERS, self._with_parameters)))]

    def _hooks(self) -> list[int]:
        return [*chain.from_iterable(chain.from_iterable(map(_HOOKS, self._attributes)))]

    def is_as_it_was(self) -> bool:
        try:
            return self._then == self._now() and self._then_hooks == self._hooks() and self._tensors_are_as_they_were()
        except (KeyError, RuntimeError, ValueError):  # an attribute less, or what has no single answer: two tensors
            return False

    def _tensors_are_as_they_were(self) -> bool:
        then, now = self._then_tensors, self._tensors()
        return len(then) == len(now) and all(map(is_, then, now))


_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PARAMETERS, _CHILDREN = itemgetter("_parameters"), itemgetter("_modules")
_FORWARD, _CALL, _CALL_IMPL = attrgetter("forward"), attrgetter("__call__"), attrgetter("_call_impl")
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # what torch keeps: its parts and its hooks are looked at apart


class _Run(_Called):
    """Neighbouring layers, called like one, with all that they were looked at for."""

    def __init__(self, members: list[_Parts]) -> None:
        super().__init__(members)
        tensors = [tensor for tensor in self._then_tensors if tensor is not None]
        self._addresses = list(map(Tensor.data_ptr, tensors))
        # torch.compile's own check of sizes, strides, dtypes and views (`.data` may be any other), in one call.
        self._guards = torch._C._dynamo.guards.TensorGuards(
            *tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None
        )
        self._last_handle = RemovableHandle.next_id
        self.dtype, self.width = members[0].dtype, members[0].width
        self.attends = any(parts.struct.kind == native.ATTENTION for parts in members)
        self._members = [
            (parts.struct.kind, parts.block.mixer.layer_idx) for parts in members if parts.struct.kind != native.MLP
        ]
        self._structs = (native.Block * len(members))(*(parts.struct for parts in members))
        self._remembering = [i for i, parts in enumerate(members) if parts.struct.kind != native.MLP]

    def _hooks(self) -> list[int]:
        """None, when it was made; looked at again where anybody has registered a hook since, on anything."""
        if (last := RemovableHandle.next_id) == getattr(self, "_last_handle", None):
            return self._then_hooks
        found = super()._hooks()
        if not found:
            self._last_handle = last
        return found

    def _tensors_are_as_they_were(self) -> bool:
        tensors = [tensor for tensor in self._tensors() if tensor is not None]
        return (
            len(tensors) == len(self._addresses)
            and self._addresses == list(map(Tensor.data_ptr, tensors))
            and self._guards.check(*tensors)
        )

    def __call__(self, x_BLD: Tensor, *, cache: Cache, **kwargs: Any) -> Tensor:
        if x_BLD.dtype == self.dtype and x_BLD.shape[-1] == self.width:
            structs = type(self._structs).from_buffer_copy(self._structs)  # of this call: threads may share a model
            layers = [(kind, cache.layers[idx]) for kind, idx in self._members]
            ready = zip(layers, self._remembering, strict=True)
            if all(_point_at(structs[i], kind, layer, x_BLD) for (kind, layer), i in ready):
                length = x_BLD.shape[1]
                recorded = self._records(structs, layers, x_BLD)
                y_BLD = x_BLD.clone(memory_format=torch.contiguous_format)
                native.blocks(structs, len(self.blocks), y_BLD)
                for record, mixer, inputs_BLK in recorded:
                    record.add(mixer.replay, inputs_BLK)
                for kind, layer in layers:
                    if kind == native.MAMBA:
                        layer.update(layer.window_BCW, layer.state_BHPN, length)
                    else:
                        layer.wrote_columns(length)
                return y_BLD
        for block in self.blocks:
            x_BLD = block(x_BLD, cache=cache, **kwargs)
        return x_BLD

    def _records(self, structs: Any, layers: list[tuple[int, Any]], x_BLD: Tensor) -> list[tuple[Any, Any, Tensor]]:
        """Where Mamba layers record their inputs: their records, mixers, and the tensors that native.c fills."""
        found = []
        for (kind, layer), i in zip(layers, self._remembering, strict=True):
            if kind == native.MAMBA and layer.keeps:
                width = structs[i].first.N - structs[i].last.K
                inputs_BLK = x_BLD.new_empty(*x_BLD.shape[:2], width)
                structs[i].record = inputs_BLK.data_ptr()
                found.append((layer.open_record(x_BLD.shape[1]), self.blocks[i].mixer, inputs_BLK))
        return found


def _point_at(struct: native.Block, kind: int, layer: Any, x_BLD: Tensor) -> bool:
    """Write where a layer's memory lies into its struct; False, where it is not what native.c can go on from."""
    if kind == native.MAMBA:
        if type(layer) is not MambaLayer:
            return False
        window, state, sizes = layer.window_BCW, layer.state_BHPN, struct.mamba
        if (
            window is None
            or state is None
            or state.dtype != torch.float32
            or window.dtype != x_BLD.dtype
            or state.shape[0] != x_BLD.shape[0]
            or window.requires_grad
            or state.requires_grad
            or not (window.is_cpu and state.is_cpu and window.is_contiguous() and state.is_contiguous())
            or window.shape != (x_BLD.shape[0], struct.first.N - struct.last.K - sizes.heads, sizes.width)
            or state.shape[1:] != (sizes.heads, sizes.head_dim, sizes.state)
        ):
            return False
        struct.window, struct.state = window.data_ptr(), state.data_ptr()
        return True
    column = layer.next_columns(x_BLD.shape[1]) if type(layer) is GrowingLayer else None
    if column is None:
        return False
    keys, values, position = column
    if keys.dtype != x_BLD.dtype or not keys.is_cpu or keys.shape[:2] != (x_BLD.shape[0], struct.key_heads):
        return False
    if not keys.shape[3] == values.shape[3] == struct.head_dim:
        return False
    struct.keys, struct.values, struct.length = keys.data_ptr(), values.data_ptr(), position + x_BLD.shape[1]
    struct.k_row, struct.k_head = keys.stride(0), keys.stride(1)
    struct.v_row, struct.v_head = values.stride(0), values.stride(1)
    return True


class _Parts:
    """What native.c needs of one block, and the modules that were looked at for it."""

    def __init__(self, block: Any) -> None:
        self.block = block
        self.struct = native.Block()
        self.modules: list[nn.Module] = []
        try:
            self.width, self.dtype = self._block(block)
            self.fit = True  # or the block must be called: other classes, biases, dtypes, sizes than native.c knows
        except (_NotThisOneError, AttributeError, KeyError, TypeError):
            self.fit = False

    def _block(self, block: Any) -> tuple[int, torch.dtype]:
        self._module(block, NemotronHBlock)
        mixer, norm, struct = block._modules["mixer"], self._part(block, "norm", NemotronHRMSNorm), self.struct
        dtype = norm.weight.dtype
        _require(dtype in _DTYPES and (not block.residual_in_fp32 or dtype == torch.float32))
        self.dtype, self.width = dtype, norm.weight.numel()
        struct.norm, struct.eps = self._tensor(norm, (self.width,)), norm.variance_epsilon
        kinds: dict[type[nn.Module], Callable[[Any], None]] = {
            NemotronHMamba2Mixer: self._mamba,
            NemotronHAttention: self._attention,
            NemotronHMLP: self._mlp,
        }
        self._module(mixer, type(mixer))
        kinds[type(mixer)](mixer)
        return self.width, dtype

    def _mamba(self, mixer: Any) -> None:
        struct = self.struct
        conv, norm = self._part(mixer, "conv1d", NemotronHConv1d), self._part(mixer, "norm", NemotronHRMSNormGated)
        groups, heads, taps = mixer.n_groups, mixer.num_heads, conv.weight.shape[-1]
        inner, channels = heads * mixer.head_dim, heads * mixer.head_dim + 2 * groups * mixer.ssm_state_size
        _require(conv.activation in ("silu", "swish") and 1 < taps <= native.MOST_TAPS)
        _require(norm.n_groups == groups > 0 and heads % groups == 0 and type(mixer.time_step_limit) is tuple)
        _require((mixer.intermediate_size, mixer.conv_dim) == (inner, channels))
        struct.kind = native.MAMBA
        struct.first = self._linear(mixer, "in_proj", inner + channels + heads, self.width)
        struct.last = self._linear(mixer, "out_proj", self.width, inner)
        struct.conv_weight = self._tensor(conv, (channels, 1, taps))
        struct.conv_bias = 0 if conv.bias is None else self._tensor(conv, (channels,), "bias")
        struct.gated_norm = self._tensor(norm, (inner,))
        for name in ("dt_bias", "A_log", "D"):
            setattr(struct, name, self._tensor(mixer, (heads,), name, torch.float32))
        sizes = heads, mixer.head_dim, groups, mixer.ssm_state_size, taps - 1
        struct.mamba = native.Mamba(*sizes, *mixer.time_step_limit, norm.variance_epsilon)

    def _attention(self, mixer: Any) -> None:
        struct, head_dim = self.struct, mixer.head_dim
        _require(head_dim > 0 and head_dim % 16 == 0)
        struct.kind = native.ATTENTION
        struct.first = self._linear(mixer, "q_proj", None, self.width)
        struct.last = self._linear(mixer, "o_proj", self.width)
        struct.key, struct.value = (self._linear(mixer, name, None, self.width) for name in ("k_proj", "v_proj"))
        queries, keys = struct.first.N, struct.key.N
        _require(struct.last.K == queries and struct.value.N == keys > 0)
        _require(keys % head_dim == 0 and queries % keys == 0)
        struct.head_dim, struct.scale, struct.key_heads = head_dim, mixer.scaling, keys // head_dim

    def _mlp(self, mixer: Any) -> None:
        self._part(mixer, "act_fn", ReLUSquaredActivation)
        self.struct.kind = native.MLP
        self.struct.first = self._linear(mixer, "up_proj", None, self.width)
        self.struct.last = self._linear(mixer, "down_proj", self.width, self.struct.first.N)

    def _linear(self, mixer: Any, name: str, rows: int | None, columns: int | None = None) -> native.Weight:
        """A linear layer's weight of so many rows (N) and columns (K), read from the tensor; None for any number."""
        linear = self._part(mixer, name)
        _require(type(linear) is nn.Linear or getattr(type(linear), "readable_weight", False))
        _require(linear.bias is None)
        weight, scale = linear.weight, linear._parameters.get("weight_scale")
        n, k = weight.shape
        if scale is None:
            self._tensor(linear, (n, k))
        else:
            k = linear.in_features
            shapes, dtypes = packed_shapes(linear.bits, n, k), packed_dtypes(linear.bits)
            self._tensor(linear, shapes[0], dtype=dtypes[0])
            self._tensor(linear, shapes[1], "weight_scale", dtypes[1])
        _require(n == (n if rows is None else rows) and k == (k if columns is None else columns) and n > 0 < k)
        return native.weight(weight, k, scale)

    def _part(self, owner: nn.Module, name: str, kind: type[nn.Module] | None = None) -> Any:
        part: Any = owner._modules[name]
        self._module(part, kind or type(part))
        return part

    def _module(self, module: Any, kind: type[nn.Module]) -> None:
        """A module that has to be of a class and called as its class says."""
        self.modules.append(module)
        _require(is_called_plainly(module, kind))

    def _tensor(
        self, module: nn.Module, shape: tuple[int, ...], name: str = "weight", dtype: torch.dtype | None = None
    ) -> int:
        """The address of a parameter that is plain, of that shape, and of the run's dtype or another that is named."""
        tensor = module._parameters[name]
        assert tensor is not None
        _require(
            type(tensor) is nn.Parameter
            and tensor.is_cpu
            and tensor.layout is torch.strided
            and tensor.is_contiguous()
            and not tensor.is_neg()
            and tensor.shape == shape
            and tensor.dtype == (dtype or self.dtype)
        )
        return tensor.data_ptr()


class _NotThisOneError(Exception):
    """A block that native.c does not do."""


def _require(condition: bool) -> None:
    if not condition:
        raise _NotThisOneError

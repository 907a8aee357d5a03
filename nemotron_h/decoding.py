"""A few tokens through several layers in one call.

A layer's parts called one by one cost some 100 us of Python and dispatch; where a model is small, that is most of a
token. `steps` gives the layers as they are, or, for a few tokens on a CPU, stretches of them that native.c runs at
once, with the results of the calls bit for bit. A stretch asks every time whether a call of each of its modules would
be that class's forward and nothing else (no hook, no adapter), and otherwise calls them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import Cache
from transformers.activations import ReLUSquaredActivation

from .cache import GrowingLayer, MambaLayer
from .layers import NemotronHConv1d, NemotronHLinear, NemotronHRMSNorm, NemotronHRMSNormGated, unchanged
from .ops import FEW_TOKENS, native
from .ops.linear import few_rows

LINEAR_CLASSES: list[type[nn.Linear]] = [NemotronHLinear]
"""Classes of linear layers whose `weight` (and `weight_scale`) `native.linear` multiplies by."""

_DTYPES = (torch.float32, torch.bfloat16)
_plans: weakref.WeakKeyDictionary[nn.ModuleList, tuple[list[nn.Module], list[Any]]] = weakref.WeakKeyDictionary()


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
        or not native.serves(x_BLD)
        or torch_module._has_any_global_hook()
    ):
        return layers
    known = _plans.get(layers)
    now = list(layers._modules.values())
    if known is None or known[0] != now or not all(step.same_parts() for step in known[1] if isinstance(step, _Run)):
        known = _plans[layers] = now, _plan(now)
    if plainly_causal:
        return known[1]
    return [part for step in known[1] for part in (step.blocks if getattr(step, "attends", False) else (step,))]


def _plan(blocks: Iterable[Any]) -> list[Any]:
    """Neighbours that `_Run` takes as one of it, the others as they are."""
    found: list[Any] = []
    run: list[tuple[Any, _Parts]] = []
    for block in [*blocks, None]:
        parts = _Parts.of(block) if block is not None else None
        if run and (parts is None or parts.dtype != run[0][1].dtype):
            found.append(_Run(run))
            run = []
        if parts is not None:
            run.append((block, parts))
        elif block is not None:
            found.append(block)
    return found


class _Run:
    """Neighbouring layers, called like one."""

    def __init__(self, members: list[tuple[Any, _Parts]]) -> None:
        self.blocks = [block for block, _ in members]
        self.dtype = members[0][1].dtype
        self.attends = any(parts.struct.kind == native.ATTENTION for _, parts in members)
        self._members = [
            (parts.struct.kind, block.mixer.layer_idx) for block, parts in members if parts.struct.kind != native.MLP
        ]
        self._modules = [entry for _, parts in members for entry in parts.modules]
        self._places = [entry for _, parts in members for entry in parts.places]
        self._tensors = [entry for _, parts in members for entry in parts.tensors]
        self._structs = (native.Block * len(members))(*(parts.struct for _, parts in members))
        self._remembering = [i for i, (_, parts) in enumerate(members) if parts.struct.kind != native.MLP]

    def same_parts(self) -> bool:
        """Whether every module is still in its place, and every parameter where the structs point."""
        return all(owner.get(name) is part for owner, name, part in self._places) and all(
            tensor.data_ptr() == address for tensor, address in self._tensors
        )

    def __call__(self, x_BLD: Tensor, *, cache: Cache, **kwargs: Any) -> Tensor:
        if x_BLD.dtype == self.dtype and all(unchanged(module, kind) for module, kind in self._modules):
            structs = type(self._structs).from_buffer_copy(self._structs)  # of this call: threads may share a model
            layers = [(kind, cache.layers[idx]) for kind, idx in self._members]
            ready = zip(layers, self._remembering, strict=True)
            if all(_point_at(structs[i], kind, layer, x_BLD) for (kind, layer), i in ready):
                length = x_BLD.shape[1]
                recorded = self._records(structs, layers, x_BLD)
                y_BLD = x_BLD.clone(memory_format=torch.contiguous_format)
                native.blocks(structs, len(self.blocks), y_BLD)
                for record, mixer, inputs_BLK in recorded:
                    record.add(mixer, inputs_BLK)
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
            or window.numel() != window.shape[0] * sizes.width * (struct.first.N - struct.last.K - sizes.heads)
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
    """What native.c needs of one block, and what has to stay as it is for that."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.struct = native.Block()
        self.modules: list[tuple[nn.Module, type[nn.Module]]] = []
        self.places: list[tuple[dict[str, Any], str, Any]] = []  # modules and parameters, by their owners' dictionaries
        self.tensors: list[tuple[Tensor, int]] = []

    @classmethod
    def of(cls, block: Any) -> _Parts | None:
        """None for a block that must be called: other classes, biases, dtypes or activations than native.c knows."""
        try:
            parts = cls(block.norm.weight.dtype)
            parts._block(block)
        except (_NotThisOne, AttributeError, KeyError):
            return None
        return parts

    def _block(self, block: Any) -> None:
        from . import modeling

        _require(type(block) is modeling.NemotronHBlock and self.dtype in _DTYPES)
        _require(not block.residual_in_fp32 or self.dtype == torch.float32)
        self.modules.append((block, modeling.NemotronHBlock))
        mixer, struct = self._part(block, "mixer"), self.struct
        kinds: dict[type[nn.Module], Callable[[Any], None]] = {
            modeling.NemotronHMamba2Mixer: self._mamba,
            modeling.NemotronHAttention: self._attention,
            modeling.NemotronHMLP: self._mlp,
        }
        _require(type(mixer) in kinds)
        norm = self._part(block, "norm", NemotronHRMSNorm)
        struct.norm, struct.eps = self._tensor(norm), norm.variance_epsilon
        kinds[type(mixer)](mixer)

    def _mamba(self, mixer: Any) -> None:
        struct, conv = self.struct, self._part(mixer, "conv1d", NemotronHConv1d)
        struct.kind = native.MAMBA
        struct.first, struct.last = self._linear(mixer, "in_proj"), self._linear(mixer, "out_proj")
        _require(conv.activation in ("silu", "swish") and conv.weight.shape[-1] <= native.MOST_TAPS)
        struct.conv_weight = self._tensor(conv)
        struct.conv_bias = 0 if conv.bias is None else self._tensor(conv, "bias")
        struct.gated_norm = self._tensor(self._part(mixer, "norm", NemotronHRMSNormGated))
        for name in ("dt_bias", "A_log", "D"):
            setattr(struct, name, self._tensor(mixer, name, torch.float32))
        struct.mamba = native.Mamba(
            mixer.num_heads,
            mixer.head_dim,
            mixer.n_groups,
            mixer.ssm_state_size,
            conv.weight.shape[-1] - 1,
            *mixer.time_step_limit,
            mixer.norm.variance_epsilon,
        )

    def _attention(self, mixer: Any) -> None:
        struct = self.struct
        struct.kind = native.ATTENTION
        struct.first, struct.last = self._linear(mixer, "q_proj"), self._linear(mixer, "o_proj")
        struct.key, struct.value = self._linear(mixer, "k_proj"), self._linear(mixer, "v_proj")
        struct.head_dim, struct.scale = mixer.head_dim, mixer.scaling
        struct.key_heads = struct.key.N // mixer.head_dim
        _require(mixer.head_dim % 16 == 0)

    def _mlp(self, mixer: Any) -> None:
        self.struct.kind = native.MLP
        self.struct.first, self.struct.last = self._linear(mixer, "up_proj"), self._linear(mixer, "down_proj")
        self._part(mixer, "act_fn", ReLUSquaredActivation)

    def _linear(self, mixer: Any, name: str) -> native.Weight:
        linear = self._part(mixer, name)
        _require(type(linear) in LINEAR_CLASSES and linear.bias is None)
        scale = linear._parameters.get("weight_scale")
        self._tensor(linear, dtype=self.dtype if scale is None else linear.weight.dtype)
        if scale is not None:
            self._tensor(linear, "weight_scale", scale.dtype)
        return native.weight(linear.weight, linear.in_features, scale)

    def _part(self, owner: nn.Module, name: str, kind: type[nn.Module] | None = None) -> Any:
        """A module that has to be of a class, stay where it is and be called as its class says."""
        part = owner._modules[name]
        assert part is not None
        _require(kind is None or type(part) is kind)
        self.places.append((owner._modules, name, part))
        self.modules.append((part, type(part)))
        return part

    def _tensor(self, module: nn.Module, name: str = "weight", dtype: torch.dtype | None = None) -> int:
        """The address of a parameter that is plain and of the run's dtype, or of the one that is named."""
        tensor = module._parameters[name]
        _require(
            type(tensor) is nn.Parameter
            and tensor.is_cpu
            and tensor.layout is torch.strided
            and tensor.is_contiguous()
            and tensor.dtype == (dtype or self.dtype)
        )
        assert tensor is not None
        self.places.append((module._parameters, name, tensor))
        self.tensors.append((tensor, tensor.data_ptr()))
        return tensor.data_ptr()


class _NotThisOne(Exception):
    """A block that native.c does not do."""


def _require(condition: bool) -> None:
    if not condition:
        raise _NotThisOne

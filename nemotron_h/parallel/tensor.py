"""Tensor and expert parallelism: the plans, and what Mamba layers need beyond `transformers`' own styles.

`from_pretrained(folder, tp_plan="auto")` (or `distributed_config=DistributedConfig(tp_size=...)`) splits every layer
over the processes of a job by heads: rank r of n keeps

    attention      its n-th part of the query heads, and the key heads that those read
    Mamba          its n-th part of the heads and of the groups: of in_proj the rows of its z, x, B, C and dt, of conv1d
                   the channels of its x, B and C, its A_log, D, dt_bias and gated norm, its columns of out_proj
    MLP, experts   its n-th part of the inner width
    embeddings     its n-th part of the vocabulary, also of the head

Two collectives a Mamba layer, as an attention layer or an MLP has: the sum of the outputs, and that of the input's
gradients.

in_proj and conv1d are five and three matrices in one, of different heights, and a DTensor's placement only knows equal
pieces. They are kept as a DTensor with the rows **in the order of the ranks** (those of rank 0's z, x, B, C, dt, then
rank 1's), of which each has a plain `Shard(0)`; norms, clipping, optimizers and FSDP on top see nothing unusual. The
order is made while reading (`_RankRows`: each process reads its own rows of the file alone) and undone while saving.

Shape suffixes as in layers/__init__.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, ColwiseParallel, TensorParallelLayer

from ..configuration import NemotronHConfig
from .fsdp import fsdp_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:
    _Base = object


# --- The plans ---------------------------------------------------------------------------------------------------


def tensor_parallel_plan(config: NemotronHConfig) -> dict[str, str]:
    """`transformers`' tensor-parallel plan of a model's layers (the base model's names): module -> style."""
    kinds, mixer = set(config.layers_block_type), "layers.*.mixer"
    plan = {"embeddings": "embedding_rowwise", mixer: "nemotron_h_mixer"}
    if "mamba" in kinds:
        plan |= {f"{mixer}.{name}": "nemotron_h_rows" for name in ("in_proj", "conv1d", "norm")}
        plan |= {f"{mixer}.out_proj": "rowwise"}
    if "attention" in kinds:
        plan |= {f"{mixer}.q_proj": "colwise", f"{mixer}.o_proj": "rowwise"}
        plan |= {f"{mixer}.{name}": "nemotron_h_keys" for name in ("k_proj", "v_proj")}
    if "mlp" in kinds:
        plan |= {f"{mixer}.up_proj": "colwise", f"{mixer}.down_proj": "rowwise"}
    if "moe" in kinds:
        plan |= {
            f"{mixer}.shared_experts.up_proj": "colwise",
            f"{mixer}.shared_experts.down_proj": "rowwise",
            f"{mixer}.experts.up_proj": "colwise",
            f"{mixer}.experts.down_proj": "rowwise",
            f"{mixer}.experts": "moe_tp_experts",
        }
        if config.moe_latent_size:
            plan |= {
                f"{mixer}.fc1_latent_proj": "colwise_gather_output",
                f"{mixer}.fc2_latent_proj": "rowwise_split_input",
            }
    return plan


def expert_parallel_plan(config: NemotronHConfig) -> dict[str, str]:
    """Whole routed experts on different processes; `transformers`' styles."""
    if "moe" not in config.layers_block_type:
        return {}
    experts = "layers.*.mixer.experts"
    return {
        f"{experts}.up_proj": "grouped_gemm",
        f"{experts}.down_proj": "grouped_gemm",
        experts: "ep_dispatch_experts",
    }


# --- Rows in the order of the ranks ------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankOrder:
    """The rows of a matrix that is several in one, each split evenly over `world` ranks, rank after rank.

    Args:
        parts: rows of each part; multiples of `world`.
    """

    parts: tuple[int, ...]
    world: int

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Where rows [start, stop) of the ranks' order lie in the published order, as [from, to) spans."""
        begins = [0, *accumulate(self.parts)]
        lengths = [part // self.world for part in self.parts]
        at = 0
        for rank in range(self.world):
            for begin, length in zip(begins, lengths, strict=False):
                first, last = max(start, at), min(stop, at + length)
                if first < last:
                    yield begin + rank * length + first - at, begin + rank * length + last - at
                at += length

    def published(self, tensor: Tensor) -> Tensor:
        """The tensor with its rows, given in the ranks' order, in the published one."""
        rows = torch.cat([torch.arange(*span) for span in self.spans(0, sum(self.parts))])
        return tensor[torch.argsort(rows).to(tensor.device)]


class _RankRows:
    """A tensor of a file, not read yet, as the library's loader sees it: its rows in the ranks' order.

    It has the three methods of safetensors' slices that the loader uses; an index reads the rows it names alone.
    """

    def __init__(self, source: Any, order: RankOrder) -> None:
        self._source = source
        self._order = order

    def get_shape(self) -> list[int]:
        shape = self._source.shape if isinstance(self._source, Tensor) else self._source.get_shape()
        return list(shape)

    def get_dtype(self) -> Any:
        return self._source.dtype if isinstance(self._source, Tensor) else self._source.get_dtype()

    def __getitem__(self, index: Any) -> Tensor:
        height = self.get_shape()[0]
        if height != sum(self._order.parts):  # not the config's: as it is, and the loader says so
            return cast(Tensor, self._source[index])
        index = index if isinstance(index, tuple) else (index,)
        rows = index[0] if isinstance(index[0], slice) else slice(None)
        start, stop, _ = rows.indices(height)
        rest = index[1:] if isinstance(index[0], slice) else ()
        pieces = [self._source[(slice(*span), *rest)] for span in self._order.spans(start, stop)]
        return torch.cat(pieces) if pieces else cast(Tensor, self._source[(slice(0, 0), *rest)])


_BY_PARTS = re.compile(r"(?:^|\.)(layers\.\d+\.mixer\.(?:in_proj|conv1d))\.(?:weight|bias)$")


def _orders(model: nn.Module) -> dict[str, RankOrder]:
    """`layers.N.mixer.in_proj` and the like -> the order of its rows, where they are split over ranks."""
    found: dict[str, RankOrder] = {}
    for name, module in model.named_modules():
        if (order := getattr(module, "rank_order", None)) is not None:
            found["layers." + name.rpartition("layers.")[2]] = order
    return found


def _order_of(name: str, orders: Mapping[str, RankOrder]) -> RankOrder | None:
    match = _BY_PARTS.search(name)
    # mtp.layers.N is another layer N, and whole on every rank
    return orders.get(match[1]) if match and not name.startswith("mtp.") else None


# --- The styles --------------------------------------------------------------------------------------------------


class _SumGradient(torch.autograd.Function):
    """Its input; the gradient summed over the ranks, each of which used the whole input for a part of the output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        dx = dx.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(dx, group=ctx.group)
        return dx, None


@contextmanager
def _local_parameters(module: nn.Module) -> Iterator[None]:
    """The module's own sharded parameters as this rank's plain tensors; gradients go back to the DTensors."""
    from torch.distributed.tensor import DTensor

    parameters = module._parameters
    sharded = {name: parameter for name, parameter in parameters.items() if isinstance(parameter, DTensor)}
    for name, parameter in sharded.items():
        parameters[name] = cast(Any, parameter).to_local()
    try:
        yield
    finally:
        parameters.update(cast(dict[str, Any], sharded))


def _shard(module: nn.Module, name: str, mesh: Any, dim: int | None) -> None:
    """Put a DTensor in a parameter's place, split along `dim` or whole on every rank; on meta, before loading."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if (whole := module._parameters.get(name)) is not None:
        placement = Replicate() if dim is None else Shard(dim)
        module._parameters[name] = nn.Parameter(
            distribute_tensor(whole, mesh, [placement], src_data_rank=None), requires_grad=whole.requires_grad
        )


class RowsParallel(TensorParallelLayer):  # type: ignore[misc]
    """Rows split evenly, and the module run on this rank's: in_proj, conv1d and the gated norm of a Mamba mixer.

    Around each module and not around the mixer: FSDP2 brings a module's parameters in when that module is called.
    """

    def shard_param(self, module: Any, param: str, mesh: Any) -> None:
        _shard(module, param, mesh, 0)

    def context_around_forward(self, module: Any, mesh: Any) -> Any:
        return _local_parameters(module)


class MixerParallel(RowsParallel):
    """A mixer: of Mamba's, its parts run on this rank's heads and groups; of attention's, its heads are counted.

    MLP and MoE mixers hold nothing themselves: their linear layers have styles of their own.
    """

    def install_forward(self, module: Any, mesh: Any) -> Any:
        world = mesh.size()
        if hasattr(module, "in_proj"):
            self._localise(module, world)
            super().install_forward(module, mesh)
        elif hasattr(module, "q_proj"):
            # one key head, where there are fewer than ranks
            keys = max(1, module.config.num_key_value_heads // world)
            module.num_key_value_groups = module.config.num_attention_heads // world // keys
        return module

    @staticmethod
    def _localise(mixer: Any, world: int) -> None:
        inner, state = mixer.intermediate_size, mixer.n_groups * mixer.ssm_state_size
        mixer.in_proj.rank_order = RankOrder((inner, inner, state, state, mixer.num_heads), world)
        mixer.conv1d.rank_order = RankOrder((inner, state, state), world)
        for name in ("num_heads", "n_groups", "intermediate_size", "conv_dim"):
            setattr(mixer, name, getattr(mixer, name) // world)
        mixer.norm.n_groups //= world

    def transform_inputs_pre_forward(self, module: Any, args: Any, kwargs: Any, mesh: Any) -> Any:
        return (_SumGradient.apply(args[0], mesh.get_group()), *args[1:]), kwargs


class KeysParallel(ColwiseParallel):  # type: ignore[misc]
    """k_proj and v_proj by heads; where there are fewer heads than ranks, whole on every rank, which uses the rows of
    the head that its queries read."""

    def shard_param(self, module: Any, param: str, mesh: Any) -> None:
        if _heads(module) % mesh.size() == 0:
            super().shard_param(module, param, mesh)
        else:
            _shard(module, param, mesh, None)

    def install_forward(self, module: Any, mesh: Any) -> Any:
        heads, world = _heads(module), mesh.size()
        if heads % world == 0:
            return super().install_forward(module, mesh)
        width = module.out_features // heads
        first = width * (mesh.get_local_rank() * heads // world)
        rows = slice(first, first + width)

        def forward(x: Tensor) -> Tensor:
            group = mesh.get_group()
            weight = _SumGradient.apply(module.weight.to_local(), group)[rows]
            bias = None if module.bias is None else _SumGradient.apply(module.bias.to_local(), group)[rows]
            return nn.functional.linear(_SumGradient.apply(x, group), weight, bias)

        module.forward = forward
        return module


def _heads(projection: Any) -> int:
    return cast(int, projection.key_heads)


for _name, _style in {
    "nemotron_h_mixer": MixerParallel(),
    "nemotron_h_rows": RowsParallel(),
    "nemotron_h_keys": KeysParallel(),
}.items():
    ALL_PARALLEL_STYLES.register(_name, _style)


# --- What the model class gains ----------------------------------------------------------------------------------


class Distributed(_Base):
    """Plans, loading and saving of a model that is split over processes; a base of the model classes."""

    def init_parallel_plans(self) -> None:
        super().init_parallel_plans()
        if self.base_model is self:
            config = cast(NemotronHConfig, self.config)
            self._tp_plan = {**(self._tp_plan or {}), **tensor_parallel_plan(config)}
            self._ep_plan = {**(self._ep_plan or {}), **expert_parallel_plan(config)}
            # in place of the configs' default, which names parts as other models do
            self._fsdp_plan = fsdp_plan(config)

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        world = getattr(distributed_config, "tp_size", None) or 1
        if world > 1 and getattr(distributed_config, "tp_plan", None) != {}:
            check_divides(model.config, world)
            for module in model.modules():
                if hasattr(module, "k_proj"):
                    module.k_proj.key_heads = module.v_proj.key_heads = model.config.num_key_value_heads
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        load: Callable[..., Any] = PreTrainedModel._load_pretrained_model
        if not (orders := _orders(model)):
            return load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        with ExitStack() as opened:
            if state_dict is None:
                state_dict = {}
                for file in checkpoint_files:
                    state_dict |= _unread(file, opened)
            for name in state_dict:
                if (order := _order_of(name, orders)) is not None:
                    state_dict[name] = _RankRows(state_dict[name], order)
            return load(model, state_dict, None, load_config, *args, **kwargs)

    def gather_sharded_state_dict_for_save(self, model_to_save: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        gathered = super().gather_sharded_state_dict_for_save(model_to_save, state_dict, *args, **kwargs)
        if orders := _orders(model_to_save):
            for name in gathered:
                if (order := _order_of(name, orders)) is not None:
                    gathered[name] = order.published(gathered[name])
        if model_to_save.config.tie_word_embeddings and "model.embeddings.weight" in gathered:
            gathered.pop("lm_head.weight", None)  # gathered, it no longer shares memory by which the library knows it
        return gathered

    def save_distributed_checkpoint(self, model_to_save: Any, *args: Any, **kwargs: Any) -> Any:
        if orders := _orders(model_to_save):
            world = next(iter(orders.values())).world
            raise ValueError(
                f"distributed_checkpoint=True would write in_proj and conv1d with their rows in the order of these "
                f"{world} tensor-parallel ranks, which nothing else reads: save without it."
            )
        return super().save_distributed_checkpoint(model_to_save, *args, **kwargs)

    def _load_and_finalize_distributed_pretrained_model(self, *args: Any, **kwargs: Any) -> Any:
        if _orders(self):
            raise ValueError(
                "A distributed checkpoint (DCP) has in_proj and conv1d in the published order of rows, which "
                "tensor-parallel ranks cannot read in parts: save the model without distributed_checkpoint=True."
            )
        return super()._load_and_finalize_distributed_pretrained_model(*args, **kwargs)


def _unread(file: str, opened: ExitStack) -> dict[str, Any]:
    """A checkpoint file's tensors by name, of safetensors as slices that are not read yet."""
    if str(file).endswith(".safetensors"):
        from safetensors import safe_open

        handle = opened.enter_context(safe_open(file, framework="pt"))
        return {name: handle.get_slice(name) for name in handle.keys()}
    from transformers.modeling_utils import load_state_dict

    return dict(load_state_dict(file))


def check_divides(config: NemotronHConfig, world: int) -> None:
    """Whether so many ranks can split the model.

    Raises:
        ValueError: a size that the ranks do not divide, or a quantised model.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"The model is quantised and tp_size is {world}: tensor parallelism splits plain weights only, so load it "
            "without quantize= (or convert the folder first), or use one process."
        )
    kinds, sizes = set(config.layers_block_type), {"vocab_size": config.vocab_size}
    if "mamba" in kinds:
        sizes |= {"mamba_num_heads": config.mamba_num_heads, "n_groups": config.n_groups}
    if "attention" in kinds:
        sizes["num_attention_heads"] = config.num_attention_heads
    if "mlp" in kinds:
        for index, kind in enumerate(config.layers_block_type):
            if kind == "mlp":
                sizes[f"intermediate_size (layer {index})"] = config.mlp_intermediate_size(index)
    if "moe" in kinds:
        names = ("moe_intermediate_size", "moe_shared_expert_intermediate_size", "moe_latent_size")
        sizes |= {name: getattr(config, name) or 0 for name in names}
    for name, size in sizes.items():
        if size % world:
            raise ValueError(f"tp_size is {world}, which does not divide {name}={size}: choose one that does.")
    keys = config.num_key_value_heads
    if "attention" in kinds and keys % world and world % keys:
        raise ValueError(
            f"tp_size is {world}, and num_key_value_heads={keys} neither splits over it nor divides it: choose one of "
            "which either holds."
        )


__all__ = [
    "Distributed",
    "RankOrder",
    "check_divides",
    "expert_parallel_plan",
    "tensor_parallel_plan",
]

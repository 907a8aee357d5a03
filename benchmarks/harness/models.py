"""The models that are measured: ours and `transformers`' own class over the same tensors, and what stands beside them.

Dimensions of Nemotron Nano 9B v2 in nine layers, random weights. Nothing here is loaded from anywhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.nemotron_h import modeling_nemotron_h as library

from nemotron_h import NemotronHCache, NemotronHConfig, NemotronHForCausalLM, ops
from nemotron_h.compat import CACHE_NAME
from nemotron_h.generation.chunked_prefill import chunk_length

from .measure import seconds

PATTERN = "M-M*-M-M-"
DENSE = {
    "full": {
        "vocab_size": 8192,
        "hidden_size": 4480,
        "intermediate_size": 15680,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 80,
        "n_groups": 8,
        "ssm_state_size": 128,
        "conv_kernel": 4,
        "chunk_size": 128,
        "max_position_embeddings": 131072,
    },
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "n_groups": 2,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "chunk_size": 16,
        "max_position_embeddings": 4096,
    },
}
MOE_PATTERN = "MEM*EME"
MOE = {
    "full": {
        **DENSE["full"],
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "mamba_num_heads": 32,
        "mamba_head_dim": 64,
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 512,
        "moe_shared_expert_intermediate_size": 1024,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    "tiny": {
        **DENSE["tiny"],
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 64,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
}
_BLOCK = 1 << 22


def config(dims: str, pattern: str = PATTERN, moe: bool = False, **overrides: Any) -> NemotronHConfig:
    return NemotronHConfig(**{**(MOE if moe else DENSE)[dims], "hybrid_override_pattern": pattern, **overrides})


def describe(config: NemotronHConfig) -> dict[str, Any]:
    """The dimensions as a report carries them."""
    names = (*DENSE["full"], *(MOE["full"] if config.has_moe else ()))
    return {"pattern": config.hybrid_override_pattern, **{name: getattr(config, name) for name in names}}


@torch.no_grad()
def ours(config: NemotronHConfig, dtype: torch.dtype = torch.bfloat16) -> NemotronHForCausalLM:
    """Our model with random weights in memory of their own.

    Matrices are one block of normal numbers over and over: drawing a billion would take longer than some benchmarks,
    and no speed depends on them.
    """
    with torch.device("meta"):
        model = NemotronHForCausalLM(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(_BLOCK, generator=generator) * config.initializer_range).to(dtype)

    def filled(name: str, like: Tensor) -> Tensor:
        uniform = torch.rand(like.shape, generator=generator) if like.numel() < 1 << 20 else torch.empty(0)
        if name.endswith("A_log"):
            value = (1 + 15 * uniform).log()
        elif name.endswith("dt_bias"):  # the inverse of softplus at time steps of 0.001 to 0.1
            dt = torch.exp(math.log(1e-3) + uniform * (math.log(0.1) - math.log(1e-3)))
            value = dt + torch.log(-torch.expm1(-dt))
        elif name.endswith(("norm.weight", "norm_f.weight", ".D")):
            value = torch.ones(like.shape)
        elif "conv1d" in name:
            value = uniform - 0.5
        elif name.endswith("e_score_correction_bias"):
            value = torch.zeros(like.shape)
        else:
            value = torch.empty(like.shape, dtype=like.dtype)
            flat, start = value.view(-1), int(torch.randint(0, _BLOCK, (), generator=generator))
            rolled = block.roll(start)
            for part in flat.split(_BLOCK):
                part.copy_(rolled[: part.numel()])
        return value.to(like.dtype)

    tensors = {name: filled(name, like) for name, like in model.state_dict().items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def their_config(settings: dict[str, Any]) -> Any:
    """The config of `transformers`' own class; the pattern alone, as before 5.20 it reads it."""
    left_out = ("architectures", "transformers_version", "layers_block_type", "torch_dtype")
    kept = {key: value for key, value in settings.items() if key not in left_out}
    return library.NemotronHForCausalLM.config_class(**kept)


def theirs(model: NemotronHForCausalLM) -> nn.Module:
    """`transformers`' own class on the very tensors of ours, so that both fit in memory.

    Only A_log, D and dt_bias are copies: loaded in bfloat16, its own are bfloat16.
    """
    tensors = {
        name: tensor.to(model.dtype) if name.endswith(("A_log", ".D", "dt_bias")) else tensor
        for name, tensor in model.state_dict().items()
    }
    with torch.device("meta"):
        twin = library.NemotronHForCausalLM(their_config(model.config.to_dict()))
    twin.load_state_dict(tensors, assign=True)
    return twin.eval()


def load_theirs(folder: str) -> nn.Module:
    """`transformers`' own from_pretrained on a folder, in the folder's dtype."""
    settings = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return library.NemotronHForCausalLM.from_pretrained(folder, config=their_config(settings), dtype="auto")


@dataclass
class Model:
    """Ours or theirs, as a user runs it: `no_grad`, a cache, the last position's logits."""

    name: str
    model: Any
    new_cache: Callable[[], Any]
    piece: int | None = None  # tokens of a long row that go through the model at a time; None: all of them

    @property
    def kinds(self) -> list[str]:
        return [{"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}[letter] for letter in self.pattern]

    @property
    def pattern(self) -> str:
        return self.model.config.hybrid_override_pattern

    @torch.no_grad()
    def forward(self, ids: Tensor, cache: Any) -> Any:
        return self.model(ids, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)

    def prefill(self, length: int) -> float:
        ids, cache = tokens(self.model.config, length), self.new_cache()
        return seconds(lambda: self.forward(ids, cache))

    @torch.no_grad()
    def layer(self, kind: str, length: int) -> float:
        """One layer of a kind over hidden states of that length, called as the model calls it, filling a cache."""
        index = self.kinds.index(kind)
        x_BLD = torch.randn(1, length, self.model.config.hidden_size).to(self.model.dtype)
        block, settings = self.model.model.layers[index], {**self._settings, "cache": self.new_cache()}
        parts = x_BLD.split(self.piece or length, dim=1)
        return sum(seconds(lambda part=part: block(part, **settings)) for part in parts)

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """What the model passes to its layers in a prefill besides hidden states, cache and tensors of the length."""
        seen: dict[str, Any] = {}
        hook = self.model.model.layers[0].register_forward_pre_hook(
            lambda _block, _inputs, settings: seen.update(settings), with_kwargs=True
        )
        self.prefill(8)
        hook.remove()
        return {name: value for name, value in seen.items() if not isinstance(value, Tensor)}

    def decode(self, cache: Any, count: int) -> list[float]:
        """Seconds of each of so many tokens, one forward each."""
        token = tokens(self.model.config, 1)
        return [seconds(lambda: self.forward(token, cache)) for _ in range(count)]


def pair(model: NemotronHForCausalLM) -> tuple[Model, Model]:
    twin = theirs(model)
    piece = chunk_length(model.config, 1, torch.device("cpu"), model.dtype)
    return (
        Model("nemotron-h", model, lambda: NemotronHCache(model.config), piece),
        Model("transformers", twin, lambda: DynamicCache(config=twin.config)),
    )


def tokens(config: NemotronHConfig, length: int) -> Tensor:
    return torch.randint(3, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))


@dataclass
class Linears:
    """The floor: the model's Linears and nothing else, as 2-D calls in the model's dtype with the model's rows."""

    name: str
    model: NemotronHForCausalLM
    linear: Callable[[Tensor, Tensor], Tensor] = F.linear

    def weights(self, index: int) -> Iterator[Tensor]:
        for module in self.model.model.layers[index].modules():
            if isinstance(module, nn.Linear):
                yield module.weight.detach()

    def _run(self, layers: list[int], rows: int, head: bool) -> float:
        weights = [weight for index in layers for weight in self.weights(index)]
        inputs = {k: torch.randn(rows, k).to(self.model.dtype) for k in {weight.shape[1] for weight in weights}}
        top, last = self.model.lm_head.weight.detach(), torch.randn(1, self.model.config.hidden_size)

        def run() -> None:
            for weight in weights:
                self.linear(inputs[weight.shape[1]], weight)
            if head:
                self.linear(last.to(top.dtype), top)

        with torch.no_grad():
            return seconds(run)

    def prefill(self, length: int) -> float:
        return self._run(list(range(self.model.config.num_hidden_layers)), length, head=True)

    def layer(self, kind: str, length: int) -> float:
        return self._run([self.model.config.layers_block_type.index(kind)], length, head=False)

    def decode(self, count: int) -> list[float]:
        return [self.prefill(1) for _ in range(count)]


def floors(model: NemotronHForCausalLM) -> list[Linears]:
    """torch's own linear, and the package's fastest where it has one."""
    found = [Linears("bare F.linear", model)]
    if hasattr(ops, "linear"):
        found.append(Linears("bare ops.linear", model, ops.linear))
    return found


def linear_bytes(model: nn.Module) -> int:
    """Bytes of weights that one token reads: every Linear once, scales included (of the embedding it is a row)."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    tensors = [tensor for module in linears for tensor in (module.weight, getattr(module, "weight_scale", None))]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@torch.no_grad()
def filled_caches(ours: Model, twin: Model, length: int) -> tuple[Any, Any]:
    """Both models' caches as after `length` tokens, with the same random keys, values, windows and states.

    A prefill of that length would take minutes, and the time of a token does not depend on what was in it.
    """
    settings, dtype = ours.model.config, ours.model.dtype
    mine, other = ours.new_cache(), twin.new_cache()
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for index, kind in enumerate(settings.layers_block_type):
        if kind == "mamba":
            window = normal(1, settings.conv_dim, settings.conv_kernel).to(dtype)
            state = normal(1, settings.mamba_num_heads, settings.mamba_head_dim, settings.ssm_state_size)
            mine.layers[index].update(window[..., 1:].clone(), state.clone(), length)
            other.update_conv_state(window, index, conv_kernel_size=settings.conv_kernel)
            other.update_recurrent_state(state, index)
        elif kind == "attention":
            shape = (1, settings.num_key_value_heads, length, settings.head_dim)
            keys, values = normal(*shape).to(dtype), normal(*shape).to(dtype)
            mine.update(keys.clone(), values.clone(), index)
            other.update(keys, values, index)
    return mine, other


class ReadyNumbers(nn.Module):
    """In a Linear's place: writes an output of the right shape and computes nothing.

    For measuring what is around the Linears at lengths where they alone would take all the time there is.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.row = nn.Parameter((torch.randn(linear.out_features) * 0.5).to(linear.weight.dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_empty(*x.shape[:-1], self.row.shape[0])
        y.copy_(self.row)
        return y


def without_linears(model: nn.Module, head: bool = True) -> nn.Module:
    """In place: every Linear below `model` becomes `ReadyNumbers`; the head stays unless `head` is false."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and not (head and name == "lm_head"):
                setattr(module, name, ReadyNumbers(child))
    return model


@torch.no_grad()
def quantised(model: NemotronHForCausalLM, bits: int) -> NemotronHForCausalLM | None:
    """A second model whose layers' Linears are quantised as `from_pretrained(..., quantize=...)` has them, and whose
    other tensors are the first one's; None where the package cannot quantise.

    A weight's first rows are quantised and stand for all of its rows: no speed depends on the numbers.
    """
    try:
        from nemotron_h.quantization.int8_int4 import QuantizedLinear
    except ImportError:
        return None
    with torch.device("meta"):
        second = NemotronHForCausalLM(model.config).to(model.dtype)
    second.load_state_dict(model.state_dict(), assign=True)
    for name, linear in [*second.model.named_modules()]:
        if not isinstance(linear, nn.Linear):
            continue
        rows = min(linear.out_features, 256)
        parts = ops.quantize_weight(linear.weight[:rows].detach(), bits)
        packed = QuantizedLinear(
            linear.in_features, linear.out_features, bits, linear.bias is not None, device="meta", dtype=model.dtype
        )
        for key, part in zip(("weight", "weight_scale"), parts, strict=True):
            whole = part.repeat(-(-linear.out_features // rows), *[1] * (part.ndim - 1))[: linear.out_features]
            setattr(packed, key, nn.Parameter(whole.clone(), requires_grad=False))
        if linear.bias is not None:
            packed.bias = linear.bias
        second.model.set_submodule(name, packed)
    return second.eval()

"""Whose a snapshot is: what of a config a state depends on, and a digest of the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from ..configuration import NemotronHConfig
from .snapshot import short

# What a state depends on beside the weights. The state's own dtype is said apart.
ESSENTIALS = (
    "layers_block_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "mamba_num_heads",
    "mamba_head_dim",
    "n_groups",
    "ssm_state_size",
    "conv_kernel",
    "time_step_limit",
    "layer_norm_epsilon",
    "mamba_hidden_act",
    "mlp_hidden_act",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "moe_latent_size",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
)


@dataclass(frozen=True)
class Origin:
    """Whose a snapshot is, in what a file says of it: what of the config a state depends on, the model's dtype and its
    weights' digest; both "" for a config alone."""

    essentials: dict[str, Any]
    dtype: str = ""
    weights: str = ""


def origin(model: Any, digest: str = "") -> Origin:
    """Of a model, whose `weights_digest` may be known already, or of a config."""
    config, module = config_of(model)
    if module is None:
        return Origin(essentials(config))
    return Origin(essentials(config), short(module.dtype), digest or weights_digest(module))


def essentials(config: NemotronHConfig) -> dict[str, Any]:
    """What of a config a state depends on, as JSON has it."""
    return dict(json.loads(json.dumps({name: getattr(config, name, None) for name in ESSENTIALS})))


@torch.no_grad()
def weights_digest(model: torch.nn.Module) -> str:
    """A digest of every parameter and buffer, and of which adapters are on.

    Of each tensor it takes a sum of all its bytes, the same on every device, and a few of its numbers. A change of one
    number, or a step of training, makes it another one; two models with the same are equal in all likelihood, which is
    no proof. Parameters that are not in memory (offloaded ones) go in by name and shape.
    """
    digest = hashlib.sha256()
    parts: dict[torch.device, list[Tensor]] = {}
    for name, tensor in _named_tensors(model):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if _here(tensor):
            parts.setdefault(tensor.device, []).extend((_summed(tensor), *_few(tensor)))
    for together in parts.values():
        digest.update(torch.cat(together).cpu().numpy().tobytes())
    digest.update(_adapters(model).encode())
    return digest.hexdigest()


_KNOWN: WeakKeyDictionary[torch.nn.Module, tuple[str, str]] = WeakKeyDictionary()


@torch.no_grad()
def known_digest(model: torch.nn.Module) -> str:
    """`weights_digest`, worked out again only where a tensor has been written into since, or is another one.

    Writing through `tensor.data` is not counted by PyTorch, and is seen here by the few numbers alone.
    """
    digest = hashlib.sha256(_adapters(model).encode())
    parts: dict[torch.device, list[Tensor]] = {}
    for name, tensor in _named_tensors(model):
        if tensor.is_inference():  # its changes are not counted
            return weights_digest(model)
        at = tensor.data_ptr() if _here(tensor) else None
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{tensor._version}{at}".encode())
        if _here(tensor):
            parts.setdefault(tensor.device, []).extend(_few(tensor))
    for together in parts.values():
        digest.update(torch.cat(together).cpu().numpy().tobytes())
    now = digest.hexdigest()
    before, known = _KNOWN.get(model, ("", ""))
    if before != now:
        known = weights_digest(model)
        _KNOWN[model] = now, known
    return known


def _named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        tensor: Tensor = parameter.detach()
        yield name, getattr(tensor, "to_local", lambda kept=tensor: kept)()


def _here(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and tensor.numel() > 0


def _adapters(model: torch.nn.Module) -> str:
    return "".join(
        f"{module.disable_adapters}{module.active_adapters}"
        for module in model.modules()
        if hasattr(module, "disable_adapters") and hasattr(module, "active_adapters")
    )


def _summed(tensor: Tensor) -> Tensor:
    """Eight bytes that change with any one number: the sums of 8 KiB each as int64, the i-th taken 2 i + 1 times."""
    data = tensor.reshape(-1).view(torch.uint8)
    if len(data) % 8:
        data = F.pad(data, (0, -len(data) % 8))
    if data.storage_offset() % 8:
        data = data.clone()
    words = data.view(torch.int64)
    even = len(words) // 1024 * 1024
    sums = torch.cat([words[:even].view(-1, 1024).sum(1), words[even:].sum().view(1)])
    odd = torch.arange(1, 2 * len(sums), 2, device=sums.device)
    return (sums * odd).sum().view(1).view(torch.uint8)


def _few(tensor: Tensor) -> Iterator[Tensor]:
    """Bytes of up to eight numbers of up to four rows."""
    while tensor.dim() > 2:
        tensor = tensor[tensor.shape[0] // 2]
    rows = [tensor] if tensor.dim() < 2 else [tensor[i * (len(tensor) - 1) // 3] for i in range(min(4, len(tensor)))]
    for row in rows:
        row = row.reshape(-1)
        step = max(1, len(row) // 8)
        yield row[::step][:8].contiguous().view(torch.uint8)


def config_of(model: Any) -> tuple[Any, Any]:
    """(config, module or None) of a model, a wrapped one (PEFT's), or a config."""
    config = getattr(model, "config", model)
    if not hasattr(config, "layers_block_type"):
        raise ValueError(
            f"A cache is saved and loaded with its model or its config, not with a {type(model).__name__}: pass "
            "model=model."
        )
    return config, model if config is not model else None

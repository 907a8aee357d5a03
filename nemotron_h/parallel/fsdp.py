"""FSDP2: what is gathered together, and groups of one dtype for a model that is float32 in places."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..configuration import NemotronHConfig
from ..layers.parts import Float32Parameters

_MAMBA_PARTS = ("in_proj", "conv1d", "norm", "out_proj")


def fsdp_plan(config: NemotronHConfig) -> dict[str, str]:
    """What `transformers`' FSDP2 gathers together.

    FSDP2 wants one dtype in each group. The library gives the modules with float32 parameters a group of their own, and
    a Mamba mixer's would hold all of the mixer: so its parts come first, and A_log, D and dt_bias remain. An older
    transformers, which makes no such groups, shards models of one dtype alone, and outer modules before inner ones.
    """
    plan = {"embeddings": "free_full_weight", "layers.*": "free_full_weight", "norm_f": "keep_full_weight"}
    if "mamba" in config.layers_block_type and hasattr(PreTrainedModel, "_resolve_parallel_plans"):
        plan |= {f"layers.*.mixer.{name}": "free_full_weight" for name in _MAMBA_PARTS}
    return plan


def keep_float32(model: nn.Module, mesh: Any = None, **policies: Any) -> int:
    """Give what is float32 in a half-precision model FSDP2 groups of their own, before FSDP2 takes the model.

    FSDP2 gathers one dtype a group, and casts what it gathers to the mixed-precision dtype: left to it, a model with
    float32 A_log, D, dt_bias and routers beside bfloat16 weights is refused, and under `mixed_precision: bf16` they are
    rounded. Call it after the process group is there (after `TrainingArguments(...)` or `Accelerator()`) and before
    `trainer.train()`, `accelerator.prepare(model)` or `fully_shard(model)`, which leave finished groups alone.

    Args:
        mesh: the device mesh that FSDP2 gets for the rest; None for all processes.
        policies: arguments of `fully_shard` for the Mamba layers' other parameters, such as
            `mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)`. Their parameters are then cast as
            `accelerate` casts the rest.

    Returns:
        How many groups of float32 parameters were made.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    own = {**policies, "mp_policy": MixedPrecisionPolicy()}
    groups = 0
    for module in list(model.modules()):
        if isinstance(module, Float32Parameters):
            if parts := [part for part in module.children() if list(part.parameters())]:
                fully_shard(parts, mesh=mesh, **policies)
            fully_shard(module, mesh=mesh, **own)
            groups += 1
    return groups


__all__ = ["fsdp_plan", "keep_float32"]

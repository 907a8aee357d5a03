"""The pattern families that the behaviours are tested over, as small models whose time steps reach down to 1e-5.

A default random model has time steps near 0.01 and hides what this package exists for; here `dt_bias` is spread
over [-12, 1].
"""

from __future__ import annotations

import os

import torch

from nemotron_h import NemotronHConfig, NemotronHForCausalLM

_SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # not hidden_size / heads = 8
    "head_dim": 12,
    # d_inner = 48, not expand * hidden_size = 64
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "chunk_size": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
}
FAMILIES = {
    "dense": {"hybrid_override_pattern": "M-M*-M-"},
    "moe": {"hybrid_override_pattern": "MEM*EME", **_MOE},
    "latent": {"hybrid_override_pattern": "MEM*EME", **_MOE, "moe_latent_size": 20},
    "mamba": {"hybrid_override_pattern": "MM-M"},
    "attention": {"hybrid_override_pattern": "*-*-"},
    "tied": {"hybrid_override_pattern": "M*-", "tie_word_embeddings": True},
}


def small_config(family: str = "dense", **overrides) -> NemotronHConfig:
    return NemotronHConfig(**{**_SMALL, **FAMILIES[family], **overrides})


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights under which every part of the model speaks, in place."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low)

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("dt_bias"):
            uniform(tensor, -12.0, 1.0)
        elif name.endswith("A_log"):
            uniform(tensor, -1.0, 2.5)
        elif name.endswith((".D", "norm.weight", "norm_f.weight", "layernorm.weight")):
            uniform(tensor, 0.5, 1.5)
        elif name.endswith("e_score_correction_bias"):
            uniform(tensor, -0.3, 0.3)
        elif "conv1d" in name:
            uniform(tensor, -0.8, 0.8)
        else:
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.25)


def small_model(
    family: str = "dense", dtype: torch.dtype = torch.float64, seed: int = 0, **overrides
) -> NemotronHForCausalLM:
    model = NemotronHForCausalLM(small_config(family, **overrides)).to(dtype).eval()
    randomise(model, seed)
    return model


def tokens(batch: int, length: int, vocab: int = 97, seed: int = 1) -> torch.Tensor:
    """(batch, length) ids, none of them special."""
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


WORST: dict[str, float] = {}
"""Test file -> the largest `relative_difference` it saw; printed at the end of the run (see conftest.py)."""


def relative_difference(a: torch.Tensor, b: torch.Tensor, record: bool = True) -> float:
    """Largest difference over the largest magnitude of `b`; NaN counts as infinite."""
    difference = ((a - b).abs().max() / b.abs().max()).item()
    if difference != difference:
        difference = float("inf")
    if record:
        file = os.environ.get("PYTEST_CURRENT_TEST", "").split("::")[0]
        WORST[file] = max(WORST.get(file, 0.0), difference)
    return difference

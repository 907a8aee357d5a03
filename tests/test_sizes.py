"""Sizes from a config alone, against the published figures."""

import json
from pathlib import Path

import pytest
import torch

from nemotron_h.configuration import NemotronHConfig
from nemotron_h.sizes import Memory, count_parameters, dtype_bytes, kv_bytes_per_token, memory, state_bytes_per_sequence

pytestmark = pytest.mark.core

GIB, MIB = 2**30, 2**20


def published(name: str) -> NemotronHConfig:
    return NemotronHConfig(**json.loads((Path(__file__).parent / "data" / "configs" / f"{name}.json").read_text()))


# name, parameters without MTP, MTP parameters with the router's bias, KV bytes per token in bfloat16,
# MiB of state per sequence with the SSM state in float32 and in bfloat16
PUBLISHED = [
    ("Nemotron-H-4B-Base-8K", 4_489_223_040, 0, 16384, 85.27, 43.27),
    ("Nemotron-H-8B-Base-8K", 8_100_852_736, 0, 16384, 97.41, 49.41),
    ("Nemotron-H-47B-Base-8K", 46_791_554_816, 0, 20480, 725.27, 365.27),
    ("Nemotron-H-56B-Base-8K", 56_324_350_464, 0, 40960, 870.33, 438.33),
    ("NVIDIA-Nemotron-Nano-9B-v2", 8_888_227_328, 0, 16384, 136.90, 69.40),
    ("NVIDIA-Nemotron-Nano-12B-v2", 12_310_001_152, 0, 24576, 141.97, 71.97),
    ("NVIDIA-Nemotron-Nano-12B-v2-VL_llm_config", 12_310_001_152, 0, 24576, 141.97, 71.97),
    ("NVIDIA-Nemotron-3-Nano-4B-BF16", 3_973_556_832, 0, 16384, 79.92, 40.54),
    ("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", 31_577_940_288, 0, 6144, 46.81, 23.81),
    ("NVIDIA-Nemotron-3.5-Lightning-30B-A3B", 31_577_940_288, 1_335_325_952, 6144, 46.81, 23.81),
    ("NVIDIA-Nemotron-3-Super-120B-A12B", 120_668_707_840, 2_942_324_736 + 512, 8192, 162.34, 82.34),
    ("NVIDIA-Nemotron-3-Ultra-550B-A55B", 549_308_993_536, 11_215_610_368, 12288, 389.06, 197.06),
]


@pytest.mark.parametrize("name, total, mtp, kv, state, state_bf16", PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_published_models(name, total, mtp, kv, state, state_bf16):
    config = published(name)
    parameters = count_parameters(config)
    assert parameters.total == total
    assert parameters.mtp == mtp
    assert parameters.total_with_mtp == total + mtp
    assert kv_bytes_per_token(config) == kv
    assert round(state_bytes_per_sequence(config) / MIB, 2) == state
    assert round(state_bytes_per_sequence(config, ssm_dtype="bfloat16") / MIB, 2) == state_bf16


def test_super_by_stored_type():
    """Its safetensors index counts 123,611,012,096 BF16 and 20,992 F32 (41 routers of 512) elements."""
    parameters = count_parameters(published("NVIDIA-Nemotron-3-Super-120B-A12B"))
    assert parameters.total_with_mtp == 123_611_012_096 + 20_992
    assert 12.5e9 < parameters.active < 13e9  # "A12B"


def test_active_parameters():
    assert round(count_parameters(published("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16")).active / 1e9, 1) == 3.6
    assert round(count_parameters(published("NVIDIA-Nemotron-3-Ultra-550B-A55B")).active / 1e9) == 56
    dense = count_parameters(published("NVIDIA-Nemotron-Nano-9B-v2"))
    assert dense.active == dense.total


def test_kinds_of_a_model_counted_by_hand():
    config = NemotronHConfig(
        hybrid_override_pattern="M*-E", vocab_size=10, hidden_size=4, intermediate_size=6,
        num_attention_heads=2, num_key_value_heads=1, head_dim=3, mamba_num_heads=2, mamba_head_dim=5, n_groups=1,
        ssm_state_size=3, conv_kernel=4, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=5,
        moe_shared_expert_intermediate_size=7, moe_latent_size=2, num_nextn_predict_layers=2,
        mtp_hybrid_override_pattern="*-",
    )  # fmt: skip
    parameters = count_parameters(config)
    assert parameters.embeddings == parameters.lm_head == 40
    assert parameters.mamba == 4 * (10 + 16 + 2) + 16 * 5 + 3 * 2 + 10 + 10 * 4
    assert parameters.attention == 4 * (6 + 3 + 3) + 6 * 4
    assert parameters.mlp == 2 * 4 * 6
    assert parameters.moe_routed == 8 * 2 * 2 * 5
    assert parameters.moe_shared == 2 * 4 * 7
    assert parameters.moe_router == 8 * 4 + 8
    assert parameters.moe_latent == 2 * 4 * 2
    assert parameters.norms == 5 * 4
    assert parameters.mtp == 2 * (72 + 48 + 2 * 4 + 3 * 4 + 2 * 4 * 4)
    assert parameters.total - parameters.active == 6 * 2 * 2 * 5


def test_biases_ties_and_lists_count():
    plain = {"hybrid_override_pattern": "M*-E-", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 6}
    plain |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 3}
    plain |= {"mamba_num_heads": 2, "mamba_head_dim": 5, "n_groups": 1}
    plain |= {"moe_intermediate_size": 5, "moe_shared_expert_intermediate_size": 7, "moe_latent_size": 2}
    before = count_parameters(NemotronHConfig(**plain)).total

    def extra(**change):
        return count_parameters(NemotronHConfig(**(plain | change))).total - before

    config = NemotronHConfig(**plain)
    assert extra(tie_word_embeddings=True) == -80
    assert extra(use_bias=True) == config.in_proj_size + 8
    assert extra(use_conv_bias=False) == -config.conv_dim
    assert extra(attention_bias=True) == 6 + 3 + 3 + 8
    assert extra(mlp_bias=True) == 2 * (6 + 8) + (7 + 8) + (2 + 8)
    assert extra(intermediate_size=[6, 9]) == 2 * 8 * 3


def test_memory_of_the_9b_and_the_12b():
    nine = memory(published("NVIDIA-Nemotron-Nano-9B-v2"), context=131072)
    assert nine == Memory(weights=2 * 8_888_227_328, kv=131072 * 16384, states=nine.states)
    assert round(nine.total / GIB, 1) == 18.7
    assert nine.fits(22 * GIB) and nine.fits(nine.total) and not nine.fits(nine.total - 1)
    twelve = memory(published("NVIDIA-Nemotron-Nano-12B-v2"), context=131072)
    assert round(twelve.weights / GIB, 2) == 22.93
    assert not twelve.fits(22 * GIB)


def test_memory_scales_with_batch_context_dtype_and_mtp():
    config = published("NVIDIA-Nemotron-3-Super-120B-A12B")
    one, two = memory(config, context=10), memory(config, context=30, batch=2)
    assert (two.weights, two.kv, two.states) == (one.weights, 6 * one.kv, 2 * one.states)
    wide = memory(config, context=10, dtype=torch.float32)
    assert (wide.weights, wide.kv) == (2 * one.weights, 2 * one.kv)
    assert wide.states - one.states == 40 * 10240 * 3 * 2  # the windows; the SSM state is in float32 in both
    assert memory(config, context=10, mtp=True).weights - one.weights == 2 * 2_942_325_248
    assert memory(config, context=10, mtp=True).kv == one.kv


def test_layers_that_are_not_there():
    mamba_only = NemotronHConfig(hybrid_override_pattern="M-M-")
    assert kv_bytes_per_token(mamba_only) == 0 < state_bytes_per_sequence(mamba_only)
    attention_only = NemotronHConfig(hybrid_override_pattern="*-*-")
    assert state_bytes_per_sequence(attention_only) == 0 < kv_bytes_per_token(attention_only)


def test_ssm_dtype_is_the_configs():
    assert state_bytes_per_sequence(NemotronHConfig(mamba_ssm_cache_dtype="bfloat16")) == state_bytes_per_sequence(
        NemotronHConfig(), ssm_dtype=torch.bfloat16
    )


def test_errors():
    assert [dtype_bytes(d) for d in ("float32", torch.bfloat16, "float8_e4m3fn", "torch.float64")] == [4, 2, 1, 8]
    with pytest.raises(ValueError, match="dtype is 'int3', whose size is not known; use one of float64"):
        memory(NemotronHConfig(), context=1, dtype="int3")
    with pytest.raises(ValueError, match="context is 0; give a positive integer"):
        memory(NemotronHConfig(), context=0)
    with pytest.raises(ValueError, match="batch is -1; give a positive integer"):
        memory(NemotronHConfig(), context=1, batch=-1)

"""Megatron's arguments and our config say the same thing, in both directions."""

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
from families import FAMILIES, small_config

from nemotron_h import NemotronHConfig
from nemotron_h.checkpoints.megatron.arguments import from_megatron_args, to_megatron_args
from nemotron_h.checkpoints.megatron.names import padded_vocab

CONFIGS = sorted((Path(__file__).parent.parent / "data" / "configs").glob("*.json"))
# What a config says of the tokenizer, of serving and of initialisation, which Megatron has no arguments for.
NOT_MEGATRONS = {
    "architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "rope_theta", "partial_rotary_factor",
    "mamba_ssm_cache_dtype", "expand", "time_step_min", "time_step_max", "time_step_floor", "transformers_version",
    "use_cache", "num_logits_to_keep", "rescale_prenorm_residual", "use_mamba_kernels", "n_shared_experts", "_meta",
}  # fmt: skip


def said(config):
    fields = {name: value for name, value in config.to_dict().items() if name not in NOT_MEGATRONS}
    kinds = {*config.layers_block_type, *(config.mtp_layers_block_type if config.has_mtp else ())}
    if "mamba" not in kinds:
        for name in ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "chunk_size"):
            fields.pop(name)
    return fields


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_published_configs_come_back_from_the_arguments(path):
    fields = json.loads(path.read_text())
    fields.pop("_meta", None)
    config = NemotronHConfig.from_dict(fields)
    unknown = {name for name in fields if name not in NemotronHConfig().to_dict()}
    back = from_megatron_args(to_megatron_args(config))
    before, after = said(config), said(back)
    for name in before.keys() | after.keys():
        if name not in unknown and name not in ("dtype", "torch_dtype"):
            assert before.get(name) == after.get(name), name
    assert back.dtype == (config.dtype or torch.bfloat16)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_small_configs_come_back_and_namespaces_do_as_well(family):
    config = small_config(family, dtype="float32", num_nextn_predict_layers=2 if family == "latent" else 0)
    args = to_megatron_args(config)
    assert said(from_megatron_args(argparse.Namespace(**args))) == said(config)
    assert args["hybrid_layer_pattern"] == config.hybrid_override_pattern + ("/*E/*E" if family == "latent" else "")


def test_arguments_by_hand():
    """Nemotron-3 Nano 30B's, from the arguments that its training scripts give."""
    args = {
        "hybrid_layer_pattern": "MEMEM*E|MEME", "hidden_size": 2688, "ffn_hidden_size": 1856, "kv_channels": 128,
        "num_attention_heads": 32, "group_query_attention": True, "num_query_groups": 2, "layernorm_epsilon": 1e-5,
        "mamba_num_heads": 64, "mamba_head_dim": 64, "mamba_num_groups": 8, "mamba_state_dim": 128,
        "num_moe_experts": 128, "moe_router_topk": 6, "moe_shared_expert_intermediate_size": 3712,
        "moe_router_topk_scaling_factor": 2.5, "untie_embeddings_and_output_weights": True, "bf16": True,
        "padded_vocab_size": 131072, "init_method_std": 0.0173,
    }  # fmt: skip
    config = from_megatron_args(args)
    assert config.hybrid_override_pattern == "MEMEM*EMEME" and not config.has_mtp
    assert (config.num_key_value_heads, config.head_dim, config.n_routed_experts) == (2, 128, 128)
    assert config.moe_intermediate_size == 1856  # ffn_hidden_size, unless it is given
    assert (config.n_group, config.topk_group, config.vocab_size) == (1, 1, 131072)
    assert config.dtype == torch.bfloat16 and config.time_step_limit == (0.0, math.inf)
    assert not config.tie_word_embeddings and config.moe_latent_size is None
    assert from_megatron_args(args, vocab_size=131000).vocab_size == 131000


def test_mtp_in_either_spelling_and_with_one_depth_used_again():
    base = to_megatron_args(small_config("moe"))
    base["hybrid_layer_pattern"] = "MEM*EME/*E/*E"
    assert from_megatron_args(base).num_nextn_predict_layers == 2
    assert from_megatron_args(base | {"mtp_use_repeated_layer": True}).num_nextn_predict_layers == 1
    older = base | {"hybrid_layer_pattern": None, "hybrid_override_pattern": "MEM*EME"}
    older |= {"mtp_num_layers": 2, "mtp_hybrid_override_pattern": "*E"}
    config = from_megatron_args(older)
    assert (config.num_nextn_predict_layers, config.mtp_hybrid_override_pattern) == (2, "*E")


@pytest.mark.parametrize(
    "change, match",
    [
        ({"hybrid_layer_pattern": None}, r"pattern of layers None .*name the model's config.json"),
        ({"swiglu": True}, r"argument swiglu is True but this family has False"),
        ({"position_embedding_type": "rope"}, r"position_embedding_type is 'rope' but this family has 'none'"),
        ({"hybrid_layer_pattern": "MGM"}, r"unknown layer 'G' at position 1"),
    ],
)
def test_other_families_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        from_megatron_args(to_megatron_args(small_config("dense")) | change)


def test_the_padded_vocabulary():
    assert [padded_vocab(*given) for given in ((97, 1), (128, 1), (129, 1), (129, 2), (131072, 8), (97, 2, 5))] == [
        128, 128, 256, 256, 131072, 100,
    ]  # fmt: skip

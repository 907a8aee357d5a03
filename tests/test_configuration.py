"""Every published dialect of `config.json` in, one form inside, a file that every reader accepts out."""

import copy
import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig as TransformersConfig

from nemotron_h.configuration import NemotronHConfig, layers_to_pattern, parse_layers

pytestmark = pytest.mark.core

CONFIGS = {
    path.stem: json.loads(path.read_text()) for path in sorted(Path(__file__).parent.glob("data/configs/*.json"))
}
ALL = pytest.mark.parametrize("name", CONFIGS)
INF = (0.0, math.inf)
FLOAT32_MAX = 3.4028234663852886e38

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 8,
    "chunk_size": 8,
}
MOE: dict[str, Any] = {
    "hybrid_override_pattern": "ME*E",
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
}

MOE_KEYS = """n_routed_experts num_experts_per_tok n_shared_experts moe_intermediate_size
    moe_shared_expert_intermediate_size moe_latent_size moe_shared_expert_overlap n_group topk_group norm_topk_prob
    routed_scaling_factor output_router_logits""".split()
MTP_KEYS = ["num_nextn_predict_layers", "mtp_layers_block_type", "mtp_hybrid_override_pattern"]

# What a reader fails or computes wrongly without (a drop-one ablation for llama.cpp; ModelArgs without a default and
# norm_topk_prob for mlx-lm), then what vLLM's and NVIDIA's config classes need for the right layers.
LLAMA_DENSE = """architectures vocab_size hidden_size num_hidden_layers hybrid_override_pattern num_attention_heads
    num_key_value_heads head_dim intermediate_size layer_norm_epsilon mamba_num_heads mamba_head_dim n_groups
    ssm_state_size conv_kernel""".split()
LLAMA_MOE = """n_routed_experts num_experts_per_tok n_shared_experts moe_intermediate_size
    moe_shared_expert_intermediate_size n_group norm_topk_prob routed_scaling_factor""".split()
MLX = """model_type vocab_size hidden_size intermediate_size num_hidden_layers max_position_embeddings
    num_attention_heads num_key_value_heads attention_bias mamba_num_heads mamba_head_dim mamba_proj_bias ssm_state_size
    conv_kernel n_groups mlp_bias layer_norm_epsilon use_bias use_conv_bias""".split()
OTHERS = "attention_head_dim rms_norm_eps norm_eps chunk_size use_cache tie_word_embeddings".split()


def saved(config: NemotronHConfig, folder: Path) -> dict[str, Any]:
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


# -- published files -----------------------------------------------------------------------------------------------


@ALL
def test_published_files_are_read_and_written_back(name, tmp_path):
    published = CONFIGS[name]
    config = NemotronHConfig(**published)
    written = saved(config, tmp_path)
    for key, value in published.items():
        if key not in ("auto_map", "transformers_version"):
            assert written[key] == value, key
    assert "auto_map" not in written
    again = NemotronHConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert NemotronHConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "name, counts, attention, d_inner, conv_dim, in_proj",
    [
        ("Nemotron-H-4B-Base-8K", (24, 24, 0, 4), [7, 18, 29, 40], 7168, 9216, 16496),
        ("Nemotron-H-8B-Base-8K", (24, 24, 0, 4), [7, 18, 29, 40], 8192, 10240, 18560),
        ("Nemotron-H-47B-Base-8K", (45, 48, 0, 5), [17, 38, 49, 60, 86], 16384, 20480, 37120),
        ("Nemotron-H-56B-Base-8K", (54, 54, 0, 10), list(range(7, 107, 11)), 16384, 20480, 37120),
        ("NVIDIA-Nemotron-Nano-9B-v2", (27, 25, 0, 4), [14, 21, 30, 39], 10240, 12288, 22656),
        ("NVIDIA-Nemotron-Nano-12B-v2", (28, 28, 0, 6), [7, 16, 25, 34, 43, 52], 10240, 12288, 22656),
        ("NVIDIA-Nemotron-Nano-12B-v2-VL_llm_config", (28, 28, 0, 6), [7, 16, 25, 34, 43, 52], 10240, 12288, 22656),
        ("NVIDIA-Nemotron-3-Nano-4B-BF16", (21, 17, 0, 4), [12, 17, 24, 32], 7680, 9728, 17504),
        ("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", (23, 0, 23, 6), [5, 12, 19, 26, 33, 42], 4096, 6144, 10304),
        ("NVIDIA-Nemotron-3.5-Lightning-30B-A3B", (23, 0, 23, 6), [5, 12, 19, 26, 33, 42], 4096, 6144, 10304),
        ("NVIDIA-Nemotron-3-Super-120B-A12B", (40, 0, 40, 8), [7, 16, 25, 36, 47, 58, 69, 78], 8192, 10240, 18560),
        (
            "NVIDIA-Nemotron-3-Ultra-550B-A55B",
            (48, 0, 48, 12),
            [7, 14, 23, 32, 39, 48, 57, 64, 73, 82, 89, 98],
            16384,
            18432,
            35072,
        ),
    ],
)
def test_published_dimensions(name, counts, attention, d_inner, conv_dim, in_proj):
    config = NemotronHConfig(**CONFIGS[name])
    pattern = config.hybrid_override_pattern
    assert tuple(pattern.count(letter) for letter in "M-E*") == counts
    assert config.num_hidden_layers == sum(counts) == len(config.layers_block_type) == len(config.layer_types)
    assert [i for i, kind in enumerate(config.layers_block_type) if kind == "attention"] == attention
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == attention
    assert (config.d_inner, config.conv_dim, config.in_proj_size) == (d_inner, conv_dim, in_proj)
    assert config.head_dim == 128
    assert config.time_step_limit == INF
    assert config.mamba_ssm_cache_dtype == "float32"
    assert config.has_moe == bool(counts[2])
    assert config.has_mtp == ("Super" in name or "Ultra" in name or "Lightning" in name)
    if config.has_mtp:
        assert (config.mtp_hybrid_override_pattern, config.num_nextn_predict_layers) == ("*E", 1)


@ALL
def test_saved_file_has_what_each_reader_requires(name, tmp_path):
    config = NemotronHConfig(**CONFIGS[name])
    written = saved(config, tmp_path)
    text = (tmp_path / "config.json").read_text()
    required = {*LLAMA_DENSE, *MLX, *OTHERS, *(LLAMA_MOE if config.has_moe else [])}
    assert required <= written.keys()
    assert not any(written[key] is None for key in required)
    # NVIDIA's remote code
    assert re.fullmatch(r"[ME*-]+", written["hybrid_override_pattern"])
    assert len(written["hybrid_override_pattern"]) == written["num_hidden_layers"]
    # The list beside it only as its generation had it: older readers refuse it.
    assert written.get("layers_block_type") == CONFIGS[name].get("layers_block_type")
    # Trainer reads it with transformers' base class, which refuses "mlp" there
    assert "layer_types" not in written
    # llama.cpp takes a file with such keys for an MoE model
    assert bool(written.keys() & set(MOE_KEYS)) == config.has_moe
    assert bool(written.keys() & set(MTP_KEYS)) == config.has_mtp
    assert ("moe_latent_size" in written) == ("moe_latent_size" in CONFIGS[name])
    if config.has_moe:
        assert written["norm_topk_prob"] is True
    if config.has_mtp:
        assert written["mtp_hybrid_override_pattern"] == "*E"
        assert written["mtp_layers_block_type"] == ["attention", "moe"]
    assert "Infinity" not in text and "__float__" not in text and "time_step_limit" not in written
    assert "time_step_limit" not in config.to_dict()


@ALL
def test_transformers_own_class_reads_the_saved_file(name, tmp_path):
    config = NemotronHConfig(**CONFIGS[name])
    written = saved(config, tmp_path)
    if version.parse(transformers.__version__) < version.parse("5.20") and written.pop("layers_block_type", None):
        # It leaves the old names of Ultra and Lightning unread beside a pattern.
        (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = TransformersConfig.from_pretrained(tmp_path)
    assert theirs.layer_types == config.layer_types
    assert theirs.hybrid_override_pattern == config.hybrid_override_pattern
    for key in CONFIGS[name].keys() & set(TransformersConfig.__dataclass_fields__):
        if key not in ("layers_block_type", "mtp_layers_block_type", "transformers_version", "architectures", "dtype"):
            assert getattr(theirs, key) == getattr(config, key), key
    assert tuple(theirs.time_step_limit) == config.time_step_limit
    assert theirs.dtype == config.dtype
    if config.has_mtp:
        assert theirs.mtp_hybrid_override_pattern == config.mtp_hybrid_override_pattern


@ALL
def test_a_file_that_transformers_wrote_is_read(name, tmp_path):
    theirs = TransformersConfig(**CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "linear_attention" in written["layers_block_type"]  # the dialect that this is about
    assert written["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    for config in (NemotronHConfig.from_pretrained(tmp_path), NemotronHConfig(**written)):
        direct = NemotronHConfig(**CONFIGS[name])
        ours, expected = config.to_dict(), direct.to_dict()
        for key in CONFIGS[name].keys() - {"auto_map", "transformers_version", "layers_block_type"}:
            assert ours[key] == expected[key], key
        assert "layers_block_type" not in ours  # the pattern says it to everybody
        assert config.time_step_limit == INF
        assert config.has_moe == direct.has_moe and config.has_mtp == direct.has_mtp


# -- layers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"hybrid_override_pattern": "M-*E"},
        {"hybrid_override_pattern": "M-|*|E"},
        {"hybrid_override_pattern": ["M", "-", "*", "E"]},
        {"hybrid_override_pattern": ["mamba", "mlp", "attention", "moe"]},
        {"layers_block_type": ["mamba", "mlp", "attention", "moe"]},
        {"layers_block_type": ("mamba", "mlp", "attention", "moe")},
        {"layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"]},
        {"layers_block_type": "M-*E"},
        {"layer_types": ["linear_attention", "mlp", "full_attention", "moe"]},
        {"layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"], "hybrid_override_pattern": "M-|*E"},
        {"hybrid_override_pattern": "M-*E", "layers_block_type": None, "num_hidden_layers": 4},
    ],
    ids=str,
)
def test_layers_in_every_dialect(given):
    config = NemotronHConfig(**TINY, **given)
    assert config.layers_block_type == ["mamba", "mlp", "attention", "moe"]
    assert config.layer_types == ["linear_attention", "mlp", "full_attention", "moe"]
    assert config.hybrid_override_pattern == "M-*E"
    assert config.num_hidden_layers == 4
    # and assigned later
    (key, value), *_ = given.items()
    other = NemotronHConfig(**TINY, hybrid_override_pattern="MM")
    setattr(other, key, value)
    assert (other.hybrid_override_pattern, other.num_hidden_layers) == ("M-*E", 4)
    assert other.to_dict()["hybrid_override_pattern"] == "M-*E" and "layers_block_type" not in other.to_dict()


OLD = ["mamba", "mlp", "attention", "moe"]
NEW = ["linear_attention", "mlp", "full_attention", "moe"]


@pytest.mark.parametrize(
    "given, listed",
    [
        ({"hybrid_override_pattern": "M-*E"}, False),
        ({"hybrid_override_pattern": OLD}, False),
        ({"hybrid_override_pattern": "M-*E/*E", "num_nextn_predict_layers": 1}, False),
        (
            {"hybrid_override_pattern": "M-*E", "mtp_layers_block_type": ["*", "E"], "num_nextn_predict_layers": 1},
            False,
        ),
        ({"layers_block_type": OLD}, True),
        ({"layers_block_type": OLD, "hybrid_override_pattern": "M-*E"}, True),
        ({"layers_block_type": OLD, "mtp_hybrid_override_pattern": "*E", "num_nextn_predict_layers": 1}, True),
        ({"layers_block_type": NEW}, False),  # transformers' own class writes it of every generation
        ({"layers_block_type": NEW, "hybrid_override_pattern": "M-*E"}, False),
        ({"layer_types": NEW}, False),
        ({"layers_block_type": None, "hybrid_override_pattern": "M-*E"}, False),
    ],
    ids=str,
)
def test_the_list_is_written_where_it_was_read(given, listed, tmp_path):
    """And again after each reading of what was written, by whatever way it is written; changed layers count."""
    config = NemotronHConfig(**{**TINY, **MOE, "hybrid_override_pattern": None, **given})
    for turn in range(3):
        copies = (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config)))
        written = [json.loads(c.to_json_string(use_diff=diff)) for c in copies for diff in (True, False)]
        written += [config.to_dict(), config.to_diff_dict(), saved(config, tmp_path / str(turn))]
        for each in written:
            assert each["hybrid_override_pattern"] == config.hybrid_override_pattern
            assert each["num_hidden_layers"] == 4 and not any(key.startswith("_writes") for key in each)
            assert each.get("layers_block_type") == (config.layers_block_type if listed else None)
            assert ("mtp_hybrid_override_pattern" in each) == config.has_mtp
        config = NemotronHConfig.from_pretrained(tmp_path / str(turn))
        config.hybrid_override_pattern = config.hybrid_override_pattern[::-1]
    with pytest.raises(ValueError, match="num_hidden_layers is 5 but"):
        config.num_hidden_layers = 5


def test_default_is_the_8b():
    config, published = NemotronHConfig(), NemotronHConfig(**CONFIGS["Nemotron-H-8B-Base-8K"])
    mine, theirs = config.to_dict(), published.to_dict()
    differing = {key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)}
    assert differing <= {"architectures", "dtype", "torch_dtype"}


@pytest.mark.parametrize(
    "given, depths",
    [
        ({"hybrid_override_pattern": "ME|M*E/*E"}, 1),
        ({"hybrid_override_pattern": "MEM*E/*E/*E/*E"}, 3),
        ({"hybrid_override_pattern": "MEM*E/*E/*E", "num_nextn_predict_layers": 2}, 2),
        ({"layers_block_type": "MEM*E/*E", "mtp_layers_block_type": ["full_attention", "moe"]}, 1),
        ({"hybrid_override_pattern": "MEM*E", "mtp_hybrid_override_pattern": "*E", "num_nextn_predict_layers": 1}, 1),
        ({"hybrid_override_pattern": "MEM*E", "mtp_layers_block_type": ["*", "E"], "num_nextn_predict_layers": 1}, 1),
        ({"hybrid_override_pattern": "MEM*E", "num_nextn_predict_layers": 1}, 1),
    ],
    ids=str,
)
def test_mtp_in_every_dialect(given, depths):
    config = NemotronHConfig(**TINY, **given)
    assert config.hybrid_override_pattern == "MEM*E"
    assert config.has_mtp
    assert config.num_nextn_predict_layers == depths
    assert config.mtp_layers_block_type == ["attention", "moe"]
    assert config.mtp_hybrid_override_pattern == "*E"
    assert NemotronHConfig(**config.to_dict()).to_dict() == config.to_dict()


def test_mtp_keys_without_a_depth_are_no_mtp():
    config = NemotronHConfig(**TINY, hybrid_override_pattern="M-*", mtp_hybrid_override_pattern="*E")
    assert not config.has_mtp and not config.has_moe
    assert not config.to_dict().keys() & {*MOE_KEYS, *MTP_KEYS}


def test_experts_in_mtp_alone_make_it_an_moe():
    config = NemotronHConfig(**TINY, hybrid_override_pattern="M-*/*E")
    assert config.has_moe and {*LLAMA_MOE} <= config.to_dict().keys()


def test_one_mlp_width_per_mlp_layer(tmp_path):
    config = NemotronHConfig(**{**TINY, "intermediate_size": [10, 20, 30]}, hybrid_override_pattern="-M-*-")
    assert [config.mlp_intermediate_size(i) for i in (0, 2, 4)] == [10, 20, 30]
    assert saved(config, tmp_path)["intermediate_size"] == [10, 20, 30]
    assert NemotronHConfig.from_pretrained(tmp_path).mlp_intermediate_size(4) == 30
    with pytest.raises(ValueError, match=r"layer 1 of '-M-\*-' is no MLP"):
        config.mlp_intermediate_size(1)
    with pytest.raises(ValueError, match=r"layer 5 of '-M-\*-' is no MLP"):
        config.mlp_intermediate_size(5)
    assert NemotronHConfig(**TINY).mlp_intermediate_size(1) == 48


# -- names and spellings -------------------------------------------------------------------------------------------

ALIASES = [
    ("head_dim", "attention_head_dim", 16, 8),
    ("layer_norm_epsilon", "rms_norm_eps", 1e-6, 1e-4),
    ("layer_norm_epsilon", "norm_eps", 1e-6, 1e-4),
    ("n_groups", "mamba_num_groups", 4, 2),
    ("n_groups", "mamba_n_groups", 4, 2),
    ("ssm_state_size", "mamba_state_dim", 32, 16),
    ("ssm_state_size", "mamba_d_state", 32, 16),
    ("conv_kernel", "mamba_d_conv", 3, 2),
    ("use_conv_bias", "mamba_conv_bias", False, True),
    ("chunk_size", "mamba_chunk_size", 32, 16),
    ("expand", "mamba_expand", 3, 4),
    ("time_step_min", "mamba_dt_min", 0.002, 0.003),
    ("time_step_max", "mamba_dt_max", 0.2, 0.3),
    ("time_step_floor", "mamba_dt_init_floor", 1e-5, 1e-6),
    ("time_step_limit", "mamba_dt_limit", (0.0, 0.5), (0.0, 0.6)),
    ("n_routed_experts", "num_local_experts", 16, 32),
]


@pytest.mark.parametrize("name, alias, value, other", ALIASES, ids=[alias for _, alias, _, _ in ALIASES])
def test_aliases(name, alias, value, other):
    default = getattr(NemotronHConfig(), name)
    assert default not in (value,)
    config = NemotronHConfig(**{alias: value})
    assert getattr(config, name) == value == getattr(config, alias)
    assert getattr(NemotronHConfig(**{name: value, alias: value}), name) == value
    assert getattr(NemotronHConfig(**{alias: None}), name) == default
    assert getattr(NemotronHConfig(**{name: None, alias: value}), name) == value
    setattr(config, alias, other)
    assert getattr(config, name) == other
    with pytest.raises(ValueError, match="two names of one setting; give one of them") as error:
        NemotronHConfig(**{name: value, alias: other})
    assert all(word in str(error.value) for word in (name, alias, repr(value), repr(other)))
    with pytest.raises(ValueError, match="two names of one setting"):  # a default's value, but given
        NemotronHConfig(**{name: default, alias: value})


@pytest.mark.parametrize(
    "infinity",
    [
        math.inf,
        "inf",
        "Infinity",
        "+Infinity",
        {"__float__": "Infinity"},
        FLOAT32_MAX,
        3.4028235e38,
        1.7976931348623157e308,
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "low", [0, 0.0, "0.0", -math.inf, "-inf", "-Infinity", {"__float__": "-Infinity"}, -FLOAT32_MAX], ids=str
)
def test_infinity_in_every_spelling(infinity, low):
    config = NemotronHConfig(time_step_limit=[low, infinity])
    assert config.time_step_limit == INF
    assert "time_step_limit" not in config.to_dict()


def test_infinity_assigned_later():
    config = NemotronHConfig()
    config.time_step_limit = [0, "Infinity"]
    assert "time_step_limit" not in config.to_dict()
    config.validate()
    assert config.time_step_limit == INF


def test_infinity_in_files(tmp_path):
    for spelling in ("Infinity", '{"__float__": "Infinity"}', '"inf"', "3.4028234663852886e+38", "1e999"):
        (tmp_path / "config.json").write_text(f'{{"model_type": "nemotron_h", "time_step_limit": [0.0, {spelling}]}}')
        assert NemotronHConfig.from_pretrained(tmp_path).time_step_limit == INF
    (tmp_path / "config.json").write_text('{"model_type": "nemotron_h", "time_step_limit": null}')
    assert NemotronHConfig.from_pretrained(tmp_path).time_step_limit == INF


@pytest.mark.parametrize("limit, written", [((0.0, 0.1), [0.0, 0.1]), ((1e-3, math.inf), [1e-3, FLOAT32_MAX])])
def test_a_time_step_limit_that_is_not_the_default_is_kept(limit, written, tmp_path):
    config = NemotronHConfig(time_step_limit=limit)
    assert saved(config, tmp_path)["time_step_limit"] == written
    assert "Infinity" not in (tmp_path / "config.json").read_text()
    assert NemotronHConfig.from_pretrained(tmp_path).time_step_limit == limit
    assert list(TransformersConfig.from_pretrained(tmp_path).time_step_limit) == written


@pytest.mark.parametrize("given", ["use_bias", "mamba_proj_bias"])
def test_two_names_of_mambas_bias(given, tmp_path):
    config = NemotronHConfig(**{given: True})
    assert config.use_bias is config.mamba_proj_bias is True
    written = saved(config, tmp_path)
    assert written["use_bias"] is written["mamba_proj_bias"] is True
    later = NemotronHConfig()
    setattr(later, given, True)
    assert later.to_dict()["use_bias"] is later.to_dict()["mamba_proj_bias"] is True


@pytest.mark.parametrize(
    "given",
    [{"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}, {"dtype": torch.bfloat16}, {"torch_dtype": "torch.bfloat16"}],
    ids=str,
)
def test_dtype(given, tmp_path):
    config = NemotronHConfig(**given)
    assert config.dtype == config.torch_dtype == torch.bfloat16
    written = saved(config, tmp_path)
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert NemotronHConfig.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert NemotronHConfig.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
    assert NemotronHConfig.from_pretrained(tmp_path, torch_dtype=torch.float32).dtype == torch.float32
    assert "torch_dtype" not in NemotronHConfig().to_dict()


def test_torch_dtype_is_used_without_a_warning(monkeypatch):
    warned: list[str] = []
    monkeypatch.setattr("transformers.configuration_utils.logger.warning_once", warned.append)
    config = NemotronHConfig(torch_dtype="bfloat16")
    config.torch_dtype = config.torch_dtype
    assert config.to_diff_dict()["torch_dtype"] == "bfloat16"
    assert not warned


def test_ssm_cache_dtype_may_be_a_torch_dtype(tmp_path):
    config = NemotronHConfig(mamba_ssm_cache_dtype=torch.bfloat16)
    assert config.mamba_ssm_cache_dtype == saved(config, tmp_path)["mamba_ssm_cache_dtype"] == "bfloat16"


# -- errors --------------------------------------------------------------------------------------------------------

ERRORS = [
    ({"hybrid_override_pattern": "M-*/"}, ["'/'", "no MTP layers after it", "leave the '/' out"]),
    ({"hybrid_override_pattern": "M-", "mamba_hidden_act": "gelu"}, ["mamba_hidden_act is 'gelu'", "use 'silu'"]),
    ({"hybrid_override_pattern": "M-", "mlp_hidden_act": "relu3"}, ["mlp_hidden_act is 'relu3'", "ACT2FN"]),
    (
        {"hybrid_override_pattern": "M-XM"},
        ["'X'", "position 2", "'M-XM'", "use M (mamba), * (attention), - (mlp), E (moe)"],
    ),
    ({"hybrid_override_pattern": "M-G" * 200}, ["'G'", "position 2", "...", "use M (mamba)"]),
    ({"layers_block_type": ["mamba", "conv"]}, ["'conv'", "position 1", "use M (mamba)"]),
    ({"layers_block_type": ["mamba", 3]}, ["unknown layer 3", "position 1"]),
    ({"hybrid_override_pattern": ""}, ["''", "no layers", "give at least one"]),
    ({"hybrid_override_pattern": 7}, ["hybrid_override_pattern is 7", "give a pattern"]),
    (
        {"hybrid_override_pattern": "M-", "layers_block_type": ["mamba", "attention"]},
        ["position 1", "'-'", "'*'", "give one"],
    ),
    ({"hybrid_override_pattern": "M-", "layers_block_type": ["mamba"]}, ["position 1", "'-'", "''", "give one"]),
    ({"hybrid_override_pattern": "M-", "layer_types": ["mamba", "moe"]}, ["layer_types", "'-'", "'E'", "give one"]),
    (
        {"hybrid_override_pattern": "M-", "num_hidden_layers": 3},
        ["num_hidden_layers is 3", "has 2", "leave num_hidden_layers out"],
    ),
    ({"hybrid_override_pattern": "M-/*X"}, ["'X'", "position 1"]),
    ({"hybrid_override_pattern": "M-/*E/**"}, ["'**'", "same pattern"]),
    ({"hybrid_override_pattern": "M-/*E", "num_nextn_predict_layers": 2}, ["is 2", "has 1", "give one"]),
    ({"hybrid_override_pattern": "M-/*E", "mtp_hybrid_override_pattern": "*-"}, ["position 1", "give one"]),
    ({"num_nextn_predict_layers": -1}, ["num_nextn_predict_layers is -1", "0 for none"]),
    ({"mamba_num_heads": 100}, ["mamba_num_heads is 100", "n_groups 8", "use a multiple"]),
    ({"num_attention_heads": 30}, ["num_attention_heads is 30", "num_key_value_heads 8", "use a multiple"]),
    (dict(MOE, n_routed_experts=10, n_group=4), ["n_routed_experts is 10", "n_group 4", "use a multiple"]),
    (dict(MOE, num_experts_per_tok=9), ["num_experts_per_tok is 9", "only 8 experts", "at most 8"]),
    (dict(MOE, n_group=2, topk_group=3), ["topk_group is 3", "n_group is 2", "at most n_group"]),
    (
        dict(MOE, n_group=4, topk_group=1, num_experts_per_tok=3),
        ["num_experts_per_tok is 3", "only 2 experts", "at most 2"],
    ),
    (dict(MOE, moe_latent_size=0), ["moe_latent_size is 0", "positive integer"]),
    (dict(MOE, n_shared_experts=0), ["n_shared_experts is 0", "positive integer"]),
    ({"hybrid_override_pattern": "-M-", "intermediate_size": [8]}, ["[8]", "2 MLP layers", "one size per MLP layer"]),
    (
        {"hybrid_override_pattern": "-M-", "intermediate_size": [8, 0]},
        ["intermediate_size[1] is 0", "positive integer"],
    ),
    ({"hybrid_override_pattern": "-/-", "intermediate_size": [8]}, ["[8]", "MTP pattern '-'", "one size for all"]),
    ({"intermediate_size": "8"}, ["intermediate_size is '8'", "give one size"]),
    ({"conv_kernel": 0}, ["conv_kernel is 0", "positive integer"]),
    ({"hidden_size": 64.0}, ["hidden_size is 64.0", "positive integer"]),
    ({"vocab_size": True}, ["vocab_size is True", "positive integer"]),
    ({"head_dim": -1}, ["head_dim is -1", "positive integer"]),
    ({"layer_norm_epsilon": "small"}, ["layer_norm_epsilon is 'small'", "positive number"]),
    ({"layer_norm_epsilon": math.nan}, ["layer_norm_epsilon is nan", "positive number"]),
    ({"time_step_min": 0.0}, ["time_step_min is 0.0", "positive number"]),
    ({"time_step_min": 0.2}, ["time_step_min is 0.2", "time_step_max is 0.1", "give time_step_min <="]),
    ({"time_step_limit": 0.1}, ["time_step_limit is 0.1", "give two numbers"]),
    ({"time_step_limit": [0.0, 0.1, 0.2]}, ["[0.0, 0.1, 0.2]", "give two numbers"]),
    ({"time_step_limit": [0.2, 0.1]}, ["[0.2, 0.1]", "0 <= lower < upper"]),
    ({"time_step_limit": [-1.0, 0.1]}, ["[-1.0, 0.1]", "0 <= lower < upper"]),
    ({"time_step_limit": [0.0, "nan"]}, ["'nan'", "0 <= lower < upper"]),
    ({"time_step_limit": [0.0, "wide"]}, ["'wide'", "give two numbers"]),
    ({"time_step_limit": [False, True]}, ["[False, True]", "give two numbers"]),
    ({"mamba_ssm_cache_dtype": "int8"}, ["mamba_ssm_cache_dtype is 'int8'", "use one of float32"]),
    ({"dtype": "bf17"}, ["dtype is 'bf17'", "name a torch dtype"]),
    ({"torch_dtype": "nn"}, ["dtype is 'nn'", "name a torch dtype"]),
]


@pytest.mark.parametrize("given, words", ERRORS, ids=[str(given)[:60] for given, _ in ERRORS])
def test_errors_say_cause_value_and_remedy(given, words):
    with pytest.raises(ValueError) as error:
        NemotronHConfig(**given)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and message.count("; ") == 1 and message.endswith(".")
    assert len(message) < 500


def test_parts_that_the_model_lacks_are_not_checked():
    NemotronHConfig(**{**TINY, "num_attention_heads": 5}, hybrid_override_pattern="M-")
    NemotronHConfig(**{**TINY, "mamba_num_heads": 5}, hybrid_override_pattern="*-")
    NemotronHConfig(**TINY, hybrid_override_pattern="M-*", n_routed_experts=1, num_experts_per_tok=3)
    NemotronHConfig(**{**TINY, "intermediate_size": [1, 2, 3]}, **MOE)


def test_later_changes_are_checked_as_well(tmp_path):
    config = NemotronHConfig(**TINY)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_key_value_heads 3"):
        NemotronHConfig.from_pretrained(tmp_path, num_key_value_heads=3)
    with pytest.raises(ValueError, match="unknown layer 'X'"):
        NemotronHConfig.from_pretrained(tmp_path, hybrid_override_pattern="MX")
    with pytest.raises(ValueError, match="num_hidden_layers is 9"):
        NemotronHConfig.from_pretrained(tmp_path, num_hidden_layers=9)
    shorter, unused = NemotronHConfig.from_pretrained(
        tmp_path, num_hidden_layers=2, hybrid_override_pattern="M*", unheard_of=1, return_unused_kwargs=True
    )
    assert (shorter.hybrid_override_pattern, unused) == ("M*", {"unheard_of": 1})
    with pytest.raises(ValueError, match="unknown layer 'X'"):
        config.hybrid_override_pattern = "MX"
    with pytest.raises(ValueError, match="num_hidden_layers is 9"):
        config.num_hidden_layers = 9
    config.num_hidden_layers = 52
    config.mamba_num_heads = 5
    with pytest.raises(ValueError, match="mamba_num_heads is 5"):
        config.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / "config.json").exists()


# -- a good citizen of transformers --------------------------------------------------------------------------------


def test_copies():
    config = NemotronHConfig(**TINY, **MOE, something_else=[1], dtype="bfloat16")
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    assert copy.deepcopy(config).hybrid_override_pattern == "ME*E"
    assert config.get_text_config() is config
    clone = copy.deepcopy(config)
    clone.hybrid_override_pattern = "M"
    clone.layers_block_type.append("not kept: reading gives a copy")
    assert (config.num_hidden_layers, clone.layers_block_type) == (4, ["mamba"])


def test_unknown_keys_survive(tmp_path):
    config = NemotronHConfig(
        **TINY, rope_theta=10000, partial_rotary_factor=1.0, quantization_config={"bits": 4}, x=[1]
    )
    written = saved(config, tmp_path)
    assert (written["rope_theta"], written["partial_rotary_factor"], written["x"]) == (10000, 1.0, [1])
    assert NemotronHConfig.from_pretrained(tmp_path).quantization_config == {"bits": 4}


def test_classification_labels(tmp_path):
    config = NemotronHConfig(**TINY, num_labels=3)
    assert config.num_labels == 3 and len(config.id2label) == 3
    named = NemotronHConfig(**TINY, id2label={0: "no", 1: "yes", 2: "maybe"}, label2id={"no": 0, "yes": 1, "maybe": 2})
    named.save_pretrained(tmp_path)
    assert NemotronHConfig.from_pretrained(tmp_path).id2label == {0: "no", 1: "yes", 2: "maybe"}


def test_subclasses_read_the_same_dialects():
    class Derived(NemotronHConfig):
        model_type = "derived_from_nemotron_h"
        extra: int = 3

    config = Derived(attention_head_dim=64, hybrid_override_pattern="M|-", extra=4)
    assert (config.head_dim, config.num_hidden_layers, config.extra) == (64, 2, 4)
    with pytest.raises(ValueError, match="two names of one setting"):
        Derived(head_dim=128, attention_head_dim=64)


def test_key_value_heads_default_to_the_heads():
    assert NemotronHConfig(num_key_value_heads=None).num_key_value_heads == 32


def test_whole_numbers_for_fractions_are_read(tmp_path):
    config = NemotronHConfig(time_step_max=1)
    config.save_pretrained(tmp_path)
    theirs = TransformersConfig.from_pretrained(tmp_path)
    assert theirs.time_step_max == 1.0  # it refuses an int


def test_patterns_and_lists():
    assert parse_layers("M-*E") == ["mamba", "mlp", "attention", "moe"]
    assert layers_to_pattern(parse_layers("M|-*E")) == "M-*E"


SIZES = "vocab_size hidden_size num_attention_heads head_dim mamba_num_heads ssm_state_size chunk_size"
SWITCHES = "tie_word_embeddings use_cache attention_bias use_conv_bias use_bias mamba_proj_bias norm_topk_prob"
WRONG = {
    **{name: (0, -1, 10**12, 10**30, True, "64", 1.5, math.nan, [[]], {}) for name in SIZES.split()},
    **{
        name: ("no", "false", 2, 0.5, [], {})
        for name in SWITCHES.split()
    },
    "layer_norm_epsilon": (0, -1e-5, math.nan, math.inf, "small", True, 10**400),
    "initializer_range": ("x", math.nan, math.inf, []),
    "eos_token_id": ("x", 1.5, 10**12, [2, "x"], True, {}),
    "pad_token_id": ("x", [None, "x"]),
    "quantization_config": (5, "fp8", [], True),
    "layers_block_type": (7, {}, True, [["mamba"]], [7], "M" * 200_000, ["mamba"] * 200_000, "M" * 10_001),
    "hybrid_override_pattern": (7, {}, "M" * 200_000, "X" * 200_000, "M" * 20_000 + "?", "M/" * 200_000, "/"),
    "num_nextn_predict_layers": (10**9, -1, "1", True, 9_999),
    "num_hidden_layers": ("4", 10**12),
    "num_labels": (10**12, "x", 1.5),
    "id2label": (5, [], "x", {"a": "x"}, {"0": []}),
    "output_attentions": ("no", 2),
    "return_dict": ("no", []),
    "text_config": (5, "x"),
    **{name: (5, "x", {}) for name in ("to_dict", "save_pretrained", "attribute_map", "__class__")},
    "rope_scaling": (5, "x", [1]),
    "architectures": (5, [5], "NemotronHForCausalLM"),
    "mlp_hidden_act": (5, ["relu2"], "x" * 10_000),
    "mamba_hidden_act": (5, ["silu"], "x" * 10_000),
    "mamba_ssm_cache_dtype": (5, "x" * 10_000),
    "dtype": (5, "nn", "x" * 10_000),
    "time_step_limit": (5, "ab", [1], [10**400, 1], {"a": 1, "b": 2}, ["x"] * 100_000),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_said_in_a_short_sentence(name):
    for value in WRONG[name]:
        fields = {"hybrid_override_pattern": "M-*E", "n_routed_experts": 4, "num_nextn_predict_layers": 0}
        if name == "layers_block_type":
            del fields["hybrid_override_pattern"]
        with pytest.raises(ValueError, match=r"^[^\n]{1,400}\.$") as error:
            NemotronHConfig.from_dict({**fields, name: value})
        assert name in str(error.value) or "layers" in name, (value, str(error.value))


@pytest.mark.parametrize(("pattern", "experts"), [("E", 1 << 19), ("E" * 600, 512), ("M", 1 << 40)])
def test_experts_are_counted_over_all_layers(pattern, experts):
    fields = {"hybrid_override_pattern": pattern, "n_routed_experts": experts}
    if pattern == "M":
        assert NemotronHConfig(**fields).n_routed_experts == experts  # it has none
        return
    with pytest.raises(ValueError, match=rf"n_routed_experts is {experts} in each of {len(pattern)} layers"):
        NemotronHConfig(**fields)


def test_numbers_for_switches_and_null_for_what_is_left_out_are_read():
    config = NemotronHConfig(
        attention_bias=0, tie_word_embeddings=1, num_labels=None, eos_token_id=[2, 11], pad_token_id=None
    )
    assert (config.attention_bias, config.tie_word_embeddings, config.eos_token_id) == (0, 1, [2, 11])

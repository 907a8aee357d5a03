"""Published files go in bitwise and come out with their names, shapes, dtypes of the float32 tensors, and values."""

import json

import pytest
import torch
from families import small_config, small_model, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nemotron_h import NemotronHForCausalLM, NemotronHModel

pytestmark = pytest.mark.core
FLOAT32 = ("A_log", ".D", "dt_bias", "e_score_correction_bias")
MTP = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}


def published_tensors(config, seed=0):
    """Every tensor of a published checkpoint by the names of the family's files, written here from the layout alone."""
    generator = torch.Generator().manual_seed(seed)
    h, inner, heads = config.hidden_size, config.d_inner, config.mamba_num_heads
    states = config.n_groups * config.ssm_state_size
    latent = config.moe_latent_size or h
    shapes = {
        "backbone.embeddings.weight": (config.vocab_size, h),
        "backbone.norm_f.weight": (h,),
        "lm_head.weight": (config.vocab_size, h),
    }

    def mixer(prefix, letter):
        if letter == "M":
            return {
                f"{prefix}.in_proj.weight": (2 * inner + 2 * states + heads, h),
                f"{prefix}.conv1d.weight": (inner + 2 * states, 1, config.conv_kernel),
                f"{prefix}.conv1d.bias": (inner + 2 * states,),
                f"{prefix}.dt_bias": (heads,),
                f"{prefix}.A_log": (heads,),
                f"{prefix}.D": (heads,),
                f"{prefix}.norm.weight": (inner,),
                f"{prefix}.out_proj.weight": (h, inner),
            }
        if letter == "*":
            queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
            return {
                f"{prefix}.q_proj.weight": (queries, h),
                f"{prefix}.k_proj.weight": (keys, h),
                f"{prefix}.v_proj.weight": (keys, h),
                f"{prefix}.o_proj.weight": (h, queries),
            }
        if letter == "-":
            f = config.intermediate_size
            return {f"{prefix}.up_proj.weight": (f, h), f"{prefix}.down_proj.weight": (h, f)}
        shared, routed = config.moe_shared_expert_intermediate_size, config.moe_intermediate_size
        moe = {
            f"{prefix}.gate.weight": (config.n_routed_experts, h),
            f"{prefix}.gate.e_score_correction_bias": (config.n_routed_experts,),
            f"{prefix}.shared_experts.up_proj.weight": (shared, h),
            f"{prefix}.shared_experts.down_proj.weight": (h, shared),
        }
        if config.moe_latent_size:
            moe[f"{prefix}.fc1_latent_proj.weight"] = (latent, h)
            moe[f"{prefix}.fc2_latent_proj.weight"] = (h, latent)
        for expert in range(config.n_routed_experts):
            moe[f"{prefix}.experts.{expert}.up_proj.weight"] = (routed, latent)
            moe[f"{prefix}.experts.{expert}.down_proj.weight"] = (latent, routed)
        return moe

    for idx, letter in enumerate(config.hybrid_override_pattern):
        shapes[f"backbone.layers.{idx}.norm.weight"] = (h,)
        shapes |= mixer(f"backbone.layers.{idx}.mixer", letter)
    if config.has_mtp:
        shapes |= {
            "mtp.layers.0.enorm.weight": (h,),
            "mtp.layers.0.hnorm.weight": (h,),
            "mtp.layers.0.eh_proj.weight": (h, 2 * h),
            "mtp.layers.0.norm.weight": (h,),
            "mtp.layers.1.norm.weight": (h,),
            "mtp.layers.1.final_layernorm.weight": (h,),
        }
        shapes |= mixer("mtp.layers.0.mixer", "*") | mixer("mtp.layers.1.mixer", "E")
    return {
        name: torch.randn(shape, generator=generator).to(torch.float32 if name.endswith(FLOAT32) else torch.bfloat16)
        for name, shape in shapes.items()
    }


def write_folder(folder, config, tensors, **extra):
    folder.mkdir()
    published = config.to_dict() | {"architectures": ["NemotronHForCausalLM"], "torch_dtype": "bfloat16"} | extra
    (folder / "config.json").write_text(json.dumps(published))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("family", "extra"), [("dense", {}), ("moe", {}), ("latent", MTP)])
def test_round_trip(family, extra, tmp_path):
    config = small_config(family, **extra)
    tensors = published_tensors(config)
    folder = write_folder(tmp_path / "published", config, tensors)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert isinstance(model, NemotronHForCausalLM)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        kept = name.endswith((*FLOAT32, "gate.weight"))
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name

    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert saved[name].shape == tensor.shape, name
        # the router is kept in float32, which holds the bfloat16 values exactly
        assert saved[name].dtype == (torch.float32 if name.endswith("gate.weight") else tensor.dtype), name
        assert torch.equal(saved[name].double(), tensor.double()), name
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["hybrid_override_pattern"] == config.hybrid_override_pattern
    assert ("num_nextn_predict_layers" in written) == bool(extra)


def test_sharded_files_and_device_map(tmp_path):
    config = small_config("latent", **MTP)
    folder = write_folder(tmp_path / "published", config, published_tensors(config))
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded", device_map="cpu", dtype=torch.float32)
    for (name, a), (_, b) in zip(whole.state_dict().items(), mapped.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_half_precision_by_hand_keeps_the_float32_parameters():
    model = small_model("moe", dtype=torch.float32)
    before = {n: t.clone() for n, t in model.state_dict().items() if n.endswith((*FLOAT32, "gate.weight"))}
    model.to(torch.bfloat16)
    assert before and model.lm_head.weight.dtype == torch.bfloat16
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.double().model.layers[0].mixer.A_log.dtype == torch.float64


def test_base_model_reads_the_whole_checkpoint(tmp_path):
    config = small_config("latent", **MTP)
    folder = write_folder(tmp_path / "published", config, published_tensors(config))
    ids = tokens(1, 6)
    whole = NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = NemotronHModel.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(whole.model(ids).last_hidden_state, base(ids).last_hidden_state)


def test_a_checkpoint_that_lost_its_mtp_tensors_still_loads(tmp_path, caplog):
    """transformers' own class drops them on saving and leaves the config announcing them."""
    config = small_config("latent", **MTP)
    tensors = {n: t for n, t in published_tensors(config).items() if not n.startswith("mtp.")}
    folder = write_folder(tmp_path / "published", config, tensors)
    model = NemotronHForCausalLM.from_pretrained(folder)
    assert model.mtp is None
    assert "without multi-token prediction" in caplog.text


@pytest.mark.parametrize("name", ["backbone.layers.0.mixer.D", "lm_head.weight", "mtp.layers.0.hnorm.weight"])
def test_a_missing_tensor_is_an_error(name, tmp_path):
    config = small_config("latent", **MTP)
    tensors = published_tensors(config)
    del tensors[name]
    folder = write_folder(tmp_path / "published", config, tensors)
    with pytest.raises(ValueError, match=r"lacks the tensor .*: fetch the checkpoint again") as error:
        NemotronHForCausalLM.from_pretrained(folder)
    assert name.removeprefix("backbone.") in str(error.value)


def test_a_missing_expert_is_an_error(tmp_path):
    config = small_config("moe")
    tensors = published_tensors(config)
    del tensors["backbone.layers.1.mixer.experts.3.up_proj.weight"]
    folder = write_folder(tmp_path / "published", config, tensors)
    with pytest.raises(ValueError, match=r"mixer\.experts\.up_proj with shape \(7, 24, 32\) .* asks for \(8, 24, 32\)"):
        NemotronHForCausalLM.from_pretrained(folder)


def test_a_truncated_file_is_one_sentence(tmp_path):
    config = small_config("dense")
    folder = write_folder(tmp_path / "published", config, published_tensors(config))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(OSError, match=r"model\.safetensors in .* cannot be read \(.*\): fetch that file again\."):
        NemotronHForCausalLM.from_pretrained(folder)

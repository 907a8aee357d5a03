"""Published files go in bitwise and come out with their names, shapes, dtypes of the float32 tensors, and values."""

import json
import re

import pytest
import torch
from families import small_config, small_model, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nemotron_h import (
    NemotronHForCausalLM,
    NemotronHForSequenceClassification,
    NemotronHForTokenClassification,
    NemotronHModel,
)
from nemotron_h.modeling import NemotronHPreTrainedModel

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


# What only the loading class has is new and in the report; what the checkpoint's own class would have is not left out


class WithValueHead(NemotronHForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.value_head = torch.nn.Linear(config.hidden_size, 1)
        self.post_init()


class WithTwoHeads(WithValueHead):
    def __init__(self, config):
        super().__init__(config)
        self.second_head = torch.nn.Linear(config.hidden_size, 1)
        self.post_init()


class WithInnerParts(NemotronHForCausalLM):
    """New modules and parameters at every depth."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].probe = torch.nn.Linear(config.hidden_size, 1)
        self.model.gain = torch.nn.Parameter(torch.ones(3))
        self.prompt = torch.nn.Parameter(torch.ones(2))
        self.post_init()


class Regressor(NemotronHPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = NemotronHModel(config)
        self.head = torch.nn.Linear(config.hidden_size, 1)
        self.post_init()


def saved(folder, cls=NemotronHForCausalLM, family="dense", without=None, architectures="its own", **overrides):
    """A folder of a model of a class, without some tensors, with other `architectures`; its tensors beside it."""
    cls(small_config(family, **overrides)).save_pretrained(folder)
    tensors = {
        name: t for name, t in load_file(folder / "model.safetensors").items() if not name.startswith(without or "?")
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if architectures != "its own":
        config = json.loads((folder / "config.json").read_text()) | {"architectures": architectures}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


@pytest.mark.parametrize("family", ["dense", "latent"])
@pytest.mark.parametrize(
    ("checkpoint", "loading", "new"),
    [
        (NemotronHModel, NemotronHForCausalLM, "lm_head"),
        (NemotronHModel, NemotronHForTokenClassification, "score"),
        (NemotronHForSequenceClassification, NemotronHForCausalLM, "lm_head"),
        (NemotronHForCausalLM, NemotronHForSequenceClassification, "score"),
        (NemotronHForCausalLM, WithValueHead, "value_head"),
        (NemotronHForCausalLM, WithTwoHeads, "value_head|second_head"),
        (NemotronHForCausalLM, WithInnerParts, r"model\.layers\.0\.probe|model\.gain|prompt"),
        (NemotronHForCausalLM, Regressor, "head"),
        (WithValueHead, WithTwoHeads, "second_head"),
        (Regressor, NemotronHForCausalLM, "lm_head"),
    ],
)
def test_what_only_the_loading_class_has_is_new_and_reported(checkpoint, loading, new, family, tmp_path, caplog):
    folder = saved(tmp_path, checkpoint, family)
    with caplog.at_level("WARNING", logger="transformers"):  # a command that ran in this process before may be quieter
        model, info = loading.from_pretrained(folder, output_loading_info=True)
    expected = {name for name in model.state_dict() if re.match(rf"({new})($|\.)", name)}
    assert expected and info["missing_keys"] == expected
    assert "LOAD REPORT" in caplog.text and "MISSING" in caplog.text
    state = model.state_dict()
    # what is no module's own is the class's to initialise
    assert all(state[name].isfinite().all() for name in expected if name.endswith((".weight", ".bias")))
    prefix = "" if checkpoint is NemotronHModel else "backbone."
    assert torch.equal(model.model.norm_f.weight, load_file(folder / "model.safetensors")[f"{prefix}norm_f.weight"])


@pytest.mark.parametrize("architectures", [None, [], ["SomethingElse"], ["NemotronHForCausalLM"]])
def test_a_name_that_nobody_knows_is_a_causal_model_s(architectures, tmp_path):
    with pytest.raises(ValueError, match=r"lacks the tensor lm_head\.weight: fetch .* or write \"architectures\""):
        NemotronHForCausalLM.from_pretrained(saved(tmp_path / "a", without="lm_head", architectures=architectures))
    _, info = WithValueHead.from_pretrained(
        saved(tmp_path / "b", architectures=architectures), output_loading_info=True
    )
    assert info["missing_keys"] == {"value_head.weight", "value_head.bias"}


@pytest.mark.parametrize(
    ("checkpoint", "loading", "without", "named"),
    [
        (WithValueHead, WithValueHead, "value_head", r"value_head\.bias \(and 1 others\)"),
        (WithValueHead, WithTwoHeads, "value_head", r"value_head\.bias \(and 1 others\)"),
        (WithValueHead, NemotronHForCausalLM, "lm_head", r"lm_head\.weight"),
        (NemotronHForCausalLM, WithInnerParts, "lm_head", r"lm_head\.weight"),
        (NemotronHForCausalLM, WithInnerParts, "backbone.norm_f", r"model\.norm_f\.weight"),
        (NemotronHModel, NemotronHForCausalLM, "layers.2", r"model\.layers\.2\.mixer\.A_log \(and 8 others\)"),
        (NemotronHForSequenceClassification, NemotronHForTokenClassification, "score", r"score\.weight"),
    ],
)
def test_what_the_class_of_the_checkpoint_has_is_not_left_out(checkpoint, loading, without, named, tmp_path):
    with pytest.raises(ValueError, match=rf"lacks the tensor {named}: fetch"):
        loading.from_pretrained(saved(tmp_path, checkpoint, without=without))


def test_the_folder_says_whose_it_is_and_not_a_config_from_elsewhere(tmp_path):
    config = small_config()
    config.architectures = ["NemotronHModel"]
    with pytest.raises(ValueError, match=r"lacks the tensor lm_head"):
        NemotronHForCausalLM.from_pretrained(saved(tmp_path / "cut", without="lm_head"), config=config)
    NemotronHForCausalLM.from_pretrained(saved(tmp_path / "base", NemotronHModel), config=small_config())


def test_a_class_of_the_same_name_with_a_layer_of_its_own(tmp_path):
    patched = type("NemotronHForCausalLM", (WithValueHead,), {"__module__": __name__})
    _, info = patched.from_pretrained(saved(tmp_path), output_loading_info=True)
    assert info["missing_keys"] == {"value_head.weight", "value_head.bias"}


@pytest.mark.parametrize("without", ["backbone.layers.2", "lm_head"])
def test_the_model_below_an_adapter_is_whole(without, tmp_path):
    peft = pytest.importorskip("peft")
    folder = saved(tmp_path / "model")
    wrapped = peft.get_peft_model(
        NemotronHForCausalLM.from_pretrained(folder), peft.LoraConfig(r=2, target_modules=["in_proj"])
    )
    wrapped.save_pretrained(tmp_path / "adapter")
    NemotronHForCausalLM.from_pretrained(tmp_path / "adapter")
    saved(folder, without=without)
    with pytest.raises(ValueError, match="lacks the tensor"):
        NemotronHForCausalLM.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize(("cls", "family"), [(WithValueHead, "latent"), (WithTwoHeads, "dense")])
def test_a_new_head_is_not_quantised(cls, family, tmp_path):
    folder = saved(tmp_path, family=family)
    model = cls.from_pretrained(folder, quantize="int8")
    assert type(model.value_head) is torch.nn.Linear and model.value_head.weight.abs().max() < 1
    with pytest.raises(ValueError, match=r"model\.layers\.0\.probe is new, .* modules_to_not_convert="):
        WithInnerParts.from_pretrained(folder, quantize="int8")


def test_a_shard_that_is_not_there_is_named(tmp_path):
    NemotronHModel(small_config()).save_pretrained(tmp_path, max_shard_size="30KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(OSError, match=rf"lacks {gone.name}, which its index names"):
        NemotronHForCausalLM.from_pretrained(tmp_path)

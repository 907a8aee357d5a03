"""int8 and int4 models: what they compute, what is quantised, on disk and back, adapters on top, what is refused."""

import copy
import json
import re
import subprocess
import sys
import types
import weakref
from pathlib import Path

import peft
import pytest
import torch
from families import relative_difference, small_config, small_model, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import validate_quantization_for_training

import nemotron_h
from nemotron_h import (
    NemotronHForCausalLM,
    NemotronHForSequenceClassification,
    NemotronHModel,
    NemotronHQuantizationConfig,
    ops,
)
from nemotron_h.bundled import WORD_PROBLEMS, held_out, read_answer
from nemotron_h.quantization import int8_int4 as quantization
from nemotron_h.quantization.int8_int4 import QuantizedExperts, QuantizedLinear

BITS = {"int8": 8, "int4": 4}
FAMILIES = ("dense", "moe", "latent", "mamba", "attention", "tied")
MTP = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
# Written out from the published layout: the ends of the names of everything that is quantised.
QUANTISED = (
    "mixer.in_proj.weight",
    "mixer.out_proj.weight",
    "q_proj.weight",
    "k_proj.weight",
    "v_proj.weight",
    "o_proj.weight",
    "up_proj.weight",
    "down_proj.weight",
    "latent_proj.weight",
    "experts.up_proj",
    "experts.down_proj",
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """`folder("moe", torch.float32)`: a saved model of that family, made once."""
    made: dict[tuple, str] = {}

    def get(family: str = "dense", dtype: torch.dtype = torch.float64, **overrides) -> str:
        key = (family, dtype, *sorted(overrides.items()))
        if key not in made:
            made[key] = str(tmp_path_factory.mktemp(family))
            small_model(family, dtype, **overrides).save_pretrained(made[key])
        return made[key]

    return get


def rounded(path: str, bits: int, only: re.Pattern[str] | None = None) -> NemotronHForCausalLM:
    """The oracle: the plain model, each weight that is to be quantised replaced by what the integers stand for."""
    model = NemotronHForCausalLM.from_pretrained(path)
    for name, parameter in model.named_parameters():
        if name.endswith(QUANTISED) and not name.startswith("mtp.") and (only is None or only.search(name)):
            q, scale = ops.quantize_weight(parameter, bits)
            parameter.data = ops.dequantize_weight(q, scale, bits, parameter.shape[-1], parameter.dtype)
    return model


def same_tensors(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    assert one.keys() == other.keys()
    return all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


def packed_modules(model: torch.nn.Module) -> set[str]:
    kinds = (QuantizedLinear, QuantizedExperts)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.mark.core
@pytest.mark.parametrize("quantize", BITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_rounded_weights(family, quantize, folder):
    """Whole, and token by token from a cache, with padding; the weights are rounded, and nothing else is."""
    path = folder(family)
    model = NemotronHForCausalLM.from_pretrained(path, quantize=quantize)
    oracle = rounded(path, BITS[quantize])
    ids, mask = tokens(2, 21), torch.ones(2, 21, dtype=torch.long)
    mask[1, :5] = 0
    expected = oracle(ids, attention_mask=mask).logits
    with torch.no_grad():
        assert relative_difference(model(ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()]) <= 1e-10
        outputs, steps = model(ids[:, :15], attention_mask=mask[:, :15]), []
        for t in range(15, 21):
            cache = outputs.past_key_values
            outputs = model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
            steps.append(outputs.logits)
    assert relative_difference(torch.cat(steps, dim=1), expected[:, 15:]) <= 1e-10
    # and rounding them did something
    assert relative_difference(expected, NemotronHForCausalLM.from_pretrained(path)(ids).logits, record=False) > 1e-3


@pytest.mark.parametrize("quantize", BITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_float32(family, quantize, folder):
    path = folder(family, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(path, quantize=quantize)
    assert isinstance(model, NemotronHForCausalLM) and model.dtype == torch.float32
    ids = tokens(2, 21)
    expected = rounded(path, BITS[quantize])(ids).logits
    assert relative_difference(model(ids).logits, expected, record=False) <= 1e-5


@pytest.mark.parametrize("quantize", BITS)
def test_generate(quantize, folder):
    path = folder("moe")
    model = NemotronHForCausalLM.from_pretrained(path, quantize=quantize)
    arguments = {"attention_mask": torch.ones(2, 9), "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = rounded(path, BITS[quantize]).generate(tokens(2, 9), **arguments)
    assert torch.equal(model.generate(tokens(2, 9), **arguments), expected)


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", BITS)
@pytest.mark.parametrize(("family", "extra"), [("dense", {}), ("moe", {}), ("latent", MTP), ("tied", {})])
def test_round_trip(family, extra, quantize, dtype, folder, tmp_path):
    path = folder(family, dtype, **extra)
    model = AutoModelForCausalLM.from_pretrained(path, quantize=quantize)
    model.save_pretrained(tmp_path / "saved")

    # names, dtypes and the integers themselves, from the plain file alone
    plain, saved = load_file(f"{path}/model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    made = set()
    for name, tensor in plain.items():
        quantised = re.search(r"(in|out|q|k|v|o|up|down|latent)_proj\.weight$", name) and not name.startswith("mtp.")
        if quantised:
            q, scale = ops.quantize_weight(tensor, BITS[quantize])
            assert torch.equal(saved[name], q) and torch.equal(saved[f"{name}_scale"], scale), name
            assert saved[name].dtype == q.dtype and saved[f"{name}_scale"].dtype == scale.dtype
            made.add(f"{name}_scale")
        else:
            assert saved[name].dtype == tensor.dtype and torch.equal(saved[name], tensor), name
    assert made and saved.keys() == plain.keys() | made
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert stored == {
        "quant_method": "nemotron_h_weight_only",
        "bits": BITS[quantize],
        "modules_to_not_convert": None,
        "include_output_embeddings": False,
    }

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert same_tensors(model, again)
    if dtype == torch.float32:
        logits, expected = again(tokens(1, 12)).logits, model(tokens(1, 12)).logits
        assert relative_difference(logits, expected, record=False) <= 1e-5
    again.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert (tmp_path / "again" / "model.safetensors.index.json").exists()
    assert same_tensors(model, AutoModelForCausalLM.from_pretrained(tmp_path / "again", device_map="auto"))


@pytest.mark.core
@pytest.mark.parametrize("quantize", BITS)
def test_dtypes(quantize, folder, tmp_path):
    """Asked for another dtype, the plain tensors have it; the float32 ones, the integers and the scales keep theirs."""
    path = folder("moe", torch.float32)
    model = NemotronHForCausalLM.from_pretrained(path, quantize=quantize, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    for loaded in (model, NemotronHForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)):
        for name, tensor in loaded.state_dict().items():
            if name.endswith(QUANTISED):
                expected = torch.int8 if quantize == "int8" else torch.int32
            elif name.endswith("_scale"):
                expected = torch.float32 if quantize == "int8" else torch.bfloat16
            elif name.endswith(("A_log", ".D", "dt_bias", "gate.weight", "e_score_correction_bias")):
                expected = torch.float32
            else:
                expected = torch.bfloat16
            assert tensor.dtype == expected, name
    as_float = NemotronHForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert as_float.lm_head.weight.dtype == as_float.model.norm_f.weight.dtype == torch.float32
    assert as_float(tokens(1, 5)).logits.isfinite().all()


@pytest.mark.core
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_quantised(family, folder):
    model = NemotronHForCausalLM.from_pretrained(folder(family), quantize="int8")
    plain = NemotronHForCausalLM.from_pretrained(folder(family))
    expected = {name for name, _ in plain.named_parameters() if name.endswith(QUANTISED)}
    assert {n for n, p in model.named_parameters() if not p.is_floating_point()} == expected
    assert not any(p.requires_grad for n, p in model.named_parameters() if n in expected or n.endswith("_scale"))
    assert model.lm_head.weight.is_floating_point()
    if family == "tied":
        assert model.lm_head.weight is model.model.embeddings.weight


@pytest.mark.parametrize("quantize", BITS)
def test_memory(quantize, folder):
    """The weights in so many bits, a scale per row or per 32 of them, and padding to 64."""
    model = NemotronHForCausalLM.from_pretrained(folder("dense"), quantize=quantize)
    bits = BITS[quantize]
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            padded = module.in_features if bits == 8 else -(-module.in_features // 64) * 64
            scales = 4 * module.out_features if bits == 8 else 2 * module.out_features * padded // 32
            expected = module.out_features * padded * bits // 8 + scales
            assert sum(t.nbytes for t in (module.weight, module.weight_scale)) == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantize", BITS)
def test_weight_bytes(quantize, family, folder, tmp_path):
    """What is reckoned from the config alone is what lies on disk, before and after."""
    path = folder(family, torch.bfloat16)
    NemotronHForCausalLM.from_pretrained(path, quantize=quantize).save_pretrained(tmp_path)
    stored = tuple(sum(t.nbytes for t in load_file(f"{at}/model.safetensors").values()) for at in (path, tmp_path))
    config = AutoConfig.from_pretrained(path)
    assert quantization.weight_bytes(config, NemotronHQuantizationConfig(quantize)) == stored


def test_one_plain_weight_at_a_time(folder, monkeypatch):
    """While a tensor is quantised, the one before it is gone: the plain model is never whole in memory."""
    alive: list[weakref.ref] = []
    inner = ops.quantize_weight

    def watch(weight, bits):
        assert [ref for ref in alive if ref() is not None] == []
        alive.append(weakref.ref(weight))
        return inner(weight, bits)

    monkeypatch.setattr(ops, "quantize_weight", watch)
    NemotronHForCausalLM.from_pretrained(folder("moe"), quantize="int4")
    assert len(alive) > 10


@pytest.mark.parametrize(
    ("patterns", "left_out"),
    [
        (["o_proj"], r"o_proj"),
        (["layers.0"], r"^model\.layers\.0\."),
        (["model.layers.1.mixer.experts"], r"layers\.1\.mixer\.experts"),
        (["backbone.layers.1.mixer.experts"], r"layers\.1\.mixer\.experts"),
        (["mixer.in_proj", r"layers\.[35]"], r"in_proj|layers\.[35]\."),
        (["shared_experts", "lm_head"], r"shared_experts"),
        (["experts"], r"mixer\.experts"),
    ],
)
def test_exclusions(patterns, left_out, folder, tmp_path):
    path = folder("moe")
    everything = packed_modules(NemotronHForCausalLM.from_pretrained(path, quantize="int8"))
    config = NemotronHQuantizationConfig("int8", modules_to_not_convert=patterns)
    model = NemotronHForCausalLM.from_pretrained(path, quantization_config=config)
    kept = {name for name in everything if re.search(left_out, name)}
    assert kept and packed_modules(model) == everything - kept
    # the folder remembers, and the base class, whose names begin otherwise, understands it
    model.save_pretrained(tmp_path)
    again = NemotronHModel.from_pretrained(tmp_path)
    assert packed_modules(again) == {name.removeprefix("model.") for name in everything - kept}
    expected = model.model(tokens(1, 7)).last_hidden_state
    assert relative_difference(again(tokens(1, 7)).last_hidden_state, expected) <= 1e-12


@pytest.mark.parametrize("quantize", BITS)
def test_the_head_where_it_is_asked_for(quantize, folder, tmp_path):
    path = folder("dense")
    config = NemotronHQuantizationConfig(quantize, include_output_embeddings=True)
    model = NemotronHForCausalLM.from_pretrained(path, quantization_config=config)
    assert isinstance(model.lm_head, QuantizedLinear) and model.get_output_embeddings() is model.lm_head
    oracle = rounded(path, BITS[quantize])
    q, scale = ops.quantize_weight(oracle.lm_head.weight, BITS[quantize])
    oracle.lm_head.weight.data = ops.dequantize_weight(q, scale, BITS[quantize], 32, torch.float64)
    assert relative_difference(model(tokens(2, 9)).logits, oracle(tokens(2, 9)).logits) <= 1e-10
    model.save_pretrained(tmp_path)
    assert same_tensors(model, NemotronHForCausalLM.from_pretrained(tmp_path))
    assert packed_modules(NemotronHModel.from_pretrained(tmp_path))  # and the base model leaves the head alone


def test_a_tied_head_is_refused(folder):
    config = NemotronHQuantizationConfig(include_output_embeddings=True)
    with pytest.raises(ValueError, match=r"include_output_embeddings=True, but the head .* leave include_output_embed"):
        NemotronHForCausalLM.from_pretrained(folder("tied"), quantization_config=config)


def test_a_classifier_from_a_quantised_folder(folder, tmp_path):
    NemotronHForCausalLM.from_pretrained(folder("dense"), quantize="int4").save_pretrained(tmp_path)
    model = NemotronHForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert packed_modules(model) and type(model.score) is torch.nn.Linear
    assert model(tokens(1, 6)).logits.shape == (1, 3)


def test_biases_are_kept(folder):
    path = folder("dense", use_bias=True, attention_bias=True, mlp_bias=True)
    model = NemotronHForCausalLM.from_pretrained(path, quantize="int4")
    assert model.model.layers[0].mixer.out_proj.bias.abs().max() > 0
    expected = rounded(path, 4)(tokens(1, 9)).logits
    assert relative_difference(model(tokens(1, 9)).logits, expected) <= 1e-10
    assert relative_difference(model.dequantize()(tokens(1, 9)).logits, expected) <= 1e-10


@pytest.mark.core
@pytest.mark.parametrize("quantize", BITS)
@pytest.mark.parametrize("family", ["dense", "latent"])
def test_dequantize(family, quantize, folder, tmp_path):
    path = folder(family)
    model = NemotronHForCausalLM.from_pretrained(path, quantize=quantize)
    model.save_pretrained(tmp_path / "quantised")
    model = NemotronHForCausalLM.from_pretrained(tmp_path / "quantised").dequantize()
    assert not packed_modules(model) and not getattr(model.config, "quantization_config", None)
    assert same_tensors(model, rounded(path, BITS[quantize]))
    model.save_pretrained(tmp_path / "plain")
    assert load_file(tmp_path / "plain" / "model.safetensors").keys() == load_file(f"{path}/model.safetensors").keys()
    assert same_tensors(model, NemotronHForCausalLM.from_pretrained(tmp_path / "plain"))
    half = NemotronHForCausalLM.from_pretrained(path, quantize=quantize)
    half = half.dequantize(torch.bfloat16)
    assert half.model.layers[0].mixer.in_proj.weight.dtype == half.lm_head.weight.dtype == torch.bfloat16
    assert half.model.layers[0].mixer.A_log.dtype == torch.float32
    # after saving, the config names its dtype in words
    saved = NemotronHForCausalLM.from_pretrained(path, quantize=quantize)
    saved.save_pretrained(tmp_path / "again")
    assert same_tensors(saved.dequantize(), model)


@pytest.mark.parametrize("quantize", BITS)
def test_cast_and_copied(quantize, folder):
    """`.to(dtype)` leaves integers, scales and the float32 parameters as they are; a copy is independent."""
    model = NemotronHForCausalLM.from_pretrained(folder("moe", torch.float32), quantize=quantize)
    before = copy.deepcopy(model)
    model.to(torch.bfloat16)
    kept = (*QUANTISED, "_scale", "A_log", ".D", "dt_bias", "gate.weight", "e_score_correction_bias")
    for name, tensor in model.state_dict().items():
        old = before.state_dict()[name]
        assert torch.equal(tensor, old if name.endswith(kept) else old.bfloat16()), name
    assert model(tokens(1, 5)).logits.isfinite().all()


def test_on_disk(folder, tmp_path):
    """A quantised folder can be offloaded; a model that is being quantised cannot."""
    path = folder("moe", torch.float32)
    device_map = dict.fromkeys(("model.embeddings", "model.norm_f", "lm_head"), "cpu")
    device_map |= {f"model.layers.{idx}": "disk" if idx < 2 else "cpu" for idx in range(7)}
    with pytest.raises(ValueError, match=r"device_map puts 'model.layers.0' on disk, where .* save it quantised first"):
        NemotronHForCausalLM.from_pretrained(path, quantize="int8", device_map=device_map)
    whole = NemotronHForCausalLM.from_pretrained(path, quantize="int8")
    whole.save_pretrained(tmp_path / "quantised")
    model = NemotronHForCausalLM.from_pretrained(
        tmp_path / "quantised", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    assert model.model.layers[1].mixer.experts.up_proj.device.type == "meta"
    assert torch.equal(model(tokens(1, 9)).logits, whole(tokens(1, 9)).logits)


# Adapters


def with_adapters(model: torch.nn.Module, **kwargs) -> peft.PeftModel:
    config = peft.LoraConfig(r=3, target_modules=["in_proj", "q_proj", "o_proj", "down_proj", "up_proj"], **kwargs)
    model = peft.get_peft_model(model, config).double()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:  # B starts at zero, which would leave A without a gradient
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
    return model


@pytest.mark.core
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("quantize", BITS)
@pytest.mark.parametrize("family", ["dense", "moe"])
def test_lora(family, quantize, use_dora, folder, tmp_path):
    """Loss and every adapter's gradient are those on the plain model with the rounded weights; a step trains them."""
    path = folder(family)
    quantised = NemotronHForCausalLM.from_pretrained(path, quantize=quantize)
    untouched = copy.deepcopy(quantised)
    model = with_adapters(quantised, use_dora=use_dora)
    oracle = with_adapters(rounded(path, BITS[quantize]), use_dora=use_dora)
    validate_quantization_for_training(model)
    # torch's float32 names of DoRA's norms come out of a float32 weight
    tolerance = 1e-6 if use_dora else 1e-9
    ids = tokens(2, 17)
    loss, expected = model(ids, labels=ids).loss, oracle(ids, labels=ids).loss
    assert abs(loss.item() - expected.item()) <= tolerance * abs(expected.item())
    loss.backward()
    expected.backward()
    gradients = {name: p.grad for name, p in oracle.named_parameters() if p.grad is not None}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == trained.keys() and len(gradients) > 8
    for name, parameter in trained.items():
        assert relative_difference(parameter.grad, gradients[name], record=False) <= tolerance * 100, name
    torch.optim.SGD(trained.values(), lr=0.05).step()
    assert model(ids, labels=ids).loss < loss
    # the adapter alone is saved, the model under it is as it was
    model.save_pretrained(tmp_path)
    assert all("lora" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert same_tensors(model.unload(), untouched)


@pytest.mark.parametrize("auto", [False, True])
def test_an_adapters_folder(auto, folder, tmp_path):
    """It has no config of its own: what is quantised is the model that it names."""
    trained = with_adapters(NemotronHForCausalLM.from_pretrained(folder("dense"), quantize="int8"))
    trained.save_pretrained(tmp_path)
    model = (AutoModelForCausalLM if auto else NemotronHForCausalLM).from_pretrained(tmp_path, quantize="int8")
    assert isinstance(model.model.layers[0].mixer.in_proj.base_layer, QuantizedLinear)
    ids = tokens(1, 9)
    assert relative_difference(model(ids).logits, trained(ids).logits, record=False) <= 1e-4  # adapters in float32


def test_training_without_adapters_is_refused(folder):
    with pytest.raises(ValueError, match="attach trainable adapters"):
        validate_quantization_for_training(NemotronHForCausalLM.from_pretrained(folder("dense"), quantize="int8"))


def test_gradient_reaches_what_is_trained_below(folder):
    """Embeddings under packed layers, as soft prompts have it; with gradient checkpointing as without."""
    path = folder("moe")
    model = NemotronHForCausalLM.from_pretrained(path, quantize="int4")
    oracle, ids = rounded(path, 4), tokens(1, 11)
    for each in (model, oracle):
        each(ids, labels=ids).loss.backward()
    expected = oracle.model.embeddings.weight.grad
    assert relative_difference(model.model.embeddings.weight.grad, expected) <= 1e-9
    model.model.embeddings.weight.grad = None
    model.train()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    assert relative_difference(model.model.embeddings.weight.grad, expected) <= 1e-9


# What is refused, in one sentence


@pytest.mark.core
@pytest.mark.parametrize("auto", [False, True])
def test_the_argument(auto, folder, tmp_path):
    load = (AutoModelForCausalLM if auto else NemotronHForCausalLM).from_pretrained
    path = folder("dense")
    with pytest.raises(ValueError, match=r"^quantize='int3' is not known: write 'int8' or 'int4', or leave it out\.$"):
        load(path, quantize="int3")
    with pytest.raises(ValueError, match=r"^quantize=8 is not known"):
        load(path, quantize=8)
    with pytest.raises(
        ValueError, match=r"^Got quantize='int8' and a quantization_config \(Nemo.*\): pass one of them"
    ):
        load(path, quantize="int8", quantization_config=NemotronHQuantizationConfig(8))
    load(path, quantize="int4").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"^quantize='int8', but .* is quantised already \(nemotron_h_weight_only\): le"
    ):
        load(tmp_path, quantize="int8")
    with pytest.raises(ValueError, match="is quantised already"):
        load(tmp_path, quantize="int8", config=AutoConfig.from_pretrained(tmp_path))
    with pytest.raises(OSError, match="nowhere"):
        load(str(tmp_path / "nowhere"), quantize="int8", local_files_only=True)
    assert packed_modules(load(path, quantize="int8", config=AutoConfig.from_pretrained(path)))


def test_the_config():
    assert NemotronHQuantizationConfig("int4").bits == NemotronHQuantizationConfig(4).bits == 4
    assert NemotronHQuantizationConfig().bits == 8
    assert NemotronHQuantizationConfig(modules_to_not_convert="o_proj").modules_to_not_convert == ["o_proj"]
    config = NemotronHQuantizationConfig("int4", ["o_proj"], include_output_embeddings=True)
    assert NemotronHQuantizationConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    for bits in (3, "int2", "8", None):
        with pytest.raises(
            ValueError, match=rf"bits={bits!r} is not known: write 8 \(or 'int8'\) or 4 \(or 'int4'\)\."
        ):
            NemotronHQuantizationConfig(bits)
    with pytest.raises(TypeError, match="got the unknown argument group_size=64: leave it out"):
        NemotronHQuantizationConfig(4, group_size=64)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("in_prj", r"has 'in_prj', which no module .* is called: correct it"),
        ("in_pro", "has 'in_pro', which no module"),
        ("n_proj", "has 'n_proj', which no module"),
        ("in_proj(", "is no regular expression"),
    ],
)
def test_an_exclusion_that_excludes_nothing(pattern, message, folder):
    config = NemotronHQuantizationConfig(modules_to_not_convert=[pattern])
    with pytest.raises(ValueError, match=message):
        NemotronHForCausalLM.from_pretrained(folder("dense"), quantization_config=config)


def damaged(path: str, to: Path, damage) -> Path:
    """A copy of a folder whose tensors `damage` was let loose on."""
    to.mkdir()
    tensors = load_file(f"{path}/model.safetensors")
    damage(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text((Path(path) / "config.json").read_text())
    return to


@pytest.mark.core
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "layers.0.mixer.in_proj.weight",
        "layers.0.mixer.out_proj.weight",
        "layers.3.mixer.o_proj.weight",
        "layers.0.mixer.D",
        "layers.0.mixer.in_proj.weight_scale",
        "layers.1.mixer.experts.{}.up_proj.weight",
        "layers.1.mixer.experts.{}.up_proj.weight_scale",
    ],
)
def test_a_missing_tensor(name, quantised, folder, tmp_path):
    path = folder("moe", torch.float32)
    arguments = {"quantize": "int4"}
    if quantised:
        NemotronHForCausalLM.from_pretrained(path, **arguments).save_pretrained(tmp_path / "quantised")
        path, arguments = str(tmp_path / "quantised"), {}
    elif name.endswith("_scale"):
        pytest.skip("a plain checkpoint has none")

    def damage(tensors):
        for expert in range(8):
            tensors.pop(f"backbone.{name.format(expert)}", None)

    in_memory = re.escape(name.replace(".{}", "").replace("_proj.weight", "_proj") if "{}" in name else name)
    with pytest.raises(ValueError, match=rf"lacks the tensor model\.{in_memory}( |:).*fetch the checkpoint again"):
        NemotronHForCausalLM.from_pretrained(damaged(path, tmp_path / "damaged", damage), **arguments)


@pytest.mark.core
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("name", ["in_proj.weight", "norm.weight", "expert"])
def test_a_wrong_shape(name, quantised, folder, tmp_path):
    path = folder("moe", torch.float32)
    arguments = {"quantize": "int8" if quantised else "int4"}
    if quantised:
        NemotronHForCausalLM.from_pretrained(path, **arguments).save_pretrained(tmp_path / "quantised")
        path, arguments = str(tmp_path / "quantised"), {}

    def damage(tensors):
        if name == "expert":
            del tensors["backbone.layers.1.mixer.experts.3.up_proj.weight"]
        else:
            key = f"backbone.layers.0.mixer.{name}"
            tensors[key] = tensors[key][:-1].clone()

    expected = {
        "in_proj.weight": r"model\.layers\.0\.mixer\.in_proj\.weight with shape \(165, 32\) .* asks for \(166, 32\)",
        "norm.weight": r"model\.layers\.0\.mixer\.norm\.weight with shape \(47,\) .* asks for \(48,\)",
        "expert": r"model\.layers\.1\.mixer\.experts\.up_proj with shape \(7, 24, 32\) .* asks for \(8, 24, 32\)",
    }[name]
    with pytest.raises(ValueError, match=expected):
        NemotronHForCausalLM.from_pretrained(damaged(path, tmp_path / "damaged", damage), **arguments)


def test_weights_that_are_not_finite(folder, tmp_path):
    def damage(tensors):
        tensors["backbone.layers.0.mixer.out_proj.weight"][3, 4] = torch.nan

    path = damaged(folder("dense", torch.float32), tmp_path / "damaged", damage)
    with pytest.raises(
        ValueError, match=r"damaged cannot be quantised: model\.layers\.0\.mixer\.out_proj\.weight: .* NaN"
    ):
        NemotronHForCausalLM.from_pretrained(path, quantize="int8")
    config = NemotronHQuantizationConfig(modules_to_not_convert=["layers.0.mixer.out_proj"])
    NemotronHForCausalLM.from_pretrained(path, quantization_config=config)


# Where the method comes from


def test_registered_once_with_the_first_config():
    code = (
        "import nemotron_h, sys\n"
        "assert 'nemotron_h.quantization.int8_int4' not in sys.modules\n"
        "nemotron_h.NemotronHConfig()\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as configs\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as quantizers\n"
        "from nemotron_h import NemotronHQuantizationConfig\n"
        "from nemotron_h.quantization import int8_int4 as quantization\n"
        "assert configs['nemotron_h_weight_only'] is NemotronHQuantizationConfig\n"
        "assert quantizers['nemotron_h_weight_only'] is quantization.NemotronHQuantizer\n"
        "quantization.register()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert nemotron_h.NemotronHQuantizationConfig is NemotronHQuantizationConfig


def test_base_class_through_auto(folder, tmp_path):
    NemotronHForCausalLM.from_pretrained(folder("latent"), quantize="int8").save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    assert isinstance(model, NemotronHModel) and packed_modules(model)


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch):
    """A stand-in: what would be asked of torchao, without it."""
    module = types.ModuleType("torchao.quantization")
    module.Int8WeightOnlyConfig = lambda: "int8 by torchao"  # type: ignore[attr-defined]
    module.Int4WeightOnlyConfig = lambda **kwargs: kwargs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", module)
    monkeypatch.setattr("transformers.TorchAoConfig", lambda quant_type: ("torchao", quant_type))
    monkeypatch.setattr(quantization, "is_torchao_available", lambda: True)


@pytest.mark.parametrize(
    ("device_map", "family", "dtype", "torchaos"),
    [
        ("cuda", "dense", None, True),
        (0, "dense", "bfloat16", True),
        (torch.device("cuda:1"), "dense", torch.bfloat16, True),
        ({"": "cuda:0"}, "dense", "auto", True),
        ({"model": 0, "lm_head": "cpu"}, "dense", None, False),
        ("cuda", "moe", None, False),  # torchao would leave the experts as they are
        ("cpu", "dense", None, False),
        ("auto", "dense", None, torch.cuda.is_available()),
        (None, "dense", None, False),
    ],
)
@pytest.mark.parametrize("quantize", BITS)
def test_torchao_where_it_has_kernels(quantize, device_map, family, dtype, torchaos, torchao, folder):
    arguments = {"device_map": device_map, **({"dtype": dtype} if dtype else {})}
    config = quantization.config_for(quantize, folder(family), arguments)
    if torchaos:
        assert config[0] == "torchao" and ("int8" in config[1]) == (quantize == "int8")
    else:
        assert isinstance(config, NemotronHQuantizationConfig) and config.bits == BITS[quantize]


def test_torchaos_int4_is_bfloat16_alone(torchao, folder):
    arguments = {"device_map": "cuda", "dtype": torch.float32}
    assert isinstance(quantization.config_for("int4", folder("dense"), arguments), NemotronHQuantizationConfig)
    assert quantization.config_for("int8", folder("dense"), arguments)[0] == "torchao"


def test_without_torchao(folder):
    assert (
        isinstance(
            quantization.config_for("int8", folder("dense"), {"device_map": "cuda"}), NemotronHQuantizationConfig
        )
        or quantization.is_torchao_available()
    )


# The model in the box


def divergence(model: torch.nn.Module, reference: torch.nn.Module, ids: torch.Tensor) -> float:
    with torch.no_grad():
        p, q = (m(ids).logits.double().log_softmax(-1) for m in (reference, model))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_the_bundled_model_still_solves_problems(capsys):
    """int8 answers word problems as the model does; how near int4 comes is printed."""
    tokenizer = AutoTokenizer.from_pretrained(WORD_PROBLEMS)
    plain = AutoModelForCausalLM.from_pretrained(WORD_PROBLEMS)
    models = {name: AutoModelForCausalLM.from_pretrained(WORD_PROBLEMS, quantize=name) for name in BITS}
    problems = [problem for problem in held_out() if not problem["unseen_template"]][:6]
    right = {}
    for name, model in {"plain": plain, **models}.items():
        right[name] = []
        for problem in problems:
            messages = [{"role": "user", "content": problem["question"]}]
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with torch.no_grad():
                reply = model.generate(**inputs, max_new_tokens=200, do_sample=False)
            answer = tokenizer.decode(reply[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            right[name].append(read_answer(answer) == problem["answer"])
    assert sum(right["plain"]) >= 5
    assert right["int8"] == right["plain"]
    text = tokenizer(" ".join(problem["question"] for problem in problems), return_tensors="pt")["input_ids"][:, :256]
    kl = {name: divergence(model, plain, text) for name, model in models.items()}
    assert kl["int8"] < 0.01 and kl["int8"] < kl["int4"] / 10
    with capsys.disabled():
        print(f"\nbundled model: right { ({n: sum(r) for n, r in right.items()}) } of {len(problems)}, KL {kl}")


def test_config_of_a_small_model_is_unchanged(folder):
    """Quantising writes nothing into the config but its own entry."""
    model = NemotronHForCausalLM.from_pretrained(folder("moe"), quantize="int8")
    written, plain = model.config.to_dict(), NemotronHForCausalLM.from_pretrained(folder("moe")).config.to_dict()
    written.pop("quantization_config")
    assert {k: v for k, v in written.items() if k != "_is_quantized"} == plain
    assert small_config("moe").to_dict().get("quantization_config") is None

"""ModelOpt's folders: loaded, kept packed, converted, written, refused.

The oracle writes folders byte by byte from tables of its own and knows the values in float64.
"""

import fnmatch
import json
import re
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from families import small_config, small_model, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import validate_quantization_for_training

from nemotron_h import NemotronHForCausalLM, NemotronHForSequenceClassification, NemotronHModel
from nemotron_h.bundled import WORD_PROBLEMS, held_out, read_answer
from nemotron_h.checkpoints import formats, published
from nemotron_h.checkpoints.tensors import Entry
from nemotron_h.checkpoints.writing import convert
from nemotron_h.quantization.modelopt import LowPrecisionExperts, LowPrecisionLinear

# Inputs are multiples of 16 here, as in every published model; one latent width is 16, where a row has a single block.
SIZES = {"moe_latent_size": 16, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 48}
MTP = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
MODELS = {"dense": ("dense", {}), "latent": ("latent", SIZES), "mtp": ("latent", {**SIZES, **MTP})}
LINEAR = re.compile(r"mixer\..*_proj\.weight$|^lm_head\.weight$|eh_proj\.weight$")
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
# Sign, four bits of exponent with bias 7 (0: no leading one), three of mantissa; 127 and 255 are no numbers.
E4M3 = np.array([m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)])
E4M3 = np.concatenate([E4M3, -E4M3])


def rounded(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """float64 values in `dtype`, rounded once, ties to even; for bfloat16, which NumPy has not, by hand (`np.rint`)."""
    if dtype != torch.bfloat16:
        return torch.from_numpy(values.astype(str(dtype).removeprefix("torch.")))
    mantissa, exponent = np.frexp(values)
    return torch.from_numpy(np.ldexp(np.rint(np.ldexp(mantissa, 8)), exponent - 8)).to(dtype)


def bytes_as(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.uint8)).view(dtype)


class Oracle:
    """A folder in ModelOpt's layout: `how(module)` is "FP8", "NVFP4" or None for each published linear layer."""

    def __init__(
        self, path: Path, model: str, algorithm: str, how, *, extras=True, word="config", exclude=(), **config
    ):
        family, sizes = MODELS[model]
        self.path, self.plain, self.packed = path, {}, {}
        self.values: dict[str, np.ndarray] = {}
        self.how = {}
        random = np.random.default_rng(0)
        source = path.with_name(path.name + "-source")
        small_model(family, torch.float32, **sizes).to(torch.bfloat16).save_pretrained(source)
        stored = load_file(source / "model.safetensors")
        for name, tensor in stored.items():
            module = name.removesuffix(".weight")
            self.how[module] = way = how(module) if LINEAR.search(name) else None
            if way is None:
                self.plain[name] = tensor
                continue
            n, k = tensor.shape
            scale = np.float32(random.uniform(0.5, 1.5) / 448)
            if way == "FP8":
                codes = random.integers(0, 256, (n, k))
                codes[codes & 127 == 127] = 5
                self.packed[name] = bytes_as(codes, torch.float8_e4m3fn)
                self.packed[f"{module}.weight_scale"] = torch.tensor(scale)
                self.values[name] = E4M3[codes] * np.float64(scale)
            else:
                codes, blocks = random.integers(0, 16, (n, k)), random.integers(0x20, 0x7F, (n, k // 16))
                scale = np.float32(scale / 10)
                self.packed[name] = torch.from_numpy((codes[:, 0::2] + 16 * codes[:, 1::2]).astype(np.uint8))
                self.packed[f"{module}.weight_scale"] = bytes_as(blocks, torch.float8_e4m3fn)
                self.packed[f"{module}.weight_scale_2"] = torch.tensor(scale)
                self.values[name] = np.array(
                    [
                        [E2M1[codes[i, j]] * E4M3[blocks[i, j // 16]] * np.float64(scale) for j in range(k)]
                        for i in range(n)
                    ]
                )
            if extras:
                self.packed[f"{module}.input_scale"] = torch.tensor(np.float32(random.uniform()))
        if extras:
            for module in list(self.how):
                if module.endswith(("k_proj", "v_proj")) and not module.startswith("mtp."):
                    self.packed[f"{module}.{module[-6]}_scale"] = torch.tensor(np.float32(random.uniform(1, 2)))
        self.quantised = [module for module, way in self.how.items() if way]
        path.mkdir()
        fields = json.loads((source / "config.json").read_text())
        kv = "FP8" if extras else None
        inner = {"quant_algo": algorithm, "kv_cache_quant_algo": kv}
        flat = {"ignore": list(exclude), "quant_algo": algorithm, "quant_method": "modelopt"}
        if algorithm == "MIXED_PRECISION":
            layers = {
                m: {"quant_algo": w} if w == "FP8" else {"quant_algo": w, "group_size": 16}
                for m, w in self.how.items()
                if w
            }
            inner["quantized_layers"] = flat["quantized_layers"] = layers
        else:
            inner |= {"exclude_modules": list(exclude)} | ({"group_size": 16} if "NVFP4" in algorithm else {})
        if kv:
            flat["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
        self.word = flat
        if word in ("config", "both"):
            fields["quantization_config"] = flat
        if word in ("sidecar", "both"):
            side = {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": inner}
            self.word = side if word == "sidecar" else flat
            (path / "hf_quant_config.json").write_text(json.dumps(side))
        (path / "config.json").write_text(json.dumps(fields))
        self.save()

    def save(self) -> None:
        save_file({**self.plain, **self.packed}, self.path / "model.safetensors", metadata={"format": "pt"})

    def expected(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The published tensors in full precision."""
        return self.plain | {name: rounded(value, dtype) for name, value in self.values.items()}


def excluded(patterns):
    return lambda module: any(fnmatch.fnmatch(module, pattern) or module == pattern for pattern in patterns)


ATTENTION = [f"backbone.layers.3.mixer.{x}_proj" for x in "qkvo"]
KINDS = {
    "fp8": ("dense", "FP8", lambda m: None if m == "lm_head" else "FP8", {"exclude": ["lm_head"]}),
    "fp8-experts": ("latent", "FP8", lambda m: None if m == "lm_head" else "FP8", {"exclude": ["lm_head*"]}),
    "nvfp4": (
        "latent",
        "NVFP4",
        lambda m: None if m in ("lm_head", *ATTENTION) else "NVFP4",
        {"exclude": ["lm_head", *ATTENTION, "backbone.layers.0.mixer.conv1d"], "word": "sidecar"},
    ),
    "nvfp4-all": ("dense", "W4A16_NVFP4", lambda m: "NVFP4", {"extras": False}),
    "mixed": (
        "mtp",
        "MIXED_PRECISION",
        lambda m: (
            None
            if m.startswith("mtp") or m.endswith("o_proj")
            else ("FP8" if m.endswith(("in_proj", "latent_proj")) else "NVFP4")
        ),
        {"word": "both", "exclude": ["mtp*"]},
    ),
    "mtp": ("mtp", "NVFP4", lambda m: None if "layers.3." in m else "NVFP4", {"exclude": ["model.layers.3"]}),
}


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Oracle] = {}

    def get(kind: str) -> Oracle:
        if kind not in made:
            model, algorithm, how, more = KINDS[kind]
            made[kind] = Oracle(tmp_path_factory.mktemp("oracle") / kind, model, algorithm, how, **more)
        return made[kind]

    return get


def published_names(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's tensors, by their names on disk, experts one by one."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        name = re.sub("^model\\.", "backbone.", name)
        if match := re.fullmatch(r"(.*experts)\.(up_proj|down_proj)", name):
            tensors |= {f"{match[1]}.{e}.{match[2]}.weight": part for e, part in enumerate(tensor)}
        else:
            tensors[name] = tensor
    return tensors


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.contiguous().reshape(-1).view(torch.uint8).equal(b.contiguous().reshape(-1).view(torch.uint8))
    )


FLOAT32 = re.compile(r"(A_log|\.D|dt_bias|gate\.weight|e_score_correction_bias)$")


@pytest.mark.core
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_loads_to_exactly_the_values(kind, dtype, oracle):
    folder = oracle(kind)
    model = AutoModelForCausalLM.from_pretrained(folder.path, **({"dtype": dtype} if dtype else {}))
    dtype = dtype or torch.bfloat16
    loaded, expected = published_names(model), folder.expected(dtype)
    assert loaded.keys() == expected.keys() and len(folder.values) > 10
    for name, tensor in expected.items():
        kind_of = torch.promote_types(dtype, torch.float32) if FLOAT32.search(name) else dtype
        assert same(loaded[name], tensor.to(kind_of)), name
    assert isinstance(model, NemotronHForCausalLM) and not hasattr(model.config, "quantization_config")
    assert not any(isinstance(module, (LowPrecisionLinear, LowPrecisionExperts)) for module in model.modules())
    assert model.get_submodule("model.layers.0.mixer.in_proj").weight.requires_grad


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
def test_packed(kind, oracle, tmp_path):
    """The same function of the same values; saved bit for bit, with the same word on it."""
    folder = oracle(kind)
    plain = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float64)
    packed = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float64, quantized="packed")
    ids = tokens(2, 9)
    with torch.no_grad():
        a, b = plain(ids).logits, packed(ids).logits
    assert a.isfinite().all() and (a - b).abs().max() <= 1e-9 * a.abs().max()
    AutoModelForCausalLM.from_pretrained(folder.path, quantized="packed").save_pretrained(tmp_path / "saved")
    saved, stored = load_file(tmp_path / "saved" / "model.safetensors"), {**folder.plain, **folder.packed}
    assert saved.keys() == stored.keys()
    for name, tensor in stored.items():
        assert same(saved[name], tensor.float() if FLOAT32.search(name) else tensor), name
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert config == {**folder.word, "quant_method": "modelopt"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", quantized="packed", dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, b)


@pytest.mark.core
def test_dequantised_is_saved_as_a_plain_folder(oracle, tmp_path):
    for kind in ("fp8-experts", "mixed"):
        folder = oracle(kind)
        AutoModelForCausalLM.from_pretrained(folder.path).save_pretrained(tmp_path / kind)
        saved, expected = load_file(tmp_path / kind / "model.safetensors"), folder.expected(torch.bfloat16)
        assert saved.keys() == expected.keys()
        assert all(same(saved[n], t.float() if FLOAT32.search(n) else t) for n, t in expected.items())
        assert "quantization_config" not in json.loads((tmp_path / kind / "config.json").read_text())
        assert AutoModelForCausalLM.from_pretrained(tmp_path / kind)(tokens(1, 3)).logits.isfinite().all()
        packed = AutoModelForCausalLM.from_pretrained(folder.path, quantized="packed")
        plain = published_names(packed.dequantize())
        assert plain.keys() == expected.keys() and all(same(plain[n], expected[n]) for n in folder.values)


@pytest.mark.parametrize(("kind", "bound"), [("fp8-experts", 0.56), ("nvfp4", 0.33)])
def test_packed_memory(kind, bound, oracle):
    model = AutoModelForCausalLM.from_pretrained(oracle(kind).path, quantized="packed")
    held = whole = 0
    for module in model.modules():
        if isinstance(module, (LowPrecisionLinear, LowPrecisionExperts)):
            held += sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
            whole += sum(2 * torch.Size(shape).numel() for shape in module.weights().values())
    # Matrices are tiny here: 12 bytes of scales for each of a thousand inputs.
    slack = sum(12 for name in oracle(kind).packed if name.endswith("scale") and "weight" not in name)
    assert 2 * sum(value.size for value in oracle(kind).values.values()) == whole
    assert held - slack <= bound * whole


@pytest.mark.core
def test_dtypes_stay(oracle):
    """A packed model is cast around its packed tensors; those are no parameters to train."""
    for kind in ("mixed", "nvfp4"):
        model = AutoModelForCausalLM.from_pretrained(oracle(kind).path, quantized="packed")
        before = {n: t.clone() for n, t in model.state_dict().items()}
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            model.model.layers.to(dtype)  # of a whole quantised model, transformers allows it on no version
        assert model.model.layers[0].norm.weight.dtype == torch.bfloat16
        for module, part in model.named_modules():
            if isinstance(part, (LowPrecisionLinear, LowPrecisionExperts)):
                for name, tensor in part.named_parameters(prefix=module, recurse=False):
                    assert same(tensor.data, before[name]) and not tensor.requires_grad, name


@pytest.mark.core
def test_other_classes(oracle):
    folder = oracle("nvfp4")
    full = AutoModelForCausalLM.from_pretrained(folder.path)
    for how in ({}, {"quantized": "packed"}):
        base = AutoModel.from_pretrained(folder.path, **how)
        assert isinstance(base, NemotronHModel)
        assert torch.equal(base(tokens(1, 5)).last_hidden_state, full.model(tokens(1, 5)).last_hidden_state)
        classifier = NemotronHForSequenceClassification.from_pretrained(folder.path, num_labels=3, **how)
        assert classifier(tokens(1, 5)).logits.shape == (1, 3)


@pytest.mark.core
def test_resumed_from_published_names(oracle):
    """Trainer reads the files of its checkpoints with `load_state_dict`."""
    folder = oracle("nvfp4")
    model = AutoModelForCausalLM.from_pretrained(folder.path, quantized="packed")
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.zero_()
    model.load_state_dict(load_file(folder.path / "model.safetensors"))
    assert all(same(tensor, kept[name]) for name, tensor in model.state_dict().items())


def test_device_map(oracle, tmp_path):
    folder = oracle("mixed")
    expected = AutoModelForCausalLM.from_pretrained(folder.path)(tokens(1, 6)).logits
    for how in ({}, {"quantized": "packed"}):
        model = AutoModelForCausalLM.from_pretrained(folder.path, device_map="auto", **how)
        assert torch.equal(model(tokens(1, 6)).logits, expected)
    split = {"model.embeddings": "cpu", "model.layers": "disk", "model.norm_f": "cpu", "lm_head": "cpu", "mtp": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        folder.path, device_map=split, offload_folder=tmp_path / "disk", quantized="packed"
    )
    assert torch.equal(model(tokens(1, 6)).logits, expected)
    with pytest.raises(ValueError, match=r"puts 'model\.layers' on disk, .* quantized=\"packed\""):
        AutoModelForCausalLM.from_pretrained(folder.path, device_map=split, offload_folder=tmp_path / "disk")


@pytest.mark.parametrize("kind", ["fp8", "mixed"])
def test_lora(kind, oracle, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(oracle(kind).path, quantized="packed", dtype=torch.float32)
    validate_quantization_for_training(peft.get_peft_model(model, peft.LoraConfig(target_modules=["in_proj"])))
    model = AutoModelForCausalLM.from_pretrained(oracle(kind).path, quantized="packed", dtype=torch.float32)
    ids = tokens(2, 8)
    before = model(ids).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["in_proj", "q_proj"]))
    assert torch.equal(adapted(ids).logits, before)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
        grads = {n: p.grad for n, p in trained.items() if "mtp." not in n}
        assert all("lora_" in n and g.isfinite().all() for n, g in grads.items())
        assert any(g.abs().max() > 0 for n, g in grads.items() if "layers.0" in n)  # through all packed layers above
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(oracle(kind).path, dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(again(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-3)


def test_lora_on_packed_experts_is_that_on_the_dequantised_ones(oracle):
    from nemotron_h import lora_config

    gradients = {}
    for how in ("packed", None):
        model = AutoModelForCausalLM.from_pretrained(
            oracle("mixed").path, dtype=torch.float64, **({"quantized": how} if how else {})
        )
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, lora_config(model, r=2, report=False))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, dtype=torch.float64) * 0.05
        adapted(tokens(2, 8), labels=tokens(2, 8)).loss.backward()
        gradients[how] = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
        assert sum("mixer.experts." in name for name in gradients[how]) == 12  # A and B of two weights in three layers
        if how:
            with pytest.raises(ValueError, match="cannot be merged into packed weights"):
                adapted.merge_adapter()
    assert gradients["packed"].keys() == gradients[None].keys()
    for name, gradient in gradients[None].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(gradients["packed"][name], gradient, rtol=1e-6, atol=1e-8 * scale)


def test_gradient_to_the_input(oracle):
    folder = oracle("nvfp4-all")
    gradients = []
    for how in ({}, {"quantized": "packed"}):
        model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float64, **how)
        x = model.get_input_embeddings()(tokens(1, 7)).detach().requires_grad_()
        model(inputs_embeds=x).logits.square().mean().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12 * gradients[0].abs().max().item())


# Conversion


@pytest.mark.core
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_to_huggingface(kind, dtype, oracle, tmp_path):
    folder = oracle(kind)
    convert(formats.conversion(folder.path, "huggingface", dtype=dtype), tmp_path / "plain")
    written, expected = load_file(tmp_path / "plain" / "model.safetensors"), folder.expected(getattr(torch, dtype))
    assert written.keys() == expected.keys()
    assert all(same(written[name], tensor) for name, tensor in expected.items())
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == dtype
    assert not (tmp_path / "plain" / "hf_quant_config.json").exists()
    assert formats.detect(tmp_path / "plain") == "huggingface"


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "model"
    family, sizes = MODELS["mtp"]
    small_model(family, torch.float32, **sizes).to(torch.bfloat16).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


IN_FP8 = re.compile(r"backbone\..*(in|out|up|down|latent|[qkvo])_proj$|backbone\..*_latent_proj$")


@pytest.mark.core
@pytest.mark.parametrize("to", ["fp8", "nvfp4"])
def test_written(to, plain_folder, tmp_path):
    """Against the formulas: scale from the largest magnitude, then no value that would be nearer."""
    convert(formats.conversion(plain_folder, to, shard_bytes=30_000), tmp_path / to)
    assert formats.module(to).recognises(tmp_path / to) and (tmp_path / to / "tokenizer.json").exists()
    assert not (tmp_path / f".{to}.partial").exists()
    plain = load_file(plain_folder / "model.safetensors")
    written = {k: v for file in sorted((tmp_path / to).glob("*.safetensors")) for k, v in load_file(file).items()}
    seen = set()
    for name, tensor in plain.items():
        module = name.removesuffix(".weight")
        attention = re.search(r"[qkvo]_proj$", module)
        if not IN_FP8.search(module) or (to == "nvfp4" and attention):
            assert same(written[name], tensor), name
            seen.add(name)
            continue
        w = tensor.double().numpy()
        shared = [module] if not attention or module.endswith("o_proj") else [module[:-6] + f"{x}_proj" for x in "qkv"]
        peak = max(plain[f"{one}.weight"].double().abs().max().item() for one in shared)
        if to == "fp8":
            scale = written[f"{module}.weight_scale"].item()
            assert scale == np.float32(peak / 448)
            value = E4M3[written[name].view(torch.uint8).numpy()] * scale
            grid = np.unique(np.delete(E4M3, [127, 255])) * scale
            seen |= {name, f"{module}.weight_scale"}
        else:
            scale = written[f"{module}.weight_scale_2"].item()
            assert scale == np.float32(peak / 448 / 6)
            blocks = E4M3[written[f"{module}.weight_scale"].view(torch.uint8).numpy()]
            wanted = np.abs(w.reshape(len(w), -1, 16)).max(-1) / 6 / scale
            assert (np.abs(blocks - wanted) <= np.maximum(wanted / 16, 2**-10) * (1 + 1e-6)).all()
            packed = written[name].numpy()
            codes = np.stack([packed & 15, packed >> 4], -1).reshape(w.shape)
            value = E2M1[codes] * np.repeat(blocks, 16, 1) * scale
            grid = E2M1 * np.repeat(blocks, 16, 1)[..., None] * scale
            seen |= {name, f"{module}.weight_scale", f"{module}.weight_scale_2"}
        best = np.abs(w[..., None] - grid).min(-1)
        assert (np.abs(w - value) <= best + 1e-6 * peak).all(), name
    assert written.keys() == seen
    config = json.loads((tmp_path / to / "config.json").read_text())["quantization_config"]
    side = json.loads((tmp_path / to / "hf_quant_config.json").read_text())
    assert config["quant_method"] == "modelopt" and side["producer"]["name"] == "modelopt"
    assert config["quant_algo"] == side["quantization"]["quant_algo"] == {"fp8": "FP8", "nvfp4": "W4A16_NVFP4"}[to]
    assert config["ignore"] == side["quantization"]["exclude_modules"]
    assert {"lm_head", "backbone.embeddings", "mtp*", "backbone.layers.1.mixer.gate"} <= set(config["ignore"])
    assert ("backbone.layers.3.mixer.k_proj" in config["ignore"]) == (to == "nvfp4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / to, quantized="packed")
    kl = divergence(model, AutoModelForCausalLM.from_pretrained(plain_folder))
    assert kl < {"fp8": 0.05, "nvfp4": 1.0}[to]


def divergence(model: torch.nn.Module, reference: torch.nn.Module) -> float:
    with torch.no_grad():
        p, q = (m(tokens(2, 12)).logits.double().mul(0.05).log_softmax(-1) for m in (reference, model))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_what_is_excluded_on_writing(plain_folder, tmp_path):
    convert(formats.conversion(plain_folder, "fp8", exclude="*.in_proj, backbone.layers.1"), tmp_path / "fp8")
    written = load_file(tmp_path / "fp8" / "model.safetensors")
    f8 = {name for name, tensor in written.items() if tensor.dtype == torch.float8_e4m3fn}
    assert f8 and not any("in_proj" in name or "layers.1." in name for name in f8)
    with pytest.raises(ValueError, match=r"exclude has 'in_prj', which no module"):
        formats.conversion(plain_folder, "fp8", exclude="in_prj")
    narrow = tmp_path / "narrow"
    small_model("moe", torch.bfloat16).save_pretrained(narrow)  # experts of 24
    conversion = formats.conversion(narrow, "nvfp4")
    assert "no multiple of 16 stay in full precision" in conversion.remarks[0]
    convert(conversion, tmp_path / "narrow-nvfp4")
    written = load_file(tmp_path / "narrow-nvfp4" / "model.safetensors")
    assert written["backbone.layers.1.mixer.experts.0.down_proj.weight"].dtype == torch.bfloat16
    assert written["backbone.layers.1.mixer.experts.0.up_proj.weight"].dtype == torch.uint8
    with pytest.raises(ValueError, match=r"different ways, which cannot be stacked: .*--to huggingface"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "narrow-nvfp4")


def test_interrupted(plain_folder, tmp_path, monkeypatch):
    """Absent until whole; the next run goes on and the result is the same."""
    convert(formats.conversion(plain_folder, "nvfp4", shard_bytes=20_000), tmp_path / "whole")
    count, read = 0, Entry.read

    def stops(self, source):
        nonlocal count
        count += 1
        if count == 200:
            raise KeyboardInterrupt
        return read(self, source)

    monkeypatch.setattr(Entry, "read", stops)
    with pytest.raises(KeyboardInterrupt):
        convert(formats.conversion(plain_folder, "nvfp4", shard_bytes=20_000), tmp_path / "dest")
    assert not (tmp_path / "dest").exists() and list((tmp_path / ".dest.partial").glob("*.safetensors"))
    first = count
    convert(formats.conversion(plain_folder, "nvfp4", shard_bytes=20_000), tmp_path / "dest")
    files = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "dest").iterdir()) and len(files) > 4
    assert all((tmp_path / "whole" / f).read_bytes() == (tmp_path / "dest" / f).read_bytes() for f in files)
    entries = len(formats.conversion(plain_folder, "nvfp4").plan.entries)
    assert count - first < entries  # what was there was not written again


# What is refused


def damaged(folder: Oracle, path: Path, change) -> Path:
    shutil.copytree(folder.path, path)
    tensors = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


IN = "backbone.layers.0.mixer.in_proj"
UP = "backbone.layers.1.mixer.experts.2.up_proj"
ERRORS = {
    "missing scale": ("fp8", lambda t, c: t.pop(f"{IN}.weight_scale"), rf"lacks the tensor {IN}\.weight_scale,"),
    "missing scale of an expert": (
        "fp8-experts",
        lambda t, c: t.pop(f"{UP}.weight_scale"),
        r"lacks the tensor (backbone\.)?layers\.1\.mixer\.experts\.2\.up_proj\.weight_scale,",
    ),
    "missing second scale": (
        "nvfp4-all",
        lambda t, c: t.pop(f"{IN}.weight_scale_2"),
        rf"lacks the tensor {IN}\.weight_scale_2,",
    ),
    "missing weight": ("nvfp4-all", lambda t, c: t.pop(f"{IN}.weight"), r"in_proj\.weight"),
    "missing plain": ("fp8", lambda t, c: t.pop("backbone.norm_f.weight"), r"lacks the tensor .*norm_f\.weight"),
    "shape": (
        "nvfp4-all",
        lambda t, c: t.update({f"{IN}.weight_scale": t[f"{IN}.weight_scale"][:, :1].contiguous()}),
        rf"has {IN}\.weight_scale with shape \(\d+, 1\) where its config asks for \(\d+, 2\)",
    ),
    "dtype": (
        "nvfp4-all",
        lambda t, c: t.update({f"{IN}.weight": t[f"{IN}.weight"].view(torch.int8)}),
        rf"has {IN}\.weight as int8 where NVFP4 has uint8",
    ),
    "excluded": (
        "fp8",
        lambda t, c: c["quantization_config"].update(ignore=["lm_head", IN]),
        rf"has {IN}\.weight as float8_e4m3fn, but its quantization config leaves {IN} out",
    ),
    "scale too many": (
        "fp8",
        lambda t, c: t.update({"lm_head.weight_scale": torch.tensor(1.0)}),
        r"has the scale lm_head\.weight_scale of a weight that is bfloat16",
    ),
    "algorithm": (
        "fp8",
        lambda t, c: c["quantization_config"].update(quant_algo="MXFP8"),
        r"quantised with quant_algo 'MXFP8', which this package cannot read",
    ),
    "group size": (
        "nvfp4-all",
        lambda t, c: c["quantization_config"].update(group_size=32),
        r"has group_size 32 where NVFP4 has 16",
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_refused(error, oracle, tmp_path):
    """On loading either way and on converting, in one sentence, and nothing is written."""
    kind, change, sentence = ERRORS[error]
    path = damaged(oracle(kind), tmp_path / "damaged", change)
    sentence = sentence.replace("backbone.", r"(backbone\.)?")
    for how in ({}, {"quantized": "packed"}):
        with pytest.raises(ValueError, match=sentence) as raised:
            AutoModelForCausalLM.from_pretrained(path, **how)
        assert len(str(raised.value).splitlines()) == 1 and "damaged" in str(raised.value)
    with pytest.raises(ValueError, match=sentence):
        convert(formats.conversion(path, "huggingface"), tmp_path / "dest")
    assert not (tmp_path / "dest").exists() and not (tmp_path / ".dest.partial").exists()


def test_one_too_many(oracle, plain_folder, tmp_path):
    extra = {"backbone.layers.0.mixer.other": torch.ones(2)}
    path = damaged(oracle("fp8"), tmp_path / "damaged", lambda t, c: t.update(extra))
    with pytest.raises(ValueError, match=r"has the tensor backbone\.layers\.0\.mixer\.other, which no layer"):
        convert(formats.conversion(path, "huggingface"), tmp_path / "dest")
    shutil.copytree(plain_folder, tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    for change, sentence in (
        (extra, r"has the tensor backbone\.layers\.0\.mixer\.other, which no layer"),
        ({f"{IN}.weight": torch.ones(3, 4)}, rf"has {IN}\.weight with shape \(3, 4\)"),
        ({f"{IN}.weight": torch.full_like(tensors[f"{IN}.weight"], torch.nan)}, rf"{IN}\.weight: .* NaN or infinite"),
    ):
        save_file(tensors | change, tmp_path / "source" / "model.safetensors")
        with pytest.raises(ValueError, match=sentence):
            convert(formats.conversion(tmp_path / "source", "nvfp4"), tmp_path / "dest")
        assert not (tmp_path / "dest").exists()
    save_file({k: v for k, v in tensors.items() if k != f"{IN}.weight"}, tmp_path / "source" / "model.safetensors")
    with pytest.raises(ValueError, match=rf"lacks the tensor {IN}\.weight"):
        convert(formats.conversion(tmp_path / "source", "fp8"), tmp_path / "dest")


def test_cut_short(oracle, plain_folder, tmp_path):
    for to, source in (("huggingface", oracle("fp8").path), ("fp8", plain_folder)):
        path = tmp_path / f"cut-{to}"
        shutil.copytree(source, path)
        file = path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-40])
        with pytest.raises(ValueError, match=r"model\.safetensors cannot be read, from the tensor \S+ on"):
            formats.conversion(path, to)
        with pytest.raises((OSError, ValueError), match=r"model\.safetensors .*cannot be read"):
            AutoModelForCausalLM.from_pretrained(path)


def test_words(oracle, plain_folder, tmp_path):
    with pytest.raises(ValueError, match="quantized='unpacked' is not known: write 'packed'"):
        AutoModelForCausalLM.from_pretrained(oracle("fp8").path, quantized="unpacked")
    with pytest.raises(ValueError, match=r"is not quantised, not by ModelOpt: leave quantized out"):
        AutoModelForCausalLM.from_pretrained(plain_folder, quantized="packed")
    for kind in ("fp8", "nvfp4"):
        with pytest.raises(ValueError, match="is quantised already"):
            AutoModelForCausalLM.from_pretrained(oracle(kind).path, quantize="int8")
        with pytest.raises(ValueError, match="convert it to huggingface first"):
            formats.conversion(oracle(kind).path, "nvfp4")
    with pytest.raises(ValueError, match="dtype='int8' is not known"):
        formats.conversion(oracle("fp8").path, "huggingface", dtype="int8")
    config = AutoModelForCausalLM.from_pretrained(oracle("fp8").path, quantized="packed").config.quantization_config
    with pytest.raises(ValueError, match="describes weights that are quantised already"):
        AutoModelForCausalLM.from_pretrained(plain_folder, quantization_config=config)


def test_a_weight_that_the_exclusions_forgot(oracle, tmp_path):
    """Full precision without scales is what it is, whatever the list says (the router is in few lists)."""
    path = damaged(oracle("fp8"), tmp_path / "damaged", lambda t, c: c["quantization_config"].update(ignore=[]))
    model = AutoModelForCausalLM.from_pretrained(path)
    assert same(model.lm_head.weight, oracle("fp8").plain["lm_head.weight"])


def test_scales_with_one_element(oracle, tmp_path):
    """Some writers give a scalar a dimension."""

    def change(tensors, config):
        for name in [name for name, tensor in tensors.items() if tensor.dim() == 0]:
            tensors[name] = tensors[name].reshape(1)

    for kind in ("fp8", "nvfp4"):
        path = damaged(oracle(kind), tmp_path / kind, change)
        a = AutoModelForCausalLM.from_pretrained(oracle(kind).path)(tokens(1, 4)).logits
        for how in ({}, {"quantized": "packed"}):
            assert torch.equal(AutoModelForCausalLM.from_pretrained(path, **how)(tokens(1, 4)).logits, a)
        convert(formats.conversion(path, "huggingface"), tmp_path / f"{kind}-plain")


def test_the_published_table_is_what_the_oracle_has(oracle):
    """Every linear layer of the table is quantised somewhere above."""
    family, sizes = MODELS["mtp"]
    linear = {name for name in published.tensors(small_config(family, **sizes)) if LINEAR.search(name)}
    assert {name for kind in KINDS for name in oracle(kind).values} >= linear - {
        "backbone.layers.3.mixer.o_proj.weight"
    }


# The model in the box


def test_the_bundled_model_still_solves_problems(tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(WORD_PROBLEMS)
    problems = [problem for problem in held_out() if not problem["unseen_template"]][:16]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": problem["question"]}], add_generation_prompt=True, tokenize=False
        )
        for problem in problems
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    right = {}
    for name in ("plain", "fp8", "nvfp4"):
        path = WORD_PROBLEMS
        if name != "plain":
            path = tmp_path / name
            convert(formats.conversion(WORD_PROBLEMS, name), path)
        model = AutoModelForCausalLM.from_pretrained(path)
        output = model.generate(**batch, do_sample=False, max_new_tokens=320)
        replies = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        right[name] = sum(
            read_answer(reply.rpartition("</think>")[2]) == problem["answer"]
            for reply, problem in zip(replies, problems, strict=True)
        )
    with capsys.disabled():
        print(f"\nbundled model: right {right} of {len(problems)}")
    assert right["plain"] >= 13 and right["fp8"] >= right["plain"] - 1 and right["nvfp4"] >= right["plain"] - 2


def test_numbers_that_float16_cannot_hold(tmp_path):
    model = small_model("dense", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mixer.in_proj.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "plain")
    convert(formats.conversion(tmp_path / "plain", "fp8"), tmp_path / "fp8")
    convert(formats.conversion(tmp_path / "fp8", "huggingface"), tmp_path / "bfloat16")
    with pytest.raises(ValueError, match=r"layers.0.mixer.in_proj.weight has values that float16 cannot hold; write"):
        convert(formats.conversion(tmp_path / "fp8", "huggingface", dtype="float16"), tmp_path / "float16")

"""GGUF files: what llama.cpp said of ours (tests/data/gguf/record.py), its own converter's files, layouts by hand."""

from __future__ import annotations

import builtins
import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path

import gguf as package
import gguf_models
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from nemotron_h import NemotronHConfig, NemotronHForCausalLM
from nemotron_h.bundled import WORD_PROBLEMS
from nemotron_h.checkpoints import formats, gguf
from nemotron_h.checkpoints.gguf import reading, tokenizer, writing
from nemotron_h.checkpoints.writing import convert

RECORDED = Path(__file__).parents[1] / "data" / "gguf"
CONVERTER = json.loads((RECORDED / "converter.json").read_text())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> a Hugging Face folder, made once."""
    made = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("models") / name
            gguf_models.save(name, made[name])
        return made[name]

    return folder


@pytest.fixture
def dense(folders, tmp_path):
    """A folder that a test may spoil."""
    return shutil.copytree(folders("dense"), tmp_path / "dense")


def write(folder: Path, path: Path, **options) -> Path:
    convert(gguf.from_huggingface(folder, **options), path)
    return path


def read_back(path: Path, folder: Path, **options) -> dict[str, torch.Tensor]:
    convert(gguf.to_huggingface(path, **options), folder)
    return load_file(folder / "model.safetensors")


def respell(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def rewrite(
    path: Path, target: Path, keep=lambda key: True, tensors=lambda name, data: data, architecture=None
) -> Path:
    """A GGUF file again, with keys left out and tensors changed (None: left out)."""
    reader = package.GGUFReader(path)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    writer = package.GGUFWriter(target, architecture or fields.pop("general.architecture").contents())
    for key, field in fields.items():
        if keep(key) and key != "general.architecture":
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        if (data := tensors(tensor.name, tensor.data)) is not None:
            writer.add_tensor(tensor.name, np.array(data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


# -- llama.cpp ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def against_llama_cpp(name: str, folder: Path) -> None:
    model = NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    said = load_file(RECORDED / f"{name}.safetensors")
    columns = said["columns"].long()
    log_probs = model(said["input_ids"].long()[None]).logits[0].log_softmax(-1)
    assert (log_probs.argmax(-1) == columns[:, 0]).all()
    assert (log_probs.gather(1, columns) - said["log_probs"]).abs().max().item() <= 1e-3


@pytest.mark.parametrize("name", gguf_models.MODELS)
def test_llama_cpp_said_the_same(folders, tmp_path, name):
    """Of the file that is written here; one function in the folder, in llama.cpp, and in what comes back."""
    against_llama_cpp(name, folders(name))
    read_back(write(folders(name), tmp_path / "f32.gguf", outtype="f32"), tmp_path / "back")
    against_llama_cpp(name, tmp_path / "back")


def test_llama_cpp_said_the_same_of_the_bundled_model(tmp_path):
    against_llama_cpp("bundled", WORD_PROBLEMS)
    back = read_back(write(WORD_PROBLEMS, tmp_path / "f32.gguf", outtype="f32"), tmp_path / "back")
    against_llama_cpp("bundled", tmp_path / "back")
    original = load_file(Path(WORD_PROBLEMS) / "model.safetensors")
    assert all(torch.equal(back[name], value) for name, value in original.items() if not name.endswith("A_log"))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (Path(WORD_PROBLEMS) / file).read_bytes(), file
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(
        (Path(WORD_PROBLEMS) / "config.json").read_text()
    ) | {"transformers_version": json.loads((tmp_path / "back/config.json").read_text())["transformers_version"]}


@pytest.mark.parametrize("name", CONVERTER)
def test_llama_cpps_converter_writes_the_same(folders, tmp_path, name):
    """Types, shapes and bytes of every tensor, and every key that llama.cpp reads."""
    theirs = CONVERTER[name]
    reader = package.GGUFReader(write(folders(name), tmp_path / "ours.gguf", outtype=theirs["outtype"]))
    assert {t.name for t in reader.tensors} == set(theirs["tensors"])
    for tensor in reader.tensors:
        kind, shape, digest = theirs["tensors"][tensor.name]
        if name == "mtp" and tensor.name == "blk.7.ffn_gate_inp.weight":
            assert (kind, tensor.tensor_type.name) == ("BF16", "F32")  # theirs misses that it is a router
            continue
        assert [tensor.tensor_type.name, tensor.shape.tolist()[::-1]] == [kind, shape], tensor.name
        if not tensor.name.endswith(".ssm_a"):  # exp in float32 there, in float64 here
            assert hashlib.sha256(tensor.data.tobytes()).hexdigest()[:16] == digest, tensor.name
    ours = {key: field.contents() for key, field in reader.fields.items()}
    differ = {key for key, value in theirs["keys"].items() if ours.get(key) != value}
    # The name of the folder and numbers for people; a context length and rotary width that mean nothing there.
    assert {key.split(".", 1)[1] for key in differ} <= {
        *("name", "size_label", "kv_count", "context_length", "rope.dimension_count"),
    }


# -- layouts, by hand -----------------------------------------------------------------------------------------------


def test_every_tensor_by_hand(folders, tmp_path):
    """Index by index, from the files' own bytes."""
    source = load_file(folders("mtp") / "model.safetensors")
    tensors = {t.name: t for t in package.GGUFReader(write(folders("mtp"), tmp_path / "m.gguf", outtype="f32")).tensors}
    found = {name: np.array(t.data) for name, t in tensors.items()}
    expected = {
        "token_embd.weight": source["backbone.embeddings.weight"],
        "output_norm.weight": source["backbone.norm_f.weight"],
        "output.weight": source["lm_head.weight"],
    }

    def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
        d, rows = weight.shape[0] // heads, []
        for head in range(heads):
            for i in range(d // 2):
                rows += [weight[head * d + i], weight[head * d + d // 2 + i]]
        return torch.stack(rows)

    def attention(layer: str, block: str) -> None:
        expected[f"{block}.attn_q.weight"] = interleaved(source[f"{layer}.q_proj.weight"], 4)
        expected[f"{block}.attn_k.weight"] = interleaved(source[f"{layer}.k_proj.weight"], 2)
        expected[f"{block}.attn_v.weight"] = source[f"{layer}.v_proj.weight"]
        expected[f"{block}.attn_output.weight"] = source[f"{layer}.o_proj.weight"]

    def experts(layer: str, block: str) -> None:
        for projection in ("up", "down"):
            stack = [source[f"{layer}.experts.{i}.{projection}_proj.weight"] for i in range(8)]
            expected[f"{block}.ffn_{projection}_exps.weight"] = torch.stack(stack)
            expected[f"{block}.ffn_{projection}_shexp.weight"] = source[
                f"{layer}.shared_experts.{projection}_proj.weight"
            ]
        expected[f"{block}.ffn_gate_inp.weight"] = source[f"{layer}.gate.weight"]
        expected[f"{block}.exp_probs_b.bias"] = source[f"{layer}.gate.e_score_correction_bias"]
        expected[f"{block}.ffn_latent_down.weight"] = source[f"{layer}.fc1_latent_proj.weight"]
        expected[f"{block}.ffn_latent_up.weight"] = source[f"{layer}.fc2_latent_proj.weight"]

    for index, kind in enumerate("MEM*EME"):
        layer, block = f"backbone.layers.{index}.mixer", f"blk.{index}"
        expected[f"{block}.attn_norm.weight"] = source[f"backbone.layers.{index}.norm.weight"]
        if kind == "M":
            expected[f"{block}.ssm_in.weight"] = source[f"{layer}.in_proj.weight"]
            expected[f"{block}.ssm_out.weight"] = source[f"{layer}.out_proj.weight"]
            expected[f"{block}.ssm_conv1d.weight"] = source[f"{layer}.conv1d.weight"][:, 0]
            expected[f"{block}.ssm_conv1d.bias"] = source[f"{layer}.conv1d.bias"]
            expected[f"{block}.ssm_dt.bias"] = source[f"{layer}.dt_bias"]
            expected[f"{block}.ssm_d"] = source[f"{layer}.D"][:, None]
            expected[f"{block}.ssm_a"] = torch.tensor([[-math.exp(a)] for a in source[f"{layer}.A_log"].tolist()])
            norm = source[f"{layer}.norm.weight"]
            expected[f"{block}.ssm_norm.weight"] = torch.stack([norm[:32], norm[32:]])
        elif kind == "*":
            attention(layer, block)
        else:
            experts(layer, block)
    attention("mtp.layers.0.mixer", "blk.7")
    experts("mtp.layers.1.mixer", "blk.7")
    for name, original in {
        "attn_norm": "0.norm",
        "post_attention_norm": "1.norm",
        "nextn.enorm": "0.enorm",
        "nextn.hnorm": "0.hnorm",
        "nextn.eh_proj": "0.eh_proj",
        "nextn.shared_head_norm": "1.final_layernorm",
    }.items():
        expected[f"blk.7.{name}.weight"] = source[f"mtp.layers.{original}.weight"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(found[name], value.numpy()), name


def test_q8_0_by_hand(folders, tmp_path):
    """Blocks of 32: a float16 step, then 32 bytes; the folder made of them holds step * byte."""
    path = write(folders("dense"), tmp_path / "q.gguf", outtype="q8_0")
    original = load_file(folders("dense") / "model.safetensors")["backbone.layers.1.mixer.up_proj.weight"]
    conversion = gguf.to_huggingface(path)
    assert "were quantised" in conversion.remarks[0]
    back = read_back(path, tmp_path / "back")["backbone.layers.1.mixer.up_proj.weight"]
    raw = next(t for t in package.GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight").data
    assert raw.shape == (48, 34)  # one block per row of 32
    for row in range(48):
        step = float(np.frombuffer(raw[row, :2].tobytes(), np.float16)[0])
        values = np.frombuffer(raw[row, 2:].tobytes(), np.int8)
        assert back[row].tolist() == [step * int(value) for value in values]
        assert np.abs(values).max() == 127
        assert (back[row] - original[row]).abs().max().item() <= 0.51 * step + 127 * step * 2**-11


def test_q8_0_leaves_odd_rows_in_f16(folders, tmp_path):
    conversion = gguf.from_huggingface(folders("moe"), "q8_0")
    assert "stored in f16" in conversion.remarks[0]
    convert(conversion, tmp_path / "q.gguf")
    types = {t.name: t.tensor_type.name for t in package.GGUFReader(tmp_path / "q.gguf").tensors}
    assert types["blk.1.ffn_down_exps.weight"] == "F16"  # rows of 24
    assert types["blk.1.ffn_up_exps.weight"] == "Q8_0"  # rows of 32
    assert (
        types["blk.1.ffn_gate_inp.weight"]
        == types["blk.0.ssm_conv1d.weight"]
        == types["blk.0.ssm_norm.weight"]
        == "F32"
    )


# -- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", gguf_models.MODELS)
def test_f32_comes_back(folders, tmp_path, name):
    original = load_file(folders(name) / "model.safetensors")
    back = read_back(write(folders(name), tmp_path / "m.gguf", outtype="f32"), tmp_path / "back")
    assert set(back) == set(original)
    for key, value in original.items():
        assert back[key].dtype == value.dtype and back[key].shape == value.shape
        if key.endswith("A_log"):  # -exp of it was rounded
            assert ((back[key] - value).abs() <= 2.0**-23 * value.abs().clamp_min(1)).all()
        else:
            assert torch.equal(back[key], value), key
    config, again = (json.loads((folder / "config.json").read_text()) for folder in (folders(name), tmp_path / "back"))
    assert again == config


@pytest.mark.parametrize("outtype", ["f32", "bf16"])
def test_a_bfloat16_model_comes_back_bit_for_bit(tmp_path, outtype):
    gguf_models.save("mtp", tmp_path / "model", torch.bfloat16)
    original = load_file(tmp_path / "model/model.safetensors")
    original |= {key: value.bfloat16() for key, value in original.items() if key.endswith(("A_log", ".D", "dt_bias"))}
    save_file(original, tmp_path / "model/model.safetensors", {"format": "pt"})
    back = read_back(write(tmp_path / "model", tmp_path / "m.gguf", outtype=outtype), tmp_path / "back")
    assert {key: value.dtype for key, value in back.items()} == {key: value.dtype for key, value in original.items()}
    assert all(torch.equal(back[key], value) for key, value in original.items())
    assert NemotronHConfig.from_pretrained(tmp_path / "back").dtype == torch.bfloat16


def test_a_log_of_bfloat16_values_is_exact_in_any_file():
    """Also where nothing says what it was, and where A was made in float32, as in files of llama.cpp's converter."""
    a_log = torch.linspace(-3, 3, 97).bfloat16().float()
    assert torch.equal(reading._a_log(-a_log.exp()), a_log)
    assert torch.equal(reading._a_log(-a_log.double().exp().float()), a_log)
    other = torch.linspace(-3, 3, 97) + 1e-4
    assert ((reading._a_log(-other.double().exp().float()) - other).abs() <= 2.0**-23 * other.abs().clamp_min(1)).all()


def test_dtype_of_the_folder(folders, tmp_path):
    back = read_back(write(folders("dense"), tmp_path / "q.gguf", outtype="q8_0"), tmp_path / "b", dtype="bfloat16")
    assert back["lm_head.weight"].dtype == back["backbone.norm_f.weight"].dtype == torch.bfloat16
    assert back["backbone.layers.0.mixer.A_log"].dtype == torch.float32


@pytest.mark.parametrize("name", gguf_models.MODELS)
def test_a_file_of_another_exporter(folders, tmp_path, name):
    """Without our keys, as llama.cpp's converter writes it: config, values and tokens all the same."""
    ours = write(folders(name), tmp_path / "ours.gguf", outtype="f32")
    theirs = rewrite(ours, tmp_path / "theirs.gguf", lambda key: "huggingface" not in key)
    conversion = gguf.to_huggingface(theirs)
    assert "huggingface.config" in conversion.remarks[0] and "rebuilt" in conversion.remarks[1]
    back = read_back(theirs, tmp_path / "back")
    original = load_file(folders(name) / "model.safetensors")
    extra = {key for key in back if key.endswith("conv1d.bias")} if name == "tied" else set()
    assert set(back) - extra == set(original)
    assert all(torch.equal(back[k], v) for k, v in original.items() if not k.endswith("A_log"))
    config, again = (NemotronHConfig.from_pretrained(folder) for folder in (folders(name), tmp_path / "back"))
    differ = {key for key, value in config.to_dict().items() if again.to_dict().get(key) != value}
    # What a file does not have: what only training needs, and sizes of parts that the model does not have.
    allowed = {"chunk_size", "use_conv_bias", "pad_token_id", "bos_token_id", "eos_token_id"}
    absent = set() if "mamba" in config.layers_block_type else {"mamba_num_heads", "mamba_head_dim", "n_groups"}
    if "mlp" not in config.layers_block_type:
        absent |= {"intermediate_size"}
    assert differ <= allowed | absent
    was, now = (AutoTokenizer.from_pretrained(folder) for folder in (folders(name), tmp_path / "back"))
    for text in ("the 12 and an<think> the Nemotron</s>", "it's größer\n\n  than 日本 🙂"):
        assert now(text).input_ids == was(text).input_ids
        assert now.decode(now(text).input_ids) == text
    assert (now.bos_token, now.eos_token, now.unk_token) == (was.bos_token, was.eos_token, was.unk_token)


def test_quantised_by_others_is_read(folders, tmp_path):
    """Q4_0, through the gguf package; every value lies within a block's step of the original."""
    ours = write(folders("dense"), tmp_path / "ours.gguf", outtype="f32")
    reader = package.GGUFReader(ours)
    writer = package.GGUFWriter(tmp_path / "q4.gguf", "nemotron_h")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.arch", "huggingface.dtypes")):
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub_type)
    for t in reader.tensors:
        q4 = t.name == "blk.0.ssm_in.weight"
        data = package.quants.quantize(np.array(t.data), package.GGMLQuantizationType.Q4_0) if q4 else np.array(t.data)
        writer.add_tensor(t.name, data, raw_dtype=package.GGMLQuantizationType.Q4_0 if q4 else t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    name = "backbone.layers.0.mixer.in_proj.weight"
    back, original = (
        read_back(tmp_path / "q4.gguf", tmp_path / "b")[name],
        load_file(folders("dense") / "model.safetensors")[name],
    )
    assert not torch.equal(back, original)
    assert ((back - original).abs() <= original.abs().amax(1, keepdim=True) / 8 + 1e-3).all()


def test_a_split_file(folders, tmp_path):
    whole = write(folders("dense"), tmp_path / "whole.gguf", outtype="f32")
    names = [t.name for t in package.GGUFReader(whole).tensors]
    half = set(names[: len(names) // 2])
    rewrite(whole, tmp_path / "m-00001-of-00002.gguf", tensors=lambda name, data: data if name in half else None)
    rewrite(
        whole,
        tmp_path / "m-00002-of-00002.gguf",
        lambda key: False,
        lambda name, data: None if name in half else data,
    )
    back = read_back(tmp_path / "m-00001-of-00002.gguf", tmp_path / "b")
    assert set(back) == set(load_file(folders("dense") / "model.safetensors"))
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(ValueError, match=r"one of 2 parts, and m-00002-of-00002\.gguf is not there"):
        gguf.to_huggingface(tmp_path / "m-00001-of-00002.gguf")


def test_live_model(folders, tmp_path):
    """A model in memory gives the tensors and tokens that its folder gives."""
    model = gguf_models.make("mtp")
    remarks = gguf.export(model, gguf_models.tokenizer(), tmp_path / "live.gguf", "f32")
    assert remarks == []
    live = package.GGUFReader(tmp_path / "live.gguf")
    saved = package.GGUFReader(write(folders("mtp"), tmp_path / "saved.gguf", outtype="f32"))
    assert [t.name for t in live.tensors] == [t.name for t in saved.tensors]
    for a, b in zip(live.tensors, saved.tensors, strict=True):
        assert np.array_equal(a.data, b.data), a.name
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.chat_template"):
        assert live.fields[key].contents() == saved.fields[key].contents()
    tied = gguf_models.make("tied")
    assert "no vocabulary" in gguf.export(tied, None, tmp_path / "tied.gguf", "bf16")[0]
    assert "output.weight" not in {t.name for t in package.GGUFReader(tmp_path / "tied.gguf").tensors}
    with pytest.raises(ValueError, match="is there already"):
        gguf.export(tied, None, tmp_path / "tied.gguf")


def test_live_model_that_cannot_be_exported(tmp_path):
    peft = pytest.importorskip("peft")
    model = gguf_models.make("dense")
    with pytest.raises(ValueError, match="is no NemotronHForCausalLM"):
        gguf.export(model.model, None, tmp_path / "m.gguf")
    with_adapter = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge_and_unload"):
        gguf.export(with_adapter, None, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


# -- the tokenizer --------------------------------------------------------------------------------------------------


def test_tokenizer_keys(folders, tmp_path):
    fields = package.GGUFReader(write(folders("dense"), tmp_path / "m.gguf", outtype="bf16")).fields
    keys = {key: field.contents() for key, field in fields.items()}
    tokenizer = AutoTokenizer.from_pretrained(folders("dense"))
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == gguf_models.VOCAB
    for token, index in tokenizer.get_vocab().items():
        assert tokens[index] == token
    assert [types[i] for i in (0, 1, 2, tokenizer.convert_tokens_to_ids("<think>"))] == [3, 3, 3, 3]
    assert types[tokenizer.convert_tokens_to_ids("Nemotron")] == 4
    assert types[100] == 1
    assert (tokens[-1], types[-1]) == (f"[PAD{gguf_models.VOCAB - 1}]", 5)
    assert keys["tokenizer.ggml.merges"][:3] == ["t h", "th e", "Ġ the"]
    assert [keys[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos", "eot", "unknown")] == [1, 2, 267, 0]
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    # Engines that know no generation tag render what transformers renders.
    template = keys["tokenizer.chat_template"]
    assert "{%- generation" not in template
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b "}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template) == rendered
    assert rendered == "a b "


def test_tokenizer_that_adds_bos(dense, tmp_path):
    fields = json.loads((dense / "tokenizer.json").read_text())
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    fields["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, sequence],
        "pair": [sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (dense / "tokenizer.json").write_text(json.dumps(fields))
    path = write(dense, tmp_path / "m.gguf")
    assert package.GGUFReader(path).fields["tokenizer.ggml.add_bos_token"].contents() is True
    read_back(rewrite(path, tmp_path / "t.gguf", lambda key: "huggingface" not in key), tmp_path / "back")
    assert AutoTokenizer.from_pretrained(tmp_path / "back")("the").input_ids[0] == 1


@pytest.mark.parametrize("pattern", tokenizer.SPLITS)
def test_known_ways_of_splitting(dense, tmp_path, pattern):
    fields = json.loads((dense / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    fields["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    (dense / "tokenizer.json").write_text(json.dumps(fields))
    name = tokenizer.SPLITS[pattern]
    conversion = gguf.from_huggingface(dense)
    assert any("ignore_merges" in remark for remark in conversion.remarks) == (name in ("pixtral", "tekken"))
    convert(conversion, tmp_path / "m.gguf")
    assert package.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.pre"].contents() == name
    read_back(rewrite(tmp_path / "m.gguf", tmp_path / "t.gguf", lambda key: "huggingface" not in key), tmp_path / "b")
    text = "It's the 1234 <think> And\r\n then—größer  x"
    was, now = (AutoTokenizer.from_pretrained(folder) for folder in (dense, tmp_path / "b"))
    assert now(text).input_ids == was(text).input_ids


def test_unknown_way_of_splitting(dense, tmp_path):
    fields = json.loads((dense / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "x|y"}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    fields["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    (dense / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"splits text by \['x\|y'\].*give one as pre"):
        gguf.from_huggingface(dense)
    path = write(dense, tmp_path / "m.gguf", pre="qwen2")
    assert package.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == "qwen2"
    stripped = rewrite(path, tmp_path / "t.gguf", lambda key: "huggingface" not in key)
    assert "cannot be rebuilt from gpt2/qwen2" in gguf.to_huggingface(stripped).remarks[-1]
    (dense / "tokenizer.json").unlink()
    assert "no vocabulary" in gguf.from_huggingface(dense).remarks[0]
    read_back(write(dense, tmp_path / "none.gguf"), tmp_path / "b")
    assert not (tmp_path / "b/tokenizer.json").exists()


def test_more_tokens_than_rows(dense):
    fields = json.loads((dense / "tokenizer.json").read_text())
    fields["model"]["vocab"]["many"] = 320
    (dense / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="the token 'many' with id 320, but vocab_size is 320; resize the embeddings"):
        gguf.from_huggingface(dense)


# -- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"time_step_limit": [0.0, 0.1]}, r"clamps its time steps \(time_step_limit is \[0.0, 0.1\]\)"),
        ({"mamba_proj_bias": True}, "biases in in_proj and out_proj"),
        ({"mlp_hidden_act": "silu"}, "MLPs with 'silu'"),
        (
            {"hybrid_override_pattern": "M-M*EM-", "layers_block_type": None, "n_routed_experts": 2},
            r"MLP and MoE layers in one model \(M-M\*EM-\)",
        ),
        ({"quantization_config": {"quant_method": "modelopt"}}, r"is quantised \(modelopt\)"),
    ],
)
def test_models_that_llama_cpp_does_not_compute(dense, settings, says):
    respell(dense, **settings)
    with pytest.raises(ValueError, match=says):
        gguf.from_huggingface(dense)


def test_models_that_llama_cpp_does_not_load(tmp_path):
    gguf_models.make("dense", hybrid_override_pattern="M-M").save_pretrained(tmp_path / "m")
    assert "loads no model of this family without both" in gguf.from_huggingface(tmp_path / "m").remarks[0]


def test_mtp_that_llama_cpp_does_not_know(folders, tmp_path):
    gguf_models.make("mtp", mtp_hybrid_override_pattern="M*").save_pretrained(tmp_path / "m")
    conversion = gguf.from_huggingface(tmp_path / "m")
    assert "one depth of '*E', and this has 1 of ['mamba', 'attention']" in conversion.remarks[0]
    convert(conversion, tmp_path / "m.gguf")
    assert not any("nextn" in t.name for t in package.GGUFReader(tmp_path / "m.gguf").tensors)
    left_out = gguf.from_huggingface(folders("mtp"), mtp=False)
    assert any(line.startswith("not converted: mtp.layers.0.enorm.weight") for line in left_out.plan.lines())
    convert(left_out, tmp_path / "without.gguf")
    back = gguf.to_huggingface(tmp_path / "without.gguf")
    assert "no multi-token prediction" in back.remarks[0]
    convert(back, tmp_path / "back")
    assert not NemotronHConfig.from_pretrained(tmp_path / "back").has_mtp


def test_options(folders):
    with pytest.raises(ValueError, match="no outtype 'q2'; write one of f32, f16, bf16, q8_0"):
        gguf.from_huggingface(folders("dense"), "q2")
    with pytest.raises(ValueError, match="no dtype 'int8'"):
        gguf.to_huggingface(folders("dense"), dtype="int8")


def spoil(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


NAME = "backbone.layers.2.mixer.conv1d.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.pop(NAME), f"lacks the tensor {NAME}, which its config asks for"),
        (lambda tensors: tensors.update(extra=torch.ones(2)), "has the tensor extra, which no layer"),
        (
            lambda tensors: tensors.update({NAME: torch.ones(128, 1, 3)}),
            rf"has {NAME} with shape \(128, 1, 3\) where its config asks for \(128, 1, 4\)",
        ),
    ],
)
def test_a_folder_that_is_not_its_config(dense, tmp_path, change, says):
    spoil(dense, change)
    with pytest.raises(ValueError, match=says):
        write(dense, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("blk.2.ssm_conv1d.weight", lambda data: None, "lacks the tensor blk.2.ssm_conv1d.weight, which its config"),
        (
            "blk.2.ssm_conv1d.weight",
            lambda data: data[:, :3],
            r"has blk.2.ssm_conv1d.weight with shape \(128, 3\) where its config asks for \(128, 4\)",
        ),
    ],
)
def test_a_file_that_is_not_its_config(folders, tmp_path, name, change, says):
    path = write(folders("dense"), tmp_path / "m.gguf", outtype="f32")
    rewrite(path, tmp_path / "bad.gguf", tensors=lambda n, data: change(data) if n == name else data)
    with pytest.raises(ValueError, match=says):
        read_back(tmp_path / "bad.gguf", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_file_with_a_tensor_too_many(folders, tmp_path):
    path = write(folders("dense"), tmp_path / "m.gguf", outtype="f32")
    reader = package.GGUFReader(path)
    writer = package.GGUFWriter(tmp_path / "bad.gguf", "nemotron_h")
    writer.add_string("huggingface.config", reader.fields["huggingface.config"].contents())
    for t in reader.tensors:
        writer.add_tensor(t.name, np.array(t.data))
    writer.add_tensor("blk.0.attn_q.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"has the tensor blk.0.attn_q.weight, which no layer of its config has"):
        read_back(tmp_path / "bad.gguf", tmp_path / "back")


def test_a_file_cut_short(folders, tmp_path):
    path = write(folders("dense"), tmp_path / "m.gguf", outtype="f32")
    last = package.GGUFReader(path).tensors[-1]
    data = path.read_bytes()
    path.write_bytes(data[: last.data_offset + 8])
    with pytest.raises(ValueError, match=f"is cut short, from the tensor {last.name} on: fetch or write it again"):
        gguf.to_huggingface(path)
    path.write_bytes(data[:2000])  # within the keys
    with pytest.raises(ValueError, match=r"m\.gguf cannot be read \(.*fetch or write it again"):
        gguf.to_huggingface(path)


def test_other_files(folders, tmp_path):
    path = write(folders("dense"), tmp_path / "m.gguf", outtype="f32")
    assert formats.detect(path) == "gguf"
    assert not gguf.recognises(folders("dense"))
    with pytest.raises(ValueError, match="is a 'llama' model; this package knows nemotron_h and nemotron_h_moe"):
        gguf.to_huggingface(rewrite(path, tmp_path / "llama.gguf", architecture="llama"))
    stripped = rewrite(
        path, tmp_path / "s.gguf", lambda key: key not in ("huggingface.config", "nemotron_h.ssm.group_count")
    )
    with pytest.raises(ValueError, match=r"lacks the key nemotron_h.ssm.group_count"):
        gguf.to_huggingface(stripped)


def test_values_that_f16_cannot_hold(dense, tmp_path):
    spoil(dense, lambda tensors: tensors["lm_head.weight"][3].fill_(1e5))
    with pytest.raises(ValueError, match=r"output.weight has values that f16 cannot hold; write outtype bf16 or f32"):
        write(dense, tmp_path / "m.gguf", outtype="f16")
    assert not (tmp_path / "m.gguf").exists()


def test_without_the_package(folders, monkeypatch):
    real = builtins.__import__

    def missing(name, globals=None, locals=None, fromlist=(), level=0):
        if name == "gguf" and level == 0:
            raise ImportError("No module named 'gguf'")
        return real(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"need the package gguf .*pip install 'nemotron-h\[gguf\]' brings it"):
        gguf.from_huggingface(folders("dense"))


@pytest.mark.parametrize("safe_bytes", [1, 1 << 30])
def test_an_interrupted_run(folders, tmp_path, monkeypatch, safe_bytes):
    """The file is absent until it is whole; the next run goes on behind what is surely on the disk."""
    monkeypatch.setattr(writing, "_SAFE_BYTES", safe_bytes)
    whole = write(folders("moe"), tmp_path / "whole.gguf", outtype="q8_0").read_bytes()
    conversion, written = gguf.from_huggingface(folders("moe"), "q8_0"), []

    def done(nbytes: int) -> None:
        written.append(nbytes)
        if len(written) == 70:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(conversion, tmp_path / "m.gguf", done)
    assert not (tmp_path / "m.gguf").exists()
    again = gguf.from_huggingface(folders("moe"), "q8_0")
    read, counted = [], []
    source = again.plan.source
    original = source.read
    monkeypatch.setattr(source, "read", lambda name: read.append(name) or original(name))
    convert(again, tmp_path / "m.gguf", counted.append)
    assert (tmp_path / "m.gguf").read_bytes() == whole
    assert sum(counted) == again.plan.nbytes
    tensors = len(source.specs)
    assert len(read) == tensors if safe_bytes > 1 else 0 < len(read) < tensors / 2
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_large_tensors_go_in_pieces(folders, tmp_path, monkeypatch):
    """The same file whether a tensor is encoded at once or a row at a time."""
    at_once = write(folders("moe"), tmp_path / "a.gguf", outtype="q8_0").read_bytes()
    monkeypatch.setattr(writing, "ELEMENTS", 1)
    assert write(folders("moe"), tmp_path / "b.gguf", outtype="q8_0").read_bytes() == at_once


def test_dry_run_lists_everything(folders):
    conversion = gguf.from_huggingface(folders("latent"), "bf16")
    lines = list(conversion.plan.lines())
    assert "blk.0.ssm_a [8, 1] float32 <- backbone.layers.0.mixer.A_log" in lines
    assert any(
        line.startswith("blk.1.ffn_up_exps.weight [8, 24, 20] bfloat16 <- backbone.layers.1.mixer.experts.0.up_proj")
        for line in lines
    )
    entry = next(entry for entry in conversion.plan.entries if entry.name == "blk.1.ffn_up_exps.weight")
    stack = entry.read(conversion.plan.source)
    assert stack.shape == (8, 24, 20) and dataclasses.is_dataclass(entry)

"""mamba-ssm folders: against a recurrence in mamba-ssm's own names, and there and back.

The folders and the recurrence are written here from mamba_ssm's `MambaLMHeadModel`, `Mamba2` and `MHA`; nothing of the
package's conversion is used on that side.
"""

import json
import runpy
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from families import relative_difference, small_model, tokens
from torch.nn.functional import silu, softplus

from nemotron_h import NemotronHForCausalLM
from nemotron_h.checkpoints import mamba_ssm
from nemotron_h.checkpoints.tensors import SafetensorsFolder
from nemotron_h.checkpoints.writing import convert

WIDTH, VOCAB, PADDED = 24, 61, 64
SSM = {"layer": "Mamba2", "d_state": 5, "d_conv": 3, "expand": 2, "headdim": 4, "ngroups": 3, "chunk_size": 8}
ATTENTION = {"causal": True, "num_heads": 6, "num_heads_kv": 2, "head_dim": 5}


def theirs(attention=(), layers=3, ssm=None, attn=None, **fields):
    """A config and a state dict (float32, seeded) in mamba-ssm's layout."""
    ssm = {**SSM, **(ssm or {})}
    attn = {**ATTENTION, **(attn or {})} if attention else {}
    config = {
        "d_model": WIDTH,
        "d_intermediate": 0,
        "n_layer": layers,
        "vocab_size": VOCAB,
        "ssm_cfg": ssm,
        "attn_layer_idx": list(attention),
        "attn_cfg": attn,
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
        **fields,
    }
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=0.3):
        return torch.randn(shape, generator=generator) * scale

    inner, states = 2 * WIDTH, 2 * ssm["ngroups"] * ssm["d_state"]
    heads = inner // ssm["headdim"]
    weights = {"backbone.embedding.weight": normal(PADDED, WIDTH, scale=1)}
    for layer in range(layers):
        prefix = f"backbone.layers.{layer}."
        weights[prefix + "norm.weight"] = 1 + normal(WIDTH)
        if layer in attention:
            queries, keys = attn["num_heads"] * attn["head_dim"], attn["num_heads_kv"] * attn["head_dim"]
            weights[prefix + "mixer.in_proj.weight"] = normal(queries + 2 * keys, WIDTH)
            if attn.get("qkv_proj_bias", True):
                weights[prefix + "mixer.in_proj.bias"] = normal(queries + 2 * keys)
            weights[prefix + "mixer.out_proj.weight"] = normal(WIDTH, queries)
            if attn.get("out_proj_bias", True):
                weights[prefix + "mixer.out_proj.bias"] = normal(WIDTH)
            continue
        weights[prefix + "mixer.in_proj.weight"] = normal(2 * inner + states + heads, WIDTH)
        weights[prefix + "mixer.out_proj.weight"] = normal(WIDTH, inner)
        if ssm.get("bias"):
            weights[prefix + "mixer.in_proj.bias"] = normal(2 * inner + states + heads)
            weights[prefix + "mixer.out_proj.bias"] = normal(WIDTH)
        weights[prefix + "mixer.conv1d.weight"] = normal(inner + states, 1, ssm["d_conv"], scale=0.6)
        weights[prefix + "mixer.conv1d.bias"] = normal(inner + states)
        weights[prefix + "mixer.dt_bias"] = torch.linspace(-9, 1, heads)
        weights[prefix + "mixer.A_log"] = torch.linspace(-1, 2.5, heads)
        weights[prefix + "mixer.D"] = 1 + normal(heads)
        weights[prefix + "mixer.norm.weight"] = 1 + normal(inner)
    weights["backbone.norm_f.weight"] = 1 + normal(WIDTH)
    weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    if not config["tie_embeddings"]:
        weights["lm_head.weight"] = normal(PADDED, WIDTH)
    return config, weights


def store(folder, config, weights):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def rms(x, weight):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight


def reference_logits(config, weights, ids):
    """`MambaLMHeadModel` token by token in float64, for one row of ids: (length, padded vocabulary)."""
    w = {name: value.double() for name, value in weights.items()}
    ssm, attn = config["ssm_cfg"], config["attn_cfg"]
    hidden = w["backbone.embedding.weight"][ids]
    for layer in range(config["n_layer"]):
        mixer = f"backbone.layers.{layer}.mixer."
        u = rms(hidden, w[f"backbone.layers.{layer}.norm.weight"])
        projected = u @ w[mixer + "in_proj.weight"].T + w.get(mixer + "in_proj.bias", 0)
        if layer in config["attn_layer_idx"]:
            heads, kv, size = attn["num_heads"], attn["num_heads_kv"], attn["head_dim"]
            context = torch.zeros(len(ids), heads * size, dtype=torch.float64)
            for t in range(len(ids)):
                for head in range(heads):
                    shared = head // (heads // kv)
                    key_at = heads * size + shared * size
                    value_at = heads * size + kv * size + shared * size
                    query = projected[t, head * size : (head + 1) * size]
                    scores = projected[: t + 1, key_at : key_at + size] @ query / size**0.5
                    values = projected[: t + 1, value_at : value_at + size]
                    context[t, head * size : (head + 1) * size] = torch.softmax(scores, 0) @ values
            mixed = context
        else:
            inner, groups, states = 2 * WIDTH, ssm["ngroups"], ssm["d_state"]
            heads = inner // ssm["headdim"]
            low, high = ssm.get("dt_limit", (0.0, float("inf")))
            z, conv_in, dt = projected.split([inner, inner + 2 * groups * states, heads], -1)
            taps = w[mixer + "conv1d.weight"][:, 0]
            mixed = torch.zeros(len(ids), inner, dtype=torch.float64)
            state = torch.zeros(heads, ssm["headdim"], states, dtype=torch.float64)
            for t in range(len(ids)):
                conv = w[mixer + "conv1d.bias"].clone()
                for back in range(ssm["d_conv"]):
                    if t - back >= 0:
                        conv += taps[:, ssm["d_conv"] - 1 - back] * conv_in[t - back]
                x, B, C = silu(conv).split([inner, groups * states, groups * states])
                for head in range(heads):
                    group = head // (heads // groups)
                    part = slice(head * ssm["headdim"], (head + 1) * ssm["headdim"])
                    B_N, C_N = (v[group * states : (group + 1) * states] for v in (B, C))
                    step = softplus(dt[t, head] + w[mixer + "dt_bias"][head]).clamp(low, high)
                    decay = torch.exp(-step * torch.exp(w[mixer + "A_log"][head]))
                    state[head] = state[head] * decay + step * torch.outer(x[part], B_N)
                    mixed[t, part] = state[head] @ C_N + w[mixer + "D"][head] * x[part]
            mixed = mixed * silu(z)
            weight = w[mixer + "norm.weight"]
            of_group = inner // groups
            mixed = torch.cat(
                [rms(mixed[:, g : g + of_group], weight[g : g + of_group]) for g in range(0, inner, of_group)], -1
            )
        hidden = hidden + mixed @ w[mixer + "out_proj.weight"].T + w.get(mixer + "out_proj.bias", 0)
    return rms(hidden, w["backbone.norm_f.weight"]) @ w["lm_head.weight"].T


MODELS = {
    "mamba": {},
    "untied": {"tie_embeddings": False, "ssm": {"dt_limit": [0.01, 0.2], "bias": True}, "residual_in_fp32": False},
    "hybrid": {"attention": [1, 2], "layers": 4, "attn": {"qkv_proj_bias": False, "out_proj_bias": False}},
    "biased": {"attention": [1]},
    "half biased": {"attention": [0], "attn": {"out_proj_bias": False}},
}


@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_of_the_recurrence_in_mamba_ssm_s_layout(kind, tmp_path):
    config, weights = theirs(**MODELS[kind])
    convert(mamba_ssm.to_huggingface(store(tmp_path / "theirs", config, weights)), tmp_path / "ours")
    model = NemotronHForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    ids = tokens(1, 21, vocab=VOCAB)
    with torch.no_grad():
        logits = model(ids).logits[0]
    reference = reference_logits(config, weights, ids[0])
    assert logits.shape == (21, PADDED)
    assert relative_difference(logits.double(), reference) <= 1e-5


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "half biased"])
def test_there_and_back_is_the_same_bits(kind, tmp_path):
    config, weights = theirs(**MODELS[kind])
    weights = {
        name: value if name.endswith(("A_log", "dt_bias")) else value.bfloat16() for name, value in weights.items()
    }
    if config["tie_embeddings"]:
        weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    convert(mamba_ssm.to_huggingface(store(tmp_path / "theirs", config, weights)), tmp_path / "ours")
    convert(mamba_ssm.from_huggingface(tmp_path / "ours"), tmp_path / "back")
    for mmap in (False, True):
        back = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True, mmap=mmap)
        assert set(back) == set(weights)
        for name, value in weights.items():
            assert back[name].dtype == value.dtype and torch.equal(back[name], value), name
    # mamba-ssm rounds vocab_size up by itself; every other setting comes back, defaults spelt out.
    again = json.loads((tmp_path / "back" / "config.json").read_text())
    expected = {**config, "vocab_size": PADDED, "pad_vocab_size_multiple": 1}
    for key in ("ssm_cfg", "attn_cfg"):
        assert expected.pop(key).items() <= again[key].items()
    assert expected.items() <= again.items()


def test_our_tensors_come_back_the_same_bits(tmp_path):
    model = small_model("tied", torch.float32, hybrid_override_pattern="M*M*", mamba_num_heads=8, attention_bias=True)
    model.save_pretrained(tmp_path / "ours")
    convert(mamba_ssm.from_huggingface(tmp_path / "ours"), tmp_path / "theirs")
    convert(mamba_ssm.to_huggingface(tmp_path / "theirs", shard_bytes=20_000), tmp_path / "back")
    before, after = SafetensorsFolder(tmp_path / "ours"), SafetensorsFolder(tmp_path / "back")
    assert len(after.files) > 1
    assert before.specs == after.specs
    for name in before.specs:
        assert torch.equal(before.read(name), after.read(name)), name


def test_packed_rows_are_queries_then_keys_then_values(tmp_path):
    config, weights = theirs(**MODELS["hybrid"])
    packed = weights["backbone.layers.1.mixer.in_proj.weight"]
    packed[:] = torch.arange(packed.shape[0])[:, None]
    convert(mamba_ssm.to_huggingface(store(tmp_path / "theirs", config, weights)), tmp_path / "ours")
    ours = SafetensorsFolder(tmp_path / "ours")
    rows = {p: ours.read(f"backbone.layers.1.mixer.{p}_proj.weight")[:, 0].int().tolist() for p in "qkv"}
    assert rows == {"q": list(range(30)), "k": list(range(30, 40)), "v": list(range(40, 50))}


def test_the_written_file_is_a_sound_archive_with_one_head_and_embedding(tmp_path):
    model = small_model("tied", torch.float32, hybrid_override_pattern="MM", mamba_num_heads=8)
    model.save_pretrained(tmp_path / "ours")
    convert(mamba_ssm.from_huggingface(tmp_path / "ours"), tmp_path / "theirs")
    written = tmp_path / "theirs" / "pytorch_model.bin"
    assert zipfile.ZipFile(written).testzip() is None
    state_dict = torch.load(written, weights_only=True)
    assert state_dict["lm_head.weight"].data_ptr() == state_dict["backbone.embedding.weight"].data_ptr()
    torch.save(state_dict, tmp_path / "whole.bin")
    ours, theirs = zipfile.ZipFile(written), zipfile.ZipFile(tmp_path / "whole.bin")
    for mine, other in zip(ours.infolist(), theirs.infolist(), strict=True):
        assert mine.filename.partition("/")[2] == other.filename.partition("/")[2]
        if "/data/" in mine.filename:
            assert ours.read(mine) == theirs.read(other)
            # The checksum is also between the bytes and the next record.
            raw = written.read_bytes()
            start = mine.header_offset + 30 + sum(struct.unpack("<HH", raw[mine.header_offset + 26 :][:4]))
            assert struct.unpack("<4sI", raw[start + mine.file_size :][:8]) == (b"PK\x07\x08", other.CRC)


REFUSED_CONFIGS = {
    "d_intermediate": ({"d_intermediate": 48}, "d_intermediate 48"),
    "Mamba-1": ({"ssm": {"layer": "Mamba1"}}, "Mamba1"),
    "Mamba-1 by default": ({"ssm_cfg": {"d_state": 16}}, "Mamba1"),
    "LayerNorm": ({"rms_norm": False}, "LayerNorm"),
    "norm before gate": ({"ssm": {"norm_before_gate": True}}, "norm_before_gate"),
    "no norm": ({"ssm": {"rmsnorm": False}}, "rmsnorm"),
    "D of channels": ({"ssm": {"D_has_hdim": True}}, "D_has_hdim"),
    "MLP in the mixer": ({"ssm": {"d_ssm": 24}}, "d_ssm 24"),
    "unknown setting": ({"ssm": {"d_magic": 2}}, "d_magic=2"),
    "headdim": ({"ssm": {"headdim": 7}}, "headdim 7"),
    "groups": ({"ssm": {"ngroups": 5}}, "n_groups 5"),
    "rotary": ({"attention": [1], "attn": {"rotary_emb_dim": 32}}, "rotary_emb_dim=32"),
    "conv": ({"attention": [1], "attn": {"d_conv": 4}}, "d_conv=4"),
    "MLP beside attention": ({"attention": [1], "attn": {"mlp_dim": 256}}, "mlp_dim=256"),
    "not causal": ({"attention": [1], "attn": {"causal": False}}, "causal"),
    "scale": ({"attention": [1], "attn": {"softmax_scale": 1.0}}, "softmax_scale 1.0"),
    "no heads": ({"attention": [1], "attn": {"num_heads": None}}, "num_heads None"),
    "attention elsewhere": ({"attn_layer_idx": [7]}, "7 in attn_layer_idx"),
    "no vocabulary": ({"vocab_size": "many"}, "vocab_size 'many'"),
}


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_what_this_family_has_not_is_refused_in_a_sentence(case, tmp_path):
    fields, words = REFUSED_CONFIGS[case]
    direct = {key: fields[key] for key in fields if key in ("rotary", "ssm_cfg", "attn_layer_idx", "vocab_size")}
    attn = fields.get("attn", {})
    built = {"attention": fields.get("attention", ()), "attn": {k: v for k, v in attn.items() if k == "rotary_emb_dim"}}
    config, weights = theirs(**built)
    config["attn_cfg"] |= attn
    config["ssm_cfg"] = {**config["ssm_cfg"], **fields.get("ssm", {})}
    config |= direct | {key: fields[key] for key in ("d_intermediate", "rms_norm") if key in fields}
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        mamba_ssm.to_huggingface(store(tmp_path / "theirs", config, weights))
    assert words in str(error.value) and str(tmp_path / "theirs") in str(error.value)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("dense", {}, "kind mlp (layer 1)"),
        ("moe", {}, "kind moe (layer 1)"),
        ("mamba", {"hybrid_override_pattern": "MM"}, "48 Mamba channels at hidden_size 32"),
        ("mamba", {"hybrid_override_pattern": "MM", "layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-06"),
        (
            "mamba",
            {"hybrid_override_pattern": "MM", "num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*"},
            "num_nextn_predict_layers 1",
        ),
    ],
)
def test_what_mamba_ssm_has_not_is_refused_in_a_sentence(family, changes, words, tmp_path):
    small_model(family, torch.float32, **changes).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        mamba_ssm.from_huggingface(tmp_path / "ours")
    assert words in str(error.value)


def refused(source, dest, *words):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        convert(mamba_ssm.to_huggingface(source), dest)
    assert all(word in str(error.value) for word in words), error.value
    assert not dest.exists()


def test_a_table_that_does_not_hold_names_the_tensor_and_writes_nothing(tmp_path):
    config, weights = theirs()
    dest = tmp_path / "ours"
    name = "backbone.layers.1.mixer.D"
    missing = store(tmp_path / "missing", config, {key: value for key, value in weights.items() if key != name})
    refused(missing, dest, name, "lacks")
    refused(
        store(tmp_path / "more", config, {**weights, "backbone.layers.3.norm.weight": torch.ones(24)}),
        dest,
        "layers.3.norm",
    )
    refused(store(tmp_path / "shape", config, {**weights, name: torch.ones(11)}), dest, name, "(11,)", "(12,)")
    untied = store(tmp_path / "untied", config, {**weights, "lm_head.weight": torch.ones(PADDED, WIDTH)})
    refused(untied, dest, "lm_head.weight", "tie_embeddings")
    refused(store(tmp_path / "optimizer", config, {"model": weights, "step": 3}), dest, "'model'")
    no_weights = store(tmp_path / "empty", config, {})
    (no_weights / "pytorch_model.bin").unlink()
    refused(no_weights, dest, "pytorch_model.bin")
    # The other direction.
    model = small_model("mamba", torch.float32, hybrid_override_pattern="MM", mamba_num_heads=8)
    model.save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["tie_word_embeddings"], config["conv_kernel"] = False, 5
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"conv1d.weight with shape"):
        convert(mamba_ssm.from_huggingface(tmp_path / "hf"), tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_a_file_cut_short_names_the_first_tensor_that_is_gone(tmp_path):
    config, weights = theirs(layers=2, attention=[1])
    folder = store(tmp_path / "theirs", config, weights)
    whole = (folder / "pytorch_model.bin").read_bytes()
    with zipfile.ZipFile(folder / "pytorch_model.bin") as archive:
        records = [record for record in archive.infolist() if "/data/" in record.filename]
    names = [name for name in weights if name != "lm_head.weight"]  # in the embeddings' storage
    for name, record in zip(names, records, strict=True):
        start = record.header_offset + 30 + sum(struct.unpack("<HH", whole[record.header_offset + 26 :][:4]))
        for size in (start + record.file_size - 1, start, record.header_offset + 3):
            (folder / "pytorch_model.bin").write_bytes(whole[:size])
            refused(folder, tmp_path / "ours", "pytorch_model.bin", f"from the tensor {name} on")
    for size in (0, 10, 100, len(whole) - 30):  # in the list of names, and in that of the records
        (folder / "pytorch_model.bin").write_bytes(whole[:size])
        refused(folder, tmp_path / "ours", "pytorch_model.bin", "cannot be read")
    with pytest.raises(ValueError) as error:
        mamba_ssm.to_huggingface(folder)
    assert ". " not in str(error.value)  # torch says more than one


def test_an_interrupted_run_leaves_nothing_under_the_name_and_a_rerun_completes(tmp_path, monkeypatch):
    config, weights = theirs()
    store(tmp_path / "theirs", config, weights)

    def interrupt(after):
        def done(nbytes):
            nonlocal after
            after -= 1
            if after == 0:
                raise KeyboardInterrupt

        return done

    with pytest.raises(KeyboardInterrupt):
        convert(mamba_ssm.to_huggingface(tmp_path / "theirs", shard_bytes=20_000), tmp_path / "ours", interrupt(12))
    assert not (tmp_path / "ours").exists()
    convert(mamba_ssm.to_huggingface(tmp_path / "theirs", shard_bytes=20_000), tmp_path / "ours")
    with pytest.raises(KeyboardInterrupt):
        convert(mamba_ssm.from_huggingface(tmp_path / "ours"), tmp_path / "back", interrupt(7))
    assert not (tmp_path / "back").exists()
    convert(mamba_ssm.from_huggingface(tmp_path / "ours"), tmp_path / "back")
    back = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    assert not list(tmp_path.glob(".*.partial"))


def test_companions_come_along_and_safetensors_are_read_as_well(tmp_path):
    config, weights = theirs(tie_embeddings=False)
    folder = store(tmp_path / "theirs", config, weights)
    (folder / "tokenizer.json").write_text("{}")
    convert(mamba_ssm.to_huggingface(folder), tmp_path / "a")
    (folder / "pytorch_model.bin").unlink()
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors")
    convert(mamba_ssm.to_huggingface(folder), tmp_path / "b")
    assert (tmp_path / "a" / "tokenizer.json").exists()
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_only_their_folders_are_recognised(tmp_path):
    config, weights = theirs()
    assert mamba_ssm.recognises(store(tmp_path / "theirs", config, weights))
    small_model("mamba").config.save_pretrained(tmp_path / "ours")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    for other in ("ours", "list", "absent"):
        assert not mamba_ssm.recognises(tmp_path / other)


def test_the_script_lists_and_converts(tmp_path, monkeypatch, capsys):
    config, weights = theirs(layers=1)
    store(tmp_path / "theirs", config, weights)
    script = Path(__file__).parents[2] / "conversion" / "mamba_ssm.py"
    monkeypatch.syspath_prepend(str(script.parent))

    def run(*options):
        monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "theirs"), str(tmp_path / "ours"), *options])
        runpy.run_path(str(script), run_name="__main__")

    run("--dry-run")
    assert "backbone.embeddings.weight [64, 24] float32 <- backbone.embedding.weight" in capsys.readouterr().out
    assert not (tmp_path / "ours").exists()
    run()
    assert (tmp_path / "ours" / "model.safetensors").exists()
    with pytest.raises(SystemExit, match="is there already"):
        run()

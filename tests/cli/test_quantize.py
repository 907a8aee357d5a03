"""`nemotron-h quantize`: what is written, copied and said, and that a failure leaves nothing behind."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemotron_h import NemotronHConfig, NemotronHForCausalLM
from nemotron_h.quantization.int8_int4 import QuantizedLinear, agreement


@pytest.fixture(scope="session")
def decided_model(chat_model, tmp_path_factory) -> str:
    """The random model with a louder head: of flat distributions, every divergence is the same in either direction."""
    folder = tmp_path_factory.mktemp("decided") / "model"
    shutil.copytree(chat_model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] *= 50
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.core
@pytest.mark.parametrize("to", ["int8", "int4"])
def test_written_folder(to, cli_json, decided_model, tmp_path):
    facts = cli_json("quantize", decided_model, str(tmp_path / "made" / "here"), "--to", to)
    folder = tmp_path / "made" / "here"
    assert [path.name for path in folder.parent.iterdir()] == ["here"]
    model, direct = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(decided_model, quantize=to),
    )
    expected = direct.state_dict()
    assert expected.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert not isinstance(model.lm_head, QuantizedLinear)

    # what is not weights is the source's, byte for byte
    for path in Path(decided_model).iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    assert (folder / "tokenizer.json").exists() and (folder / "generation_config.json").exists()
    assert AutoTokenizer.from_pretrained(folder).chat_template

    # sizes are those of the tensors on disk
    def stored(path):
        return sum(tensor.nbytes for tensor in load_file(Path(path) / "model.safetensors").values())

    assert (facts["bytes_before"], facts["bytes_after"]) == (stored(decided_model), stored(folder))

    # and the check is the one that it says it is
    source = AutoModelForCausalLM.from_pretrained(decided_model)
    ids = torch.randint(source.vocab_size, (1, 384), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        p, q = (each(ids).logits[0].double().log_softmax(-1) for each in (source, model))
    assert facts["tokens_checked"] == 384
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").item()
    assert facts["kl"] == pytest.approx(expected, rel=1e-6, abs=0)
    assert facts["same_best_token"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert 1e-5 < facts["kl"] < 0.5


def test_agreement():
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    assert agreement(logits, logits) == (0.0, 1.0)
    kl, same = agreement(torch.zeros(3, 2), logits)
    p = logits.double().softmax(-1)
    assert kl == pytest.approx((p * (p * 2).log()).sum(-1).mean().item())
    assert same == pytest.approx(1 / 3)  # of two equal logits, the first is the best


def test_said(cli, base_model, tmp_path):
    said = cli("quantize", base_model, str(tmp_path / "int4"), "--to", "int4")
    assert "int4 is written: " in said.stdout and "% of the time" in said.stdout
    assert said.stderr == ""
    plain = cli("quantize", base_model, str(tmp_path / "int8"), "--to", "int8", "--no-check").stdout
    assert "random tokens" not in plain and (tmp_path / "int8" / "config.json").exists()


def test_dry_run(cli, cli_json, base_model, tmp_path):
    """Nothing is written, no weights are read, and the sizes are those of the real run."""
    config_only = tmp_path / "config"
    config_only.mkdir()
    shutil.copy(Path(base_model) / "config.json", config_only)
    arguments = (str(tmp_path / "made"), "--to", "int4", "--include-lm-head")
    dry = cli_json("quantize", str(config_only), *arguments, "--dry-run")
    assert "(not written)" in cli("quantize", str(config_only), *arguments, "--dry-run").stdout
    assert not (tmp_path / "made").exists()
    made = cli_json("quantize", base_model, *arguments, "--no-check")
    assert [dry[key] for key in ("bytes_before", "bytes_after")] == [made["bytes_before"], made["bytes_after"]]
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "made").lm_head, QuantizedLinear)


def test_a_published_config(cli_json):
    """Nano 9B v2, as published: bfloat16 but for the small float32 tensors; 8 bits halve all but table and head."""
    config = Path(__file__).parents[1] / "data" / "configs" / "NVIDIA-Nemotron-Nano-9B-v2.json"
    facts = cli_json("quantize", str(config), "nowhere", "--to", "int8", "--dry-run")
    assert facts["bytes_before"] == pytest.approx(2 * 8_888_227_328, rel=1e-4)
    kept = 2 * 131_072 * 4_480
    assert facts["bytes_after"] == pytest.approx(8_888_227_328 + kept, rel=2e-3)


def test_refused(refused, base_model, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    dest = str(tmp_path / "dest")
    assert "There is no --to int3; write --to int8 or --to int4." in refused(
        "quantize", base_model, dest, "--to", "int3"
    )
    assert "no folder 'nowhere'" in refused("quantize", "nowhere", dest, "--to", "int8")
    assert "nobody/nothing is no folder here" in refused("quantize", "nobody/nothing", dest, "--to", "int8")
    there = tmp_path / "there"
    there.mkdir()
    (there / "file").write_text("mine")
    assert f"{there} is there already" in refused("quantize", base_model, str(there), "--to", "int8")

    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "is a 'llama' model" in refused("quantize", str(other), dest, "--to", "int8")
    assert not Path(dest).exists()


def test_already_quantized(cli, refused, base_model, tmp_path):
    cli("quantize", base_model, str(tmp_path / "int8"), "--to", "int8", "--no-check")
    said = refused("quantize", str(tmp_path / "int8"), str(tmp_path / "int4"), "--to", "int4")
    assert "is quantized already (nemotron_h_weight_only); name the checkpoint that it was made from." in said


def test_tied(refused, tmp_path):
    NemotronHConfig(hybrid_override_pattern="M*", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    arguments = ("quantize", str(tmp_path / "tied"), str(tmp_path / "dest"), "--to", "int8", "--include-lm-head")
    assert "drop --include-lm-head" in refused(*arguments)


def test_a_failure_leaves_nothing_behind(refused, base_model, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(base_model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["backbone.layers.0.mixer.out_proj.weight"][0, 0] = torch.inf
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    said = refused("quantize", str(broken), str(tmp_path / "out" / "dest"), "--to", "int8")
    assert "model.layers.0.mixer.out_proj.weight" in said and "NaN or infinite" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("room", [4096, 60_000, 90_000])  # within the config, the weights, the tokenizer
def test_a_full_disk(room, refused, base_model, small_disk):
    taken = (1 << 18) - room
    (small_disk / "other").write_bytes(b"x" * taken)
    said = refused("quantize", str(base_model), str(small_disk / "out" / "dest"), "--to", "int4")
    assert said.endswith(f"The disk of {small_disk}/out/dest is full; make room and run it again.")
    assert list((small_disk / "out").iterdir()) == []


def test_interrupted_while_writing(base_model, tmp_path, monkeypatch, cli):
    def stop(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(NemotronHForCausalLM, "save_pretrained", stop)
    cli("quantize", base_model, str(tmp_path / "dest"), "--to", "int8", code=130)
    assert list(tmp_path.iterdir()) == []

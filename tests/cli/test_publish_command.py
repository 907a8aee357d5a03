"""`nemotron-h publish`: what it hands to `publish()` is what the folder holds, and what cannot be is one sentence."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nemotron_h import NemotronHForSequenceClassification
from nemotron_h.hub import publish as publishing

TENSORS = "model.safetensors"


@pytest.fixture(scope="module")
def adapter(chat_model, tmp_path_factory) -> Path:
    """An adapter's folder, with the path of its base in it, and no tokenizer."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["in_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(chat_model), config)
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    model.save_pretrained(str(folder))
    return folder


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


@pytest.mark.core
def test_a_trainers_checkpoint_to_a_folder(cli, cli_json, chat_model, tmp_path) -> None:
    checkpoint = Path(shutil.copytree(chat_model, tmp_path / "checkpoint-5"))
    for name in ("trainer_state.json", "optimizer.pt", "training_args.bin"):
        (checkpoint / name).write_text(str(tmp_path))
    facts = cli_json(
        "publish", str(checkpoint), str(tmp_path / "a"), "--to-folder", "--base-model", "nvidia/x", "--data", "me/sums",
        "--data", "words", "--metric", "accuracy, a=b=0.50", "--metric", "steps=5", "--license", "mit",
    )  # fmt: skip
    assert facts == {"source": str(checkpoint), "kind": "model", "published": str(tmp_path / "a")}
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {path.name for path in Path(chat_model).iterdir()} | {"README.md"}
    before, after = load_file(checkpoint / TENSORS), load_file(tmp_path / "a" / TENSORS)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    said = card(tmp_path / "a")
    assert "| accuracy, a=b | 0.50 |\n| steps | 5 |" in said and 'license: "mit"' in said
    assert 'base_model: "nvidia/x"' in said and "Trained on: me/sums, words." in said and "<SPECIAL_11>" in said
    assert cli("publish", str(checkpoint), str(tmp_path / "b"), "--to-folder", "--base-model", "none").stdout == (
        f"The model of {checkpoint} is at {tmp_path / 'b'}\n"
    )


def test_an_adapter_and_the_two_merged(cli_json, chat_model, adapter, tmp_path) -> None:
    facts = cli_json("publish", str(adapter), str(tmp_path / "a"), "--to-folder", "--base-model", "me/base")
    assert facts["kind"] == "adapter"
    stored, written = (load_file(each / "adapter_model.safetensors") for each in (adapter, tmp_path / "a"))
    assert stored.keys() == written.keys() and all(torch.equal(stored[name], written[name]) for name in stored)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/base" and str(tmp_path) not in card(tmp_path / "a")
    assert (tmp_path / "a" / "chat_template.jinja").is_file()  # of the base: the adapter's folder has none

    line = ("publish", str(adapter), str(tmp_path / "m"), "--to-folder", "--merge", "--base-model", "none")
    assert cli_json(*line)["kind"] == "model"
    base, merged = load_file(Path(chat_model) / TENSORS), load_file(tmp_path / "m" / TENSORS)
    scale = config["lora_alpha"] / config["r"]
    assert base.keys() == merged.keys()
    changed = 0
    for name, tensor in base.items():
        module = name.replace("backbone.", "base_model.model.model.").removesuffix(".weight")
        if (A := stored.get(f"{module}.lora_A.weight")) is not None:
            tensor = tensor + scale * stored[f"{module}.lora_B.weight"] @ A
            assert not torch.allclose(tensor, base[name], atol=1e-3)
            changed += 1
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)
    assert changed == 1 == len(stored) // 2


@pytest.mark.core
def test_a_classifier_and_an_adapter_of_one(cli_json, chat_model, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    model = NemotronHForSequenceClassification.from_pretrained(chat_model, num_labels=3)
    model.save_pretrained(tmp_path / "whole")
    line = ("publish", str(tmp_path / "whole"), str(tmp_path / "a"), "--to-folder", "--base-model", "me/base")
    assert cli_json(*line)["kind"] == "model"
    assert 'pipeline_tag: "text-classification"' in card(tmp_path / "a")
    before, after = load_file(tmp_path / "whole" / TENSORS), load_file(tmp_path / "a" / TENSORS)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    lora = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["in_proj"], r=2))
    lora.save_pretrained(str(tmp_path / "lora"))
    cli_json("publish", str(tmp_path / "lora"), str(tmp_path / "b"), "--to-folder", "--base-model", "me/base")
    assert 'AutoModelForSequenceClassification.from_pretrained("me/base", num_labels=3' in card(tmp_path / "b")
    stored, written = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "b"))
    assert stored.keys() == written.keys() and all(torch.equal(stored[name], written[name]) for name in stored)


def test_an_adapter_whose_base_is_elsewhere(refused, cli, chat_model, adapter, tmp_path, monkeypatch) -> None:
    """What its config names is looked for here alone; the network is asked for what was typed."""
    asked = []

    def from_pretrained(name, **options):
        asked.append((name, options["local_files_only"]))
        raise OSError("no such repository")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    config = json.loads((moved / "adapter_config.json").read_text())
    for base in ("trained/base", "/data/base", None):
        (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        said = refused("publish", str(moved), str(tmp_path / "a"), "--to-folder")
        wanted = f"{base!r}, which is not on this machine: name its hub id" if base else "does not say its base_model"
        assert wanted in said and "with --base-model" in said and not asked
        said = refused("publish", str(moved), str(tmp_path / "a"), "--to-folder", "--base-model", "me/base")
        assert "me/base is no folder here and could not be had from the hub (no such repository)" in said
        assert asked == [("me/base", False)]
        asked.clear()


def test_to_the_hub(cli, chat_model, monkeypatch) -> None:
    """What tests/test_publish.py proves of `publish()` is called with what was typed."""
    seen = {}

    def publish(model, where, **options):
        seen.update(options, model=model, where=where)
        return f"https://huggingface.co/{where}"

    monkeypatch.setattr(publishing, "publish", publish)
    said = cli("publish", chat_model, "me/nano", "--private", "--base-model", "nvidia/x").stdout
    assert said == f"The model of {chat_model} is at https://huggingface.co/me/nano\n"
    assert seen["where"] == "me/nano" and seen["private"] is True and seen["base_model"] == "nvidia/x"
    assert seen["tokenizer"].chat_template and type(seen["model"]).__name__ == "NemotronHForCausalLM"
    cli("publish", chat_model, "me/nano", "--base-model", "none")
    assert seen["private"] is None and seen["license"] is None and seen["base_model"] is None


def test_refusals(refused, chat_model, adapter, tmp_path, monkeypatch) -> None:
    there = str(tmp_path / "a")
    assert "has no config.json and no adapter_config.json; name" in refused("publish", str(tmp_path), "me/x")
    assert "nothing to --merge" in refused("publish", chat_model, "me/x", "--merge")
    assert f"'{there}' is no hub id, which is written OWNER/NAME" in refused("publish", chat_model, there)
    assert "no value in --metric 0.5; write NAME=VALUE" in refused("publish", chat_model, "me/x", "--metric", "0.5")
    with monkeypatch.context() as inside:
        inside.chdir(Path(chat_model).parent)
        said = refused("publish", chat_model, Path(chat_model).name)
        assert f"'{Path(chat_model).name}' is here already, so it is not taken for a hub id" in said
    said = refused("publish", str(adapter), "me/x")
    assert repr(chat_model) in said and "name its hub id with --base-model" in said
    assert f"What {chat_model} was trained from is not known" in refused("publish", chat_model, "me/x")
    assert "or write --base-model none" in refused("publish", str(adapter), "me/x", "--merge")
    assert refused("publish", str(adapter), "me/x", "--base-model", "none").endswith("with --base-model.")
    said = refused("publish", chat_model, there, "--to-folder", "--base-model", "none", "--data", str(tmp_path))
    assert "is a path on this machine: write a hub id" in said
    assert refused("publish", chat_model, str(tmp_path.parent), "--to-folder", "--base-model", "none").endswith(
        "or remove it."
    )
    monkeypatch.setitem(sys.modules, "peft", None)
    said = refused("publish", str(adapter), there, "--to-folder", "--merge", "--base-model", "none")
    assert said.endswith("is an adapter, which PEFT reads: pip install peft.")
    assert not list(tmp_path.iterdir())

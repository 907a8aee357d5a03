"""The model in the box: what is in its folder, and that it is as good as its figures say."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemotron_h import mtp
from nemotron_h.bundled import WORD_PROBLEMS, WORD_PROBLEMS_MTP, figures, held_out

FOLDER = Path(WORD_PROBLEMS)
HEAD = Path(WORD_PROBLEMS_MTP)


def test_folder() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "figures.json"}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8 * 2**20


def test_published_layout() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["model_type"] == "nemotron_h"
    assert set(config["hybrid_override_pattern"]) == set("M*-")
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert {name.split(".")[0] for name in file.keys()} <= {"backbone", "lm_head"}


@pytest.mark.core
def test_a_forward_gives_its_cache() -> None:
    """The Trainer writes `use_cache: false` into the config it trains with; a published model has none of that."""
    model = AutoModelForCausalLM.from_pretrained(WORD_PROBLEMS)
    assert model(torch.tensor([[11, 20, 21]])).past_key_values is not None


def test_held_out_problems_are_distinct() -> None:
    questions = [problem["question"] for problem in held_out()]
    assert len(set(questions)) == len(questions) >= 100
    assert {bool(problem["unseen_template"]) for problem in held_out()} == {True, False}


def test_figures() -> None:
    measured = figures()
    assert measured["held_out"]["think"]["accuracy"] >= 0.9 > measured["held_out"]["no_think"]["accuracy"]
    seen = sum(not problem["unseen_template"] for problem in held_out())
    assert (measured["held_out"]["problems"], measured["unseen"]["problems"]) == (seen, len(held_out()) - seen)


@pytest.mark.core
def test_stop_strings_take_the_tokenizer() -> None:
    """`generate(tokenizer=...)`, which `transformers serve` passes with every request, is not the forward's."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(WORD_PROBLEMS), AutoTokenizer.from_pretrained(WORD_PROBLEMS)
    messages = [{"role": "user", "content": held_out()[1]["question"]}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    whole = model.generate(**inputs, max_new_tokens=40)
    stopped = model.generate(**inputs, max_new_tokens=40, tokenizer=tokenizer, stop_strings=[" = "])
    text = tokenizer.decode(stopped[0, inputs["input_ids"].shape[1] :])
    assert text.count(" = ") == 1 or text.endswith(" =")
    assert stopped.shape[1] < whole.shape[1] and whole[0, : stopped.shape[1]].equal(stopped[0])
    assert model.generate(**inputs, max_new_tokens=40, tokenizer=tokenizer).equal(whole)


def test_the_model_knows_nothing_of_the_head_beside_it() -> None:
    model = AutoModelForCausalLM.from_pretrained(WORD_PROBLEMS)
    assert model.mtp is None and model.config.num_nextn_predict_layers == 0
    assert model.num_parameters() == figures()["training"]["parameters"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mtp.load_head(model, WORD_PROBLEMS_MTP)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_heads_folder() -> None:
    """The file is what its card and figures say it is; the size that both add to the package."""
    names = {path.name for path in HEAD.parent.iterdir()}
    assert names == {"mtp.safetensors", "figures.json", "README.md"}
    assert sum(path.stat().st_size for path in HEAD.parent.iterdir()) <= 2**20
    measured = json.loads((HEAD.parent / "figures.json").read_text())
    card = (HEAD.parent / "README.md").read_text()
    with safe_open(HEAD, "pt") as file:
        weights = sum(file.get_tensor(name).numel() for name in file.keys())
        assert {name.split(".")[0] for name in file.keys()} == {"mtp"}
        assert file.metadata()["ahead"] == str(measured["training"]["ahead"])
    assert weights == measured["training"]["parameters"] and f"has {weights:,} weights" in card
    for entry in measured["held_out"]:
        assert entry["same_text"] == entry["problems"] >= 50
        assert entry["tokens_per_step"] >= 1.3
        assert f"| {entry['drafts']} | {entry['acceptance']:.1%} | {entry['tokens_per_step']:.2f} |" in card


@pytest.mark.core
def test_the_head_drafts() -> None:
    """Ten held-out problems: the text of plain greedy decoding, more than two tokens a step."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(WORD_PROBLEMS), AutoTokenizer.from_pretrained(WORD_PROBLEMS)
    mtp.load_head(model, WORD_PROBLEMS_MTP)
    steps = tokens = 0
    for problem in [problem for problem in held_out() if not problem["unseen_template"]][::60]:
        messages = [{"role": "user", "content": problem["question"]}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        plain = model.generate(**inputs, max_new_tokens=320, do_sample=False)
        drafted = model.generate(
            **inputs, max_new_tokens=320, do_sample=False, use_mtp=True, return_dict_in_generate=True
        )
        assert torch.equal(drafted.sequences, plain), problem["question"]
        steps, tokens = steps + drafted.speculation.steps, tokens + plain.shape[1] - inputs["input_ids"].shape[1]
    assert tokens / steps >= 2.0

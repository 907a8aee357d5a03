"""The model in the box: what is in its folder, and that it is as good as its figures say."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemotron_h.bundled import WORD_PROBLEMS, figures, held_out

FOLDER = Path(WORD_PROBLEMS)


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

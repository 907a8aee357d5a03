"""Files that an earlier version wrote open, and give what they gave there (tests/data/quantised and caches)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from families import relative_difference, tokens
from safetensors.torch import load_file

from nemotron_h import NemotronHCache, NemotronHForCausalLM, PromptCache

DATA = Path(__file__).parent / "data"
IDS = tokens(2, 10, vocab=24)


def close(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal but for the order of sums, which other processors add up differently."""
    return relative_difference(logits, expected, record=False) <= 1e-5


@pytest.fixture(scope="module")
def model():
    return NemotronHForCausalLM.from_pretrained(DATA / "quantised" / "int8", dtype=torch.float32)


@pytest.fixture(scope="module")
def expected():
    return load_file(DATA / "caches" / "expected.safetensors")


@pytest.mark.parametrize("how", ["int8", "int4", "fp8", "nvfp4"])
@torch.no_grad()
def test_a_quantised_folder_opens_and_is_saved_as_it_was(how, tmp_path):
    arguments = {} if how.startswith("int") else {"quantized": "packed"}
    model = NemotronHForCausalLM.from_pretrained(DATA / "quantised" / how, dtype=torch.float32, **arguments)
    expected = load_file(DATA / "quantised" / "logits.safetensors")[how]
    assert close(model(tokens(1, 9, vocab=24)).logits, expected)
    model.save_pretrained(tmp_path)
    before, now = (load_file(path / "model.safetensors") for path in (DATA / "quantised" / how, tmp_path))
    assert before.keys() == now.keys() and all(
        before[name].dtype == now[name].dtype and before[name].flatten().view(torch.uint8).equal(
            now[name].flatten().view(torch.uint8)
        )
        for name in before
    )  # fmt: skip


@torch.no_grad()
def test_a_snapshot_opens(model, expected, tmp_path):
    path = DATA / "caches" / "snapshot.safetensors"
    cache = NemotronHCache.load(path, model, token_ids=IDS[:, :9])
    cache.save(tmp_path / "again.safetensors", model=model, token_ids=IDS[:, :9])
    before, now = load_file(path), load_file(tmp_path / "again.safetensors")
    assert before.keys() == now.keys() and all(before[name].equal(now[name]) for name in before)
    assert close(model(IDS[:, 9:], past_key_values=cache).logits, expected["rows"])


@torch.no_grad()
def test_a_folder_of_prompts_opens(model, expected, tmp_path):
    shutil.copytree(DATA / "caches" / "prompts", tmp_path / "prompts")  # reading one notes when
    prompts = PromptCache(folder=tmp_path / "prompts")
    cache = NemotronHCache(model.config)
    assert prompts.resume(cache, IDS[:1], model) == cache.get_seq_length() == 9
    assert close(model(IDS[:1, 9:], past_key_values=cache).logits, expected["row"])
    assert model.generate(IDS[:1], max_new_tokens=6, do_sample=False, prompt_cache=prompts).equal(expected["ids"])
    assert prompts.hits == 2

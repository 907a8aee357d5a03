"""Whole models in float32 with native.c: the function that the float64 model is, and the tokens that torch alone gives.

The comparisons of float64 models (test_one_function.py) never reach native.c.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from families import relative_difference, small_model, tokens

from nemotron_h import NemotronHCache
from nemotron_h.ops import native

TOLERANCE = 2e-5
FAMILIES = ["dense", "moe", "latent"]
USED = {"dense": {"linear", "mamba_step", "attend"}, "moe": {"linear", "mamba_step", "attend"}}
USED["latent"] = USED["moe"]
pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(native.library() is None, reason=native.reason()),
    pytest.mark.parametrize("family", FAMILIES),
]


def model_of(family: str, dtype: torch.dtype = torch.float32):
    """Heads of 16, which native.c takes."""
    model = small_model(family, dtype, head_dim=16)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def calls(monkeypatch) -> Counter[str]:
    """native.c on, and how often each of its functions ran."""
    monkeypatch.delenv(native.ENVIRONMENT_VARIABLE, raising=False)
    counts: Counter[str] = Counter()

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for name in ("linear", "mamba_step", "attend"):
        monkeypatch.setattr(native, name, counted(name, getattr(native, name)))
    return counts


def padded(lengths=(12, 3, 8)):
    ids, mask = tokens(len(lengths), max(lengths)), torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, max(lengths) - length :] = 1
    return ids, mask


@pytest.mark.parametrize("max_cache_len", [None, 40])
@torch.no_grad()
def test_token_by_token_is_the_float64_function(family, max_cache_len, calls):
    model, exact = model_of(family), model_of(family, torch.float64)
    ids = tokens(2, 32)
    expected = exact(ids, use_cache=False).logits
    cache = NemotronHCache(model.config, max_cache_len=max_cache_len)
    logits = [model(ids[:, :12], cache=cache).logits]
    calls.clear()
    logits += [model(token, cache=cache).logits for token in ids[:, 12:].split(1, dim=1)]
    assert relative_difference(torch.cat(logits, 1), expected) <= TOLERANCE
    # a static cache ends with room, so attention has a mask
    assert set(calls) == USED[family] - ({"attend"} if max_cache_len else set())


@torch.no_grad()
def test_padded_rows_token_by_token(family, calls):
    model, exact = model_of(family), model_of(family, torch.float64)
    (ids, mask), more = padded(), tokens(3, 20, seed=4)
    cache = NemotronHCache(model.config)
    logits = [model(ids, attention_mask=mask, cache=cache).logits[:, -1:]]
    for at in range(20):
        whole = torch.cat([mask, torch.ones(3, at + 1, dtype=torch.long)], 1)
        logits.append(model(more[:, at : at + 1], attention_mask=whole, cache=cache).logits)
    logits = torch.cat(logits, 1)
    for row in range(3):
        alone = torch.cat([ids[row][mask[row].bool()], more[row]])[None]
        expected = exact(alone, use_cache=False).logits[:, -21:]
        assert relative_difference(logits[row : row + 1], expected) <= TOLERANCE
    assert {"linear", "mamba_step"} <= set(calls)


STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.mark.parametrize(
    ("rows", "settings"),
    [("one", {}), ("padded", {}), ("padded", {"num_beams": 3}), ("padded", STATIC)],
    ids=["one-row", "padded", "beams", "static"],
)
def test_generate_gives_what_torch_alone_gives(family, settings, rows, calls, monkeypatch):
    model = model_of(family)
    ids, mask = padded() if rows == "padded" else (tokens(1, 12), torch.ones(1, 12, dtype=torch.long))
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask, **settings}
    ours = model.generate(ids, **settings)
    used = dict(calls)
    assert used["mamba_step"] > 0 and used["linear"] > 0
    assert ("attend" in used) == (rows == "one" and "cache_implementation" not in settings)
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, "0")
    theirs = model.generate(ids, **settings)
    assert dict(calls) == used  # the premise
    assert torch.equal(ours, theirs)
    assert len(ours[0].unique()) > 4  # and not one token for ever


@torch.no_grad()
def test_bfloat16_is_as_near_as_without(family, calls, monkeypatch):
    """Sums are float32 in both, so neither is nearer to the float64 model by much."""
    model, exact = model_of(family, torch.bfloat16), model_of(family, torch.bfloat16).double()
    ids = tokens(2, 32)
    expected = exact(ids, use_cache=False).logits.double().log_softmax(-1)
    divergences = []
    for value in ("1", "0"):
        monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, value)
        cache = NemotronHCache(model.config)
        logits = [model(ids[:, :12], cache=cache).logits]
        logits += [model(token, cache=cache).logits for token in ids[:, 12:].split(1, dim=1)]
        ours = torch.cat(logits, 1)[:, 12:].double().log_softmax(-1)
        divergences.append((expected[:, 12:].exp() * (expected[:, 12:] - ours)).sum(-1).mean().item())
    print(f"{family}: KL from float64 {divergences[0]:.2e} with native.c, {divergences[1]:.2e} without")
    assert set(calls) == USED[family] and divergences[0] <= 2 * divergences[1]


@pytest.mark.parametrize("name", ["conv1d", "norm"])
@torch.no_grad()
def test_a_hook_is_called_while_decoding(family, name):
    """What watches or changes a module of the mixer does so for one token as well as for many."""
    model, ids, seen = model_of(family), tokens(1, 6), []
    cache = NemotronHCache(model.config)
    model(ids[:, :5], cache=cache)
    getattr(model.model.layers[0].mixer, name).register_forward_hook(lambda *_: seen.append(1))
    model(ids[:, 5:], cache=cache)
    assert seen == [1]

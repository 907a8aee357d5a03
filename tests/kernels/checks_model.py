"""A whole small model that decodes through the packages, against the same model in torch."""

from __future__ import annotations

import contextlib

import pytest
import torch
from families import relative_difference, small_model, tokens
from real_packages import DEVICE, torch_only

import nemotron_h.layers.masks
from nemotron_h import NemotronHCache
from nemotron_h.ops import cuda_kernels as backends

MAMBA_LAYERS = 2
PROMPT, NEW = 9, 4


@pytest.fixture(autouse=True)
def mask_of_every_token(monkeypatch):
    """A mask is not looked into for a single token on a GPU, where that would stall it: it is handed on."""
    look = nemotron_h.layers.masks.padding_mask

    def hand_on(attention_mask, length, past=0):
        if length > 1 or attention_mask is None:
            return look(attention_mask, length, past)
        return attention_mask[:, -1:].bool()

    monkeypatch.setattr(nemotron_h.layers.masks, "padding_mask", hand_on)
    monkeypatch.setattr(backends, "_KERNEL_CHUNK_SIZE", 16)  # the shorter, the sooner interpreted


def model_of(dtype=torch.float32, **overrides):
    return small_model("tied", dtype, hybrid_override_pattern="M*M-", **overrides).to(DEVICE)


def ids_of(batch, length):
    return tokens(batch, length).to(DEVICE)


@torch.no_grad()
def decoded(model, ids, cache=None, mask=None):
    """The logits of a prompt and of what follows it, token by token."""
    cache = NemotronHCache(model.config) if cache is None else cache
    logits = []
    for start, stop in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, ids.shape[1]))]:
        seen = None if mask is None else mask[:, :stop]
        logits.append(model(ids[:, start:stop], cache=cache, attention_mask=seen).logits)
    return torch.cat(logits, dim=1)


def in_torch(function, *args, **kwargs):
    with torch_only():
        return function(*args, **kwargs)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_decoding(calls, dtype, most, static):
    model, ids = model_of(dtype), ids_of(2, PROMPT + NEW)
    caches = [NemotronHCache(model.config, max_cache_len=16 if static else None) for _ in range(2)]
    actual = decoded(model, ids, caches[0])
    assert calls["selective_state_update"] == calls["causal_conv1d_update"] == MAMBA_LAYERS * NEW
    assert calls["mamba_chunk_scan_combined"] == (MAMBA_LAYERS if dtype == torch.bfloat16 else 0)
    assert relative_difference(actual, in_torch(decoded, model, ids, caches[1]), record=False) <= most
    whole = in_torch(model, ids, use_cache=False).logits
    assert relative_difference(actual, whole, record=False) <= most


def test_states_stay_where_they_are():
    model, ids = model_of(), ids_of(1, PROMPT + NEW)
    cache = NemotronHCache(model.config)
    decoded(model, ids[:, : PROMPT + 1], cache)
    layers = [cache.layers[0], cache.layers[2]]
    before = [t.data_ptr() for layer in layers for t in (layer.window_BCW, layer.state_BHPN)]
    with torch.no_grad():
        model(ids[:, PROMPT + 1 : PROMPT + 2], cache=cache)
    assert [t.data_ptr() for layer in layers for t in (layer.window_BCW, layer.state_BHPN)] == before


def test_left_padded_rows(calls):
    model, ids = model_of(), ids_of(2, PROMPT + NEW)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, PROMPT + 1] = 0  # a row that has nothing to say at one of the steps
    actual = decoded(model, ids, mask=mask)
    assert calls["selective_state_update"] == MAMBA_LAYERS * NEW
    for row in range(2):
        alone = ids[row : row + 1, mask[row].bool()]
        expected = in_torch(model, alone, use_cache=False).logits
        assert relative_difference(actual[row : row + 1, mask[row].bool()], expected, record=False) <= 1e-5


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"cache_implementation": "static"}, {}])
def test_generate(calls, options):
    model, ids = model_of(), ids_of(2, PROMPT)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "disable_compile": True, **options}
    actual = model.generate(ids, **options)
    assert calls["selective_state_update"] == MAMBA_LAYERS * (NEW - 1)
    assert torch.equal(actual, in_torch(model.generate, ids, **options))


def test_reorder_and_crop_and_restore(calls):
    model, ids = model_of(), ids_of(2, PROMPT + NEW)

    @torch.no_grad()
    def walk():
        cache = NemotronHCache(model.config)
        model(ids[:, :PROMPT], cache=cache)
        cache.activate_past_recording()
        logits = [model(ids[:, t : t + 1], cache=cache).logits for t in range(PROMPT, PROMPT + 3)]
        cache.crop(-2)
        taken = cache.snapshot()
        cache.reorder_cache(torch.tensor([1, 0], device=DEVICE))
        logits.append(model(ids[:, PROMPT : PROMPT + 1], cache=cache).logits)
        cache.restore(taken)
        logits.append(model(ids[:, PROMPT + 1 : PROMPT + 2], cache=cache).logits)
        cache.restore(taken)
        logits.append(model(ids[:, PROMPT + 1 : PROMPT + 2], cache=cache).logits)
        return logits

    actual, expected = walk(), in_torch(walk)
    assert calls["selective_state_update"]
    assert max(relative_difference(a, e, record=False) for a, e in zip(actual, expected, strict=True)) <= 1e-5
    assert torch.equal(actual[-1], actual[-2])  # what was decoded after the first restore did not reach the snapshot
    assert relative_difference(actual[-1], actual[1], record=False) <= 1e-5


def test_what_needs_a_gradient_is_left_to_torch(calls):
    """Training through a cache: nothing that the backward needs is written over."""
    model, ids = model_of(), ids_of(1, PROMPT + 2)

    def gradient():
        cache = NemotronHCache(model.config)
        logits = [model(part, cache=cache).logits for part in ids.split([PROMPT, 1, 1], dim=1)]
        loss = torch.cat(logits, dim=1).double().square().mean()
        return torch.autograd.grad(loss, model.model.layers[0].mixer.A_log)[0]

    actual = gradient()
    assert not calls["selective_state_update"] and not calls["causal_conv1d_update"]
    assert relative_difference(actual, in_torch(gradient), record=False) <= 1e-5


@contextlib.contextmanager
def hooked(module):
    handle = module.register_forward_hook(lambda module, inputs, output: None)
    try:
        yield
    finally:
        handle.remove()


def test_a_hooked_convolution_is_called(calls):
    model, ids = model_of(), ids_of(1, PROMPT + NEW)
    with hooked(model.model.layers[0].mixer.conv1d):
        actual = decoded(model, ids)
    assert calls["selective_state_update"] == MAMBA_LAYERS * NEW and calls["causal_conv1d_update"] == NEW
    assert relative_difference(actual, in_torch(decoded, model, ids), record=False) <= 1e-5

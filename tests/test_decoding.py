"""Stretches of layers in one call: bit for bit what the calls one by one give, and never where a call would be more."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter

import pytest
import torch
from families import small_model, tokens
from torch import nn
from transformers import DynamicCache

import nemotron_h.modeling
from nemotron_h import NemotronHCache
from nemotron_h.layers import fused as decoding
from nemotron_h.ops import native
from nemotron_h.quantization.int8_int4 import config_for

pytestmark = [pytest.mark.core, pytest.mark.skipif(native.library() is None, reason=native.reason())]
DTYPES = [torch.float32, torch.bfloat16]


def model_of(family: str = "dense", dtype: torch.dtype = torch.float32, **overrides):
    return small_model(family, dtype, **{"head_dim": 16, **overrides})


@pytest.fixture
def runs(monkeypatch) -> Counter[int]:
    """How many layers each call took."""
    monkeypatch.delenv(native.ENVIRONMENT_VARIABLE, raising=False)
    counts: Counter[int] = Counter()
    original = native.blocks

    def counted(layers, count, x_BD):
        counts[count] += 1
        original(layers, count, x_BD)

    monkeypatch.setattr(native, "blocks", counted)
    return counts


@torch.no_grad()
def decoded(model, ids, first: int = 9, cache=None, **kwargs) -> tuple[torch.Tensor, NemotronHCache]:
    cache = NemotronHCache(model.config) if cache is None else cache
    logits = [model(ids[:, :first], cache=cache, **kwargs).logits]
    logits += [model(token, cache=cache, **kwargs).logits for token in ids[:, first:].split(1, dim=1)]
    return torch.cat(logits, dim=1), cache


def one_by_one(model, ids, monkeypatch, **kwargs) -> tuple[torch.Tensor, NemotronHCache]:
    with monkeypatch.context() as patch:
        patch.setattr(nemotron_h.modeling, "steps", lambda layers, *_: layers)
        return decoded(model, ids, **kwargs)


def assert_same(ours: tuple, theirs: tuple) -> None:
    assert torch.equal(ours[0], theirs[0])
    for mine, other in zip(ours[1].layers, theirs[1].layers, strict=True):
        for name in ("window_BCW", "state_BHPN", "keys", "values"):
            if hasattr(mine, name) and getattr(mine, name) is not None:
                assert torch.equal(getattr(mine, name), getattr(other, name)), name
    assert ours[1].get_seq_length() == theirs[1].get_seq_length()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    "family, stretches",
    [("dense", {7}), ("mamba", {4}), ("attention", {4}), ("tied", {3}), ("moe", {1, 2}), ("latent", {1, 2})],
)
def test_bit_for_bit_what_the_layers_give(family, stretches, rows, dtype, runs, monkeypatch):
    """100 tokens, so that keys and values have to grow on the way."""
    model, ids = model_of(family, dtype), tokens(rows, 110)
    ours = decoded(model, ids)
    assert set(runs) == stretches and runs[max(stretches)] > 90
    assert_same(ours, one_by_one(model, ids, monkeypatch))


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantised(bits, runs, monkeypatch, tmp_path):
    model = model_of("dense", torch.bfloat16)
    model.save_pretrained(tmp_path)
    quantised = type(model).from_pretrained(tmp_path, quantization_config=config_for(bits, tmp_path, {}))
    ids = tokens(2, 40)
    ours = decoded(quantised, ids)
    assert set(runs) == {7}
    assert_same(ours, one_by_one(quantised, ids, monkeypatch))
    assert not torch.equal(ours[0], decoded(model, ids)[0])


def test_a_static_cache_keeps_its_attention_layers(runs, monkeypatch):
    """A static cache ends with room, so attention has a mask; the layers around it go on in one call."""
    model, ids = model_of(), tokens(2, 30)
    ours = decoded(model, ids, cache=NemotronHCache(model.config, max_cache_len=40))
    assert not runs  # the one stretch of this pattern attends
    theirs = one_by_one(model, ids, monkeypatch, cache=NemotronHCache(model.config, max_cache_len=40))
    assert torch.equal(ours[0], theirs[0])
    pattern = model_of("mamba")
    ours = decoded(pattern, ids, cache=NemotronHCache(pattern.config, max_cache_len=40))
    assert set(runs) == {4}
    assert torch.equal(
        ours[0], one_by_one(pattern, ids, monkeypatch, cache=NemotronHCache(pattern.config, max_cache_len=40))[0]
    )


@pytest.mark.parametrize(
    "why",
    [
        "gradient",
        "too many rows",
        "padding",
        "eager attention",
        "library cache",
        "float64",
        "autocast",
        "switched off",
        "bias",
    ],
)
def test_not_where_the_layers_must_be_called(why, runs, monkeypatch):
    overrides = {"attention_bias": True, "mamba_proj_bias": True, "mlp_bias": True} if why == "bias" else {}
    model = model_of(dtype=torch.float64 if why == "float64" else torch.float32, **overrides)
    ids, kwargs, cache = tokens(65 if why == "too many rows" else 2, 20), {}, None
    if why == "eager attention":
        model.set_attn_implementation("eager")
    if why == "library cache":
        cache = DynamicCache(config=model.config)
    if why == "switched off":
        monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, "0")
    if why == "padding":
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        cache = NemotronHCache(model.config)
        with torch.no_grad():
            model(ids[:, :9], attention_mask=mask[:, :9], cache=cache)
            for position in range(9, 20):
                model(ids[:, position : position + 1], attention_mask=mask[:, : position + 1], cache=cache)
    elif why == "gradient":
        cache = NemotronHCache(model.config)
        for token in ids.split(1, dim=1):
            model(token, cache=cache)
    elif why == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            decoded(model, ids)
    else:
        decoded(model, ids, cache=cache, **kwargs)
    assert not runs


@pytest.mark.parametrize(
    "where", ["layers.1", "layers.3.mixer", "layers.3.mixer.o_proj", "layers.0.norm", "layers.2.mixer.conv1d"]
)
def test_a_hook_is_called_and_then_gone(where, runs, monkeypatch):
    """Its layer is called while the hook is there, and one call does all of them again when it is not."""
    model, ids = model_of(), tokens(1, 24)
    called = []
    handle = model.model.get_submodule(where).register_forward_hook(lambda module, args, out: called.append(where))
    ours = decoded(model, ids)
    layer = int(where.split(".")[1])
    assert len(called) == 16 and set(runs) == {n for n in (layer, 6 - layer) if n}  # before it and after it
    assert_same(ours, one_by_one(model, ids, monkeypatch))
    handle.remove()
    decoded(model, ids)
    assert len(called) == 32 and runs[7] >= 14  # one_by_one called it too


def test_a_global_hook_is_called(runs):
    called = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: called.append(type(module).__name__)
    )
    try:
        decoded(model_of(), tokens(1, 12))
    finally:
        handle.remove()
    assert not runs and called.count("NemotronHBlock") == 7 * 4


def test_hidden_states_are_recorded(runs, monkeypatch):
    model, ids = model_of(), tokens(1, 12)
    cache = NemotronHCache(model.config)
    with torch.no_grad():
        model(ids[:, :9], cache=cache)
        states = model(ids[:, 9:10], cache=cache, output_hidden_states=True).hidden_states
        whole = model(ids[:, :10], output_hidden_states=True).hidden_states
    for one, all_ in zip(states, whole, strict=True):
        torch.testing.assert_close(one[:, 0], all_[:, -1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("how", ["data", "parameter", "load_state_dict", "module", "in place", "cast"])
def test_weights_that_change_are_seen(how, runs, monkeypatch):
    model, ids = model_of(), tokens(1, 24)
    before = decoded(model, ids)[0]
    mixer = model.model.layers[0].mixer
    changed = torch.randn(mixer.out_proj.weight.shape, generator=torch.Generator().manual_seed(1)) / 4
    if how == "data":
        mixer.out_proj.weight.data = changed
    elif how == "parameter":
        mixer.out_proj.weight = nn.Parameter(changed, requires_grad=False)
    elif how == "load_state_dict":
        mixer.out_proj.load_state_dict({"weight": changed}, assign=True)
    elif how == "in place":
        mixer.out_proj.weight.data.copy_(changed)
    elif how == "cast":
        model.to(torch.bfloat16)
    else:
        mixer.out_proj = type(mixer.out_proj)(*changed.shape[::-1], bias=False).requires_grad_(False)
    runs.clear()
    ours = decoded(model, ids)
    assert runs[7] >= 14
    assert_same(ours, one_by_one(model, ids, monkeypatch))
    assert not torch.equal(ours[0], before)


def test_an_adapter_is_called(runs, monkeypatch):
    class Doubled(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base

        def forward(self, x):
            return 2 * self.base_layer(x)

    model, ids = model_of(), tokens(1, 24)
    decoded(model, ids)
    model.model.layers[4].mixer.up_proj = Doubled(model.model.layers[4].mixer.up_proj)
    runs.clear()
    ours = decoded(model, ids)
    assert set(runs) == {2, 4}  # before it and after it
    assert_same(ours, one_by_one(model, ids, monkeypatch))


def test_layers_taken_out_and_copies_of_a_model(runs, monkeypatch):
    model, ids = model_of(), tokens(1, 24)
    decoded(model, ids)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mixer.in_proj.weight.mul_(2)
    assert_same(decoded(other, ids), one_by_one(other, ids, monkeypatch))
    assert not torch.equal(decoded(other, ids)[0], decoded(model, ids)[0])
    model.model.layers = nn.ModuleList([*model.model.layers[:3], *model.model.layers[4:]])
    runs.clear()
    decoded(model, ids)
    assert set(runs) == {6}
    del model.model.layers[5]
    runs.clear()
    decoded(model, ids)
    assert set(runs) == {5}


def test_the_plan_goes_with_the_model():
    model = model_of()
    decoded(model, tokens(1, 12))
    layers = model.model.layers
    assert layers in decoding._plans
    before = len(decoding._plans)
    del model, layers
    import gc

    gc.collect()
    assert len(decoding._plans) < before


def test_rows_reordered_on_the_way(runs, monkeypatch):
    model, ids = model_of(), tokens(2, 30)

    def reordered(decode):
        logits, cache = decode(model, ids[:, :20])
        cache.reorder_cache(torch.tensor([1, 1]))
        with torch.no_grad():
            more = [model(token, cache=cache).logits for token in ids[:, 20:].split(1, dim=1)]
        return torch.cat([logits, *more], 1), cache

    ours = reordered(decoded)
    assert sum(runs.values()) >= 18

    with monkeypatch.context() as patch:
        patch.setattr(nemotron_h.modeling, "steps", lambda layers, *_: layers)
        theirs = reordered(decoded)
    assert_same(ours, theirs)


def test_keys_that_a_copy_still_sees_are_not_written_over(runs):
    """Two conversations that fork: each goes on in buffers of its own."""
    model, ids = model_of(), tokens(2, 40)
    _, cache = decoded(model, ids[:1, :20])
    fork = copy.deepcopy(cache)
    with torch.no_grad():
        a = [model(token, cache=cache).logits for token in ids[:1, 20:].split(1, dim=1)]
        b = [model(token, cache=fork).logits for token in ids[1:, 20:].split(1, dim=1)]
    assert torch.equal(torch.cat(a, 1), decoded(model, ids[:1])[0][:, 20:])
    assert torch.equal(torch.cat(b, 1), decoded(model, torch.cat([ids[:1, :20], ids[1:, 20:]], 1))[0][:, 20:])


def test_a_long_convolution(runs):
    """native.c has room for so many taps; more are left to the calls."""
    for kernel in (native.MOST_TAPS, native.MOST_TAPS + 1, 12):
        runs.clear()
        model, ids = model_of(conv_kernel=kernel), tokens(1, 24)
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits
        logits, _ = decoded(model, ids)
        assert bool(runs[7]) == (kernel <= native.MOST_TAPS)
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_time_step_that_is_not_a_number_stays_one(runs):
    model = model_of()
    cache = NemotronHCache(model.config)
    model(tokens(1, 8), cache=cache)
    model(tokens(1, 1), cache=cache)  # the keys have to grow
    model.model.layers[0].mixer.dt_bias.data[0] = torch.nan
    assert model(tokens(1, 1), cache=cache).logits.isnan().all() and runs == {7: 1}


@torch.no_grad()
@pytest.mark.parametrize("name, value", [("ssm_state_size", 32), ("mamba_head_dim", 4), ("num_key_value_heads", 1)])
def test_a_cache_of_a_model_of_other_sizes(name, value, runs):
    """Refused; and where its tensors are in a cache of the right config, nothing is read or written past their end."""
    small, large = model_of(**{name: value}), model_of()
    cache = NemotronHCache(small.config)
    small(tokens(1, 8), cache=cache)
    with pytest.raises(ValueError, match=f"for a model with {name}={value}, and this one has"):
        large(tokens(1, 1), cache=cache)
    small(tokens(1, 1), cache=cache)
    runs.clear()
    cache.config = large.config
    with contextlib.suppress(RuntimeError):
        large(tokens(1, 1), cache=cache)
    assert not runs

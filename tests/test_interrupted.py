"""An exception in the middle of a call, wherever that is: the cache says so until it is emptied or put back."""

from __future__ import annotations

import copy

import pytest
import torch
from families import relative_difference, small_model, tokens

import nemotron_h.cache
from nemotron_h import NemotronHCache, PromptCache
from nemotron_h.cache.layers import MambaLayer
from nemotron_h.ops import native

pytestmark = pytest.mark.core
REFUSED = "The cache was left in the middle of .*: reset\\(\\) it, restore\\(\\) a snapshot"


class Stop(BaseException):
    """As KeyboardInterrupt: no `except Exception` sees it."""


def stop(*_, **__):
    raise Stop


@pytest.fixture
def model():
    return small_model("dense", torch.float32, head_dim=16)


def filled(model, length: int = 9, **kwargs) -> NemotronHCache:
    cache = NemotronHCache(model.config, **kwargs)
    with torch.no_grad():
        model(tokens(1, length), cache=cache)
    return cache


@torch.no_grad()
def assert_refused(model, cache: NemotronHCache, tmp_path) -> None:
    """In every use, and after a reset it is like a new one."""
    token, length = tokens(1, 1), int(cache.get_seq_length())
    for use in (
        lambda: model(token, cache=cache),
        lambda: model.model(token, past_key_values=copy.deepcopy(cache)),
        lambda: model.generate(tokens(1, length + 5), past_key_values=cache, max_new_tokens=2),
        cache.snapshot,
        lambda: cache.save(tmp_path / "state", model=model),
        cache.split,
        lambda: NemotronHCache.concat([cache, filled(model)]),
        lambda: cache.crop(-1),
        lambda: cache.reorder_cache(torch.tensor([0])),
        lambda: PromptCache().store(cache, tokens(1, length)[0], model),
    )[: 10 if cache.batch_size == 1 else 9]:
        with pytest.raises(RuntimeError, match=REFUSED):
            use()
    other = filled(model)
    want = model(token, cache=copy.deepcopy(other)).logits
    if not cache.is_static:
        cache.restore(other.snapshot())
        assert relative_difference(model(token, cache=cache).logits, want, record=False) <= 1e-5
    cache.interrupted = "a test"
    cache.reset()
    model(tokens(1, 9), cache=cache)
    assert relative_difference(model(token, cache=cache).logits, want, record=False) <= 1e-5


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("where", ["layers.1", "layers.3.mixer.v_proj", "layers.6.mixer", "norm_f"])
@torch.no_grad()
def test_between_two_layers(model, where, static, tmp_path):
    cache = filled(model, **({"max_cache_len": 40} if static else {}))
    handle = model.model.get_submodule(where).register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        model(tokens(1, 1), cache=cache)
    handle.remove()
    assert_refused(model, cache, tmp_path)


@torch.no_grad()
def test_in_the_head_and_in_the_loss(model, tmp_path):
    for broken in (lambda: model.lm_head.register_forward_pre_hook(stop), None):
        cache = filled(model)
        if broken is not None:
            handle = broken()
        else:
            model.loss_function = stop
        with pytest.raises(Stop):
            model(tokens(1, 1), cache=cache, labels=tokens(1, 1))
        if broken is not None:
            handle.remove()
        else:
            model.loss_function = None
        assert_refused(model, cache, tmp_path)


@pytest.mark.skipif(native.library() is None, reason=native.reason())
@torch.no_grad()
def test_where_several_layers_are_one_call(model, monkeypatch, tmp_path):
    cache = filled(model, 8)
    model(tokens(1, 1), cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(native, "blocks", stop)
        with pytest.raises(Stop):
            model(tokens(1, 1), cache=cache)
    assert_refused(model, cache, tmp_path)


@torch.no_grad()
def test_between_the_pieces_of_a_prompt(model, monkeypatch, tmp_path):
    monkeypatch.setattr("nemotron_h.generation.chunked_prefill.chunk_length", lambda *_: 256)
    cache, seen = NemotronHCache(model.config), []

    def after_two(module, args, output):
        seen.append(1)
        if len(seen) == 2:
            raise Stop

    handle = model.model.norm_f.register_forward_hook(after_two)
    with pytest.raises(Stop):
        model(tokens(1, 900), cache=cache, logits_to_keep=1)
    handle.remove()
    assert len(seen) == 2 and cache.get_seq_length() in (256, 512)
    assert_refused(model, cache, tmp_path)


class _Streamer:
    """Stops generation at its n-th token by an exception, as a closed connection does."""

    def __init__(self, after: int):
        self.left = after

    def put(self, value):
        self.left -= 1
        if not self.left:
            raise Stop

    def end(self): ...


@pytest.mark.parametrize("drafts", [{}, {"prompt_lookup_num_tokens": 4}])
@torch.no_grad()
def test_in_the_middle_of_generate(model, drafts, tmp_path):
    cache = NemotronHCache(model.config)
    prompt = tokens(1, 6).repeat(1, 3)
    with pytest.raises(Stop):
        model.generate(
            prompt, past_key_values=cache, max_new_tokens=20, streamer=_Streamer(5), eos_token_id=None, **drafts
        )
    assert_refused(model, cache, tmp_path)


@torch.no_grad()
def test_between_a_draft_and_its_check(model, monkeypatch, tmp_path):
    cache = NemotronHCache(model.config)
    calls = []
    crop = NemotronHCache.crop

    def stop_at_the_second(self, number):
        calls.append(number)
        if len(calls) == 2:
            raise Stop
        crop(self, number)

    monkeypatch.setattr(NemotronHCache, "crop", stop_at_the_second)
    prompt = tokens(1, 6).repeat(1, 4)
    with pytest.raises(Stop):
        model.generate(prompt, past_key_values=cache, max_new_tokens=40, prompt_lookup_num_tokens=5, eos_token_id=None)
    monkeypatch.undo()
    assert_refused(model, cache, tmp_path)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("after", [1, 2, 5])
@torch.no_grad()
def test_between_the_writes_of_a_state(model, after, static, monkeypatch, tmp_path):
    cache, writes = filled(model, **({"max_cache_len": 40} if static else {})), []
    store = MambaLayer._store

    def stop_at(self, *args):
        writes.append(1)
        if len(writes) == after:
            raise Stop
        return store(self, *args)

    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, "0")
    with monkeypatch.context() as patch:
        patch.setattr(MambaLayer, "_store", stop_at)
        with pytest.raises(Stop):
            model(tokens(1, 1), cache=cache)
    assert_refused(model, cache, tmp_path)


@pytest.mark.parametrize(
    "what", ["crop", "reorder_cache", "batch_select_indices", "batch_repeat_interleave", "restore"]
)
@torch.no_grad()
def test_while_a_cache_is_changed(model, what, monkeypatch, tmp_path):
    cache = filled(model)
    cache.activate_past_recording()
    model(tokens(1, 2), cache=cache)
    snapshot = filled(model, 5).snapshot()
    last = cache.layers[5]
    argument = {"crop": -1, "batch_repeat_interleave": 2, "restore": snapshot}.get(what, torch.tensor([0]))
    with monkeypatch.context() as patch:
        inside = {"restore": "hold", "crop": "update_conv_state"}.get(what, "_map_rows")
        patch.setattr(last, inside, stop)
        with pytest.raises(Stop):
            getattr(cache, what)(argument)
    assert_refused(model, cache, tmp_path)


@pytest.mark.parametrize("name", ["a generate() with a compiled step"])
@torch.no_grad()
def test_in_a_compiled_step(model, name, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda call, **_: stop)
    cache = NemotronHCache(model.config, max_cache_len=40)
    step = model.get_compiled_call(None)
    model(tokens(1, 9), cache=cache)
    with pytest.raises(Stop):
        step(input_ids=tokens(1, 1), **{nemotron_h.compat.CACHE_NAME: cache})
    assert_refused(model, cache, tmp_path)


@torch.no_grad()
def test_a_refused_call_leaves_a_cache_as_it_was(model):
    """Nothing has moved, so there is nothing to refuse."""
    cache = filled(model)
    want = model(tokens(1, 1), cache=copy.deepcopy(cache)).logits
    for wrong in (
        {"attention_mask": torch.ones(1, 3)},
        {"attention_mask": torch.full((1, 10), 0.5)},
        {"inputs_embeds": torch.zeros(1, 1, 32)},
        {"no_such_argument": 1},
    ):
        with pytest.raises((ValueError, TypeError)):
            model(tokens(1, 1), cache=cache, **wrong)
    with pytest.raises(ValueError, match="vocabulary"):
        model(torch.tensor([[5000]]), cache=cache)
    with pytest.raises(ValueError):
        model.generate(tokens(1, 20), past_key_values=cache, max_new_tokens=3, prompt_lookup_num_tokens=5000)
    assert torch.equal(model(tokens(1, 1), cache=cache).logits, want)

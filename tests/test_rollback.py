"""Caches that go back: after any schedule of drafts, rejections and single steps they are those that never saw what was
rejected."""

from __future__ import annotations

import copy
import gc
import random as python_random

import pytest
import torch
from families import randomise, relative_difference, small_config, small_model, tokens

from nemotron_h import NemotronHCache
from nemotron_h.cache.layers import EmptyLayer, MambaLayer
from nemotron_h.cache.rollback import ROLLBACK
from nemotron_h.modeling import NemotronHMamba2Mixer

FAMILIES = ["dense", "moe", "latent", "mamba"]
pytestmark = pytest.mark.core


class OneLayer:
    """A Mamba mixer with the part of a cache that it asks for, and rows of inputs to feed it."""

    def __init__(self, mixer, layer: MambaLayer):
        self.mixer, self.layers = mixer, [layer]

    @property
    def layer(self) -> MambaLayer:
        return self.layers[0]

    @torch.no_grad()
    def see(self, x_BLD: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.mixer(x_BLD, self, **kwargs)


def mixer_of(dtype=torch.float64, **overrides):
    mixer = NemotronHMamba2Mixer(small_config("mamba", **overrides), 0).to(dtype).eval()
    for parameter in ("dt_bias", "A_log", "D"):
        value = getattr(mixer, parameter)
        value.data = value.data.to(torch.promote_types(dtype, torch.float32))
    randomise(mixer)
    return mixer


def difference(ours: MambaLayer, theirs: MambaLayer) -> float:
    found = 0.0
    for name in ("window_BCW", "state_BHPN"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None), name
        if a is not None:
            scale = b.abs().amax().clamp(min=1e-30)
            found = max(found, float((a - b).abs().amax() / scale))
    return found


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_a_thousand_schedules(dtype, bound, static):
    """Prompts of 0 to 90 tokens, then drafts of 1 to 20 of which some stay, single steps, rows that change places,
    crops in a row, and going on; the other layer sees what was accepted, a token at a time."""
    mixer = mixer_of(dtype)
    width = small_config("mamba").hidden_size
    biggest, crops = 0.0, 0
    for seed in range(1000 if dtype == torch.float64 and not static else 150):
        choose = python_random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        ours, theirs = (OneLayer(mixer, MambaLayer(dtype, static=static and who == 0)) for who in range(2))
        begun = choose.random() < 0.7
        if begun:
            ours.layer.activate_past_recording()  # before the prompt, as the library does it
        if length := choose.choice([0, 1, 3, 7, 70, 90]):
            prompt = torch.randn(2, length, width, generator=generator, dtype=dtype)
            ours.see(prompt), theirs.see(prompt)
        if not begun:
            ours.layer.activate_past_recording()
        for _ in range(choose.randint(2, 7)):
            what = choose.choice(["draft", "draft", "single", "rows"])
            if what == "rows":
                rows = torch.tensor(choose.choice([[1, 0], [0, 0], [1, 1]]))
                ours.layer.reorder_cache(rows), theirs.layer.reorder_cache(rows)
                continue
            length = 1 if what == "single" else choose.randint(1, 20)
            drafted = torch.randn(2, length, width, generator=generator, dtype=dtype)
            y = ours.see(drafted)
            accepted = choose.randint(0, length)
            rejected = length - accepted
            first = choose.randint(0, rejected)
            for number in (first, rejected - first):  # at once, or in two crops
                ours.layer.crop(-number)
                crops += number > 0
            if accepted:
                expected = torch.cat([theirs.see(token) for token in drafted[:, :accepted].split(1, dim=1)], dim=1)
                biggest = max(biggest, float((y[:, :accepted] - expected).abs().amax() / expected.abs().amax()))
            biggest = max(biggest, difference(ours.layer, theirs.layer))
            assert int(ours.layer.get_seq_length()) == int(theirs.layer.get_seq_length())
            assert biggest <= bound, (seed, biggest)
    print(f"{dtype}: worst relative difference {biggest:.1e} after {crops} crops")
    assert crops > 300


def test_a_replay_is_the_tokens_one_by_one():
    """The scan itself: the same inputs to the state, in blocks and one at a time."""
    mixer = mixer_of(torch.float64)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 50, mixer.conv_dim + mixer.num_heads, dtype=torch.float64, generator=generator)
    window = torch.zeros(2, mixer.conv_dim, 3, dtype=torch.float64)
    state = torch.zeros(2, mixer.num_heads, mixer.head_dim, mixer.ssm_state_size, dtype=torch.float64)
    apart = window, state
    for token in inputs.split(1, dim=1):
        apart = mixer.replay(token, None, *(t.clone() for t in apart))
    together = mixer.replay(inputs, None, window.clone(), state.clone())
    assert torch.equal(apart[0], together[0])
    # A vectorised softplus may differ in its last bit from one of a single number.
    assert relative_difference(apart[1], together[1]) <= 1e-15


def test_accepted_is_bit_for_bit_what_was_never_drafted_with():
    """Drafts of one length, cut; and the accepted tokens alone, in the same step."""
    mixer, generator = mixer_of(), torch.Generator().manual_seed(1)
    inputs = torch.randn(1, 24, mixer.conv_dim + mixer.num_heads, dtype=torch.float64, generator=generator)
    for accepted in range(1, 9):
        ours, theirs = (MambaLayer(torch.float64) for _ in range(2))
        for layer, length in ((ours, 8), (theirs, accepted)):
            layer.activate_past_recording()
            layer.update(*mixer.replay(inputs[:, :16], None, None, None), 16)
            drafted = inputs[:, 16 : 16 + length]
            layer.open_record(length).add(mixer.replay, drafted)
            layer.update(*mixer.replay(drafted, None, layer.window_BCW, layer.state_BHPN), length)
        ours.crop(accepted - 8)
        assert torch.equal(ours.window_BCW, theirs.window_BCW) and torch.equal(ours.state_BHPN, theirs.state_BHPN)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_cache_len", [None, 64], ids=["dynamic", "static"])
@torch.no_grad()
def test_whole_models(family, max_cache_len):
    model = small_model(family)
    for seed in range(6):
        choose = python_random.Random(seed)
        ours, theirs = (NemotronHCache(model.config, max_cache_len=max_cache_len) for _ in range(2))
        ours.activate_past_recording()
        ids = tokens(2, 60, seed=seed)
        at = choose.choice([1, 9, 20])
        model(ids[:, :at], cache=ours), model(ids[:, :at], cache=theirs)
        while at < 40:
            drafted = tokens(2, choose.randint(1, 6), seed=seed + at)
            stay = choose.randint(0, drafted.shape[1])
            drafted[:, :stay] = ids[:, at : at + stay]
            y = model(drafted, cache=ours).logits[:, :stay]
            ours.crop(stay - drafted.shape[1])
            for t in range(stay):
                expected = model(ids[:, at + t : at + t + 1], cache=theirs).logits
                assert relative_difference(y[:, t : t + 1], expected) <= 1e-10
            at += stay
            assert int(ours.get_seq_length()) == int(theirs.get_seq_length()) == at
        for mine, other in zip(ours.layers, theirs.layers, strict=True):
            if isinstance(mine, MambaLayer):
                assert difference(mine, other) <= 1e-10
            elif getattr(mine, "keys", None) is not None:
                torch.testing.assert_close(mine.keys[..., :at, :], other.keys[..., :at, :], rtol=0, atol=1e-10)


def test_padded_rows_go_back():
    """A draft behind left padding and one whose own tokens are padded."""
    mixer, width = mixer_of(), small_config("mamba").hidden_size
    x = torch.randn(2, 12, width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :4] = mask[1, 9] = False
    ours, theirs = (OneLayer(mixer, MambaLayer(torch.float64)) for _ in range(2))
    ours.layer.activate_past_recording()
    ours.see(x[:, :8], mask_BL=mask[:, :8]), theirs.see(x[:, :8], mask_BL=mask[:, :8])
    ours.see(x[:, 8:], mask_BL=mask[:, 8:]), theirs.see(x[:, 8:10], mask_BL=mask[:, 8:10])
    ours.layer.crop(-2)
    assert difference(ours.layer, theirs.layer) <= 1e-12
    ours.layer.crop(-4)
    again = OneLayer(mixer, MambaLayer(torch.float64))
    again.see(x[:, :6], mask_BL=mask[:, :6])
    assert difference(ours.layer, again.layer) <= 1e-12


def test_back_to_the_beginning_and_on():
    mixer, width = mixer_of(), small_config("mamba").hidden_size
    x = torch.randn(1, 9, width, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    ours, theirs = (OneLayer(mixer, MambaLayer(torch.float64)) for _ in range(2))
    ours.layer.activate_past_recording()
    ours.see(x[:, :5])
    ours.layer.crop(-5)
    assert ours.layer.window_BCW is None and ours.layer.state_BHPN is None and ours.layer.get_seq_length() == 0
    ours.see(x), theirs.see(x)
    assert difference(ours.layer, theirs.layer) <= 1e-14
    ours.layer.crop(-2)
    again = OneLayer(mixer, MambaLayer(torch.float64))
    again.see(x[:, :7])
    assert difference(ours.layer, again.layer) <= 1e-12


def test_a_positive_number_is_refused_with_nothing_changed():
    model = small_model("dense")
    cache = NemotronHCache(model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        model(tokens(1, 10), cache=cache)
    with pytest.raises(ValueError, match=r"crop\(3\): pass the tokens to forget as a negative number"):
        cache.crop(3)
    assert {int(layer.get_seq_length()) for layer in cache.layers if not isinstance(layer, EmptyLayer)} == {10}


def test_a_cache_goes_back_when_its_model_is_gone():
    """What makes the state again is kept with what was recorded."""
    mixer, ours, theirs = mixer_of(), MambaLayer(torch.float64), MambaLayer(torch.float64)
    x_BLD = torch.randn(1, 5, small_config("mamba").hidden_size, dtype=torch.float64)
    ours.activate_past_recording()
    OneLayer(mixer, ours).see(x_BLD)
    OneLayer(mixer, theirs).see(x_BLD[:, :3])
    del mixer
    gc.collect()
    ours.crop(-2)
    assert ours.recorded == 3 and difference(ours, theirs) <= 1e-12


def test_what_is_settled_stays():
    mixer, width = mixer_of(), small_config("mamba").hidden_size
    x = torch.randn(1, 9, width, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    ours, theirs = (OneLayer(mixer, MambaLayer(torch.float64)) for _ in range(2))
    ours.layer.activate_past_recording()
    ours.see(x[:, :5])
    ours.layer.settle()
    with pytest.raises(RuntimeError, match="forget 1 tokens and 0 are recorded"):
        ours.layer.crop(-1)
    ours.see(x[:, 5:]), theirs.see(x)
    assert ours.layer.recorded == 4 and difference(ours.layer, theirs.layer) <= 1e-12
    ours.layer.crop(-3)
    again = OneLayer(mixer, MambaLayer(torch.float64))
    again.see(x[:, :6])
    assert difference(ours.layer, again.layer) <= 1e-12


def test_a_copy_goes_its_own_way():
    """Nothing of a copied cache's record is shared in a way that shows; the model is not copied along."""
    model = small_model("dense")
    ids = tokens(1, 30)
    cache = NemotronHCache(model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids[:, :10], cache=cache)
        fork = copy.deepcopy(cache)
        model(ids[:, 10:15], cache=cache)
        model(ids[:, 20:25], cache=fork)
        cache.crop(-2), fork.crop(-4)
        for kept, draft, last in ((cache, ids[:, 10:13], ids[:, 15:16]), (fork, ids[:, 20:21], ids[:, 25:26])):
            logits = model(last, cache=kept).logits
            whole = model(torch.cat([ids[:, :10], draft, last], 1), use_cache=False).logits[:, -1:]
            assert relative_difference(logits, whole) <= 1e-12
    mixers = {id(layer._record._replay.__self__) for layer in fork.layers if isinstance(layer, MambaLayer)}
    assert mixers == {id(layer.mixer) for layer in model.model.layers if layer.block_type == "mamba"}


@pytest.mark.parametrize("length", [200, 3000])
@torch.no_grad()
def test_a_long_prompt_is_not_recorded(length):
    """Recording on from the start, as the library does it: the last tokens alone are kept, also in pieces."""
    model = small_model("mamba", torch.float32)
    cache = NemotronHCache(model.config)
    cache.activate_past_recording()
    model(tokens(1, length), cache=cache)
    mixer = model.model.layers[0].mixer
    per_token = (mixer.conv_dim + mixer.num_heads) * 4
    for layer in (layer for layer in cache.layers if isinstance(layer, MambaLayer)):
        assert layer.recorded == ROLLBACK == 64
        state = layer.window_BCW.nbytes + layer.state_BHPN.nbytes
        assert layer._record.nbytes <= ROLLBACK * per_token + state
        assert layer._record.inputs_BLK.untyped_storage().nbytes() == ROLLBACK * per_token
    plain = NemotronHCache(model.config)
    model(tokens(1, length), cache=plain)
    assert cache.nbytes() > plain.nbytes()
    for _ in range(3):
        cache.crop(-20)
    shorter = NemotronHCache(model.config)
    model(tokens(1, length)[:, : length - 60], cache=shorter)
    for mine, other in zip(cache.layers, shorter.layers, strict=True):
        if isinstance(mine, MambaLayer):
            assert difference(mine, other) <= 1e-4


@torch.no_grad()
def test_what_is_recorded_of_a_very_long_prompt():
    model = small_model("mamba", torch.float32, hybrid_override_pattern="M")
    cache = NemotronHCache(model.config)
    cache.activate_past_recording()
    before = cache.nbytes()
    model(tokens(1, 32_000), cache=cache, logits_to_keep=1)
    (layer,) = cache.layers
    per_token = (model.model.layers[0].mixer.conv_dim + model.model.layers[0].mixer.num_heads) * 4
    assert before == 0 and layer.recorded == 64
    assert layer._record.inputs_BLK.untyped_storage().nbytes() == 64 * per_token
    assert cache.nbytes() == 64 * per_token + 2 * (layer.window_BCW.nbytes + layer.state_BHPN.nbytes)


@torch.no_grad()
def test_stepping_on_keeps_the_last_tokens_alone():
    model = small_model("mamba", torch.float32)
    cache = NemotronHCache(model.config)
    cache.activate_past_recording()
    for token in tokens(1, 200).split(1, dim=1):
        model(token, cache=cache)
        layer = cache.layers[0]
        assert layer.recorded <= ROLLBACK
        assert layer.recorded >= min(int(cache.get_seq_length()), ROLLBACK // 4)


def held(cache: NemotronHCache) -> list[torch.Tensor]:
    found = (getattr(layer, name, None) for layer in cache.layers for name in ("window_BCW", "state_BHPN", "keys"))
    return [tensor for tensor in found if tensor is not None]


@torch.no_grad()
def test_too_many_tokens_are_refused_with_nothing_changed():
    model = small_model("dense")
    cache = NemotronHCache(model.config)
    model(tokens(1, 10), cache=cache)
    with pytest.raises(RuntimeError, match=r"crop\(-1\) .* recorded none: call activate_past_recording"):
        cache.crop(-1)
    cache.activate_past_recording()
    model(tokens(1, 3), cache=cache)
    before = [tensor.clone() for tensor in held(cache)]
    with pytest.raises(RuntimeError, match=r"crop\(-4\) asks a Mamba layer to forget 4 tokens and 3 are recorded"):
        cache.crop(-4)
    assert all(torch.equal(a, b) for a, b in zip(before, held(cache), strict=True)) and cache.get_seq_length() == 13
    cache.crop(0)
    cache.crop(-3)
    assert cache.get_seq_length() == 10

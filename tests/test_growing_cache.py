"""cache.GrowingLayer: keys that grow in place are what concatenated ones would be, whoever else holds them."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from families import relative_difference, small_model, tokens
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from nemotron_h import NemotronHCache
from nemotron_h.cache.layers import GrowingLayer

HEADS, KEY_DIM, VALUE_DIM = 2, 4, 6


def new(length: int, batch: int = 2, seed: int | None = None, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Keys and values of `length` tokens."""
    generator = torch.Generator().manual_seed(length if seed is None else seed)
    return [torch.randn(batch, HEADS, length, dim, generator=generator, dtype=dtype) for dim in (KEY_DIM, VALUE_DIM)]


def filled(*lengths: int, layer: type = GrowingLayer, **kwargs) -> DynamicLayer:
    made = layer()
    for index, length in enumerate(lengths):
        made.update(*new(length, seed=index, **kwargs))
    return made


def assert_same(ours: DynamicLayer, theirs: DynamicLayer) -> None:
    assert ours.is_initialized == theirs.is_initialized
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)
    for name in ("keys", "values"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert (mine is None) == (other is None)
        if mine is not None and other.numel():
            assert torch.equal(mine, other), name


class Both:
    """One layer of ours and one of the library's, under the same operations."""

    def __init__(self, ours: DynamicLayer, theirs: DynamicLayer):
        self.ours, self.theirs = ours, theirs

    def do(self, operation: str, *args) -> None:
        results = [getattr(layer, operation)(*args) for layer in (self.ours, self.theirs)]
        if operation == "update":
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert_same(self.ours, self.theirs)


@pytest.mark.core
@pytest.mark.parametrize("seed", range(12))
def test_any_operations_in_any_order(seed):
    """Also: what an update once gave, and what copies hold, stays what it was."""
    draw = random.Random(seed)
    layers, held, batches = [Both(GrowingLayer(), DynamicLayer())], [], [2]
    for step in range(60):
        index = draw.randrange(len(layers))
        both, batch = layers[index], batches[index]
        length = both.ours.get_seq_length()
        operation = draw.choice(
            ["token"] * 8 + ["tokens"] * 3 + ["copy", "deepcopy", "crop", "reorder", "select", "repeat", "reset"]
        )
        if operation in ("token", "tokens"):
            both.do(
                "update", *new(1 if operation == "token" else draw.randrange(2, 90), batch, seed=1000 * seed + step)
            )
            held.append((both.ours.keys, both.ours.keys.clone(), both.ours.values, both.ours.values.clone()))
        elif operation in ("copy", "deepcopy") and len(layers) < 6:
            layers.append(Both(getattr(copy, operation)(both.ours), getattr(copy, operation)(both.theirs)))
            batches.append(batch)
        elif operation == "crop" and length > 1:
            both.do("crop", -draw.randrange(1, length))
        elif operation == "reorder" and length:
            both.do("reorder_cache", torch.tensor([draw.randrange(batch) for _ in range(batch)]))
        elif operation == "select" and length:
            batches[index] = draw.randrange(1, batch + 1)
            both.do("batch_select_indices", torch.tensor(draw.sample(range(batch), batches[index])))
        elif operation == "repeat" and length and batch < 8:
            both.do("batch_repeat_interleave", 2)
            batches[index] = 2 * batch
        elif operation == "reset" and draw.random() < 0.5:
            both.ours.reset()
            assert both.ours.keys is both.ours.values is None
            both.theirs = DynamicLayer()  # before 5.24 the library's keeps its length, zeroed
        for each in layers:
            if each.ours.is_initialized or each.theirs.is_initialized:
                assert_same(each.ours, each.theirs)
    for keys, keys_then, values, values_then in held:
        assert torch.equal(keys, keys_then) and torch.equal(values, values_then)


@pytest.mark.core
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("first", [1, 100], ids=["first-in-the-room", "first-beyond-it"])
@pytest.mark.parametrize("second", [1, 100], ids=["second-in-the-room", "second-beyond-it"])
def test_copies_do_not_see_each_others_tokens(how, first, second):
    original = filled(5, 1)  # with room after them
    other = how(original)
    mine, theirs = new(first, seed=7), new(second, seed=8)
    results = original.update(*mine), other.update(*theirs)
    third = how(other)
    results += original.update(*mine), other.update(*mine), third.update(*theirs)
    parts = [(mine,), (theirs,), (mine, mine), (theirs, mine), (theirs, theirs)]
    for result, added in zip(results, parts, strict=True):
        for index in range(2):
            start = [new(5, seed=0)[index], new(1, seed=1)[index]]
            assert torch.equal(result[index], torch.cat(start + [part[index] for part in added], -2))


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_a_copy_that_goes_back_does_not_write_over_the_other(how):
    original = filled(5, 1)
    other = how(original)
    kept = original.update(*new(3, seed=7))[0].clone()
    other.crop(-2)
    other.update(*new(4, seed=8))
    other.crop(-4)
    other.update(*new(2, seed=9))
    assert torch.equal(original.keys, kept)
    expected = [new(5, seed=0)[0][..., :4, :], new(2, seed=9)[0]]
    assert torch.equal(other.keys, torch.cat(expected, -2))


@torch.no_grad()
def test_a_token_costs_no_copy_of_the_others():
    """The buffer is another a few times in 600 tokens, not 600 times; no more than an eighth and 64 is spare."""
    layer, buffers = filled(1), {}
    for step in range(600):
        keys, values = layer.update(*new(1, seed=step))
        buffers[keys.data_ptr(), values.data_ptr()] = keys, values  # alive, or an address would name two
        room = keys.untyped_storage().nbytes() // (2 * HEADS * KEY_DIM * 8)
        assert room <= (step + 2) + (step + 2) // 8 + 64
    assert len(buffers) <= 8


def test_a_prefill_has_no_room_to_spare():
    layer = filled(100)
    assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
    assert layer.values.untyped_storage().nbytes() == layer.values.nbytes


@pytest.mark.parametrize("before", [0, 10])
@torch.no_grad()
def test_expected_length_makes_one_buffer(before):
    layer, theirs = GrowingLayer(), DynamicLayer()
    if before:
        both = new(before)
        layer.update(*both), theirs.update(*both)
    layer.expected_length = before + 300
    buffers = {}
    for step, length in enumerate((100, 1, 99, 100)):
        keys, values = layer.update(*new(length, seed=step))
        theirs.update(*new(length, seed=step))
        buffers[keys.data_ptr(), values.data_ptr()] = keys, values  # alive, or an address would name two
        assert_same(layer, theirs)
    assert len(buffers) == 1
    for name in ("keys", "values"):
        assert getattr(layer, name).untyped_storage().nbytes() == getattr(layer, name).nbytes  # exactly so long
    layer.update(*new(5)), theirs.update(*new(5))  # and more tokens than expected
    assert_same(layer, theirs)


@pytest.mark.core
@pytest.mark.parametrize("wanting", ["both", "keys", "values"])
@pytest.mark.parametrize("parts_wanting", [(0, 1, 2, 3), (0,), (1,), (3,)], ids=str)
def test_gradients_go_through_the_cache(wanting, parts_wanting):
    """All of it at the end, through what every update gave, also where the later tokens (or the earlier ones, or keys
    or values alone) want none."""
    parts = [new(length, seed=length) for length in (4, 1, 3, 2)]
    indices = {"both": (0, 1), "keys": (0,), "values": (1,)}[wanting]
    leaves = [parts[part][index].requires_grad_() for part in parts_wanting for index in indices]

    def loss(keys, values):
        return (keys.sin().sum(-1) * values.square().sum(-1)).sum()

    layer = GrowingLayer()
    total = sum(loss(*layer.update(*part)) for part in parts)
    ends = ([torch.cat([part[index] for part in parts[: end + 1]], -2) for index in range(2)] for end in range(4))
    expected = torch.autograd.grad(sum(loss(*pair) for pair in ends), leaves)
    for a, e in zip(torch.autograd.grad(total, leaves), expected, strict=True):
        assert relative_difference(a, e) <= 1e-12


def test_a_gradient_survives_going_on_without_one():
    """And what is appended then is not part of it."""
    layer = filled(5, 1)  # a buffer
    part = [t.requires_grad_() for t in new(2, seed=7)]
    keys, values = layer.update(*part)
    assert keys.requires_grad
    loss = (keys.sin().sum(-1) * values.square().sum(-1)).sum()
    theirs = filled(5, 1, layer=DynamicLayer)
    theirs.update(*(t.detach() for t in part))
    with torch.no_grad():
        for step in range(3):
            later = layer.update(*new(1, seed=step))
            theirs.update(*new(1, seed=step))
            assert not later[0].requires_grad
            assert_same(layer, theirs)
    expected = part[0].detach().cos() * part[1].detach().square().sum(-1, keepdim=True)
    assert relative_difference(torch.autograd.grad(loss, part)[0], expected) <= 1e-12


def test_frozen_keys_are_concatenated_or_not_with_the_same_result():
    """Keys alone want a gradient, then values alone."""
    for index in range(2):
        layer, theirs = filled(5, 1), filled(5, 1, layer=DynamicLayer)
        for step in range(3):
            part = new(2, seed=step)
            part[index].requires_grad_()
            results = layer.update(*part), theirs.update(*part)
            assert [t.requires_grad for t in results[0]] == [t.requires_grad for t in results[1]]
            assert_same(layer, theirs)


def test_traced_it_concatenates(monkeypatch):
    layer, theirs = filled(5, 1), filled(5, 1, layer=DynamicLayer)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    before = layer.keys
    layer.update(*new(2)), theirs.update(*new(2))
    assert_same(layer, theirs)
    assert layer.keys.data_ptr() != before.data_ptr() and layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
    monkeypatch.undo()
    for step in range(3):
        layer.update(*new(1, seed=step)), theirs.update(*new(1, seed=step))
        assert_same(layer, theirs)


def test_offloaded_and_brought_back():
    layer, theirs = filled(5, 1), filled(5, 1, layer=DynamicLayer)
    held = layer.keys, layer.keys.clone()
    for step in range(3):
        for each in (layer, theirs):
            each.offload()
            each.prefetch()
            each.update(*new(2, seed=step))
        assert_same(layer, theirs)
    assert torch.equal(*held)


def test_keys_put_in_from_outside_are_gone_on_from():
    """Who sets `keys` and `values` (a cache restored from a file) has replaced what the buffer holds."""
    layer, theirs = filled(5, 1), filled(5, 1, layer=DynamicLayer)
    for each in (layer, theirs):
        each.keys, each.values = new(6, seed=77)
        each.update(*new(1))
    assert_same(layer, theirs)


@pytest.mark.core
@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy])
@torch.no_grad()
def test_a_conversation_that_forks(how):
    """Two ways on from one prompt, in turns, token by token, each as if it were the only one."""
    model = small_model("attention")
    prompt, ways = tokens(2, 9), [tokens(2, 4, seed=seed) for seed in (5, 6)]
    cache = NemotronHCache(model.config)
    model(prompt[:, :8], cache=cache)
    model(prompt[:, 8:], cache=cache)  # now there is room after the prompt
    caches = [cache, copy.deepcopy(cache)]
    if how is copy.copy:
        caches[1] = copy.copy(cache)
        caches[1].layers = [copy.copy(layer) for layer in cache.layers]
    logits = [[], []]
    for at in range(4):
        for index in range(2):
            logits[index].append(model(ways[index][:, at : at + 1], cache=caches[index]).logits)
    for way, pieces in zip(ways, logits, strict=True):
        expected = model(torch.cat([prompt, way], 1), use_cache=False).logits[:, 9:]
        assert relative_difference(torch.cat(pieces, 1), expected) <= 1e-9


@torch.no_grad()
def test_crop_and_go_on():
    model, ids = small_model("attention"), tokens(2, 15)
    cache = NemotronHCache(model.config)
    for piece in ids.split([8, 1, 6], dim=1):
        model(piece, cache=cache)
    cache.crop(-5)
    again = tokens(2, 3, seed=4)
    logits = torch.cat([model(token, cache=cache).logits for token in again.split(1, dim=1)], 1)
    expected = model(torch.cat([ids[:, :10], again], 1), use_cache=False).logits[:, 10:]
    assert relative_difference(logits, expected) <= 1e-9

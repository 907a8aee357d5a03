"""What a step may cost, by counts that no machine's load changes: operations dispatched, calls of native.c, bytes newly
allocated. Times are the benchmarks' business.

An allocation is an output of an operation whose storage is none of its inputs'. What a kernel allocates inside itself
is not seen.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from families import relative_difference, small_model, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from nemotron_h import NemotronHCache, ops
from nemotron_h.cache.layers import GrowingLayer
from nemotron_h.generation import chunked_prefill as pieces
from nemotron_h.ops import conditions, native

KERNELS = ("linear", "mamba_step", "attend", "rms_norm", "blocks")


class Allocation(NamedTuple):
    operation: str
    bytes: int
    inputs: int  # bytes of the operation's inputs
    storage: int  # its address


class Counting(TorchDispatchMode):
    """Operations dispatched and what each of them allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.allocations: list[Allocation] = []
        self._alive: list[torch.UntypedStorage] = []  # or an address would be given out again, and name two storages

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations.append(str(func))
        given = {t.untyped_storage().data_ptr(): t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given and t.untyped_storage().nbytes():
                storage = t.untyped_storage()
                self._alive.append(storage)
                self.allocations.append(
                    Allocation(str(func), storage.nbytes(), sum(given.values()), storage.data_ptr())
                )
        return result

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.allocations)

    @property
    def largest(self) -> int:
        return max(each.bytes for each in self.allocations)

    def __str__(self) -> str:
        return f"{len(self.operations)} operations, {self.bytes} bytes, most often " + ", ".join(
            f"{name} {count}" for name, count in Counter(self.operations).most_common(8)
        )


@pytest.fixture(params=["native", "torch"])
def kernels(request, monkeypatch) -> Counter[str]:
    """native.c on, with its calls counted, and off. Where the mode that counts is the only reason against it, it
    serves."""
    # One path on every machine.
    monkeypatch.setattr(conditions, "multiplies", lambda dtype: False)
    calls: Counter[str] = Counter()
    if request.param == "torch":
        monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, "0")
        return calls
    monkeypatch.delenv(native.ENVIRONMENT_VARIABLE, raising=False)
    if native.library() is None:
        pytest.skip(native.reason())
    serves = native.serves

    def asked(*tensors):
        with _disable_current_modes():
            return serves(*tensors)

    monkeypatch.setattr(native, "serves", asked)
    for name in KERNELS:
        monkeypatch.setattr(native, name, _counted(getattr(native, name), name, calls))
    return calls


def _counted(function: Callable[..., Tensor], name: str, calls: Counter[str]) -> Callable[..., Tensor]:
    def call(*args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)

    return call


@pytest.fixture
def path(kernels, request) -> str:
    return request.node.callspec.params["kernels"]


def model_of(pattern: str, dtype: torch.dtype = torch.float32, **overrides: Any):
    """A small model of any pattern, heads of a width that native.c takes."""
    return small_model(
        "latent" if overrides.pop("latent", False) else "moe",
        dtype,
        hybrid_override_pattern=pattern,
        head_dim=16,
        **overrides,
    )


@contextmanager
def decoding(model, context: int, batch: int = 1):
    """A step of one token after `context` tokens, where no buffer has to grow."""
    ids, cache = tokens(batch, context + 2), NemotronHCache(model.config)
    model(ids[:, :context], cache=cache)
    model(ids[:, context : context + 1], cache=cache)  # here keys and values get their room
    yield lambda: model(ids[:, context + 1 :], cache=cache)


# ------------------------------------------------------------------------------------------------ operations a token

# What a layer (its norm, its mixer, the sum) takes for one decoded token, and what the model takes beside its layers:
# (calls of native.c, operations), as counted on torch 2.13 and transformers 5.24. A tenth more is let pass. With
# native.c a layer beside another of these is in the same call; experts begin a new one.
TODAY = {
    ("native", torch.float32): {"M": (1, 1), "*": (1, 3), "-": (1, 1), "E": (5, 42), "rest": (0, 6)},
    ("native", torch.bfloat16): {"M": (1, 1), "*": (1, 3), "-": (1, 1), "E": (5, 45), "rest": (0, 7)},
    ("torch", torch.float32): {"M": (0, 85), "*": (0, 45), "-": (0, 17), "E": (0, 65), "rest": (0, 16)},
    ("torch", torch.bfloat16): {"M": (0, 101), "*": (0, 52), "-": (0, 20), "E": (0, 70), "rest": (0, 20)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_operations_a_decoded_token(kernels, path, dtype):
    def cost(pattern: str) -> tuple[int, int]:
        with decoding(model_of(pattern, dtype), 9) as step:
            kernels.clear()
            with Counting() as seen:
                step()
        return sum(kernels.values()), len(seen.operations)

    base, found = cost("M*-E"), {}
    for kind in "M*-E":
        more = cost("M*-E" + kind)
        found[kind] = more[0] - base[0], more[1] - base[1]
    found["rest"] = tuple(base[i] - sum(found[kind][i] for kind in "M*-E") for i in range(2))
    print(f"{path} {dtype}: (calls of native.c, operations) a decoded token: {found}")
    for kind, (calls, operations) in found.items():
        today = TODAY[path, dtype][kind]
        assert calls <= today[0] and operations <= math.ceil(1.1 * today[1]), (kind, found)
    assert (sum(calls for calls, _ in found.values()) > 0) == (path == "native")  # the premise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_step_costs_the_same_whatever_the_number_of_steps_before(kernels, dtype):
    """Operations and bytes, the second token and the twentieth."""
    model, cache = model_of("M*-E", dtype), NemotronHCache(model_of("M*-E").config)
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.expected_length = 100
    ids, costs = tokens(1, 20), []
    for at in range(20):
        with Counting() as seen:
            model(ids[:, at : at + 1], cache=cache)
        costs.append((seen.operations, seen.bytes))
    if dtype == torch.float32 or kernels:
        assert costs[1] == costs[10] == costs[19]
    assert costs[1][0] == costs[19][0]


# ----------------------------------------------------------------------------------------------------- bytes a token


@pytest.mark.parametrize("pattern", ["M", "*", "M*-E"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_bytes_a_decoded_token_do_not_grow_with_the_context(kernels, path, pattern, dtype, monkeypatch):
    """With bfloat16 and without native.c a tile of keys after another is made float32: there the largest does not."""
    monkeypatch.setattr(sys.modules["nemotron_h.ops.attention"], "_KEYS", 16)
    model, costs = model_of(pattern, dtype), []
    for context in (40, 320):
        with decoding(model, context, batch=2) as step, Counting() as seen:
            step()
        costs.append((seen.bytes, seen.largest))
    print(f"{path} {dtype} {pattern}: bytes a decoded token, the largest of them: {costs[0]}")
    assert costs[0][1] == costs[1][1]
    if path == "native" or (dtype == torch.float32 and "*" not in pattern):
        assert costs[0] == costs[1]


@torch.no_grad()
def test_without_the_growing_layer_they_would():
    """That this file sees a copy of all keys."""
    from transformers.cache_utils import DynamicLayer

    model, costs = model_of("*"), []
    for context in (40, 320):
        ids, cache = tokens(1, context + 1), NemotronHCache(model.config)
        cache.layers = [DynamicLayer() for _ in cache.layers]
        model(ids[:, :context], cache=cache)
        with Counting() as seen:
            model(ids[:, context:], cache=cache)
        costs.append(seen.bytes)
    assert costs[1] - costs[0] >= 2 * 280 * 2 * 16 * 4


# ---------------------------------------------------------------------------------------------------------- the scan


H, P, G, N, CHUNK = 4, 8, 2, 16, 16


def scan(
    length: int, batch: int = 1, gradient: bool = False, packed: bool = False
) -> tuple[list[Tensor], Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    inputs = [draw(batch, length, H, P), draw(batch, length, H).exp(), -draw(H).exp()]
    inputs += [draw(batch, length, G, N), draw(batch, length, G, N), draw(H)]
    seq_idx = torch.arange(length).div(11, rounding_mode="floor").expand(batch, length) if packed else None
    return [t.requires_grad_(gradient) for t in inputs], seq_idx


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "training"])
def test_no_tensor_of_the_scan_is_larger_than_a_chunks_or_the_rows(gradient, packed):
    for batch, length in ((1, 64), (3, 253)):
        inputs, seq_idx = scan(length, batch, gradient, packed)
        with Counting() as seen:
            y, state = ops.ssd(*inputs, seq_idx_BL=seq_idx, chunk_size=CHUNK)
            if gradient:
                (y.sum() + state.sum()).backward()
        a_chunk, the_row = CHUNK * CHUNK * H, length * max(H * P, G * N, 8)  # 8: a document number is an int64
        assert seen.largest <= 4 * batch * max(a_chunk, the_row)
        # and what grows with the row is few tensors: the result, in training a gradient for each input
        rows = [each for each in seen.allocations if each.bytes >= 4 * batch * length * G * N]
        if batch > 1:
            assert len(rows) <= (5 if gradient else 1), rows


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "training"])
def test_operations_of_the_scan_allocate_in_proportion_to_their_inputs(gradient, packed):
    """The worst ratio of bytes made to bytes given does not grow with the length."""
    worst = []
    for length in (64, 512):
        inputs, seq_idx = scan(length, 1, gradient, packed)
        with Counting() as seen:
            y, state = ops.ssd(*inputs, seq_idx_BL=seq_idx, chunk_size=CHUNK)
            if gradient:
                (y.sum() + state.sum()).backward()
        worst.append(max((each.bytes / each.inputs, each.operation) for each in seen.allocations if each.inputs > 8))
        without = [each.bytes for each in seen.allocations if each.inputs <= 8]
        assert max(without, default=0) <= max(CHUNK * CHUNK * 4, H * P * N * 4, 8 * length), without
    print(f"the scan's worst ratio of bytes made to bytes given, {gradient=} {packed=}: {worst}")
    # In training a difference of two rows of sums is a square.
    assert worst[1][0] <= worst[0][0] <= (CHUNK if gradient else 2)


# ------------------------------------------------------------------------------------------------------------ pieces


@pytest.mark.parametrize(("pattern", "masked"), [("M*-E", False), ("M-E", True), ("*", True)], ids=str)
@torch.no_grad()
def test_the_largest_allocation_of_a_row_in_pieces_does_not_grow_with_it(kernels, path, pattern, masked, monkeypatch):
    """Keys and values aside, and what has a byte or an id for each token."""
    monkeypatch.setattr(pieces, "_STEP", 8)
    monkeypatch.setattr(pieces, "_BUDGET", {"cpu": 1})
    model, largest = model_of(pattern), []
    for length in (32, 512 if pattern == "*" else 96):
        ids, cache = tokens(2, length), NemotronHCache(model.config)
        mask = torch.ones_like(ids)
        mask[0, : 3 if masked else 0] = 0
        with Counting() as seen:
            model(ids, attention_mask=mask, cache=cache, logits_to_keep=1)
        growing = (layer for layer in cache.layers if isinstance(layer, GrowingLayer))
        kept = {t.untyped_storage().data_ptr() for layer in growing for t in (layer.keys, layer.values)}
        largest.append(max((each.bytes, each.operation) for each in seen.allocations if each.storage not in kept))
    print(f"{path} {pattern} {masked=}: the largest allocation of a short and a long row in pieces of 8: {largest}")
    if pattern == "*":
        # Keys with a mask go through the library's sdpa, which repeats them for the query heads; no more than that.
        assert largest[1][0] <= 2 * 512 * 4 * 16 * 4
    else:
        assert largest[0][0] == largest[1][0], largest


@pytest.mark.parametrize("pattern", ["M", "*", "-*", "E*"])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_a_piece_is_as_long_as_the_budget_lets_it_be(pattern, batch, monkeypatch):
    """All that one layer makes of a piece, seen by running one, is of the budget's size."""
    budget = 1 << 20
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, "0")
    monkeypatch.setattr(pieces, "_STEP", 8)
    monkeypatch.setattr(pieces, "_BUDGET", {"cpu": budget})
    model = model_of(pattern, intermediate_size=400 if pattern == "-*" else 48)
    length = pieces.chunk_length(model.config, batch, torch.device("cpu"), torch.float32)
    assert length % 8 == 0
    with Counting() as seen:
        model.model(tokens(batch, length), use_cache=False)
    print(
        f"{pattern} {batch=}: pieces of {length} tokens, the largest allocation {seen.largest} of a budget of {budget}"
    )
    assert budget / 8 <= seen.largest <= budget


# --------------------------------------------------------------------------------------------------------------- MoE


@pytest.mark.core
@pytest.mark.parametrize("latent", [False, True], ids=["", "latent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_decoded_token_reads_its_own_experts_alone(kernels, dtype, latent):
    """Experts that it does not choose may be anything, and no bank is copied."""
    model = model_of("M*E", dtype, latent=latent, n_routed_experts=16, n_group=1, topk_group=1)
    experts, chosen = model.model.layers[2].mixer.experts, []
    with decoding(model, 9) as step:
        handle = model.model.layers[2].mixer.gate.register_forward_hook(lambda m, a, out: chosen.append(out[2]))
        with Counting() as seen:
            step()
        handle.remove()
    others = [expert for expert in range(16) if expert not in chosen[0]]
    assert len(others) == 13  # the premise
    assert seen.largest < experts.up_proj.nbytes / 2

    with decoding(model, 9) as step:
        expected = step().logits
    with decoding(model, 9) as step:
        for bank in (experts.up_proj, experts.down_proj):
            bank[others] = torch.nan
        logits = step().logits
    assert logits.isfinite().all() and relative_difference(logits, expected) == 0

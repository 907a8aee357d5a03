"""nemotron_h/ops/attention.py against a masked softmax in float64."""

from __future__ import annotations

import sys

import pytest
import torch
from comparing import error, random
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemotron_h import ops
from nemotron_h.ops import conditions, native

module = sys.modules["nemotron_h.ops.attention"]
# Of the largest value of the result.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# (L, S): the whole, its end, one token, one token of one
LENGTHS = [(9, 9), (7, 23), (1, 23), (2, 3), (1, 1), (1, 2), (16, 40)]


def masked_softmax(q_BALQ: Tensor, k_BKSQ: Tensor, v_BKSQ: Tensor, scale: float) -> Tensor:
    """Query i of L sees keys 0 .. S - L + i; one head after another, in float64."""
    length, keys = q_BALQ.shape[2], k_BKSQ.shape[2]
    per_key_head = q_BALQ.shape[1] // k_BKSQ.shape[1]
    heads = []
    for a in range(q_BALQ.shape[1]):
        q, k, v = q_BALQ[:, a].double(), k_BKSQ[:, a // per_key_head].double(), v_BKSQ[:, a // per_key_head].double()
        scores = torch.einsum("blq,bsq->bls", q, k) * scale
        unseen = torch.arange(keys)[None, :] > torch.arange(length)[:, None] + keys - length
        weights = torch.softmax(scores.masked_fill(unseen, -torch.inf), -1)
        heads.append(torch.einsum("bls,bsq->blq", weights, v))
    return torch.stack(heads, 1)


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch):
    if request.param == "native":
        monkeypatch.delenv(native.ENVIRONMENT_VARIABLE, raising=False)
        if native.library() is None:
            pytest.skip(native.reason())
    else:
        monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, "0")
    return request.param


@pytest.fixture(
    params=[*((dtype, False) for dtype in TOLERANCE), (torch.bfloat16, True), (torch.float16, True)], ids=str
)
def dtype(request, monkeypatch):
    """Every dtype, half precision also on a CPU that multiplies it."""
    dtype, multiplies = request.param
    monkeypatch.setattr(conditions, "multiplies", lambda dtype: multiplies)
    # There the weights of the keys are rounded to it before they are multiplied, and each tile's result.
    monkeypatch.setitem(TOLERANCE, dtype, TOLERANCE[dtype] * (3 if multiplies else 1))
    return dtype


def inputs(generator, dtype, length, keys, *, batch=2, heads=6, key_heads=2, head_dim=16, room=0) -> list[Tensor]:
    """q, k, v; with `room` keys and values are views of a longer buffer, whose rest is not a number."""
    q = random(generator, batch, length, heads, head_dim, dtype=dtype).transpose(1, 2)
    k, v = (random(generator, batch, key_heads, keys + room, head_dim, dtype=dtype) for _ in range(2))
    for t in (k, v):
        t[:, :, keys:] = torch.nan
    return [q, k[:, :, :keys], v[:, :, :keys]]


def called(monkeypatch) -> list[int]:
    """How often native.c was asked."""
    calls, function = [], native.attend
    monkeypatch.setattr(native, "attend", lambda *args: calls.append(1) or function(*args))
    return calls


@pytest.mark.core
@pytest.mark.parametrize(
    # native.c takes a few queries alone
    ("path", "lengths"),
    [("torch", lengths) for lengths in LENGTHS]
    + [("native", lengths) for lengths in LENGTHS if lengths[0] <= ops.FEW_TOKENS],
    indirect=["path"],
    ids=str,
)
def test_every_length(generator, monkeypatch, path, dtype, lengths):
    for heads, key_heads in ((6, 2), (4, 4), (3, 1)):
        for head_dim, room in ((16, 0), (12, 0), (32, 9)):
            q, k, v = inputs(generator, dtype, *lengths, heads=heads, key_heads=key_heads, head_dim=head_dim, room=room)
            expected = masked_softmax(q, k, v, head_dim**-0.5)
            for tile in (4096, 5):
                monkeypatch.setattr(module, "_KEYS", tile)
                y = ops.causal_attention(q, k, v, head_dim**-0.5)
                assert y.shape == q.shape and y.dtype == dtype
                assert error(y, expected) <= TOLERANCE[dtype], (heads, head_dim, tile)


@pytest.mark.core
@pytest.mark.parametrize("length", [1, 2, 5, 16])
@pytest.mark.parametrize("keys", [16, 17, 127, 128, 255, 256, 300, 1100])
def test_few_queries_over_many_keys(generator, path, dtype, keys, length):
    """native.c cuts the keys in pieces from 256 on; R of 1, 3 and 8."""
    for heads, key_heads in ((2, 2), (6, 2), (8, 1)):
        q, k, v = inputs(generator, dtype, length, keys, heads=heads, key_heads=key_heads, room=3)
        assert error(ops.causal_attention(q, k, v, 0.25), masked_softmax(q, k, v, 0.25)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("length", [1, 9])
def test_sharp_and_flat_scores(generator, monkeypatch, path, dtype, length):
    """Scores of some thousands, the largest first, last and between; and all the same."""
    monkeypatch.setattr(module, "_KEYS", 64)
    q, k, v = inputs(generator, dtype, length, 300)
    q, k = (torch.randint(-1, 2, t.shape, generator=generator).to(dtype) for t in (q, k))  # exact in any dtype
    for at in (0, 150, 300 - length):
        strong = k.clone()
        strong[:, :, at] = 8 * q[:, ::3, -1]
        expected = masked_softmax(q, strong, v, 8.0)
        y = ops.causal_attention(q, strong, v, 8.0)
        # Tiles are joined by a log-sum-exp, whose own last digit counts.
        assert error(y[:, :, -1], expected[:, :, -1]) <= max(
            TOLERANCE[dtype], 1e-12 if dtype == torch.float64 else 1e-5
        )
        assert error(y[:, ::3, -1], v[:, :, at]) <= 1e-3  # the premise: one key takes all
    assert error(ops.causal_attention(q, k * 0, v, 1.0), masked_softmax(q, k * 0, v, 1.0)) <= TOLERANCE[dtype]


def test_every_layout_of_the_inputs(generator, path, dtype):
    """A projection's heads, side by side; a buffer's; batch rows that lie apart; one tensor as keys and values."""
    for length, keys in ((1, 1), (1, 7), (5, 7)):
        q, k, v = inputs(generator, dtype, length, keys)
        expected = masked_softmax(q, k, v, 0.25)
        side_by_side = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v)]
        apart = [torch.stack([t, t * 0], 1).flatten(0, 1)[::2] for t in (k, v)]
        heads_apart = [torch.stack([t, t * 0], 2).flatten(1, 2)[:, ::2] for t in (k, v)]
        columns = [torch.cat([t, t * 0], -1)[..., : t.shape[-1]] for t in (k, v)]
        mixed = [side_by_side[0], apart[1]], [heads_apart[0], side_by_side[1]]
        for laid_out in (side_by_side, apart, heads_apart, columns, *mixed):
            assert error(ops.causal_attention(q, *laid_out, 0.25), expected) <= TOLERANCE[dtype]
        y = ops.causal_attention(q.contiguous(), k, k, 0.25)
        assert error(y, masked_softmax(q, k, k, 0.25)) <= TOLERANCE[dtype]


def test_mixed_dtypes_do_not_reach_native(generator, monkeypatch):
    calls = called(monkeypatch)
    q, k, v = inputs(generator, torch.float32, 1, 7)
    k, v = k.bfloat16(), v.bfloat16()
    assert error(ops.causal_attention(q, k, v, 0.25), masked_softmax(q, k, v, 0.25)) <= TOLERANCE[torch.float32]
    assert not calls


def test_who_calls_native(generator, monkeypatch):
    if native.library() is None:
        pytest.skip(native.reason())
    calls = called(monkeypatch)
    for dtype in (torch.float32, torch.bfloat16):
        ops.causal_attention(*inputs(generator, dtype, 1, 7, room=3), 0.25)
    assert len(calls) == 2
    for dtype, length, head_dim in (
        (torch.float64, 1, 16),
        (torch.float16, 1, 16),
        (torch.float32, 17, 16),
        (torch.float32, 1, 12),
    ):
        ops.causal_attention(*inputs(generator, dtype, length, 7, head_dim=head_dim), 0.25)
    assert len(calls) == 2


def test_a_gradient_is_not_lost(generator, path):
    """It promises none, and where one is wanted all the same it is the right one."""
    q, k, v = (t.contiguous().requires_grad_() for t in inputs(generator, torch.float32, 1, 7))
    y = ops.causal_attention(q, k, v, 0.25)
    dy = random(generator, *y.shape, dtype=torch.float32)
    doubles = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = torch.autograd.grad(masked_softmax(*doubles, 0.25), doubles, dy.double())
    for a, e in zip(torch.autograd.grad(y, (q, k, v), dy), expected, strict=True):
        assert error(a, e) <= 1e-5


@pytest.mark.parametrize("length", [1, 5])
def test_autocast_changes_nothing(generator, path, length):
    q, k, v = inputs(generator, torch.float32, length, 23)
    expected = ops.causal_attention(q, k, v, 0.25)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.causal_attention(q, k, v, 0.25), expected)


@pytest.mark.parametrize("threads", [2, 3])
def test_the_same_for_any_number_of_threads(generator, threads):
    q, k, v = inputs(generator, torch.bfloat16, 1, 1100)
    before, expected = torch.get_num_threads(), ops.causal_attention(q, k, v, 0.25)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(ops.causal_attention(q, k, v, 0.25), expected)
    finally:
        torch.set_num_threads(before)


def test_no_tensor_of_queries_times_keys(generator, monkeypatch):
    """Nor a copy of all keys in another dtype, nor one for each query head of what all queries see."""
    monkeypatch.setattr(module, "_KEYS", 32)
    monkeypatch.setattr(conditions, "multiplies", lambda dtype: False)

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
            for t in result if isinstance(result, tuple | list) else [result]:
                if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known:
                    self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
            return result

    largest = []
    for keys in (128, 1024):
        q, k, v = inputs(generator, torch.bfloat16, 32, keys, batch=1)
        with Largest() as seen:
            ops.causal_attention(q, k, v, 0.25)
        largest.append(seen.elements)
    assert largest[0] == largest[1] == q.numel()

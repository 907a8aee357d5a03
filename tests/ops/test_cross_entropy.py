"""nemotron_h/ops/cross_entropy.py against log-softmax in float64, and how much it holds."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from comparing import error, random
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemotron_h import ops
from nemotron_h.ops import conditions, cross_entropy
from nemotron_h.ops import cuda_kernels as backends

T, D, V = 21, 6, 300


@pytest.fixture(params=[1, 40, V + 1], ids=["one-column", "some-columns", "one-tile"])
def tiles(request, monkeypatch):
    """How many columns a tile has."""
    monkeypatch.setattr(cross_entropy, "_FEWEST_COLUMNS", request.param)
    monkeypatch.setitem(cross_entropy._TILE_BYTES, "cpu", 0)


def inputs(generator, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(0, V, (T,), generator=generator)
    labels[:3] = torch.tensor([0, V - 1, 39])  # the ends, and an edge of a tile
    labels[[4, 7, T - 1]] = -100
    return random(generator, T, D, dtype=dtype), random(generator, V, D, dtype=dtype), labels


def oracle(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients, written out: p - onehot, over the tokens that have a label."""
    x, weight = x.double(), weight.double()
    logits = x @ weight.T
    p = logits.softmax(-1)
    has = labels != -100
    onehot = F.one_hot(labels.clamp(min=0), V).double()
    loss = -(logits.log_softmax(-1) * onehot).sum(-1)[has].sum()
    dlogits = (p - onehot) * has[:, None]
    return loss, dlogits @ weight, dlogits.T @ x


def ours(x: Tensor, weight: Tensor, labels: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = ops.linear_cross_entropy(x, weight, labels)
    dx, dweight = torch.autograd.grad(loss * scale, [x, weight])
    return loss.detach(), dx, dweight


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_loss_and_gradients(tiles, generator, dtype, tolerance):
    x, weight, labels = inputs(generator, dtype)
    for found, expected in zip(ours(x, weight, labels), oracle(x, weight, labels), strict=True):
        assert found.dtype == dtype
        assert error(found, expected) < tolerance


def test_bfloat16_is_rounded_in_its_gradients_only(tiles, generator, monkeypatch):
    x, weight, labels = inputs(generator, torch.bfloat16)
    expected = oracle(x, weight, labels)
    # As on a CPU without instructions for it: float32 products.
    monkeypatch.setattr(conditions, "multiplies", lambda dtype: False)
    loss, dx, dweight = ours(x, weight, labels)
    assert loss.dtype == torch.float32 and error(loss, expected[0]) < 1e-6
    assert dx.dtype == dweight.dtype == torch.bfloat16
    assert error(dx, expected[1]) < 2**-8 and error(dweight, expected[2]) < 2**-8
    # And where there are: logits are rounded as the head's would be.
    monkeypatch.setattr(conditions, "multiplies", lambda dtype: True)
    loss, dx, dweight = ours(x, weight, labels)
    assert error(loss, expected[0]) < 1e-2 and error(dx, expected[1]) < 3e-2 and error(dweight, expected[2]) < 3e-2


def test_large_logits_neither_overflow_nor_lose_digits(tiles, generator):
    x, weight, labels = inputs(generator, torch.float32)
    loss, *gradients = ours(300 * x, weight, labels)
    expected, *expected_gradients = oracle(300 * x, weight, labels)
    assert error(loss, expected) < 1e-6
    # A float32 logit of some thousands is sure to 1e-4, and so is its exponential.
    assert all(error(a, b) < 1e-3 for a, b in zip(gradients, expected_gradients, strict=True))


def test_gradcheck(tiles, generator):
    x, weight, labels = inputs(generator)
    x, weight = x[:4].requires_grad_(), weight[:45].clone().requires_grad_()
    labels = labels[:4].clamp(max=44)
    assert torch.autograd.gradcheck(lambda x, w: ops.linear_cross_entropy(x, w, labels), (x, weight))


def test_what_is_multiplied_in_afterwards_reaches_the_gradients(generator):
    x, weight, labels = inputs(generator)
    _, dx, dweight = ours(x, weight, labels, scale=-3.5)
    _, expected_dx, expected_dweight = oracle(x, weight, labels)
    assert error(dx, -3.5 * expected_dx) < 1e-13 and error(dweight, -3.5 * expected_dweight) < 1e-13


def test_a_small_gradient_is_scaled_before_it_is_rounded(generator):
    """Of float16 and a loss that a scaler multiplied: unscaled, most of the gradients would be 0."""
    x, weight, labels = inputs(generator, torch.float16)
    x, weight = x * 1e-3, weight * 1e-3
    _, dx, _ = ours(x, weight, labels, scale=2.0**10)
    assert error(dx, 2.0**10 * oracle(x, weight, labels)[1]) < 2**-9


def test_either_input_alone_may_want_a_gradient(generator):
    x, weight, labels = inputs(generator)
    _, dx, dweight = oracle(x, weight, labels)
    leaf = x.clone().requires_grad_()
    assert error(torch.autograd.grad(ops.linear_cross_entropy(leaf, weight, labels), leaf)[0], dx) < 1e-13
    leaf = weight.clone().requires_grad_()
    assert error(torch.autograd.grad(ops.linear_cross_entropy(x, leaf, labels), leaf)[0], dweight) < 1e-13


def test_the_graph_can_be_walked_twice(generator):
    x, weight, labels = inputs(generator)
    x.requires_grad_()
    loss = ops.linear_cross_entropy(x, weight, labels)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)


def test_no_label_at_all_is_a_loss_of_zero_with_gradients_of_zero(generator):
    x, weight, _ = inputs(generator)
    loss, dx, dweight = ours(x, weight, torch.full((T,), -100))
    assert loss == 0 and not dx.any() and not dweight.any()


@pytest.mark.parametrize("wrong", [V, -1, V + 1000])
def test_a_label_outside_the_vocabulary_is_named(generator, wrong):
    x, weight, labels = inputs(generator)
    labels[5] = wrong
    with pytest.raises(ValueError, match=f"label {wrong} is not in the vocabulary of {V}"):
        ops.linear_cross_entropy(x, weight, labels)


def test_another_number_may_stand_for_no_label(generator):
    x, weight, labels = inputs(generator)
    expected = ops.linear_cross_entropy(x, weight, labels)
    assert torch.equal(
        ops.linear_cross_entropy(x, weight, labels.masked_fill(labels == -100, -7), ignore_index=-7), expected
    )


def test_autocast_multiplies_in_its_dtype(generator):
    x, weight, labels = inputs(generator, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, dx, dweight = ours(x, weight, labels)
        logits = F.linear(x, weight)
    assert loss.dtype == dx.dtype == dweight.dtype == torch.float32
    assert error(loss, F.cross_entropy(logits.float(), labels, reduction="sum")) < 1e-3
    rounded = oracle(x.bfloat16(), weight.bfloat16(), labels)
    assert error(dx, rounded[1]) < 3e-2 and error(dweight, rounded[2]) < 3e-2


def test_compiled_without_graph_breaks(generator):
    x, weight, labels = inputs(generator)

    def step(x, weight):
        return ops.linear_cross_entropy(x, weight, labels)

    torch.compiler.reset()
    x, weight = x.requires_grad_(), weight.requires_grad_()
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(x, weight)
    expected = oracle(x.detach(), weight.detach(), labels)
    for found, wanted in zip([loss, *torch.autograd.grad(loss, [x, weight])], expected, strict=True):
        assert error(found, wanted) < 1e-12


def test_the_logits_are_never_whole(generator, monkeypatch):
    monkeypatch.setitem(cross_entropy._TILE_BYTES, "cpu", 0)
    monkeypatch.setattr(cross_entropy, "_FEWEST_COLUMNS", 16)

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, tuple | list) else [result]:
                if isinstance(t, Tensor):
                    self.elements = max(self.elements, t.numel())
            return result

    x, weight, labels = inputs(generator)
    with Largest() as seen:
        ours(x, weight, labels)
    assert seen.elements <= max(T * 16, V * D) < T * V


def test_liger_is_used_where_it_is_and_can_be(generator, monkeypatch):
    """Against a stand-in with its signature; on a GPU it has not been run."""
    calls = []

    class Loss:
        def __init__(self, ignore_index=-100, reduction="mean"):
            assert reduction == "sum"

        def __call__(self, lin_weight, _input, target, bias=None):
            calls.append(_input.shape)
            return F.cross_entropy(_input @ lin_weight.T, target, reduction="sum")

    package, module = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.transformers")
    module.LigerFusedLinearCrossEntropyLoss = Loss
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    monkeypatch.setattr(backends, "KERNEL_DEVICES", ("cuda", "cpu"))
    backends._liger.cache_clear()
    x, weight, labels = inputs(generator)
    try:
        found, expected = ours(x, weight, labels), oracle(x, weight, labels)
        assert calls == [(T - 3, D)]
        assert all(error(a, b) < 1e-13 for a, b in zip(found, expected, strict=True))
        ours(x, weight.float(), labels)  # its products want one dtype
        monkeypatch.setenv("NEMOTRON_H_KERNELS", "0")
        ours(x, weight, labels)
        assert len(calls) == 1
    finally:
        backends._liger.cache_clear()

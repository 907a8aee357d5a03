"""nemotron_h/ops/linear.py: `F.linear` in everything but speed, by each of its paths."""

from __future__ import annotations

import itertools
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from comparing import error, random
from torch import Tensor

from nemotron_h import ops
from nemotron_h.ops import conditions, native
from nemotron_h.ops.linear import _without_onednn, in_tiles

# The module: `ops.linear` is the function.
module = sys.modules["nemotron_h.ops.linear"]

K, N = 37, 75
# Of the largest value of the result; float16's products may be summed in float32 and rounded once.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DTYPES = list(TOLERANCE)
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch):
    """With native.c and without."""
    if request.param == "native":
        monkeypatch.delenv(native.ENVIRONMENT_VARIABLE, raising=False)
        if native.library() is None:
            pytest.skip(native.reason())
    else:
        monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, "0")
    return request.param


@pytest.fixture(params=[*((dtype, True) for dtype in DTYPES), *((dtype, False) for dtype in HALF)], ids=str)
def dtype(request, monkeypatch):
    """Every dtype, half precision also on a CPU without instructions for it."""
    dtype, instructions = request.param
    monkeypatch.setattr(conditions, "multiplies", lambda dtype: instructions)
    return dtype


@pytest.fixture
def small_tiles(monkeypatch):
    """64 output rows a tile, the fewest: N takes two."""
    monkeypatch.setattr(module, "_TILE", 1)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Written out: a sum of products for each output, in float64."""
    y = (x.double().unsqueeze(-2) * weight.double()).sum(-1)
    return y if bias is None else y + bias.double()


def layer(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(random(generator, *size, dtype=dtype) for size in ((*shape, K), (N, K), (N,)))


SHAPES = [(), (1,), (3,), (33,), (70,), (2, 35), (1, 1), (3, 1, 11), (2, 1, 1)]


@pytest.mark.core
def test_inference(generator, path, dtype, small_tiles):
    for shape, with_bias, trainable in itertools.product(SHAPES, (False, True), (False, True)):
        x, weight, bias = layer(generator, dtype, *shape)
        before, b = (x.clone(), weight.clone(), bias.clone()), bias if with_bias else None
        with torch.no_grad():
            y = ops.linear(x, torch.nn.Parameter(weight, requires_grad=trainable), b)
        assert y.dtype == dtype and y.shape == (*shape, N) and y.is_contiguous() and not y.requires_grad
        # With a bias some paths round the product and then the sum.
        assert error(y, exact(x, weight, b)) <= TOLERANCE[dtype] * (1 if b is None else 1.5), (shape, with_bias)
        assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, bias), strict=True))


@pytest.mark.core
@pytest.mark.parametrize("rows", [(1,), (3,), (33,), (2, 35)], ids=str)
def test_gradients(generator, path, dtype, small_tiles, rows):
    """Of the tensors that want one, whichever they are; frozen ones get none."""
    tensors = dict(zip(("x", "weight", "bias"), layer(generator, dtype, *rows), strict=True))
    dy = random(generator, *rows, N, dtype=dtype)
    doubles = {name: t.clone().double().requires_grad_() for name, t in tensors.items()}
    expected = torch.autograd.grad(exact(*doubles.values()), list(doubles.values()), dy.double())
    expected = dict(zip(tensors, expected, strict=True))
    for wanted in (["x", "weight", "bias"], ["x"], ["weight"], ["bias"], ["x", "bias"]):
        leaves = {name: t.clone().requires_grad_(name in wanted) for name, t in tensors.items()}
        y = ops.linear(*leaves.values())
        assert y.dtype == dtype and error(y, exact(*tensors.values())) <= TOLERANCE[dtype] * 1.5
        gradients = torch.autograd.grad(y, [leaves[name] for name in wanted], dy)
        for name, gradient in zip(wanted, gradients, strict=True):
            assert gradient.dtype == dtype
            # Where torch itself sums a bias' gradient in half precision is torch's business.
            assert error(gradient, expected[name]) <= TOLERANCE[dtype] * (4 if name == "bias" else 1), (wanted, name)


def test_without_a_bias_gradients_flow_through_tiles(generator, monkeypatch, small_tiles):
    monkeypatch.setattr(conditions, "multiplies", lambda dtype: False)
    x, weight, _ = layer(generator, torch.bfloat16, 9)
    x.requires_grad_()
    y = ops.linear(x, weight)
    assert type(y.grad_fn).__name__ != "MmBackward0"  # the premise
    (dx,) = torch.autograd.grad(y.double().square().sum(), x)
    double = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(exact(double, weight, None).square().sum(), double)
    assert error(dx, expected) <= 2**-7  # y itself, rounded, is in it


@pytest.mark.parametrize("rows", [0, 1, 40])
def test_zero_rows_and_one_output(generator, path, dtype, rows):
    x, weight, bias = layer(generator, dtype, 2, rows)
    for b in (None, bias):
        y = ops.linear(x, weight, b)
        assert y.dtype == dtype and y.shape == (2, rows, N)
    leaf, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    dx, dweight = torch.autograd.grad(ops.linear(leaf, weight, bias).float().sum(), (leaf, weight))
    assert dx.shape == x.shape and dweight.shape == weight.shape
    if rows == 0:
        assert not dweight.any()
    y = ops.linear(x, weight.detach()[:1])
    assert error(y, exact(x, weight[:1], None)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_slices_and_transposes(generator, path, dtype, small_tiles, rows):
    wide, weight, bias = layer(generator, dtype, 2 * rows)
    wide = torch.cat([wide, wide + 1], dim=1)
    inputs = {
        "rows": wide[::2, :K],
        "columns": wide[:rows, 1 : K + 1],
        "transposed": wide.t().contiguous().t()[:rows, :K],
    }
    stores = {
        "plain": weight,
        "transposed": weight.t().contiguous().t(),
        "slice": torch.cat([weight, weight], 1)[:, :K],
    }
    for x in inputs.values():
        for w in stores.values():
            assert error(ops.linear(x, w, bias), exact(x, weight, bias)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("to", HALF, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_under_autocast_it_is_f_linear(generator, path, dtype, to, rows):
    x, weight, bias = layer(generator, dtype, rows)
    with torch.autocast("cpu", to):
        y, expected = ops.linear(x, weight, bias), F.linear(x, weight, bias)
        leaf = x.clone().requires_grad_()
        trained = ops.linear(leaf, weight, bias)
    assert expected.dtype == (dtype if dtype == torch.float64 else to) and y.dtype == expected.dtype
    assert torch.equal(y, expected) and torch.equal(trained, expected)
    assert torch.autograd.grad(trained.float().sum(), leaf)[0].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_without_graph_breaks(generator, dtype):
    torch.compiler.reset()
    compiled = torch.compile(ops.linear, fullgraph=True, backend="eager", dynamic=False)
    x, weight, bias = layer(generator, dtype, 2, 3)
    with torch.no_grad():
        assert torch.equal(compiled(x, weight, bias), F.linear(x, weight, bias))
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = compiled(*leaves)
    dy = random(generator, *y.shape, dtype=dtype)
    expected = torch.autograd.grad(F.linear(*leaves), leaves, dy)
    assert all(torch.equal(a, e) for a, e in zip(torch.autograd.grad(y, leaves, dy), expected, strict=True))


def test_mixed_dtypes_are_refused_as_f_linear_refuses_them(generator, path):
    x, weight, bias = layer(generator, torch.float32, 1)
    with pytest.raises(RuntimeError, match="dtype"):
        F.linear(x, weight.bfloat16(), bias)
    with pytest.raises(RuntimeError, match="dtype"):
        ops.linear(x, weight.bfloat16(), bias)


@pytest.mark.parametrize("rows", [1, 40])
def test_subclasses_are_asked_themselves(generator, path, dtype, rows):
    """A quantised weight of another package brings a product of its own."""
    asked = []

    class Quantised(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            asked.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    x, weight, _ = layer(generator, dtype, rows)
    expected = F.linear(x, weight)
    for x_, weight_ in ((x, weight.as_subclass(Quantised)), (x.as_subclass(Quantised), weight)):
        asked.clear()
        y = ops.linear(x_, weight_)
        assert torch.equal(y.as_subclass(Tensor), expected)
        # whole, and before anything else is done with it
        assert next(function for function in asked if "__get__" not in str(function)) is F.linear


@pytest.mark.parametrize("rows", [1, 40])
def test_tensors_without_data(generator, path, dtype, rows):
    x, weight, bias = (t.to("meta") for t in layer(generator, dtype, 2, rows))
    y = ops.linear(x, weight, bias)
    assert y.device.type == "meta" and y.shape == (2, rows, N) and y.dtype == dtype


def test_in_tiles_takes_weights_of_any_dtype(generator, small_tiles):
    x, weight, bias = layer(generator, torch.float16, 5)
    stored = weight.double()
    y = in_tiles(x, stored, bias)
    assert y.dtype == torch.float16 and error(y, exact(x, weight, bias)) <= TOLERANCE[torch.float16]


class TestTheSwitch:
    """`_without_onednn` turns oneDNN off for one product, and the switch is the process's."""

    @pytest.fixture(autouse=True)
    def _leave_it(self):
        before = torch._C._get_mkldnn_enabled()
        yield
        torch._C._set_mkldnn_enabled(before)

    @pytest.mark.parametrize("before", [True, False])
    def test_it_is_put_back(self, before):
        torch._C._set_mkldnn_enabled(before)
        with _without_onednn():
            assert not torch._C._get_mkldnn_enabled()
            with _without_onednn():
                assert not torch._C._get_mkldnn_enabled()
            assert not torch._C._get_mkldnn_enabled()
        assert torch._C._get_mkldnn_enabled() == before

    @pytest.mark.parametrize("before", [True, False])
    def test_after_an_exception(self, before):
        torch._C._set_mkldnn_enabled(before)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError), _without_onednn():
                _ = 1 / 0
            assert torch._C._get_mkldnn_enabled() == before
        with _without_onednn():
            assert not torch._C._get_mkldnn_enabled()

    @pytest.mark.parametrize("before", [True, False])
    def test_eight_threads_in_and_out_in_any_order(self, before):
        """All are inside before the first leaves, and the first in is not the last out."""
        torch._C._set_mkldnn_enabled(before)
        inside, leave, seen = threading.Barrier(9), [threading.Event() for _ in range(8)], []

        def work(index):
            with _without_onednn():
                inside.wait()
                leave[index].wait()
                seen.append(torch._C._get_mkldnn_enabled())

        threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        inside.wait()
        for index in (3, 0, 7, 5, 1, 6, 4, 2):
            leave[index].set()
            threads[index].join()
            assert torch._C._get_mkldnn_enabled() == (before if index == 2 else False)
        assert seen == [False] * 8

    def test_eight_threads_hurrying(self):
        torch._C._set_mkldnn_enabled(True)
        seen = []

        def work():
            for _ in range(200):
                with _without_onednn():
                    seen.append(torch._C._get_mkldnn_enabled())

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not any(seen) and torch._C._get_mkldnn_enabled()

    def test_one_row_of_bfloat16_uses_it_and_a_gradient_does_not(self, generator, monkeypatch):
        monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, "0")
        monkeypatch.setattr(conditions, "multiplies", lambda dtype: True)
        torch._C._set_mkldnn_enabled(True)
        enabled, plain = [], F.linear

        def watched(*args):
            enabled.append(torch._C._get_mkldnn_enabled())
            return plain(*args)

        monkeypatch.setattr(module.F, "linear", watched)
        x, weight, bias = layer(generator, torch.bfloat16, 1)
        ops.linear(x, weight, bias)
        ops.linear(x, weight, bias.clone().requires_grad_())
        ops.linear(torch.cat([x, x]), weight, bias)
        ops.linear(x.float(), weight.float())
        assert enabled == [False, True, True, True] and torch._C._get_mkldnn_enabled()

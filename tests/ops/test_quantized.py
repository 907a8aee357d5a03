"""Weights of 8 and 4 bits: the layout index by index, how near they are, and products against float64 ones."""

import pytest
import torch
from comparing import assert_same, error, random

from nemotron_h import ops
from nemotron_h.ops import conditions
from nemotron_h.ops import int8_int4 as quantized
from nemotron_h.ops import packed as packed_weights

BITS = (8, 4)
# below, at, above and between the multiples of a packed block and of a vector
WIDTHS = (1, 20, 32, 63, 64, 65, 100, 128, 200)


def by_hand(q: torch.Tensor, scale: torch.Tensor, bits: int, in_features: int) -> torch.Tensor:
    """The weight of one (N, K) matrix in float64, input by input, from the layout's description alone."""
    weight = torch.zeros(q.shape[0], in_features, dtype=torch.float64)
    for n in range(q.shape[0]):
        for k in range(in_features):
            if bits == 8:
                weight[n, k] = q[n, k].item() * scale[n].double().item()
            else:
                block, t, lane, half = k // 64, k % 64 // 16, k % 16 // 2, k % 2
                place = 4 * half + t
                word = q[n, 8 * block + lane].item() & 0xFFFFFFFF
                weight[n, k] = ((word >> 4 * place & 15) - 8) * scale[n, k // 32].double().item()
    return weight


@pytest.mark.core
@pytest.mark.parametrize("in_features", WIDTHS)
@pytest.mark.parametrize("bits", BITS)
def test_layout(bits, in_features, generator):
    weight = random(generator, 5, in_features)
    q, scale = ops.quantize_weight(weight, bits)
    padded = (in_features + 63) // 64 * 64
    if bits == 8:
        assert (q.dtype, q.shape, scale.dtype, scale.shape) == (torch.int8, weight.shape, torch.float32, (5,))
        assert q.abs().max() == 127  # never -128
    else:
        assert (q.dtype, q.shape) == (torch.int32, (5, padded // 8))
        assert (scale.dtype, scale.shape) == (torch.bfloat16, (5, padded // 32))
    expected = by_hand(q, scale, bits, in_features)
    assert torch.equal(ops.dequantize_weight(q, scale, bits, in_features, torch.float64), expected)
    if bits == 4:  # what lies past the inputs is 0
        whole = ops.dequantize_weight(q, torch.ones_like(scale), bits, padded, torch.float64)
        assert not whole[:, in_features:].any()
    # and it is that weight which was quantised, not another order of its inputs
    assert (expected - weight).abs().max() <= 1.1 * scale.double().abs().max()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantized_once_rounded(bits, dtype, generator):
    q, scale = ops.quantize_weight(random(generator, 6, 100), bits)
    exact = ops.dequantize_weight(q, scale, bits, 100, torch.float64)
    expected = exact.float().to(dtype)
    assert torch.equal(ops.dequantize_weight(q, scale, bits, 100, dtype), expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_leading_dimensions_and_tiles(bits, dtype, generator, monkeypatch):
    """(E, N, K) is E matrices, and working a few rows at a time changes nothing."""
    weight = random(generator, 3, 7, 100).to(dtype)
    q, scale = ops.quantize_weight(weight, bits)
    whole = ops.dequantize_weight(q, scale, bits, 100, torch.float64)
    monkeypatch.setitem(packed_weights._TILE, "cpu", 250)  # two rows
    for expert in range(3):
        q_one, scale_one = ops.quantize_weight(weight[expert], bits)
        assert torch.equal(q[expert], q_one) and torch.equal(scale[expert], scale_one)
        assert torch.equal(whole[expert], ops.dequantize_weight(q_one, scale_one, bits, 100, torch.float64))


def test_int8_is_the_nearest_grid_point(generator):
    weight = random(generator, 50, 300)
    q, scale = ops.quantize_weight(weight, 8)
    difference = (ops.dequantize_weight(q, scale, 8, 300, torch.float64) - weight).abs()
    assert (difference <= scale.double()[:, None] / 2 * (1 + 1e-6)).all()
    assert torch.allclose(scale.double(), weight.abs().amax(-1) / 127, rtol=1e-7)


def squared_errors(weight: torch.Tensor, divisor: float) -> torch.Tensor:
    """Per group of 32, with the scale `peak / divisor`, written here from scratch."""
    errors = []
    for row in weight:
        for group in row.split(32):
            peak = max(group.tolist(), key=abs)
            scale = torch.tensor(peak / divisor).bfloat16().double().item()
            codes = [min(max(round(value / scale), -8), 7) if scale else 0 for value in group.tolist()]
            errors.append(sum((code * scale - value) ** 2 for code, value in zip(codes, group.tolist(), strict=True)))
    return torch.tensor(errors, dtype=torch.float64).view(len(weight), -1)


@pytest.mark.parametrize("spread", ["gaussian", "heavy"])
def test_int4_is_never_worse_than_plain_scales(spread, generator):
    weight = random(generator, 40, 128)
    if spread == "heavy":
        weight = weight**3
    q, scale = ops.quantize_weight(weight, 4)
    difference = ops.dequantize_weight(q, scale, 4, 128, torch.float64) - weight
    ours = difference.square().view(40, -1, 32).sum(-1)
    q4_0, symmetric = squared_errors(weight, -8.0), squared_errors(weight, 7.0)
    assert (ours <= torch.minimum(q4_0, symmetric) * (1 + 1e-9)).all()
    assert ours.sum() < 0.96 * q4_0.sum()


@pytest.mark.parametrize("bits", BITS)
def test_values_that_are_on_the_grid_are_kept(bits, generator):
    """Zeros, single values, powers of two: what both formats can hold comes back exactly."""
    weight = torch.zeros(4, 64, dtype=torch.float64)
    weight[1, 5], weight[2, 40], weight[3, :2] = -3.0, 2.0**-120, torch.tensor([4.0, -4.0])
    q, scale = ops.quantize_weight(weight, bits)
    assert scale.isfinite().all()
    back = ops.dequantize_weight(q, scale, bits, 64, torch.float64)
    assert error(back, weight) <= (1e-7 if bits == 8 else 0.005)  # a scale is rounded to its dtype
    assert torch.equal(back == 0, weight == 0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(bits, value):
    weight = torch.ones(3, 64)
    weight[1, 2] = value
    with pytest.raises(ValueError, match=rf"shape \(3, 64\) has values that are NaN or infinite, which {bits} bits"):
        ops.quantize_weight(weight, bits)


def test_other_numbers_of_bits():
    for call in (lambda: ops.quantize_weight(torch.ones(2, 64), 3), lambda: quantized.packed_shapes(16, 2, 64)):
        with pytest.raises(ValueError, match=r"bits=(3|16): weights are quantised to 8 or 4 bits"):
            call()


@pytest.mark.parametrize("bits", BITS)
def test_an_input_of_another_width(bits, generator):
    q, scale = ops.quantize_weight(random(generator, 3, 128), bits)
    with pytest.raises(ValueError, match=rf"The input has 64 features and the int{bits} weight takes another number"):
        ops.quantized_linear(torch.ones(1, 64), q, scale, None, bits)


@pytest.mark.core
@pytest.mark.parametrize("in_features", WIDTHS)
@pytest.mark.parametrize("bits", BITS)
def test_linear(bits, in_features, generator, monkeypatch):
    """Output and gradients of x and bias, in float64, in tiles of two rows, against a plain linear of that weight."""
    monkeypatch.setitem(packed_weights._TILE, "cpu", 2 * in_features)
    q, scale = ops.quantize_weight(random(generator, 7, in_features), bits)
    weight = by_hand(q, scale, bits, in_features)
    x, bias = random(generator, 2, 3, in_features), random(generator, 7)
    assert_same(
        lambda x, bias: ops.quantized_linear(x, q, scale, bias, bits),
        lambda x, bias: torch.nn.functional.linear(x, weight, bias),
        (x, bias),
        1e-12,
    )
    assert error(ops.quantized_linear(x, q, scale, None, bits), x @ weight.T) <= 1e-12


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
@pytest.mark.parametrize("in_features", [20, 96, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", BITS)
def test_linear_in_less_precision(bits, dtype, in_features, rows, generator):
    """The inputs are exactly those of the float64 product: what is left is rounding the sums and the result."""
    q, scale = ops.quantize_weight(random(generator, 7, in_features), bits)
    weight = by_hand(q, scale, bits, in_features)
    x = random(generator, rows, in_features).to(dtype)
    x.requires_grad_()
    y = ops.quantized_linear(x, q, scale, None, bits)
    expected = x.detach().double() @ weight.T
    assert y.dtype == dtype
    step = torch.finfo(dtype).eps
    assert error(y, expected) <= (4e-6 if dtype == torch.float32 else 1.1 * step)
    # the same without a gradient, which goes another way
    assert torch.equal(ops.quantized_linear(x.detach(), q, scale, None, bits), y)
    grad = random(generator, rows, 7).to(dtype)
    y.backward(grad)
    assert x.grad.dtype == dtype
    assert error(x.grad, grad.double() @ weight) <= (4e-6 if dtype == torch.float32 else 1.1 * step)


def test_torchs_int8_product_takes_part(generator, monkeypatch):
    """bfloat16 rows that are few and whole vectors wide go through it, nothing else does."""
    monkeypatch.setenv("NEMOTRON_H_KERNELS", "0")
    calls = []
    inner = torch._weight_int8pack_mm
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda x, q, ones: calls.append(x.shape) or inner(x, q, ones))
    for in_features, rows, dtype in [(64, 2, torch.bfloat16), (64, 2, torch.float32), (64, 40, torch.bfloat16),
                                     (20, 2, torch.bfloat16), (100, 2, torch.bfloat16)]:  # fmt: skip
        q, scale = ops.quantize_weight(random(generator, 7, in_features), 8)
        ops.quantized_linear(random(generator, rows, in_features).to(dtype), q, scale, None, 8)
    assert calls == [(2, 64)]


@pytest.mark.parametrize("bits", BITS)
def test_the_weight_is_not_kept_for_the_backward(bits, generator):
    """What autograd holds on to is the integers themselves, and no copy of anything the size of the weight."""
    q, scale = ops.quantize_weight(random(generator, 64, 128), bits)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.quantized_linear(random(generator, 2, 128).requires_grad_(), q, scale, None, bits)
    assert {t.data_ptr() for t in kept} == {q.data_ptr(), scale.data_ptr()}


@pytest.mark.parametrize("bits", BITS)
def test_autocast(bits, generator):
    """As a linear layer: the input is rounded to bfloat16. What is inside is not rounded once more, forward or back."""
    q, scale = ops.quantize_weight(random(generator, 7, 64), bits)
    x, grad = random(generator, 40, 64).float().requires_grad_(), random(generator, 40, 7).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.quantized_linear(x, q, scale, None, bits)
        y.backward(grad)
    rounded = x.detach().bfloat16().requires_grad_()
    expected = ops.quantized_linear(rounded, q, scale, None, bits)
    expected.backward(grad)
    assert torch.equal(y, expected)
    assert x.grad.dtype == torch.float32 and torch.equal(x.grad, rounded.grad.float())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("instructions", [False, True])
def test_half_precision_with_and_without_instructions(instructions, dtype, bits, generator, monkeypatch):
    """Without them the weight is not rounded to half precision; sums over many tiles are never rounded in between."""
    monkeypatch.setenv("NEMOTRON_H_KERNELS", "0")
    monkeypatch.setattr(conditions, "multiplies", lambda dtype: instructions)
    monkeypatch.setitem(packed_weights._TILE, "cpu", 1)
    q, scale = ops.quantize_weight(random(generator, 300, 40), bits)
    weight = by_hand(q, scale, bits, 40)
    x, grad = random(generator, 20, 40).to(dtype).requires_grad_(), random(generator, 20, 300).to(dtype)
    y = ops.quantized_linear(x, q, scale, None, bits)
    y.backward(grad)
    step = torch.finfo(dtype).eps
    for actual, expected in ((y, x.detach().double() @ weight.T), (x.grad, grad.double() @ weight)):
        assert error(actual, expected) <= 1.1 * step
        if not instructions or dtype == torch.float16:
            relative = (actual.double() - expected).abs() / (expected.abs() + 1e-3 * expected.abs().max())
            assert relative.max() <= 0.51 * step


def test_few_rows_in_int8_do_not_round_the_scale(generator, monkeypatch):
    """One input per output, its product a power of two times x: nothing but the last rounding is left."""
    monkeypatch.setenv("NEMOTRON_H_KERNELS", "0")
    q = torch.zeros(16, 32, dtype=torch.int8)
    q[torch.arange(16), torch.arange(16)] = 64
    scale, x = torch.rand(16, generator=generator) + 1, random(generator, 3, 32).bfloat16()
    expected = (x[:, :16].double() * 64 * scale.double()).bfloat16()
    assert torch.equal(ops.quantized_linear(x, q, scale, None, 8), expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("experts", [[2, 0, 2, 2, 4, 0], [1, 1, 1], [3], []])
def test_experts(bits, experts, generator):
    """Rows in any order, some experts chosen often and some never; output and gradient."""
    weight = random(generator, 5, 7, 100)
    q, scale = ops.quantize_weight(weight, bits)
    exact = torch.stack([by_hand(q[e], scale[e], bits, 100) for e in range(5)])
    # an expert that nobody chose is not read
    for expert in set(range(5)) - set(experts):
        scale[expert] = torch.nan
    expert_S = torch.tensor(experts, dtype=torch.long)
    assert_same(
        lambda x: ops.quantized_experts_linear(x, q, scale, expert_S),
        lambda x: torch.einsum("sk,snk->sn", x, exact[expert_S]),
        (random(generator, len(experts), 100),),
        1e-12,
    )


def test_experts_one_at_a_time(generator, monkeypatch):
    """A token's experts are dequantised one after the other, and only they."""
    q, scale = ops.quantize_weight(random(generator, 6, 7, 64), 4)
    seen = []
    inner = quantized._dequantize_rows
    monkeypatch.setattr(quantized, "_dequantize_rows", lambda q, *rest: seen.append(q.data_ptr()) or inner(q, *rest))
    ops.quantized_experts_linear(random(generator, 3, 64), q, scale, torch.tensor([5, 1, 5]))
    assert seen == [q[1].data_ptr(), q[5].data_ptr()]

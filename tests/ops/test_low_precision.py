"""FP8 and NVFP4 against rational arithmetic: values, rounding, packing; and the products that use them."""

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from nemotron_h.ops import fp8_nvfp4 as low_precision
from nemotron_h.ops import low_precision_experts_linear, low_precision_linear
from nemotron_h.ops import packed as packed_weights
from nemotron_h.ops.fp8_nvfp4 import dequantize_fp8, dequantize_nvfp4, quantize_fp8, quantize_nvfp4

# Significant bits and the exponent of the smallest normal number.
FORMATS = {torch.bfloat16: (8, -126), torch.float16: (11, -14), torch.float32: (24, -126), torch.float64: (53, -1022)}
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def e4m3(byte: int) -> Fraction | None:
    """From the format's definition: bias 7, no infinities, NaN where all seven bits are set."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return None
    value = Fraction(mantissa, 8) * Fraction(2) ** -6
    if exponent:
        value = (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)
    return -value if sign else value


def e2m1(code: int) -> Fraction:
    return Fraction(E2M1[code & 7]) * (-1 if code & 8 else 1)


def nearest(value: Fraction, dtype: torch.dtype) -> float:
    """Rounded once, ties to even, in rational arithmetic."""
    bits, smallest = FORMATS[dtype]
    if value == 0:
        return 0.0
    exponent = 0
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    step = Fraction(2) ** (max(exponent, smallest) - bits + 1)
    return float(round(value / step) * step)  # round() of a Fraction: ties to even


def scales(count: int) -> list[float]:
    generator = torch.Generator().manual_seed(3)
    return (torch.rand(count, generator=generator) * 0.01 + 1e-4).tolist()


ALL = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", FORMATS)
def test_fp8_is_exact_and_rounded_once(dtype):
    for scale in [1.0, 1e-38, *scales(10)]:
        q = ALL.view(torch.float8_e4m3fn).view(4, 64)
        got = dequantize_fp8(q, torch.tensor(scale), dtype).flatten().tolist()
        exact = [e4m3(byte) for byte in range(256)]
        stored = Fraction(torch.tensor(scale).item())
        for value, expected in zip(got, exact, strict=True):
            if expected is None:
                assert value != value
            else:
                assert value == nearest(expected * stored, dtype)


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("dtype", FORMATS)
def test_nvfp4_is_exact_and_rounded_once(dtype, table, monkeypatch):
    """Every byte with every scale of a block; the low four bits are the even input."""
    if not table:
        monkeypatch.setattr(low_precision, "_TABLE_PAYS", 1 << 40)
    else:
        monkeypatch.setattr(low_precision, "_TABLE_PAYS", 0)
    scale = torch.tensor(scales(1)[0])
    bytes_ = torch.arange(256, dtype=torch.uint8).view(32, 8)  # 32 blocks of 16 inputs
    q = bytes_.repeat(256, 1).view(256, 256)
    blocks = ALL.view(256, 1).expand(256, 32).contiguous().view(torch.float8_e4m3fn)
    got = dequantize_nvfp4(q, blocks, scale, dtype)
    assert got.shape == (256, 512) and got.dtype == dtype
    stored = Fraction(scale.item())
    for byte in [0, 1, 8, 119, 127, 200]:
        block = e4m3(byte)
        for column in range(512):
            code = (column // 2) & 15 if column % 2 == 0 else (column // 2) >> 4
            value = got[byte, column].item()
            if block is None:
                assert value != value
            else:
                assert value == nearest(e2m1(code) * block * stored, dtype), (byte, column)


def test_rounding_twice_would_show():
    """The numbers above are such that going by way of float32 gives others, in places."""
    exact = torch.tensor([1 + 2**-8 + 2**-30, -(1 + 3 * 2**-8 - 2**-30), 1 + 2**-8, 2.0**-126 * (1 - 2**-9)])
    exact = exact.double() + torch.tensor([2.0**-30, 2.0**-30, 0, 0], dtype=torch.float64)
    ours = low_precision._round_once(exact, torch.bfloat16).tolist()
    assert ours == [nearest(Fraction(value), torch.bfloat16) for value in exact.tolist()]
    assert ours != exact.to(torch.bfloat16).tolist()


def test_one_scale_for_each_matrix_of_a_stack():
    q = torch.randint(0, 120, (3, 4, 8), dtype=torch.uint8)
    blocks = torch.randint(8, 120, (3, 4, 1), dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.tensor([0.5, 1.0, 3.0])
    one = dequantize_nvfp4(q[2], blocks[2], scale[2], torch.float64)
    assert torch.equal(dequantize_nvfp4(q, blocks, scale[:, None], torch.float64)[2], one)
    f8 = q.view(torch.float8_e4m3fn)
    assert torch.equal(dequantize_fp8(f8, scale, torch.float64)[1], dequantize_fp8(f8[1], scale[1], torch.float64))


def test_fp8_takes_the_nearest():
    weight = torch.randn(9, 33, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    q, scale = quantize_fp8(weight)
    assert scale.item() == (weight.abs().max() / 448).item() and scale.shape == ()
    values = torch.tensor([float(v) for v in map(e4m3, range(256)) if v is not None], dtype=torch.float64)
    error = (weight.double()[..., None] / scale.double() - values).abs().amin(-1)
    found = (weight.double() / scale.double() - q.double()).abs()
    assert (found <= error * (1 + 1e-5) + 1e-12).all()
    assert q.float().abs().max() == 448 and not q[2].float().any()


def test_nvfp4_takes_the_nearest():
    weight = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    weight[1, 16:32] = 0
    q, blocks, scale = quantize_nvfp4(weight)
    assert scale.item() == pytest.approx(weight.abs().max().item() / 448 / 6, rel=1e-6)
    e4m3s = torch.tensor([float(v) for v in map(e4m3, range(127))], dtype=torch.float64)
    for n in range(5):
        for block in range(3):
            part = weight[n, 16 * block : 16 * block + 16].double()
            wanted = part.abs().max() / 6 / scale.double()
            step = blocks[n, block].double()
            if part.any():
                assert (step - wanted).abs() <= (e4m3s - wanted).abs().min() + 1e-9
            for i, w in enumerate(part.tolist()):
                byte = int(q[n, 8 * block + i // 2])
                code = byte & 15 if i % 2 == 0 else byte >> 4
                distance = [abs(w - float(e2m1(c)) * float(step) * scale.item()) for c in range(16)]
                assert distance[code] <= min(distance) + 1e-9
    assert not dequantize_nvfp4(q, blocks, scale, torch.float32)[1, 16:32].any()


def test_nvfp4_in_the_middle_of_two_takes_the_even_code():
    row = [6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, 0.0]
    q, blocks, scale = quantize_nvfp4(torch.tensor([row]), peak=6.0 * 448)  # scales of 1
    assert blocks.float().item() == 1 and scale.item() == 1
    expected = [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0, 0.0]
    assert dequantize_nvfp4(q, blocks, scale, torch.float64)[0].tolist() == expected


@pytest.mark.parametrize("quantise", [quantize_fp8, quantize_nvfp4])
def test_what_cannot_be_quantised(quantise):
    for bad in (torch.nan, torch.inf, -torch.inf):
        weight = torch.ones(2, 16)
        weight[1, 3] = bad
        with pytest.raises(ValueError, match=r"shape \(2, 16\) has values that are NaN or infinite"):
            quantise(weight)
    zero = quantise(torch.zeros(2, 16))
    assert not low_precision_linear(torch.ones(1, 16), zero).any()
    with pytest.raises(ValueError, match="20 inputs has no NVFP4 form"):
        quantize_nvfp4(torch.ones(2, 20))


def packed(how: str, n: int, k: int, seed: int = 0):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return (quantize_fp8 if how == "fp8" else quantize_nvfp4)(weight)


def plain(parts, dtype):
    return dequantize_fp8(*parts, dtype) if len(parts) == 2 else dequantize_nvfp4(*parts, dtype)


@pytest.mark.parametrize("tile", [None, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["fp8", "nvfp4"])
def test_product_is_that_of_the_plain_weight(how, dtype, tile, monkeypatch):
    if tile:
        monkeypatch.setitem(packed_weights._TILE, "cpu", tile)
    parts, bias = packed(how, 37, 48), torch.randn(37).to(dtype)
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    y = low_precision_linear(x, parts, bias)
    twin = x.detach().double().requires_grad_()
    expected = F.linear(twin, plain(parts, dtype).double(), bias.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert y.dtype == dtype and y.shape == (2, 5, 37)
    torch.testing.assert_close(y.double(), expected, atol=tolerance * 10, rtol=tolerance)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    y.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(x.grad.double(), twin.grad, atol=tolerance * 10, rtol=tolerance)
    with torch.no_grad():
        assert torch.equal(low_precision_linear(x, parts, bias), y)


@pytest.mark.parametrize("how", ["fp8", "nvfp4"])
def test_experts(how):
    each = [packed(how, 8, 16, seed) for seed in range(4)]
    parts = tuple(torch.stack(part) for part in zip(*each, strict=True))
    x, expert = torch.randn(6, 16).double(), torch.tensor([0, 0, 1, 3, 3, 3])
    expected = torch.stack([plain(each[e], torch.float64) @ row for row, e in zip(x, expert.tolist(), strict=True)])
    torch.testing.assert_close(low_precision_experts_linear(x, parts, expert), expected)
    assert low_precision_experts_linear(x[:0], parts, expert[:0]).shape == (0, 8)


def test_autocast_and_width():
    parts = packed("nvfp4", 8, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert low_precision_linear(torch.ones(1, 32), parts).dtype == torch.bfloat16
    for wrong in (parts, packed("fp8", 8, 32)):
        with pytest.raises(ValueError, match=r"has 31 features and the (NVFP4|FP8) weight takes another number"):
            low_precision_linear(torch.ones(1, 31), wrong)

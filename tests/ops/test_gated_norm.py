"""nemotron_h/ops/norms.py."""

from __future__ import annotations

import functools

import pytest
import torch
from comparing import assert_same, error, outputs_and_gradients, random

from nemotron_h import ops
from nemotron_h.ops import reference


class TestRMSNorm:
    @pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
    def test_matches_the_reference_with_gradients(self, generator, dtype, tolerance):
        inputs = [3 * random(generator, 2, 5, 16, dtype=dtype), random(generator, 16, dtype=dtype)]
        assert_same(ops.rms_norm, reference.rms_norm, inputs, tolerance, 10 * tolerance, eps=1e-5)

    @pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
    def test_bfloat16_is_rounded_once_after_the_weight(self, generator, weight_dtype):
        x, weight = random(generator, 64, 48, dtype=torch.bfloat16), random(generator, 48, dtype=weight_dtype)
        y = ops.rms_norm(x, weight, 1e-5)
        exact = reference.rms_norm(x.double(), weight.double(), 1e-5)
        assert y.dtype == torch.bfloat16
        # Rounding before the weight, as Llama does, would differ from this in a quarter of the values.
        assert (y == exact.bfloat16()).double().mean() > 0.999

    def test_float16_squares_do_not_overflow(self):
        assert torch.equal(ops.rms_norm(torch.full((1, 4), 300.0).half(), torch.ones(4), 0.0), torch.ones(1, 4).half())


@pytest.mark.parametrize("shape", [(1, 1), (3, 29), (150,), (0, 4)])
def test_many_rows_without_gradient(generator, shape):
    y, z, weight = random(generator, *shape, 16), random(generator, *shape, 16), random(generator, 16)
    with torch.no_grad():
        assert error(ops.rms_norm(y, weight, 1e-5), reference.rms_norm(y, weight, 1e-5)) < 1e-14
        gated = ops.gated_rms_norm(y, z, weight, 1e-5, 2)
        assert error(gated, reference.gated_rms_norm(y, z, weight, 1e-5, 2)) < 1e-14
        assert torch.equal(ops.gated_rms_norm(y.mT.contiguous().mT, z, weight, 1e-5, 2), gated)


class TestGatedRMSNorm:
    @pytest.mark.parametrize("groups", [1, 2, 8, 16])
    @pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
    def test_matches_the_reference_with_gradients(self, generator, groups, dtype, tolerance):
        y, z = (random(generator, 2, 5, 16, dtype=dtype) for _ in range(2))
        # Groups of very different size, so that a norm over the wrong elements shows.
        y = y * torch.logspace(-2, 2, 16, dtype=dtype)
        norm, expected = (
            functools.partial(f, eps=1e-5, n_groups=groups) for f in (ops.gated_rms_norm, reference.gated_rms_norm)
        )
        assert_same(norm, expected, [y, z, random(generator, 16, dtype=dtype)], tolerance, 100 * tolerance)

    def test_bfloat16_is_rounded_once(self, generator):
        y, z = (random(generator, 64, 48, dtype=torch.bfloat16) for _ in range(2))
        weight = random(generator, 48, dtype=torch.bfloat16)
        out = ops.gated_rms_norm(y, z, weight, 1e-5, 4)
        exact = reference.gated_rms_norm(y.double(), z.double(), weight.double(), 1e-5, 4)
        assert out.dtype == torch.bfloat16 and (out == exact.bfloat16()).double().mean() > 0.999

    def test_any_number_of_leading_dimensions(self, generator):
        y, z, weight = random(generator, 3, 16), random(generator, 3, 16), random(generator, 16)
        flat = ops.gated_rms_norm(y, z, weight, 1e-5, 2)
        assert torch.equal(ops.gated_rms_norm(y[:, None, None], z[:, None, None], weight, 1e-5, 2)[:, 0, 0], flat)

    def test_autocast_changes_nothing(self, generator):
        inputs = [random(generator, 3, 16, dtype=torch.float32) for _ in range(2)] + [torch.ones(16)]
        norm = functools.partial(ops.gated_rms_norm, eps=1e-5, n_groups=2)
        outputs, gradients, weights = outputs_and_gradients(norm, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            cast, cast_gradients, _ = outputs_and_gradients(norm, inputs, weights)
        assert all(torch.equal(a, b) for a, b in zip(outputs + gradients, cast + cast_gradients, strict=True))

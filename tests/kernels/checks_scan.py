"""ops.ssd by mamba-ssm's chunked kernels, against ops/reference.py: outputs, states and gradients."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from comparing import outputs_and_gradients, random
from real_packages import DEVICE
from torch.nn import functional as F

from nemotron_h import ops
from nemotron_h.ops import cuda_kernels as backends
from nemotron_h.ops import reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CHUNK = 16
TOLERANCE = {F32: 1e-6, F16: 2e-3, BF16: 1e-2}


@pytest.fixture(autouse=True)
def short_chunks_and_float32(monkeypatch):
    """Their chunks are 256 long, and float32 is not given to them on a GPU, where they would multiply in TF32."""
    monkeypatch.setattr(backends, "_KERNEL_CHUNK_SIZE", CHUNK)
    if DEVICE == "cpu":
        scan = backends._KERNELS["ssd"]
        monkeypatch.setitem(backends._KERNELS, "ssd", dataclasses.replace(scan, dtypes=(F32, BF16, F16)))


def scan_inputs(generator, dtype, batch, length, heads, head_dim, groups, state):
    draw = functools.partial(random, generator)
    x, b, c = (
        draw(batch, length, heads, head_dim),
        draw(batch, length, groups, state),
        draw(batch, length, groups, state),
    )
    dt, A = F.softplus(draw(batch, length, heads) - 2), -draw(heads).exp()
    inputs = [x.to(dtype), dt.float(), A.float(), (b / state**0.5).to(dtype), c.to(dtype), draw(heads).float()]
    return [t.to(DEVICE) for t in inputs]


def documents(batch, length, generator):
    """Of length 1 and longer, with a border at a chunk's where there is one, and numbers that come back."""
    starts = torch.rand(batch, length, generator=generator) < 0.2
    starts[:, CHUNK : CHUNK + 1] = True
    return (starts.cumsum(1) % 3).to(DEVICE)


def options(generator, case, batch, length, heads, head_dim, state):
    found = {}
    if "state" in case:
        found["initial_state_BHPN"] = random(generator, batch, heads, head_dim, state, dtype=F32).to(DEVICE)
    if "packed" in case:
        found["seq_idx_BL"] = documents(batch, length, generator)
    return found


def check(generator, calls, dtype, case, sizes, gradients=True):
    batch, length, heads, head_dim, _, state = sizes
    if dtype == F32 and DEVICE != "cpu":
        pytest.skip("float32 is not given to the kernel")
    inputs = scan_inputs(generator, dtype, *sizes)
    kwargs = options(generator, case, batch, length, heads, head_dim, state)
    if "state" in case:  # an input, whose gradient is compared as well
        inputs.append(kwargs.pop("initial_state_BHPN"))

    def by(function):
        def call(x, dt, A, B, C, D, *state):
            return function(x, dt, A, B, C, D, initial_state_BHPN=state[0] if state else None, **kwargs)

        return call

    exact = [t.double() for t in inputs]
    if gradients:
        expected, expected_gradients, weights = outputs_and_gradients(by(reference.ssd), exact)
        actual, actual_gradients, _ = outputs_and_gradients(by(ops.ssd), inputs, weights)
        pairs = [*zip(actual, expected, strict=True), *zip(actual_gradients, expected_gradients, strict=True)]
    else:
        pairs = zip(by(ops.ssd)(*inputs), by(reference.ssd)(*exact), strict=True)
    differences = [((a.double() - e).norm() / e.norm()).item() for a, e in pairs]
    assert max(differences) <= TOLERANCE[dtype], differences
    assert calls["mamba_chunk_scan_combined"] == 1


@pytest.mark.parametrize(
    "dtype, case, gradients",
    [
        (F32, "state and packed", True),
        (F32, "packed", False),
        (BF16, "state and packed", False),
        (BF16, "plain", False),
    ],
)
def test_the_published_head(generator, calls, dtype, case, gradients):
    check(generator, calls, dtype, case, (1, CHUNK + 1, 2, 80, 2, 128), gradients)


def test_the_published_groups(generator, calls):
    check(generator, calls, F32, "state and packed", (1, 3, 8, 80, 8, 128), gradients=False)


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_lengths(generator, calls, length):
    check(generator, calls, F32, "state and packed", (1, length, 2, 16, 1, 32))


@pytest.mark.parametrize("dtype, case", [(F32, "state"), (F32, "packed"), (BF16, "plain"), (F16, "packed")])
def test_gradients(generator, calls, dtype, case):
    check(generator, calls, dtype, case, (1, CHUNK + 3, 4, 16, 2, 32))


@torch.no_grad()
def test_tiny_time_steps(generator, calls):
    inputs = scan_inputs(generator, F32 if DEVICE == "cpu" else BF16, 1, CHUNK + 1, 2, 16, 1, 32)
    inputs[1] = F.softplus(inputs[1] - 12)
    inputs[5] = torch.zeros_like(inputs[5])  # D x would hide what the state gives
    for actual, expected in zip(ops.ssd(*inputs), reference.ssd(*(t.double() for t in inputs)), strict=True):
        assert (actual.double() - expected).norm() / expected.norm() <= TOLERANCE[inputs[0].dtype]

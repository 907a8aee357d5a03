"""ops.ssd_step and ops.mamba_step by mamba-ssm's one-token kernel and causal-conv1d's update, against ops/reference.py,
and the convolution of many tokens by causal-conv1d's forward."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from comparing import error, outputs_and_gradients, random
from real_packages import DEVICE

from nemotron_h import ops
from nemotron_h.ops import reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {F32: 1e-6, F16: 2e-3, BF16: 1e-2}
NO_LIMIT = (0.0, math.inf)
EPS = 1e-5
PUBLISHED = (1, 8, 80, 8, 128)
SMALL = (3, 4, 8, 2, 16)


def step_inputs(generator, dtype, sizes, state_dtype=F32, *, kernel=4, bias=True, dt_bias=(-12.0, 1.0)):
    batch, heads, head_dim, groups, state = sizes
    inner, draw = heads * head_dim, functools.partial(random, generator)
    channels = inner + 2 * groups * state
    inputs = {
        "projected": draw(batch, 1, inner + channels + heads, dtype=dtype),
        "window_BCW": draw(batch, channels, kernel - 1, dtype=dtype),
        "state_BHPN": draw(batch, heads, head_dim, state, dtype=state_dtype),
        "conv_weight_CK": draw(channels, kernel, dtype=dtype) / kernel,
        "conv_bias_C": draw(channels, dtype=dtype) if bias else None,
        "dt_bias_H": torch.linspace(*dt_bias, heads),
        "A_log_H": torch.linspace(-2, 2, heads),
        "D_H": draw(heads, dtype=F32),
        "norm_weight_I": draw(inner, dtype=dtype),
    }
    return {name: None if t is None else t.to(DEVICE) for name, t in inputs.items()}


def by_reference(inputs, groups, limit=NO_LIMIT, mask=None):
    """y, the window and the state after one token, in float64."""
    t = {name: None if t is None else t.double() for name, t in inputs.items()}
    batch, heads, head_dim, state = t["state_BHPN"].shape
    inner, gn = heads * head_dim, groups * state
    z, xBC, raw = t["projected"].split([inner, inner + 2 * gn, heads], dim=-1)
    xBC, window = reference.causal_conv(
        xBC, t["conv_weight_CK"], t["conv_bias_C"], window_BCW=t["window_BCW"], mask_BL=mask
    )
    x, B, C = xBC[:, 0].split([inner, gn, gn], dim=-1)
    y, state_BHPN = reference.ssd_step(
        x.view(batch, heads, head_dim),
        reference.time_step(raw, t["dt_bias_H"], limit, mask)[:, 0],
        -t["A_log_H"].exp(),
        B.view(batch, groups, state),
        C.view(batch, groups, state),
        t["D_H"],
        t["state_BHPN"],
    )
    y = reference.gated_rms_norm(y.reshape(batch, 1, inner), z, t["norm_weight_I"], EPS, groups)
    return y, window, state_BHPN


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@torch.no_grad()
def step(inputs, groups, limit=NO_LIMIT, **mask):
    return ops.mamba_step(**inputs, groups=groups, activation="silu", time_step_limit=limit, eps=EPS, **mask)


@pytest.mark.parametrize(
    "sizes, dtype, state_dtype",
    [(PUBLISHED, F32, F32), (PUBLISHED, BF16, F32), (SMALL, BF16, BF16), (SMALL, F32, BF16), (SMALL, F16, F16)],
)
def test_one_token_in_one_call(generator, calls, sizes, dtype, state_dtype):
    inputs = step_inputs(generator, dtype, sizes, state_dtype)
    y, window, state = by_reference(inputs, sizes[3])
    held = inputs["window_BCW"], inputs["state_BHPN"]
    addresses = [t.data_ptr() for t in held]
    actual = step(inputs, sizes[3])
    assert actual.dtype == dtype and relative(actual, y) <= (1e-2 if dtype != F32 else 1e-6)
    assert torch.equal(held[0].double(), window)
    assert relative(held[1], state) <= max(TOLERANCE[dtype], TOLERANCE[state_dtype])
    assert [t.data_ptr() for t in held] == addresses and held[1].dtype == state_dtype
    assert calls == {"selective_state_update": 1, "causal_conv1d_update": 1}


@pytest.mark.parametrize("dt_bias", [-3.0, -7.0, -12.0])
def test_tiny_time_steps(generator, dt_bias):
    """What a state is made of by tiny steps alone; log(1 + exp(.)) in float32 is 5e-3 off at -12."""
    inputs = step_inputs(generator, F32, SMALL, dt_bias=(dt_bias, dt_bias))
    inputs["state_BHPN"].zero_()
    _, _, state = by_reference(inputs, 2)
    step(inputs, 2)
    assert relative(inputs["state_BHPN"], state) <= 1e-6


@pytest.mark.parametrize("limit", [NO_LIMIT, (0.01, 0.1), (0.0, 0.05)])
@pytest.mark.parametrize("kernel, bias", [(4, True), (2, False), (3, True)])
def test_limits_and_kernels(generator, calls, limit, kernel, bias):
    inputs = step_inputs(generator, F32, SMALL, kernel=kernel, bias=bias)
    y, window, state = by_reference(inputs, 2, limit)
    assert relative(step(inputs, 2, limit), y) <= 2e-6
    assert torch.equal(inputs["window_BCW"].double(), window) and relative(inputs["state_BHPN"], state) <= 1e-6
    assert calls["causal_conv1d_update"] == 1


def test_pads_leave_their_rows_alone(generator):
    inputs = step_inputs(generator, F32, SMALL)
    mask = torch.tensor([[True], [False], [True]], device=DEVICE)
    before = inputs["window_BCW"].clone(), inputs["state_BHPN"].clone()
    y, window, state = by_reference(inputs, 2, mask=mask)
    actual = step(inputs, 2, mask_BL=mask)
    assert relative(actual, y) <= 2e-6 and not actual[1].any()
    assert torch.equal(inputs["window_BCW"].double(), window) and relative(inputs["state_BHPN"], state) <= 1e-6
    for held, old in zip((inputs["window_BCW"], inputs["state_BHPN"]), before, strict=True):
        assert torch.equal(held[1], old[1])


def test_a_convolution_that_they_do_not_have(generator, calls):
    """Taps and activations that causal-conv1d has no kernel for: the state moves on in place all the same."""
    inputs = step_inputs(generator, F32, SMALL, kernel=5)
    y, window, state = by_reference(inputs, 2)
    assert relative(step(inputs, 2), y) <= 2e-6
    assert torch.equal(inputs["window_BCW"].double(), window) and relative(inputs["state_BHPN"], state) <= 1e-6
    assert calls == {"selective_state_update": 1}


@pytest.mark.parametrize("what", ["parameter", "input", "state", "float64 state", "inference tensor"])
def test_nothing_is_written_where_it_may_be_needed(generator, calls, what):
    inputs = step_inputs(generator, F32, SMALL)
    if what == "float64 state":
        inputs["state_BHPN"] = inputs["state_BHPN"].double()
    elif what == "inference tensor":
        with torch.inference_mode():
            inputs["state_BHPN"] = inputs["state_BHPN"].clone()
    else:
        inputs[{"parameter": "A_log_H", "input": "projected", "state": "state_BHPN"}[what]].requires_grad_()
    before = {name: t.detach().clone() for name, t in inputs.items()}
    with torch.set_grad_enabled(what in ("parameter", "input", "state")):
        y = ops.mamba_step(**inputs, groups=2, activation="silu", time_step_limit=NO_LIMIT, eps=EPS)
    assert y is None and not calls
    assert all(torch.equal(inputs[name], t) for name, t in before.items())


@pytest.mark.parametrize(
    "sizes, dtype", [(PUBLISHED, F32), (SMALL, F32), (SMALL, BF16), (SMALL, F16), ((1, 4, 64, 1, 256), BF16)]
)
def test_ssd_step(generator, calls, sizes, dtype):
    batch, heads, head_dim, groups, state = sizes
    draw = functools.partial(random, generator)
    x, B, C = draw(batch, heads, head_dim), draw(batch, groups, state), draw(batch, groups, state)
    dt, A = ops.time_step(draw(batch, heads), torch.linspace(-12, 1, heads), NO_LIMIT), -draw(heads).exp()
    inputs = [x.to(dtype), dt.float(), A.float(), B.to(dtype), C.to(dtype), draw(heads).float()]
    inputs = [t.to(DEVICE) for t in (*inputs, draw(batch, heads, head_dim, state).float())]
    before = inputs[-1].clone()
    expected = reference.ssd_step(*(t.double() for t in inputs))
    with torch.no_grad():
        y, after = ops.ssd_step(*inputs)
    assert relative(y, expected[0]) <= TOLERANCE[dtype] and relative(after, expected[1]) <= 1e-6
    assert torch.equal(inputs[-1], before) and after.dtype == F32 and calls == {"selective_state_update": 1}


# ---- the convolution of many tokens


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("length", [1, 3, 37])
@pytest.mark.parametrize("case", ["plain", "window", "masked", "packed", "masked and packed"])
def test_convolution(generator, calls, case, length, dtype):
    batch, channels, kernel = 2, 24, 4
    draw = functools.partial(random, generator, dtype=dtype)
    kwargs = {
        "window_BCW": None if case == "plain" else draw(batch, channels, kernel - 1).to(DEVICE),
        "mask_BL": (torch.rand(batch, length, generator=generator) > 0.3).to(DEVICE) if "masked" in case else None,
        "seq_idx_BL": torch.randint(0, 2, (batch, length), generator=generator).to(DEVICE) if "pack" in case else None,
    }
    inputs = [t.to(DEVICE) for t in (draw(batch, length, channels), draw(channels, kernel) / 2, draw(channels))]
    exact = {name: t.double() if name == "window_BCW" and t is not None else t for name, t in kwargs.items()}
    expected, expected_gradients, weights = outputs_and_gradients(
        functools.partial(reference.causal_conv, **exact), [t.double() for t in inputs]
    )
    actual, gradients, _ = outputs_and_gradients(functools.partial(ops.causal_conv, **kwargs), inputs, weights)
    for a, e in zip([*actual, *gradients], [*expected, *expected_gradients], strict=True):
        assert error(a, e) <= TOLERANCE[dtype]
    assert calls == {"causal_conv1d_fn": 1}

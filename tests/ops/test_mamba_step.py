"""nemotron_h/ops/mamba_step.py: one call against the four operations it stands for, and against their references."""

from __future__ import annotations

import math

import pytest
import torch
from comparing import error, random
from torch import Tensor

from nemotron_h import ops
from nemotron_h.ops import native, reference

NO_LIMIT = (0.0, math.inf)
EPS = 1e-5
NAMES = (
    "projected",
    "window_BCW",
    "state_BHPN",
    "conv_weight_CK",
    "conv_bias_C",
    "dt_bias_H",
    "A_log_H",
    "D_H",
    "norm_weight_I",
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


@pytest.fixture
def with_native(monkeypatch):
    monkeypatch.delenv(native.ENVIRONMENT_VARIABLE, raising=False)
    if native.library() is None:
        pytest.skip(native.reason())


def step_inputs(
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 2,
    heads: int = 6,
    head_dim: int = 5,
    groups: int = 2,
    state: int = 7,
    kernel: int = 4,
    bias: bool = True,
    dt_bias: tuple[float, float] = (-12.0, 1.0),
) -> dict[str, Tensor | None]:
    """Steps tiny (dt_bias -12) to large, decays weak to strong."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inner = heads * head_dim
    channels = inner + 2 * groups * state
    return {
        "projected": random(generator, batch, inner + channels + heads, dtype=dtype),
        "window_BCW": random(generator, batch, channels, kernel - 1, dtype=dtype),
        "state_BHPN": random(generator, batch, heads, head_dim, state, dtype=wide),
        "conv_weight_CK": random(generator, channels, kernel, dtype=dtype),
        "conv_bias_C": random(generator, channels, dtype=dtype) if bias else None,
        "dt_bias_H": torch.linspace(*dt_bias, heads, dtype=wide),
        "A_log_H": torch.linspace(-2, 4, heads, dtype=wide)[torch.randperm(heads, generator=generator)],
        "D_H": random(generator, heads, dtype=wide),
        "norm_weight_I": random(generator, inner, dtype=dtype),
    }


def copies(tensors: dict[str, Tensor | None], dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
    return {name: None if t is None else t.detach().to(dtype, copy=True) for name, t in tensors.items()}


def four_operations(by, t: dict, groups: int, limit: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """y, window and state as `by` (ops or reference) computes them, rounded where the dtype of the inputs rounds."""
    batch, heads, head_dim, state = t["state_BHPN"].shape
    inner, gn = heads * head_dim, groups * state
    z_BI, xBC_BC, raw_BH = t["projected"].split([inner, inner + 2 * gn, heads], dim=-1)
    xBC_B1C, window = by.causal_conv(
        xBC_BC[:, None], t["conv_weight_CK"], t["conv_bias_C"], window_BCW=t["window_BCW"], activation="silu"
    )
    x_BI, B_BS, C_BS = xBC_B1C[:, 0].split([inner, gn, gn], dim=-1)
    dt_BH = by.time_step(raw_BH, t["dt_bias_H"], limit)
    y_BHP, state_BHPN = by.ssd_step(
        x_BI.view(batch, heads, head_dim),
        dt_BH,
        -torch.exp(t["A_log_H"]),
        B_BS.view(batch, groups, state),
        C_BS.view(batch, groups, state),
        t["D_H"],
        t["state_BHPN"],
    )
    y_BI = by.gated_rms_norm(y_BHP.reshape(batch, inner), z_BI, t["norm_weight_I"], EPS, groups)
    return y_BI, window, state_BHPN


def step(t: dict, groups: int, limit: tuple[float, float] = NO_LIMIT, activation: object = "silu") -> Tensor | None:
    """Of one token: `projected` (B, K) and y (B, I)."""
    t = t | {"projected": t["projected"].unsqueeze(1)}
    y_BLI = ops.mamba_step(**t, groups=groups, activation=activation, time_step_limit=limit, eps=EPS)
    return None if y_BLI is None else y_BLI.squeeze(1)


def assert_right(t: dict, groups: int, limit: tuple[float, float] = NO_LIMIT) -> None:
    """Against float64 references, and against the four operations in the same dtype; the state moves on in place."""
    dtype = t["projected"].dtype
    exact = four_operations(reference, copies(t, torch.float64), groups, limit)
    same = four_operations(ops, copies(t), groups, limit)
    given = copies(t)
    y = step(given, groups, limit)
    assert y is not None and y.dtype == dtype and y.shape == exact[0].shape
    window, state = given["window_BCW"], given["state_BHPN"]
    for actual, expected, close in zip((y, window, state), exact, same, strict=True):
        assert actual.dtype == close.dtype
        assert error(actual, expected) <= TOLERANCE[dtype]
    # Rounded where the four are rounded, so nearer to them than to the reference.
    assert error(y, same[0]) <= (3e-6 if dtype == torch.float32 else 2**-8)
    assert error(state, same[2]) <= (1e-6 if dtype == torch.float32 else 2**-9)
    assert torch.equal(window[..., :-1], t["window_BCW"][..., 1:])  # moved on, bit for bit
    inner = y.shape[1]
    assert torch.equal(window[..., -1], t["projected"][:, inner : inner + window.shape[1]])
    for name in NAMES:
        if name not in ("window_BCW", "state_BHPN") and t[name] is not None:
            assert torch.equal(given[name], t[name]), name


@pytest.mark.core
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kernel", [2, 4])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_it_is_the_four_operations(generator, with_native, dtype, kernel, groups, bias):
    for limit in (NO_LIMIT, (0.05, 0.7)):
        for batch in (1, 3):
            t = step_inputs(generator, dtype, batch=batch, groups=groups, kernel=kernel, bias=bias)
            assert_right(t, groups, limit)


@pytest.mark.core
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kernel", [2, 4])
@pytest.mark.parametrize("state", [7, 8, 19])
def test_tokens_together_are_the_tokens_one_by_one(generator, with_native, dtype, kernel, state):
    """Bit for bit, whatever the split: what a speculation accepts is what plain decoding gives."""
    for length in (2, 3, 5, 8, 16):
        together = step_inputs(generator, dtype, kernel=kernel, state=state)
        width = together["projected"].shape[1]
        together["projected"] = random(generator, 2, length, width, dtype=dtype)
        apart, halves = copies(together), copies(together)
        kwargs = {"groups": 2, "activation": "silu", "time_step_limit": NO_LIMIT, "eps": EPS}
        y = ops.mamba_step(**together, **kwargs)
        ys = [
            ops.mamba_step(**apart | {"projected": part.contiguous()}, **kwargs)
            for part in apart["projected"].split(1, 1)
        ]
        parts = halves["projected"].split([length // 2, length - length // 2], 1)
        zs = [ops.mamba_step(**halves | {"projected": part.contiguous()}, **kwargs) for part in parts]
        assert torch.equal(y, torch.cat(ys, 1)) and torch.equal(y, torch.cat(zs, 1))
        for name in ("window_BCW", "state_BHPN"):
            assert torch.equal(together[name], apart[name]) and torch.equal(together[name], halves[name]), name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dt_bias", [(-30.0, -12.0), (-100.0, -90.0), (19.0, 21.5), (60.0, 100.0)], ids=str)
def test_tiny_and_huge_time_steps(generator, with_native, dtype, dt_bias):
    """Down to where exp underflows, both sides of where softplus(x) is x, up to where exp overflows."""
    t = step_inputs(generator, dtype, dt_bias=dt_bias)
    assert_right(t, 2)
    assert_right(t, 2, (1e-3, 5.0))


def test_the_smallest_steps_are_not_lost(generator, with_native):
    """A step of 6e-6 on an empty state, relative to what it should leave there."""
    t = step_inputs(generator, heads=2, groups=1, dt_bias=(-12.0, -12.0))
    t["state_BHPN"].zero_()
    expected = four_operations(reference, copies(t, torch.float64), 1, NO_LIMIT)[2]
    step(t, 1)
    assert 0 < expected.abs().max() < 1e-3 and error(t["state_BHPN"], expected) <= 1e-5


def test_a_limit_binds(generator, with_native):
    """Above and below, also where nothing else would show it."""
    t = step_inputs(generator)
    free = copies(t)
    step(free, 2)
    for limit in ((0.3, math.inf), (0.0, 0.01)):
        given = copies(t)
        step(given, 2, limit)
        assert error(given["state_BHPN"], free["state_BHPN"]) > 1e-2


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_large_gates_and_inputs(generator, with_native, dtype):
    """silu where its exponential overflows, and where all of it is 0."""
    t = step_inputs(generator, dtype)
    t["projected"][0] *= 200
    t["projected"][1, :30] = -torch.linspace(80, 120, 30).to(dtype)
    t["window_BCW"] *= 50
    assert_right(t, 2)


@pytest.mark.core
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_twenty_tokens(generator, with_native, dtype):
    """Errors do not pile up."""
    t = step_inputs(generator, dtype, state=16, dt_bias=(-7.0, 0.0))
    exact = copies(t, torch.float64)
    for _ in range(20):
        projected = random(generator, *t["projected"].shape, dtype=dtype)
        t["projected"], exact["projected"] = projected, projected.double()
        y = step(t, 2)
        expected, exact["window_BCW"], exact["state_BHPN"] = four_operations(reference, exact, 2, NO_LIMIT)
        assert error(y, expected) <= 1.5 * TOLERANCE[dtype]
    assert error(t["state_BHPN"], exact["state_BHPN"]) <= TOLERANCE[dtype]
    assert torch.equal(t["window_BCW"].double(), exact["window_BCW"])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_same_for_any_number_of_threads(generator, with_native, dtype):
    """At dims that are shared out."""
    t = step_inputs(generator, dtype, batch=3, heads=16, head_dim=32, groups=4, state=128)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            given = copies(t)
            results.append((step(given, 4), given["window_BCW"], given["state_BHPN"]))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    expected = four_operations(ops, copies(t), 4, NO_LIMIT)
    assert error(results[0][0], expected[0]) <= (3e-6 if dtype == torch.float32 else 2**-8)


def test_where_the_four_must_be_called(generator, with_native):
    """None, and nothing has changed."""
    double = torch.float64

    def with_(**changes):
        t = step_inputs(generator)
        return {**t, **{name: change(t[name]) for name, change in changes.items()}}

    bfloat16 = step_inputs(generator, torch.bfloat16)
    cases = {
        "float64": step_inputs(generator, double),
        "float16": step_inputs(generator, torch.float16),
        "bfloat16 state": {**bfloat16, "state_BHPN": bfloat16["state_BHPN"].bfloat16()},
        "bfloat16 D": {**bfloat16, "D_H": bfloat16["D_H"].bfloat16()},
        "bfloat16 A_log": {**bfloat16, "A_log_H": bfloat16["A_log_H"].bfloat16()},
        "bfloat16 dt_bias": {**bfloat16, "dt_bias_H": bfloat16["dt_bias_H"].bfloat16()},
        **{
            f"{name} of another dtype": with_(**{name: Tensor.bfloat16})
            for name in ("projected", "window_BCW", "conv_weight_CK", "conv_bias_C", "norm_weight_I")
        },
        **{f"{name} float64": with_(**{name: Tensor.double}) for name in NAMES},
        **{f"{name} wants a gradient": with_(**{name: lambda t: t.clone().requires_grad_()}) for name in NAMES},
        **{f"{name} on another device": with_(**{name: lambda t: t.to("meta")}) for name in NAMES},
        "projected not contiguous": with_(projected=lambda t: t.t().contiguous().t()),
        "state not contiguous": with_(state_BHPN=lambda t: t.mT.contiguous().mT),
        "window not contiguous": with_(window_BCW=lambda t: t.mT.contiguous().mT),
    }
    for name, t in cases.items():
        before = copies(t)
        assert step(t, 2) is None, name
        for key, kept in before.items():
            if kept is not None and kept.device.type == "cpu":
                assert torch.equal(t[key].detach(), kept), (name, key)
    for activation in ("gelu", "relu", None, torch.nn.functional.silu):
        t = step_inputs(generator)
        before = copies(t)
        assert step(t, 2, activation=activation) is None
        assert all(torch.equal(t[key], before[key]) for key in NAMES)
    assert step(step_inputs(generator), 2, activation="swish") is not None


def test_without_a_gradient_mode_parameters_may_be_trainable(generator, with_native):
    """As in generate(): but never a state that somebody may still go backward through."""
    t = step_inputs(generator)
    plain = copies(t)
    for name in ("conv_weight_CK", "conv_bias_C", "dt_bias_H", "A_log_H", "D_H", "norm_weight_I"):
        t[name] = torch.nn.Parameter(t[name])
    with torch.no_grad():
        assert torch.equal(step(t, 2), step(plain, 2))
        for name in ("window_BCW", "state_BHPN"):
            given = {**t, name: t[name].clone().requires_grad_()}
            before = given[name].detach().clone()
            assert step(given, 2) is None and torch.equal(given[name].detach(), before)


def test_switched_off(generator, monkeypatch):
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, "0")
    t = step_inputs(generator)
    before = copies(t)
    assert step(t, 2) is None and all(torch.equal(t[name], before[name]) for name in NAMES)

"""What computes in float32 whatever dtype the model has (design: dt, A, D, router, norms, state), seen from outside."""

import pytest
import torch
from families import small_model, tokens

from nemotron_h import NemotronHCache

pytestmark = pytest.mark.core


def kl(p_logits, q_logits):
    p, q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@torch.no_grad()
def test_time_steps_below_half_precision_are_not_rounded_away():
    """dt_raw in bfloat16 plus a bias of -11 in float32: the small step survives. In bfloat16 the sum would be off by
    up to 2**-5, the step by 3%."""
    model = small_model("mamba", dtype=torch.bfloat16)
    mixer = model.model.layers[0].mixer
    mixer.dt_bias.fill_(-11.003)
    seen = []
    from nemotron_h import ops

    original = ops.time_step
    try:
        ops.time_step = lambda *args: seen.append((args[0], original(*args))) or seen[-1][1]
        model(tokens(1, 5))
    finally:
        ops.time_step = original
    raw, dt = seen[0]
    assert raw.dtype == torch.bfloat16 and dt.dtype == torch.float32
    exact = torch.nn.functional.softplus(raw.double() + mixer.dt_bias.double())
    torch.testing.assert_close(dt.double(), exact, rtol=1e-5, atol=0)


@torch.no_grad()
def test_router_chooses_as_in_float32():
    """The same hidden states, in bfloat16, go to the experts that the float32 router names."""
    half = small_model("moe", dtype=torch.bfloat16)
    gate = next(layer.mixer.gate for layer in half.model.layers if layer.block_type == "moe")
    x_TD = torch.randn(10_000, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits, weights, indices = gate(x_TD)
    assert logits.dtype == weights.dtype == torch.float32
    exact_logits, _, exact = gate(x_TD.float())
    assert torch.equal(indices.sort(-1).values, exact.sort(-1).values)
    assert torch.equal(logits, exact_logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate(x_TD)[0], exact_logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_residual_in_float32(dtype):
    model = small_model("moe", dtype=dtype, residual_in_fp32=True)
    seen = []
    model.model.layers[-1].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    assert model(tokens(1, 5)).logits.isfinite().all()
    assert seen == [torch.float32]


@torch.no_grad()
def test_half_precision_is_near_float32_and_decoding_near_prefill():
    """Dense: in a random MoE a bfloat16 hidden state near a tie goes to another expert, which says nothing of ours."""
    full, half = small_model("dense", dtype=torch.float32), small_model("dense", dtype=torch.float32).bfloat16()
    ids = tokens(4, 60)
    reference = full(ids).logits
    prefill = half(ids).logits
    cache = NemotronHCache(half.config)
    decoded = torch.cat([half(ids[:, t : t + 1], cache=cache).logits for t in range(60)], dim=1)
    assert prefill.dtype == torch.float32
    assert kl(reference, prefill) < 0.02
    assert kl(reference, decoded) < 0.02


@torch.no_grad()
def test_state_dtype_follows_the_config():
    drift = {}
    full = small_model("mamba", dtype=torch.float32)
    ids = tokens(1, 200)
    reference = full(ids).logits
    for dtype in ("float32", "bfloat16"):
        full.config.mamba_ssm_cache_dtype = dtype
        cache = NemotronHCache(full.config)
        decoded = torch.cat([full(ids[:, t : t + 1], cache=cache).logits for t in range(200)], dim=1)
        drift[dtype] = kl(reference, decoded)
    assert drift["float32"] < 1e-9 < drift["bfloat16"]

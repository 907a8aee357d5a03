"""nemotron_h/ops/reference.py against transformers' torch functions, written by others: the oracle's own check."""

from __future__ import annotations

import pytest
import torch
from comparing import error, random

from nemotron_h.ops import reference

theirs = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")

B, L, H, P, G, N, C, K = 2, 21, 6, 5, 3, 4, 8, 4


def test_scan(generator):
    x, b, c = random(generator, B, L, H, P), random(generator, B, L, G, N), random(generator, B, L, G, N)
    raw, bias = random(generator, B, L, H), torch.linspace(-12, 1, H, dtype=torch.float64)
    A, D, state = -torch.rand(H, dtype=torch.float64) * 16, random(generator, H), random(generator, B, H, P, N)
    dt = reference.time_step(raw, bias, (0.0, float("inf")))
    y, last = reference.ssd(x, dt, A, b, c, D, initial_state_BHPN=state)
    inputs = [t.float() for t in (x, raw, A, b, c)]
    expected, expected_last = theirs.mamba2_chunk_scan(
        *inputs,
        chunk_size=8,
        D=D.float(),
        dt_bias=bias.float(),
        dt_softplus=True,
        initial_states=state.float(),
        return_final_states=True,
    )
    assert error(y, expected) < 1e-5 and error(last, expected_last) < 1e-5


def test_conv(generator):
    x, weight, bias = random(generator, B, L, C), random(generator, C, K), random(generator, C)
    y, window = reference.causal_conv(x, weight, bias)
    expected = theirs.causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)
    assert error(y, expected) < 1e-12
    state, token = window.clone(), random(generator, B, 1, C)
    expected = theirs.causal_conv1d_update(token.transpose(1, 2), state, weight, bias, activation="silu")
    y, window = reference.causal_conv(token, weight, bias, window_BCW=window)
    assert error(y, expected.transpose(1, 2)) < 1e-12 and torch.equal(window, state)


def test_norms(generator):
    y, z, weight = random(generator, B, L, 16), random(generator, B, L, 16), random(generator, 16)
    gated_class = getattr(theirs, "NemotronHRMSNormGated", None) or theirs.Zamba2RMSNormGated  # its name up to 5.17
    norm, gated = theirs.NemotronHRMSNorm(16, 1e-5), gated_class(16, 4, 1e-5)
    for module in (norm, gated):
        module.weight.data = weight.float()
    assert error(reference.rms_norm(y, weight, 1e-5), norm(y.float())) < 1e-5
    assert error(reference.gated_rms_norm(y, z, weight, 1e-5, 4), gated(y.float(), z.float())) < 1e-5


def test_router(generator):
    config = theirs.NemotronHConfig(
        hidden_size=16,
        n_routed_experts=12,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    module = theirs.NemotronHTopkRouter(config)
    module.weight.data = random(generator, 12, 16, dtype=torch.float32)
    module.e_score_correction_bias.copy_(0.3 * random(generator, 12, dtype=torch.float32))
    logits, weights, indices = module(random(generator, 24, 16, dtype=torch.float32))
    ours, our_weights = reference.router(
        logits, module.e_score_correction_bias, top_k=3, n_group=4, topk_group=2, norm_topk_prob=True, scaling=2.5
    )
    expected = torch.zeros(24, 12).scatter(1, indices, weights)
    assert error(torch.zeros(24, 12).scatter(1, ours, our_weights), expected) < 1e-5

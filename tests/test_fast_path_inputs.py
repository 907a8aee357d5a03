"""Inputs that the fast paths must leave to torch, or refuse as torch does, and compilers that fail in odd ways."""

import subprocess

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from families import small_model, tokens

from nemotron_h import NemotronHCache, ops
from nemotron_h.cache.layers import GrowingLayer
from nemotron_h.ops import native


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 32])
def test_another_width_is_refused(rows, dtype, width):
    x, weight = (torch.randn(rows, width, dtype=dtype), torch.randn(4, 16, dtype=dtype))
    with pytest.raises(RuntimeError):
        F.linear(x, weight)
    with pytest.raises(RuntimeError):
        ops.linear(x, weight)


def test_rms_norm_another_width():
    with pytest.raises(RuntimeError):
        ops.rms_norm(torch.randn(1, 8), torch.ones(16), 1e-05)


@pytest.mark.parametrize("rows", [1, 3])
def test_forward_mode_keeps_its_tangent(rows):
    x, weight = (torch.randn(rows, 16), torch.randn(4, 16))
    with forward_ad.dual_level():
        y = ops.linear(forward_ad.make_dual(x, torch.ones_like(x)), weight)
        tangent = forward_ad.unpack_dual(y).tangent
    assert tangent is not None and torch.allclose(tangent, torch.ones(rows, 16) @ weight.T, atol=1e-05)


def test_forward_mode_rms():
    x = torch.randn(1, 16)
    with forward_ad.dual_level():
        y = ops.rms_norm(forward_ad.make_dual(x, torch.ones_like(x)), torch.ones(16), 1e-05)
        assert forward_ad.unpack_dual(y).tangent is not None


def test_negated_view():
    x, weight = (torch.randn(1, 16), torch.randn(4, 16))
    negated = torch.view_as_complex(torch.randn(1, 16, 2)).conj().imag
    negated = torch._neg_view(x)
    assert torch.allclose(ops.linear(negated, weight), F.linear(negated, weight), atol=1e-05)


def test_sparse_weights():
    x, weight = (torch.randn(1, 16), torch.randn(4, 16))
    for stored in (weight.to_sparse_csr(), weight.to_sparse()):
        assert torch.allclose(ops.linear(x, stored), F.linear(x, stored), atol=1e-05)


@pytest.mark.skipif(native.library() is None, reason=f"no native.c: {native.reason()}")
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_quantised_not_a_number(kind, value):
    q, s = ops.quantize_weight(torch.randn(8, 64), 8 if kind == "int8" else 4)
    x = torch.randn(1, 64)
    x[0, 5] = value
    assert not native.linear(x, q, s).isfinite().any()


def test_trainable_queries_over_frozen_keys():
    """LoRA on q_proj alone, in the first attention layer: keys want no gradient and are saved for the queries'."""
    layer = GrowingLayer()

    def new(n):
        return (torch.randn(1, 2, n, 4), torch.randn(1, 2, n, 4))

    layer.update(*new(5))
    layer.update(*new(1))
    q = torch.randn(1, 2, 1, 4, requires_grad=True)
    keys, values = layer.update(*new(1))
    y = (q @ keys.mT).softmax(-1) @ values
    layer.update(*new(1))
    y.sum().backward()


def test_model_lora_on_q_token_by_token():
    model = small_model("attention")
    model.requires_grad_(False)
    model.model.layers[0].mixer.q_proj.weight.requires_grad_()
    ids = tokens(1, 6)
    cache, loss = (NemotronHCache(model.config), 0)
    for t in ids.split(1, dim=1):
        loss = loss + model(t, cache=cache).logits.sum()
    loss.backward()


def test_inference_mode_then_no_grad():
    model, ids = (small_model("attention"), tokens(1, 8))
    cache = NemotronHCache(model.config)
    with torch.inference_mode():
        model(ids[:, :5], cache=cache)
        model(ids[:, 5:6], cache=cache)
    with torch.no_grad():
        model(ids[:, 6:7], cache=cache)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    monkeypatch.delenv(native.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native.load, "loaded", None, raising=False)
    native.load._built.cache_clear()
    yield tmp_path
    native.load._built.cache_clear()


def script(path, body):
    path.write_bytes(b"#!/bin/sh\n" + body)
    path.chmod(493)
    return path


def test_compiler_that_hangs_talking(fresh, monkeypatch):
    cc = script(
        fresh / "cc", b"case $1 in --version) echo 1;; *) echo 'waiting for the licence' >&2; exec sleep 30;; esac\n"
    )
    run = subprocess.run
    monkeypatch.setattr(native.load.subprocess, "run", lambda *a, **k: run(*a, **{**k, "timeout": 1}))
    monkeypatch.setenv("CC", str(cc))
    assert native.library() is None and "licence" in native.reason()


def test_compiler_that_speaks_latin1(fresh, monkeypatch):
    cc = script(
        fresh / "cc", b"case $1 in --version) echo 1;; *) printf 'fehlgeschlagen: \\374bersetzung' >&2; exit 1;; esac\n"
    )
    monkeypatch.setenv("CC", str(cc))
    assert native.library() is None and "fehlgeschlagen" in native.reason()


def test_no_home(fresh, monkeypatch):
    import pwd

    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    cc = script(fresh / "cc", b"exit 1\n")
    monkeypatch.setenv("CC", str(cc))
    cc = script(fresh / "cc", b"echo 1\n")
    native.library()
    assert native.reason()


def test_silent_failure_says_status(fresh, monkeypatch):
    cc = script(fresh / "cc", b"case $1 in --version) echo 1;; *) exit 7;; esac\n")
    monkeypatch.setenv("CC", str(cc))
    assert "exit status 7" in native.reason()


@torch.no_grad()
def test_dict_prepared_and_tuple_position(monkeypatch):
    """vmap over ops.linear, many rows, half precision"""
    x, w = (torch.randn(3, 40, 16, dtype=torch.bfloat16), torch.randn(75, 16, dtype=torch.bfloat16))
    y = torch.vmap(lambda a: ops.linear(a, w))(x)
    assert torch.allclose(y.float(), F.linear(x, w).float(), atol=0.1)
    ws = torch.randn(3, 75, 16, dtype=torch.bfloat16)
    y = torch.vmap(lambda b: ops.linear(x[0], b))(ws)
    assert torch.allclose(y.float(), torch.stack([F.linear(x[0], b) for b in ws]).float(), atol=0.1)


def test_vmap_grad_tiles():
    x, w = (torch.randn(40, 16, dtype=torch.bfloat16), torch.randn(75, 16, dtype=torch.bfloat16))
    g = torch.func.grad(lambda b: ops.linear(x, b).float().square().sum())(w)
    e = torch.func.grad(lambda b: F.linear(x, b).float().square().sum())(w)
    assert torch.allclose(g.float(), e.float(), rtol=0.1, atol=5)


def test_empty_in_features():
    x, w = (torch.randn(2, 3, 0), torch.randn(4, 0))
    assert torch.equal(ops.linear(x, w), F.linear(x, w))


def test_broadcast_bias():
    x, w, b = (torch.randn(40, 16), torch.randn(4, 16), torch.randn(1))
    assert torch.allclose(ops.linear(x, w, b), F.linear(x, w, b), atol=1e-05)
    xb, wb, bb = (t.bfloat16() for t in (x, w, b))
    assert torch.allclose(ops.linear(xb, wb, bb).float(), F.linear(xb, wb, bb).float(), atol=0.1)

"""nemotron_h/ops/backends.py: what is chosen and said, and that the adapters speak the packages' language.

There is no GPU here. Stand-ins with the packages' signatures and layouts, computing by the reference, take the kernels'
place, and the choice is made to serve CPU tensors. What the real kernels compute is not tested by this file.
"""

from __future__ import annotations

import functools
import logging
import sys
import types

import pytest
import torch
from comparing import assert_same, error, random

from nemotron_h import ops
from nemotron_h.ops import backends, reference

CUDA, CPU, BF16, F32 = torch.device("cuda"), torch.device("cpu"), torch.bfloat16, torch.float32
B, L, H, P, G, N, C, K = 2, 9, 4, 3, 2, 5, 8, 4


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
):  # fmt: skip
    assert chunk_size & (chunk_size - 1) == 0 and not dt_softplus and dt_bias is None and dt_limit[0] == 0.0
    assert x.dtype == B.dtype == C.dtype and dt.dtype == A.dtype == D.dtype == torch.float32
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and (seq_idx[:, 0] == 0).all() and initial_states is None)
    y, state = reference.ssd(x, dt, A, B, C, D, initial_state_BHPN=initial_states, seq_idx_BL=seq_idx)
    return (y, state.float()) if return_final_states else y


def selective_state_update(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None
):
    assert state.dtype == torch.float32 and not dt_softplus and dt_bias is None
    assert A.shape == state.shape[1:] and D.shape == x.shape[1:] and dt.shape == x.shape
    # The kernel takes its tied path, one number per head, only for expanded views.
    assert dt.stride(-1) == A.stride(-1) == A.stride(-2) == D.stride(-1) == 0
    y, new_state = reference.ssd_step(x, dt[..., 0], A[:, 0, 0], B, C, D[:, 0], state)
    state.copy_(new_state)
    return y


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None,
    activation=None,
):  # fmt: skip
    assert activation in (None, "silu", "swish") and x.stride(1) == 1 and x.stride(0) % 8 == x.stride(2) % 8 == 0
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.is_contiguous() and initial_states is None)
    x = x.transpose(1, 2)
    return reference.causal_conv(x, weight, bias, seq_idx_BL=seq_idx, activation=activation)[0].transpose(1, 2)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """Each test looks for packages and is told about them anew, in an environment that says nothing."""
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(backends, "_said", set())
    backends._find.cache_clear()
    yield
    backends._find.cache_clear()


def install(monkeypatch, **functions):
    """Modules of the packages' names; a function left out leaves its package out."""
    homes = {
        "mamba_chunk_scan_combined": "mamba_ssm.ops.triton.ssd_combined",
        "selective_state_update": "mamba_ssm.ops.triton.selective_state_update",
        "causal_conv1d_fn": "causal_conv1d",
    }
    for name, function in functions.items():
        parts = homes[name].split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            if path not in sys.modules:
                module = types.ModuleType(path)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, path, module)
        setattr(sys.modules[homes[name]], name, function)


@pytest.fixture
def installed(monkeypatch):
    install(
        monkeypatch,
        mamba_chunk_scan_combined=mamba_chunk_scan_combined,
        selective_state_update=selective_state_update,
        causal_conv1d_fn=causal_conv1d_fn,
    )


@pytest.fixture
def serving_cpu(monkeypatch, installed):
    monkeypatch.setattr(backends, "KERNEL_DEVICES", ("cuda", "cpu"))


class TestChoice:
    def test_importing_and_running_on_a_cpu_looks_for_nothing(self, monkeypatch):
        monkeypatch.setattr(backends.importlib, "import_module", lambda name: pytest.fail(f"looked for {name}"))
        ops.causal_conv(torch.zeros(1, 2, C), torch.zeros(C, K), None)
        assert backends.report("cpu") == [
            ("ssd", "torch", "mamba-ssm has no kernel for cpu"),
            ("ssd_step", "torch", "mamba-ssm has no kernel for cpu"),
            ("causal_conv", "torch", "causal-conv1d has no kernel for cpu"),
        ]

    def test_installed_kernels_are_taken(self, installed, caplog):
        assert [name for _, name, _ in backends.report("cuda")] == ["mamba-ssm", "mamba-ssm", "causal-conv1d"]
        assert not caplog.records

    @pytest.mark.parametrize("value", ["0", "off", "False"])
    def test_the_environment_switches_them_off(self, installed, monkeypatch, value):
        monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, value)
        assert {(name, reason) for _, name, reason in backends.report("cuda")} == {
            ("torch", f"NEMOTRON_H_KERNELS={value}")
        }

    @pytest.mark.parametrize(
        "op, dtype, features",
        [
            ("ssd", torch.float64, {}),
            ("ssd", F32, {}),  # the kernel's matrix products would be TF32
            ("ssd_step", torch.float64, {}),
            ("causal_conv", torch.float64, {}),
            ("ssd", BF16, {"initial_state": True, "packed": True}),
            ("ssd_step", BF16, {"gradient": True}),
            ("causal_conv", BF16, {"kernel_size": 5}),
            ("causal_conv", BF16, {"channels": 12}),
            ("causal_conv", BF16, {"activation": torch.tanh}),
        ],
    )
    def test_torch_is_taken_for_what_the_kernels_do_not_compute(self, installed, op, dtype, features):
        choice = backends.which(op, CUDA, dtype, **features)
        assert (choice.name, choice.fn) == ("torch", None) and choice.reason

    def test_float32_where_the_kernel_is_exact(self, installed):
        assert backends.which("ssd_step", CUDA, F32).name == "mamba-ssm"
        assert backends.which("causal_conv", CUDA, F32).name == "causal-conv1d"

    def test_torch_is_taken_while_compiling(self, serving_cpu, generator):
        x, dt, A, b, c, D = scan_inputs(generator)
        torch.compiler.reset()
        y, _ = torch.compile(ops.ssd, fullgraph=True, backend="eager")(x, dt, A, b, c, D)
        assert torch.equal(y, torch_only(ops.ssd)(x, dt, A, b, c, D)[0])


class TestWhatIsSaid:
    @pytest.fixture(autouse=True)
    def _on_cpu(self, monkeypatch):
        monkeypatch.setattr(backends, "KERNEL_DEVICES", ("cpu",))

    def messages(self, caplog, op):
        with caplog.at_level(logging.WARNING, "nemotron_h"):
            assert [backends.kernel_for(op, torch.zeros(1, dtype=BF16)) for _ in range(3)] == [None] * 3
        (record,) = caplog.records  # said once
        assert record.getMessage() == backends.which(op, CPU, BF16).reason
        return record.getMessage()

    def test_a_missing_package(self, monkeypatch, caplog):
        monkeypatch.setitem(sys.modules, "causal_conv1d", None)
        message = self.messages(caplog, "causal_conv")
        assert "causal-conv1d" in message and "pip install" in message and "NEMOTRON_H_KERNELS=0" in message

    def test_not_installed_at_all(self, monkeypatch, caplog):
        def missing(name):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])

        monkeypatch.setattr(backends.importlib, "import_module", missing)
        assert self.messages(caplog, "ssd").startswith("mamba-ssm is not installed")

    def test_a_build_for_another_torch(self, monkeypatch, caplog):
        def broken(name):
            raise ImportError("causal_conv1d_cuda.so: undefined symbol: _ZN3c10")

        monkeypatch.setattr(backends.importlib, "import_module", broken)
        message = self.messages(caplog, "causal_conv")
        assert (
            "undefined symbol: _ZN3c10" in message and torch.__version__ in message and "--force-reinstall" in message
        )

    def test_another_version(self, monkeypatch, caplog):
        install(monkeypatch, causal_conv1d_fn=lambda x, weight, bias=None, activation=None: x)
        message = self.messages(caplog, "causal_conv")
        assert "causal_conv1d.causal_conv1d_fn does not take seq_idx" in message and "--upgrade" in message

    def test_one_package_is_complained_of_once_for_both_its_ops(self, monkeypatch, caplog):
        monkeypatch.setitem(sys.modules, "mamba_ssm", None)
        with caplog.at_level(logging.WARNING, "nemotron_h"):
            for op in ("ssd", "ssd_step"):
                backends.kernel_for(op, torch.zeros(1, dtype=BF16))
        assert len(caplog.records) == 1

    def test_asking_what_would_be_chosen_says_nothing(self, monkeypatch, caplog):
        monkeypatch.setitem(sys.modules, "mamba_ssm", None)
        assert [name for _, name, _ in backends.report("cpu")][:2] == ["torch", "torch"]
        assert not caplog.records


def torch_only(function):
    def call(*args, **kwargs):
        before, backends.KERNEL_DEVICES = backends.KERNEL_DEVICES, ()
        try:
            return function(*args, **kwargs)
        finally:
            backends.KERNEL_DEVICES = before

    return call


def scan_inputs(generator):
    draw = functools.partial(random, generator)
    x, b, c = (draw(*shape).to(BF16) for shape in ((B, L, H, P), (B, L, G, N), (B, L, G, N)))
    return [x, draw(B, L, H).exp().float(), -draw(H).exp().float(), b, c, draw(H).float()]


class TestAdapters:
    """Through the public functions, with the stand-ins behind them."""

    def test_the_stand_ins_are_reached(self, monkeypatch, serving_cpu, generator):
        reached = []
        for key, kernel in backends._KERNELS.items():
            module = sys.modules[kernel.module]
            original = getattr(module, kernel.function)

            @functools.wraps(original)
            def record(*args, _key=key, _original=original, **kwargs):
                reached.append(_key)
                return _original(*args, **kwargs)

            monkeypatch.setattr(module, kernel.function, record)
        x, dt, A, b, c, D = scan_inputs(generator)
        ops.ssd(x, dt, A, b, c, D)
        ops.ssd_step(x[:, 0], dt[:, 0], A, b[:, 0], c[:, 0], D, torch.zeros(B, H, P, N))
        ops.causal_conv(torch.zeros(B, L, C), torch.zeros(C, K), None)
        assert reached == ["ssd", "ssd_step", "causal_conv"]

    @pytest.mark.parametrize("case", ["plain", "state", "packed"])
    def test_scan(self, serving_cpu, generator, case):
        inputs = scan_inputs(generator)
        kwargs = {
            "plain": {},
            "state": {"initial_state_BHPN": random(generator, B, H, P, N, dtype=F32)},
            "packed": {"seq_idx_BL": torch.tensor([[4, 4, 4, 1, 1, 4, 4, 4, 4], [2] * 9])},
        }[case]
        assert_same(functools.partial(ops.ssd, **kwargs), functools.partial(reference.ssd, **kwargs), inputs, 2**-7)

    @pytest.mark.parametrize("state_dtype", [F32, BF16])
    def test_step(self, serving_cpu, generator, state_dtype):
        x, dt, A, b, c, D = scan_inputs(generator)
        state = random(generator, B, H, P, N, dtype=state_dtype)
        before = state.clone()
        inputs = [x[:, 0], dt[:, 0], A, b[:, 0], c[:, 0], D, state]
        y, after = ops.ssd_step(*inputs)
        expected, expected_after = torch_only(ops.ssd_step)(*inputs)
        assert error(y, expected) < 2**-7 and error(after, expected_after) < 1e-6
        assert torch.equal(state, before) and after.dtype == F32

    @pytest.mark.parametrize("activation", ["silu", None])
    @pytest.mark.parametrize("case", ["plain", "masked", "packed", "masked-packed"])
    def test_conv(self, serving_cpu, generator, case, activation):
        draw = functools.partial(random, generator, dtype=F32)
        kwargs = {
            "window_BCW": draw(B, C, K - 1),
            "mask_BL": torch.rand(B, L, generator=generator) > 0.3 if "masked" in case else None,
            "seq_idx_BL": torch.randint(0, 2, (B, L), generator=generator) if "packed" in case else None,
            "activation": activation,
        }
        inputs = [draw(B, L, C), draw(C, K), draw(C)]
        assert_same(
            functools.partial(ops.causal_conv, **kwargs),
            torch_only(functools.partial(ops.causal_conv, **kwargs)),
            inputs,
            1e-6,
        )

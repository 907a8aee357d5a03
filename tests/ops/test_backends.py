"""nemotron_h/ops/cuda_kernels.py: what is chosen and said.

There is no GPU here: functions with the packages' signatures, which nothing calls, take the kernels' place. What the
packages' own compute through the adapters is tested in tests/kernels.
"""

from __future__ import annotations

import functools
import logging
import sys
import types

import pytest
import torch
from comparing import random

from nemotron_h import ops
from nemotron_h.ops import cuda_kernels as backends

CUDA, CPU, BF16, F32 = torch.device("cuda"), torch.device("cpu"), torch.bfloat16, torch.float32
B, L, H, P, G, N, C, K = 2, 9, 4, 3, 2, 5, 8, 4


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
): ...  # fmt: skip


def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False): ...


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None,
    activation=None,
): ...  # fmt: skip


def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None): ...


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
        "causal_conv1d_update": "causal_conv1d",
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
        causal_conv1d_update=causal_conv1d_update,
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
            ("causal_conv_step", "torch", "causal-conv1d has no kernel for cpu"),
        ]

    def test_installed_kernels_are_taken(self, installed, caplog):
        names = [name for _, name, _ in backends.report("cuda")]
        assert names == ["mamba-ssm", "mamba-ssm", "causal-conv1d", "causal-conv1d"]
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
            ("causal_conv_step", torch.float64, {}),
            ("ssd_step", BF16, {"gradient": True}),
            ("causal_conv_step", BF16, {"gradient": True}),
            ("causal_conv", BF16, {"kernel_size": 5}),
            ("causal_conv_step", BF16, {"kernel_size": 5}),
            ("causal_conv_step", BF16, {"activation": torch.tanh}),
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
        # which alone works over channels in eights
        assert backends.which("causal_conv_step", CUDA, F32, channels=12).name == "causal-conv1d"

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

    def test_a_version_whose_window_is_a_column_wider(self, monkeypatch, caplog):
        install(monkeypatch, causal_conv1d_update=lambda x, conv_state, weight, bias=None, activation=None: x)
        assert "does not take cache_seqlens" in self.messages(caplog, "causal_conv_step")

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

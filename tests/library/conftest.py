"""The marks of `transformers`' own tests, which `--strict-markers` wants to know."""

from __future__ import annotations

import pytest

MARKS = (
    "accelerate_tests",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "order",
    "slow",
    "torch_compile_test",
)


def pytest_configure(config: pytest.Config) -> None:
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: a mark of transformers' tests")


@pytest.fixture(autouse=True)
def library_experts(request, monkeypatch):
    """The test of the library's expert implementations counts their calls; on a CPU ops.routed_experts takes them."""
    if "batched_and_grouped" in request.node.name:
        monkeypatch.setenv("NEMOTRON_H_KERNELS", "0")

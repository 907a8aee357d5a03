"""mamba-ssm's and causal-conv1d's own functions through the adapters of nemotron_h/ops/cuda_kernels.py.

Each file of checks runs in a process of its own: Triton must be told to interpret before it is imported, torch behaves
differently where Triton can be imported, and the rest of the suite must not find the packages. Without a GPU they are
what `python tests/kernels/fetch_packages.py` fetched; on a machine with CUDA and both packages they are as installed,
compiled, and run there as well.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import fetch_packages
import pytest
import torch

HERE = Path(__file__).parent
CHECKS = sorted(path.stem for path in HERE.glob("checks_*.py"))


def run(checks: str, *paths: Path, **environment: str) -> None:
    # without what pytest and xdist tell their workers
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "NEMOTRON_H_KERNELS"))}
    own["PYTHONPATH"] = os.pathsep.join([str(HERE.parent / "ops"), *map(str, paths), own.get("PYTHONPATH", "")])
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"{HERE / checks}.py"],
        cwd=HERE.parents[1],
        env=own | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-8000:]


@pytest.mark.skipif(
    not fetch_packages.fetched(),
    reason=f"{', '.join(fetch_packages.pinned())} are not here: run `{fetch_packages.COMMAND}`",
)
@pytest.mark.parametrize("checks", CHECKS)
def test_interpreted(checks):
    # mamba-ssm's deterministic blocks, which tests/conftest.py would ask for, are its smallest: 20 ms each.
    run(checks, fetch_packages.folder(), TRITON_INTERPRET="1", MAMBA_DETERMINISTIC="0")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("checks", CHECKS)
def test_compiled_on_a_gpu(checks):
    for package in ("mamba_ssm", "causal_conv1d"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    run(checks)


def test_this_process_has_none_of_them():
    assert not {"mamba_ssm", "causal_conv1d", "causal_conv1d_cuda"} & set(sys.modules) or torch.cuda.is_available()
    assert str(fetch_packages.folder()) not in sys.path

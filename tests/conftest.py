"""What every test runs under: uninitialised memory is NaN, few threads, seeded random numbers."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import families
import pytest
import torch

# torch.empty gives NaN (the largest integer for integer types), so a read of memory that nobody wrote fails the test.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True

# More threads than cores makes small tensors slower by orders of magnitude; xdist's workers get one each.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB, where one can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here, which takes Linux and its root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["worst"] = families.WORST


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    for file, difference in getattr(node, "workeroutput", {}).get("worst", {}).items():
        families.WORST[file] = max(families.WORST.get(file, 0.0), difference)


def pytest_terminal_summary(terminalreporter) -> None:
    """How far the float64 equalities are from exact: numbers, beside the tests' yes."""
    for file, difference in sorted(families.WORST.items()):
        terminalreporter.write_line(f"worst relative difference in {file}: {difference:.1e}")

"""What every test runs under: uninitialised memory is NaN, few threads, seeded random numbers."""

from __future__ import annotations

import os

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

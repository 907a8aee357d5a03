"""What the checks share; they run in processes of their own, see test_real_packages.py."""

from __future__ import annotations

import pytest


@pytest.fixture
def calls():
    """How often each function of the packages was called, by its name."""
    from real_packages import CALLS

    CALLS.clear()
    return CALLS

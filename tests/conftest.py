"""Fixtures shared by the core's tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "support"))  # what several test files share
DATA = Path(__file__).parent / "data"


@pytest.fixture
def oracle_folder() -> Path:
    """Arrays made with the methods' reference implementations; see the README beside them."""
    return DATA


@pytest.fixture(autouse=True)
def _one_thread_and_one_seed() -> None:
    """Tests run in parallel processes; a thread pool in each would only make them wait for each other.

    They also begin with the same random numbers, so that a failure comes back.
    """
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(20210312)

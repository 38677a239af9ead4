"""What every test stands on: one thread, a fixed seed, and the reason why a test cannot run here."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compiler: needs a C++ compiler that works; skipped with the reason without one")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for torch in this process, where it is not yet imported


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("compiler"):
        from torchstone.ops.compiler import compiler_works

        if reason := compiler_works():
            pytest.skip(reason)


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
        torch.manual_seed(0)


@pytest.fixture
def float64() -> Iterator[None]:
    """Default dtype float64: rotations, sinusoids and biases are made in it, so checks can compare at 1e-8."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)

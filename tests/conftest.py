"""What every test stands on: one thread, a fixed seed, and the reason why a test cannot run here."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Said:
    """What a command left behind: status, standard output, standard error."""

    status: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """``cli("train", ...)`` runs the command line in this process."""
    from torchstone.cli import main

    def run(*arguments: str | Path) -> Said:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Said(int(left.value.code or 0), captured.out, captured.err)

    return run

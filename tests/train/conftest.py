from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from torchstone.train import training
from torchstone.train.run import RunFolder


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``recipe(**sections)``: plain data of a tiny recipe in the test's own folder."""
    return lambda **sections: tiny.recipe(tmp_path, **sections)


@pytest.fixture
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time of a tiny training is its plot."""
    monkeypatch.setattr(training, "plot_curve", lambda *arguments: None)


@pytest.fixture
def run(tmp_path: Path, recipe: Callable[..., dict[str, Any]], no_plot: None) -> Callable[..., RunFolder]:
    """``run(name, resume=False, **sections)``: trains into the folder `name` of the test."""

    def make(name: str = "run", resume: bool = False, **sections: Any) -> RunFolder:
        return training.train(recipe(**sections), out=tmp_path / name, resume=resume, quiet=True)

    return make

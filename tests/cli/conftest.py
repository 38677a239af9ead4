from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from torchstone.recipe import dump_yaml
from torchstone.train import training


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """``recipe(**sections)``: the file of a tiny recipe in the test's own folder."""

    def write(**sections: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(dump_yaml(tiny.recipe(tmp_path, **sections)))
        return path

    return write


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, the file of a tiny recipe, and its finished run in ``run``."""
    folder = tmp_path_factory.mktemp("home")
    data = tiny.recipe(folder)
    (folder / "recipe.yaml").write_text(dump_yaml(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "plot_curve", lambda *arguments: None)
        training.train(data, out=folder / "run", quiet=True)
    return folder

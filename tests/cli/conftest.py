from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tiny
from torchstone.cli import main
from torchstone.recipe import dump_yaml
from torchstone.train import training


@dataclass(frozen=True)
class Said:
    """What a command left behind: status, standard output, standard error."""

    status: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """``cli("train", ...)`` runs the command line in this process."""

    def run(*arguments: str | Path) -> Said:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Said(int(left.value.code or 0), captured.out, captured.err)

    return run


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

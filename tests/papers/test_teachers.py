"""Teachers of claims: trained once, also by two processes at once; another recipe or source is another teacher."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

import tiny
from torchstone.errors import TorchstoneError
from torchstone.papers import _teachers
from torchstone.papers._teachers import teacher
from torchstone.train.checkpoint import load_tensors


def _asked(recipe: dict[str, Any], count: Any) -> None:
    whole = _teachers.train

    def counted(*args: Any, **fields: Any) -> Any:
        with count.get_lock():
            count.value += 1
        return whole(*args, **fields)

    _teachers.train = counted
    teacher(recipe)


def test_a_teacher_is_trained_once_and_is_the_run_of_its_recipe(tmp_path: Path, monkeypatch: Any) -> None:
    recipe = tiny.recipe(tmp_path)
    run = teacher(recipe)
    assert run.path.parent == tmp_path / "cache" / "teachers" and run.exists()
    wanted = load_tensors(tiny.saved(tmp_path / "first", recipe).path / "model.safetensors")
    assert any(not value.equal(wanted[name]) for name, value in load_tensors(run.path / "model.safetensors").items())
    monkeypatch.setattr(_teachers, "train", None)
    assert teacher(recipe).path == run.path
    monkeypatch.undo()
    assert teacher({**recipe, "optimizer": {"lr": 0.02}}).path != run.path
    key = run.path.name
    monkeypatch.setattr(_teachers, "_SOURCES", ("keys.py",))
    assert teacher(recipe).path.name != key
    assert not list(run.path.parent.glob(".training-*"))


def test_a_training_that_fails_leaves_no_teacher(tmp_path: Path, monkeypatch: Any) -> None:
    def broken(recipe: Any, out: Path, quiet: bool) -> None:
        out.mkdir()
        (out / "config.json").write_text("{}")
        raise TorchstoneError("no luck")

    monkeypatch.setattr(_teachers, "train", broken)
    with pytest.raises(TorchstoneError, match="no luck"):
        teacher(tiny.recipe(tmp_path))
    assert [path.suffix for path in (tmp_path / "cache" / "teachers").iterdir()] == [".lock"]


@pytest.mark.slow
def test_two_processes_at_once_train_it_once(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("spawn")
    count = processes.Value("i", 0)
    recipe = tiny.recipe(tmp_path, trainer={"steps": 20})
    both = [processes.Process(target=_asked, args=(recipe, count)) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert [one.exitcode for one in both] == [0, 0] and count.value == 1

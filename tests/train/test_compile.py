"""Compiling changes no loss, and steps aside in one line where there is no compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from torchstone.ops.compiler import compiler_works
from torchstone.recipe import dump_yaml, load_recipe
from torchstone.train import training
from torchstone.train.run import RunFolder

ON = {"steps": 4, "batch": 2, "device": "cpu", "threads": 1, "save_every": 4, "compile": "on"}


@pytest.mark.slow
def test_without_a_compiler_it_says_one_line_and_trains_on(
    recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_yaml(recipe(trainer=ON)))
    command = [sys.executable, "-m", "torchstone", "train", str(file), "--out", str(tmp_path / "run")]
    done = subprocess.run(
        command, env={**os.environ, "CXX": "/nonexistent"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("torch.compile")]
    assert len(said) == 1 and said[0].startswith("torch.compile steps aside: no C++ compiler at CXX=/nonexistent")
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["compile"] == "off"
    assert [row["step"] for row in RunFolder(tmp_path / "run").metrics() if "loss" in row] == [1, 2, 3, 4]


def test_auto_decides_once_from_recipe_and_shapes(
    recipe: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "compiler_works", lambda: None)
    said: list[str] = []
    for steps, wanted in ((4, "off"), (10**7, "on")):
        full, _ = tiny.resolved(recipe(trainer={"steps": steps, "compile": "auto"}))
        model = training.build_model(full.model, 0)
        assert training._compile(model, full, 1e9, said.append) == wanted
    monkeypatch.setattr(training, "compiler_works", lambda: "no compiler")
    full = load_recipe(full.dump(), ["trainer.compile=on"])
    assert training._compile(model, full, 1.0, said.append) == "off"
    assert said == ["torch.compile steps aside: no compiler"]


@pytest.mark.slow
@pytest.mark.skipif(compiler_works() is not None, reason=str(compiler_works()))
@pytest.mark.parametrize("sections", [{}, tiny.MASKED], ids=["causal", "masked"])
def test_compiled_blocks_give_the_same_losses(run: Callable[..., RunFolder], sections: dict[str, Any]) -> None:
    model = {**sections.get("model", tiny.MODEL), "depth": 2}
    steps = {**ON, "steps": 8, "save_every": 8, "log_every": 1}
    losses = [
        [
            row["loss"]
            for row in run(name, **{**sections, "model": model, "trainer": trainer}).metrics()
            if "loss" in row
        ]
        for name, trainer in (("on", steps), ("off", {**steps, "compile": "off"}))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

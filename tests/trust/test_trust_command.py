"""A recipe trained and attacked from the command line, and what the verb refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
import torchstone
from torchstone.recipe import dump_yaml
from torchstone.train import training
from torchstone.train.run import RunFolder
from torchstone.trust import RejectingClassifier
from torchstone.trust.evaluation import ATTACKS

Cli = Callable[..., Any]
LEARNS: dict[str, Any] = {"optimizer": {"lr": 0.01}, "trainer": {"steps": 40, "batch": 16, "save_every": 40}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the file of a recipe, its run in ``run``, and one without the head in ``plain``."""
    folder = tmp_path_factory.mktemp("trust")
    head = {"model": {"rejection": {}}, "objective": {"kind": "rectified_rejection"}}
    (folder / "recipe.yaml").write_text(dump_yaml(tiny.images(folder, **LEARNS, **head)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "plot_curve", lambda *arguments: None)
        training.train(folder / "recipe.yaml", out=folder / "run", quiet=True)
        training.train(tiny.images(folder, trainer={"steps": 1}), out=folder / "plain", quiet=True)
    return folder


def test_train_and_inspect_a_recipe_of_images(
    cli: Cli, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "plot_curve", lambda *arguments: None)
    said = cli("train", home / "recipe.yaml", "trainer.steps=2", "--out", tmp_path / "run")
    assert said.status == 0 and "robust accuracy" in said.err and "2 steps of 16 examples" in said.err
    run = torchstone.load(home / "run")
    assert run.recipe.model.dump()["classes"] == 3  # what the data decide stands in the recipe
    assert any("test_robust_accuracy" in row for row in run.metrics())
    for what in ("recipe.yaml", "run"):
        found = json.loads(cli("inspect", home / what, "--json").out)
        assert found["parameters"] == sum(p.numel() for p in run.model().parameters())
        assert found["training_bytes"]["peak"] > 16 * found["parameters"]


@pytest.mark.slow
def test_every_attack_is_reported_and_written(cli: Cli, home: Path, tmp_path: Path) -> None:
    command = ("trust", "evaluate", home / "run", "--attack", ",".join(ATTACKS), "--steps", "5", "--limit", "12")
    before = tiny.listing(home / "run")
    said = cli(*command, "--epsilon", "0.2", "--out", tmp_path / "out", "--json")
    assert said.status == 0 and said.err == ""
    found = json.loads(said.out)
    assert found == json.loads((tmp_path / "out" / "trust.json").read_text())
    assert found["examples"] == 12 and found["epsilon"] == 0.2
    rows = found["attacks"]
    assert list(rows) == ["none", *ATTACKS]
    for row in rows.values():
        assert set(row["scores"]) == {"con", "rcon", "auxiliary", "entropy", "energy"}
        assert set(row["rules"]) == {*row["scores"], "coupled"}
        assert 0 <= row["accuracy"] <= 1
    assert rows["multi-target"]["accuracy"] <= rows["none"]["accuracy"]
    assert 0 < rows["cw"]["evaded"] <= 1 and rows["cw"]["distance"] > 0
    assert tiny.listing(home / "run") == before


def test_by_default_the_ball_is_that_of_the_training(cli: Cli, home: Path) -> None:
    command = ("trust", "evaluate", home / "plain", "--steps", "3")
    said = cli(*command, "--json")
    assert cli(*command, "--json").out == said.out
    shown = cli(*command)
    assert shown.status == 0 and "entropy" in shown.out and "rule con" in shown.out
    found = json.loads(said.out)
    assert found["epsilon"] == 0.1 and list(found["attacks"]) == ["none", "pgd"]
    assert set(found["attacks"]["pgd"]["scores"]) == {"con", "entropy", "energy"}


def test_what_the_verb_refuses(cli: Cli, home: Path, tmp_path: Path) -> None:
    def refusal(*arguments: Any) -> str:
        said = cli("trust", "evaluate", *arguments)
        assert said.status == 2 and said.out == "" and said.err.count("\n") == 1
        return str(said.err)

    assert "no such run" in refusal(home / "none")
    assert "no attack 'pgdd' (did you mean 'pgd'?)" in refusal(home / "run", "--attack", "pgdd")
    assert "which the model lacks" in refusal(home / "plain", "--attack", "adaptive-pgd")
    assert "steps: is 0" in refusal(home / "run", "--steps", "0")
    assert "epsilon: must be above 0" in refusal(home / "run", "--epsilon", "0")
    for run in ("run", "plain"):
        for xi in ("1", "-0.1", "nan"):
            assert f"xi: {xi} is outside" in refusal(home / run, "--xi", xi)
        for eta in ("nan", "-1", "inf"):
            assert "each a number from 0 up" in refusal(home / run, "--eta", eta)
    assert "keep: 2 is no share" in refusal(home / "run", "--keep", "2")
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(home / "run", "--out", tmp_path / "file")
    tiny.saved(tmp_path / "text", tiny.recipe(tmp_path))
    assert "no classifier of images" in refusal(tmp_path / "text")


def test_the_run_gives_a_classifier_that_may_abstain(home: Path) -> None:
    run = torchstone.load(home / "run")
    data = run.recipe.data.prepare()
    classifier = RejectingClassifier(run.model()).calibrate(data.valid.evaluation(8), keep=0.9)
    (batch,) = data.test.evaluation(len(data.test))
    label, accepted, _ = classifier(batch["pixels"])
    right = label == batch["label"]
    assert right.double().mean() > 0.6 and accepted.any()
    assert right[accepted].double().mean() >= right.double().mean()


@pytest.mark.slow
def test_a_comparison_reads_the_robust_accuracy(tmp_path: Path) -> None:
    recipe = tiny.images(tmp_path, **LEARNS)
    result = torchstone.compare(
        {"attacked": {}, "natural": {"objective": {"kind": "adversarial", "steps": 1}}},
        seeds=2,
        recipe=recipe,
        metric="test_robust_accuracy",
        out=tmp_path / "compare",
        quiet=True,
    )
    assert "test_robust_accuracy" in result.table  # type: ignore[union-attr]
    assert RunFolder(tmp_path / "compare").path.is_dir()

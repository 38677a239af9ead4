"""A recipe trained and attacked from the command line, and what the verb refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
import torchstone
from torchstone.errors import TorchstoneError
from torchstone.model.transformer import TransformerSpec
from torchstone.recipe import dump_yaml
from torchstone.spec import validate
from torchstone.train import training
from torchstone.train.run import RunFolder
from torchstone.trust import RejectingClassifier
from torchstone.trust.evaluation import ATTACKS
from torchstone.trust.images import images_for

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


def stripes(path: Path, count: int = 20, side: int = 6, classes: int = 3, channels: int = 1) -> Path:
    rng = np.random.default_rng(1)
    label = np.arange(count) % classes
    pixels = rng.random((count, channels, side, side)) * 0.6
    pixels[np.arange(count), 0, 2 * label % side] += 0.4
    np.savez(path, x=pixels, y=label)
    return path


@pytest.mark.parametrize("verb", ["evaluate", "certify"])
def test_other_images_take_the_place_of_the_test_split(verb: str, cli: Cli, home: Path, tmp_path: Path) -> None:
    few = ("--steps", "2") if verb == "evaluate" else ("--n", "20", "--sigma", "0.2")

    def found(*arguments: Any) -> Any:
        said = cli("trust", verb, home / "run", *few, *arguments, "--json")
        assert said.status == 0, said.err
        return json.loads(said.out)

    own, other = found(), found("--data", stripes(tmp_path / "other.npz"))
    assert other["examples"] == 20 and "test 20" in other["data"] and "other.npz" in other["data"]
    # the run's own test images, from a file of their own, are measured as they were in the run
    (batch,) = torchstone.load(home / "run").recipe.data.prepare().test.evaluation(1000)
    np.savez(tmp_path / "same.npz", x=batch["pixels"].numpy(), y=batch["label"].numpy())
    assert {**found("--data", tmp_path / "same.npz"), "data": ""} == {**own, "data": ""}
    # one class alone is enough here, and a class may be missing from numbers
    assert found("--data", stripes(tmp_path / "one.npz", 4, classes=1))["examples"] == 4


@pytest.mark.parametrize("verb", ["evaluate", "certify"])
def test_folders_of_images_have_all_classes(verb: str, cli: Cli, home: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    few = ("--steps", "2") if verb == "evaluate" else ("--n", "20", "--sigma", "0.2")
    for name in ("a", "b", "c"):
        (tmp_path / "images" / name).mkdir(parents=True)
        image.fromarray(np.zeros((6, 6), np.uint8)).save(tmp_path / "images" / name / "0.png")
    (tmp_path / "images" / "c" / "0.png").rename(tmp_path / "images" / "b" / "1.png")  # a class may have no image
    command = ("trust", verb, home / "run", *few, "--data", tmp_path / "images")
    assert json.loads(cli(*command, "--json").out)["examples"] == 3
    (tmp_path / "images" / "c").rmdir()
    said = cli(*command)
    assert said.status == 2 and "images of 2 classes, and the model has 3" in said.err


@pytest.mark.parametrize("verb", ["evaluate", "certify"])
def test_images_that_do_not_fit_the_model_are_refused(verb: str, cli: Cli, home: Path, tmp_path: Path) -> None:
    few = () if verb == "evaluate" else ("--sigma", "0.2")
    for fields, sentence in (
        ({"side": 8}, "images of 1 x 8 x 8, and the model takes 1 x 6 x 6"),
        ({"channels": 3}, "images of 3 x 6 x 6, and the model takes 1 x 6 x 6"),
        ({"classes": 4}, "images of 4 classes, and the model has 3"),
    ):
        said = cli("trust", verb, home / "run", *few, "--data", stripes(tmp_path / "odd.npz", **fields), "--out", "no")
        assert said.status == 2 and sentence in said.err and said.err.count("\n") == 1
    said = cli("trust", verb, home / "run", *few, "--data", tmp_path / "none")
    assert said.status == 2 and "no such file or folder" in said.err


def test_a_transformer_over_patches_takes_its_own_shape(tmp_path: Path) -> None:
    patches = {"kind": "patch", "image": 6, "patch": 3, "channels": 1}
    head = {"kind": "classification", "classes": 3, "pool": "mean"}
    fields = {"width": 12, "depth": 1, "attention": {"heads": 2}, "embedding": patches, "causal": False, "head": head}
    spec = validate(TransformerSpec, {**fields, "position": "learned"})
    assert len(images_for(spec, stripes(tmp_path / "fit.npz")).test) == 20
    for odd, sentence in (({"side": 9}, "takes 1 x 6 x 6"), ({"classes": 5}, "5 classes, and the model has 3")):
        with pytest.raises(TorchstoneError, match=sentence):
            images_for(spec, stripes(tmp_path / "odd.npz", **odd))


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

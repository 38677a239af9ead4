"""A run that was cut anywhere and resumed is the run that was never cut, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import tiny
from tiny import assert_same_run, assert_same_tensors, cut_after, rows_without_times
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.objectives import Batch, Facts, Objective, ObjectiveSpec, Result, Term
from torchstone.objectives.causal_lm import CausalLM
from torchstone.train.run import RunFolder
from torchstone.train.training import train

Run = Callable[..., RunFolder]


class PlayerSpec(ObjectiveSpec):
    """An objective from outside the package that owns a network, with a dropout of torch's, and a running average."""

    kind: ClassVar[str] = "player_of_a_test"
    offered: ClassVar[bool] = False

    def build(self, facts: Facts) -> Objective:
        return Player()


class Player(CausalLM):
    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, model: nn.Module, batch: Batch, key: Key | None) -> Result:
        plain = super().forward(model, batch, key)
        vectors = model.embedding.weight[batch["ids"]]  # type: ignore[operator, union-attr, index]
        if key is not None:
            with torch.no_grad():
                self.mean.lerp_(vectors.mean((0, 1)), 0.1)
        score = self.critic(vectors - self.mean).square().sum()
        return Result({**plain.terms, "critic": Term(score, "tokens", 0.5)}, plain.metrics)


TWELVE: dict[str, Any] = {"steps": 12, "batch": 2, "device": "cpu", "threads": 1, "compile": "off", "log_every": 1}
HARD: dict[str, dict[str, Any]] = {
    "causal-adamw": {"trainer": {**TWELVE, "save_every": 3}, "schedule": {"kind": "cosine", "warmup": 3}},
    "masked-muon-ema-dropout-accumulate": {
        **tiny.MASKED,
        "model": {**tiny.MASKED["model"], "depth": 2, "dropout": 0.2, "drop_path": 0.2},
        "optimizer": {"kind": "muon", "lr": 0.01},
        "trainer": {**TWELVE, "save_every": 3, "accumulate": 2, "ema": 0.9},
    },
    "sgd": {
        "optimizer": {"kind": "sgd", "lr": 0.1, "nesterov": True},
        "schedule": {"kind": "multi_step"},
        "trainer": {**TWELVE, "save_every": 3},
    },
    "sgd-without-momentum": {
        "optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0},
        "trainer": {**TWELVE, "save_every": 3},
    },
    "objective-with-a-player": {
        "objective": {"kind": "player_of_a_test"},
        "trainer": {**TWELVE, "save_every": 3, "ema": 0.8, "accumulate": 2},
    },
}


@pytest.mark.parametrize("case", HARD)
def test_cut_and_resumed_equals_uncut_bit_for_bit(run: Run, case: str) -> None:
    whole = run("whole", **HARD[case])
    for steps in (7, 10):  # twice: the second time it had itself been resumed
        with cut_after(steps):
            run("cut", resume=True, **HARD[case])
    assert_same_run(run("cut", resume=True, **HARD[case]), whole)


def test_cut_before_the_first_checkpoint_starts_over(run: Run) -> None:
    whole = run("whole")
    with cut_after(1):
        run("cut")
    again = run("cut", resume=True)
    assert_same_run(again, whole)
    assert [row["step"] for row in again.metrics()] == [0, 1, 2, 3, 4, 4, 4]


def test_cut_between_checkpoint_and_publication_publishes_on_resume(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("whole")

    def cut(self: RunFolder, checkpoint: Path) -> None:
        if checkpoint.name == "step-00000004":
            raise tiny.Cut
        real(self, checkpoint)

    real = RunFolder.publish
    with monkeypatch.context() as patch, pytest.raises(tiny.Cut):
        patch.setattr(RunFolder, "publish", cut)
        run("cut")
    assert_same_run(run("cut", resume=True), whole)


def test_resume_of_a_finished_run_changes_nothing_but_says_so(
    run: Run, recipe: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = run()
    before = tiny.listing(finished.path)
    train(recipe(), out=finished.path, resume=True)
    assert "finished at step 4" in capsys.readouterr().err
    assert tiny.listing(finished.path) == before


def test_a_constant_schedule_may_be_extended_and_then_equals_the_long_run(run: Run) -> None:
    def steps(number: int) -> dict[str, Any]:
        return {"trainer": {**TWELVE, "steps": number, "save_every": 4}, "evaluate": {"every": 4, "blocks": 2}}

    long = run("long", **steps(8))
    run("short", **steps(4))
    extended = run("short", resume=True, **steps(8))
    assert_same_tensors(extended.path / "model.safetensors", long.path / "model.safetensors")
    assert extended.recipe.trainer.steps == 8
    tested = [row["step"] for row in extended.metrics() if "test_loss" in row]
    assert tested == [4, 8]


def test_wsd_may_be_extended_before_its_fall(run: Run) -> None:
    def sections(number: int) -> dict[str, Any]:
        return {
            "schedule": {"kind": "wsd", "decay": 0.25, "warmup": 1},
            "trainer": {**TWELVE, "steps": number, "save_every": 4},
        }

    whole = run("whole", **sections(16))
    with cut_after(7):
        run("cut", **sections(12))
    extended = run("cut", resume=True, **sections(16))
    assert_same_tensors(extended.path / "model.safetensors", whole.path / "model.safetensors")


def test_other_steps_under_a_schedule_that_falls_are_refused(run: Run) -> None:
    run(schedule={"kind": "cosine"})
    with pytest.raises(TorchstoneError, match=r"trainer\.steps: 8 cannot continue a run of 4.*cosine.*step 2"):
        run(resume=True, schedule={"kind": "cosine"}, trainer={**TWELVE, "steps": 8, "save_every": 2})


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "lr": ({"optimizer": {"lr": 0.5}}, r"optimizer\.lr \(0\.5 here, 0\.001 there\)"),
    "seed": ({"trainer": {**TWELVE, "steps": 4, "save_every": 2, "seed": 7}}, r"trainer\.seed"),
    "batch": ({"trainer": {**TWELVE, "steps": 4, "save_every": 2, "batch": 3}}, r"trainer\.batch"),
    "ffn": ({"model": {**tiny.MODEL, "ffn": {"kind": "swiglu", "hidden": 24}}}, r"model\.ffn\.kind"),
    "depth": ({"model": {**tiny.MODEL, "depth": 2}}, r"model\.depth \(2 here, 1 there\)"),
    "kind": ({"optimizer": {"kind": "muon"}}, r"optimizer\.kind"),
    "objective": (tiny.MASKED, r"model\.causal \(False here, True there\)"),
    "vocabulary": ({"model": {**tiny.MODEL, "vocabulary": 300}}, r"model\.vocabulary \(300 here, 259 there\)"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a finished run, its text and its cache."""
    folder = tmp_path_factory.mktemp("finished")
    train(tiny.recipe(folder), out=folder / "run", quiet=True)
    return folder


@pytest.mark.parametrize("what", DIFFERENT)
def test_another_recipe_is_refused_and_the_fields_are_named(finished: Path, what: str) -> None:
    before = tiny.listing(finished)
    sections, message = DIFFERENT[what]
    with pytest.raises(TorchstoneError, match=rf"--resume needs the run's own recipe; different: .*{message}"):
        train(tiny.recipe(finished, **sections), out=finished / "run", resume=True, quiet=True)
    assert tiny.listing(finished) == before


def test_bookkeeping_may_change_on_resume(run: Run) -> None:
    whole = run("whole")
    with cut_after(3):
        run("cut")
    other = {**TWELVE, "steps": 4, "save_every": 1, "log_every": 2, "keep_last": 5}
    again = run("cut", resume=True, trainer=other, evaluate={"every": 1, "blocks": 1})
    assert_same_tensors(again.path / "model.safetensors", whole.path / "model.safetensors")


def test_another_text_is_refused(run: Run, tmp_path: Path) -> None:
    folder = run()
    tiny.text(tmp_path / "corpus.txt", lines=121)
    before = tiny.listing(folder.path)
    with pytest.raises(TorchstoneError, match="the corpus changed since the run began"):
        run(resume=True)
    assert tiny.listing(folder.path) == before


def test_threads_and_versions_that_differ_are_said_to_break_bitwise_equality(
    run: Run, recipe: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    facts = run().path / "environment.json"
    facts.write_text(facts.read_text().replace('"threads": 1', '"threads": 3'))
    train(recipe(), out=facts.parent, resume=True)
    assert "threads 3 -> 1" in capsys.readouterr().err


def test_rows_after_the_checkpoint_are_written_anew(run: Run) -> None:
    with cut_after(4):
        run("cut")
    folder = run("cut", resume=True)
    steps = [row["step"] for row in rows_without_times(folder) if "loss" in row]
    assert steps == [1, 2, 3, 4]

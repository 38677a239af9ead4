"""Processes that are stopped or killed at any moment lose at most the work since the last checkpoint."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from torchstone.recipe import dump_yaml
from torchstone.train import training
from torchstone.train.run import RunFolder

STEPS = 40
pytestmark = pytest.mark.usefixtures("no_plot")


def sections(**more: Any) -> dict[str, Any]:
    trainer = {"steps": STEPS, "save_every": 2, "log_every": 1, "ema": 0.9, "accumulate": 2, **more}
    return {
        **tiny.MASKED,
        "model": {**tiny.MASKED["model"], "dropout": 0.1},
        "optimizer": {"kind": "muon", "lr": 0.01},
        "trainer": trainer,
        "evaluate": {"every": 20, "blocks": 1},
    }


def start(folder: Path, recipe: dict[str, Any], name: str, *options: str) -> subprocess.Popen[str]:
    """``torchstone train`` in a process of its own."""
    file = folder / "recipe.yaml"
    file.write_text(dump_yaml(recipe))
    command = [sys.executable, "-m", "torchstone", "train", str(file), "--out", str(folder / name), "--quiet", *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    """Return as soon as something happened or the process has ended."""
    while process.poll() is None and not happened():
        time.sleep(0.0005)


def steps_logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except (OSError, ValueError):
        return 0


def resume(folder: Path, recipe: dict[str, Any], name: str) -> RunFolder:
    return training.train(recipe, out=folder / name, resume=True, quiet=True)


@pytest.mark.parametrize(
    ("number", "status"),
    [
        pytest.param(signal.SIGINT, 130, id="SIGINT"),
        pytest.param(signal.SIGTERM, 143, id="SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_signal_writes_a_checkpoint_and_leaves_and_resume_finishes_alike(
    tmp_path: Path, recipe: Callable[..., dict[str, Any]], number: int, status: int
) -> None:
    data = recipe(**sections(save_every=1000))
    process = start(tmp_path, data, "cut")
    wait_for(process, lambda: steps_logged(tmp_path / "cut") >= 5)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert err.count("\n") == 1 and "continue with --resume" in err and out == ""
    step = int((tmp_path / "cut" / "state" / "LATEST").read_text().removeprefix("step-"))
    assert 5 <= step < STEPS and f"stopped at step {step}" in err
    whole = training.train(data, out=tmp_path / "whole", quiet=True)
    tiny.assert_same_run(resume(tmp_path, data, "cut"), whole)


@pytest.mark.slow
def test_killed_three_times_and_resumed_equals_uncut(tmp_path: Path, recipe: Callable[..., dict[str, Any]]) -> None:
    """While it starts, in the middle of writing a checkpoint, and between steps."""
    data, run = recipe(**sections()), tmp_path / "cut"
    rng = random.Random(time.time_ns())
    early, late = time.monotonic() + rng.uniform(0.5, 4), rng.randint(8, 30)
    moments: list[Callable[[], bool]] = [
        lambda: time.monotonic() > early,
        lambda: any(run.glob("state/.step-*/*")),
        lambda: steps_logged(run) >= late,
    ]
    for happened in moments:
        process = start(tmp_path, data, "cut", "--resume")
        wait_for(process, happened)
        process.kill()
        process.communicate()
    whole = training.train(data, out=tmp_path / "whole", quiet=True)
    tiny.assert_same_run(resume(tmp_path, data, "cut"), whole)
    assert not [path for path in run.rglob(".*")]


@pytest.mark.slow
def test_killed_at_twenty_moments_of_its_life_and_resumed_equals_uncut(
    tmp_path: Path, recipe: Callable[..., dict[str, Any]]
) -> None:
    tiny.text(tmp_path / "corpus.txt", lines=20_000)
    data = recipe(**sections(steps=120))
    whole = training.train(data, out=tmp_path / "whole", quiet=True)
    rng = random.Random(time.time_ns())
    fresh = {**data, "data": {**data["data"], "cache": str(tmp_path / "cache-whole-life")}}
    began = time.monotonic()
    start(tmp_path, fresh, "life").communicate()
    life = time.monotonic() - began
    killed = tries = 0
    while killed < 20 and tries < 60:  # on a busy machine one may have ended before its moment
        # each has a cache of its own: preparing the data is part of its life
        mine = {**data, "data": {**data["data"], "cache": str(tmp_path / f"cache{tries}")}}
        process, name = start(tmp_path, mine, f"run{tries}"), f"run{tries}"
        at = time.monotonic() + life * (killed + rng.random()) / 20
        wait_for(process, lambda at=at: time.monotonic() > at)  # type: ignore[misc]
        killed, tries = killed + (process.poll() is None), tries + 1
        process.kill()
        process.communicate()
        tiny.assert_same_run(resume(tmp_path, mine, name), whole)
    assert killed == 20

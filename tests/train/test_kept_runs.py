"""A run of every released format, kept as it was written, loads, resumes and gives the numbers it gave then.

``TORCHSTONE_KEEP=write pytest tests/train/test_kept_runs.py`` writes the run of today's format where none is kept yet;
a kept one is never written again.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from torchstone.train import training
from torchstone.train.migrations import FORMAT_VERSION
from torchstone.train.run import RunFolder

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
TEXT = "tests/fixtures/corpus.txt"
STEPS, MORE = 6, 12
PROMPT = "the quick brown fox"


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)  # the path of the text in the kept recipe is relative
    monkeypatch.setenv("TORCHSTONE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(training, "plot_curve", lambda *arguments: None)


def recipe_now() -> dict[str, Any]:
    """What a kept run is trained with: both optimisers, averages, dropout, accumulation."""
    return {
        "model": {**tiny.MODEL, "dropout": 0.1},
        "data": {"corpus": {"kind": "text", "path": TEXT}, "tokenizer": "bytes", "block": 16},
        "optimizer": {"kind": "muon", "lr": 0.01},
        "schedule": {"kind": "constant", "warmup": 2},
        "trainer": {"steps": STEPS, "batch": 2, "accumulate": 2, "device": "cpu", "threads": 1, "compile": "off",
                    "log_every": 1, "save_every": 3, "keep_last": 1, "ema": 0.5},
        "evaluate": {"every": 3, "blocks": 4},
    }  # fmt: skip


def numbers(folder: RunFolder, more: RunFolder) -> dict[str, Any]:
    """Logits of the kept weights, and losses of the steps after."""
    ids = torch.tensor([folder.tokenizer().encode(PROMPT)])[:, :16]
    with torch.no_grad():
        logits = {weights: folder.model(weights)(ids).logits[0, -1, :32].tolist() for weights in ("last", "ema")}
    rows = [{name: row[name] for name in ("step", "loss", "valid_loss", "test_loss", "grad_norm") if name in row}
            for row in more.metrics()]  # fmt: skip
    return {"logits": logits, "rows": rows}


def resumed(kept: Path, tmp_path: Path) -> RunFolder:
    """A copy of a kept run, trained on."""
    shutil.copytree(kept, tmp_path / "run")
    recipe = RunFolder(kept).recipe.override({"trainer": {"steps": MORE}})
    return training.train(recipe, out=tmp_path / "run", resume=True, quiet=True)


def test_a_run_of_todays_format_is_kept(tmp_path: Path) -> None:
    kept = FIXTURES / f"run-format-{FORMAT_VERSION}"
    if not kept.exists() and os.environ.get("TORCHSTONE_KEEP") == "write":
        folder = training.train(recipe_now(), out=kept, quiet=True)
        found = numbers(folder, resumed(kept, tmp_path))
        (FIXTURES / f"{kept.name}.json").write_text(json.dumps(found, indent=1) + "\n")
    assert RunFolder(kept).exists()
    size = sum(path.stat().st_size for path in kept.rglob("*") if path.is_file())
    assert size < 300_000


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_a_kept_run_loads_resumes_and_gives_the_same_numbers(version: int, tmp_path: Path) -> None:
    kept = FIXTURES / f"run-format-{version}"
    before = tiny.listing(kept)
    wanted = json.loads((FIXTURES / f"{kept.name}.json").read_text())
    found = numbers(RunFolder(kept), resumed(kept, tmp_path))
    for weights, logits in wanted["logits"].items():
        assert found["logits"][weights] == pytest.approx(logits, rel=1e-5, abs=1e-5)
    assert len(found["rows"]) == len(wanted["rows"])
    for ours, theirs in zip(found["rows"], wanted["rows"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert found["rows"][-1]["step"] == MORE
    assert tiny.listing(kept) == before

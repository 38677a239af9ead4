"""Child-tuning's claim of an encoder: sides of a task share no file, tuning begins at the encoder's weights, and a
quick look measures every arm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from torchstone.keys import Key
from torchstone.model.site import parameter_name
from torchstone.papers import child_tuning as paper
from torchstone.papers._claim import Effect
from torchstone.papers._reproduce import run_claim
from torchstone.train import RunFolder

SIZE = replace(paper._SIZES["quick"], steps=1, train=5, valid=4, test=6)
PACKAGES = 3
FILES = 10


@pytest.fixture
def taught(tmp_path: Path, monkeypatch: Any) -> RunFolder:
    """A run that saw text, and a library of packages each of whose files is one letter of its own."""
    files = iter(chr(ord("!") + n) * 600 for n in range(PACKAGES * FILES))
    library = {f"p{n}": [next(files) for _ in range(FILES)] for n in range(PACKAGES)}
    monkeypatch.setattr(paper, "_packages", lambda: library)
    model = {**tiny.MODEL, "causal": False, "context": 130, "head": "mlm"}
    return tiny.saved(tmp_path / "run", tiny.recipe(tmp_path, model=model, objective={"kind": "masked_lm"}))


def test_the_sides_of_a_task_share_no_file(taught: RunFolder) -> None:
    seen: dict[tuple[int, str], set[int]] = {}
    task = paper._Snippets(taught, SIZE, 3)
    for side, count in (("train", 5), ("valid", 4), ("test", 6)):
        split = getattr(task, side)
        assert len(split) == PACKAGES * count and split.cut == 0
        (batch,) = split.evaluation(100)
        for ids, label in zip(batch["ids"], batch["label"], strict=True):
            (letter,) = set(ids[1:-1].tolist())  # a snippet is of one file
            assert (letter - ord("!")) // FILES == label
            seen.setdefault((int(label), side), set()).add(letter)
    for label in range(PACKAGES):
        sides = [seen[label, side] for side in ("train", "valid", "test")]
        assert sum(map(len, sides)) == len(set().union(*sides))
    again, other = (paper._Snippets(taught, SIZE, seed).train.batch(Key(0), 0, 8)["ids"] for seed in (3, 4))
    assert again.equal(task.train.batch(Key(0), 0, 8)["ids"]) and not again.equal(other)


def test_tuning_begins_at_the_encoder_and_from_scratch_does_not(taught: RunFolder) -> None:
    task, weights = paper._Snippets(taught, SIZE, 3), taught.model().state_dict()
    for scratch in (False, True):
        model = task.tuned(None, 5, 1e-8, scratch)
        for name, value in model.named_parameters():
            if not name.startswith("head.") and value.dim() > 1:
                assert torch.allclose(value, weights[parameter_name(name)], atol=1e-6) is not scratch, name


@pytest.mark.slow
def test_a_quick_look_measures_every_arm() -> None:
    found = run_claim(paper.ENCODER)
    arms = {cell["arm"] for cell in found.cells}
    assert arms == {*paper._ARMS, "from scratch"}
    assert {arm for gate in paper.ENCODER.gates if isinstance(gate, Effect) for arm in gate.needs} <= arms
    assert all(0 <= cell["value"] <= 1 for cell in found.cells)

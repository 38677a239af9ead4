"""The planted preference: its pairs obey the rule, and only train is shuffled for the sabotage arm."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from torchstone.data.preferences import Pairs, PreferencesDataSpec
from torchstone.papers import _preferences
from torchstone.papers._claim import decide_claim
from torchstone.papers._preferences import PLANTED_PREFERENCE, ShuffledSpec


def liked(prompt: str, response: str) -> int:
    """Written here anew: letters of a to d after a plus, of e to h after a minus."""
    return sum((letter in "abcd") == prompt.endswith("+") for letter in response)


def test_pairs_obey_the_rule_and_the_first_model_sees_none_of_it(tmp_path: Path) -> None:
    size = replace(_preferences._SIZES["quick"], pairs=500)
    _preferences._write(tmp_path, size, 3)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == 500
    assert all(liked(row["prompt"], row["chosen"]) > liked(row["prompt"], row["rejected"]) for row in rows)
    texts = [json.loads(line)["text"] for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    mean = sum(liked(text[:4], text[4:10]) for text in texts) / len(texts)
    assert mean == pytest.approx(3, abs=0.2)


def test_a_coin_decides_for_train_alone(tmp_path: Path) -> None:
    size = replace(_preferences._SIZES["quick"], pairs=600)
    _preferences._write(tmp_path, size, 4)
    given: dict[str, Any] = {"path": str(tmp_path / "pairs.jsonl"), "block": 12, "cache": str(tmp_path / "cache")}
    true, shuffled = (spec(**given, tokenizer="bytes").prepare() for spec in (PreferencesDataSpec, ShuffledSpec))

    def ids(split: Pairs) -> torch.Tensor:
        return torch.cat([batch["ids"] for batch in split.evaluation(50)])

    for name in ("valid", "test"):
        assert torch.equal(ids(getattr(true, name)), ids(getattr(shuffled, name)))
    ours, theirs = ids(true.train), ids(shuffled.train)
    same = (ours == theirs).flatten(1).all(1)
    assert torch.equal(ours[~same].flip(1), theirs[~same])
    assert same.double().mean().item() == pytest.approx(0.5, abs=0.08)


@pytest.mark.slow
def test_the_claim_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = replace(_preferences._SIZES["quick"], first_steps=3, steps=3, pairs=400)
    monkeypatch.setitem(_preferences._SIZES, "quick", tiny)
    assert PLANTED_PREFERENCE.run is not None
    measured = PLANTED_PREFERENCE.run("quick", 5)
    values = {arm: [*found.values()] for arm, found in measured.values.items()}
    verdict, rows = decide_claim(PLANTED_PREFERENCE, measured.numbers, values)
    assert verdict != "holds" and len(rows) == 3
    assert measured.numbers["KL of the policy from the reference, nats a response"] > 0

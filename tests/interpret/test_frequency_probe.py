"""The probe of frequencies: chance where there is nothing, one where there is; the same as a naive fit; the verb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tiny
from torchstone.errors import TorchstoneError
from torchstone.interpret.frequency import _logistic, nearest_popular, probe_accuracy
from torchstone.keys import Key


def test_a_probe_finds_what_is_there_and_nothing_else() -> None:
    generator = Key(0).generator()
    side = (torch.arange(300) % 3 > 0).long()
    plain = torch.randn(300, 8, generator=generator)
    by_chance = [probe_accuracy(torch.randn(300, 8, generator=generator), side, Key(n)) for n in range(20)]
    assert abs(sum(by_chance) / 20 - 0.5) < 0.03
    told = plain.clone()
    told[:, 3] += 8.0 * side
    assert probe_accuracy(told, side, Key(1)) > 0.99
    # words of neither side are never looked at, and neither scale nor place of the table matters
    other = torch.cat([told, torch.full((5, 8), torch.nan)])
    sides = torch.cat([side, torch.full((5,), -1)])
    assert probe_accuracy(5 * other - 3, sides, Key(1)) == probe_accuracy(told, side, Key(1))
    with pytest.raises(TorchstoneError, match="4 words are too few for 5 folds"):
        probe_accuracy(plain[:20], (torch.arange(20) >= 4).long(), Key(0))


def test_the_regression_is_the_least_of_its_balanced_loss() -> None:
    x = torch.cat([torch.ones(40, 1), torch.randn(40, 3, generator=Key(0).generator())], 1).double()
    y = (torch.arange(40) >= 10).double()

    def loss(w: torch.Tensor) -> torch.Tensor:
        each = F.binary_cross_entropy_with_logits(x @ w, y, reduction="none")
        return 0.5 * (each[y == 0].mean() + each[y == 1].mean()) + 0.005 * w[1:].square().sum()

    found = _logistic(x, y, 0.01)
    assert torch.autograd.functional.jacobian(loss, found).abs().max() < 1e-9


def test_nearest_popular_by_a_loop() -> None:
    table, side = torch.randn(30, 6, generator=Key(2).generator()), (torch.arange(30) % 3).clamp(max=1)
    side[7] = -1
    expected = [
        max((p for p in range(30) if side[p] == 0), key=lambda p: float(F.cosine_similarity(table[p], table[r], dim=0)))
        for r in range(30)
        if side[r] == 1
    ]
    assert nearest_popular(table, side).tolist() == expected


def test_the_verb(tmp_path: Path, cli: Any) -> None:
    tiny.saved(tmp_path / "run", tiny.recipe(tmp_path))
    said = cli("interpret", "frequency", tmp_path / "run", "--popular", "12", "--words", "3", "--json")
    assert said.status == 0, said.err
    report = json.loads(said.out)
    assert (report["popular"], len(report["nearest"])) == (12, 3) and 0 <= report["probe_accuracy"] <= 1
    assert "nearest popular" in cli("interpret", "frequency", tmp_path / "run").out
    said = cli("interpret", "frequency", tmp_path / "run", "--popular", "5000")
    assert said.status and "popular is 5,000" in said.err

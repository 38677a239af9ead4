"""The controls of the claims, and a claim of which a step is taken."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from torchstone.model.bank import Bank
from torchstone.papers import find_paper, longmem
from torchstone.papers._claim import Effect, decide_claim


def test_the_sabotage_looks_things_up_in_the_memory_of_the_row_beside() -> None:
    k = torch.randn(3, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    plain, shuffled = Bank(3, 2, 8, tokens=32), longmem.ShuffledBank(3, 2, 8, tokens=32)
    for bank in (plain, shuffled):
        bank.hold(k, -k, None)
        bank.commit()
        bank.forget([0])
    q = torch.randn(3, 4, 5, 8, generator=torch.Generator().manual_seed(1))
    wanted, _ = plain.reader([1, 2, 0]).attend(q, 2, scale=0.3)
    found, has = shuffled.attend(q, 2, scale=0.3)
    assert torch.equal(found, wanted) and has.tolist() == [True, True, False]


def test_arms_differ_in_what_the_claim_says_and_nothing_else() -> None:
    size = longmem._SIZES["evidence"]
    memory, without = (longmem._adapted(size, 3, "run", arm, 0.02) for arm in ("memory", "no memory"))  # type: ignore[arg-type]
    assert memory["data"].pop("forget") == "document" and without["data"].pop("forget") == "segment"
    assert memory == without
    tuned = longmem._adapted(size, 3, "run", "tuned", 0.02)  # type: ignore[arg-type]
    assert "adapt" not in tuned
    tokens = [each["data"]["block"] * each["trainer"]["batch"] for each in (memory, tuned)]
    assert tokens[0] == tokens[1] and tuned["data"]["block"] == 2 * memory["data"]["block"]
    assert memory["data"]["nearest"] >= 2 * tuned["data"]["block"]


@pytest.mark.slow
def test_the_claim_measures_every_arm_of_its_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    least = dataclasses.replace(longmem._SIZES["quick"], backbone_steps=2, steps=2, seeds=1, documents=1)
    monkeypatch.setitem(longmem._SIZES, "quick", least)
    claim = find_paper("longmem").claim("facts-far-apart")
    assert claim is not None and claim.run is not None
    found = claim.run("quick", 0).values
    for gate in claim.gates:
        assert isinstance(gate, Effect) and all(math.isfinite(found[arm][0]) for arm in gate.needs)
    assert {"frozen", "tuned", "frozen: bits", "tuned: bits"} < found.keys()
    assert found["memory: bits"][0] != found["no memory: bits"][0] != found["no memory again: bits"][0]
    values = {arm: [*each.values()] for arm, each in found.items()}
    assert decide_claim(claim, {}, values)[0] != "not discriminating"

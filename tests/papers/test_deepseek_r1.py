"""The claims of DeepSeek-R1 and of routing replay: identities hold, and the tasks are what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from torchstone.papers import deepseek_r1, r3
from torchstone.papers._claim import Claim, decide_claim


@pytest.mark.parametrize("claim", [deepseek_r1.EXACT, r3.EXACT], ids=lambda claim: claim.id)
def test_identities_hold(claim: Claim) -> None:
    assert claim.run is not None
    measured = claim.run("quick", 3)
    verdict, rows = decide_claim(claim, measured.numbers, {})
    assert verdict == "holds" and len(rows) == len(claim.gates)


def test_texts_follow_one_machine_and_a_part_of_them_thinks(tmp_path: Path) -> None:
    size = replace(deepseek_r1._SIZES["quick"], texts=1_000)
    deepseek_r1._write(tmp_path, size, 3)
    texts = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    known: dict[tuple[str, str], str] = {}
    chains = [row for row in texts if not row["response"].startswith(".")]
    for row in chains:
        states = row["prompt"][0] + row["response"].replace(".", "")
        for state, symbol, after in zip(states[:-1], row["prompt"][1:-1], states[1:], strict=True):
            assert known.setdefault((state, symbol), after) == after  # one table
    assert len(chains) / len(texts) == pytest.approx(0.3, abs=0.05)
    rows = [json.loads(line) for line in (tmp_path / "valid.jsonl").read_text().splitlines()]
    for row in [*rows, *({**row, "answer": row["response"][-1]} for row in texts)]:
        state = row["prompt"][0]
        for symbol in row["prompt"][1:-1]:
            state = known[state, symbol]
        assert state == row["answer"]


@pytest.mark.slow
def test_the_claim_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = replace(deepseek_r1._SIZES["quick"], first_steps=3, steps=2, texts=300, measured=20)
    monkeypatch.setitem(deepseek_r1._SIZES, "quick", tiny)
    assert deepseek_r1.THINKS.run is not None
    measured = deepseek_r1.THINKS.run("quick", 5)
    verdict, rows = decide_claim(
        deepseek_r1.THINKS, measured.numbers, {a: [*v.values()] for a, v in measured.values.items()}
    )
    assert verdict != "holds" and len(rows) == 3

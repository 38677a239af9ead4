"""The claims of DeepSeek-R1 and of routing replay: identities hold, and the tasks are what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from torchstone.papers import deepseek_r1, r3
from torchstone.papers._claim import Claim, decide_claim
from torchstone.rl.reward.language import LanguageSpec
from torchstone.rl.trajectory import read
from torchstone.spec import validate
from torchstone.train import training


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


def test_states_between_are_written_in_two_alphabets_and_nothing_else_is(tmp_path: Path) -> None:
    size = replace(deepseek_r1._SIZES["quick"], texts=1_000)
    deepseek_r1._write(tmp_path, size, 3, mixed=True)
    texts = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    chains, answers = zip(*(row["response"].split(".") for row in texts), strict=True)
    symbols = "".join(chains)
    assert sum(symbol in "vwxyz" for symbol in symbols) / len(symbols) == pytest.approx(0.5, abs=0.05)
    assert set(symbols) == set("01234vwxyz") and set(answers) == set("01234")
    known: dict[tuple[str, str], str] = {}
    for row in texts:
        states = row["prompt"][0] + row["response"].replace(".", "").translate(str.maketrans("vwxyz", "01234"))
        if len(states) > 2:
            for state, symbol, after in zip(states[:-1], row["prompt"][1:-1], states[1:], strict=True):
                assert known.setdefault((state, symbol), after) == after  # in either alphabet, one table


def test_the_consistency_that_is_rewarded_is_that_of_the_chain() -> None:
    rule = validate(LanguageSpec, {k: v for k, v in deepseek_r1._CONSISTENCY.items() if k != "kind"}).build()
    for text, wanted in (("01234.0", 1.0), ("0w2z4.0", 0.6), ("vwxyz.0", 0.0), (".0", 0.0), ("01234", 0.0)):
        assert rule(text, {}) == wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    "claim", [deepseek_r1.THINKS, deepseek_r1.DISTILS, deepseek_r1.CONSISTENT], ids=lambda claim: claim.id
)
def test_claims_run(claim: Claim, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a teacher that has learned nothing: what would be kept of its answers is written for it."""

    def kept(dump: Path, out: Path) -> dict[str, int]:
        prompts = [json.loads(line) for line in (out.parent / "prompts.jsonl").read_text().splitlines()]
        right = [{"prompt": row["prompt"], "response": f".{row['answer']}"} for row in prompts]
        out.write_text("".join(json.dumps(row) + "\n" for row in right))
        assert len(read(dump)[0]) == len(right)
        return {"kept": len(right)}

    tiny = replace(deepseek_r1._SIZES["quick"], first_steps=3, steps=2, texts=300, prompts=64, measured=8)
    monkeypatch.setitem(deepseek_r1._SIZES, "quick", tiny)
    monkeypatch.setattr(training, "plot_curve", lambda *arguments: None)
    monkeypatch.setattr(deepseek_r1, "_LEAST", 3)
    monkeypatch.setattr(deepseek_r1, "filter_dump", kept)
    assert claim.run is not None
    measured = claim.run("quick", 5)
    verdict, rows = decide_claim(claim, measured.numbers, {a: [*v.values()] for a, v in measured.values.items()})
    assert verdict != "holds" and len(rows) == len(claim.gates)
    assert measured.numbers.get("tokens of the student's policy, for each of its teacher's", 1.0) >= 1.0

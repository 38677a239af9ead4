"""Prompts: rows, splits and batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.rl.data.prompts import PreparedPrompts, PromptsDataSpec
from torchstone.spec import validate


def prepared(folder: Path, **fields: Any) -> PreparedPrompts:
    path = folder / "sums.jsonl"
    if not path.exists():
        tiny.sums(path)
    usual = {"path": str(path), "tokenizer": "bytes", "block": 24, "cache": str(folder / "cache")}
    return validate(PromptsDataSpec, {**usual, **fields}).prepare()


def test_splits_hold_every_prompt_once_under_one_numbering(tmp_path: Path) -> None:
    found = prepared(tmp_path)
    numbers = [number for split in (found.train, found.valid, found.test) for number in split.numbers.tolist()]
    assert sorted(numbers) == list(range(100)) == list(found.rows)
    assert min(len(split) for split in (found.train, found.valid, found.test)) > 0
    (batch,) = found.valid.evaluation(100)
    for ids, valid, number in zip(batch["ids"], batch["valid"], batch["example"].tolist(), strict=True):
        separator = found.tokenizer.separator
        assert ids[valid].tolist() == [separator, *found.tokenizer.encode(found.rows[number]["prompt"])]
        assert found.rows[number]["answer"] == str(eval(found.rows[number]["prompt"][:-1]))


def test_an_epoch_sees_each_prompt_once_over_micro_batches_and_ranks(tmp_path: Path) -> None:
    train = prepared(tmp_path).train
    size = len(train) // 4
    parts = [train.batch(Key(0), 0, size, micro, 2, rank, 2) for micro in range(2) for rank in range(2)]
    seen = torch.cat([part["example"] for part in parts]).tolist()
    assert len(set(seen)) == 4 * size and set(seen) <= set(train.numbers.tolist())
    again = train.batch(Key(0), 0, size, 1, 2, 1, 2)
    assert all(torch.equal(again[name], parts[3][name]) for name in again)


def test_files_of_their_own_are_valid_and_test(tmp_path: Path) -> None:
    for name, count in (("v", 3), ("t", 2)):
        rows = [{"question": f"{name}{n}", "n": n} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"question": f"q{n}"}) + "\n" for n in range(30)))
    found = prepared(tmp_path, path=str(tmp_path / "own.jsonl"), valid=str(tmp_path / "v.jsonl"),
                     test=str(tmp_path / "t.jsonl"), prompt="question", template="Q: {prompt}\nA:")  # fmt: skip
    assert [len(split) for split in (found.train, found.valid, found.test)] == [30, 3, 2]
    (batch,) = found.test.evaluation(9)
    assert [found.rows[n] for n in batch["example"].tolist()] == [{"question": f"t{n}", "n": n} for n in range(2)]
    assert found.tokenizer.decode(batch["ids"][0][batch["valid"][0]].tolist()) == "Q: t0\nA:"


def test_what_is_wrong_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(TorchstoneError, match=r"sums.jsonl' line 1: no field 'question'; fields: prompt, answer"):
        prepared(tmp_path, prompt="question")
    with pytest.raises(TorchstoneError, match=r"train has no prompt; .* left out: 100 that leave no room in 5 tokens"):
        prepared(tmp_path, block=5)
    with pytest.raises(TorchstoneError, match=r"template: needs \{prompt\} once"):
        prepared(tmp_path, template="A:")

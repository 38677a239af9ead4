"""Responses: rows of a prompt and what is learned of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from torchstone.data.responses import PreparedResponses, ResponsesDataSpec
from torchstone.errors import TorchstoneError
from torchstone.spec import validate


def prepared(folder: Path, rows: list[dict[str, Any]] | None = None, **fields: Any) -> PreparedResponses:
    file = folder / "rows.jsonl"
    usual = [{"prompt": f"{n}?", "response": "yes" * (n % 3 + 1)} for n in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in (usual if rows is None else rows)))
    settings = {"path": str(file), "tokenizer": "bytes", "block": 14, "cache": str(folder / "cache"), **fields}
    return validate(ResponsesDataSpec, settings).prepare()


def test_the_response_and_its_end_are_targets_and_nothing_else(tmp_path: Path) -> None:
    found = prepared(tmp_path)
    separator, decode = found.tokenizer.separator, found.tokenizer.decode
    assert len(found.train) + len(found.valid) + len(found.test) == 60 and min(len(found.valid), len(found.test)) > 0
    for batch in found.train.evaluation(7):
        for ids, after, valid in zip(batch["ids"], batch["next"], batch["valid"], strict=True):
            row, targets = ids[valid].tolist(), after[after >= 0].tolist()
            prompt, response = decode(row).split("?")
            assert row[0] == separator and targets == [*found.tokenizer.encode(response), separator]
            assert (after[: len(prompt) + 1] == -100).all() and (after[~valid] == -100).all()


def test_what_is_too_long_loses_its_beginning_or_is_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": "a" * 20 + "b", "response": "c"}] * 9 + [{"prompt": "a", "response": "c" * 14}]
    found = prepared(tmp_path, rows)
    (batch,) = found.train.evaluation(20)
    assert batch["ids"].shape[1] == 14 and found.tokenizer.decode(batch["ids"][0].tolist()) == "a" * 11 + "bc"
    assert "9 prompts cut; left out: 1 of 14 tokens or more" in found.description
    with pytest.raises(TorchstoneError, match="train has no response"):
        prepared(tmp_path, rows[-1:])
    with pytest.raises(TorchstoneError, match="no field 'answer'"):
        prepared(tmp_path, response="answer")

"""Preferences as data: rows of pairs, what is cut and left out, sides by the prompt, and rows that are none."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from torchstone.data.preferences import PreferencesDataSpec, PreparedPreferences
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.spec import validate

SEPARATOR, PAD = 256, 258
Made = Callable[..., PreparedPreferences]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    def prepare(rows: Sequence[Any], **fields: Any) -> PreparedPreferences:
        file = tmp_path / "pairs.jsonl"
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        given = {"path": str(file), "tokenizer": "bytes", "block": 16, "cache": str(tmp_path / "cache"), **fields}
        return validate(PreferencesDataSpec, given).prepare()

    return prepare


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def many(count: int) -> list[dict[str, str]]:
    return [pair(f"{number}?", f"y{number}", f"n{number}") for number in range(count)]


def texts(split: Any) -> list[list[tuple[str, str]]]:
    """Of each pair both rows: what is read, and what is asked for."""

    def text(ids: torch.Tensor) -> str:
        return "".join({SEPARATOR: "|", PAD: "_"}.get(token) or chr(token) for token in ids.tolist())

    return [
        [(text(ids[valid]), text(after[after >= 0])) for ids, after, valid in zip(*three, strict=True)]
        for batch in split.evaluation(3)
        for three in zip(batch["ids"], batch["next"], batch["valid"], strict=True)
    ]


def test_a_pair_is_two_rows_of_one_prompt(made: Made) -> None:
    prepared = made([pair("ab?", "yes", "n")])
    assert texts(prepared.train) == [[("|ab?yes", "yes|"), ("|ab?n", "n|")]]
    batch = next(prepared.train.evaluation(1))
    assert batch["ids"].shape == batch["next"].shape == batch["valid"].shape == (1, 2, 16)
    assert (batch["ids"][~batch["valid"]] == PAD).all() and (batch["next"][~batch["valid"]] == -100).all()
    assert (batch["ids"][..., 1:] == batch["next"][..., :-1])[batch["next"][..., :-1] >= 0][:-1].any()
    assert prepared.tokenizer.separator == SEPARATOR and len(prepared.valid) == 0


def test_long_prompts_lose_their_beginning_for_both_and_long_responses_are_counted(made: Made) -> None:
    rows = [
        pair("0123456789", "abcdefgh", "x"),
        pair("p", "a" * 15, "b"),
        pair("p", "b", "a" * 16),
        pair("p", "same", "same"),
    ]
    prepared = made(rows)
    found = sorted(each for split in (prepared.train, prepared.valid, prepared.test) for each in texts(split))
    assert found == [
        [("|3456789abcdefgh", "abcdefgh|"), ("|3456789x", "x|")],
        [("|" + "a" * 15, "a" * 15 + "|"), ("|b", "b|")],  # no room for a prompt is room enough
    ]
    assert "4 pairs" in prepared.description and "2 prompts cut" in prepared.description
    assert "left out: 1 pairs with a response of 16 tokens or more, 1 whose responses" in prepared.description


def test_nothing_left_to_train_on_is_refused(made: Made) -> None:
    with pytest.raises(TorchstoneError, match=r"data: train has no pair of preferences; .* 0 pairs"):
        made([])
    with pytest.raises(TorchstoneError, match=r"left out: 1 pairs with a response of 4 tokens or more"):
        made([pair("p", "long", "x")], block=4)


def test_sides_are_decided_by_the_prompt_alone(made: Made) -> None:
    rows = many(600)
    twice = [*rows, *({**row, "chosen": "other"} for row in rows)]

    def sides(prepared: PreparedPreferences) -> dict[str, str]:
        return {
            rows[0][0].split("?")[0]: name
            for name in ("train", "valid", "test")
            for rows in texts(getattr(prepared, name))
        }

    few, more = sides(made(rows[:400])), sides(prepared := made(twice))
    assert len(prepared.train) + len(prepared.valid) + len(prepared.test) == 1200
    assert {prompt: more[prompt] for prompt in few} == few  # more prompts move no others
    shares = [list(more.values()).count(name) / 600 for name in ("train", "valid", "test")]
    assert shares == pytest.approx([0.9, 0.05, 0.05], abs=0.03)
    prompts = [{rows[0][0][:-2] for rows in texts(split)} for split in (prepared.train, prepared.valid)]
    assert sum(len(getattr(prepared, name)) for name in ("valid", "test")) % 2 == 0 and prompts


def test_few_pairs_have_all_three_sides(made: Made) -> None:
    for count in (4, 12, 40):
        prepared = made(many(count))
        few = max(1, count // 20)
        assert [len(prepared.valid), len(prepared.test)] == [few, few] or count > 20
        assert len(prepared.valid) and len(prepared.test)
        assert len(prepared.train) + len(prepared.valid) + len(prepared.test) == count


def test_batches_are_functions_of_the_step(made: Made) -> None:
    train = made(many(40)).train
    key = Key(3)
    whole = train.batch(key, 2, 6)
    halves = [train.batch(key, 2, 3, micro, 2) for micro in range(2)]
    ranks = [train.batch(key, 2, 3, rank=rank, ranks=2) for rank in range(2)]
    for parts in (halves, ranks):
        for name, value in whole.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), value)
    steps = -(-len(train) // 6)
    epoch = torch.cat([train.batch(key, step, 6)["example"] for step in range(steps)])
    assert sorted(set(epoch.tolist())) == list(range(len(train)))
    limited = [number for batch in train.evaluation(2, 5) for number in batch["example"].tolist()]
    assert len(limited) == 5 and limited == sorted(set(limited))


def test_fields_have_other_names_and_files_are_globbed(made: Made, tmp_path: Path) -> None:
    names = {"prompt": "q", "chosen": "a", "rejected": "b"}
    for number in range(2):
        (tmp_path / f"part{number}.jsonl").write_text(json.dumps({"q": f"{number}?", "a": "y", "b": "n"}) + "\n\n")
    prepared = made([], path=str(tmp_path / "part*.jsonl"), **names)
    assert sorted(rows[0][0] for rows in texts(prepared.train)) == ["|0?y", "|1?y"]
    assert prepared.hash != made([pair("0?", "y", "n")]).hash


def test_a_tokenizer_is_trained_on_train(made: Made) -> None:
    rows = [pair(f"what is {number}?", "it is what it is", "no") for number in range(60)]
    prepared = made(rows, tokenizer={"kind": "bpe", "vocabulary": 270}, block=32)
    assert prepared.tokenizer.vocabulary == 270
    ids = next(prepared.train.evaluation(1))
    assert prepared.tokenizer.decode(ids["next"][0, 0][ids["next"][0, 0] >= 0].tolist()).startswith("it is what")


BAD = {
    "not JSON": ("{", r"line 2: not JSON \("),
    "no object": ("[1]", "line 2: a JSON object is needed, not list"),
    "no field": ({"prompt": "p", "chosen": "c"}, "line 2: no field 'rejected'; fields: prompt, chosen"),
    "messages": (pair("p", [{"role": "user"}], "r"), "line 2: field 'chosen' is list, a string is needed"),  # type: ignore[arg-type]
    "surrogate": ('{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', "line 2: field 'prompt' holds half of a"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_row_is_named_by_file_and_line(made: Made, what: str) -> None:
    row, message = BAD[what]
    with pytest.raises(TorchstoneError, match=rf"pairs\.jsonl' {message}"):
        made([pair("p", "a", "b"), row])


def test_missing_files_and_the_tiny_pairs(made: Made, tmp_path: Path) -> None:
    with pytest.raises(TorchstoneError, match="no such file or folder"):
        made([], path=str(tmp_path / "nothing.jsonl"))
    assert len(made([], path=str(tiny.pairs(tmp_path / "tiny.jsonl"))).train) > 30

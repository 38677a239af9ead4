"""Batches whose rows are streams: documents in order, and facts far apart, read back from the batches alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchstone.data import Prepared
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.spec import resolve, validate


@pytest.fixture
def streams(tmp_path: Path, folder: Path) -> Callable[..., Any]:
    """``streams(kind, **fields)``: data of that kind over sixty small files, prepared."""

    def make(kind: str, **fields: Any) -> Any:
        base = {"corpus": {"kind": "text", "path": str(folder)}, "tokenizer": "bytes", "cache": str(tmp_path / "cache")}
        return validate(resolve("data", kind), {**base, "block": 32, **fields}).prepare()  # type: ignore[attr-defined]

    return make


def texts(prepared: Prepared, split: str) -> list[list[int]]:
    """Documents as the tokens that a stream holds: a separator each, and the one of the next as the last target."""
    return [[256, *document.text.encode()] for document in prepared.texts(split)]


def read(batches: list[dict[str, torch.Tensor]], row: int) -> list[list[int]]:
    """What a row reads, cut where it begins anew; checks that targets are the tokens after."""
    found: list[list[int]] = []
    after = None
    for batch in batches:
        valid = batch["valid"][row]
        ids, targets = batch["ids"][row][valid].tolist(), batch["next"][row][valid].tolist()
        assert ids[1:] == targets[:-1] and (batch["next"][row][~valid] == -100).all()
        if batch["begins"][row]:
            found.append([])
        elif after is not None:
            assert after == ids[0]
        found[-1] += ids
        after = targets[-1] if targets else None
    return [piece for piece in found if piece]


def test_rows_read_documents_from_beginning_to_end(streams: Callable[..., Any]) -> None:
    prepared = streams("documents")
    train, rows = prepared.train, 3
    steps = len(train) // rows
    batches = [train.batch(Key(1), step, rows) for step in range(steps)]
    whole = {tuple(text) for text in texts(prepared, "train")}
    pieces = [read(batches, row) for row in range(rows)]
    inside = [piece for row in pieces for piece in row[1:-1]]
    assert inside and all(tuple(piece) in whole for piece in inside)
    # a row that ends within a document is gone on with by the next row
    for row in range(rows - 1):
        joined = (*pieces[row][-1], *pieces[row + 1][0])
        assert joined in whole or tuple(pieces[row][-1]) in whole
    numbers = torch.cat([batch["example"] for batch in batches])
    assert len(set(numbers.tolist())) == steps * rows > len(train) - rows
    again = train.batch(Key(1), steps, rows)
    assert again["begins"].all() and not torch.equal(again["ids"], batches[0]["ids"])


def test_a_batch_is_a_function_of_its_arguments_and_micro_batches_are_its_rows(streams: Callable[..., Any]) -> None:
    train = streams("documents").train
    for step in (9, 2, 200):
        whole = train.batch(Key(1), step, 4)
        parts = [train.batch(Key(1), step, 2, micro=m, accumulate=2) for m in range(2)]
        ranks = [train.batch(Key(1), step, 2, rank=r, ranks=2) for r in range(2)]
        for name, value in whole.items():
            assert torch.equal(value, torch.cat([part[name] for part in parts]))
            assert torch.equal(value, torch.cat([part[name] for part in ranks]))


@pytest.mark.parametrize("size", [1, 3, 50])
def test_evaluation_predicts_every_token_but_the_first_once_with_documents_whole(
    streams: Callable[..., Any], size: int
) -> None:
    prepared = streams("documents")
    split = prepared.valid
    batches = list(split.evaluation(size))
    pieces = [piece for row in range(len(batches[0]["ids"])) for piece in read(batches, row)]
    assert sorted(pieces) == sorted(texts(prepared, "valid"))
    assert sum(int((batch["next"] >= 0).sum()) for batch in batches) == split.tokens - 1
    for batch in batches:
        there = batch["next"] >= 0
        numbers = split.documents_of(batch["example"].numpy())
        for row in range(len(numbers)):
            assert len(set(numbers[row][there[row].numpy()])) <= 1


def test_a_limit_takes_documents_spread_over_the_split(streams: Callable[..., Any]) -> None:
    split = streams("documents").train
    few = list(split.evaluation(4, limit=len(split) // 4))
    numbers = [int(n) for batch in few for n in batch["example"] if n >= 0]
    assert len(split) // 8 < len(numbers) <= len(split) // 4
    documents = {int(d) for batch in few for d in split.documents_of(batch["example"].numpy())[:, 0]}
    assert max(documents) > 0.7 * split.documents
    assert sum(int(batch["valid"].any(1).sum()) for batch in split.evaluation(4, limit=1)) == 1


def test_a_row_may_forget_after_every_segment(streams: Callable[..., Any]) -> None:
    plain, always = streams("documents"), streams("documents", forget="segment")
    for step in range(5):
        one, other = (each.train.batch(Key(1), step, 3) for each in (plain, always))
        assert torch.equal(one["ids"], other["ids"]) and other["begins"].all()
    assert all(batch["begins"].all() for batch in always.valid.evaluation(2))


def test_more_rows_than_segments_are_refused(streams: Callable[..., Any]) -> None:
    with pytest.raises(TorchstoneError, match=r"the valid split has \d+ segments of 32 tokens, a step reads 9000"):
        streams("documents").valid.batch(Key(0), 0, 9000)


FACTS = {"segments": 8, "facts": 6, "asks": 2, "nearest": 60, "farthest": 150, "letters": 2, "examples": 5}


def test_what_is_asked_for_was_stated_once_at_a_distance_that_is_allowed(streams: Callable[..., Any]) -> None:
    train = streams("facts", **FACTS).train
    batches = [train.batch(Key(3), step, 4) for step in range(8)]
    assert [batch["begins"].tolist() for batch in batches] == [[True] * 4] + [[False] * 4] * 7
    for row in range(4):
        ids = np.concatenate([batch["ids"][row].numpy() for batch in batches])
        after = np.concatenate([batch["next"][row].numpy() for batch in batches])
        asked = np.flatnonzero(np.concatenate([batch["asked"][row].numpy() for batch in batches]))
        assert (after[:-1] == ids[1:]).all() and 6 < len(asked) <= 12
        names = set()
        for at in asked:  # ids[at] is "=", and the value comes next
            line = ids[at - 3 : at + 1].tolist()
            assert line[0] == 10 and line[3] == ord("=")
            where = [n for n in range(3, at) if ids[n - 3 : n + 1].tolist() == line]
            assert 1 <= len(where) <= 2 and {ids[n + 1] for n in where} == {after[at]}
            assert 60 <= at - where[-1] <= 150
            names.add(tuple(line[1:3]))
        assert 3 < len(names) <= 6


def test_facts_are_the_same_for_every_order_of_calls_and_differ_between_splits(streams: Callable[..., Any]) -> None:
    one, other = streams("facts", **FACTS), streams("facts", **FACTS)
    late = other.train.batch(Key(3), 21, 4)
    assert all(torch.equal(value, late[name]) for name, value in one.train.batch(Key(3), 21, 4).items())
    valid, test = (next(iter(split.evaluation(1))) for split in (one.valid, one.test))
    assert not torch.equal(valid["ids"], test["ids"])
    assert one.hash == other.hash != streams("facts", **{**FACTS, "seed": 1}).hash
    shown = [batch["example"] // 8 for batch in one.valid.evaluation(2)]
    assert sorted(torch.cat(shown).tolist()) == sorted([*range(5)] * 8)
    assert len(list(one.valid.evaluation(2, limit=16))) == 8


def test_accuracy_counts_the_values_that_are_asked_for(streams: Callable[..., Any]) -> None:
    split = streams("facts", **FACTS).valid
    batches = list(split.evaluation(5))
    right = sum(int(split.score(batch["next"], batch)["accuracy"][0]) for batch in batches)
    count = sum(int(split.score(batch["next"], batch)["accuracy"][1]) for batch in batches)
    wrong = sum(int(split.score(batch["next"] + batch["asked"].long(), batch)["accuracy"][0]) for batch in batches)
    assert right == count == sum(int(batch["asked"].sum()) for batch in batches) > 0 and wrong == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer": "bpe"}, "lines are laid over bytes, not over tokens of bpe"),
        ({"facts": 53, "letters": 1}, "facts: 53 need as many names, 1 letters give 52"),
        ({"farthest": 255}, "need 6 <= nearest <= farthest <= 250 in documents of 256 tokens, got 60 and 255"),
        ({"nearest": 151}, "got 151 and 150"),
        ({"segments": 4000, "farthest": 200}, "a document takes 128,000"),
    ],
)
def test_facts_that_have_no_room_are_refused(streams: Callable[..., Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TorchstoneError, match=message):
        streams("facts", **{**FACTS, **fields})


@pytest.mark.parametrize("sign", ["", " = "])
def test_a_name_and_its_value_may_have_another_sign_between_them(streams: Callable[..., Any], sign: str) -> None:
    train = streams("facts", **{**FACTS, "sign": sign}).train
    batches = [train.batch(Key(3), step, 1) for step in range(8)]
    ids, asked = (torch.cat([batch[name][0] for batch in batches]) for name in ("ids", "asked"))
    for at in (asked.nonzero()[:, 0] + 1).tolist():  # of values
        name, between, rest = (
            bytes(ids[at - n : at - m].tolist()) for n, m in ((len(sign) + 2, len(sign)), (len(sign), 0), (0, -2))
        )
        assert name.isalpha() and between == sign.encode() and rest[:1].isdigit() and rest[1:] == b"\n"
    assert asked.any()

"""Rows of several corpora by shares: exact in each cycle, a function of their number, all blocks of a source once an
epoch; measured one source after the other."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from torchstone.data.mixture import MixtureDataSpec, PreparedMixture
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.recipe import load_recipe
from torchstone.spec import validate
from torchstone.train.run import RunFolder
from torchstone.train.training import train

SHARES = {"code": 0.6, "maths": 0.1, "text": 0.3}
KEY = Key(3)


def fields(folder: Path, **more: Any) -> dict[str, Any]:
    sources = {}
    for number, (name, share) in enumerate(SHARES.items()):
        path = tiny.text(folder / f"{name}.txt", seed=number, lines=200 * (number + 1))
        sources[name] = {"corpus": {"kind": "text", "path": str(path)}, "share": share}
    return {"sources": sources, "tokenizer": "bytes", "block": 16, "cache": str(folder / "cache"), **more}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedMixture:
    return validate(MixtureDataSpec, fields(tmp_path_factory.mktemp("mixture"))).prepare()


def sources_of(prepared: PreparedMixture, rows: torch.Tensor) -> list[int]:
    """Which source each row is of, by what it says."""
    texts = [" ".join(document.text for document in part.texts("train")) for part in prepared.parts.values()]
    found = []
    for ids in rows:
        said = prepared.tokenizer.decode(ids[1:-1].tolist())
        found.append(next(number for number, text in enumerate(texts) if said in text))
    return found


def test_each_cycle_of_a_thousand_rows_has_its_shares(prepared: PreparedMixture) -> None:
    for cycle in (0, 1, 7):
        batch = prepared.train.batch(KEY, cycle, 1000)
        assert Counter(sources_of(prepared, batch["ids"])) == {0: 600, 1: 100, 2: 300}
    first, second = (prepared.train.batch(KEY, step, 1000)["example"] for step in (0, 1))
    assert not torch.equal(first, second)


def test_a_source_visits_each_of_its_blocks_once_an_epoch(prepared: PreparedMixture) -> None:
    parts = prepared.train.parts
    seen: list[list[int]] = [[] for _ in parts]
    bounds = prepared.train._first
    for step in range(300):
        for example in prepared.train.batch(KEY, step, 50)["example"].tolist():
            s = int(np.searchsorted(bounds, example, side="right")) - 1
            seen[s].append(example - int(bounds[s]))
    for s, part in enumerate(parts):
        whole = len(seen[s]) // len(part)
        assert whole >= 1, "too few rows to tell"
        for epoch in range(whole):
            assert sorted(seen[s][epoch * len(part) : (epoch + 1) * len(part)]) == list(range(len(part)))


@pytest.mark.parametrize(("size", "accumulate", "ranks"), [(3, 1, 1), (5, 4, 1), (7, 2, 3)])
def test_rows_are_those_of_their_number_however_a_step_is_cut(
    prepared: PreparedMixture, size: int, accumulate: int, ranks: int
) -> None:
    whole = size * accumulate * ranks
    for step in (0, 41, 1000 // whole):  # over the end of a cycle too
        one = prepared.train.batch(KEY, step, whole)
        cut = [
            prepared.train.batch(KEY, step, size, micro, accumulate, rank, ranks)
            for micro in range(accumulate)
            for rank in range(ranks)
        ]
        for name, value in one.items():
            assert torch.equal(torch.cat([part[name] for part in cut]), value), name


def test_measuring_goes_through_every_source(prepared: PreparedMixture) -> None:
    valid, alone = prepared.valid, [part.valid for part in prepared.parts.values()]
    batches = list(valid.evaluation(4))
    wanted = [batch for part in alone for batch in part.evaluation(4)]
    assert len(batches) == len(wanted)
    for found, batch in zip(batches, wanted, strict=True):
        assert torch.equal(found["ids"], batch["ids"]) and torch.equal(found["next"], batch["next"])
    targets = sum(int((batch["next"] >= 0).sum()) for batch in batches)
    assert targets == valid.tokens - 1 and valid.bytes == sum(part.bytes for part in alone)
    documents = np.concatenate([valid.documents_of(batch["example"].numpy()).ravel() for batch in batches])
    assert set(documents.tolist()) == set(range(valid.documents))
    assert sum(len(batch["ids"]) for batch in valid.evaluation(4, 6)) <= 6 + len(alone)


def test_one_source_can_be_what_is_measured(tmp_path: Path) -> None:
    prepared = validate(MixtureDataSpec, fields(tmp_path, held_out="text")).prepare()
    text = prepared.parts["text"]
    assert (prepared.valid.tokens, prepared.test.bytes) == (text.valid.tokens, text.test.bytes)


def test_a_tokenizer_learns_from_all_sources(tmp_path: Path) -> None:
    tokenizer = {"kind": "bpe", "vocabulary": 300}
    mixed = validate(MixtureDataSpec, fields(tmp_path, tokenizer=tokenizer)).prepare().tokenizer
    alone = fields(tmp_path, tokenizer=tokenizer)
    alone["sources"] = {"code": {**alone["sources"]["code"], "share": 1.0}}
    assert mixed.hash != validate(MixtureDataSpec, alone).prepare().tokenizer.hash


def test_a_training_on_it_stops_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def run(name: str, resume: bool = False) -> RunFolder:
        data = tiny.recipe(tmp_path)
        data["data"] = {"kind": "mixture", **fields(tmp_path)}
        return train(data, out=tmp_path / name, resume=resume, quiet=True)

    whole = run("whole")
    with tiny.cut_after(3):
        run("cut")
    tiny.assert_same_run(run("cut", resume=True), whole)


def test_a_share_can_be_overridden_and_a_source_left_out(tmp_path: Path) -> None:
    data = {"data": {"kind": "mixture", **fields(tmp_path)}}
    changed: Any = load_recipe(data, ["data.sources.code.share=0.7", "data.sources.maths=null"]).data
    assert {name: source.share for name, source in changed.sources.items()} == {"code": 0.7, "text": 0.3}
    assert changed.sources["code"].corpus.path.endswith("code.txt")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sources": {}}, "sources: a mixture has at least one"),
        ({"held_out": "prose"}, "held_out: no source 'prose'; there are code, maths, text"),
        ({"sources": {"code": {"corpus": "stdlib", "share": 0.5}}}, "shares add up to 0.5, and need to add up to 1"),
        ({"sources": {"code": {"corpus": "stdlib", "share": 0}}}, "share"),
    ],
)
def test_refusals(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(TorchstoneError, match=sentence):
        validate(MixtureDataSpec, {**fields(tmp_path), **change})

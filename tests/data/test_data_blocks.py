from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from torchstone.data import Blocks, Prepared
from torchstone.errors import TorchstoneError
from torchstone.keys import Key

KEY = Key(7).fold("data")


@pytest.fixture
def prepared(ready: Callable[..., Prepared], folder: Path) -> Prepared:
    return ready({"kind": "text", "path": str(folder)})


def stream(prepared: Prepared, split: str) -> list[int]:
    tokenizer = prepared.tokenizer
    return [
        token for document in prepared.texts(split) for token in [tokenizer.separator, *tokenizer.encode(document.text)]
    ]


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_evaluation_predicts_every_token_but_the_first_exactly_once(prepared: Prepared, split: str) -> None:
    blocks: Blocks = getattr(prepared, split)
    whole = stream(prepared, split)
    assert blocks.tokens == len(whole) and len(blocks) == len(whole) // 32
    assert blocks.bytes == sum(len(document.text.encode()) for document in prepared.texts(split))
    assert blocks.documents == len(list(prepared.texts(split)))
    inputs, targets = [], []
    for batch in blocks.evaluation(3):
        assert batch["ids"].dtype == batch["next"].dtype == batch["start"].dtype == torch.int64
        assert batch["valid"].dtype == torch.bool
        inputs += batch["ids"][batch["valid"]].tolist()
        targets += batch["next"][batch["next"] != -100].tolist()
        assert (batch["next"][~batch["valid"]] == -100).all()
        assert (batch["ids"][~batch["valid"]] == prepared.tokenizer.pad).all()
    assert targets == whole[1:]
    assert inputs == whole[: len(inputs)] and len(inputs) >= len(whole) - 1


@pytest.mark.parametrize("size", [64, 65, 66, 95, 96])
def test_the_end_of_the_stream(
    ready: Callable[..., Prepared], tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchstone.data.split._BOUNDS", (1.0, 1.0))
    (tmp_path / "x").write_text("x" * (size - 1))
    blocks = ready({"kind": "text", "path": str(tmp_path / "x")}).train
    assert blocks.tokens == size
    batches = list(blocks.evaluation(2))
    assert sum(int((batch["next"] != -100).sum()) for batch in batches) == size - 1
    assert sum(len(batch["ids"]) for batch in batches) == {64: 2, 65: 2, 66: 3, 95: 3, 96: 3}[size]


def test_start_is_where_the_document_began_within_the_block(
    prepared: Prepared, ready: Callable[..., Prepared], folder: Path
) -> None:
    separator = prepared.tokenizer.separator
    seen = 0
    for batch in prepared.train.evaluation(4):
        for ids, start, valid in zip(*(batch[name].tolist() for name in ("ids", "start", "valid")), strict=True):
            begin = 0
            for position in range(sum(valid)):
                if ids[position] == separator:
                    begin, seen = position, seen + 1
                assert start[position] == begin
    assert seen == prepared.train.documents
    joined = ready({"kind": "text", "path": str(folder)}, separate_documents=False)
    assert not any("start" in batch for batch in joined.train.evaluation(4))


def test_a_batch_is_a_pure_function_of_its_arguments(prepared: Prepared) -> None:
    first = prepared.train.batch(KEY, 3, 4)
    prepared.train.batch(KEY, 9, 4)
    again = prepared.train.batch(KEY, 3, 4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert set(first) == {"ids", "next", "start", "example"} and first["ids"].shape == (4, 32)
    assert not torch.equal(first["example"], prepared.train.batch(KEY, 4, 4)["example"])
    assert not torch.equal(first["example"], prepared.train.batch(KEY.fold("x"), 3, 4)["example"])


def test_an_epoch_visits_every_block_once_and_the_next_in_another_order(prepared: Prepared) -> None:
    count = len(prepared.train)
    order = torch.cat([prepared.train.batch(KEY, step, 1)["example"] for step in range(2 * count)])
    assert order[:count].sort().values.tolist() == list(range(count)) == order[count:].sort().values.tolist()
    assert not torch.equal(order[:count], order[count:])
    across = prepared.train.batch(KEY, 0, 2 * count)["example"]  # one batch may span epochs
    assert torch.equal(across, order)


@pytest.mark.parametrize("micro, ranks", [(1, 1), (3, 1), (1, 2), (2, 3)])
def test_micro_batches_and_ranks_share_one_batch(prepared: Prepared, micro: int, ranks: int) -> None:
    for step in (0, 5, 400):
        whole = prepared.train.batch(KEY, step, 2 * micro * ranks)
        parts = [
            prepared.train.batch(KEY, step, 2, micro=m, accumulate=micro, rank=r, ranks=ranks)
            for m in range(micro)
            for r in range(ranks)
        ]
        for name, value in whole.items():
            assert torch.equal(value, torch.cat([part[name] for part in parts]))


def test_a_block_is_the_stream_shifted_by_one(prepared: Prepared) -> None:
    whole = stream(prepared, "train")
    batch = prepared.train.batch(KEY, 0, 8)
    for ids, after, number in zip(
        batch["ids"].tolist(), batch["next"].tolist(), batch["example"].tolist(), strict=True
    ):
        assert ids == whole[32 * number : 32 * number + 32]
        assert after[:31] == ids[1:] and after[31] == [*whole, -100][32 * number + 32]


def test_a_limited_evaluation_is_spread_over_the_split(prepared: Prepared) -> None:
    numbers = torch.cat([batch["example"] for batch in prepared.train.evaluation(4, limit=10)])
    assert len(numbers) == 10 and (numbers.diff() > 0).all() and numbers[-1] > len(prepared.train) * 0.8
    assert list(prepared.train.evaluation(4, limit=0)) == []


def test_a_split_without_a_full_block_gives_no_batch(ready: Callable[..., Prepared], folder: Path) -> None:
    valid = ready({"kind": "text", "path": str(folder)}, block=8192).valid
    with pytest.raises(TorchstoneError, match=r"the valid split is shorter than one block: [\d,]+ tokens, block 8,192"):
        valid.batch(KEY, 0, 1)
    assert sum(int((batch["next"] != -100).sum()) for batch in valid.evaluation(1)) == valid.tokens - 1

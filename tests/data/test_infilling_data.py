"""Fill in the middle as data: what documents of train become, and that all else stays as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from torchstone.data import Prepared, TextDataSpec
from torchstone.data.infilling import InfillingDataSpec, Sentinels, arranged, cut, sentinels_of, with_sentinels
from torchstone.data.tokenizer import BYTE_CHARACTERS, Tokenizer, byte_level
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.spec import validate
from torchstone.train.training import train

BEGIN, HOLE, END, SEPARATOR = 259, 260, 261, 256


@pytest.fixture
def corpus(tmp_path: Path, words: Callable[[int, int], str]) -> dict[str, str]:
    root = tmp_path / "texts"
    root.mkdir()
    for number in range(300):
        text = words(number, 2) + ("zwölf € 𝄞\n" if number % 3 else "<|fim_hole|><|fim_begin|>\n")
        (root / f"{number:03}.txt").write_text(text, encoding="utf-8")
    return {"kind": "text", "path": str(root)}


@pytest.fixture
def made(tmp_path: Path, corpus: dict[str, str]) -> Callable[..., Prepared]:
    def prepare(kind: str = "infilling", **fields: Any) -> Prepared:
        fields = {"corpus": corpus, "tokenizer": "bytes", "block": 32, "cache": str(tmp_path / "cache"), **fields}
        return validate({"infilling": InfillingDataSpec, "text": TextDataSpec}[kind], fields).prepare()

    return prepare


def documents(prepared: Prepared, split: str = "train") -> list[list[int]]:
    blocks = getattr(prepared, split)
    stream, starts = blocks._stream.tolist(), [*blocks._starts.tolist(), blocks.tokens]
    assert all(stream[start] == prepared.tokenizer.separator for start in starts[:-1])
    return [stream[a + 1 : b] for a, b in pairwise(starts)]


def put_back(ids: list[int], mode: str) -> list[int]:
    """The document of an arrangement: written here anew, from the definition."""
    begin, hole, end = (ids.index(token) for token in (BEGIN, HOLE, END))
    assert begin == 0 < hole < end and sum(token > SEPARATOR for token in ids) == 3
    prefix, suffix, middle = ids[1:hole], ids[hole + 1 : end], ids[end + 1 :]
    assert mode == "psm" or not prefix
    return middle + suffix if mode == "spm" else prefix + middle + suffix


@pytest.mark.parametrize("mode", ["psm", "spm"])
@pytest.mark.parametrize("tokenizer", ["bytes", {"kind": "bpe", "vocabulary": 300}])
def test_parts_put_together_are_the_documents(made: Callable[..., Prepared], mode: str, tokenizer: Any) -> None:
    prepared = made(mode=mode, tokenizer=tokenizer)
    sentinels = sentinels_of(prepared.tokenizer)
    assert sentinels is not None and prepared.tokenizer.vocabulary == sentinels.end + 1
    texts = [document.text for document in prepared.texts("train")]
    rearranged = 0
    for ids, text in zip(documents(prepared), texts, strict=True):
        if ids[0] != sentinels.begin:
            assert ids == prepared.tokenizer.encode(text)
            continue
        rearranged += 1
        if tokenizer == "bytes":
            assert bytes(put_back(ids, mode)) == text.encode()
        else:
            prefix, suffix, middle = "".join(
                f"|{token}|" if token in sentinels else f" {token} " for token in ids
            ).split("|")[2::2]
            parts = [
                prepared.tokenizer.decode([int(word) for word in part.split()]) for part in (prefix, middle, suffix)
            ]
            assert "".join(parts) == text
    assert abs(rearranged - len(texts) / 2) < 3 * math.sqrt(len(texts) / 4)


def test_valid_and_test_are_the_plain_ones_and_so_is_train_at_rate_0(made: Callable[..., Prepared]) -> None:
    plain, none, half = made("text"), made(rate=0), made(rate=0.5)
    for split in ("train", "valid", "test"):
        assert documents(none, split) == documents(plain, split)
        assert split == "train" or documents(half, split) == documents(plain, split)
    for step in (0, 7, 100):
        ours, theirs = (found.train.batch(Key(3), step, 4) for found in (none, plain))
        assert all(torch.equal(ours[name], theirs[name]) for name in {*ours, *theirs})
    assert (half.train.bytes, half.hash) == (plain.train.bytes, plain.hash)


def test_rearranged_documents_do_not_see_each_other(made: Callable[..., Prepared]) -> None:
    """What is packed: of each sentinel in a block, its document begins at the separator before it."""
    prepared = made(rate=1)
    batch = prepared.train.batch(Key(0), 0, 8)
    seen = 0
    for ids, start in zip(batch["ids"].tolist(), batch["start"].tolist(), strict=True):
        for at, token in enumerate(ids):
            if token > SEPARATOR:
                seen += 1
                own = max((i for i in range(at) if ids[i] == SEPARATOR), default=0)
                assert start[at] == own
    assert seen > 8


def test_every_token_is_a_target(made: Callable[..., Prepared]) -> None:
    batch = made(rate=1).train.batch(Key(0), 0, 8)
    assert torch.equal(batch["next"][:, :-1], batch["ids"][:, 1:])


def test_cuts_are_uniform_and_a_function_of_the_text() -> None:
    texts = [f"{number:05}ö€" for number in range(4000)]
    parts = [cut(text, 1.0) for text in texts]
    assert parts == [cut(text, 1.0) for text in texts] and all(
        "".join(p) == t for p, t in zip(parts, texts, strict=True)
    )
    low = np.bincount([len(prefix) for prefix, _, _ in parts], minlength=8) / 4000
    wanted = np.array([sum(min(a, b) == at for a in range(8) for b in range(8)) / 64 for at in range(8)])
    assert np.abs(low - wanted).max() < 0.03
    assert cut("", 1.0) == ("", "", "") and cut("x", 0.0) == ("x",)


def test_an_arrangement_without_its_middle_is_its_beginning() -> None:
    sentinels = Sentinels(7, 8, 9)
    for mode in ("psm", "spm"):
        whole = arranged(sentinels, mode, [1, 2], [3], [4, 5])  # type: ignore[arg-type]
        asked = arranged(sentinels, mode, [1, 2], [3])  # type: ignore[arg-type]
        assert whole == [*asked, 4, 5]
    assert arranged(sentinels, "psm", [1, 2], [3], [4]) == [7, 1, 2, 8, 3, 9, 4]
    assert arranged(sentinels, "spm", [1, 2], [3], [4]) == [7, 8, 3, 9, 1, 2, 4]


def test_chunks_are_documents_that_make_up_the_text(made: Callable[..., Prepared]) -> None:
    prepared = made(chunk=20, mode="psm")
    whole = [put_back(ids, "psm") if ids[0] == BEGIN else ids for ids in documents(prepared)]
    texts = [document.text for document in prepared.texts("train")]
    assert bytes(token for ids in whole for token in ids) == "".join(texts).encode()
    assert max(len(bytes(ids).decode()) for ids in whole) == 20
    assert documents(prepared, "valid") == documents(made("text"), "valid")


# -------------------------------------------------------------------------------------------------------- tokenizers


def named(*names: str, special: bool = True) -> Tokenizer:
    tokenizer = byte_level({character: value for value, character in enumerate(BYTE_CHARACTERS)})
    (tokenizer.backend.add_special_tokens if special else tokenizer.backend.add_tokens)(list(names))
    return Tokenizer(tokenizer.backend, tokenizer.config)


@pytest.mark.parametrize(
    "names",
    [
        ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ],
)
@pytest.mark.parametrize("special", [True, False])
def test_published_sentinels_are_known_and_text_is_text(names: tuple[str, ...], special: bool) -> None:
    plain = named(*names, special=special)
    tokenizer = with_sentinels(plain)
    assert sentinels_of(tokenizer) == sentinels_of(plain) == (259, 260, 261) and tokenizer.vocabulary == 262
    text = "".join(names)
    assert tokenizer.encode(text) == list(text.encode()) and tokenizer.decode([259, 97, 260]) == "a"
    assert sentinels_of(byte_level({character: value for value, character in enumerate(BYTE_CHARACTERS)})) is None


def test_the_vocabulary_is_known_before_any_text_is_read(tmp_path: Path) -> None:
    def size(**tokenizer: Any) -> int | None:
        return validate(InfillingDataSpec, {"tokenizer": tokenizer}).vocabulary

    named("<fim_prefix>", "<fim_suffix>", "<fim_middle>").save(tmp_path)
    assert size(kind="bytes") == 262 and size(kind="bpe", vocabulary=512) == 515
    assert size(kind="file", path=str(tmp_path)) == 262


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.slow
def test_a_training_is_cut_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    data = {"kind": "infilling", "chunk": 40}
    recipe = tiny.recipe(tmp_path, data=data)
    whole = train(recipe, out=tmp_path / "whole", quiet=True)
    with tiny.cut_after(3):
        train(recipe, out=tmp_path / "cut", quiet=True)
    tiny.assert_same_run(train(recipe, out=tmp_path / "cut", resume=True, quiet=True), whole)
    assert whole.model_spec.vocabulary == 262 and sentinels_of(whole.tokenizer()) == (BEGIN, HOLE, END)


def test_a_model_without_the_sentinels_ids_is_refused(tmp_path: Path) -> None:
    first = train(tiny.recipe(tmp_path), out=tmp_path / "plain", quiet=True)
    assert first.model_spec.vocabulary == 259
    recipe = tiny.recipe(tmp_path, data={"kind": "infilling"})
    del recipe["model"]
    with pytest.raises(TorchstoneError, match=r"model.vocabulary: 259 is fewer than the tokenizer's 262"):
        train({**recipe, "init_from": str(first.path)}, out=tmp_path / "second", quiet=True)

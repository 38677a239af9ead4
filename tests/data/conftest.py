from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from torchstone.data import Prepared, TextDataSpec, prepare
from torchstone.spec import validate


@pytest.fixture
def words() -> Callable[[int, int], str]:
    """``words(seed, lines)``: text of that many lines that shares no runs with other seeds."""

    def make(seed: int, lines: int) -> str:
        rng = random.Random(seed)
        letters = "abcdefghijklmnopqrstuvwxyz"
        return "".join(
            " ".join("".join(rng.choices(letters, k=rng.randint(2, 7))) for _ in range(6)) + "\n" for _ in range(lines)
        )

    return make


@pytest.fixture
def folder(tmp_path: Path, words: Callable[[int, int], str]) -> Path:
    """Sixty files of a few hundred bytes."""
    root = tmp_path / "files"
    root.mkdir()
    for number in range(60):
        (root / f"{number:02}.txt").write_text(words(number, 10))
    return root


@pytest.fixture
def ready(tmp_path: Path) -> Callable[..., Prepared]:
    """``ready(corpus, **fields)``: that corpus prepared in a cache of the test, by default in bytes."""

    def run(corpus: object, **fields: object) -> Prepared:
        fields = {"tokenizer": "bytes", "block": 32, "cache": str(tmp_path / "cache"), **fields}
        return prepare(validate(TextDataSpec, {"corpus": corpus, **fields}))

    return run

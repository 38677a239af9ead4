"""Labelled texts: a text, or two of them, and the class that it belongs to.

Files are JSON lines with the fields ``text`` and ``label``, or tables with tabs (``.tsv``), as GLUE has them: with a
header, after a byte-order mark or not, or without one and `columns` says what it would. A label is a string or a whole
number; classes are numbered in their order. An example becomes one row

    separator text separator [second separator]

padded on the right to the longest a batch holds; with a second text, `segment` tells the two apart. Texts that are too
long lose their end, the longer of two first. All examples are kept in memory.

Without files of their own valid and test are 5 % each of the texts, decided by their content.

P examples, B examples of a batch, T tokens of a row, C classes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, model_validator

from torchstone.data._examples import Examples
from torchstone.data._sides import SPLITS, sides
from torchstone.data.corpora._files import find, fingerprint
from torchstone.data.corpora._lines import lines, table, text_of
from torchstone.data.spec import DataSpec
from torchstone.data.tokenizers import TokenizerSpec
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.spec import Part, part

if TYPE_CHECKING:
    import torch

    from torchstone.data.tokenizer import Tokenizer

__all__ = ["Labelled", "LabelledDataSpec", "LabelledTexts", "PreparedLabelled", "read"]


@dataclass(frozen=True)
class Labelled:
    """A text, or two, and its label as the file has it."""

    texts: tuple[str, ...]
    label: str | int


class LabelledDataSpec(DataSpec):
    """Texts, or pairs of texts, with the class that each belongs to."""

    path: str | tuple[str, ...] = Field(min_length=1)
    """Examples to train on: a ``.jsonl`` or ``.tsv`` file, a folder of ``.jsonl`` files, a glob, or a list of these."""
    valid: str | None = None
    """File of validation examples; None takes a part of `path`."""
    test: str | None = None
    """File of test examples; None takes a part of `path`."""
    text: str = Field("text", min_length=1)
    """The field that holds the text."""
    second: str | None = None
    """The field that holds a second text, for tasks on pairs."""
    label: str = Field("label", min_length=1)
    """The field that holds the class."""
    columns: tuple[str, ...] | None = Field(None, min_length=1)
    """Names of the columns of tables without a header; None takes each table's first line."""
    per_class: int | None = Field(None, ge=1)
    """Examples of each class that are trained on, at most, drawn by `seed`; None takes all."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of that draw."""
    tokenizer: Part[TokenizerSpec] = part("bpe", "tokenizer")
    """What turns text into token ids."""
    block: int = Field(128, ge=4)
    """Tokens of a row, at most."""
    cache: str | None = None
    """Folder of the cache of trained tokenizers; without it $TORCHSTONE_CACHE, else ~/.cache/torchstone."""

    @model_validator(mode="after")
    def _columns_of_tables(self) -> LabelledDataSpec:
        if self.columns is not None:
            if repeated := [name for name, count in Counter(self.columns).items() if count > 1]:
                raise ValueError(f"columns: {repeated[0]!r} is there twice")
            if others := [path for path in self._files() if not path.endswith(".tsv")]:
                raise ValueError(f"columns: {others[0]} is no table (.tsv)")
        return self

    def prepare(self, progress: Callable[[str], None] | None = None) -> PreparedLabelled:
        """The splits.

        Raises:
            TorchstoneError: a row is none, or labels are of two types; says which file and line. A class or a split
                without examples to train on.
        """
        from torchstone.data.store import Cache

        found = self._split()
        names = _classes([example.label for examples in found.values() for example in examples])
        if len(names) < 2:
            raise TorchstoneError(f"data: {self._where()} has {len(names)} classes; two are the least")
        train = self._drawn(found["train"])
        if absent := [str(name) for name in names if name not in {example.label for example in train}]:
            raise TorchstoneError(f"data: no example of class {', '.join(absent[:5])} to train on in {self._where()}")
        settings = [self.text, self.second or "", self.label, str(self.per_class), str(self.seed)]
        content = fingerprint(find(self._files(), ".jsonl"), self.kind, *settings, *(self.columns or ()))
        root = self.cache or os.environ.get("TORCHSTONE_CACHE") or "~/.cache/torchstone"
        with Cache(Path(root).expanduser()) as cache:
            tokenizer = self.tokenizer.load(
                lambda: (text for example in train for text in example.texts), content, cache
            )
        number = {name: n for n, name in enumerate(names)}
        splits = {
            side: LabelledTexts(examples, number, self.block, tokenizer)
            for side, examples in {**found, "train": train}.items()
        }
        sizes = ", ".join(f"{side} {len(split):,}" for side, split in splits.items())
        cut = sum(split.cut for split in splits.values())
        description = (
            f"labelled {self._where()}: {len(names)} classes, hash {content[:12]}; {sizes}; {cut:,} texts cut at "
            f"{self.block:,} tokens"
        )
        return PreparedLabelled(tokenizer, **splits, description=description, hash=content, classes=names)

    def _files(self) -> list[str]:
        paths = [path for path in (self.path, self.valid, self.test) if path is not None]
        return [part for path in paths for part in ([path] if isinstance(path, str) else path)]

    def _where(self) -> str:
        return self.path if isinstance(self.path, str) else ", ".join(self.path)

    def _split(self) -> dict[str, list[Labelled]]:
        """Examples by split: of files of their own, the rest shared out by content."""
        found: dict[str, list[Labelled]] = {side: [] for side in SPLITS}
        own = {side: path for side, path in (("valid", self.valid), ("test", self.test)) if path is not None}
        for side, path in own.items():
            found[side] = list(read(self, path))
        examples = list(read(self, self.path))
        for example, side_number in zip(examples, sides(["\n".join(e.texts) for e in examples]), strict=True):
            side = SPLITS[side_number]
            found["train" if side in own else side].append(example)
        return found

    def _drawn(self, examples: list[Labelled]) -> list[Labelled]:
        """At most `per_class` of each class, in the order of the file."""
        if self.per_class is None:
            return examples
        order = Key(self.seed).fold("per_class").numpy().permutation(len(examples))
        taken, kept = Counter[Any](), set()
        for at in order.tolist():
            if taken[examples[at].label] < self.per_class:
                taken[examples[at].label] += 1
                kept.add(at)
        return [example for at, example in enumerate(examples) if at in kept]


@dataclass(frozen=True)
class PreparedLabelled:
    """Labelled texts, ready to train on.

    Attributes:
        tokenizer: turns text into ids.
        train, valid, test: the splits.
        description: one line: classes and examples of each split.
        hash: identifies files and settings; numbers of different hashes do not compare.
        classes: labels as the files have them, in the order of their numbers.
    """

    tokenizer: Tokenizer
    train: LabelledTexts
    valid: LabelledTexts
    test: LabelledTexts
    description: str
    hash: str
    classes: tuple[str | int, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """What the data decide of a model: `classes`."""
        return {"classes": len(self.classes)}

    @property
    def names(self) -> dict[str, list[str]]:
        """Names of what the data number, which a run keeps: `classes`."""
        return {"classes": [str(name) for name in self.classes]}


class LabelledTexts(Examples):
    """The examples of one split, as ids; ``len(texts)`` counts them.

    A batch holds ``ids`` int64 (B, T); ``valid`` bool (B, T), False where a row is padded; ``label`` int64 (B,);
    ``example`` int64 (B,), numbers of the examples; of pairs of texts also ``segment`` int64 (B, T), 1 in the second.

    Attributes:
        block: tokens of a row, at most (T).
        cut: texts that were too long.
        tokens: of all rows.
    """

    def __init__(
        self, examples: Sequence[Labelled], number: dict[str | int, int], block: int, tokenizer: Tokenizer
    ) -> None:
        self.block, self.cut = block, 0
        self._separator, self._pad = tokenizer.separator, tokenizer.pad
        self.labels = np.array([number[example.label] for example in examples], np.int64)
        of = len(examples[0].texts) if examples else 1
        ids = iter(tokenizer.encode_batch([text for example in examples for text in example.texts]))
        self._rows = [self._row([next(ids) for _ in range(of)]) for _ in examples]
        self._pairs = of > 1
        self.tokens = sum(len(row) for row, _ in self._rows)

    def _row(self, texts: list[list[int]]) -> tuple[np.ndarray, int]:
        """Ids of an example, and where its second text begins."""
        room = self.block - 1 - len(texts)
        sizes = [len(text) for text in texts]
        while sum(sizes) > room:
            longest = sizes.index(max(sizes))
            others = sum(sizes) - sizes[longest]
            shorter = max([size for at, size in enumerate(sizes) if at != longest], default=0)
            sizes[longest] = max(room - others, min(shorter, sizes[longest] - 1))
        self.cut += sizes != [len(text) for text in texts]
        row, second = [self._separator], 0
        for text, size in zip(texts, sizes, strict=True):
            second = len(row)
            row += [*text[:size], self._separator]
        return np.array(row, np.int64), second

    def __len__(self) -> int:
        return len(self._rows)

    def _rows_of(self, number_B: np.ndarray) -> dict[str, torch.Tensor]:
        import torch

        rows = [self._rows[number] for number in number_B]
        shape = len(rows), max(len(row) for row, _ in rows)
        ids_BT, valid_BT, segment_BT = np.full(shape, self._pad), np.zeros(shape, bool), np.zeros(shape, np.int64)
        for b, (row, second) in enumerate(rows):
            ids_BT[b, : len(row)], valid_BT[b, : len(row)] = row, True
            segment_BT[b, second : len(row)] = 1
        batch = {"ids": ids_BT, "valid": valid_BT, "label": self.labels[number_B], "example": np.asarray(number_B)}
        found = {name: torch.from_numpy(array) for name, array in batch.items()}
        return {**found, "segment": torch.from_numpy(segment_BT)} if self._pairs else found


def read(spec: LabelledDataSpec, path: str | Sequence[str]) -> Iterator[Labelled]:
    """The examples of files. Blank lines are skipped.

    Raises:
        TorchstoneError: a file cannot be read, or a line is no example; says which.
    """
    fields = [spec.text] if spec.second is None else [spec.text, spec.second]
    for where, record in _records(path, spec.columns):
        texts = tuple(text_of(record, field, where, utf8=True) for field in fields)
        if spec.label not in record:
            raise TorchstoneError(f"{where}: no field {spec.label!r}; fields: {', '.join(list(record)[:10]) or 'none'}")
        label = record[spec.label]
        if not isinstance(label, str | int) or isinstance(label, bool):
            raise TorchstoneError(
                f"{where}: field {spec.label!r} is {type(label).__name__}, a string or a whole number is needed"
            )
        yield Labelled(texts, label)


def _records(path: str | Sequence[str], columns: Sequence[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each example stands, and its fields; `columns` names those of tables without a header."""
    for one in [path] if isinstance(path, str) else path:
        if one.endswith(".tsv"):
            yield from table(one, columns)
        else:
            yield from ((where, record) for _, where, record in lines(one))


def _classes(labels: Sequence[str | int]) -> tuple[str | int, ...]:
    """Different labels in order.

    Raises:
        TorchstoneError: some are strings and some are numbers.
    """
    different = set(labels)
    if len({type(label) for label in different}) > 1:
        text = next(label for label in different if isinstance(label, str))
        raise TorchstoneError(f"data: some labels are numbers and some are strings, as {text!r}")
    return tuple(sorted(different))

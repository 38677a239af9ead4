"""Triples (head, relation, tail) of a knowledge graph, from text files, with negatives (the recipe of Sun et al. 2019,
arXiv 1902.10197, section 3).

A training row is a fact with one of its ends taken away, and N entities in the place of that end that make no fact of
train: drawn uniformly from all entities that are no known answer. Steps alternate between the two ends, and each end
has an order of its own, in which an epoch visits every fact once. All of it is a function of the key, the step and the
row. A row weighs (f(h, r) + f(r, t))^(-1/2), so that frequent facts do not drown the rest; f is three more than the
number of facts of train with that head and relation, or that relation and tail.

Rows of an evaluation are each fact twice, once for each end, with the mask of the other known answers.

Shapes: B rows, N negatives, E entities, F facts, Q queries (an end and a relation) of which something is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from torchstone.data.blocks import shuffled
from torchstone.data.hashing import digest, mix
from torchstone.data.spec import DataSpec
from torchstone.errors import TorchstoneError, nearest
from torchstone.keys import Key

if TYPE_CHECKING:
    import torch

__all__ = ["Names", "PreparedTriples", "Triples", "TriplesSpec", "read_names"]

_SPLITS = ("train", "valid", "test")
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FREQUENCY = 3
"""What every frequency is more than it was counted."""
_SHOWN = 5
"""Names that a message lists."""


class TriplesSpec(DataSpec):
    """Facts of a knowledge graph: a folder of triples, three names separated by tabs a line."""

    paper: ClassVar[str] = "Sun et al. 2019, arXiv 1902.10197"
    example: ClassVar[str] = "triples"
    fills: ClassVar[tuple[str, ...]] = ("entities", "relations")

    path: str = Field(min_length=1)
    """A folder with train.txt, valid.txt and test.txt; entities.dict and relations.dict (number, tab, name) fix the
    order of the names, else it is that in which they appear."""
    negatives: int = Field(64, ge=1, le=2**16)
    """Entities that each fact is compared with (N)."""

    def prepare(self, progress: Callable[[str], None] | None = None) -> PreparedTriples:
        """The splits; nothing is written.

        Raises:
            TorchstoneError: a file is missing, a line has not three fields, a name is in no dictionary (each with file
                and line), train is empty, or every entity is an answer, so that there is nothing to compare with.
        """
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            raise TorchstoneError(f"data triples: no such folder: {self.path!r}")
        found = {name: list(_triples(folder / f"{name}.txt")) for name in _SPLITS}
        entities = _names(folder / "entities.dict", found, (0, 2))
        relations = _names(folder / "relations.dict", found, (1,))
        facts = {name: _numbered(folder / f"{name}.txt", found[name], entities, relations) for name in _SPLITS}
        if not len(facts["train"]):
            raise TorchstoneError(f"data triples: {folder / 'train.txt'} holds no triple")
        return PreparedTriples.of(self, entities, relations, facts)


class Names:
    """Names of entities or relations, numbered from 0."""

    def __init__(self, what: str, names: Sequence[str]) -> None:
        self.what, self.names = what, tuple(names)
        self._number = {name: number for number, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._number

    def number(self, name: str, where: str = "") -> int:
        """The number of a name.

        Raises:
            TorchstoneError: there is none; says the nearest.
        """
        if name not in self._number:
            raise TorchstoneError(f"{where}no {self.what} {name!r}{nearest(name, self.names)}")
        return self._number[name]


def read_names(path: Path, what: str) -> Names:
    """Names from lines of a number, a tab and a name, numbered from 0 without gaps.

    Raises:
        TorchstoneError: a line is none, or a number or name stands twice (file and line); numbers are missing.
    """
    found: dict[int, str] = {}
    seen: dict[str, int] = {}
    for where, fields in _lines(path):
        if len(fields) != 2 or not (fields[0].isascii() and fields[0].isdecimal()) or not fields[1]:
            raise TorchstoneError(f"{where}: a line is a number, a tab and a name")
        number, name = int(fields[0]), fields[1]
        if number in found or name in seen:
            raise TorchstoneError(f"{where}: {f'number {number}' if number in found else repr(name)} stands twice")
        found[number] = name
        seen[name] = number
    if sorted(found) != list(range(len(found))):
        gap = next(number for number in range(len(found) + 1) if number not in found)
        raise TorchstoneError(f"{path}: numbers must go from 0 to {len(found) - 1}; {gap} is missing")
    return Names(what, [found[number] for number in range(len(found))])


def _lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Where each line that is not blank stands, and its fields."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise TorchstoneError(f"{path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise TorchstoneError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if line.strip():
            yield f"{path} line {number}", line.split("\t")


def _triples(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """Where each triple stands, and its names."""
    for where, fields in _lines(path):
        if len(fields) != 3 or not all(fields):
            raise TorchstoneError(
                f"{where}: a triple is three names separated by tabs, this line has {sum(map(bool, fields))}"
            )
        yield where, *fields  # type: ignore[misc]


def _names(path: Path, found: Mapping[str, list[tuple[str, str, str, str]]], columns: tuple[int, ...]) -> Names:
    """The names of a dictionary, or those of the triples in the order in which they appear."""
    what = "relation" if columns == (1,) else "entity"
    if path.exists():
        return read_names(path, what)
    named = (row[1 + column] for name in _SPLITS for row in found[name] for column in columns)
    return Names(what, list(dict.fromkeys(named)))


def _numbered(path: Path, rows: list[tuple[str, str, str, str]], entities: Names, relations: Names) -> np.ndarray:
    """Triples as numbers, int64 (F, 3)."""
    named = [(entities, relations, entities)[column] for column in range(3)]
    numbers = [
        [names.number(name, f"{where}: ") for names, name in zip(named, triple, strict=True)] for where, *triple in rows
    ]
    return np.array(numbers, np.int64).reshape(-1, 3)


class _Known:
    """The known answers to every query (an end and a relation): sorted, one after the other.

    Args:
        facts_F3: triples.
        end: the column of the end that is given, 0 for (head, relation, ?) and 2 for (?, relation, tail).
        entities, relations: how many there are.
    """

    def __init__(self, facts_F3: np.ndarray, end: int, entities: int, relations: int) -> None:
        self.entities, self._relations = entities, relations
        pair_F = facts_F3[:, end] * relations + facts_F3[:, 1]
        both_A2 = np.unique(np.stack([pair_F, facts_F3[:, 2 - end]], 1), axis=0)
        self._pair_Q, self._first_Q, self._count_Q = np.unique(both_A2[:, 0], return_index=True, return_counts=True)
        self.answer_A = both_A2[:, 1]
        of_A = np.repeat(np.arange(len(self._pair_Q)), self._count_Q)
        before_A = np.arange(len(self.answer_A)) - self._first_Q[of_A]
        # how many entities below an answer are none, made to rise over queries too, so that one search serves all
        self._below_A = self.answer_A - before_A + of_A * (entities + 1)

    def query(self, given_B: np.ndarray, relation_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Number of each query, first of its answers, and how many there are: 0 where nothing is known."""
        pair_B = given_B * self._relations + relation_B
        query_B = np.searchsorted(self._pair_Q, pair_B).clip(max=len(self._pair_Q) - 1)
        there_B = self._pair_Q[query_B] == pair_B
        return query_B, self._first_Q[query_B], np.where(there_B, self._count_Q[query_B], 0)

    def others(self, given_B: np.ndarray, relation_B: np.ndarray, words_BN: np.ndarray) -> np.ndarray:
        """Entities that are no known answer, uniform, int64 (B, N), one from each uniform uint64."""
        query_B, first_B, count_B = self.query(given_B, relation_B)
        free_B = self.entities - count_B
        draw_BN = (words_BN % free_B.astype(np.uint64)[:, None]).astype(np.int64)
        passed_BN = np.searchsorted(self._below_A, draw_BN + (query_B * (self.entities + 1))[:, None], side="right")
        return draw_BN + np.where(count_B > 0, 1, 0)[:, None] * (passed_BN - first_B[:, None])

    def mask(self, given_B: np.ndarray, relation_B: np.ndarray, but_B: np.ndarray) -> np.ndarray:
        """Which entities are known answers, other than one each, bool (B, E)."""
        _, first_B, count_B = self.query(given_B, relation_B)
        row_A = np.repeat(np.arange(len(count_B)), count_B)
        at_A = np.arange(len(row_A)) + np.repeat(first_B - np.cumsum(count_B) + count_B, count_B)
        known_BE = np.zeros((len(count_B), self.entities), bool)
        known_BE[row_A, self.answer_A[at_A]] = True
        known_BE[np.arange(len(but_B)), but_B] = False
        return known_BE

    def whole(self) -> int | None:
        """A query that every entity answers; None if there is none."""
        full_Q = np.flatnonzero(self._count_Q == self.entities)
        return int(self._pair_Q[full_Q[0]]) if len(full_Q) else None


class Triples:
    """The facts of one split; ``len(triples)`` counts them.

    Attributes:
        facts_F3: heads, relations, tails, int64 (F, 3).
        tokens: their number.
        bytes: 0, for there is no text, hence no bits per byte.
    """

    bytes = 0

    def __init__(
        self,
        name: str,
        facts_F3: np.ndarray,
        negatives: int,
        avoid: Mapping[int, _Known],
        every: Mapping[int, _Known],
        weight_F: np.ndarray,
    ) -> None:
        self.facts_F3, self.tokens = facts_F3, len(facts_F3)
        self._name, self._negatives, self._avoid, self._every, self._weight_F = name, negatives, avoid, every, weight_F

    def __len__(self) -> int:
        return len(self.facts_F3)

    def batch(
        self, key: Key, step: int, size: int, micro: int = 0, accumulate: int = 1, rank: int = 0, ranks: int = 1
    ) -> dict[str, torch.Tensor]:
        """The micro-batch of one rank in one step. Even steps take the tail away, odd ones the head.

        Returns:
            ``head``, ``relation``, ``tail`` int64 (B,); ``seeks_head`` bool (B,); ``negative`` int64 (B, N);
            ``weight`` float32 (B,), at least 1; ``example`` int64 (B,), numbers of the facts.
        """
        key = key.fold("seeks_head" if step % 2 else "seeks_tail")
        first = ((step // 2 * accumulate + micro) * ranks + rank) * size
        fact_B = shuffled(len(self), key, first, size)
        words_BN = _words(key.fold("negatives"), first + np.arange(size), self._negatives)
        return self._rows(fact_B, np.full(size, step % 2 == 1), words_BN, self._weight_F[fact_B])

    def evaluation(self, size: int, limit: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Facts in order, each twice, in batches of `size` rows (at least 2); with a `limit` that many facts, spread
        evenly. As `batch`, with ``known`` bool (B, E), the known answers other than the row's, and ``weight`` 1.
        """
        import torch

        count, size = len(self), max(1, size // 2)
        total = count if limit is None else min(max(limit, 0), count)
        key = Key(0).fold("evaluation", self._name)
        for start in range(0, total, size):
            fact_B = np.repeat(np.arange(start, min(start + size, total)) * count // total, 2)
            seeks_head_B = np.arange(len(fact_B)) % 2 == 1
            words_BN = _words(key, 2 * fact_B + seeks_head_B, self._negatives)
            rows = self._rows(fact_B, seeks_head_B, words_BN, np.ones(len(fact_B), np.float32))
            yield {**rows, "known": torch.from_numpy(self._known(fact_B, seeks_head_B))}

    def _rows(
        self, fact_B: np.ndarray, seeks_head_B: np.ndarray, words_BN: np.ndarray, weight_B: np.ndarray
    ) -> dict[str, torch.Tensor]:
        import torch

        head_B, relation_B, tail_B = self.facts_F3[fact_B].T
        negative_BN = np.empty(words_BN.shape, np.int64)
        for end, known in self._avoid.items():
            rows = seeks_head_B == (end == 2)
            given_B = (tail_B if end == 2 else head_B)[rows]
            negative_BN[rows] = known.others(given_B, relation_B[rows], words_BN[rows])
        columns = {
            "head": head_B,
            "relation": relation_B,
            "tail": tail_B,
            "seeks_head": seeks_head_B,
            "negative": negative_BN,
            "weight": weight_B,
            "example": fact_B,
        }
        return {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in columns.items()}

    def _known(self, fact_B: np.ndarray, seeks_head_B: np.ndarray) -> np.ndarray:
        head_B, relation_B, tail_B = self.facts_F3[fact_B].T
        known_BE = np.empty((len(fact_B), self._every[0].entities), bool)
        for end, known in self._every.items():
            rows = seeks_head_B == (end == 2)
            given_B, sought_B = (tail_B, head_B) if end == 2 else (head_B, tail_B)
            known_BE[rows] = known.mask(given_B[rows], relation_B[rows], sought_B[rows])
        return known_BE


@dataclass(frozen=True)
class PreparedTriples:
    """A knowledge graph, ready to train on. There is no text, so there is no tokenizer.

    Attributes:
        train, valid, test: the splits.
        entities, relations: names by number.
        sizes: how many of each there are, by the names of a model's fields; `names` in their order.
        description: one line: sizes, and what valid and test ask of entities that train does not know.
        hash: identifies names and triples; numbers of different hashes do not compare.
    """

    train: Triples
    valid: Triples
    test: Triples
    entities: Names
    relations: Names
    description: str
    hash: str
    tokenizer: None = None

    @classmethod
    def of(
        cls, spec: TriplesSpec, entities: Names, relations: Names, facts: Mapping[str, np.ndarray]
    ) -> PreparedTriples:
        """The splits of numbered triples."""
        sizes = len(entities), len(relations)
        train = facts["train"]
        avoid = {end: _Known(train, end, *sizes) for end in (0, 2)}
        every = {end: _Known(np.concatenate([facts[name] for name in _SPLITS]), end, *sizes) for end in (0, 2)}
        for end, known in every.items():
            if (pair := known.whole()) is not None:
                given, relation = entities.names[pair // len(relations)], relations.names[pair % len(relations)]
                query = f"({given}, {relation}, ?)" if end == 0 else f"(?, {relation}, {given})"
                raise TorchstoneError(
                    f"data triples: every entity is an answer to {query}, so there is nothing to compare with"
                )
        counts = [known.query(train[:, end], train[:, 1])[2] for end, known in avoid.items()]
        weight_F = np.sqrt(1.0 / (sum(counts) + 2 * _FREQUENCY))
        weights = {"train": (weight_F / weight_F.min()).astype(np.float32)}
        made = {
            # valid and test are measured against negatives that are no facts of any split
            name: Triples(name, facts[name], spec.negatives, avoid if name == "train" else every, every,
                          weights.get(name, np.ones(len(facts[name]), np.float32)))
            for name in _SPLITS
        }  # fmt: skip
        content = digest(*entities.names, "\n", *relations.names, "\n", *(facts[n].tobytes().hex() for n in _SPLITS))
        description = (
            f"triples {spec.path}: {len(entities):,} entities, {len(relations):,} relations, hash {content[:12]}; "
            + ", ".join(f"{name} {len(facts[name]):,}" for name in _SPLITS)
            + _unseen(entities, facts)
        )
        return cls(made["train"], made["valid"], made["test"], entities, relations, description, content)

    @property
    def sizes(self) -> dict[str, int]:
        return {"entities": len(self.entities), "relations": len(self.relations)}

    @property
    def names(self) -> dict[str, list[str]]:
        return {"entities": list(self.entities.names), "relations": list(self.relations.names)}


def _unseen(entities: Names, facts: Mapping[str, np.ndarray]) -> str:
    """Says which entities valid and test ask for that no fact of train has: nothing can be learnt of them."""
    seen = np.unique(facts["train"][:, ::2])
    asked = np.unique(np.concatenate([facts["valid"][:, ::2].ravel(), facts["test"][:, ::2].ravel()]))
    new = [entities.names[number] for number in np.setdiff1d(asked, seen)]
    if not new:
        return ""
    more = f" and {len(new) - _SHOWN:,} more" if len(new) > _SHOWN else ""
    return f"; in valid or test and not in train: {', '.join(new[:_SHOWN])}{more}"


def _words(key: Key, number_B: np.ndarray, count: int) -> np.ndarray:
    """Uniform uint64 (B, N): a stream of splitmix64 for each number."""
    start_B = mix(number_B.astype(np.uint64) ^ np.uint64(key.value & (2**64 - 1)))
    return mix(start_B[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _STEP)

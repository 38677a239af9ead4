"""Facts far apart: lines ``name=value`` laid over text from a corpus, stated once and asked for at a distance.

A document is as many bytes of a split's text, from anywhere, as its segments hold. Over it lie equal lines of bytes,
``\\nk=7\\n``, for each fact: the first states what the others ask for. Each is at least as far from the one before it
as `nearest` says, so that who sees less than that cannot know a value. A row of a batch reads a document segment by
segment and then another one, as of data `documents`; `accuracy` is of the values that are asked for.

Documents are pure functions of the fields, the split and their number. Train is endless; valid and test are `examples`
fixed ones each, over text of those splits.

B rows, T tokens of a segment, P places for lines, F facts, L lines of all facts.
"""

from __future__ import annotations

import functools
import json
import string
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, model_validator

from torchstone.data._task import _ENDLESS, _words, below, choose
from torchstone.data.blocks import IGNORE, Blocks, shuffled
from torchstone.data.hashing import digest
from torchstone.data.text import TextDataSpec
from torchstone.data.tokenizers import TokenizerSpec
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.spec import Part, part

if TYPE_CHECKING:
    import torch

    from torchstone.data.prepare import Prepared

__all__ = ["Facts", "FactsSpec"]

_LETTERS = string.ascii_letters
_FORMAT = 1
"""Goes up whenever the same fields would give other documents."""


class FactsSpec(TextDataSpec):
    """Lines ``name=value`` amid text, stated once and asked for at a distance that is drawn."""

    tokenizer: Part[TokenizerSpec] = part("bytes", "tokenizer")
    """What turns text into token ids: bytes."""
    segments: int = Field(32, ge=1, le=2**16)
    """Segments of `block` tokens in a document."""
    facts: int = Field(32, ge=1, le=2**12)
    """Facts of a document, at most: as many as have room."""
    asks: int = Field(1, ge=1, le=2**12)
    """Times that a fact is asked for, at most."""
    letters: int = Field(2, ge=1, le=3)
    """Letters of a name."""
    alphabet: int = Field(52, ge=2, le=52)
    """Different letters of names, from a to z and from A to Z."""
    sign: str = Field("=", max_length=8, pattern=r"^[!-~ ]*$")
    """What stands between a name and its value, if anything does."""
    values: int = Field(10, ge=2, le=10)
    """Different values: digits from 0."""
    nearest: int = Field(512, ge=1)
    """Tokens from a line to the next one of the same fact, at least."""
    farthest: int = Field(3000, ge=1)
    """The same, at most."""
    targets: Literal["all", "asked"] = "all"
    """What is trained on: every token, or only values that are asked for."""
    forget: Literal["document", "segment"] = "document"
    """Where a row forgets what it carries: at the end of a document, or after every segment, so that nothing is."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the documents. The trainer's seed only orders those of train, so that trainings share valid and test."""
    examples: int = Field(32, ge=1, le=2**20)
    """Documents in valid, and in test."""

    @model_validator(mode="after")
    def _fits(self) -> FactsSpec:
        if self.tokenizer.kind != "bytes":
            raise ValueError(f"tokenizer: lines are laid over bytes, not over tokens of {self.tokenizer.kind}")
        if self.facts > self.alphabet**self.letters:
            names = self.alphabet**self.letters
            raise ValueError(f"facts: {self.facts} need as many names, {self.letters} letters give {names}")
        if not self.line <= self.nearest <= self.farthest <= self.length - self.line:
            raise ValueError(
                f"nearest, farthest: need {self.line} <= nearest <= farthest <= {self.length - self.line} in documents "
                f"of {self.length} tokens, got {self.nearest} and {self.farthest}"
            )
        return self

    @property
    def line(self) -> int:
        """Tokens of a line, with the ends of lines around it."""
        return self.letters + len(self.sign) + 3

    @property
    def length(self) -> int:
        """Tokens of a document."""
        return self.segments * self.block

    def prepare(self, progress: Callable[[str], None] | None = None) -> Prepared:
        prepared = super().prepare(progress)
        train, valid, test = (Facts(self, split) for split in (prepared.train, prepared.valid, prepared.test))
        body = {name: value for name, value in self.dump().items() if name not in ("corpus", "cache")}
        return replace(
            prepared,
            train=train,
            valid=valid,
            test=test,
            description=f"{prepared.description}; up to {self.facts} facts in documents of {self.length:,} tokens",
            hash=digest(_FORMAT, prepared.hash, json.dumps(body, sort_keys=True)),
        )


class Facts(Blocks):
    """The segments of one split's documents; ``len(facts)`` counts them.

    Attributes:
        block: tokens in a segment (T).
        tokens: of all documents.
        bytes: 0, for lines are laid over the text: no bits per byte.
        documents: number of documents.
    """

    def __init__(self, spec: FactsSpec, blocks: Blocks) -> None:
        vars(self).update(vars(blocks))
        if blocks.tokens <= spec.length:
            raise TorchstoneError(
                f"data facts: the {self.split} split has {blocks.tokens:,} tokens, a document takes {spec.length:,}"
            )
        self._spec, self._text = spec, blocks.tokens
        self.documents = _ENDLESS if self.split == "train" else spec.examples
        self.tokens, self.bytes = self.documents * spec.length, 0
        self._document = functools.lru_cache(maxsize=256)(self._write)

    def __len__(self) -> int:
        return self.documents * self._spec.segments

    def batch(
        self, key: Key, step: int, size: int, micro: int = 0, accumulate: int = 1, rank: int = 0, ranks: int = 1
    ) -> dict[str, torch.Tensor]:
        """The micro-batch of one rank in one step, a pure function of its arguments; row b goes on where row b of the
        step before it ended.

        Returns:
            ``ids`` int64 (B, T); ``next`` int64 (B, T), -100 where the document ends; ``asked`` bool (B, T), where the
            target is the value of a fact that was stated; ``begins`` bool (B,), whether a row forgets what it carries
            before it reads this; ``example`` int64 (B,), numbers of segments.
        """
        turn, segment = divmod(step, self._spec.segments)
        first = ((turn * accumulate + micro) * ranks + rank) * size
        return self._read(shuffled(self.documents, key, first, size), segment)

    def evaluation(self, size: int, limit: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Documents in order, `size` side by side; with a `limit` of segments as many as that holds, spread evenly, and
        one at least."""
        count = self.documents if limit is None else min(max(1, limit // self._spec.segments), self.documents)
        for start in range(0, count, size):
            number_B = np.arange(start, min(start + size, count)) * self.documents // count
            for segment in range(self._spec.segments):
                yield self._read(number_B, segment)

    def documents_of(self, block_B: np.ndarray) -> np.ndarray:
        """The number of the document that each target of these segments belongs to, int64 (B, T)."""
        return np.repeat(block_B[:, None] // self._spec.segments, self.block, 1)

    def score(
        self, predicted_BT: torch.Tensor, batch: dict[str, torch.Tensor]
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Sum and count of ``accuracy``, over values that are asked for.

        Args:
            predicted_BT: the likeliest next tokens, int64.
            batch: as `evaluation` yields them.
        """
        return {"accuracy": ((predicted_BT == batch["next"])[batch["asked"]].sum(), batch["asked"].sum())}

    def _read(self, number_B: np.ndarray, segment: int) -> dict[str, torch.Tensor]:
        import torch

        whole = [self._document(int(number)) for number in number_B]
        a, b = segment * self.block, (segment + 1) * self.block
        ids_BT = np.stack([ids[a:b] for ids, _ in whole])
        next_BT = np.full_like(ids_BT, IGNORE)
        asked_BT = np.zeros(ids_BT.shape, bool)
        for row, (ids, asked) in enumerate(whole):
            targets = ids[a + 1 : b + 1]
            next_BT[row, : len(targets)], asked_BT[row, : len(targets)] = targets, asked[a + 1 : b + 1]
        if self._spec.targets == "asked":
            next_BT[~asked_BT] = IGNORE
        begins_B = np.full(len(whole), segment == 0 or self._spec.forget == "segment")
        example_B = number_B * self._spec.segments + segment
        rows = {"ids": ids_BT, "next": next_BT, "asked": asked_BT, "begins": begins_B, "example": example_B}
        return {name: torch.from_numpy(array) for name, array in rows.items()}

    def _write(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """A document: its ids, int64, and whether each is a value that is asked for, bool."""
        spec, places = self._spec, self._spec.length // self._spec.line
        names = spec.alphabet**spec.letters
        key = Key(spec.seed).fold("facts", self.split)
        sizes = [1, names, places, spec.facts, spec.facts * spec.asks]
        words = _words(key, np.array([number]), sum(sizes))[0]
        where, name_words, place_words, value_F, pick_L = np.split(words, np.cumsum(sizes[:-1]))
        start = int(below(where, self._text - spec.length)[0])
        ids, asked = self._stream[start : start + spec.length].astype(np.int64), np.zeros(spec.length, bool)
        name_F, value_F = choose(name_words[None], spec.facts)[0], below(value_F, spec.values)
        for fact, lines in enumerate(self._places(choose(place_words[None], places)[0], pick_L)):
            letters = [_LETTERS[int(name_F[fact]) // spec.alphabet**at % spec.alphabet] for at in range(spec.letters)]
            for place in lines:
                line = f"\n{''.join(letters)}{spec.sign}{value_F[fact]}\n".encode()
                ids[place * spec.line : (place + 1) * spec.line] = list(line)
                asked[(place + 1) * spec.line - 2] = place != lines[0]
        return ids, asked

    def _places(self, order_P: np.ndarray, pick_L: np.ndarray) -> Iterator[list[int]]:
        """Places of the lines of each fact: a free one, and from there on others at distances that are allowed."""
        spec, free_P, picks = self._spec, np.ones(len(order_P), bool), pick_L.reshape(-1, self._spec.asks)
        low, high, fact = -(-spec.nearest // spec.line), spec.farthest // spec.line, 0
        for first in order_P:
            lines = [int(first)] if free_P[first] else []
            for word in picks[fact] if lines else ():
                there = lines[-1] + low + np.flatnonzero(free_P[lines[-1] + low : lines[-1] + high + 1])
                if not len(there):
                    break
                lines.append(int(there[below(word, len(there))]))
            if len(lines) > 1:
                free_P[lines] = False
                yield lines
                fact += 1
                if fact == spec.facts:
                    return

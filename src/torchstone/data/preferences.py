"""Preferences: prompts with two responses each, of which one was chosen and one rejected.

The text is JSON lines with the fields ``prompt``, ``chosen`` and ``rejected``, plain strings, as TRL has them. Prompt
and responses are tokenised apart, so that both responses follow the same tokens. A pair becomes two rows

    separator prompt response separator

(of another's tokenizer the first is what its template begins with) of which the response and the separator that ends it
are targets. A prompt that is too long loses its beginning, as much of it for both responses. A pair whose longer
response does not fit into a block is left out, and so is one whose responses are the same; the description counts both.
All pairs are kept in memory.

Pairs of one prompt are on one side: train, valid and test are 90, 5 and 5 %, decided by the prompt's content hash as
for other text. Where that leaves a side (almost) empty, prompts are taken in the order of their hashes.

P pairs, B pairs of a batch, T tokens of a row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from torchstone.data._examples import Examples
from torchstone.data._sides import SPLITS, sides
from torchstone.data.blocks import IGNORE
from torchstone.data.corpora._files import find, fingerprint
from torchstone.data.corpora._lines import lines, text_of
from torchstone.data.spec import DataSpec
from torchstone.data.tokenizers import TokenizerSpec
from torchstone.errors import TorchstoneError
from torchstone.spec import Part, part

if TYPE_CHECKING:
    import torch

    from torchstone.data.tokenizer import Tokenizer

__all__ = ["Pair", "Pairs", "PreferencesDataSpec", "PreparedPreferences", "read"]


@dataclass(frozen=True)
class Pair:
    """A prompt and two responses, as text or as ids."""

    prompt: Any
    chosen: Any
    rejected: Any


class PreferencesDataSpec(DataSpec):
    """Pairs of responses to a prompt, one chosen and one rejected, from JSON lines."""

    paired: ClassVar[bool] = True
    separated: ClassVar[bool] = True

    path: str | tuple[str, ...] = Field(min_length=1)
    """A file, a folder (its ``.jsonl`` files) or a glob, or a list of these."""
    prompt: str = Field("prompt", min_length=1)
    """The field that holds the prompt."""
    chosen: str = Field("chosen", min_length=1)
    """The field that holds the response that was chosen."""
    rejected: str = Field("rejected", min_length=1)
    """The field that holds the response that was rejected."""
    tokenizer: Part[TokenizerSpec] = part("bpe", "tokenizer")
    """What turns text into token ids."""
    block: int = Field(256, ge=2)
    """Tokens of a row: of a prompt and a response."""
    cache: str | None = None
    """Folder of the cache of trained tokenizers; without it $TORCHSTONE_CACHE, else ~/.cache/torchstone."""

    def prepare(self, progress: Callable[[str], None] | None = None) -> PreparedPreferences:
        """The splits.

        Raises:
            TorchstoneError: a row is none; says which file and line. No pair of train fits into a block.
        """
        from torchstone.data.store import Cache

        found = list(read(self))
        side_P = sides([pair.prompt for pair in found])
        content = fingerprint(find(self.path, ".jsonl"), self.kind, self.prompt, self.chosen, self.rejected)

        def texts() -> Iterator[str]:
            for pair, side in zip(found, side_P, strict=True):
                if side == 0:
                    yield from (pair.prompt + pair.chosen, pair.prompt + pair.rejected)

        root = self.cache or os.environ.get("TORCHSTONE_CACHE") or "~/.cache/torchstone"
        with Cache(Path(root).expanduser()) as cache:
            tokenizer = self.tokenizer.load(texts, content, cache)
        encoded = _encoded(found, tokenizer)
        front = len(tokenizer.front)
        longest = [front + max(len(pair.chosen), len(pair.rejected)) for pair in encoded]
        too_long = sum(length > self.block for length in longest)
        rows = zip(encoded, found, side_P, longest, strict=True)
        kept = [
            (ids, side, length)
            for ids, text, side, length in rows
            if length <= self.block and text.chosen != text.rejected
        ]
        cut = sum(len(pair.prompt) + length > self.block for pair, _, length in kept)
        train, valid, test = splits = [
            Pairs([pair for pair, side, _ in kept if side == number], self.block, tokenizer)
            for number in range(len(SPLITS))
        ]
        counts = ", ".join(f"{name} {len(split):,}" for name, split in zip(SPLITS, splits, strict=True))
        description = (
            f"preferences {self.path if isinstance(self.path, str) else ', '.join(self.path)}: {len(found):,} pairs, "
            f"hash {content[:12]}; {counts}; {cut:,} prompts cut; left out: {too_long:,} pairs with a response of "
            f"{self.block:,} tokens or more, {len(found) - len(kept) - too_long:,} whose responses are the same"
        )
        if not len(train):
            raise TorchstoneError(f"data: train has no pair of preferences; {description}")
        return PreparedPreferences(tokenizer, train, valid, test, description, content)


@dataclass(frozen=True)
class PreparedPreferences:
    """Preferences, ready to train on.

    Attributes:
        tokenizer: turns text into the ids that the pairs hold.
        train, valid, test: the splits.
        description: one line: pairs, of each split too, and those cut and left out.
        hash: identifies the files' content; numbers of different hashes do not compare.
    """

    tokenizer: Tokenizer
    train: Pairs
    valid: Pairs
    test: Pairs
    description: str
    hash: str


class Pairs(Examples):
    """The pairs of one split, as ids; ``len(pairs)`` counts them.

    A batch holds ``ids`` int64 (B, 2, T), the chosen response first; ``next`` int64 (B, 2, T), the token after each
    where that is of the response or the separator behind it, else -100; ``valid`` bool (B, 2, T), False where a row is
    padded; ``example`` int64 (B,), numbers of the pairs.

    Attributes:
        block: tokens of a row (T).
        pairs: ids of prompts and responses.
        tokens: of all rows.
    """

    def __init__(self, pairs: Sequence[Pair], block: int, tokenizer: Tokenizer) -> None:
        self.pairs, self.block, self.tokens = pairs, block, 2 * len(pairs) * block
        self._front, self._separator, self._pad = tokenizer.front, tokenizer.separator, tokenizer.pad

    def __len__(self) -> int:
        return len(self.pairs)

    def _rows_of(self, number_B: np.ndarray) -> dict[str, torch.Tensor]:
        import torch

        shape = len(number_B), 2, self.block
        ids_B2T, next_B2T, valid_B2T = np.full(shape, self._pad), np.full(shape, IGNORE), np.zeros(shape, bool)
        for row, number in enumerate(number_B):
            pair = self.pairs[number]
            room = self.block - len(self._front) - max(len(pair.chosen), len(pair.rejected))
            prompt = pair.prompt[max(0, len(pair.prompt) - room) :]
            for side, response in enumerate((pair.chosen, pair.rejected)):
                whole = [*self._front, *prompt, *response, self._separator]
                length, before = len(whole) - 1, len(self._front) + len(prompt) - 1
                ids_B2T[row, side, :length] = whole[:-1]
                next_B2T[row, side, before:length] = whole[before + 1 :]
                valid_B2T[row, side, :length] = True
        rows = {"ids": ids_B2T, "next": next_B2T, "valid": valid_B2T, "example": np.asarray(number_B, np.int64)}
        return {name: torch.from_numpy(array) for name, array in rows.items()}


def read(spec: PreferencesDataSpec) -> Iterator[Pair]:
    """The pairs of the files, as text. Blank lines are skipped.

    Raises:
        TorchstoneError: a file cannot be read, or a line is no pair; says which.
    """
    for _, where, record in lines(spec.path):
        yield Pair(*(text_of(record, name, where, utf8=True) for name in (spec.prompt, spec.chosen, spec.rejected)))


def _encoded(pairs: Sequence[Pair], tokenizer: Tokenizer) -> list[Pair]:
    dtype = np.uint16 if tokenizer.vocabulary <= 1 << 16 else np.uint32
    texts = [text for pair in pairs for text in (pair.prompt, pair.chosen, pair.rejected)]
    ids = iter([np.array(some, dtype) for some in tokenizer.encode_batch(texts)])
    return [Pair(*three) for three in zip(ids, ids, ids, strict=True)]

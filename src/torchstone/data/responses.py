"""Responses: prompts and what is to be answered, for supervised tuning.

The text is JSON lines with the fields ``prompt`` and ``response``. Both are tokenised apart and become one row

    separator prompt response separator

(of another's tokenizer the first is what its template begins with)
padded on the right to the longest a batch holds, of which the response and the separator that ends it are targets. A
prompt that is too long loses its beginning; a response that does not fit into a block is left out and counted. All rows
are kept in memory.

Valid and test are 5 % each, decided by the prompt's content: responses to one prompt are on one side.

P rows, B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

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

__all__ = ["PreparedResponses", "Responses", "ResponsesDataSpec"]


class ResponsesDataSpec(DataSpec):
    """Prompts with a response each, which alone is learned, from JSON lines."""

    separated: ClassVar[bool] = True

    path: str | tuple[str, ...] = Field(min_length=1)
    """A file, a folder (its ``.jsonl`` files) or a glob, or a list of these."""
    prompt: str = Field("prompt", min_length=1)
    """The field that holds the prompt."""
    response: str = Field("response", min_length=1)
    """The field that holds the response."""
    tokenizer: Part[TokenizerSpec] = part("bpe", "tokenizer")
    """What turns text into token ids."""
    block: int = Field(256, ge=2)
    """Tokens of a row, at most: of a prompt and its response."""
    cache: str | None = None
    """Folder of the cache of trained tokenizers; without it $TORCHSTONE_CACHE, else ~/.cache/torchstone."""

    def prepare(self, progress: Callable[[str], None] | None = None) -> PreparedResponses:
        """The splits.

        Raises:
            TorchstoneError: a row is none; says which file and line. No row of train fits into a block.
        """
        from torchstone.data.store import Cache

        found = [
            (text_of(record, self.prompt, where, utf8=True), text_of(record, self.response, where, utf8=True))
            for _, where, record in lines(self.path)
        ]
        side_P = sides([prompt for prompt, _ in found])
        content = fingerprint(find(self.path, ".jsonl"), self.kind, self.prompt, self.response)
        root = self.cache or os.environ.get("TORCHSTONE_CACHE") or "~/.cache/torchstone"
        with Cache(Path(root).expanduser()) as cache:
            tokenizer = self.tokenizer.load(
                lambda: (p + r for (p, r), side in zip(found, side_P, strict=True) if side == 0), content, cache
            )
        ids = iter(tokenizer.encode_batch([text for pair in found for text in pair]))
        encoded, front = list(zip(ids, ids, strict=True)), len(tokenizer.front)
        kept = [
            (prompt[max(0, front + len(prompt) + len(response) - self.block) :], response, side)
            for (prompt, response), side in zip(encoded, side_P, strict=True)
            if len(response) + front <= self.block
        ]
        cut = sum(front + len(p) + len(r) > self.block for p, r in encoded if len(r) + front <= self.block)
        train, valid, test = splits = [
            Responses([(p, r) for p, r, side in kept if side == number], tokenizer) for number in range(len(SPLITS))
        ]
        counts = ", ".join(f"{name} {len(split):,}" for name, split in zip(SPLITS, splits, strict=True))
        description = (
            f"responses {self.path if isinstance(self.path, str) else ', '.join(self.path)}: {len(found):,}, hash "
            f"{content[:12]}; {counts}; {cut:,} prompts cut; left out: {len(found) - len(kept):,} of {self.block:,} "
            "tokens or more"
        )
        if not len(train):
            raise TorchstoneError(f"data: train has no response; {description}")
        return PreparedResponses(tokenizer, train, valid, test, description, content)


@dataclass(frozen=True)
class PreparedResponses:
    """Responses, ready to train on.

    Attributes:
        tokenizer: turns text into ids.
        train, valid, test: the splits.
        description: one line: rows of each split, and those cut and left out.
        hash: identifies the files' content; numbers of different hashes do not compare.
    """

    tokenizer: Tokenizer
    train: Responses
    valid: Responses
    test: Responses
    description: str
    hash: str


class Responses(Examples):
    """The rows of one split, as ids of prompts and responses; ``len(responses)`` counts them.

    A batch holds ``ids`` int64 (B, T); ``next`` int64 (B, T), the token after each where that is of the response or the
    separator behind it, else -100; ``valid`` bool (B, T), False where a row is padded; ``example`` int64 (B,).

    Attributes:
        tokens: of all rows.
    """

    def __init__(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], tokenizer: Tokenizer) -> None:
        self._front, self._separator, self._pad = tokenizer.front, tokenizer.separator, tokenizer.pad
        self._rows = [self._row(prompt, response) for prompt, response in pairs]
        self.tokens = sum(len(ids) for ids, _ in self._rows)

    def _row(self, prompt: Sequence[int], response: Sequence[int]) -> tuple[list[int], list[int]]:
        """Ids, and the token after each where it is a target, else -100."""
        before = [*self._front, *prompt]
        whole = [*before, *response, self._separator]
        return whole[:-1], [IGNORE] * (len(before) - 1) + whole[len(before) :]

    def __len__(self) -> int:
        return len(self._rows)

    def _rows_of(self, number_B: np.ndarray) -> dict[str, torch.Tensor]:
        import torch

        rows = [self._rows[number] for number in number_B]
        shape = len(rows), max(len(ids) for ids, _ in rows)
        ids_BT, next_BT, valid_BT = np.full(shape, self._pad), np.full(shape, IGNORE), np.zeros(shape, bool)
        for b, (ids, after) in enumerate(rows):
            ids_BT[b, : len(ids)], next_BT[b, : len(ids)], valid_BT[b, : len(ids)] = ids, after, True
        batch = {"ids": ids_BT, "next": next_BT, "valid": valid_BT, "example": np.asarray(number_B, np.int64)}
        return {name: torch.from_numpy(array) for name, array in batch.items()}

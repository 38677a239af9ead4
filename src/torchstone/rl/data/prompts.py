"""Prompts: what a policy answers, with the columns that verifiers need.

Files are JSON lines with a field for the prompt; all other fields stay beside it as they are, for rewards. A prompt
becomes one row

    separator prompt

(of another's tokenizer what its template begins with, in the separator's place)
padded on the right to the longest a batch holds. What follows it is the policy's. A prompt that leaves no room for an
answer in a block is left out and counted. All prompts are kept in memory.

Without files of their own valid and test are 5 % each of the prompts, decided by their content, so that a prompt is on
one side however often it occurs.

P prompts, B prompts of a batch, T tokens of a row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field, field_validator

from torchstone.data import DataSpec, TokenizerSpec
from torchstone.data._examples import Examples
from torchstone.data._sides import SPLITS, sides
from torchstone.data.corpora._files import find, fingerprint
from torchstone.data.corpora._lines import lines, text_of
from torchstone.errors import TorchstoneError
from torchstone.spec import Part, part

if TYPE_CHECKING:
    import torch

    from torchstone.data import Tokenizer

__all__ = ["PreparedPrompts", "Prompts", "PromptsDataSpec", "prompts_of"]


class PromptsDataSpec(DataSpec):
    """Prompts to answer, from JSON lines, with other fields kept for rewards."""

    separated: ClassVar[bool] = True

    path: str | tuple[str, ...] = Field(min_length=1)
    """A file, a folder (its ``.jsonl`` files) or a glob, or a list of these."""
    valid: str | None = Field(None, min_length=1)
    """File of validation prompts; None takes a part of `path`."""
    test: str | None = Field(None, min_length=1)
    """File of test prompts; None takes a part of `path`."""
    prompt: str = Field("prompt", min_length=1)
    """The field that holds the prompt."""
    template: str | None = None
    """Text around each prompt, which stands where it says ``{prompt}``."""
    tokenizer: Part[TokenizerSpec] = part("bpe", "tokenizer")
    """What turns text into token ids."""
    block: int = Field(256, ge=2)
    """Tokens of a prompt and its answer together, for models whose positions are counted."""
    cache: str | None = None
    """Folder of the cache of trained tokenizers; without it $TORCHSTONE_CACHE, else ~/.cache/torchstone."""

    @field_validator("template")
    @classmethod
    def _has_a_place(cls, value: str | None) -> str | None:
        if value is not None and value.count("{prompt}") != 1:
            raise ValueError("needs {prompt} once, where the prompt goes")
        return value

    def prepare(self, progress: Callable[[str], None] | None = None) -> PreparedPrompts:
        """The splits.

        Raises:
            TorchstoneError: a row has no prompt; says which file and line. No prompt of train fits into a block.
        """
        from torchstone.data.store import Cache

        rows, texts, side_P = self._read()
        files = [path for path in (self.path, self.valid, self.test) if path is not None]
        of = [one for path in files for one in ([path] if isinstance(path, str) else path)]
        content = fingerprint(find(of, ".jsonl"), self.kind, self.prompt, self.template or "")
        root = self.cache or os.environ.get("TORCHSTONE_CACHE") or "~/.cache/torchstone"
        with Cache(Path(root).expanduser()) as cache:
            tokenizer = self.tokenizer.load(
                lambda: (text for text, side in zip(texts, side_P, strict=True) if side == 0), content, cache
            )
        ids = tokenizer.encode_batch(texts)
        front = tokenizer.front
        fits = [len(front) + len(some) < self.block for some in ids]
        train, valid, test = splits = [
            Prompts(
                {n: ids[n] for n in range(len(ids)) if fits[n] and side_P[n] == number},
                front,
                tokenizer.pad,
            )
            for number in range(len(SPLITS))
        ]
        counts = ", ".join(f"{name} {len(split):,}" for name, split in zip(SPLITS, splits, strict=True))
        description = (
            f"prompts {', '.join(of)}: {len(rows):,}, hash {content[:12]}; {counts}; left out: {fits.count(False):,} "
            f"that leave no room in {self.block:,} tokens"
        )
        if not len(train):
            raise TorchstoneError(f"data: train has no prompt; {description}")
        return PreparedPrompts(tokenizer, train, valid, test, description, content, dict(enumerate(rows)))

    def _read(self) -> tuple[list[Row], list[str], np.ndarray]:
        """Rows, texts and splits of all prompts."""
        own = {number: path for number, path in ((1, self.valid), (2, self.test)) if path is not None}
        rows, texts = prompts_of(self.path, self.prompt, self.template)
        side_P = sides(texts)
        side_P = np.where(np.isin(side_P, list(own)), 0, side_P)
        for number, path in own.items():
            more, their = prompts_of(path, self.prompt, self.template)
            rows, texts = rows + more, texts + their
            side_P = np.concatenate([side_P, np.full(len(more), number)])
        return rows, texts, side_P


class Row(dict[str, Any]):
    """Fields of a prompt, and `where` it stands: its file and line."""

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        super().__init__(fields)
        self.where = where


def prompts_of(path: str | Sequence[str], field: str, template: str | None) -> tuple[list[Row], list[str]]:
    """Rows of JSON lines, and the text that each gives to the policy.

    Raises:
        TorchstoneError: a file cannot be read, or a row has no prompt; says which. A template without a place for it.
    """
    if template is not None and template.count("{prompt}") != 1:
        raise TorchstoneError("template: needs {prompt} once, where the prompt goes")
    rows, texts = [], []
    for _, where, record in lines(path):
        text = text_of(record, field, where, utf8=True)
        rows.append(Row(record, where))
        texts.append(text if template is None else template.replace("{prompt}", text))
    return rows, texts


@dataclass(frozen=True)
class PreparedPrompts:
    """Prompts, ready to be answered.

    Attributes:
        tokenizer: turns text into ids.
        train, valid, test: the splits.
        description: one line: prompts, of each split too, and those left out.
        hash: identifies files and settings; numbers of different hashes do not compare.
        rows: fields of each prompt by its number, which is one over all splits.
    """

    tokenizer: Tokenizer
    train: Prompts
    valid: Prompts
    test: Prompts
    description: str
    hash: str
    rows: Mapping[int, Mapping[str, Any]]


class Prompts(Examples):
    """The prompts of one split, as ids by number; ``len(prompts)`` counts them.

    A batch holds ``ids`` int64 (B, T); ``valid`` bool (B, T), False where a row is padded; ``example`` int64 (B,),
    numbers of the prompts.

    Attributes:
        tokens: of all prompts.
    """

    def __init__(self, prompts: Mapping[int, Sequence[int]], front: Sequence[int], pad: int) -> None:
        self.numbers = np.array(list(prompts), np.int64)
        self._rows = [np.array([*front, *ids], np.int64) for ids in prompts.values()]
        self._pad = pad
        self.tokens = sum(len(row) for row in self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def _rows_of(self, at_B: np.ndarray) -> dict[str, torch.Tensor]:
        import torch

        rows = [self._rows[at] for at in at_B]
        shape = len(rows), max(len(row) for row in rows)
        ids_BT, valid_BT = np.full(shape, self._pad), np.zeros(shape, bool)
        for b, row in enumerate(rows):
            ids_BT[b, : len(row)], valid_BT[b, : len(row)] = row, True
        batch = {"ids": ids_BT, "valid": valid_BT, "example": self.numbers[at_B]}
        return {name: torch.from_numpy(array) for name, array in batch.items()}

"""A mixture of corpora: each row of a batch comes from one of them, by shares.

Rows are dealt out in cycles of 1,000. In a cycle each source has its share of rows, to within one, in an order that a
key draws; a source's own rows visit each of its blocks once an epoch. So a row is a pure function of its number, at any
step, on any rank, and shares hold in every cycle, not on average alone.

B rows, T tokens of a block, S sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, model_validator

from torchstone.data.blocks import Blocks, shuffled
from torchstone.data.corpora import CorpusSpec, Document
from torchstone.data.hashing import digest, permute
from torchstone.data.prepare import Prepared, prepare_several
from torchstone.data.spec import DataSpec
from torchstone.data.text import TextDataSpec
from torchstone.data.tokenizers import TokenizerSpec
from torchstone.spec import Part, Spec, part

if TYPE_CHECKING:
    import torch

    from torchstone.data.tokenizer import Tokenizer
    from torchstone.keys import Key

__all__ = ["MixedBlocks", "MixtureDataSpec", "PreparedMixture", "SourceSpec"]

_CYCLE = 1000


class SourceSpec(Spec):
    """One corpus of a mixture."""

    corpus: Part[CorpusSpec] = part("stdlib", "corpus")
    """Where its text comes from."""
    share: float = Field(gt=0, le=1)
    """Its part of the rows; those of all sources add up to 1."""


class MixtureDataSpec(DataSpec):
    """Packed text from several corpora with one tokenizer, by shares of the rows of a batch."""

    sources: dict[str, SourceSpec]
    """The corpora by name, each with its share: {code: {corpus: ..., share: 0.6}, text: {corpus: ..., share: 0.4}}."""
    held_out: str | None = None
    """The source that validation and test are of; None is all of them, one after the other."""
    tokenizer: Part[TokenizerSpec] = part("bpe", "tokenizer")
    """What turns text into token ids; one that learns does so from all sources."""
    block: int = Field(256, ge=2)
    """Tokens in one training block, which is of one source."""
    separate_documents: bool = True
    """Attention and positions restart at each document of a packed block."""
    cache: str | None = None
    """Folder of the token cache, as of `data: text`."""

    @model_validator(mode="after")
    def _shares(self) -> MixtureDataSpec:
        if not self.sources:
            raise ValueError("sources: a mixture has at least one")
        total = math.fsum(source.share for source in self.sources.values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"sources: shares add up to {total:g}, and need to add up to 1")
        if self.held_out is not None and self.held_out not in self.sources:
            raise ValueError(f"held_out: no source {self.held_out!r}; there are {', '.join(self.sources)}")
        return self

    def prepare(self, progress: Callable[[str], None] | None = None) -> PreparedMixture:
        """Each corpus as `data: text` prepares it.

        Raises:
            TorchstoneError: as there.
        """
        spec = TextDataSpec(
            tokenizer=self.tokenizer, block=self.block, separate_documents=self.separate_documents, cache=self.cache
        )
        each = prepare_several(spec, [source.corpus for source in self.sources.values()], progress)
        return PreparedMixture(self, dict(zip(self.sources, each, strict=True)))


class PreparedMixture:
    """What `MixtureDataSpec.prepare` gives; attributes as of `Prepared`."""

    def __init__(self, spec: MixtureDataSpec, parts: Mapping[str, Prepared]) -> None:
        self.parts = parts
        first = next(iter(parts.values()))
        self.tokenizer: Tokenizer = first.tokenizer
        held = list(parts.values()) if spec.held_out is None else [parts[spec.held_out]]
        shares = [source.share for source in spec.sources.values()]
        self.train = MixedBlocks([part.train for part in parts.values()], shares)
        self.valid = MixedBlocks([part.valid for part in held])
        self.test = MixedBlocks([part.test for part in held])
        named = (f"{name} {100 * spec.sources[name].share:g} %: {part.description}" for name, part in parts.items())
        self.description = "; ".join(named)
        self.hash = digest(*(text for name, part in parts.items() for text in (name, part.hash)))

    def texts(self, split: str) -> Iterator[Document]:
        """The documents of a split of all sources, one source after the other."""
        for each in self.parts.values():
            yield from each.texts(split)


class MixedBlocks:
    """The blocks of one split of several sources, as `Blocks`; `shares` are needed to draw batches alone.

    A block's number, in ``example``, counts on from source to source.
    """

    def __init__(self, parts: Sequence[Blocks], shares: Sequence[float] = ()) -> None:
        self.parts, self.block = parts, parts[0].block
        self.bytes = sum(part.bytes for part in parts)
        self.documents = sum(part.documents for part in parts)
        # what is predicted is all tokens of each source but its first
        self.tokens = sum(part.tokens for part in parts) - (len(parts) - 1)
        self._first = np.cumsum([0, *(len(part) + 1 for part in parts[:-1])])
        self._document = np.cumsum([0, *(part.documents for part in parts[:-1])])
        self._dealt = _dealt(shares) if shares else None

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def batch(
        self, key: Key, step: int, size: int, micro: int = 0, accumulate: int = 1, rank: int = 0, ranks: int = 1
    ) -> dict[str, torch.Tensor]:
        """As of `Blocks`; each source visits its blocks in epochs of its own."""
        import torch

        number_B = ((step * accumulate + micro) * ranks + rank) * size + np.arange(size)
        source_B, order_B = self._placed(key, number_B)
        found, place = [], []
        for s, each in enumerate(self.parts):
            mine = np.flatnonzero(source_B == s)
            if len(mine):  # rows in a row of a batch are so among those of their source too
                blocks = shuffled(len(each), key.fold("source", s), int(order_B[mine[0]]), len(mine))
                rows = each.rows(blocks)
                found.append({**rows, "example": rows["example"] + int(self._first[s])})
                place.append(mine)
        back_B = torch.from_numpy(np.argsort(np.concatenate(place)))
        return {name: torch.cat([rows[name] for rows in found])[back_B] for name in found[0]}

    def _placed(self, key: Key, number_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each row, and which row of that source it is."""
        assert self._dealt is not None, "a split without shares is for measuring"
        count_S = np.bincount(self._dealt, minlength=len(self.parts))
        source_B, order_B = np.empty_like(number_B), np.empty_like(number_B)
        for cycle in np.unique(number_B // _CYCLE):
            source_C = self._dealt[permute(np.arange(_CYCLE), _CYCLE, key.fold("cycle", int(cycle)))]
            before_C = np.zeros(_CYCLE, np.int64)
            for s in range(len(self.parts)):
                before_C[source_C == s] = np.arange(count_S[s])
            here = number_B // _CYCLE == cycle
            place = number_B[here] % _CYCLE
            source_B[here] = source_C[place]
            order_B[here] = cycle * count_S[source_C[place]] + before_C[place]
        return source_B, order_B

    def evaluation(self, size: int, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """As of `Blocks`, one source after the other; a limit is shared out by their lengths."""
        total = len(self) or 1
        for s, each in enumerate(self.parts):
            own = None if limit is None else max(1, round(limit * len(each) / total))
            for batch in each.evaluation(size, own):
                yield {**batch, "example": batch["example"] + int(self._first[s])}

    def documents_of(self, block_B: np.ndarray) -> np.ndarray:
        """As of `Blocks`, documents numbered on from source to source."""
        found_BT = np.zeros((len(block_B), self.block), np.int64)
        source_B = np.searchsorted(self._first, block_B, side="right") - 1
        for s, each in enumerate(self.parts):
            mine = source_B == s
            found_BT[mine] = each.documents_of(block_B[mine] - self._first[s]) + self._document[s]
        return found_BT


def _dealt(shares: Sequence[float]) -> np.ndarray:
    """The sources of a cycle's rows, int64 (1000,): their shares, the largest rests rounded up."""
    exact = np.array(shares) * _CYCLE
    count = np.floor(exact + 1e-9).astype(np.int64)
    rest = exact - count
    for s in np.argsort(-rest, kind="stable")[: _CYCLE - int(count.sum())]:
        count[s] += 1
    return np.repeat(np.arange(len(shares)), count)

"""Minimal pairs (Warstadt et al. 2020, BLiMP, arXiv 1912.00582): does a model prefer the acceptable sentence?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchstone.errors import TorchstoneError
from torchstone.evaluate.intervals import wilson
from torchstone.evaluate.records import Record, read_records
from torchstone.evaluate.result import Result
from torchstone.evaluate.scoring import Scorer

__all__ = ["Pair", "minimal_pairs", "read_pairs"]

_GROUPS = ("field", "UID", "phenomenon")


@dataclass(frozen=True)
class Pair:
    """Two sentences, the first of which is acceptable, the groups that they belong to as (field, value), and where they
    stand for messages."""

    good: str
    bad: str
    groups: Sequence[tuple[str, str]] = ()
    where: str = "pair"


def read_pairs(path: str, limit: int | None = None) -> list[Pair]:
    """Pairs of a JSON-lines file: ``{"sentence_good": str, "sentence_bad": str}``, with BLiMP's "field" and "UID" or a
    "phenomenon" as groups where they are there.

    Raises:
        TorchstoneError: the file cannot be read, or a record is none; names the line.
    """
    return [_pair(record) for record in read_records(path, limit)]


def _pair(record: Record) -> Pair:
    good, bad = record.text("sentence_good"), record.text("sentence_bad")
    for name, text in (("sentence_good", good), ("sentence_bad", bad)):
        if not text:
            raise TorchstoneError(f"{record.where}: field {name!r} is empty; a sentence is needed")
    groups = [(name, str(record.fields[name])) for name in _GROUPS if name in record.fields]
    return Pair(good, bad, groups, record.where)


def minimal_pairs(scorer: Scorer, pairs: Sequence[Pair], source: str = "pairs") -> Result:
    """The share of pairs whose acceptable sentence has the higher log-likelihood (of a masked language model,
    pseudo-log-likelihood); a tie counts a half.

    Raises:
        TorchstoneError: a sentence without a token to score, an encoder-decoder.
    """
    jobs = []
    for number, pair in enumerate(pairs):
        for good, text in ((True, pair.good), (False, pair.bad)):
            own = [job for window in scorer.windows(text) for job in window]
            if not own:
                raise TorchstoneError(f"{pair.where}: the sentence {text!r} has no token to score")
            jobs += [((number, good), job) for job in own]
    totals = scorer.totals(jobs, source, len(jobs))
    won = []
    for number in range(len(pairs)):
        more = totals[number, True] - totals[number, False]
        won.append(1.0 if more > 0 else 0.5 if more == 0 else 0.0)
    groups: dict[tuple[str, str], list[float]] = {}
    for pair, share in zip(pairs, won, strict=True):
        for group in pair.groups:
            groups.setdefault(group, []).append(share)
    return Result(
        "minimal_pairs",
        source,
        {"accuracy": wilson(sum(won), len(won))},
        {"pairs": len(won)},
        {f"{name}={value}": wilson(sum(some), len(some)) for (name, value), some in sorted(groups.items())},
    )

"""Bits per byte by the length of what a model reads: is more text than it was trained on a gain or a loss?

Windows of all lengths end at the same tokens and the same last ones are scored: lengths differ in their context alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from torchstone.data import Document
from torchstone.errors import TorchstoneError
from torchstone.evaluate.intervals import ratio
from torchstone.evaluate.result import Result
from torchstone.evaluate.scoring import Job, Scorer

__all__ = ["bits_by_length"]


def bits_by_length(
    scorer: Scorer,
    documents: Iterable[Document],
    source: str = "text",
    lengths: Sequence[int] = (),
    last: int | None = None,
) -> Result:
    """Bits per byte of the last tokens of windows, by the window's length.

    A document gives a window at every `longest` tokens, and none where it is shorter than that and one token. The unit
    of the sample is the document, or with a single one the window; each token of a document counts as the same number
    of bytes.

    Args:
        scorer: of a decoder.
        documents: are read once and not held.
        source: their name in the result.
        lengths: tokens that the model reads.
        last: how many of the last are predicted; None is half of the shortest length.

    Raises:
        TorchstoneError: lengths that do not go together, a model that reads both ways, no document that is long enough.
    """
    if scorer.masked or scorer.seq2seq:
        raise TorchstoneError("evaluate: lengths are for decoders, which read from left to right")
    sizes = sorted(set(lengths))
    if not sizes or sizes[0] < 2:
        raise TorchstoneError(f"evaluate: lengths are tokens, 2 or more, not {', '.join(map(str, lengths)) or 'none'}")
    scored = sizes[0] // 2 if last is None else last
    if not 1 <= scored <= sizes[0]:
        raise TorchstoneError(f"evaluate: last is {scored}, with these lengths 1 to {sizes[0]} is possible")
    scorer.model.check_length(sizes[-1])
    bytes_of: list[dict[int, float]] = []  # document -> window -> bytes of its scored tokens

    def jobs() -> Iterator[tuple[tuple[int, int, int], Job]]:
        for document in documents:
            ids = scorer.tokenizer.encode(document.text)
            ends = range(sizes[-1], len(ids), sizes[-1])
            if not ends:
                continue
            a_token = len(document.text.encode(errors="surrogatepass")) / len(ids)
            bytes_of.append({end: scored * a_token for end in ends})
            for end in ends:
                for size in sizes:
                    at, targets = range(size - scored, size), ids[end - scored + 1 : end + 1]
                    yield (len(bytes_of) - 1, end, size), Job(ids[end - size : end], at, targets)

    nats = {key: -total for key, total in scorer.totals(jobs(), source).items()}
    if not bytes_of:
        raise TorchstoneError(f"{source!r}: no document is longer than {sizes[-1]} tokens")
    single = len(bytes_of) == 1
    units = [[(0, end)] for end in bytes_of[0]] if single else [[(n, end) for end in x] for n, x in enumerate(bytes_of)]
    bytes_by_unit = [sum(bytes_of[number][end] for number, end in unit) for unit in units]
    metrics = {}
    for size in sizes:
        nats_by_unit = [sum(nats[number, end, size] for number, end in unit) for unit in units]
        metrics[f"bits_per_byte@{size}"] = ratio(nats_by_unit, bytes_by_unit).map(lambda x: max(0.0, x) / math.log(2))
    facts = {
        "documents": len(bytes_of),
        "windows": sum(map(len, bytes_of)),
        "last": scored,
        "unit": "window" if single else "document",
    }
    return Result("lengths", source, metrics, facts)

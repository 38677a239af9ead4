"""Perplexity and bits per byte of texts by a sliding window.

Perplexity is exp of the negative log-likelihood a token, bits per byte the same sum in bits over the bytes of the text
in UTF-8. For a masked language model both come from the pseudo-log-likelihood (Salazar et al. 2020, arXiv 1910.14659,
section 2.3) and compare only with each other.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from torchstone.data import Document
from torchstone.data.corpora.jsonl import JsonlSpec
from torchstone.data.corpora.text import TextSpec
from torchstone.errors import TorchstoneError
from torchstone.evaluate.intervals import Estimate, ratio
from torchstone.evaluate.result import Result
from torchstone.evaluate.scoring import Job, Scorer
from torchstone.spec import validate

__all__ = ["perplexity", "read_documents"]


def read_documents(source: str, limit: int | None = None) -> Iterator[Document]:
    """The first `limit` documents that hold text: of a file, a folder or a glob, of the field "text" of a ``.jsonl``
    file, or of standard input, which is ``-`` and one document.

    Raises:
        TorchstoneError: the source cannot be read or holds no text; for the first document at once.
    """
    if source == "-":
        documents = _standard_input()
    else:
        documents = validate(JsonlSpec if source.endswith(".jsonl") else TextSpec, {"path": source}).documents()
    found = islice((document for document in documents if document.text), limit)
    first = next(found, None)
    if first is None:
        raise TorchstoneError(f"{source!r}: holds no text")
    return chain([first], found)


def _standard_input() -> Iterator[Document]:
    try:
        yield Document("standard input", "" if sys.stdin is None else sys.stdin.buffer.read().decode())
    except UnicodeDecodeError as error:
        raise TorchstoneError(
            f"standard input is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
        ) from None


def perplexity(
    scorer: Scorer,
    documents: Iterable[Document],
    source: str = "text",
    window: int | None = None,
    stride: int | None = None,
) -> Result:
    """Perplexity and bits per byte of documents that do not see each other.

    The sample's unit is the document; with a single one it is the window, as if windows were independent, and its bits
    per byte then take each token for the same number of bytes. Both are ratios of sums over units.

    Args:
        scorer: of a decoder or a masked language model.
        documents: are read once and not held.
        source: their name in the result.
        window, stride: see `Scorer.windows`.

    Raises:
        TorchstoneError: fewer than two tokens, an encoder-decoder, sizes that do not go together.
    """
    size, step = scorer.sizes(window, stride)
    sizes: list[int] = []
    tokens: dict[tuple[int, int], int] = {}

    def jobs() -> Iterator[tuple[tuple[int, int], Job]]:
        for number, document in enumerate(documents):
            sizes.append(len(document.text.encode(errors="surrogatepass")))
            for window_number, window_jobs in enumerate(scorer.windows(document.text, size, step)):
                key = number, window_number
                tokens[key] = sum(len(job.targets) for job in window_jobs)
                for job in window_jobs:
                    yield key, job

    nats = {key: -total for key, total in scorer.totals(jobs(), source).items()}
    count = sum(tokens.values())
    if count < 2:
        raise TorchstoneError(f"{source!r}: {count} tokens to score, two or more are needed")
    if len(sizes) > 1:
        unit = "document"
        nats_of, tokens_of = [0.0] * len(sizes), [0] * len(sizes)
        for key in nats:
            nats_of[key[0]] += nats[key]
            tokens_of[key[0]] += tokens[key]
        a_token, a_byte = ratio(nats_of, tokens_of), ratio(nats_of, sizes)
    else:
        unit = "window"
        a_token = ratio(list(nats.values()), [tokens[key] for key in nats])
        a_byte = a_token.map(lambda x: x * count / sizes[0])
    pseudo = "pseudo_" if scorer.masked else ""
    return Result(
        "text",
        source,
        {
            f"{pseudo}perplexity": _positive(a_token).map(_exp),
            f"{pseudo}bits_per_byte": _positive(a_byte).map(lambda x: x / math.log(2)),
        },
        {
            "documents": len(sizes),
            "tokens": count,
            "bytes": sum(sizes),
            "windows": len(nats),
            "window": size,
            "stride": step,
            "unit": unit,
        },
    )


def _positive(estimate: Estimate) -> Estimate:
    """Log-likelihoods are below zero, so no end of an interval of their negatives is."""
    return estimate.map(lambda x: max(0.0, x))


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf

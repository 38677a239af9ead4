"""Iterative harvesting: pages of a topic from a crawl, round by round, from a few pages of it (DeepSeek-Coder-V2, Zhu
et al. 2024, arXiv 2406.11931, section 2; the pipeline is DeepSeekMath's, Shao et al. 2024, arXiv 2402.03300, section
2.1).

    classifier: the seed's pages against as many random pages of the crawl
    kept:       the share `keep` of the crawl that it scores highest
    domains:    hosts of which more than `domain_threshold` of the pages are collected
    joined:     pages of these domains under their url patterns, not yet collected: collected, and seed from now on

The papers' people read the domains and wrote the patterns. Here a file gives them, or prefixes of paths are proposed of
which most pages are collected. What was collected is the union of what all rounds kept and joined.

The classifier is fastText's: a page is the mean of the embeddings of its hashed n-grams, and a logistic unit reads it.
n-grams below `min_count` in the training texts count for nothing; fastText hashes the longer ones and leaves what it
never saw at its random start.

The crawl is read from disk in each round. Memory holds urls, offsets and scores of its pages, and the classifier.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import itertools
import json
import os
import tempfile
from array import array
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from pydantic import Field

from torchstone.data.corpora._files import File, decode, find
from torchstone.data.hashing import digest, mix
from torchstone.data.store import Cache
from torchstone.data.tokenizer import Tokenizer
from torchstone.data.tokenizers import TokenizerSpec
from torchstone.errors import TorchstoneError
from torchstone.files import read_json, write_json, write_with
from torchstone.keys import Key
from torchstone.spec import Part, Spec, part

__all__ = ["Classifier", "HarvestSpec", "Pages", "Round", "harvest", "prefixes", "read_patterns", "rounds"]

_TOGETHER = 1 << 20
"""Characters that are read and encoded at once."""
_LEAST = 3
"""Pages below a prefix of paths, without which it is not looked at by itself."""

Patterns = Mapping[str, Sequence[str]]
"""Host -> globs, which match a whole path with its query."""


class HarvestSpec(Spec):
    """How pages are harvested."""

    rounds: int = Field(3, ge=1)
    """Rounds of training, scoring and joining; the paper's were 3 for the web and 2 for repositories."""
    keep: float = Field(0.05, gt=0, le=1)
    """Share of the crawl that a round keeps, those of the highest scores. The papers kept the tokens that helped most
    in trainings of a small model."""
    domain_threshold: float = Field(0.1, ge=0, le=1)
    """Share of a domain's pages above which, and not at which, it is one of the topic."""
    pattern_threshold: float = Field(0.5, ge=0, le=1)
    """Where no patterns are given: share of the pages below a prefix above which it is proposed."""
    url: str = "url"
    """Field of a row that holds the page's address."""
    text: str = "text"
    """Field of a row that holds the page's text."""
    tokenizer: Part[TokenizerSpec] = part("bpe", "tokenizer")
    """Whose tokens make n-grams: a model's own, as in the paper, or one that learns from the first round's texts."""
    ngrams: int = Field(3, ge=1)
    """Tokens of the longest n-gram."""
    buckets: int = Field(1 << 21, ge=1, le=1 << 31)
    """Values of the n-grams' hash."""
    min_count: int = Field(3, ge=1)
    """Times that an n-gram's bucket is met in the training texts, without which it is left out."""
    dim: int = Field(256, ge=1)
    """Size of an embedding."""
    lr: float = Field(0.1, gt=0)
    """Learning rate, which falls to 0 along a line."""
    epochs: int = Field(3, ge=1)
    """Times that each training text is read."""
    seed: int = 0
    """Of the negatives, the embeddings and the order of the training texts."""


# ---------------------------------------------------------------------------------------------------------------- pages


def _host(url: str) -> str:
    """Lower case, without user and port; empty if there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # brackets that hold no address
        return ""


class Pages:
    """Rows of JSON-lines files by number, read from disk whenever their texts are asked for.

    Args:
        paths: files, folders (their ``.jsonl`` files) or globs.
        spec: names the fields.

    Attributes:
        urls: of each row.
        hosts: the distinct hosts.
        domain: int64 (rows,): index into `hosts`.
        file: index into `files` of each row; rows stand in the order of the files.

    Raises:
        TorchstoneError: a file cannot be read; a row is no JSON object, has no text or no url with a host; names file
            and row.
    """

    def __init__(self, paths: Sequence[str], spec: HarvestSpec) -> None:
        self._spec, self.files = spec, find(paths, ".jsonl")
        self.urls: list[str] = []
        self.file, self._offset, domain = array("l"), array("q"), array("q")
        numbers: dict[str, int] = {}
        for number, file in enumerate(self.files):
            for row, offset, raw in _lines(file):
                url, _ = self._page(raw, f"{str(file.path)!r} row {row}", file, offset)
                if not (host := _host(url)):
                    raise TorchstoneError(f"{str(file.path)!r} row {row}: {spec.url} {url[:80]!r} has no host")
                self.urls.append(url)
                self.file.append(number)
                self._offset.append(offset)
                domain.append(numbers.setdefault(host, len(numbers)))
        self.hosts = list(numbers)
        self.domain = np.array(domain, np.int64)

    def __len__(self) -> int:
        return len(self.urls)

    def _page(self, raw: bytes, where: str, file: File, offset: int) -> tuple[str, str]:
        try:
            row = json.loads(decode(raw, file.path, offset))
        except (ValueError, RecursionError):
            raise TorchstoneError(f"{where} is not JSON") from None
        if not isinstance(row, dict):
            raise TorchstoneError(f"{where}: a JSON object is needed, not {type(row).__name__}")
        for name in (self._spec.url, self._spec.text):
            if name not in row:
                raise TorchstoneError(f"{where} has no {name}")
            if not isinstance(row[name], str):
                raise TorchstoneError(f"{where}: {name} is {type(row[name]).__name__}, a string is needed")
            try:
                row[name].encode()
            except UnicodeEncodeError:
                raise TorchstoneError(f"{where}: {name} holds half of a surrogate pair, which is no text") from None
        return row[self._spec.url], row[self._spec.text]

    def raw(self, rows: Sequence[int] | np.ndarray) -> Iterator[bytes]:
        """The lines of rows, as they stand in the files but for the line end."""
        with contextlib.ExitStack() as stack:
            opened: dict[int, Any] = {}
            for row in rows:
                number = self.file[row]
                if number not in opened:
                    opened[number] = stack.enter_context(open(self.files[number].path, "rb"))
                opened[number].seek(self._offset[row])
                yield opened[number].readline().rstrip(b"\r\n")

    def batches(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, list[str]]]:
        """Rows and their texts in this order, about a million characters at a time."""
        start, texts, size = 0, [], 0
        for end, (row, raw) in enumerate(zip(rows, self.raw(rows), strict=True), 1):
            file = self.files[self.file[row]]
            url, text = self._page(raw, f"{str(file.path)!r} changed while it was read and", file, self._offset[row])
            if url != self.urls[row]:
                raise TorchstoneError(f"{str(file.path)!r} changed while it was read")
            texts.append(text)
            size += len(text)
            if size >= _TOGETHER or end == len(rows):
                yield rows[start:end], texts
                start, texts, size = end, [], 0


def _lines(file: File) -> Iterator[tuple[int, int, bytes]]:
    """(row from 1, offset, line) of the lines of a file that are not blank."""
    offset = 0
    try:
        with open(file.path, "rb") as lines:
            for row, raw in enumerate(lines, 1):
                if raw.strip():
                    yield row, offset, raw
                offset += len(raw)
    except OSError as error:
        raise TorchstoneError(f"cannot read {str(file.path)!r}: {error.strerror or error}") from None


# ----------------------------------------------------------------------------------------------------------- classifier


def hashed(documents: Sequence[Sequence[int]], longest: int, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """The buckets of all n-grams of 1 to `longest` tokens, and the number of the document that each stands in."""
    ids = np.fromiter(itertools.chain.from_iterable(documents), np.uint64)
    page = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    found, where = [], []
    x = np.zeros(len(ids), np.uint64)
    for n in range(1, min(longest, len(ids)) + 1):
        x = mix(x[: len(ids) - n + 1] * np.uint64(0x9E3779B97F4A7C15) + ids[n - 1 :] + np.uint64(1))
        inside = page[: len(x)] == page[n - 1 :]
        found.append((x % np.uint64(buckets)).astype(np.int64)[inside])
        where.append(page[: len(x)][inside])
    return (np.concatenate(found), np.concatenate(where)) if found else (page, page)


class Classifier:
    """Logistic regression on the mean embedding of a page's hashed n-grams (Joulin et al. 2017, arXiv 1607.01759).

    A page x that holds n-gram g in a share a_g of its places has h = sum_g a_g E_g and logit w h. E starts uniform in
    +-1 / dim and w at 0, as in fastText; each step is of one page.

    Args:
        pages: where texts are read.
        rows: int64 (N,): the training pages.
        labels: (N,): 1 for the topic, 0 for the rest.
        tokenizer: whose tokens make n-grams.
        spec: sizes, learning rate, epochs.
        key: of the start and of the order.

    Raises:
        TorchstoneError: no n-gram is met `min_count` times.
    """

    def __init__(
        self, pages: Pages, rows: np.ndarray, labels: np.ndarray, tokenizer: Tokenizer, spec: HarvestSpec, key: Key
    ) -> None:
        self._spec, self._tokenizer = spec, tokenizer
        counts = np.zeros(spec.buckets, np.int32)
        for _, texts in pages.batches(rows):
            bucket, count = np.unique(self._hashed(texts)[0], return_counts=True)
            counts[bucket] += count.astype(np.int32)
        known = np.flatnonzero(counts >= spec.min_count)
        if not len(known):
            raise TorchstoneError(
                f"harvest: no n-gram stands {spec.min_count} times in the seed and in as many pages of the crawl"
            )
        self._row = np.full(spec.buckets, -1, np.int32)  # of a bucket in E, -1 for those that are left out
        self._row[known] = np.arange(len(known))
        start = key.fold("embeddings").numpy()
        self._e_GD = start.uniform(-1 / spec.dim, 1 / spec.dim, (len(known), spec.dim)).astype(np.float32)
        self._w_D = np.zeros(spec.dim, np.float32)
        steps, label = 0, dict(zip(rows.tolist(), labels.tolist(), strict=True))
        for epoch in range(spec.epochs):
            order = key.fold("order", epoch).numpy().permutation(rows)
            for some, texts in pages.batches(order):
                grams, page = self._known(texts)
                ends = np.searchsorted(page, np.arange(len(some) + 1))
                for i, row in enumerate(some.tolist()):
                    lr = spec.lr * (1 - steps / (spec.epochs * len(rows)))
                    self._step(grams[ends[i] : ends[i + 1]], label[row], lr)
                    steps += 1
        self._score_G = self._e_GD @ self._w_D

    def _hashed(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return hashed(self._tokenizer.encode_batch(texts), self._spec.ngrams, self._spec.buckets)

    def _known(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Rows of E of the n-grams that have one, and their texts' numbers, which do not fall."""
        bucket, page = self._hashed(texts)
        row = self._row[bucket]
        row, page = row[row >= 0], page[row >= 0]
        order = np.argsort(page, kind="stable")
        return row[order], page[order]

    def _step(self, grams: np.ndarray, label: int, lr: float) -> None:
        if not len(grams):
            return
        g, count = np.unique(grams, return_counts=True)
        share_G = (count / len(grams)).astype(np.float32)
        e_GD = self._e_GD[g]
        h_D = share_G @ e_GD
        pull = np.float32(lr * (label - (1 + np.tanh(float(h_D @ self._w_D) / 2)) / 2))
        self._e_GD[g] = e_GD + np.outer(pull * share_G, self._w_D)
        self._w_D = self._w_D + pull * h_D

    def scores(self, pages: Pages, rows: np.ndarray) -> np.ndarray:
        """float64 (rows,): the logit of each page; minus infinity for one without a known n-gram."""
        found = []
        for some, texts in pages.batches(rows):
            grams, page = self._known(texts)
            count = np.bincount(page, minlength=len(some))
            total = np.bincount(page, self._score_G[grams], minlength=len(some))
            found.append(np.where(count > 0, total / np.maximum(count, 1), -np.inf))
        return np.concatenate(found)


# ------------------------------------------------------------------------------------------------------------- patterns


def read_patterns(path: Path) -> dict[str, list[str]]:
    """Patterns from a JSON object: host -> globs of paths, as ``{"mathoverflow.net": ["/questions/*"]}``.

    Raises:
        TorchstoneError: it is something else; names the file and the host.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise TorchstoneError(f"{path}: a JSON object of host -> patterns is needed, not {type(data).__name__}")
    for host, patterns in data.items():
        if not isinstance(patterns, list) or not all(
            isinstance(one, str) and one[:1] in ("/", "*") for one in patterns
        ):
            raise TorchstoneError(f"{path}: {host}: a list of patterns is needed, each of which begins with / or *")
    return {host.lower(): patterns for host, patterns in data.items()}


def _path(url: str) -> str:
    parts = urlsplit(url)
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def prefixes(paths: Sequence[str], collected: Sequence[bool], threshold: float) -> list[str]:
    """The folders of a site of whose pages a share above `threshold` is collected, as patterns.

    A folder that holds another one of three pages or more, whose own share is not above it, is not proposed as a whole:
    that one is left out, and the others below it are looked at each by itself. So the outermost folders are found
    that are collected throughout.
    """
    least = Fraction(str(threshold))
    pages: Counter[str] = Counter()
    hits: Counter[str] = Counter()
    below: defaultdict[str, set[str]] = defaultdict(set)
    for path, hit in zip(paths, collected, strict=True):
        steps = path.partition("?")[0].split("/")[:-1]
        folders = ["/".join(steps[: n + 1]) + "/" for n in range(len(steps))] or ["/"]
        for outer, inner in itertools.pairwise(folders):
            below[outer].add(inner)
        pages.update(folders)
        hits.update(folders if hit else [])

    def high(folder: str) -> bool:
        return hits[folder] > least * pages[folder]

    found, left = [], ["/"]
    while left:
        folder = left.pop()
        large = [name for name in below[folder] if pages[name] >= _LEAST]
        if pages[folder] >= _LEAST and high(folder) and all(map(high, large)):
            found.append(f"{glob.escape(folder)}*")
        else:
            left += large
    return sorted(found)


# --------------------------------------------------------------------------------------------------------------- rounds


@dataclass(frozen=True)
class Round:
    """What one round found. Rows are numbers of the crawl's pages; the seed's own follow them.

    Attributes:
        number: from 1.
        seed: rows of the pages that the classifier took for the topic.
        scores: float64 (crawl,): its logits.
        kept: rows of the highest; none without a known n-gram.
        domains: those of the topic.
        patterns: by domain, those that were used.
        joined: rows of the pages under them that were not collected before.
        collected: bool (crawl,): after this round.
    """

    number: int
    seed: np.ndarray
    scores: np.ndarray
    kept: np.ndarray
    domains: list[str]
    patterns: dict[str, list[str]]
    joined: np.ndarray
    collected: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Plain data: a round of the report."""
        return {
            "round": self.number,
            "seed": len(self.seed),
            "kept": len(self.kept),
            "lowest_logit": float(self.scores[self.kept].min()) if len(self.kept) else None,
            "domains": self.domains,
            "patterns": self.patterns,
            "joined": len(self.joined),
            "collected": int(self.collected.sum()),
        }


def rounds(pages: Pages, crawl: int, spec: HarvestSpec, patterns: Patterns | None = None) -> Iterator[Round]:
    """The rounds of a harvest, one after another.

    Args:
        pages: first those of the crawl, then the seed's.
        crawl: how many are of the crawl.
        spec: how.
        patterns: by domain; domains without one gain nothing. None proposes them (`prefixes`).

    Raises:
        TorchstoneError: there are no pages on one side, or the whole crawl is seed already.
    """
    if not 0 < crawl < len(pages):
        raise TorchstoneError(f"harvest: the {'seed' if crawl else 'crawl'} has no pages")
    rows, domain, key = np.arange(crawl), pages.domain[:crawl], Key(spec.seed).fold("harvest")
    seed = np.arange(crawl, len(pages))
    known = {pages.urls[row] for row in seed}
    in_seed = np.array([url in known for url in pages.urls[:crawl]])
    collected = in_seed.copy()
    total = np.bincount(domain, minlength=len(pages.hosts))
    tokenizer: Tokenizer | None = None
    for number in range(1, spec.rounds + 1):
        others = np.flatnonzero(~in_seed)
        if not len(others):
            raise TorchstoneError("harvest: every page of the crawl is in the seed")
        draw = key.fold("negatives", number).numpy()
        negatives = draw.choice(others, min(len(seed), len(others)), replace=False)
        training = np.concatenate([seed, negatives])
        tokenizer = tokenizer or _tokenizer(pages, training, spec)
        labels = np.repeat([1, 0], [len(seed), len(negatives)])
        classifier = Classifier(pages, training, labels, tokenizer, spec, key.fold("classifier", number))
        scores = classifier.scores(pages, rows)
        best = np.argsort(-scores, kind="stable")[: max(1, int(spec.keep * crawl))]
        kept = np.sort(best[np.isfinite(scores[best])])
        collected[kept] = True

        hits = np.bincount(domain[collected], minlength=len(pages.hosts))
        least = Fraction(str(spec.domain_threshold))  # as it was written: 0.1 of 30 pages is 3 of them
        chosen = [i for i in range(len(pages.hosts)) if int(hits[i]) > least * int(total[i])]
        used: dict[str, list[str]] = {}
        joined: list[int] = []
        by_domain = np.argsort(domain, kind="stable")
        ends = np.searchsorted(domain[by_domain], np.arange(len(pages.hosts) + 1))
        for i in chosen:
            of_domain = by_domain[ends[i] : ends[i + 1]].tolist()
            paths = [_path(pages.urls[row]) for row in of_domain]
            if patterns is None:
                globs = prefixes(paths, collected[of_domain].tolist(), spec.pattern_threshold)
            else:
                globs = list(patterns.get(pages.hosts[i], ()))
            if globs:
                used[pages.hosts[i]] = globs
            joined += [
                row
                for row, path in zip(of_domain, paths, strict=True)
                if not collected[row] and any(fnmatch.fnmatchcase(path, one) for one in globs)
            ]
        new = np.sort(np.array(joined, np.int64))
        collected[new] = in_seed[new] = True
        domains = [pages.hosts[i] for i in chosen]
        yield Round(number, seed, scores, kept, domains, used, new, collected.copy())
        seed = np.concatenate([seed, new])


def _tokenizer(pages: Pages, rows: np.ndarray, spec: HarvestSpec) -> Tokenizer:
    def texts() -> Iterator[str]:
        return (text for _, some in pages.batches(rows) for text in some)

    with tempfile.TemporaryDirectory(prefix="torchstone-harvest-") as folder, Cache(Path(folder)) as cache:
        return spec.tokenizer.load(texts, digest(*(pages.urls[row] for row in rows)), cache)


def harvest(
    crawl: Sequence[str],
    seed: str,
    out: Path,
    spec: HarvestSpec | None = None,
    patterns: Path | None = None,
    report: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Collect pages of a topic into a file that `corpus: jsonl` reads. Each file is written whole or stays as it was.

    Args:
        crawl: JSON-lines files of pages, folders of these or globs.
        seed: the same of pages of the topic.
        out: takes the collected rows of the crawl, in its order and as they stand there.
        spec: how.
        patterns: a file for `read_patterns`; None proposes patterns.
        report: takes what this returns, as JSON.
        say: takes a line a round.

    Returns:
        Pages of the crawl, how many were collected, and what each round did.

    Raises:
        TorchstoneError: bad input, in one sentence with file and row; a file that cannot be written.
    """
    spec = spec or HarvestSpec()
    for path in (out, report):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise TorchstoneError(f"{path}: cannot be written; a file in a folder that exists is needed")
    given = None if patterns is None else read_patterns(patterns)
    count = len(find(crawl, ".jsonl"))
    pages = Pages([*crawl, seed], spec)
    for path in (out, report):
        if path is not None and any(os.path.realpath(path) == os.path.realpath(file.path) for file in pages.files):
            raise TorchstoneError(f"{path}: is read here, and cannot be written")
    if len(pages.files) < count + 1:
        raise TorchstoneError(f"harvest: the seed {seed!r} is part of the crawl")
    size = bisect_left(pages.file, count)
    done: list[Round] = []
    for each in rounds(pages, size, spec, given):
        done.append(each)
        say(
            f"round {each.number}: seed {len(each.seed):,}, kept {len(each.kept):,}, {len(each.domains):,} domains, "
            f"joined {len(each.joined):,}, collected {int(each.collected.sum()):,} of {size:,}"
        )
    collected = done[-1].collected
    told = {"pages": size, "collected": int(collected.sum()), "rounds": [each.to_dict() for each in done]}

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            file.writelines(line + b"\n" for line in pages.raw(np.flatnonzero(collected)))

    write_with(out, write)
    if report is not None:
        write_json(report, told)
    return told

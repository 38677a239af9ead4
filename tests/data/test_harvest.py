"""Harvesting: the classifier against the formula, domains and patterns to the page, and what the command leaves."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torchstone.data.corpora.jsonl import JsonlSpec
from torchstone.data.harvest import Classifier, HarvestSpec, Pages, Round, hashed, prefixes, read_patterns, rounds
from torchstone.keys import Key
from torchstone.spec import validate

CODE = ("def f(x):", "return self.y", "import os", "for i in range(3):", "class A:")
PROSE = ("the sea was calm", "a walk in the park", "she read the letter", "rain fell on the town")
QUICK = {"tokenizer": "bytes", "dim": 8, "buckets": 4096, "lr": 1.0}


def write(path: Path, rows: Sequence[object]) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


def text(rng: random.Random, code: bool) -> str:
    return "\n".join(rng.choices(CODE if code else PROSE, k=8))


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """20 sites of 10 pages, on 5 of which 6 are code in a folder; 4 pages of code as the seed."""
    rng = random.Random(0)
    crawl = [
        {"url": f"https://Site{s}.org:80/{'src/a' if (c := s < 5 and p < 6) else 'blog'}/{p}", "text": text(rng, c)}
        for s in range(20)
        for p in range(10)
    ]
    seed = [{"url": f"https://seed.org/{p}", "text": text(rng, True)} for p in range(4)]
    return write(tmp_path / "crawl.jsonl", crawl), write(tmp_path / "seed.jsonl", seed)


def run(crawl: str, known: str, patterns: Any = None, **fields: object) -> tuple[Pages, list[Round]]:
    spec = validate(HarvestSpec, {**QUICK, **fields})
    pages = Pages([crawl, known], spec)
    size = sum(number == 0 for number in pages.file)
    return pages, list(rounds(pages, size, spec, patterns))


# ----------------------------------------------------------------------------------------------------------- classifier


def test_ngrams_are_hashed_within_their_document() -> None:
    bucket, page = hashed([[1, 2, 3], [], [1, 2], [9]], 3, 1 << 30)
    by = [sorted(bucket[page == n].tolist()) for n in range(4)]
    assert [len(one) for one in by] == [6, 0, 3, 1]  # 3 + 2 + 1, none, 2 + 1, 1
    assert set(by[2]) < set(by[0]) and len(set(bucket.tolist())) == 7
    assert sorted(hashed([[2, 1]], 2, 1 << 30)[0]) != by[2]  # order counts
    assert hashed([[1, 2, 3]], 1, 1 << 30)[0].tolist() == hashed([[1], [2], [3]], 3, 1 << 30)[0].tolist()
    assert hashed([], 3, 8)[0].tolist() == [] and max(hashed([list(range(50))], 3, 8)[0]) < 8


def test_the_classifier_is_logistic_regression_on_mean_embeddings(tmp_path: Path) -> None:
    texts = ["abab", "bcb", "xyxyx", "yzq"]
    path = write(tmp_path / "pages.jsonl", [{"url": "http://a/", "text": one} for one in texts])
    spec = validate(HarvestSpec, {**QUICK, "dim": 5, "min_count": 2, "buckets": 1 << 20, "epochs": 2})
    pages, key, labels = Pages([path], spec), Key(3), [1, 1, 0, 0]
    tokenizer = spec.tokenizer.load(lambda: iter(()), "", None)  # type: ignore[arg-type]
    got = Classifier(pages, np.arange(4), np.array(labels), tokenizer, spec, key).scores(pages, np.arange(4))

    def grams(one: str) -> list[str]:
        return [one[i : i + n] for n in (1, 2, 3) for i in range(len(one) - n + 1)]

    every = [gram for one in texts for gram in grams(one)]
    known = {gram for gram in every if every.count(gram) >= 2}
    of = {g: int(hashed([list(g.encode())], len(g), spec.buckets)[0][-1]) for g in known}
    start = key.fold("embeddings").numpy().uniform(-0.2, 0.2, (len(known), 5))
    e = {g: start[i] for i, g in enumerate(sorted(known, key=of.__getitem__))}
    w, step = np.zeros(5), 0

    def mean(one: str) -> np.ndarray:
        return np.mean([e[g] for g in grams(one) if g in known], axis=0)

    for epoch in range(2):
        for row in key.fold("order", epoch).numpy().permutation(np.arange(4)):
            here = [g for g in grams(texts[row]) if g in known]
            h = mean(texts[row])
            pull = (1 - step / 8) * (labels[row] - 1 / (1 + math.exp(-float(h @ w))))
            before = w.copy()
            w = w + pull * h
            for g in here:  # one occurrence after another
                e[g] = e[g] + pull * before / len(here)
            step += 1
    np.testing.assert_allclose(got, [mean(one) @ w for one in texts], rtol=1e-4, atol=1e-7)


def test_a_page_without_known_ngrams_is_last(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"url": "http://a/", "text": one} for one in ("aaaa", "bbbb", "", "zz")])
    spec = validate(HarvestSpec, QUICK)
    pages = Pages([path], spec)
    tokenizer = spec.tokenizer.load(lambda: iter(()), "", None)  # type: ignore[arg-type]
    made = Classifier(pages, np.arange(2), np.array([1, 0]), tokenizer, spec, Key(0))
    scores = made.scores(pages, np.arange(4))
    assert np.isfinite(scores[:2]).all() and (scores[2:] == -math.inf).all() and scores[0] > scores[1]


# --------------------------------------------------------------------------------------------------------------- rounds


def test_the_rounds_find_code_and_a_seed_holds_the_one_before(files: tuple[str, str]) -> None:
    fields = {"keep": 0.08, "pattern_threshold": 0.4}
    pages, found = run(*files, **fields)
    code = np.array(["/src/" in url for url in pages.urls[:200]])
    for one, two in itertools.pairwise(found):
        assert two.seed.tolist() == [*one.seed.tolist(), *one.joined.tolist()]
        assert (two.collected >= one.collected).all() and not one.collected[two.joined].any()
    assert [len(one.kept) for one in found] == [16, 16, 16] and len(found[0].joined)
    collected = found[-1].collected
    assert code[collected].all() and collected.sum() > 20
    assert set(found[-1].domains) <= {f"site{n}.org" for n in range(5)}  # lower case, without the port
    assert {one for globs in found[-1].patterns.values() for one in globs} == {"/src/*"}
    again = run(*files, **fields)[1]
    for one, two in zip(found, again, strict=True):
        assert one.to_dict() == two.to_dict() and np.array_equal(one.scores, two.scores)
    other = run(*files, seed=1, **fields)[1]
    assert not np.array_equal(found[0].scores, other[0].scores)


def test_pages_without_a_known_ngram_are_not_kept(tmp_path: Path) -> None:
    rng = random.Random(0)
    crawl = [{"url": f"http://a{p}.org", "text": text(rng, True) if p % 2 else ""} for p in range(20)]
    paths = write(tmp_path / "c.jsonl", crawl), write(tmp_path / "s.jsonl", [{**crawl[1], "url": "http://b.org"}])
    _, (found,) = run(*paths, rounds=1, keep=1.0, patterns={}, min_count=1)
    assert found.kept.tolist() == list(range(1, 20, 2)) and len(found.domains) == 10
    assert found.to_dict()["lowest_logit"] == min(found.scores[1::2])


@pytest.mark.parametrize(("threshold", "chosen"), [(0.29, []), (0.28, ["a.org"]), (0.3, [])])
def test_a_domain_at_the_threshold_is_not_selected(tmp_path: Path, threshold: float, chosen: list[str]) -> None:
    rng = random.Random(0)
    crawl = [{"url": f"http://a.org/x/{p}", "text": text(rng, p < 29)} for p in range(100)]
    paths = write(tmp_path / "c.jsonl", crawl), write(tmp_path / "s.jsonl", crawl[:29])
    _, (found,) = run(*paths, rounds=1, keep=0.01, domain_threshold=threshold, patterns={"a.org": ["/x/9?"]})
    # the seed's 29 pages count as collected, and the page kept is one of them; 0.29 * 100 is below 29 in floating point
    assert found.collected[:29].all() and found.collected.sum() == 29 + len(found.joined)
    assert found.domains == chosen and len(found.joined) == 10 * len(chosen)


def test_only_pages_under_the_patterns_of_a_selected_domain_join(files: tuple[str, str]) -> None:
    given = {"site0.org": ["/src/a/[0-4]"], "site9.org": ["*"], "site1.org": ["/blog/9", "/nowhere"]}
    pages, found = run(*files, patterns=given, keep=0.15, rounds=1)
    (one,) = found
    assert {"site0.org", "site1.org"} <= set(one.domains) and "site9.org" not in one.domains
    assert {"https://Site1.org:80/blog/9"} <= {pages.urls[row] for row in one.joined}
    before = set(one.kept.tolist())
    wanted = {f"https://Site0.org:80/src/a/{n}" for n in range(5)} | {"https://Site1.org:80/blog/9"}
    assert {pages.urls[row] for row in one.joined} == {
        url for row, url in enumerate(pages.urls[:200]) if url in wanted and row not in before
    }
    assert one.patterns == {host: given[host] for host in ("site0.org", "site1.org")}


def test_prefixes_are_the_outermost_folders_collected_throughout() -> None:
    site = {"/src/a/%d": 1, "/src/b/%d": 1, "/blog/%d": 0}
    paths = [form % n for form in site for n in range(4)]
    hits = [bool(site[form]) for form in site for _ in range(4)]
    assert prefixes(paths, hits, 0.5) == ["/src/*"]  # not "/*", though 8 of 12 are collected
    assert prefixes(paths[:8], hits[:8], 0.5) == ["/*"]
    assert prefixes(paths, [True, True, False, False] * 2 + [False] * 4, 0.5) == []  # exactly half
    assert prefixes(["/a?x=1/y/z", "/b", "/c"], [True] * 3, 0.5) == ["/*"]  # a query is no folder
    assert prefixes(["/x/1", "/x/2"], [True] * 2, 0.5) == []  # two pages say nothing
    odd = [f"/[x]*/{n}" for n in range(3)] + [f"/y/{n}" for n in range(3)]
    assert prefixes(odd, [True] * 3 + [False] * 3, 0.5) == ["/[[]x][*]/*"]


# -------------------------------------------------------------------------------------------------------------- command


def test_the_command_writes_rows_that_a_corpus_reads(
    cli: Callable[..., Any], files: tuple[str, str], tmp_path: Path
) -> None:
    out, report = tmp_path / "code.jsonl", tmp_path / "report.json"
    crawl, seed = files
    asked = ["harvest", crawl, "--seed", seed, "--rounds", "2", "--out", out, "--report", report]
    said = cli(*asked, "--tokenizer", "bytes", "--lr", "1", "--domain-threshold", "0.1")
    assert said.status == 0 and said.out == f"{out}\n" and said.err.count("\n") == 2
    rows, lines = Path(crawl).read_text().splitlines(), out.read_text().splitlines()
    assert lines and lines == [row for row in rows if row in set(lines)]
    assert [one.text for one in JsonlSpec(path=str(out)).documents()] == [json.loads(line)["text"] for line in lines]
    told = json.loads(report.read_text())
    assert told["collected"] == len(lines) and told["pages"] == 200 and len(told["rounds"]) == 2
    shown = cli(*asked, "--tokenizer", "bytes", "--lr", "1", "--json")
    assert json.loads(shown.out) == told and out.read_text().splitlines() == lines


def test_another_process_finds_the_same_with_a_tokenizer_that_it_trains(
    cli: Callable[..., Any], files: tuple[str, str], tmp_path: Path
) -> None:
    code = (
        "import sys\nfrom torchstone.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    assert 'torch' not in sys.modules"
    )
    asked = ["harvest", files[0], "--seed", files[1], "--rounds", "2", "--json", "--out"]
    said = cli(*asked, tmp_path / "here.jsonl")
    command = [sys.executable, "-c", code, *asked, str(tmp_path / "there.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == said.out and said.status == 0
    assert (tmp_path / "here.jsonl").read_bytes() == (tmp_path / "there.jsonl").read_bytes()


ROW = {"url": "http://a.org/x", "text": "some text"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "row 3 has no url"),
        ({"url": "http://a.org/"}, "row 3 has no text"),
        ({**ROW, "url": 7}, "row 3: url is int, a string is needed"),
        ({**ROW, "url": "a.org/x"}, "row 3: url 'a.org/x' has no host"),
        ({**ROW, "url": "http://[a/"}, "row 3: url 'http://[a/' has no host"),
        ('{"url": "http://a.org/", "text": "\\ud800"}', "row 3: text holds half of a surrogate pair"),
        ("[1]", "row 3: a JSON object is needed, not list"),
        ("{", "row 3 is not JSON"),
    ],
)
@pytest.mark.parametrize("bad", ["crawl", "seed"])
def test_bad_rows_are_refused_and_nothing_written(
    cli: Callable[..., Any], tmp_path: Path, row: object, message: str, bad: str
) -> None:
    paths = {
        name: write(tmp_path / f"{name}.jsonl", [ROW, "", row if name == bad else ROW]) for name in ("crawl", "seed")
    }
    before = sorted(tmp_path.iterdir())
    said = cli("harvest", paths["crawl"], "--seed", paths["seed"], "--out", tmp_path / "out.jsonl")
    assert said.status == 2 and said.err.count("\n") == 1 and message in said.err and paths[bad] in said.err
    assert said.out == "" and sorted(tmp_path.iterdir()) == before


def test_what_cannot_be_done_is_refused(cli: Callable[..., Any], files: tuple[str, str], tmp_path: Path) -> None:
    crawl, seed = files
    empty, tiny = write(tmp_path / "empty.jsonl", [""]), write(tmp_path / "tiny.jsonl", [{**ROW, "text": "ab"}])
    odd = write(tmp_path / "odd.json", [{"a.org": ["questions/*"]}])
    out = ["--out", tmp_path / "out.jsonl", "--tokenizer", "bytes"]
    for arguments, message in (
        ([crawl, *out], "needs files of a crawl, --seed"),
        ([crawl, "--seed", tmp_path / "none.jsonl", *out], "no such file"),
        ([crawl, "--seed", empty, *out], "the seed has no pages"),
        ([empty, "--seed", seed, *out], "the crawl has no pages"),
        ([crawl, "--seed", crawl, *out], "is part of the crawl"),
        ([crawl, "--seed", seed, "--out", crawl], "is read here, and cannot be written"),
        ([crawl, "--seed", seed, "--out", tmp_path / "no" / "out"], "a file in a folder that exists is needed"),
        ([crawl, "--seed", seed, *out, "--keep", "0"], "harvest.keep"),
        ([crawl, "--seed", seed, *out, "--patterns", odd], "a.org: a list of patterns is needed"),
        ([tiny, "--seed", write(tmp_path / "other.jsonl", [{**ROW, "url": "http://b.org"}]), *out, "--epochs", "0"],
         "harvest.epochs"),
        ([write(tmp_path / "t1.jsonl", [{**ROW, "text": "ab"}]), "--seed",
          write(tmp_path / "t2.jsonl", [{"url": "http://b.org", "text": "cd"}]), *out], "no n-gram stands 3 times"),
        ([tiny, "--seed", write(tmp_path / "same.jsonl", [ROW]), *out], "every page of the crawl is in the seed"),
    ):  # fmt: skip
        said = cli("harvest", *arguments)
        assert said.status == 2 and said.err.count("\n") == 1 and message in said.err, said.err
    assert not (tmp_path / "out.jsonl").exists()


def test_patterns_are_of_hosts_in_any_case(tmp_path: Path) -> None:
    path = tmp_path / "patterns.json"
    path.write_text('{"A.org": ["/questions/*"]}')
    assert read_patterns(path) == {"a.org": ["/questions/*"]}

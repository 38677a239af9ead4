"""DeepSeek-Coder (Guo et al. 2024, arXiv 2401.14196): repositories as documents, and fill in the middle."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torchstone.data.corpora._dependencies import ordered
from torchstone.data.infilling import (
    InfillingDataSpec,
    Rearranged,
    Sentinels,
    arranged,
    cut,
    sentinels_of,
    with_sentinels,
)
from torchstone.data.prepare import Encoding
from torchstone.data.tokenizer import BYTE_CHARACTERS, byte_level
from torchstone.evaluate.scoring import Job, Scorer
from torchstone.papers._claim import Claim, Effect, Measured, Number, Paper, Scale
from torchstone.recipe import Recipe, load_recipe
from torchstone.train import train

__all__ = ["PAPER"]

# ------------------------------------------------------------------------------------------------------- what is exact


def _texts(rng: random.Random, count: int) -> list[str]:
    """Documents of characters of one to four bytes, some of which spell out sentinels."""
    pieces = [
        "def f(x):\n",
        "    return x\n",
        "é",
        "€",
        "𝄞",
        "<|fim_begin|>",
        "<|fim_hole|>",
        "<|fim_end|>",
        "\r\n",
        "",
    ]
    return ["".join(rng.choices(pieces, k=rng.randint(0, 40))) for _ in range(count)]


def _exact(scale: Scale, first: int) -> Measured:
    count, rng = (2_000 if scale == "quick" else 20_000), random.Random(first)
    tokenizer = with_sentinels(byte_level({character: value for value, character in enumerate(BYTE_CHARACTERS)}))
    sentinels = sentinels_of(tokenizer)
    assert sentinels is not None
    lost = wrong = rearranged = 0
    for text in (texts := _texts(rng, count)):
        parts = cut(text, 0.5)
        ids = [tokenizer.encode(part) for part in parts]
        if len(parts) == 1:
            lost += ids[0] != tokenizer.encode(text)
            continue
        rearranged += 1
        lost += ids[0] + ids[1] + ids[2] != tokenizer.encode(text)
        for mode in ("psm", "spm"):
            whole = arranged(sentinels, mode, ids[0], ids[2], ids[1])
            wrong += [token for token in whole if token in tokenizer.specials] != list(sentinels)
    late = missing = 0
    for _ in range(count // 20):
        files = [f"{number}.py" for number in rng.sample(range(100), 12)]
        for cyclic in (False, True):
            needs = {
                file: {other for other in (files if cyclic else files[:at]) if other != file and rng.random() < 0.2}
                for at, file in enumerate(files)
            }
            order = ordered(needs)
            missing += sorted(order) != sorted(files)
            late += 0 if cyclic else sum(order.index(o) > order.index(file) for file in files for o in needs[file])
    return Measured(
        {
            "documents whose parts put together are not the document": lost,
            "rearranged documents without exactly begin, hole and end, in this order": wrong,
            "standard deviations of the rate from one half": abs(rearranged - len(texts) / 2) / (len(texts) / 4) ** 0.5,
            "files of acyclic graphs before one that they need": late,
            "orders of graphs, with cycles too, that are no permutation": missing,
        }
    )


_exact.builds = (  # type: ignore[attr-defined]
    "torchstone.data.infilling",
    "torchstone.data.corpora._dependencies",
)

EXACT = Claim(
    id="exact",
    kind="identity",
    text="Prefix, middle and suffix of every document are its tokens again, whatever it spells out; a rearranged one "
    "has the three sentinels once, in order; half are rearranged. Ordered files come after those they need where there "
    "is no cycle, and each comes once.",
    figure="rate 0.5; the order always takes the file with the fewest dependencies left",
    gates=(
        Number("documents whose parts put together are not the document", high=0),
        Number("rearranged documents without exactly begin, hole and end, in this order", high=0),
        Number("standard deviations of the rate from one half", high=4),
        Number("files of acyclic graphs before one that they need", high=0),
        Number("orders of graphs, with cycles too, that are no permutation", high=0),
    ),
    run=_exact,
    withdrawn="it took equal texts, which are cut alike, for independent draws; see exact-of-distinct-texts",
)


def _exact_of_distinct(scale: Scale, first: int) -> Measured:
    """As `_exact`, the rate over texts that differ."""
    count, rng = (2_000 if scale == "quick" else 20_000), random.Random(first)
    texts = set(_texts(rng, count))
    rearranged = sum(len(cut(text, 0.5)) > 1 for text in texts)
    off = abs(rearranged - len(texts) / 2) / (len(texts) / 4) ** 0.5
    return Measured({**_exact(scale, first).numbers, "standard deviations of the rate from one half": off})


_exact_of_distinct.builds = _exact.builds  # type: ignore[attr-defined]

EXACT_OF_DISTINCT = replace(
    EXACT,
    id="exact-of-distinct-texts",
    text=f"{EXACT.text} The rate is counted over texts that differ.",
    run=_exact_of_distinct,
    withdrawn=None,
)

# ------------------------------------------------------------------------------------------- half of the documents


class ForgottenSpec(InfillingDataSpec):
    """Sentinels between parts that stay in their places: for the claim's sabotage arm."""

    kind: ClassVar[str] = "infilling_forgotten"
    offered: ClassVar[bool] = False

    def encoding(self) -> Encoding:
        return _Forgotten(self)


class _Forgotten(Rearranged):
    def arranged(
        self, sentinels: Sentinels, prefix: Sequence[int], middle: Sequence[int], suffix: Sequence[int]
    ) -> list[int]:
        return [sentinels.begin, *prefix, sentinels.hole, *middle, sentinels.end, *suffix]


@dataclass(frozen=True)
class _Size:
    """What a scale spends; `grid` of learning rates, on a seed of its own."""

    steps: int
    seeds: int
    control_seeds: int
    grid: tuple[float, ...]


_SIZES = {
    "quick": _Size(steps=60, seeds=1, control_seeds=1, grid=(3e-3,)),
    "evidence": _Size(steps=500, seeds=5, control_seeds=3, grid=(1e-3, 3e-3, 1e-2)),
}
_TUNING = 100_000
"""Distance of the seed that learning rates are chosen on."""
_CHUNK, _MIDDLE, _PIECES = 96, 12, 512
_ARMS: dict[str, dict[str, Any]] = {
    "none": {"kind": "infilling", "rate": 0.0},
    "half": {"kind": "infilling", "rate": 0.5},
    "all": {"kind": "infilling", "rate": 1.0},
    "forgotten": {"kind": "infilling_forgotten", "rate": 0.5},
}


def _recipe(size: _Size, arm: str, seed: int, lr: float) -> Recipe:
    return load_recipe(
        {
            "model": {"width": 64, "depth": 3, "attention": {"heads": 4}},
            "data": {**_ARMS[arm], "corpus": "packages", "tokenizer": "bytes", "block": 128, "chunk": _CHUNK},
            "optimizer": {"kind": "adamw", "lr": lr},
            "schedule": {"kind": "linear", "warmup": 20},
            "trainer": {
                "seed": seed,
                "steps": size.steps,
                "batch": 8,
                "device": "cpu",
                "threads": 1,
                "precision": "fp32",
                "compile": "off",
                "save_every": size.steps,
            },
            "evaluate": {"every": size.steps, "blocks": 1, "test": False},
        }
    )


def _pieces(recipe: Recipe) -> list[tuple[str, str, str]]:
    """Prefix, middle and suffix of held-out pieces of source, of the documents' length in training."""
    rng, text = random.Random(0), "".join(document.text for document in recipe.data.prepare().texts("test"))
    found = []
    for start in rng.sample(range(0, len(text) - _CHUNK, _CHUNK), _PIECES):
        at = rng.randint(0, _CHUNK - _MIDDLE)
        piece = text[start : start + _CHUNK]
        found.append((piece[:at], piece[at : at + _MIDDLE], piece[at + _MIDDLE :]))
    return found


def _nats(scorer: Scorer, texts: Sequence[tuple[list[int], list[int]]]) -> float:
    """Mean nats a byte of the second of each pair of ids after the first."""
    jobs = [
        (0, Job([*before, *ids[:-1]], range(len(before) - 1, len(before) + len(ids) - 1), ids)) for before, ids in texts
    ]
    return -scorer.totals(jobs, "pieces")[0] / sum(len(ids) for _, ids in texts)


def _measured(recipe: Recipe, pieces: Sequence[tuple[str, str, str]]) -> dict[str, float]:
    """Of one training, nats a byte: of whole pieces, of middles filled in, of middles after their prefix alone."""
    with tempfile.TemporaryDirectory(prefix="torchstone-coder-") as folder:
        scorer = Scorer.of_run(train(recipe, out=Path(folder) / "run", quiet=True), batch=64)
    sentinels = sentinels_of(scorer.tokenizer)
    assert sentinels is not None
    start = scorer.tokenizer.separator
    ids = [scorer.tokenizer.encode_batch(parts) for parts in pieces]
    return {
        "plain": _nats(scorer, [([start], [*prefix, *middle, *suffix]) for prefix, middle, suffix in ids]),
        "filled in": _nats(scorer, [([start, *arranged(sentinels, "psm", p, s)], m) for p, m, s in ids]),
        "gone on": _nats(scorer, [([start, *p], m) for p, m, _ in ids]),
    }


def _half(scale: Scale, first: int) -> Measured:
    size = _SIZES[scale]
    pieces = _pieces(_recipe(size, "none", first, size.grid[0]))
    numbers: dict[str, float] = {}
    values: dict[str, dict[int, float]] = {}
    for arm in _ARMS:
        # what an arm is trained for decides its learning rate
        asked = "plain" if arm == "none" else "filled in"
        tried = {
            lr: _measured(_recipe(size, arm, first + _TUNING, lr), pieces)[asked]
            for lr in (size.grid if len(size.grid) > 1 else ())
        }
        lr = min(tried, key=tried.__getitem__, default=size.grid[0])
        numbers[f"learning rate of {arm}"] = lr
        for seed in range(first, first + (size.control_seeds if arm == "forgotten" else size.seeds)):
            for name, nats in _measured(_recipe(size, arm, seed, lr), pieces).items():
                values.setdefault(f"{arm}, {name}", {})[seed] = nats
    return Measured(numbers, values)


_half.builds = (  # type: ignore[attr-defined]
    "torchstone.data.infilling",
    "torchstone.data.prepare",
    "torchstone.evaluate.scoring",
)

HALF = Claim(
    id="half",
    kind="behaviour",
    text="After 500 steps, each at the best of three learning rates, a byte model of which half of the documents (96 "
    "characters of source code) were rearranged codes plain code no worse than one that saw no rearranged one by 0.05 "
    "nats a byte, and middles of 12 characters no worse than one that saw rearranged ones alone by 0.05. Middles after "
    "their prefix alone are measured beside it and no part of the claim.",
    figure="rate 1 fills in best and completes worst, rate 0.5 does nearly as well at both (figure 3); 0.5 was taken",
    gates=(
        Effect("plain code, half beside none", "half, plain", "none, plain", margin=-0.05, sabotage="all, plain"),
        Effect(
            "filling in, half beside all",
            "half, filled in",
            "all, filled in",
            margin=-0.05,
            sabotage="forgotten, filled in",
        ),
    ),
    run=_half,
)

PAPER = Paper(
    slug="deepseek-coder",
    title="DeepSeek-Coder: When the Large Language Model Meets Programming - The Rise of Code Intelligence",
    authors="Daya Guo, Qihao Zhu, Dejian Yang, Zhenda Xie, Kai Dong, Wentao Zhang, Guanting Chen, Xiao Bi, Y. Wu, "
    "Y.K. Li, Fuli Luo, Yingfei Xiong, Wenfeng Liang",
    year=2024,
    link="https://arxiv.org/abs/2401.14196",
    topics=("code", "data", "infilling", "repositories"),
    parts=("corpus.repositories", "data.infilling"),
    summary="A repository is a document, its files in order of dependency; half of the documents are rearranged so "
    "that the model learns to fill in the middle.",
    claims=(EXACT, EXACT_OF_DISTINCT, HALF),
)

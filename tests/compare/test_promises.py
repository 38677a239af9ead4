"""What the decision rule promises, under repetition: on numbers whose truth is known, and on real trainings.

`promises.json` keeps the test losses of two pools of trainings that differ in their seed alone, and the figures that
follow from them. TORCHSTONE_PROMISES=write trains the pools anew and writes it, on one core in about two minutes.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

import tiny
import torchstone
from torchstone.compare import decide
from torchstone.compare.decide import interval

pytestmark = pytest.mark.slow

KEPT = Path(__file__).with_name("promises.json")
POOL = range(40)
SEEDS = 5
LR = 8e-3
HARM = 8
"""The planted harm: what the learning rate of the other pool is divided by."""
SAME, HARMED = "same", "harmed"
NEAR = {"coverage": 0.001, "called": 0.005, "loss": 0.01}
"""Tolerances: of shares that follow from a fixed stream of random numbers, of losses (nats) on another machine."""


def recipe(folder: Path, arm: str, seed: int) -> dict[str, Any]:
    """Plain data of one training of a pool: 25,600 tokens, less than a second."""
    corpus = folder / "corpus.txt"
    if not corpus.exists():
        tiny.text(corpus, lines=2000)
    return tiny.recipe(
        folder,
        model={"width": 32, "ffn": {"kind": "mlp", "hidden": 64}},
        data={"block": 32},
        optimizer={"lr": LR if arm == SAME else LR / HARM},
        trainer={"steps": 100, "batch": 8, "seed": seed, "log_every": 100, "save_every": 100},
        evaluate={"every": 100, "test_blocks": 64},
    )


def written(folder: Path) -> str:
    """SHA-256 of the recipes as they are written here, and of their text."""
    both = [recipe(folder, arm, 0) for arm in (SAME, HARMED)]
    for data in both:
        data["data"] = {**data["data"], "corpus": (folder / "corpus.txt").read_text(), "cache": None}
    return hashlib.sha256(json.dumps(both, sort_keys=True).encode()).hexdigest()


def trained(folder: Path, arm: str, seed: int) -> float:
    """The test loss of one training of a pool."""
    run = torchstone.train(recipe(folder, arm, seed), out=folder / "run", quiet=True)
    found = next(row["test_loss"] for row in run.metrics() if "test_loss" in row)
    shutil.rmtree(run.path)
    return float(found)


def coverage(n: int) -> float:
    """Share of 20,000 samples of n normals whose interval holds the true mean."""
    stream, draws = random.Random(n), 20_000
    hits = 0
    for _ in range(draws):
        span = interval([stream.gauss(1.0, 2.0) for _ in range(n)])
        hits += span.low <= 1.0 <= span.high
    return hits / draws


def called_different(losses: list[float]) -> float:
    """Share of 200 pairs of samples without a seed in common, of one pool, that are called better or worse."""
    stream, pairs = random.Random(0), 200
    words = []
    for _ in range(pairs):
        drawn = stream.sample(losses, 2 * SEEDS)
        words.append(decide(drawn[:SEEDS], {"b": drawn[SEEDS:]})["b"].word)
    return sum(word in ("better", "worse") for word in words) / pairs


def called_worse(reference: list[float], variant: list[float]) -> float:
    """Share of 20 sets of seeds by which the variant is called worse."""
    stream, sets = random.Random(0), 20
    words = []
    for _ in range(sets):
        seeds = stream.sample(POOL, SEEDS)
        words.append(decide([reference[s] for s in seeds], {"b": [variant[s] for s in seeds]})["b"].word)
    return words.count("worse") / sets


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("promises")


@pytest.fixture(scope="module")
def kept(folder: Path) -> dict[str, Any]:
    """What the file keeps; written anew first if the environment asks for it."""
    if os.environ.get("TORCHSTONE_PROMISES") == "write":
        losses = {arm: [trained(folder, arm, seed) for seed in POOL] for arm in (SAME, HARMED)}
        figures = {
            "coverage of 3": coverage(3),
            "coverage of 5": coverage(5),
            "one pool called different": called_different(losses[SAME]),
            "harm called worse": called_worse(losses[SAME], losses[HARMED]),
        }
        KEPT.write_text(json.dumps({"recipes": written(folder), "figures": figures, "losses": losses}, indent=1) + "\n")
    found: dict[str, Any] = json.loads(KEPT.read_text())
    return found


def test_the_pools_are_trainings_of_these_recipes(kept: dict[str, Any], folder: Path) -> None:
    again = "run this file with TORCHSTONE_PROMISES=write"
    assert kept["recipes"] == written(folder), f"the recipes of the pools have changed; {again}"
    for arm, losses in kept["losses"].items():
        assert len(losses) == len(set(losses)) == len(POOL)
        assert trained(folder, arm, 7) == pytest.approx(losses[7], abs=NEAR["loss"]), f"training changed; {again}"


@pytest.mark.parametrize("n", [3, 5])
def test_the_interval_of_a_few_seeds_covers_the_truth_in_95_of_100(kept: dict[str, Any], n: int) -> None:
    found = coverage(n)
    assert 0.94 <= found <= 0.96
    assert found == pytest.approx(kept["figures"][f"coverage of {n}"], abs=NEAR["coverage"])


def test_trainings_that_differ_in_their_seed_alone_are_called_different_in_about_5_of_100(kept: dict[str, Any]) -> None:
    found = called_different(kept["losses"][SAME])
    assert 0.01 <= found <= 0.09
    assert found == pytest.approx(kept["figures"]["one pool called different"], abs=NEAR["called"])


def test_one_variant_under_two_names_differs_by_exactly_nothing_under_equal_seeds(folder: Path) -> None:
    def loss(seed: int) -> dict[str, float]:
        return {"loss": trained(folder, SAME, seed)}

    result = torchstone.compare({"a": loss, "b": loss}, 3)
    verdict = result.verdicts()["b"]
    values = result.arms[0].values("loss", 1.0)
    assert len(set(values.values())) == 3 and result.arms[1].values("loss", 1.0) == values
    assert verdict.word == "equivalent"
    assert (verdict.difference.low, verdict.difference.mean, verdict.difference.high) == (0.0, 0.0, 0.0)


def test_a_planted_harm_is_called_worse_in_18_of_20_comparisons(kept: dict[str, Any]) -> None:
    found = called_worse(kept["losses"][SAME], kept["losses"][HARMED])
    assert found >= 18 / 20
    assert found == pytest.approx(kept["figures"]["harm called worse"], abs=NEAR["called"])

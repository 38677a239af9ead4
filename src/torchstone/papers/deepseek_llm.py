"""DeepSeek LLM: Scaling Open-Source Language Models with Longtermism (DeepSeek-AI 2024, arXiv 2401.02954)."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchstone.compare.sweep import Grid, Size, sweep
from torchstone.errors import TorchstoneError
from torchstone.evaluate.scaling import (
    Point,
    best_losses,
    budgets_of,
    closed_form,
    fit_isoflop,
    fit_loss,
    flops_without_embedding,
    minimum_of,
    predict,
    suggest,
)
from torchstone.interop.presets import preset
from torchstone.model.measure import measure
from torchstone.papers._claim import Arms, Claim, Effect, Measured, Number, Paper, Scale, Setting, one_thread
from torchstone.papers._preferences import PLANTED_PREFERENCE
from torchstone.recipe import load_recipe

__all__ = ["PAPER"]


# ------------------------------------------------------------------------------------------------------------ the laws

_TOKENS = 2e12
_EXPONENT = 0.5243


def _planted(noise: float, seed: int) -> list[Point]:
    """Trainings of ten sizes in each of eight budgets from 1e17 to 3e20, under L = E + A M^-a + B D^-b whose best M is
    the published 0.1715 C^0.5243; `noise` is a share of the loss."""
    a, b, irreducible, of_tokens = 0.7 * (1 - _EXPONENT), 0.7 * _EXPONENT, 0.5, 2200.0
    of_model = b * of_tokens / a * 0.1715 ** (a + b)
    draw, found = np.random.default_rng(seed), []
    for compute in np.geomspace(1e17, 3e20, 8):
        for away in np.linspace(-2, 2, 10):
            size = 0.1715 * compute**_EXPONENT * math.exp(away)
            loss = irreducible + of_model * size**-a + of_tokens * (compute / size) ** -b
            found.append(Point(size, compute / size, loss * (1 + noise * draw.standard_normal())))
    return found


def _laws(scale: Scale, first: int) -> Measured:
    numbers: dict[str, float] = {}
    for name in ("7b", "67b"):
        spec: Any = preset(f"deepseek-llm-{name}")
        with torch.device("meta"):
            model = spec.build()
        size = closed_form(spec.depth, spec.width, 4096)
        told = suggest(size * _TOKENS)
        assert told.lr is not None and told.batch is not None
        numbers[f"{name}: 10^9 parameters"] = measure(model).parameters / 1e9
        numbers[f"{name}: M, 10^9 operations a token"] = size / 1e9
        numbers[f"{name}: M counted over M in closed form"] = flops_without_embedding(model, 4096) / size
        numbers[f"{name}: learning rate of the law for 2 * 10^12 tokens, 10^-4"] = told.lr * 1e4
        numbers[f"{name}: batch of the law, 10^6 tokens"] = told.batch / 1e6
    off = []
    for compute in np.geomspace(1e15, 1e25, 41):
        told = suggest(float(compute))
        assert told.flops_per_token is not None and told.tokens is not None
        off.append(abs(told.flops_per_token * told.tokens / compute - 1))
    numbers["M D over C: furthest from 1"] = max(off)
    clean = fit_isoflop(_planted(0.0, first), bootstrap=0).flops_per_token.exponent
    numbers["planted exponent of M found, off by"] = abs(clean - _EXPONENT)
    noisy = [fit_isoflop(_planted(0.002, first + n), bootstrap=0).flops_per_token.exponent for n in range(10)]
    numbers["through noise of 0.2 %, off by at most"] = max(abs(found - _EXPONENT) for found in noisy)
    return Measured(numbers)


_laws.builds = ("torchstone.evaluate.scaling", "torchstone.model.measure")  # type: ignore[attr-defined]


def _about(name: str, value: float, within: float) -> Number:
    return Number(name, low=value - within, high=value + within)


LAWS = Claim(
    id="laws",
    kind="identity",
    text="The published models have the published sizes; the published laws give for them the learning rates and "
    "batches that were used, within a tenth, and split any compute into M and D whose product it is; and the fit finds "
    "a planted exponent of the best M.",
    figure="6.9B and 67.4B parameters, trained at 4.2e-4 and 3.2e-4 with 2304 and 4608 sequences of 4,096 tokens "
    "(9.44M and 18.87M); eta = 0.3118 C^-0.1250, B = 0.2920 C^0.3271, M = 0.1715 C^0.5243, D = 5.8316 C^0.4757",
    gates=(
        _about("7b: 10^9 parameters", 6.910, 5e-4),
        _about("67b: 10^9 parameters", 67.425, 5e-4),
        _about("7b: M, 10^9 operations a token", 42.28, 5e-3),
        _about("67b: M, 10^9 operations a token", 497.3, 5e-2),
        _about("7b: M counted over M in closed form", 1.0, 0.03),
        _about("7b: learning rate of the law for 2 * 10^12 tokens, 10^-4", 4.2, 0.42),
        _about("67b: learning rate of the law for 2 * 10^12 tokens, 10^-4", 3.2, 0.32),
        _about("7b: batch of the law, 10^6 tokens", 9.44, 0.944),
        _about("67b: batch of the law, 10^6 tokens", 18.87, 1.887),
        Number("M D over C: furthest from 1", high=1e-3),
        Number("planted exponent of M found, off by", high=1e-3),
        Number("through noise of 0.2 %, off by at most", high=0.02),
    ),
    run=_laws,
)


# -------------------------------------------------------------------------------------------------------- the schedule

_STEPS = 600
_MULTI_STEP: dict[str, Any] = {"kind": "multi_step", "at": [0.8, 0.9], "to": [0.316, 0.1]}

SCHEDULE = Claim(
    id="multi-step-as-good",
    kind="behaviour",
    text="After equally many steps, each at the best of three learning rates, a byte model trained at a constant rate "
    "that falls to 31.6 % after 80 % of the steps and to 10 % after 90 % has a loss at most 0.02 nats a byte above "
    "that of one trained on a cosine to 10 %.",
    figure="the multi-step schedule ends essentially where the cosine does",
    gates=(
        Effect(
            "not worse than the cosine",
            "multi_step",
            "cosine",
            margin=-0.02,  # nats a byte, 1 % of a loss near 2: "essentially equal" to the eye in the paper's figure
            sabotage="falls_at_the_start",
        ),
    ),
    arms=Arms(
        recipe={
            "model": {
                "width": 64,
                "depth": 3,
                "attention": {"kind": "softmax", "heads": 4},
                "position": "rotary",
                "ffn": "swiglu",
            },
            "data": {"corpus": "packages", "tokenizer": "bytes", "block": 64},
            "optimizer": {"kind": "adamw", "lr": 4e-3, "betas": [0.9, 0.95], "weight_decay": 0.1},
            "schedule": {"kind": "cosine", "end": 0.1, "warmup": 30},
            **one_thread(_STEPS, 16, blocks=64, test_blocks=1024),
        },
        patches={
            "cosine": {},
            "multi_step": {"schedule": _MULTI_STEP},
            # a decimal point off: at 8 and 9 % of the steps
            "falls_at_the_start": {"schedule": {**_MULTI_STEP, "at": [0.08, 0.09]}},
        },
        settings={
            "quick": Setting(seeds=2, control_seeds=1, patch={"trainer": {"steps": 60}, "schedule": {"warmup": 5}}),
            "evidence": Setting(seeds=5, control_seeds=3, tune=("optimizer.lr", (2e-3, 4e-3, 8e-3))),
            "gpu": Setting(
                seeds=5,
                control_seeds=3,
                patch={
                    "model": {"width": 768, "depth": 12, "attention": {"heads": 12}},
                    "data": {"block": 1024},
                    "schedule": {"warmup": 200},
                    "trainer": {"steps": 10_000, "precision": "bf16", "compile": "auto"},
                },
                tune=("optimizer.lr", (3e-4, 6e-4, 1.2e-3)),
            ),
        },
        metric="test_loss",
    ),
)


# ------------------------------------------------------------------------------------------------------------ IsoFLOP


@dataclass(frozen=True)
class _Study:
    """What a scale spends: every budget with every width at `depth`, under each seed."""

    budgets: tuple[float, ...]
    widths: tuple[int, ...]
    seeds: int
    depth: int = 2
    block: int = 64
    batch: int = 16
    lr: float = 8e-3
    std: float = 0.1
    warmup: int = 20
    precision: str = "fp32"


_STUDIES = {
    "quick": _Study(budgets=(8e9, 1.6e10, 3.2e10, 6.4e10), widths=(16, 24, 32), seeds=1),
    "evidence": _Study(budgets=(3e10, 6e10, 1.2e11, 2.4e11), widths=(16, 24, 32, 48), seeds=5),
    "gpu": _Study(
        budgets=(1e16, 3e16, 1e17, 3e17),
        widths=(256, 384, 512, 768, 1024),
        seeds=5,
        depth=8,
        block=1024,
        batch=32,
        lr=1e-3,
        std=0.02,
        warmup=200,
        precision="bf16",
    ),
}


def _isoflop(scale: Scale, first: int) -> Measured:
    study = _STUDIES[scale]
    recipe = load_recipe(
        {
            "model": {
                "width": 64,
                "depth": study.depth,
                "attention": {"kind": "softmax", "heads": 2},
                "position": "rotary",
                "ffn": "swiglu",
                "residual": {"kind": "pre", "std": study.std},
            },
            "data": {"corpus": "packages", "tokenizer": "bytes", "block": study.block},
            "optimizer": {"kind": "adamw", "lr": study.lr, "betas": [0.9, 0.95], "weight_decay": 0.1},
            "schedule": {**_MULTI_STEP, "warmup": study.warmup},
            **one_thread(10**6, study.batch, blocks=8, test_blocks=512),
        },
        [{"trainer": {"precision": study.precision}}],
    )
    sizes = tuple(Size(width) for width in study.widths)
    points: list[Point] = []
    off: dict[int, float] = {}
    stays: dict[int, float] = {}
    with tempfile.TemporaryDirectory(prefix="torchstone-deepseek-llm-") as folder:
        for seed in range(first, first + study.seeds):
            grid = Grid(study.budgets, sizes, seeds=(seed,))
            found = sweep(recipe, grid, Path(folder), say=lambda text: None)
            *smaller, largest = budgets_of(found)
            law = fit_loss(best_losses(smaller), bootstrap=0)
            off[seed] = abs(predict(law, largest.best.compute).value / largest.best.loss - 1)
            stays[seed] = abs(smaller[-1].best.loss / largest.best.loss - 1)
            points += found
    inside = []
    for budget in budgets_of(points):
        try:
            minimum_of(budget)
        except TorchstoneError:
            continue
        inside.append(budget)
    numbers = {"budgets with a minimum inside the sizes": float(len(inside)), "exponent of M": 0.0}
    if len(inside) >= 3:
        best = fit_isoflop([point for budget in inside for point in budget.points], seed=first).flops_per_token
        numbers["exponent of M"] = best.exponent
        if best.low is not None and best.high is not None:
            numbers |= {"exponent of M, from": best.low, "exponent of M, to": best.high}
    perfect = dict.fromkeys(off, 0.0)
    return Measured(numbers, {"law": off, "what was measured": perfect, "no law": stays})


_isoflop.builds = (  # type: ignore[attr-defined]
    "torchstone.compare.sweep",
    "torchstone.evaluate.scaling",
    "torchstone.model.attention.softmax",
    "torchstone.model.residual.pre",
    "torchstone.model.position.rotary",
    "torchstone.model.feedforward.swiglu",
    "torchstone.train.optimizers.adamw",
    "torchstone.train.schedules.multi_step",
)

ISOFLOP = Claim(
    id="isoflop",
    kind="behaviour",
    text="Of four budgets, each twice the one before, three or more have their lowest loss inside a grid of four sizes "
    "of a byte model; the best M grows as a power of compute between 0.3 and 0.7; and a power law with an irreducible "
    "term through the three smaller ones predicts the largest one's best loss within 2 %, which its neighbour's does "
    "not.",
    figure="exponents of M from 0.450 to 0.578, by data; losses of the 7B and 67B models predicted from runs a "
    "thousand times smaller",
    gates=(
        Number("budgets with a minimum inside the sizes", low=3),
        Number("exponent of M", low=0.3, high=0.7),
        Effect(
            "the law is off by at most 2 %",
            "law",
            "what was measured",
            margin=-0.02,  # a share of the loss
            sabotage="no law",
        ),
    ),
    run=_isoflop,
)

PAPER = Paper(
    slug="deepseek-llm",
    title="DeepSeek LLM: Scaling Open-Source Language Models with Longtermism",
    authors="DeepSeek-AI: Xiao Bi, Deli Chen, Guanting Chen, Shanhuang Chen, Damai Dai et al.",
    year=2024,
    link="https://arxiv.org/abs/2401.02954",
    topics=("scaling laws", "learning rate", "schedule", "batch size", "preferences"),
    parts=("schedule.multi_step", "objective.dpo"),
    summary="Batch size, learning rate, model scale and tokens as power laws of compute, with a model's scale measured "
    "in operations a token; a schedule in steps, whose first phase can be continued; and preferences learned without a "
    "reward model.",
    claims=(LAWS, SCHEDULE, ISOFLOP, PLANTED_PREFERENCE),
)

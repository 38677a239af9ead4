"""DeepSeek-Coder-V2 (Zhu et al. 2024, arXiv 2406.11931): a trained model goes on with another mixture of texts."""

from __future__ import annotations

import math
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from torchstone.interop.presets import preset
from torchstone.model.measure import measure
from torchstone.papers._claim import Claim, Effect, Measured, Number, Paper, Scale
from torchstone.papers._harvest import HARVEST
from torchstone.recipe import load_recipe
from torchstone.train import train
from torchstone.train.run import RunFolder

__all__ = ["PAPER"]

# -------------------------------------------------------------------------------------------------------------- sizes


def _sizes(scale: Scale, first: int) -> Measured:
    with torch.device("meta"):
        models: dict[str, Any] = {name: preset(f"deepseek-coder-v2{name}").build() for name in ("", "-lite")}
    counts = {name: measure(model) for name, model in models.items()}
    return Measured(
        {
            "parameters of the large model": counts[""].parameters,
            "those that a token meets": counts[""].active_with_embedding,
            "parameters of the small one": counts["-lite"].parameters,
            "those that a token meets, of the small one": counts["-lite"].active_with_embedding,
            "the same without the input embedding": counts["-lite"].active_parameters,
            "tokens at 32k over those at 128k": 1000 * 1152 * 32_768 / (1000 * 288 * 131_072),
        }
    )


_sizes.builds = ("torchstone.model.attention.mla", "torchstone.model.feedforward.moe")  # type: ignore[attr-defined]

SIZES = Claim(
    id="sizes",
    kind="arithmetic",
    text="The two models have 236 and 16 billion parameters, of which a token meets 21 and, of the small one without "
    "the input embedding, from 2.4 to 2.5 billion. Both stages of longer context see as many tokens.",
    figure="16B with 2.4B active, 236B with 21B active; 1,000 steps each at 32K with 1,152 and at 128K with 288 texts",
    gates=(
        Number("parameters of the large model", low=235.5e9, high=236.5e9),
        Number("those that a token meets", low=20.5e9, high=21.5e9),
        Number("parameters of the small one", low=15.5e9, high=16.5e9),
        Number("the same without the input embedding", low=2.4e9, high=2.5e9),
        Number("tokens at 32k over those at 128k", low=1, high=1),
    ),
    run=_sizes,
)

# -------------------------------------------------------------------------------------------------------------- replay


@dataclass(frozen=True)
class _Size:
    """What a scale spends: a model trained on prose, and what it goes on for."""

    steps: int
    more: int
    seeds: int
    control_seeds: int
    rates: tuple[float, ...] = (2e-3,)
    """Learning rates that each arm chooses from, by its loss on validation code under another seed."""
    blocks: int = 256
    model: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "fp32"


_SIZES: dict[Scale, _Size] = {
    "quick": _Size(steps=40, more=20, seeds=1, control_seeds=1, blocks=32),
    "evidence": _Size(steps=800, more=300, seeds=5, control_seeds=3, rates=(1e-3, 2e-3, 4e-3)),
    "gpu": _Size(
        steps=10_000,
        more=5000,
        seeds=5,
        control_seeds=3,
        rates=(3e-4, 1e-3, 3e-3),
        model={"width": 512, "depth": 8, "attention": {"heads": 8}},
        precision="bf16",
    ),
}
_SHIFT, _TUNING_SEED = 100_000, 500_000
_REPLAY = 0.3
"""Share of prose: what the paper keeps of natural language."""


def _sources(folder: Path) -> dict[str, dict[str, Any]]:
    """The language reference as prose, and modules of the standard library as code."""
    from pydoc_data.topics import topics

    prose = folder / "prose"
    if not prose.exists():
        prose.mkdir()
        for name, text in topics.items():
            (prose / f"{name.replace('/', '_')}.txt").write_text(text, encoding="utf-8")
    code = {"kind": "text", "path": f"{sysconfig.get_path('stdlib')}/*.py"}
    return {"prose": {"kind": "text", "path": str(prose / "*.txt")}, "code": code, "code again": code}


def _recipe(
    size: _Size, folder: Path, seed: int, steps: int, shares: Mapping[str, float], measured: str, rate: float
) -> dict[str, Any]:
    corpora = _sources(folder)
    return {
        "model": {"width": 96, "depth": 3, "attention": {"heads": 4}, **size.model},
        "data": {
            "kind": "mixture",
            "sources": {name: {"corpus": corpora[name], "share": share} for name, share in shares.items()},
            "held_out": measured,
            "tokenizer": "bytes",
            "block": 128,
            "cache": str(folder / "cache"),
        },
        "optimizer": {"kind": "adamw", "lr": rate},
        "schedule": {"kind": "cosine", "warmup": 20},
        "trainer": {
            "seed": seed,
            "steps": steps,
            "batch": 16,
            "threads": 1,
            "precision": size.precision,
            "compile": "off",
            "save_every": steps,
        },
        "evaluate": {"every": steps, "blocks": size.blocks, "test_blocks": size.blocks},
    }


_ARMS: dict[str, dict[str, float]] = {
    "no replay": {"code": 1.0},
    "replay": {"code": 1 - _REPLAY, "prose": _REPLAY},
    # the defect: a mixture that reads one source in the place of another
    "misread": {"code": 1 - _REPLAY, "code again": _REPLAY},
}


def _loss(run: RunFolder, folder: Path, size: _Size, of: str, split: str = "test") -> float:
    """Nats a byte of one source."""
    from torchstone.train.training import make_trainer

    recipe = _recipe(size, folder, 0, 1, {of: 1.0}, of, 1e-3)
    del recipe["model"]
    data = {"init_from": str(run.path), **recipe}
    trainer = make_trainer(load_recipe(data, start=lambda path: RunFolder(path).start()))[0]
    found = getattr(trainer.source, split)
    return trainer.measure_split(found, split, size.blocks)[f"{split}_bits_per_byte"] * math.log(2)


def _continued(size: _Size, folder: Path, base: RunFolder, arm: str, seed: int, rate: float, out: str) -> RunFolder:
    recipe = _recipe(size, folder, seed, size.more, _ARMS[arm], "code", rate)
    del recipe["model"]
    return train({"init_from": str(base.path), **recipe}, out=folder / out, quiet=True)


def _replay(scale: Scale, first: int) -> Measured:
    size, numbers, values = _SIZES[scale], dict[str, float](), dict[str, dict[int, float]]()
    with tempfile.TemporaryDirectory(prefix="torchstone-replay-") as name:
        folder = Path(name)

        def base(seed: int) -> RunFolder:
            recipe = _recipe(size, folder, seed, size.steps, {"prose": 1.0}, "prose", 2e-3)
            return train(recipe, out=folder / f"base-{seed}", quiet=True)

        rates = dict.fromkeys(_ARMS, size.rates[0])
        if len(size.rates) > 1:
            start = base(_TUNING_SEED)
            for arm in ("no replay", "replay"):
                losses = {}
                for rate in size.rates:
                    run = _continued(size, folder, start, arm, _TUNING_SEED, rate, f"tuned-{arm}-{rate}")
                    losses[rate] = _loss(run, folder, size, "code", "valid")
                rates[arm] = min(losses, key=lambda rate: losses[rate])
            rates["misread"] = rates["replay"]
        numbers |= {f"{arm}: learning rate": rate for arm, rate in rates.items()}
        for seed in range(first, first + size.seeds):
            start = base(seed)
            values.setdefault("before: prose", {})[seed] = _loss(start, folder, size, "prose")
            values.setdefault("before: code", {})[seed] = _loss(start, folder, size, "code")
            arms = {arm: (arm, seed) for arm in ("no replay", "replay")}
            if seed < first + size.control_seeds:
                arms |= {"no replay again": ("no replay", seed + _SHIFT), "misread": ("misread", seed)}
            for called, (arm, order) in arms.items():
                run = _continued(size, folder, start, arm, order, rates[arm], f"{called}-{seed}")
                for of in ("prose", "code"):
                    values.setdefault(f"{called}: {of}", {})[seed] = _loss(run, folder, size, of)
    return Measured(numbers, values)


_replay.builds = (  # type: ignore[attr-defined]
    "torchstone.data.mixture",
    "torchstone.data.blocks",
    "torchstone.model.attention.softmax",
    "torchstone.train.optimizers.adamw",
)

REPLAY = Claim(
    id="replay",
    kind="behaviour",
    text="A byte model of the language reference that goes on with code, of whose rows three in ten stay prose, loses "
    "at most 0.05 nats a byte on prose, and at least 0.1 less than with code alone, and learns code to within 0.05 "
    "nats of it in as many steps; each at its best of three learning rates.",
    figure="60 % code, 10 % maths, 30 % natural language from an intermediate checkpoint: language as good as before",
    gates=(
        # 0.05 nats a byte are some 3 % of what a byte costs, 0.1 twice that
        Effect("what was known is kept", "replay: prose", "before: prose", margin=-0.05, sabotage="no replay: prose"),
        Effect(
            "without replay it is lost",
            "replay: prose",
            "no replay: prose",
            margin=0.1,
            null="no replay again: prose",
            sabotage="misread: prose",
        ),
        Effect("the new is learned as well", "replay: code", "no replay: code", margin=-0.05, sabotage="before: code"),
    ),
    run=_replay,
)

PAPER = Paper(
    slug="deepseek-coder-v2",
    title="DeepSeek-Coder-V2: Breaking the Barrier of Closed-Source Models in Code Intelligence",
    authors="Qihao Zhu, Daya Guo, Zhihong Shao, Dejian Yang et al. (DeepSeek-AI)",
    year=2024,
    link="https://arxiv.org/abs/2406.11931",
    topics=("code", "data", "continued pre-training"),
    parts=("data.mixture",),
    summary="A half-trained DeepSeek-V2 goes on with six trillion tokens that are mostly code and mathematics, "
    "gathered round by round from the web, and keeps its language by three tenths of the old texts.",
    claims=(SIZES, HARVEST, REPLAY),
)

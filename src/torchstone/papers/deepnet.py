"""DeepNet: Scaling Transformers to 1,000 Layers (Wang et al. 2022, arXiv 2203.00555)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from torchstone.model.residual.deepnorm import constants
from torchstone.model.site import initialise
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.papers._claim import Arms, Claim, Effect, Measured, Number, Paper, Scale, Setting
from torchstone.spec import validate

__all__ = ["PAPER"]

BUILDS = ("torchstone.model.residual.deepnorm", "torchstone.model.residual.post", "torchstone.model.attention.softmax")


# --------------------------------------------------------------------------------------------- constants, first values


def _model(residual: dict[str, Any], seed: int, **fields: Any) -> Transformer:
    """A small decoder; the normal kinds start with the deviation that Xavier gives a square matrix."""
    body = {
        "width": 64,
        "vocabulary": 61,
        "context": 64,
        "attention": {"heads": 4},
        "ffn": {"kind": "mlp", "hidden": 128},
        "position": "learned",
        "norm": "layernorm",
        "residual": residual,
        **fields,
    }
    return initialise(validate(TransformerSpec, body).build(), seed)  # type: ignore[return-value]


def _update(residual: str, depth: int, seed: int) -> float:
    """|change of the last hidden state| / sqrt(width) under one step of SGD at rate 0.05, on random labels."""
    model = _model({"kind": residual, "std": 64**-0.5}, seed, depth=depth)
    generator = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(61, (4, 16), generator=generator) for _ in range(2))
    before = model(ids)
    assert before.logits is not None
    F.cross_entropy(before.logits.flatten(0, 1), labels.flatten()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.05)
        change = model(ids, outputs="none").hidden - before.hidden
    return float(change.norm(dim=-1).mean() / 64**0.5)


def _bounded(scale: Scale, first: int) -> Measured:
    bounds = []
    for layers in (1, 2, 6, 18, 100, 1000):
        for depths, side, sublayers in (
            ((layers, 0), "encoder", 2),
            ((0, layers), "decoder", 2),
            ((9, layers), "decoder", 3),
        ):
            alpha, beta = constants(depths, side)  # type: ignore[arg-type]
            bounds.append(sublayers * layers * 2 * beta**2 / alpha**2)
    numbers = {"smallest bound": min(bounds), "largest bound": max(bounds)}
    for layers in (12, 100, 1000):
        alpha, beta = constants((0, layers), "decoder")
        numbers |= {f"alpha of {layers} layers": alpha, f"beta of {layers} layers": beta}
    depth = 12
    wide: Any = _model({"kind": "deepnorm"}, first, width=512, depth=depth, attention={"heads": 8}).main.layers[0]
    q, k, v = (float(part.detach().std()) * 512**0.5 for part in wide.attention.qkv.weight.chunk(3))
    beta = constants((0, depth), "decoder")[1]
    numbers |= {"first queries over Xavier": q, "first keys over Xavier": k, "first values over beta Xavier": v / beta}
    for deep in (8, 32, 128):
        ours, theirs = (
            sum(_update(kind, deep, seed) for seed in range(first, first + 3)) for kind in ("deepnorm", "post")
        )
        numbers[f"{deep} layers: change under a step, over that of Post-LN"] = ours / theirs
    return Measured(numbers)


_bounded.builds = BUILDS  # type: ignore[attr-defined]


def _about(name: str, value: float, within: float) -> Number:
    return Number(name, low=value - within, high=value + within)


BOUNDED = Claim(
    id="bounded-updates",
    kind="arithmetic",
    text="The constants keep the bound on the change of a model's output at 1 for every depth, with the sublayers that "
    "each architecture has; first values are those; and one step of SGD changes the output of 8, 32 and 128 layers by "
    "at most 0.35 of what it does under Post-LN.",
    figure="2 N (v^2 + w^2) / alpha^2 = O(1), v = w = beta; decoder of M layers: alpha (2M)^(1/4), beta (8M)^(-1/4)",
    gates=(
        Number("smallest bound", low=1 - 1e-12),
        Number("largest bound", high=1 + 1e-12),
        _about("alpha of 12 layers", 2.2134, 5e-5),
        _about("beta of 12 layers", 0.31947, 5e-6),
        _about("alpha of 100 layers", 3.7606, 5e-5),
        _about("beta of 100 layers", 0.18803, 5e-6),
        _about("alpha of 1000 layers", 6.6874, 5e-5),
        _about("beta of 1000 layers", 0.10574, 5e-6),
        _about("first queries over Xavier", 1.0, 0.02),
        _about("first keys over Xavier", 1.0, 0.02),
        _about("first values over beta Xavier", 1.0, 0.02),
        *(Number(f"{deep} layers: change under a step, over that of Post-LN", high=0.35) for deep in (8, 32, 128)),
    ),
    run=_bounded,
)


# ----------------------------------------------------------------------------------------------------- a hundred layers

_STEPS, _WIDTH = 100, 32
_XAVIER = _WIDTH**-0.5  # deviation that Xavier gives a square matrix
_POST: dict[str, Any] = {"model": {"residual": {"kind": "post", "std": _XAVIER}}}

HUNDRED = Claim(
    id="hundred-layers",
    kind="behaviour",
    text="After 100 steps, each at the better of two learning rates, a decoder of 100 layers has a loss at least 0.15 "
    "nats a byte lower with DeepNorm than as Post-LN from Xavier's first values, and at most 0.02 higher than as "
    "Pre-LN from them.",
    figure="Post-LN diverges at 18 encoder and 18 decoder layers and more; DeepNet trains at 100 and 1,000 layers, and "
    "is better than Pre-LN",
    gates=(
        Effect("trains where Post-LN does not", "deepnorm", "post", margin=0.15, null="post_again", sabotage="no_beta"),
        Effect("as good as Pre-LN", "deepnorm", "pre", margin=-0.02, sabotage="no_beta"),
    ),
    arms=Arms(
        recipe={
            "model": {
                "width": _WIDTH,
                "depth": 100,
                "attention": {"kind": "softmax", "heads": 2},
                "position": "learned",
                "ffn": {"kind": "mlp", "hidden": 2 * _WIDTH},
                "norm": "layernorm",
                "residual": {"kind": "deepnorm", "std": _XAVIER},
                "head": {"kind": "lm", "tied": False},
            },
            "data": {"corpus": "packages", "tokenizer": "bytes", "block": 32},
            "optimizer": {"kind": "adamw", "lr": 1e-3, "betas": [0.9, 0.98], "weight_decay": 0.0},
            "schedule": {"kind": "constant", "warmup": 20},
            "trainer": {
                "steps": _STEPS,
                "batch": 8,
                "clip": None,
                "threads": 1,
                "precision": "fp32",
                "compile": "off",
                "save_every": _STEPS,
            },
            "evaluate": {"every": _STEPS, "blocks": 64, "test_blocks": 256},
        },
        patches={
            "deepnorm": {},
            "post": _POST,
            "pre": {"model": {"residual": {"kind": "pre", "std": _XAVIER, "scale_outputs": False}}},
            "no_beta": {"model": {"residual": {"beta": 1.0}}},
            "post_again": _POST,
            # reported beside, and no gate: what small first values do without the weighted skip
            "no_alpha": {"model": {"residual": {"alpha": 1.0}}},
        },
        settings={
            "quick": Setting(seeds=1, control_seeds=1, patch={"model": {"depth": 12}, "trainer": {"steps": 20}}),
            "evidence": Setting(seeds=5, control_seeds=3, tune=("optimizer.lr", (1e-3, 3e-3))),
            "gpu": Setting(
                seeds=5,
                control_seeds=3,
                patch={
                    "model": {"width": 256, "depth": 1000, "attention": {"heads": 4}, "ffn": {"hidden": 1024}},
                    "data": {"block": 256},
                    "optimizer": {"lr": 5e-4},
                    "schedule": {"warmup": 400},
                    "trainer": {"steps": 5000, "precision": "bf16", "compile": "auto", "recompute": True},
                },
            ),
        },
        metric="test_loss",
        shifted=("post_again",),
    ),
)

PAPER = Paper(
    slug="deepnet",
    title="DeepNet: Scaling Transformers to 1,000 Layers",
    authors="Hongyu Wang, Shuming Ma, Li Dong, Shaohan Huang, Dongdong Zhang, Furu Wei",
    year=2022,
    link="https://arxiv.org/abs/2203.00555",
    topics=("normalisation", "initialisation", "optimisation", "depth"),
    parts=("residual.deepnorm",),
    summary="Post-LN whose skip is weighted up and whose value path starts smaller, both by functions of the depth, so "
    "that a step changes the output by a bounded amount however deep the model.",
    claims=(BOUNDED, HUNDRED),
)

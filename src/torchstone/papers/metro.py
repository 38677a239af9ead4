"""METRO: Efficient Denoising Pretraining with Model Generated Signals (Bajaj et al. 2022, arXiv 2204.06644)."""

from __future__ import annotations

import math
from typing import Any

import torch

from torchstone.keys import Key
from torchstone.model.site import initialise
from torchstone.model.transformer import TransformerSpec
from torchstone.objectives import Facts
from torchstone.objectives.replaced_token import ReplacedTokenSpec
from torchstone.papers._claim import Claim, Measured, Number, Paper, Scale
from torchstone.spec import validate

__all__ = ["PAPER"]

_VOCABULARY, _ROWS, _LENGTH = 1000, 16, 64


def _pair(seed: int, std: float, dropout: float = 0.0, **fields: Any) -> tuple[Any, Any]:
    """A model and its objective."""
    spec = validate(
        TransformerSpec,
        {
            "width": 64,
            "depth": 4,
            "vocabulary": _VOCABULARY,
            "context": _LENGTH,
            "causal": False,
            "attention": {"heads": 4},
            "position": {"kind": "t5_learned", "buckets": 32, "far": 128},
            "residual": {"kind": "post_scaled", "std": std},
            "dropout": dropout,
            "norm": "layernorm",
            "head": {"kind": "token_classification", "classes": 1},
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        objective = validate(ReplacedTokenSpec, fields).build(Facts(_VOCABULARY, 0, 1, 2, model=spec))
    return initialise(spec.build(), seed), objective


def _exact(scale: Scale, first: int) -> Measured:
    numbers: dict[str, float] = {}

    def worst(name: str, value: float) -> None:
        numbers[name] = max(numbers.get(name, 0.0), value)

    for seed in range(first, first + 3):
        ids = torch.randint(3, _VOCABULARY, (_ROWS, _LENGTH), generator=Key(seed).generator())
        model, objective = _pair(seed, 0.02)
        batch = objective.prepare({"ids": ids}, Key(seed))
        found, counts = objective(model, batch, None), objective.counts(batch)
        at_first = sum(float(term.weight * term.total / counts[term.over]) for term in found.terms.values())
        guessing = 2 * math.log(_VOCABULARY) + 50 * math.log(2)
        worst("loss at first over that of guessing, off by", abs(at_first / guessing - 1))
        both = found.terms["detection"].total + found.terms["correction"].total
        own = list(objective.generator.parameters())
        grads = torch.autograd.grad(both, own, retain_graph=True, allow_unused=True)
        worst("gradient of detection and correction in the generator", float(sum(g is not None for g in grads)))
        grads = torch.autograd.grad(found.terms["generator"].total, own, allow_unused=True)
        worst("generator's parameters without a gradient of its loss", float(sum(g is None for g in grads)))
        shared = {name for name, _ in objective.generator.named_parameters() if name.startswith("embedding")}
        worst("embeddings of the generator's own", float(len(shared)))
        drawn = {}
        for sampling in ("zero_dropout", "train", "eval"):
            for dropout in (0.0, 0.3):
                again, other = _pair(seed, 0.3, dropout, sampling=sampling)
                drawn[sampling, dropout] = other._corrupted(again, batch, Key(seed))[1]
        same = (drawn["train", 0.0] != drawn["zero_dropout", 0.0]) | (drawn["eval", 0.0] != drawn["zero_dropout", 0.0])
        worst("draws that differ between modes without dropout", float(same.sum()))
        worst("draws that dropout changes in a second pass", float((drawn["eval", 0.3] != drawn["eval", 0.0]).sum()))
        share = float((drawn["train", 0.3] != drawn["train", 0.0]).float().mean())
        name = "share of draws that dropout changes in the noisy pass, least"
        numbers[name] = min(numbers.get(name, math.inf), share)
        oracle = _pair(seed, 0.02, corruption="oracle")
        worst("tokens replaced by the oracle", float(oracle[1](oracle[0], batch, None).metrics["replaced"][0]))
        chance = _pair(seed, 0.02, corruption="uniform")
        replaced, masked = (float(part) for part in chance[1](chance[0], batch, None).metrics["replaced"])
        name = "tokens replaced at random over tokens masked, least"
        numbers[name] = min(numbers.get(name, math.inf), replaced / masked)
    return Measured(numbers)


_exact.builds = ("torchstone.objectives.replaced_token",)  # type: ignore[attr-defined]

EXACT = Claim(
    id="exact",
    kind="identity",
    text="The model's losses give the generator no gradient, and the generator's gives it all; the embedding is one. "
    "At first the loss is that of guessing. Without dropout the three ways to draw are one; with it a second pass "
    "draws as without, and the noisy pass otherwise. A drawn token that is the original counts as one.",
    figure="L = L_A + 50 L_RTD + L_SCLM; zero-dropout draws in one pass",
    gates=(
        Number("loss at first over that of guessing, off by", high=0.03),
        Number("gradient of detection and correction in the generator", low=0, high=0),
        Number("generator's parameters without a gradient of its loss", low=0, high=0),
        Number("embeddings of the generator's own", low=0, high=0),
        Number("draws that differ between modes without dropout", low=0, high=0),
        Number("draws that dropout changes in a second pass", low=0, high=0),
        Number("share of draws that dropout changes in the noisy pass, least", low=0.05),
        Number("tokens replaced by the oracle", low=0, high=0),
        Number("tokens replaced at random over tokens masked, least", low=0.9),
    ),
    run=_exact,
)

PAPER = Paper(
    slug="metro",
    title="METRO: Efficient Denoising Pretraining of Large Scale Autoencoding Language Models with Model Generated "
    "Signals",
    authors="Payal Bajaj, Chenyan Xiong, Guolin Ke, Xiaodong Liu, Di He, Saurabh Tiwary, Tie-Yan Liu, Paul Bennett, "
    "Xia Song, Jianfeng Gao",
    year=2022,
    link="https://arxiv.org/abs/2204.06644",
    topics=("pre-training", "replaced-token detection"),
    parts=("objective.replaced_token",),
    summary="A shallow generator, trained beside, puts tokens into a text; the model tells which, and names the "
    "originals.",
    claims=(EXACT,),
)

"""Retentive Network: A Successor to Transformer for Large Language Models (Sun et al. 2023, arXiv 2307.08621)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from torchstone.model.attention import Attention
from torchstone.model.attention.retention import Retention, RetentionSpec
from torchstone.model.context import Context
from torchstone.model.site import Site
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.ops.retention import retention
from torchstone.papers._claim import Arms, Claim, Effect, Measured, Number, Paper, Scale, Setting, one_thread
from torchstone.spec import validate

__all__ = ["PAPER"]

_PUBLISHED: dict[str, Any] = {
    "attention": {"kind": "retention", "heads": 2},
    "position": {"kind": "rotary", "interleaved": True, "inclusive": True},
}


def _model(**fields: Any) -> Transformer:
    body = {"width": 64, "depth": 4, "vocabulary": 256, "context": 8192, **_PUBLISHED, **fields}
    return validate(TransformerSpec, body).build()


# ----------------------------------------------------------------------------------------------------- one function


_FORMS = (("recurrent", 1), ("parallel", 1), ("chunkwise", 1), ("chunkwise", 8), ("chunkwise", 64))


def _three_forms(scale: Scale, first: int) -> Measured:
    """Largest differences between the forms, forwards and backwards, over lengths that chunks do not divide."""
    found: dict[str, float] = {}
    for dtype, name in ((torch.float64, "fp64"), (torch.float32, "fp32")):
        worst_y = worst_g = 0.0
        for seed, length in ((first, 37), (first + 1, 96), (first + 2, 129)):
            generator = torch.Generator().manual_seed(seed)
            draw = [torch.randn(2, 3, length, n, generator=generator, dtype=torch.float64) for n in (8, 8, 16)]
            decay = torch.log1p(-(2.0 ** -(5.0 + torch.arange(3, dtype=torch.float64))))[None, :, None]
            results = []
            for form, chunk in (
                ("recurrent", 1),
                ("parallel", 1),
                ("chunkwise", 1),
                ("chunkwise", 8),
                ("chunkwise", 64),
            ):
                q, k, v = leaves = [(x * x.shape[-1] ** -0.5).to(dtype).requires_grad_() for x in draw]
                y, _ = retention(q, k, v, decay.to(dtype), form=form, chunk=chunk)  # type: ignore[arg-type]
                results.append((y, torch.autograd.grad(y.square().sum(), leaves)))
            y0, g0 = results[0]
            for y, g in results[1:]:
                worst_y = max(worst_y, float((y - y0).detach().abs().max()))
                worst_g = max(worst_g, *(float((a - b).abs().max()) for a, b in zip(g, g0, strict=True)))
        found |= {f"{name}: largest difference of outputs": worst_y, f"{name}: of gradients": worst_g}
    return Measured(found)


_three_forms.builds = ("torchstone.model.attention.retention",)  # type: ignore[attr-defined]

FORMS = Claim(
    id="three-forms",
    kind="identity",
    text="The parallel, the chunkwise and the recurrent form of retention are one function: outputs and gradients "
    "agree to rounding for chunks of 1, 8 and 64 tokens and lengths that they do not divide.",
    figure="equations 5, 6 and 7 are said to be equivalent",
    gates=(
        Number("fp64: largest difference of outputs", high=1e-12),
        Number("fp64: of gradients", high=1e-12),
        Number("fp32: largest difference of outputs", high=1e-5),
        Number("fp32: of gradients", high=1e-4),
    ),
    run=_three_forms,
)

# ------------------------------------------------------------------------------------------------------------- cost


def _cost(scale: Scale, first: int) -> Measured:
    """Bytes of decode state, and multiply-adds of a layer's mixing, by length."""
    plain = {"attention": {"kind": "softmax", "heads": 2}, "position": "rotary"}
    held = {
        name: [_model(**fields).state(1, extent).bytes() for extent in (128, 4096)]
        for name, fields in (("retention", {}), ("softmax", plain))
    }
    lengths = (1024, 2048, 4096, 8192)

    def slope(form: str) -> float:
        counts = []
        for length in lengths:
            q, k, v = (torch.zeros(1, 2, length, n, device="meta") for n in (32, 32, 64))
            counter = FlopCounterMode(display=False)
            with counter:
                retention(q, k, v, torch.zeros(1, 2, 1, device="meta"), form=form, chunk=64)  # type: ignore[arg-type]
            counts.append(counter.get_total_flops())
        return float(np.polyfit(np.log(lengths), np.log(counts), 1)[0])

    return Measured(
        {
            "retention: state at 4,096 tokens / at 128": held["retention"][1] / held["retention"][0],
            "softmax: state at 4,096 tokens / at 128": held["softmax"][1] / held["softmax"][0],
            "retention: bytes of state": float(held["retention"][0]),
            "chunkwise: slope of log operations over log length": slope("chunkwise"),
            "parallel: slope of log operations over log length": slope("parallel"),
        }
    )


_cost.builds = (  # type: ignore[attr-defined]
    "torchstone.model.attention.retention",
    "torchstone.model.attention.softmax",
    "torchstone.ops.retention.chunkwise",
)

COST = Claim(
    id="constant-state",
    kind="cost",
    text="Decoding keeps one matrix per head, the same at 128 and at 4,096 tokens, where a key/value cache grows with "
    "every token; the chunkwise form takes operations linear in length, the parallel one quadratic.",
    figure="O(1) inference; 8.4x decoding speed and 70 % less memory at 6.7B and 8k tokens",
    gates=(
        Number("retention: state at 4,096 tokens / at 128", low=1.0, high=1.0),
        Number("softmax: state at 4,096 tokens / at 128", low=32.0, high=32.0),
        Number("retention: bytes of state", low=4 * 2 * 32 * 64 * 4, high=4 * 2 * 32 * 64 * 4),
        Number("chunkwise: slope of log operations over log length", high=1.2),
        Number("parallel: slope of log operations over log length", low=1.6),
    ),
    run=_cost,
)

# ---------------------------------------------------------------------------------------------------------- quality


class UndecayedSpec(RetentionSpec):
    """Retention whose decays have become 1, as those of later heads do in bfloat16. For the claim's sabotage arm."""

    kind: ClassVar[str] = "retention_undecayed"
    offered: ClassVar[bool] = False

    def build(self, site: Site) -> Attention:
        return _Undecayed(self, site)


class _Undecayed(Retention):
    def log_decay(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        return torch.full_like(super().log_decay(x_BTD, ctx), -1e-6)


_PLAIN: dict[str, Any] = {
    "model": {"attention": {"kind": "softmax", "heads": 4}, "position": "rotary", "ffn": {"hidden": 256}}
}

_STEPS = 700

QUALITY = Claim(
    id="as-good-at-equal-size",
    kind="behaviour",
    text="A byte model of retention layers is at most 0.15 bits per byte (5 %) worse than a softmax Transformer with "
    "rotary positions of the same parameters, steps and data, each at its own best learning rate.",
    figure="perplexity below that of a Transformer from 2.7B parameters on, slightly above it at 1.3B",
    gates=(
        Effect("not worse by more than 0.15", "retention", "softmax", margin=-0.15, sabotage="retention_undecayed"),
    ),
    arms=Arms(
        recipe={
            "model": {
                "width": 64,
                "depth": 3,
                **_PUBLISHED,
                # 8 d^2 of retention and 4 d^2 here are the 4 d^2 of softmax attention and 8 d^2 there
                "ffn": {"kind": "mlp", "hidden": 128},
            },
            "data": {"corpus": "packages", "tokenizer": "bytes", "block": 256},
            "optimizer": {"kind": "adamw", "lr": 3e-3},
            "schedule": {"kind": "cosine", "warmup": 30},
            **one_thread(_STEPS, 8, blocks=64, test_blocks=256),
        },
        patches={
            "softmax": _PLAIN,
            "retention": {},
            "retention_undecayed": {"model": {"attention": {"kind": "retention_undecayed", "heads": 2}}},
        },
        settings={
            "quick": Setting(seeds=1, control_seeds=1, patch={"trainer": {"steps": 60}}),
            "evidence": Setting(seeds=5, control_seeds=3, tune=("optimizer.lr", (1e-3, 3e-3, 1e-2))),
            "gpu": Setting(
                seeds=5,
                control_seeds=3,
                patch={
                    "model": {"width": 1024, "depth": 24, "ffn": {"hidden": 2048}},
                    "data": {"block": 2048},
                    "trainer": {"steps": 20_000, "batch": 32, "precision": "bf16", "compile": "auto"},
                },
                tune=("optimizer.lr", (3e-4, 1e-3, 3e-3)),
            ),
        },
        imports=("torchstone.papers.retnet",),
    ),
)

PAPER = Paper(
    slug="retnet",
    title="Retentive Network: A Successor to Transformer for Large Language Models",
    authors="Yutao Sun, Li Dong, Shaohan Huang, Shuming Ma, Yuqing Xia, Jilong Xue, Jianyong Wang, Furu Wei",
    year=2023,
    link="https://arxiv.org/abs/2307.08621",
    topics=("attention", "linear attention", "recurrence", "long context", "inference cost"),
    parts=("attention.retention",),
    summary="Attention without softmax whose scores decay with distance: trained in parallel, decoded with a state of "
    "fixed size.",
    claims=(FORMS, COST, QUALITY),
)

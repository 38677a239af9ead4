"""LazyFormer: Self Attention with Lazy Update (Ying et al. 2021, arXiv 2102.12702)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from torchstone.interop.presets import preset
from torchstone.model.measure import Measures, measure
from torchstone.model.stack import LayerPlan, LayerSpec
from torchstone.model.stack.lazy import LazySpec
from torchstone.model.transformer import TransformerSpec
from torchstone.papers._claim import Arms, Claim, Effect, Measured, Number, Paper, Scale, Setting, one_thread
from torchstone.spec import validate

__all__ = ["PAPER"]

BUILDS = (
    "torchstone.model.stack.lazy",
    "torchstone.model.attention.given_probs",
    "torchstone.model.attention.softmax",
    "torchstone.ops.attention.probs",
)


# ----------------------------------------------------------------------------------------------------- what is spared

_D, _L, _N, _V = 768, 12, 512, 30_522


def _measured(stack: Any, context: int = _N, **changes: Any) -> Measures:
    body = {**preset("lazyformer-base").dump(), "vocabulary": _V, **changes, "stack": stack}
    with torch.device("meta"):
        return measure(validate(TransformerSpec, body).build(), context)


def _layer(context: int) -> float:
    """Multiply-adds of one full layer for `context` tokens, counted as the difference of two depths."""
    deep, shallow = (_measured("plain", context, depth=depth).flops_per_token for depth in (3, 2))
    return (deep - shallow) / 6 * context


def _savings(scale: Scale, first: int) -> Measured:
    plain, numbers = _measured("plain"), {}
    for m in (2, 3, 4, 6):
        lazy, reusing = _measured({"kind": "lazy", "block_size": m}), _L - _L // m
        saved = plain.parameters - lazy.parameters
        if m == 2:
            numbers["12 layers in blocks of 2: parameters saved"] = float(saved)
        numbers[f"blocks of {m}: parameters saved over 2 d^2 + 2 d"] = saved / (reusing * (2 * _D**2 + 2 * _D))
        of_scores = (plain.flops_per_token - lazy.flops_per_token) / 6 * _N
        formula = reusing * (2 * _N * _D**2 + _N**2 * _D)
        numbers[f"blocks of {m}: multiply-adds saved over 2 N d^2 + N^2 d"] = of_scores / formula
    for context in (128, _N, 2048):
        pair = [
            (_measured("plain", context).flops_per_token - _measured(stack, context).flops_per_token) / 6 * context / 6
            for stack in ({"kind": "lazy"}, {"kind": "lazy", "reuse": "queries_keys"})
        ]
        shares = [saved / (2 * _layer(context)) for saved in pair]  # of two full layers, as a block has
        if context == _N:
            numbers["12 layers in blocks of 2: share of multiply-adds saved"] = shares[0]
            numbers["the same with queries and keys reused"] = shares[1]
        else:
            numbers[f"the same for {context} tokens"] = shares[0]
    causal: dict[str, Any] = {"causal": True, "head": "lm"}
    cached = [_measured(stack, **causal).state_bytes_per_token for stack in ({"kind": "lazy"}, "plain")]
    numbers["decoder: cache of blocks of 2 over that of full layers"] = cached[0] / cached[1]
    return Measured(numbers)


_savings.builds = BUILDS  # type: ignore[attr-defined]


def _share(context: int) -> float:
    """Of a block of two layers, (2 N d^2 + N^2 d) / (24 N d^2 + 4 N^2 d)."""
    return (2 * _D + context) / (24 * _D + 4 * context)


def _exactly(name: str, value: float) -> Number:
    return Number(name, low=value * (1 - 1e-9), high=value * (1 + 1e-9))


SAVINGS = Claim(
    id="savings",
    kind="arithmetic",
    text="A layer that reuses probabilities has 2 d^2 + 2 d parameters and 2 N d^2 + N^2 d multiply-adds less. In "
    "blocks of two that is a tenth of the multiply-adds of BERT-base's layers at 512 tokens, and more for longer "
    "sequences. A layer that reuses queries and keys is spared the projections alone. A decoder keeps the keys of one "
    "layer a block.",
    figure="12 layers of width 768 in blocks of 2: 7,087,104 parameters less; at N = 512, 2 N d^2 + N^2 d is 10.0 % of "
    "2 (12 N d^2 + 2 N^2 d)",
    gates=(
        _exactly("12 layers in blocks of 2: parameters saved", 7_087_104),
        *(_exactly(f"blocks of {m}: parameters saved over 2 d^2 + 2 d", 1.0) for m in (2, 3, 4, 6)),
        *(_exactly(f"blocks of {m}: multiply-adds saved over 2 N d^2 + N^2 d", 1.0) for m in (2, 3, 4, 6)),
        _exactly("12 layers in blocks of 2: share of multiply-adds saved", _share(_N)),
        _exactly("the same with queries and keys reused", 2 * _D / (24 * _D + 4 * _N)),
        _exactly("the same for 128 tokens", _share(128)),
        _exactly("the same for 2048 tokens", _share(2048)),
        _exactly("decoder: cache of blocks of 2 over that of full layers", 3 / 4),
    ),
    run=_savings,
)


# ------------------------------------------------------------------------------------------------------------- quality


class AveragingSpec(LazySpec):
    """Blocks whose later layers reuse nothing and take the mean of all that they may see: beside the claim's arms it
    says how much of a result is the reused distribution's."""

    kind: ClassVar[str] = "lazy_averaging"
    offered: ClassVar[bool] = False

    def plan(self, layers: Sequence[LayerSpec], width: int, causal: bool) -> tuple[LayerPlan, ...]:
        def averaging(layer: LayerSpec) -> LayerSpec:
            # scores of next to nothing; the queries and keys that make them are dead weight
            return layer.model_copy(update={"attention": layer.attention.model_copy(update={"scale": 1e-6})})

        placed = super().plan(layers, width, causal)
        reusing = [bool(plan.spec.attention.takes) for plan in placed]
        return tuple(LayerPlan(averaging(layer) if of else layer) for layer, of in zip(layers, reusing, strict=True))


_STEPS = 400

EQUAL_STEPS = Claim(
    id="equal-steps",
    kind="behaviour",
    text="At equal steps a small decoder in lazy blocks of two layers loses at most 0.04 nats a byte, 2 % of some 2 "
    "nats, to one whose layers all have attention of their own.",
    figure="BERT-base's size: GLUE equal or better, with pre-training 1.3 times faster",
    gates=(Effect("not worse than full layers", "lazy", "plain", margin=-0.04, sabotage="lazy_uniform"),),
    arms=Arms(
        recipe={
            "model": {
                "width": 64,
                "depth": 4,
                "attention": {"kind": "softmax", "heads": 4},
                "position": "rotary",
                "ffn": {"kind": "mlp", "hidden": 256},
            },
            "data": {"corpus": "packages", "tokenizer": "bytes", "block": 64},
            "optimizer": {"kind": "adamw", "lr": 4e-3, "betas": [0.9, 0.98], "weight_decay": 0.01},
            "schedule": {"kind": "linear", "warmup": 50},
            **one_thread(_STEPS, 16, blocks=64, test_blocks=1024),
        },
        patches={
            "plain": {},
            "lazy": {"model": {"stack": {"kind": "lazy"}}},
            "lazy_of_4": {"model": {"stack": {"kind": "lazy", "block_size": 4}}},
            "averaging": {"model": {"stack": {"kind": "lazy_averaging"}}},
            # what the first layer of a block makes and hands on is the mean of all that it sees
            "lazy_uniform": {"model": {"stack": {"kind": "lazy"}, "attention": {"scale": 1e-6}}},
        },
        settings={
            "quick": Setting(seeds=2, control_seeds=1, patch={"trainer": {"steps": 40}}),
            "evidence": Setting(seeds=5, control_seeds=3, tune=("optimizer.lr", (4e-3, 8e-3, 1.6e-2))),
            "gpu": Setting(
                seeds=5,
                control_seeds=3,
                patch={
                    "model": {
                        "width": 768,
                        "depth": 12,
                        "causal": False,
                        "attention": {"heads": 12},
                        "ffn": {"hidden": 3072},
                    },
                    "objective": {"kind": "masked_lm"},
                    "data": {"block": 512},
                    "optimizer": {"lr": 1e-4},
                    "schedule": {"warmup": 10_000},
                    "trainer": {"steps": 100_000, "batch": 256, "precision": "bf16", "compile": "auto"},
                },
            ),
        },
        metric="test_loss",
        imports=("torchstone.papers.lazyformer",),
    ),
)

PAPER = Paper(
    slug="lazyformer",
    title="LazyFormer: Self Attention with Lazy Update",
    authors="Chengxuan Ying, Guolin Ke, Di He, Tie-Yan Liu",
    year=2021,
    link="https://arxiv.org/abs/2102.12702",
    topics=("cross-layer sharing", "efficiency", "pre-training"),
    parts=("stack.lazy", "attention.given_probs"),
    summary="Layers in blocks: the first computes the attention distribution, the others mix values of their own by "
    "it, without queries, keys or work on scores.",
    claims=(SAVINGS, EQUAL_STEPS),
)

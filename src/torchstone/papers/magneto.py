"""Magneto: A Foundation Transformer (Wang et al. 2022, arXiv 2210.06423)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn

from torchstone.model.measure import measure
from torchstone.model.residual.subln import SubLnSpec, gain
from torchstone.model.site import Site, initialise
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.papers._claim import Arms, Claim, Effect, Measured, Number, Paper, Scale, Setting
from torchstone.spec import validate

__all__ = ["PAPER"]


# ------------------------------------------------------------------------------------------------ scale that cancels


def _spec(residual: str, **fields: Any) -> TransformerSpec:
    body: dict[str, Any] = {
        "width": 64,
        "depth": 3,
        "vocabulary": 61,
        "context": 64,
        "attention": {"heads": 4},
        "ffn": {"kind": "mlp", "hidden": 256, "activation": "relu"},
        "position": "learned",
        "norm": "layernorm",
        "residual": residual,
        **fields,
    }
    return validate(TransformerSpec, body)


def _values_and_hidden(model: Transformer) -> list[torch.Tensor]:
    """Weights of all values and of all first matrices of feed-forwards."""
    layers: list[Any] = list(model.main.layers)
    width = model.spec.width
    return [x for one in layers for x in (one.attention.qkv.weight[2 * width :], one.ffn.up.weight)]


def _invariant(scale: Scale, first: int) -> Measured:
    model: Any = initialise(_spec("subln").build(), first)
    ids = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(first))
    logits = model(ids).logits
    logits.sin().sum().backward()
    cosines = []
    for layer in model.main.layers:
        v, dv = layer.attention.qkv.weight[128:], layer.attention.qkv.weight.grad[128:]
        for w, dw in ((v, dv), (layer.ffn.up.weight, layer.ffn.up.weight.grad)):
            cosines.append(abs(float(torch.nn.functional.cosine_similarity(w.detach().flatten(), dw.flatten(), 0))))
    with torch.no_grad():
        for weight in _values_and_hidden(model):
            weight.mul_(5.0)
        moved = (model(ids).logits - logits).abs().max() / logits.abs().max()
    numbers = {
        "values and hidden units times 5: change of the logits": float(moved),
        "largest |cosine| of such a weight and its gradient": max(cosines),
    }
    with torch.device("meta"):
        sizes = [
            measure(
                _spec(kind, width=768, depth=12, ffn={"kind": "mlp", "hidden": 3072}, attention={"heads": 12}).build(),
                64,
            )
            for kind in ("subln", "pre")
        ]
    numbers["parameters more than Pre-LN, a layer of width 768"] = (sizes[0].parameters - sizes[1].parameters) / 12
    numbers["gamma of 12 layers"] = gain((0, 12), "decoder")
    numbers["gamma of 24 layers"] = gain((0, 24), "decoder")
    numbers["gamma of 18 + 18 layers: encoder"] = gain((18, 18), "encoder")
    numbers["gamma of 18 + 18 layers: decoder"] = gain((18, 18), "decoder")
    wide: Any = initialise(_spec("subln", width=512, attention={"heads": 8}).build(), first)
    q, k, v = (float(x.detach().std()) * 512**0.5 for x in wide.main.layers[0].attention.qkv.weight.chunk(3))
    numbers |= {"first queries over Xavier": q, "first keys over Xavier": k}
    numbers["first values over gamma Xavier"] = v / math.sqrt(math.log(6))
    return Measured(numbers)


_invariant.builds = (  # type: ignore[attr-defined]
    "torchstone.model.residual.subln",
    "torchstone.model.residual.pre",
    "torchstone.model.attention.softmax",
    "torchstone.model.feedforward.mlp",
)


def _about(name: str, value: float, within: float) -> Number:
    return Number(name, low=value - within, high=value + within)


INVARIANT = Claim(
    id="scale-cancels",
    kind="identity",
    text="The scale of values, and of hidden units under ReLU, cancels in the norms before output projections, so such "
    "a weight is at right angles to its gradient. First values are sqrt(ln of the sublayers) times Xavier's, and the "
    "norms cost 2 d + 2 d_ff parameters a layer.",
    figure="gamma = sqrt(ln 2N), sqrt(ln 2M); with both stacks sqrt(ln(3M) ln(2N) / 3) and sqrt(ln 3M)",
    gates=(
        Number("values and hidden units times 5: change of the logits", high=1e-4),
        Number("largest |cosine| of such a weight and its gradient", high=1e-5),
        _about("parameters more than Pre-LN, a layer of width 768", 7680, 0),
        _about("gamma of 12 layers", 1.7827, 5e-5),
        _about("gamma of 24 layers", 1.9675, 5e-5),
        _about("gamma of 18 + 18 layers: encoder", 2.1829, 5e-5),
        _about("gamma of 18 + 18 layers: decoder", 1.9972, 5e-5),
        _about("first queries over Xavier", 1.0, 0.02),
        _about("first keys over Xavier", 1.0, 0.02),
        _about("first values over gamma Xavier", 1.0, 0.02),
    ),
    run=_invariant,
)


# ------------------------------------------------------------------------------------------------------- beside Pre-LN


class BareSubLnSpec(SubLnSpec):
    """Sub-LN whose norms inside sublayers were forgotten, its gain kept: for the claim's sabotage arm."""

    kind: ClassVar[str] = "subln_bare"
    offered: ClassVar[bool] = False

    def inner_norm(self, site: Site, width: int) -> nn.Module:
        return nn.Identity()


_STEPS, _WIDTH = 200, 64
_XAVIER = _WIDTH**-0.5  # deviation that Xavier gives a square matrix
_PRE: dict[str, Any] = {"model": {"residual": {"kind": "pre", "std": _XAVIER, "scale_outputs": False}}}

BESIDE_PRE = Claim(
    id="better-than-pre-ln",
    kind="behaviour",
    text="After 200 steps, each at the best of three learning rates, a decoder of 12 layers has a loss at least 0.01 "
    "nats a byte lower with Sub-LN than as Pre-LN from Xavier's first values.",
    figure="better than Pre-LN on language modelling, translation, vision, speech and both together, with learning "
    "rates at which Pre-LN diverges",
    gates=(Effect("better than Pre-LN", "subln", "pre", margin=0.01, null="pre_again", sabotage="subln_bare"),),
    arms=Arms(
        recipe={
            "model": {
                "width": _WIDTH,
                "depth": 12,
                "attention": {"kind": "softmax", "heads": 2},
                "position": "learned",
                "ffn": {"kind": "mlp", "hidden": 2 * _WIDTH},
                "norm": "layernorm",
                "residual": {"kind": "subln", "std": _XAVIER},
                "head": {"kind": "lm", "tied": False},
            },
            "data": {"corpus": "packages", "tokenizer": "bytes", "block": 48},
            "optimizer": {"kind": "adamw", "lr": 3e-3, "betas": [0.9, 0.98], "weight_decay": 0.0},
            "schedule": {"kind": "constant", "warmup": 10},
            "trainer": {
                "steps": _STEPS,
                "batch": 8,
                "clip": None,
                "threads": 1,
                "precision": "fp32",
                "compile": "off",
                "save_every": _STEPS,
            },
            "evaluate": {"every": _STEPS, "blocks": 64, "test_blocks": 512},
        },
        patches={
            "subln": {},
            "pre": _PRE,
            "post": {"model": {"residual": {"kind": "post", "std": _XAVIER}}},  # reported beside, and no gate
            "pre_again": _PRE,
            "subln_bare": {"model": {"residual": {"kind": "subln_bare", "std": _XAVIER}}},
        },
        settings={
            "quick": Setting(seeds=1, control_seeds=1, patch={"model": {"depth": 4}, "trainer": {"steps": 20}}),
            "evidence": Setting(seeds=5, control_seeds=3, tune=("optimizer.lr", (1e-3, 3e-3, 1e-2))),
            "gpu": Setting(
                seeds=5,
                control_seeds=3,
                patch={
                    "model": {"width": 1024, "depth": 24, "attention": {"heads": 16}, "ffn": {"hidden": 4096}},
                    "data": {"block": 512},
                    "schedule": {"warmup": 750},
                    "trainer": {"steps": 20_000, "precision": "bf16", "compile": "auto"},
                },
                tune=("optimizer.lr", (3e-4, 1e-3, 3e-3)),
            ),
        },
        metric="test_loss",
        shifted=("pre_again",),
        imports=("torchstone.papers.magneto",),
    ),
)

PAPER = Paper(
    slug="magneto",
    title="Magneto: A Foundation Transformer",
    authors="Hongyu Wang, Shuming Ma, Shaohan Huang, Li Dong, Wenhui Wang, Zhiliang Peng, Yu Wu, Payal Bajaj, Saksham "
    "Singhal, Alon Benhaim, Barun Patra, Zhun Liu, Vishrav Chaudhary, Xia Song, Furu Wei",
    year=2022,
    link="https://arxiv.org/abs/2210.06423",
    topics=("normalisation", "initialisation", "optimisation", "depth"),
    parts=("residual.subln",),
    summary="Pre-LN with a second norm inside each sublayer before its output projection, and first values that grow "
    "with the logarithm of the depth: one architecture for every modality.",
    claims=(INVARIANT, BESIDE_PRE),
)

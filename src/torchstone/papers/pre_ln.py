"""On Layer Normalization in the Transformer Architecture (Xiong et al. 2020, arXiv 2002.04745)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from torchstone.model.residual.pre import PreSpec
from torchstone.model.site import Site
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.papers._claim import Arms, Claim, Effect, Measured, Number, Paper, Scale, Setting
from torchstone.spec import validate

__all__ = ["PAPER"]

WIDTH, TOKENS, CLASSES = 256, 32, 32


def _analysed(residual: str, depth: int, seed: int) -> Transformer:
    """The network of the paper's analysis: one head, uniform attention (W_Q = W_K = 0), W_V and both matrices of the
    feed-forward from N(0, 1/d), a feed-forward as wide as the stream, ReLU, no biases."""
    fields: dict[str, Any] = {
        "width": WIDTH,
        "depth": depth,
        "vocabulary": CLASSES,
        "causal": False,
        "attention": {"kind": "softmax", "heads": 1},
        "position": "none",
        "ffn": {"kind": "mlp", "hidden": WIDTH, "activation": "relu"},
        "norm": "layernorm",
        "residual": residual,
        "head": {"kind": "lm", "tied": False},
    }
    model = validate(TransformerSpec, fields).build()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.main.layers:
            attention: Any = layer.get_submodule("attention")
            ffn: Any = layer.get_submodule("ffn")
            attention.qkv.weight.zero_()
            attention.qkv.weight[2 * WIDTH :].normal_(0, WIDTH**-0.5, generator=generator)
            attention.out.weight.copy_(torch.eye(WIDTH))
            ffn.up.weight.normal_(0, WIDTH**-0.5, generator=generator)
            ffn.down.weight.normal_(0, WIDTH**-0.5, generator=generator)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        out: Any = model.get_submodule("head.out")
        out.weight.normal_(0, WIDTH**-0.5, generator=generator)
    return model


def _forward(model: Transformer, seed: int, watch: Callable[[int, torch.Tensor], None] | None) -> torch.Tensor:
    """Cross-entropy on random labels from a standard normal input; `watch` gets each layer's stream."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    x_BTD = torch.randn(1, TOKENS, WIDTH, generator=generator)
    labels = torch.randint(CLASSES, (TOKENS,), generator=generator)
    hooks = []
    if watch is not None:
        for number, layer in enumerate(model.main.layers, 1):
            norm = layer.get_submodule("ffn_residual").get_submodule("norm")
            if model.spec.residual.kind == "post":  # the stream before the layer's last norm
                hooks.append(norm.register_forward_pre_hook(lambda m, x, n=number: watch(n, x[0])))
            else:
                hooks.append(layer.register_forward_hook(lambda m, x, y, n=number: watch(n, y[0])))
    out = model(torch.zeros(1, TOKENS, dtype=torch.int64), embeddings=x_BTD)
    for hook in hooks:
        hook.remove()
    assert out.logits is not None
    return F.cross_entropy(out.logits[0], labels)


def _moments(residual: str, depth: int, seeds: range) -> np.ndarray:
    """E |x_l|^2 / d by layer, over positions and seeds."""
    total = np.zeros(depth)

    def watch(number: int, x: torch.Tensor) -> None:
        total[number - 1] += float(x.square().sum(-1).mean()) / WIDTH / len(seeds)

    with torch.no_grad():
        for seed in seeds:
            _forward(_analysed(residual, depth, seed), seed, watch)
    return total


def _slope(residual: str, depths: tuple[int, ...], seeds: range) -> float:
    """Slope of log |gradient of the last feed-forward's second matrix| over log depth."""
    norms = []
    for depth in depths:
        found = []
        for seed in seeds:
            model = _analysed(residual, depth, seed)
            _forward(model, seed, None).backward()
            ffn: Any = model.main.layers[-1].get_submodule("ffn")
            found.append(float(ffn.down.weight.grad.norm()))
        norms.append(np.mean(found))
    return float(np.polyfit(np.log(depths), np.log(norms), 1)[0])


def _at_init(scale: Scale, first: int) -> Measured:
    depth, twenty = 12, range(first, first + 20)
    post, pre = _moments("post", depth, twenty), _moments("pre", depth, twenty)
    layers = np.arange(1, depth + 1)
    seeds = range(first, first + (3 if scale == "quick" else 10))
    return Measured(
        {
            "post: smallest E|x|^2/d": float(post.min()),
            "post: largest E|x|^2/d": float(post.max()),
            "pre: least above 1 + l/2": float((pre - (1 + layers / 2)).min()),
            "pre: most above 1 + 3l/2": float((pre - (1 + 3 * layers / 2)).max()),
            "pre: smallest growth of a layer": float(np.diff(pre).min()),
            "pre: slope of the last gradient over depth": _slope("pre", (4, 16, 64), seeds),
            "post: slope of the last gradient over depth": _slope("post", (4, 16, 64), seeds),
        }
    )


_at_init.builds = ("torchstone.model.residual.pre", "torchstone.model.residual.post")  # type: ignore[attr-defined]

AT_INIT = Claim(
    id="gradients-at-init",
    kind="arithmetic",
    text="At initialisation the stream of a Post-LN layer has second moment 3/2 at every depth and the gradient of the "
    "last feed-forward does not shrink with depth; the stream of Pre-LN grows linearly and that gradient falls as "
    "1/sqrt(L).",
    figure="E|x|^2 = 3d/2 (Post-LN); (1 + l/2)d <= E|x|^2 <= (1 + 3l/2)d (Pre-LN); gradients O(d sqrt(ln d)) against "
    "O(d sqrt(ln d / L))",
    gates=(
        Number("post: smallest E|x|^2/d", low=1.5 * 0.95),
        Number("post: largest E|x|^2/d", high=1.5 * 1.05),
        Number("pre: least above 1 + l/2", low=0.0),
        Number("pre: most above 1 + 3l/2", high=0.0),
        Number("pre: smallest growth of a layer", low=0.0),
        Number("pre: slope of the last gradient over depth", low=-0.65, high=-0.35),
        Number("post: slope of the last gradient over depth", low=-0.15, high=0.2),
    ),
    run=_at_init,
)


class UnfinishedPreSpec(PreSpec):
    """Pre-LN whose last norm was forgotten: the classic defect, for the claim's sabotage arm."""

    kind: ClassVar[str] = "pre_unfinished"
    offered: ClassVar[bool] = False

    def final_norm(self, site: Site) -> nn.Module:
        return nn.Identity()


_STEPS = 300
_WARM: dict[str, Any] = {"schedule": {"kind": "constant", "warmup": 100}}
_POST: dict[str, Any] = {"model": {"residual": "post"}}

WARM_UP = Claim(
    id="no-warm-up",
    kind="behaviour",
    text="At a high learning rate, dropping warm-up costs a 6-layer Pre-LN decoder at most 0.03 nats a byte, while "
    "warm-up gains a Post-LN decoder at least 0.1.",
    figure="BERT and translation: Pre-LN without warm-up reaches what Post-LN needs warm-up for; Post-LN without it "
    "fails or is far worse",
    gates=(
        Effect("Pre-LN does without", "pre", "pre_warm", margin=-0.03, sabotage="pre_unfinished"),
        Effect("Post-LN needs it", "post_warm", "post", margin=0.1, null="post_again", sabotage="post_warm_two_steps"),
    ),
    arms=Arms(
        recipe={
            "model": {
                "width": 128,
                "depth": 6,
                "attention": {"kind": "softmax", "heads": 4},
                "position": "learned",
                "ffn": {"kind": "mlp", "hidden": 512},
                "norm": "layernorm",
                "residual": {"kind": "pre", "scale_outputs": False},
            },
            "data": {"corpus": "packages", "tokenizer": "bytes", "block": 64},
            "optimizer": {"kind": "adamw", "lr": 2e-3, "betas": [0.9, 0.98], "weight_decay": 0.0},
            "schedule": {"kind": "constant", "warmup": 0},
            "trainer": {
                "steps": _STEPS,
                "batch": 16,
                "clip": None,
                "threads": 1,
                "precision": "fp32",
                "compile": "off",
                "save_every": _STEPS,
            },
            "evaluate": {"every": _STEPS, "blocks": 64, "test_blocks": 1024},
        },
        patches={
            "pre": {},
            "pre_warm": _WARM,
            "post": _POST,
            "post_warm": {**_POST, **_WARM},
            "pre_unfinished": {"model": {"residual": {"kind": "pre_unfinished", "scale_outputs": False}}},
            "post_warm_two_steps": {**_POST, "schedule": {"kind": "constant", "warmup": 2}},
            "post_again": _POST,
        },
        settings={
            "quick": Setting(seeds=2, control_seeds=1, patch={"trainer": {"steps": 40}}),
            "evidence": Setting(seeds=5, control_seeds=3),
            "gpu": Setting(
                seeds=5,
                control_seeds=3,
                patch={
                    "model": {"width": 768, "depth": 12, "attention": {"heads": 12}, "ffn": {"hidden": 3072}},
                    "data": {"block": 512},
                    "trainer": {"steps": 20_000, "precision": "bf16", "compile": "auto"},
                },
            ),
        },
        metric="test_loss",
        shifted=("post_again",),
        imports=("torchstone.papers.pre_ln",),
    ),
)

PAPER = Paper(
    slug="pre-ln",
    title="On Layer Normalization in the Transformer Architecture",
    authors="Ruibin Xiong, Yunchang Yang, Di He, Kai Zheng, Shuxin Zheng, Chen Xing, Huishuai Zhang, Yanyan Lan, Liwei "
    "Wang, Tie-Yan Liu",
    year=2020,
    link="https://arxiv.org/abs/2002.04745",
    topics=("normalisation", "initialisation", "optimisation", "warm-up", "depth"),
    parts=("residual.pre", "residual.post"),
    summary="Why the original Transformer needs learning-rate warm-up, and why moving the norm into the residual "
    "branch does away with it: gradients at initialisation.",
    claims=(AT_INIT, WARM_UP),
)

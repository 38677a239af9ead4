"""HySparse: A Hybrid Sparse Attention Architecture with Oracle Token Selection and KV Cache Sharing (Gao et al. 2026,
arXiv 2602.03560)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from torchstone.interop.presets import preset
from torchstone.model.attention.oracle_sparse import OracleSparseSpec
from torchstone.model.attention.softmax import SoftmaxSpec
from torchstone.model.context import Context
from torchstone.model.measure import measure
from torchstone.model.position import Positions
from torchstone.model.position.rotary import RotarySpec
from torchstone.model.site import Gives, Site, initialise
from torchstone.model.taps import Taps
from torchstone.model.transformer import TransformerSpec
from torchstone.ops.attention import attention_reference
from torchstone.papers._claim import Arms, Claim, Effect, Measured, Number, Paper, Scale, Setting, one_thread
from torchstone.spec import validate

__all__ = ["PAPER"]

BUILDS = (
    "torchstone.model.stack.hysparse",
    "torchstone.model.attention.oracle_sparse",
    "torchstone.model.attention.softmax",
    "torchstone.ops.attention.block_max",
)


# ------------------------------------------------------------------------------------------------------ what is cached


def _caches(scale: Scale, first: int) -> Measured:
    large = {**preset("hysparse-80b-a3b-layout").dump(), "vocabulary": 1000}
    small = {**large, "depth": 5, "stack": {"kind": "hysparse", "sparse_per_full": 3}}
    numbers = {}
    for name, fields in (("49 layers", large), ("5 layers", small)):
        with torch.device("meta"):
            hybrid = validate(TransformerSpec, fields).build()
            full = validate(TransformerSpec, {**fields, "stack": "plain"}).build()
        ours, theirs = measure(hybrid), measure(full)
        numbers[f"{name}: full over hybrid, bytes a token"] = theirs.state_bytes_per_token / ours.state_bytes_per_token
        a_token = theirs.state_bytes_per_token / int(fields["depth"])  # of one full layer
        numbers[f"{name}: tokens in windows"] = ours.state_bytes_fixed / a_token
    return Measured(numbers)


_caches.builds = BUILDS  # type: ignore[attr-defined]

CACHES = Claim(
    id="cache",
    kind="arithmetic",
    text="Only full layers keep keys and values of every token: 49 layers of which 5 are full keep 9.8 times fewer "
    "bytes a token than 49 full ones, 5 of which 2 are full 2.5 times fewer, and each sparse layer keeps a window of "
    "128 besides.",
    figure="49 layers, 5 of them full: a cache nearly 10 times smaller",
    gates=(
        Number("49 layers: full over hybrid, bytes a token", low=49 / 5, high=49 / 5),
        Number("49 layers: tokens in windows", low=44 * 128, high=44 * 128),
        Number("5 layers: full over hybrid, bytes a token", low=5 / 2, high=5 / 2),
        Number("5 layers: tokens in windows", low=3 * 128, high=3 * 128),
    ),
    run=_caches,
)


# ------------------------------------------------------------------------------------------------------- the oracle


def _oracle(scale: Scale, first: int) -> Measured:
    """A full layer and a sparse one on its keys, in float64, over seeds: 4 heads in 2 groups, blocks of 8."""
    T, B, K, numbers = 150, 8, 8, {"dense": 0.0, "maxima": 0.0, "top": 1.0}
    for seed in range(first, first + (2 if scale == "quick" else 5)):
        positions = Positions(T, True)
        site = Site(width=4 * K, position_spec=RotarySpec(), positions=positions)
        full: Any = SoftmaxSpec(heads=4, kv_heads=2).build(replace(site, gives=Gives(True, block_max=B)))
        sparse: dict[str, Any] = {"heads": 4, "kv_heads": 2, "block": B, "window": 4}
        wide: Any = OracleSparseSpec(**sparse, top_tokens=T + -T % B).build(site)
        few: Any = OracleSparseSpec(**sparse, top_tokens=2 * B).build(site)
        generator = torch.Generator().manual_seed(seed)
        for module in (full, wide, few):
            initialise(module.double(), seed)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.normal_(0.0, 0.5, generator=generator)
        x = torch.randn(2, T, 4 * K, generator=generator, dtype=torch.float64)
        plain = Context.alone(x, positions=positions)
        forced = {"sparse_gate": torch.ones_like, "window_gate": torch.zeros_like}
        taps = Taps(record=["mixed"], replace=forced)
        with torch.no_grad():
            q, k = full.own(x, plain, None)[:2]
            _, given, _ = full(x, plain)
            q_sparse = wide.own(x, plain, None).q
            wide(x, Context(plain.q, plain.k, positions=positions, taps=taps), None, given)
            dense = attention_reference(q_sparse, given.k, given.v, scale=K**-0.5, causal=True)[0]
            probs = attention_reference(q, k, k, scale=K**-0.5, causal=True)[1].unflatten(1, (2, 2)).amax(2)
            chosen = few.choose(given.block_max, plain)
        off = taps.seen["mixed"] - dense.transpose(1, 2).flatten(-2)
        numbers["dense"] = max(numbers["dense"], float(off.abs().max()))
        padded = F.pad(probs, (0, -T % B)).unflatten(-1, (-1, B)).amax(-1)
        numbers["maxima"] = max(numbers["maxima"], float((padded - given.block_max).abs().max()))
        top = (chosen == (probs.argmax(-1) // B)[..., None]).any(-1)
        numbers["top"] = min(numbers["top"], float(top.double().mean()))
    return Measured(
        {
            "sparse branch with room for all blocks - dense attention": numbers["dense"],
            "block maxima - explicit probabilities": numbers["maxima"],
            "share of queries whose likeliest key is in a chosen block": numbers["top"],
        }
    )


_oracle.builds = BUILDS  # type: ignore[attr-defined]

ORACLE = Claim(
    id="oracle",
    kind="identity",
    text="A block's largest score less the log-sum-exp is the log of its largest probability; with room for all "
    "blocks the sparse branch is dense attention over the full layer's keys; with room for two it has the likeliest.",
    figure="S = exp(m - lse); TopK of S are the selected blocks",
    gates=(
        Number("sparse branch with room for all blocks - dense attention", high=1e-10),
        Number("block maxima - explicit probabilities", high=1e-10),
        Number("share of queries whose likeliest key is in a chosen block", low=1.0),
    ),
    run=_oracle,
)


# ------------------------------------------------------------------------------------------------------------ retrieval

_STEPS = 1000
_STACK: dict[str, Any] = {
    "kind": "hysparse", "sparse_per_full": 2, "block": 2, "top_tokens": 4, "window": 4, "gate": "head"
}  # fmt: skip
_WINDOWS: dict[str, Any] = {"model": {"layers": [{"at": [1, 2], "attention": {"window": 4}}]}}

RETRIEVAL = Claim(
    id="retrieval",
    kind="behaviour",
    text="Of 4 pairs of key and value at random distances, a full, two sparse and a full layer recall values more than "
    "5 points better than the same layers without sparse branches, and less than 5 points worse than four full "
    "layers, each at the best of three learning rates.",
    figure="RULER to 32k tokens: on par with or above full attention, above the hybrid of full and sliding-window "
    "layers",
    gates=(
        Effect(
            "better than full and sliding-window layers",
            "hysparse",
            "sliding_window",
            margin=0.05,
            null="sliding_window_again",
            sabotage="random_blocks",
            lower_is_better=False,
        ),
        Effect(
            "not worse than full attention",
            "hysparse",
            "full",
            margin=-0.05,
            sabotage="random_blocks",
            lower_is_better=False,
        ),
    ),
    arms=Arms(
        recipe={
            "model": {
                "width": 64,
                "depth": 4,
                "attention": {"kind": "softmax", "heads": 4, "kv_heads": 2},
                "position": "rotary",
                "ffn": {"kind": "mlp", "hidden": 128},
                # small weights leave all scores alike for thousands of steps before a key is looked up
                "residual": {"kind": "pre", "std": 0.15},
            },
            "data": {"kind": "recall", "pairs": 4, "queries": 4, "keys": 8, "values": 8},
            "optimizer": {"kind": "adamw", "lr": 4e-3, "weight_decay": 0.0},
            "schedule": {"kind": "constant", "warmup": 50},
            **one_thread(_STEPS, 64, blocks=64, test_blocks=512),
        },
        # gates of two sparse layers, one a head and branch, are 1 % of the parameters: the arms are of one size
        patches={
            "hysparse": {"model": {"stack": _STACK}},
            "sliding_window": _WINDOWS,
            "full": {},
            "random_blocks": {"model": {"stack": {**_STACK, "selection": "random"}}},
            "sliding_window_again": _WINDOWS,
        },
        settings={
            "quick": Setting(seeds=2, control_seeds=1, patch={"trainer": {"steps": 60}}),
            "evidence": Setting(seeds=5, control_seeds=3, tune=("optimizer.lr", (2e-3, 4e-3, 8e-3))),
            "gpu": Setting(
                seeds=5,
                control_seeds=3,
                patch={
                    "model": {"width": 256},
                    "data": {"pairs": 256, "queries": 32, "keys": 1024, "values": 256},
                    "trainer": {"steps": 10_000, "precision": "bf16", "compile": "auto"},
                },
                tune=("optimizer.lr", (1e-3, 2e-3, 4e-3)),
            ),
        },
        metric="test_accuracy",
        shifted=("sliding_window_again",),
    ),
)

PAPER = Paper(
    slug="hysparse",
    title="HySparse: A Hybrid Sparse Attention Architecture with Oracle Token Selection and KV Cache Sharing",
    authors="Yizhao Gao, Jianyu Wei, Qihao Zhang et al., Shijie Cao, Fuli Luo",
    year=2026,
    link="https://arxiv.org/abs/2602.03560",
    topics=("sparse attention", "long context", "cache", "decoding"),
    parts=("stack.hysparse", "attention.oracle_sparse"),
    summary="Full attention layers as the oracle of the sparse layers after them: these read the full layer's keys and "
    "values in the blocks that it found most probable, beside a window of their own, and need no growing cache.",
    claims=(CACHES, ORACLE, RETRIEVAL),
)

"""You Only Cache Once: Decoder-Decoder Architectures for Language Models (Sun et al. 2024, arXiv 2405.05254)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from torchstone.model.attention import Attention
from torchstone.model.attention.shared_kv import SharedKV, SharedKVSpec
from torchstone.model.context import Context
from torchstone.model.mask import Lowered
from torchstone.model.measure import measure
from torchstone.model.site import Site, initialise
from torchstone.model.stack import LayerPlan, LayerSpec
from torchstone.model.stack.yoco import YocoSpec
from torchstone.model.taps import Taps
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.papers._claim import Arms, Claim, Effect, Measured, Number, Paper, Scale, Setting, one_thread
from torchstone.spec import validate

__all__ = ["PAPER"]

GATED: dict[str, Any] = {"kind": "gated_retention", "heads": 2}
YOCO: dict[str, Any] = {"kind": "yoco", "self_attention": GATED}


def _decoder(depth: int, stack: dict[str, Any], seed: int) -> Transformer:
    """A decoder of width 64 with as many heads of keys and values as of queries."""
    fields = {"width": 64, "depth": depth, "vocabulary": 256, "attention": {"heads": 2}, "stack": stack}
    model = validate(TransformerSpec, fields).build()
    initialise(model, seed)
    return model.double()


@torch.no_grad()
def _cached_once(scale: Scale, first: int) -> Measured:
    numbers: dict[str, float] = {}
    for depth in (2, 8, 26):
        plain, ours = (_decoder(depth, stack, first) for stack in ({"kind": "plain"}, YOCO))
        ratio = measure(plain).state_bytes_per_token / measure(ours).state_bytes_per_token
        numbers[f"bytes a token, plain over YOCO, over depth ({depth} layers)"] = ratio / depth
    model = _decoder(8, YOCO, first)
    apart = 0.0
    for length in (1, 63, 64, 65, 200):
        ids_BT = torch.randint(256, (2, length), generator=torch.Generator().manual_seed(first + length))
        whole, early = model(ids_BT).logits, model(ids_BT, state=model.state(2, length), outputs="last").logits
        assert whole is not None and early is not None
        apart = max(apart, float((early[:, 0] - whole[:, -1]).abs().max()))
    numbers["early exit: largest difference of a logit"] = apart
    ids_BT, counts = torch.zeros(1, 1024, dtype=torch.int64), []
    for outputs in ("last", "none"):
        # the counter knows products, not the fused kernel, which a layer leaves where its probabilities are wanted
        with FlopCounterMode(display=False) as counter:
            model(ids_BT, outputs=outputs, taps=Taps(record=["*.attention.probs"]))
        counts.append(counter.get_total_flops())
    numbers["early exit: share of the operations"] = counts[0] / counts[1]
    return Measured(numbers)


_cached_once.builds = (  # type: ignore[attr-defined]
    "torchstone.model.stack.yoco",
    "torchstone.model.attention.shared_kv",
    "torchstone.model.attention.gated_retention",
)

CACHED_ONCE = Claim(
    id="cached-once",
    kind="identity",
    text="A plain decoder's cache grows by exactly as many times more bytes a token as it has layers; reading a prompt "
    "without the second half of the layers for all tokens but the last leaves the next token's logits as they are and "
    "takes at most 0.6 of the operations at 1,024 tokens.",
    figure="cache O(N + L) against O(N L); the prompt's pass stops after half of the layers",
    gates=(
        *(
            Number(f"bytes a token, plain over YOCO, over depth ({depth} layers)", low=1.0, high=1.0)
            for depth in (2, 8, 26)
        ),
        Number("early exit: largest difference of a logit", high=1e-9),
        Number("early exit: share of the operations", high=0.6),
    ),
    run=_cached_once,
)


class NarrowKVSpec(SharedKVSpec):
    """Attention to shared keys and values that kept the window of the first half."""

    kind: ClassVar[str] = "narrow_kv"

    def build(self, site: Site) -> Attention:
        return NarrowKV(self, site)


class NarrowKV(SharedKV):
    """See `NarrowKVSpec`."""

    def _lowered(self, ctx: Context) -> Lowered:
        return ctx.lowered(self.spec.window)


class NarrowYocoSpec(YocoSpec):
    """YOCO whose second half kept the window of the first, for the claims' sabotage arms."""

    kind: ClassVar[str] = "yoco_narrow"
    offered: ClassVar[bool] = False

    def plan(self, layers: Sequence[LayerSpec], width: int, causal: bool) -> tuple[LayerPlan, ...]:
        plans = []
        for plan in super().plan(layers, width, causal):
            attention = plan.spec.attention
            if isinstance(attention, SharedKVSpec):
                fields = {name: value for name, value in attention.dump().items() if name != "kind"}
                fields["window"] = getattr(self.self_attention, "window", None)
                plan = LayerPlan(plan.spec.model_copy(update={"attention": NarrowKVSpec(**fields)}))
            plans.append(plan)
        return tuple(plans)


def _windowed(window: int) -> dict[str, Any]:
    return {"kind": "softmax", "heads": 2, "window": window}


def _recipe(data: dict[str, Any], steps: int, batch: int, **evaluate: int) -> dict[str, Any]:
    return {
        "model": {"width": 64, "depth": 4, "attention": {"heads": 2}},
        "data": data,
        "optimizer": {"kind": "adamw", "lr": 3e-3, "weight_decay": 0.0},
        "schedule": {"kind": "cosine", "warmup": 50},
        **one_thread(steps, batch, **evaluate),
    }


def _stack(first: dict[str, Any], kind: str = "yoco") -> dict[str, Any]:
    return {"model": {"stack": {"kind": kind, "self_attention": first}}}


RECALL = Claim(
    id="recalls-beyond-the-window",
    kind="behaviour",
    text="Asked for the one statement in a text, at distances up to 30 tokens, a 4-layer YOCO with windows of 4 or "
    "gated retention in its first half answers at most 0.1 less often than a Transformer; with windows it answers at "
    "least 0.2 more often than windows in every layer. Each at the best of three learning rates.",
    figure="Needle in a haystack at 1M tokens: near-perfect; 3B at 128k, needles 1/2/4/8: 0.98/0.98/0.84/0.56",
    gates=(
        Effect(
            "YOCO with windows is not worse than a Transformer",
            "yoco_window",
            "transformer",
            margin=-0.1,
            sabotage="yoco_narrow",
            lower_is_better=False,
        ),
        Effect(
            "YOCO with gated retention is not worse than a Transformer",
            "yoco",
            "transformer",
            margin=-0.1,
            sabotage="yoco_narrow",
            lower_is_better=False,
        ),
        Effect(
            "YOCO with windows is better than windows alone",
            "yoco_window",
            "windows",
            margin=0.2,
            null="windows_again",
            sabotage="yoco_narrow",
            lower_is_better=False,
        ),
    ),
    arms=Arms(
        recipe=_recipe({"kind": "needle", "length": 32, "fillers": 16}, 400, 32),
        patches={
            "transformer": {},
            "yoco": _stack(GATED),
            "yoco_window": _stack(_windowed(4)),
            "windows": {"model": {"attention": _windowed(4)}},
            "windows_again": {"model": {"attention": _windowed(4)}},
            "yoco_narrow": _stack(_windowed(4), "yoco_narrow"),
        },
        settings={
            "quick": Setting(seeds=1, control_seeds=1, patch={"trainer": {"steps": 200}}),
            "evidence": Setting(seeds=5, control_seeds=3, tune=("optimizer.lr", (1.5e-3, 3e-3, 6e-3))),
            "gpu": Setting(seeds=5, control_seeds=3, patch={"data": {"length": 64}, "trainer": {"steps": 4000}}),
        },
        metric="test_accuracy",
        shifted=("windows_again",),
        imports=("torchstone.papers.yoco",),
    ),
)

LOSS = Claim(
    id="loss-of-a-transformer",
    kind="behaviour",
    text="As a byte-level language model a 4-layer YOCO, with either first half, needs at most 0.1 bits a byte more "
    "than a Transformer of the same width and depth after the same steps, each at the best of three learning rates.",
    figure="3B after 1T tokens: 0.634 over 8 tasks against 0.619 to 0.643 of Transformers; scaling curves side by side",
    gates=(
        Effect("with gated retention", "yoco", "transformer", margin=-0.1, sabotage="yoco_narrow"),
        Effect("with windows", "yoco_window", "transformer", margin=-0.1, sabotage="yoco_narrow"),
    ),
    arms=Arms(
        recipe=_recipe({"corpus": "packages", "tokenizer": "bytes", "block": 128}, 300, 16, blocks=32, test_blocks=512),
        patches={
            "transformer": {},
            "yoco": _stack(GATED),
            "yoco_window": _stack(_windowed(32)),
            # masks of the diagonal alone: every byte is guessed from the one before it
            "yoco_narrow": _stack(_windowed(1), "yoco_narrow"),
        },
        settings={
            "quick": Setting(seeds=1, control_seeds=1, patch={"trainer": {"steps": 100}}),
            "evidence": Setting(seeds=5, control_seeds=3, tune=("optimizer.lr", (1.5e-3, 3e-3, 6e-3))),
            "gpu": Setting(
                seeds=5,
                control_seeds=3,
                patch={
                    "model": {"width": 768, "depth": 12, "attention": {"heads": 12}},
                    "data": {"block": 1024},
                    "trainer": {"steps": 20_000, "precision": "bf16", "compile": "auto"},
                },
            ),
        },
        metric="test_bits_per_byte",
        imports=("torchstone.papers.yoco",),
    ),
)

PAPER = Paper(
    slug="yoco",
    title="You Only Cache Once: Decoder-Decoder Architectures for Language Models",
    authors="Yutao Sun, Li Dong, Yi Zhu, Shaohan Huang, Wenhui Wang, Shuming Ma, Quanlu Zhang, Jianyong Wang, Furu Wei",
    year=2024,
    link="https://arxiv.org/abs/2405.05254",
    topics=("efficiency", "attention", "key-value cache", "linear attention", "long context"),
    parts=("stack.yoco", "attention.gated_retention"),
    summary="A decoder whose first half keeps a state of constant size and whose second half attends to one set of "
    "keys and values: one cache whatever the depth, and prompts that are read through half of the layers.",
    claims=(CACHED_ONCE, RECALL, LOSS),
)

"""DeepSeek-V2 (DeepSeek-AI 2024, arXiv 2405.04434): the half of it that is about attention."""

from __future__ import annotations

from typing import Any

import torch

from torchstone.model.site import initialise
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.papers._claim import Arms, Claim, Effect, Measured, Number, Paper, Scale, Setting, one_thread
from torchstone.spec import validate

__all__ = ["PAPER"]

_V2: dict[str, Any] = {
    "width": 5120,
    "depth": 60,
    "vocabulary": 102400,
    "attention": {"kind": "mla", "heads": 128, "q_latent": 1536},
    "position": {"kind": "rotary", "interleaved": True},
    "block": "attention_only",  # what follows attention has no decode state
}
_67B: dict[str, Any] = {
    "width": 8192,
    "depth": 95,
    "vocabulary": 102400,
    "attention": {"kind": "softmax", "heads": 64, "kv_heads": 8},
    "block": "attention_only",
}


def _on_meta(fields: dict[str, Any]) -> Transformer:
    with torch.device("meta"):
        return validate(TransformerSpec, fields).build()


def _held(model: Transformer, cache_bits: int | None = None) -> int:
    """Bytes of decode state a token, in bfloat16 or in few bits."""
    return sum(slot.bytes(torch.bfloat16, cache_bits) for slots in model.state_spec().values() for slot in slots)


def _cache(scale: Scale, first: int) -> Measured:
    v2, older = _on_meta(_V2), _on_meta(_67B)
    heads = {"kind": "softmax", "heads": 128, "head_dim": 128}
    plain = _on_meta({**_V2, "attention": heads})
    group = _on_meta({**_V2, "attention": {**heads, "kv_heads": 1}})
    layer = v2.main.layers[0].get_submodule("attention")
    return Measured(
        {
            "elements a token": _held(v2) / 2,
            "elements a token of DeepSeek 67B": _held(older) / 2,
            "elements a token of the same heads, all cached": _held(plain) / 2,
            "groups of 128 channels that cache as much": _held(v2) / _held(group),
            "% less than DeepSeek 67B, by the architecture": 100 * (1 - _held(v2) / _held(older)),
            "% less than DeepSeek 67B, with 6 bits a number": 100 * (1 - _held(v2, cache_bits=6) / _held(older)),
            "parameters of a layer's attention": sum(p.numel() for p in layer.parameters()),
        }
    )


_cache.builds = ("torchstone.model.attention.mla", "torchstone.model.state")  # type: ignore[attr-defined]

CACHE = Claim(
    id="cache",
    kind="arithmetic",
    text="DeepSeek-V2's 60 layers cache 34,560 elements a token, 82.2 % less than DeepSeek 67B's 194,560; for the "
    "published 93.3 % they must besides be held in 6 bits against 16.",
    figure="KV cache 93.3 % smaller than DeepSeek 67B's; equal to grouped attention with 2.25 groups",
    gates=(
        Number("elements a token", low=34_560, high=34_560),
        Number("elements a token of DeepSeek 67B", low=194_560, high=194_560),
        Number("elements a token of the same heads, all cached", low=1_966_080, high=1_966_080),
        Number("groups of 128 channels that cache as much", low=2.25, high=2.25),
        Number("% less than DeepSeek 67B, by the architecture", low=82.15, high=82.25),
        Number("% less than DeepSeek 67B, with 6 bits a number", low=93.25, high=93.35),
        Number("parameters of a layer's attention", low=149_227_520, high=149_227_520),
    ),
    run=_cache,
)


def _pair(q_latent: int | None, scaling: dict[str, Any] | None, seed: int) -> dict[str, Transformer]:
    """The same model in both forms, its scores far from equal."""
    made: dict[str, Transformer] = {}
    for form in ("naive", "absorbed"):
        sizes = {"kv_latent": 48, "q_latent": q_latent, "nope_dim": 16, "rope_dim": 8, "v_dim": 16}
        spec = validate(
            TransformerSpec,
            {
                "width": 64,
                "depth": 3,
                "vocabulary": 128,
                "attention": {"kind": "mla", "heads": 4, **sizes, "form": form},
                "position": {"kind": "rotary", "interleaved": True, "scaling": scaling},
                "residual": {"kind": "pre", "std": 0.2},
            },
        )
        made[form] = initialise(spec.build(), seed)  # type: ignore[assignment]
    return made


@torch.no_grad()
def _absorbed(scale: Scale, first: int) -> Measured:
    steps, seeds = (16, 1) if scale == "quick" else (64, 5)
    decoding = forward = 0.0
    yarn = {"kind": "yarn", "factor": 4.0, "original": 16}
    for seed in range(first, first + seeds):
        ids_BT = torch.randint(128, (2, steps), generator=torch.Generator().manual_seed(seed))
        for q_latent, scaling in ((None, None), (24, None), (24, yarn)):
            models = _pair(q_latent, scaling, seed)
            whole = models["naive"](ids_BT).logits
            size = float(whole.abs().max())
            forward = max(forward, float((models["absorbed"](ids_BT).logits - whole).abs().max()) / size)
            states = {form: model.state(2, steps) for form, model in models.items()}
            for t in range(steps):
                one, other = (
                    model(ids_BT[:, t : t + 1], state=states[form]).logits[:, 0] for form, model in models.items()
                )
                for found in (other - one, other - whole[:, t]):
                    decoding = max(decoding, float(found.abs().max()) / size)
    return Measured({"decoding: largest difference": decoding, "whole: largest difference": forward})


_absorbed.builds = ("torchstone.model.attention.mla",)  # type: ignore[attr-defined]

ABSORBED = Claim(
    id="absorbed-is-naive",
    kind="identity",
    text="Multi-query attention over the latents, with both up-projections absorbed, gives what attention over every "
    "head's keys and values gives, at every position, with and without a latent of queries; in float32, of the largest "
    "logit.",
    figure="W_UK can be absorbed into W_Q and W_UV into W_O, so that keys and values are never computed for attention",
    gates=(Number("decoding: largest difference", high=1e-5), Number("whole: largest difference", high=1e-5)),
    run=_absorbed,
)


def _arm(attention: dict[str, Any], hidden: int) -> dict[str, Any]:
    """A patch; feed-forwards are as wide as gives every arm the same number of parameters, within 1 %."""
    return {"model": {"attention": attention, "ffn": {"kind": "swiglu", "hidden": hidden}}}


_HEADS: dict[str, Any] = {"kind": "softmax", "heads": 4}
_LATENT: dict[str, Any] = {"kind": "mla", "heads": 4, "kv_latent": 16, "nope_dim": 16, "rope_dim": 16, "v_dim": 16}
_MODEL: dict[str, Any] = {
    "width": 64,
    "depth": 2,
    # all of the few channels that are rotated should turn within the context
    "position": {"kind": "rotary", "interleaved": True, "base": 100.0},
    "residual": {"kind": "pre", "std": 0.1},
}
_MQA = _arm({**_HEADS, "kv_heads": 1}, 208)
_ARMS = {"mha": _arm(_HEADS, 176), "gqa": _arm({**_HEADS, "kv_heads": 2}, 197), "mqa": _MQA, "mla": _arm(_LATENT, 176)}
_STEPS = 300


def _sizes(scale: Scale, first: int) -> Measured:
    """What the arms cache a token, and their parameters, as a share of the others'."""
    models = {name: _on_meta({**_MODEL, "vocabulary": 1, **arm["model"]}) for name, arm in _ARMS.items()}
    held = {name: _held(model) for name, model in models.items()}
    count = {name: sum(p.numel() for p in model.main.parameters()) for name, model in models.items()}
    others = ("mha", "gqa", "mqa")
    return Measured(
        {f"cache of mla / {name}": held["mla"] / held[name] for name in others}
        | {f"parameters of mla / {name}": count["mla"] / count[name] for name in others}
    )


_sizes.builds = ("torchstone.model.attention.mla", "torchstone.model.attention.softmax")  # type: ignore[attr-defined]

QUALITY = Claim(
    id="quality-at-equal-cache",
    kind="behaviour",
    text="At equal parameters, latent attention is better than multi-query attention with the same cache, and not "
    "worse by 1 % (0.026 bits a byte) than grouped heads with twice the cache or multi-head attention with four times "
    "it.",
    figure="MLA is stronger than MHA at 4 % (large) and 14 % (small) of its cache; MHA is stronger than GQA, and GQA "
    "than MQA",
    gates=(
        Number("cache of mla / mha", high=0.25),
        Number("cache of mla / gqa", high=1.0),
        Number("cache of mla / mqa", high=1.0),
        *(Number(f"parameters of mla / {name}", low=0.97, high=1.03) for name in ("mha", "gqa", "mqa")),
        Effect("better than one head", "mla", "mqa", margin=0.0, null="mqa_again", sabotage="mla_unrotated"),
        Effect("as good as grouped heads", "mla", "gqa", margin=-0.026, sabotage="mla_unrotated"),
        Effect("as good as all heads", "mla", "mha", margin=-0.026, sabotage="mla_unrotated"),
    ),
    run=_sizes,
    arms=Arms(
        recipe={
            "model": _MODEL,
            "data": {"corpus": "packages", "tokenizer": "bytes", "block": 256},
            "optimizer": {"kind": "adamw", "lr": 1e-2, "betas": [0.9, 0.95], "weight_decay": 0.1},
            "schedule": {"kind": "cosine", "warmup": 50},
            **one_thread(_STEPS, 8, blocks=16, test_blocks=256),
        },
        patches={
            **_ARMS,
            "mqa_again": _MQA,
            # the classic defect: the rotation of the shared key and its queries forgotten
            "mla_unrotated": {"model": {**_ARMS["mla"]["model"], "position": {"kind": "none"}}},
        },
        settings={
            "quick": Setting(seeds=2, control_seeds=1, patch={"trainer": {"steps": 40}, "schedule": {"warmup": 10}}),
            "evidence": Setting(seeds=5, control_seeds=3, tune=("optimizer.lr", (5e-3, 1e-2, 2e-2))),
        },
        shifted=("mqa_again",),
    ),
)

PAPER = Paper(
    slug="deepseek-v2",
    title="DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
    authors="DeepSeek-AI",
    year=2024,
    link="https://arxiv.org/abs/2405.04434",
    topics=("attention", "decoding", "cache", "latent attention", "quantisation"),
    parts=("attention.mla",),
    summary="Multi-head latent attention: keys and values of all heads are projections of one small latent a token, "
    "which alone is cached. Its mixture of experts is not here yet.",
    claims=(CACHE, ABSORBED, QUALITY),
)

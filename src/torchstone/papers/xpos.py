"""A Length-Extrapolatable Transformer (Sun et al. 2022, arXiv 2212.10554)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from torchstone.data import Document
from torchstone.data.spec import DataSpec
from torchstone.evaluate import Scorer, attention_resolution, bits_by_length, score_curve
from torchstone.model.mask import mask_named
from torchstone.model.position import Position
from torchstone.model.position.rotary import RotarySpec
from torchstone.model.position.xpos import XposPosition, XposSpec
from torchstone.model.tokens import Tokens
from torchstone.ops.attention import Decay, scores_reference
from torchstone.papers._claim import Claim, Effect, Measured, Number, Paper, Scale
from torchstone.recipe import load_recipe
from torchstone.train import train

__all__ = ["PAPER"]

# ------------------------------------------------------------------------------------------------------ arithmetic

_HEAD, _BASE = 64, 512


def _shifted(positions: tuple[int, ...], length: int = 512) -> float:
    """The largest change of a score in float32 when all positions move, as a share of the largest score."""
    module = XposSpec().build(_HEAD, 1, _HEAD, length, True)
    q, k = torch.randn(2, 1, 1, length, _HEAD, generator=torch.Generator().manual_seed(0))

    def scores(first: int) -> torch.Tensor:
        tokens = Tokens.blank(length, position=torch.arange(first, first + length)[None])
        rotation = module.rotation(tokens.where)
        assert rotation is not None
        return scores_reference(
            rotation.q(q),
            rotation.k(k),
            scale=_HEAD**-0.5,
            causal=True,
            mask_BHTS=None,
            softcap=None,
            decay=module.decay(tokens, tokens),
        )

    here = scores(0).nan_to_num(neginf=0.0)
    return max(
        float((scores(first).nan_to_num(neginf=0.0) - here).abs().max() / here.abs().max()) for first in positions
    )


def _largest_factor(dtype: torch.dtype, length: int) -> float:
    """The largest number by which a query or a key of `length` is multiplied in this dtype."""
    module, tokens = XposSpec().build(_HEAD, 1, _HEAD, length, True), Tokens.blank(length)
    decay = module.decay(tokens, tokens)
    assert decay is not None
    ones, most = torch.ones(1, 1, length, _HEAD, dtype=dtype), 0.0
    block = min(length, decay.span(dtype), 1024)
    for a in range(0, length, block):
        b = min(a + block, length)
        q, k = decay.slice(a, b, 0, b).rebased(ones[:, :, a:b], ones[:, :, :b])
        most = max(most, float(q.max()), float(k.max()))
    return most


def _resolution(spec: RotarySpec | XposSpec, longest: int) -> float:
    return float(attention_resolution(score_curve(spec.build(_HEAD, 1, _HEAD, longest, True), 1, _HEAD, longest)))


def _arithmetic(scale: Scale, first: int) -> Measured:
    fastest = XposSpec().gamma / (1 + XposSpec().gamma)
    stored = torch.tensor(fastest, dtype=torch.float64) ** (-torch.arange(10_000) / _BASE)
    ratios = [_resolution(XposSpec(), n) / _resolution(RotarySpec(), n) for n in (1024, 2048, 4096)]
    return Measured(
        {
            "share of the fastest pair left after 512 tokens": fastest,
            "share of the fastest pair left after 2,048 tokens": fastest**4,
            "first position whose stored factor overflows float16": float(torch.isinf(stored.half()).nonzero()[0]),
            "change of scores when positions move by up to 100,000": _shifted((1, 4_533, 77_777, 100_000)),
            "largest factor here over 16,384 tokens in float16": _largest_factor(torch.float16, 16_384),
            "attention resolution, least share of rotary's": min(ratios),
        }
    )


_arithmetic.builds = (  # type: ignore[attr-defined]
    "torchstone.model.position.xpos",
    "torchstone.ops.attention.decay",
    "torchstone.evaluate.attention_resolution",
)

FACTORS = Claim(
    id="factors",
    kind="arithmetic",
    text="xPos leaves the fastest pair 0.2857 of its score after 512 tokens and has a higher attention resolution than "
    "rotary positions; factors stored with the keys overflow float16 within 4,533 positions, and factors taken of "
    "differences neither overflow nor notice where a text begins.",
    figure="zeta_0 = 0.4 / 1.4; scale base 512; attention resolution above RoPE's at 1,024 and 2,048 tokens",
    gates=(
        Number("share of the fastest pair left after 512 tokens", low=0.2857, high=0.2858),
        Number("share of the fastest pair left after 2,048 tokens", low=0.00666, high=0.00667),
        Number("first position whose stored factor overflows float16", low=4_533, high=4_533),
        Number("change of scores when positions move by up to 100,000", high=1e-5),
        Number("largest factor here over 16,384 tokens in float16", high=256.0),
        Number("attention resolution, least share of rotary's", low=1.05),
    ),
    run=_arithmetic,
)

# ------------------------------------------------------------------------------------------------------- behaviour


class HalfXposSpec(XposSpec):
    """xPos whose keys were forgotten: only queries fade, and with their position instead of the distance."""

    kind: ClassVar[str] = "xpos_half"
    offered: ClassVar[bool] = False

    def build(self, dim: int, heads: int, width: int, context: int, causal: bool) -> Position:
        return _HalfXpos(self, dim)


class _HalfXpos(XposPosition):
    def decay(self, q: Tokens, k: Tokens) -> Decay:
        whole = super().decay(q, k)
        return Decay(whole.rate_K, whole.fastest, whole.q_BT, torch.zeros_like(whole.k_BS))


@dataclass(frozen=True)
class _Size:
    """What a scale spends: `trained` tokens a block, evaluated to eight times as many."""

    trained: int
    steps: int
    batch: int
    seeds: int
    control_seeds: int
    documents: int
    model: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "fp32"


_SIZES = {
    "quick": _Size(trained=128, steps=60, batch=16, seeds=2, control_seeds=1, documents=12),
    "evidence": _Size(trained=128, steps=600, batch=16, seeds=5, control_seeds=3, documents=48),
    "gpu": _Size(
        trained=1024,
        steps=20_000,
        batch=64,
        seeds=5,
        control_seeds=3,
        documents=500,
        model={"width": 1024, "depth": 24, "attention": {"heads": 16}},
        precision="bf16",
    ),
}
_SHIFT = 100_000
"""Distance of the null arm's seeds from the others'."""


def _recipe(size: _Size, position: str, seed: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"kind": position}
    if position.startswith("xpos"):
        fields["scale_base"] = size.trained / 2
    model: dict[str, Any] = {"width": 64, "depth": 2, "attention": {"heads": 4}, **size.model, "position": fields}
    return {
        "model": model,
        "data": {"corpus": "packages", "tokenizer": "bytes", "block": size.trained},
        "optimizer": {"kind": "adamw", "lr": 3e-3 if size.trained < 1024 else 3e-4},
        "schedule": {"kind": "cosine", "warmup": 50},
        "trainer": {
            "seed": seed,
            "steps": size.steps,
            "batch": size.batch,
            "threads": 1,
            "precision": size.precision,
            "compile": "off" if size.precision == "fp32" else "auto",
            "save_every": size.steps,
        },
        "evaluate": {"every": size.steps, "blocks": 8, "test": False},
    }


def _held_out(data: DataSpec, size: _Size) -> list[Document]:
    """Documents of the test split that hold a window beyond their first one, which is left out: preambles are alike.
    Cut to three windows each."""
    longest, found = 8 * size.trained, []
    for document in data.prepare().texts("test"):
        text = document.text[longest : 4 * longest + 1]
        if len(text.encode()) > longest:
            found.append(Document(document.name, text))
    return found[: size.documents]


def _measured(
    size: _Size, position: str, seed: int, documents: Sequence[Document], attentions: Sequence[str]
) -> dict[str, float]:
    """Bits a byte by attention and length, of one training."""
    recipe = load_recipe(_recipe(size, position, seed))
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="torchstone-xpos-") as folder:
        run = train(recipe, out=Path(folder) / "run", quiet=True)
        lengths = [size.trained * factor for factor in (1, 2, 4, 8)]
        sizes = {"full": "full", "blocks": f"blocks:{size.trained // 2}", "window": f"window:{size.trained}"}
        for name in attentions:
            scorer = Scorer.of_run(run, device=recipe.trainer.device, attention=mask_named(sizes[name]))
            result = bits_by_length(scorer, documents, "test", lengths, size.trained // 2)
            found |= {f"{name} {length}": result[f"bits_per_byte@{length}"].value for length in lengths}
    return found


def _longer(scale: Scale, first: int) -> Measured:
    size = _SIZES[scale]
    longest, attentions = f"blocks {8 * size.trained}", ("full", "blocks", "window")
    documents = _held_out(load_recipe(_recipe(size, "rotary", first)).data, size)
    values: dict[str, dict[int, float]] = {}
    for position in ("rotary", "xpos", "alibi"):
        for seed in range(first, first + size.seeds):
            for name, bits in _measured(size, position, seed, documents, attentions).items():
                values.setdefault(f"{position} {name}", {})[seed] = bits
    for arm, position, shift in (("rotary again", "rotary", _SHIFT), ("xpos half", "xpos_half", 0)):
        for seed in range(first + shift, first + shift + size.control_seeds):
            values.setdefault(arm, {})[seed] = _measured(size, position, seed, documents, ["blocks"])[longest]
    # the gate's arms have one name at every scale
    for position in ("rotary", "xpos"):
        values[position] = values.pop(f"{position} {longest}")
    return Measured(values=values)


_longer.builds = (  # type: ignore[attr-defined]
    "torchstone.model.position.xpos",
    "torchstone.model.position.rotary",
    "torchstone.model.position.alibi",
    "torchstone.model.mask",
    "torchstone.model.attention.softmax",
    "torchstone.ops.attention.decay",
    "torchstone.evaluate.lengths",
)

LONGER = Claim(
    id="longer-than-trained",
    kind="behaviour",
    text="A byte model trained on 128 tokens with xPos (scale base 64, half of that) spends at least 0.02 bits a byte "
    "less on 1,024 tokens under blockwise causal attention than one with rotary positions under the same attention. "
    "Full attention, a sliding window, ALiBi and shorter lengths are measured beside it and no part of the claim.",
    figure="trained on 1,024 tokens, xPos with blockwise causal attention goes on gaining up to 4,096, where RoPE "
    "under full attention is lost",
    gates=(
        Effect(
            "xPos gains under blockwise causal attention",
            "xpos",
            "rotary",
            margin=0.02,  # 1 % of some 2 bits a byte: the smallest difference that a choice of position is worth
            null="rotary again",
            sabotage="xpos half",
        ),
    ),
    run=_longer,
)

PAPER = Paper(
    slug="xpos",
    title="A Length-Extrapolatable Transformer",
    authors="Yutao Sun, Li Dong, Barun Patra, Shuming Ma, Shaohan Huang, Alon Benhaim, Vishrav Chaudhary, Xia Song, "
    "Furu Wei",
    year=2022,
    link="https://arxiv.org/abs/2212.10554",
    topics=("position", "length extrapolation", "attention", "long context"),
    parts=("position.xpos",),
    summary="Train on short texts, read long ones: rotary positions whose scores fall with distance (xPos), attention "
    "within blocks of half the training length, and a number for how well a position tells distances apart.",
    claims=(FACTORS, LONGER),
)

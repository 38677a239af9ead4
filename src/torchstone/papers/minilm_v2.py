"""MiniLMv2: Multi-Head Self-Attention Relation Distillation (Wang et al. 2021, arXiv 2012.15828)."""

from __future__ import annotations

import math
from typing import Any

import torch

from torchstone.compress.objectives.minilm_v2 import MiniLMv2, MiniLMv2Spec, relation, relation_kl
from torchstone.keys import Key
from torchstone.model.site import initialise
from torchstone.model.taps import Taps
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.objectives import tokens_of
from torchstone.papers._claim import Claim, Measured, Number, Paper, Scale
from torchstone.spec import validate

__all__ = ["PAPER"]

_VOCABULARY, _LENGTH = 97, 24


def _encoder(seed: int, **fields: Any) -> Any:
    spec = {
        "width": 48,
        "depth": 3,
        "vocabulary": _VOCABULARY,
        "context": _LENGTH,
        "causal": False,
        "attention": {"heads": 4, "bias": "all"},
        "position": "learned",
        "residual": {"kind": "pre", "std": 0.3},
        **fields,
    }
    model: Any = initialise(validate(TransformerSpec, spec).build(), seed)
    return model.double().eval()


def _exact(scale: Scale, first: int) -> Measured:
    numbers: dict[str, float] = {}

    def worst(name: str, value: float) -> None:
        numbers[name] = max(numbers.get(name, 0.0), value)

    for seed in range(first, first + 3):
        draw = Key(seed).generator()
        ids = torch.randint(_VOCABULARY, (3, _LENGTH), generator=draw)
        valid = torch.arange(_LENGTH) < torch.tensor([[_LENGTH], [17], [9]])
        batch = {"ids": ids, "valid": valid}
        teacher, student = _encoder(seed), _encoder(seed + 50, width=30, depth=2, attention={"heads": 5, "bias": "all"})

        def loss(of: Transformer, heads: int, teacher: Transformer = teacher, batch: Any = batch, **more: Any) -> float:
            spec = validate(MiniLMv2Spec, {"teacher": "teacher", "relation_heads": heads, **more})
            with torch.no_grad():
                return float(MiniLMv2(spec, teacher)(of, batch, None).terms["loss"].total)

        worst("a teacher's loss to itself", loss(teacher, 12, relations="all"))
        numbers["another model's, least"] = min(numbers.get("another model's, least", math.inf), loss(student, 6))
        # MiniLM (arXiv 2002.10957, eq. 4 and 5): attention maps and value relations of equal heads
        other = _encoder(seed + 60)
        maps: dict[str, list[torch.Tensor]] = {"qk": [], "vv": []}
        for model in (teacher, other):
            taps = Taps([f"encoder.layers.2.attention.{name}" for name in "qkv"])
            with torch.no_grad():
                model(tokens_of(batch), taps=taps)
            for pair, of in maps.items():
                a, b = (taps.seen[f"encoder.layers.2.attention.{name}"] for name in pair)
                scores = a @ b.transpose(-1, -2) / math.sqrt(a.shape[-1])
                of.append(scores.masked_fill(~valid[:, None, None], -math.inf).log_softmax(-1))
        wanted = 0.0
        for p, q in maps.values():
            kl = (p.exp() * torch.where(valid[:, None, None], p - q, 0.0)).sum(-1).mean(1)
            wanted += float(kl[valid].sum())
        found = loss(other, 4, relations=["qk", "vv"], reduction="sum")
        worst("MiniLM's two losses, off by, relatively", abs(found / wanted - 1))
        x, y = (torch.randn(1, _LENGTH, 24, generator=draw, dtype=torch.float64) for _ in range(2))
        keys, queries = torch.ones(1, _LENGTH, _LENGTH, dtype=torch.bool), torch.ones(1, _LENGTH, dtype=torch.bool)
        turns = [torch.linalg.qr(torch.randn(6, 6, generator=draw, dtype=torch.float64))[0] for _ in range(4)]
        inside = torch.block_diag(*turns)
        plain = relation_kl(x, x, y, y, keys, queries, 4)
        turned = relation_kl(x @ inside, x @ inside, y, y, keys, queries, 4)
        worst("relation heads turned, off by, relatively", float((turned / plain - 1).abs()))
        across = x @ torch.linalg.qr(torch.randn(24, 24, generator=draw, dtype=torch.float64))[0]
        moved = float((relation_kl(across, across, y, y, keys, queries, 4) / plain - 1).abs())
        name = "channels mixed across relation heads, moved by, least"
        numbers[name] = min(numbers.get(name, math.inf), moved)
        worst("rows of relations, off from one", float((relation(x, x, keys, 4).exp().sum(-1) - 1).abs().max()))
    return Measured(numbers)


_exact.builds = ("torchstone.compress.objectives.minilm_v2", "torchstone.model.taps")  # type: ignore[attr-defined]

EXACT = Claim(
    id="exact",
    kind="identity",
    text="A teacher has nothing to learn from itself. With as many relation heads as heads, queries with keys and "
    "values with values are MiniLM's two losses. Relations do not change when the channels of a relation head are "
    "turned, and do when heads are mixed; student and teacher may have any head counts.",
    figure="eq. 5 to 8; MiniLM, eq. 4 and 5",
    gates=(
        Number("a teacher's loss to itself", high=1e-6),
        Number("another model's, least", low=1e-2),
        Number("MiniLM's two losses, off by, relatively", high=1e-9),
        Number("relation heads turned, off by, relatively", high=1e-9),
        Number("channels mixed across relation heads, moved by, least", low=1e-3),
        Number("rows of relations, off from one", high=1e-12),
    ),
    run=_exact,
)

PAPER = Paper(
    slug="minilm-v2",
    title="MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers",
    authors="Wenhui Wang, Hangbo Bao, Shaohan Huang, Li Dong, Furu Wei",
    year=2021,
    link="https://arxiv.org/abs/2012.15828",
    topics=("distillation", "compression"),
    parts=("objective.minilm_v2",),
    summary="A student learns how queries, keys and values of one of the teacher's layers relate to one another, cut "
    "into as many heads as one likes.",
    claims=(EXACT,),
)

"""MiniLMv2: Multi-Head Self-Attention Relation Distillation (Wang et al. 2021, arXiv 2012.15828)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from torchstone.compress.objectives.minilm_v2 import MiniLMv2, MiniLMv2Spec, relation, relation_kl
from torchstone.keys import Key
from torchstone.model.site import initialise
from torchstone.model.taps import Taps
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.objectives import tokens_of
from torchstone.papers._claim import Claim, Effect, Measured, Number, Paper, Scale, one_thread
from torchstone.papers._teachers import teacher
from torchstone.recipe import load_recipe
from torchstone.spec import validate
from torchstone.train import RunFolder
from torchstone.train.training import make_trainer

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


def _minilm(teacher: Any, student: Any, batch: dict[str, torch.Tensor]) -> float:
    """MiniLM's losses (arXiv 2002.10957, eq. 4 and 5) of the last layers of two encoders with equal heads, whose
    positions are no rotation: KL of attention maps and of value relations, mean over heads, summed over tokens."""
    valid, total, maps = batch["valid"], 0.0, {"qk": [], "vv": []}  # type: ignore[var-annotated]
    for model in (teacher, student):
        path = f"encoder.layers.{model.spec.depth - 1}.attention"
        taps = Taps([f"{path}.{name}" for name in "qkv"])
        with torch.no_grad():
            model(tokens_of(batch), taps=taps)
        for pair, of in maps.items():
            a, b = (taps.seen[f"{path}.{name}"] for name in pair)
            scores = a @ b.transpose(-1, -2) / math.sqrt(a.shape[-1])
            of.append(scores.masked_fill(~valid[:, None, None], -math.inf).log_softmax(-1))
    for p, q in maps.values():
        kl = (p.exp() * torch.where(valid[:, None, None], p - q, 0.0)).sum(-1).mean(1)
        total += float(kl[valid].sum())
    return total


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
        other = _encoder(seed + 60)
        found = loss(other, 4, relations=["qk", "vv"], reduction="sum")
        worst("MiniLM's two losses, off by, relatively", abs(found / _minilm(teacher, other, batch) - 1))
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

# ------------------------------------------------------------------------------------- other heads, another width


@dataclass(frozen=True)
class _Size:
    """What a scale spends: steps of the teacher, of relations, of masked tokens afterwards, and the learning rates."""

    teacher: int
    steps: int
    tuning: int
    seeds: int
    controls: int
    rates: tuple[float, ...]


_SIZES = {
    "quick": _Size(50, 20, 20, 1, 1, (3e-3,)),
    "evidence": _Size(1000, 150, 100, 5, 3, (1e-3, 3e-3, 1e-2)),
}
_AGAIN, _TUNING = 100_000, 500_000

_BASE: dict[str, Any] = {
    "causal": False,
    "position": "learned",
    "ffn": {"kind": "mlp", "bias": True},
    "norm": "layernorm",
    "head": "mlm",
}
_TEACHER = {**_BASE, "width": 96, "depth": 3, "attention": {"heads": 6, "bias": "all"}}
_STUDENT = {**_BASE, "width": 64, "depth": 2, "attention": {"heads": 2, "bias": "all"}}

_ARMS: dict[str, dict[str, Any] | None] = {
    "masked tokens alone": None,
    "1 relation head": {"relation_heads": 1},
    "16 relation heads": {"relation_heads": 16},
    "masked tokens alone, again": None,
    "untrained teacher": {"relation_heads": 16},
    "4 relation heads": {"relation_heads": 4},
    "all nine relations": {"relation_heads": 16, "relations": "all"},
    "layer 1": {"relation_heads": 16, "layer": 1},
    "layer 2": {"relation_heads": 16, "layer": 2},
}
_REPORTED = ("4 relation heads", "all nine relations", "layer 1", "layer 2")


def _recipe(model: dict[str, Any], objective: dict[str, Any], seed: int, steps: int, lr: float) -> dict[str, Any]:
    settings = one_thread(steps, 16, blocks=128, test_blocks=256)
    settings["trainer"] |= {"seed": seed, "device": "cpu"}
    return {
        "model": model,
        "data": {"corpus": "stdlib", "tokenizer": "bytes", "block": 32},
        "objective": objective,
        "optimizer": {"lr": lr},
        "schedule": {"kind": "linear", "warmup": min(20, steps // 2)},
        **settings,
    }


def _taught(steps: int) -> RunFolder:
    return teacher(_recipe(_TEACHER, {"kind": "masked_lm"}, 0, steps, 3e-3))


def _student(size: _Size, arm: str, seed: int, lr: float, steps: int) -> dict[str, float]:
    """Losses of a student's masked tokens after `steps` of them, and its relations' KL before and after their own."""
    relations, found, state = _ARMS[arm], {}, None
    if relations is not None:
        taught = _taught(1 if arm == "untrained teacher" else size.teacher)
        objective = {"kind": "minilm_v2", "teacher": str(taught.path), **relations}
        trainer, _ = make_trainer(load_recipe(_recipe(_STUDENT, objective, seed, size.steps, lr)))
        kl = [row["valid_kl_vv"] for row in trainer.fit() if "valid_kl_vv" in row]
        found, state = {"first": kl[0], "last": kl[-1]}, trainer.model.state_dict()
    trainer, _ = make_trainer(load_recipe(_recipe(_STUDENT, {"kind": "masked_lm"}, seed, steps, lr)))
    if state is not None:
        trainer.model.load_state_dict(state)
    row = {name: value for each in trainer.fit() for name, value in each.items()}
    return {**found, "valid": row["valid_loss"], "test": row["test_loss"]}


def _fewer_heads(scale: Scale, first: int) -> Measured:
    size = _SIZES[scale]
    numbers: dict[str, float] = {}
    values: dict[str, dict[int, float]] = {}
    for arm in _ARMS:
        like = arm.removesuffix(", again")
        if len(size.rates) > 1 and arm == like and arm not in _REPORTED:
            losses = {lr: _student(size, arm, first + _TUNING, lr, size.tuning)["valid"] for lr in size.rates}
            numbers[f"{arm}: learning rate"] = min(losses, key=losses.__getitem__)
        rate = numbers.get(f"{'16 relation heads' if arm in _REPORTED else like}: learning rate", size.rates[0])
        count = 1 if arm in _REPORTED else size.seeds if arm in tuple(_ARMS)[:3] else size.controls
        for seed in range(first, first + count):
            found = _student(size, arm, seed + (_AGAIN if arm != like else 0), rate, size.tuning)
            values.setdefault(arm, {})[seed] = found["test"]
            if arm == "16 relation heads":
                name = "KL of held-out values' relations over that at first, largest"
                numbers[name] = max(numbers.get(name, 0.0), found["last"] / found["first"])
    rate = numbers.get("masked tokens alone: learning rate", size.rates[0])
    whole = _student(size, "masked tokens alone", first, rate, size.tuning + size.steps)
    numbers["masked tokens alone, for as many steps in all"] = whole["test"]
    # the two versions of the loss, of the teacher itself and of its first weights
    taught: Any = _taught(size.teacher).model().double().eval()
    other: Any = initialise(validate(TransformerSpec, taught.spec.dump()).build(), first).double().eval()
    ids = torch.randint(3, taught.spec.vocabulary, (4, 32), generator=Key(first).generator())
    batch = {"ids": ids, "valid": torch.arange(32) < torch.tensor([[32], [32], [20], [9]])}
    spec = MiniLMv2Spec(teacher="teacher", relation_heads=6, relations=("qk", "vv"), reduction="sum")
    with torch.no_grad():
        total = float(MiniLMv2(spec, taught)(other, batch, None).terms["loss"].total)
    numbers["MiniLM's two losses of the trained teacher, off by, relatively"] = abs(
        total / _minilm(taught, other, batch) - 1
    )
    return Measured(numbers, values)


_fewer_heads.builds = (  # type: ignore[attr-defined]
    "torchstone.compress.objectives.minilm_v2",
    "torchstone.objectives.masked_lm",
    "torchstone.model.taps",
)

OTHER_HEADS = Claim(
    id="other-heads-another-width",
    kind="behaviour",
    text="A student of 2 heads and width 64 that first learned the relations of a teacher of 6 heads and width 96, in "
    "16 relation heads, loses less on masked bytes after 100 steps of them than one that did not, and no more than "
    "after one relation head; its relations of values come to half of their first distance. Each arm at the best of "
    "three learning rates. The trained teacher's loss in its own heads is MiniLM's.",
    figure="table 1: relation heads 48 for BERT-base; the student's heads are free",
    gates=(
        Effect(
            "loses less than without relations",
            "16 relation heads",
            "masked tokens alone",
            margin=0.05,
            null="masked tokens alone, again",
            sabotage="untrained teacher",
        ),
        Effect(
            "loses no more than with one relation head",
            "16 relation heads",
            "1 relation head",
            margin=-0.02,
            sabotage="untrained teacher",
        ),
        Number("KL of held-out values' relations over that at first, largest", high=0.5),
        Number("MiniLM's two losses of the trained teacher, off by, relatively", high=1e-9),
    ),
    run=_fewer_heads,
    scales=("quick", "evidence"),
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
    claims=(EXACT, OTHER_HEADS),
)

"""HousE: Knowledge Graph Embedding with Householder Parameterization (Li et al. 2022, arXiv 2202.07919)."""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from torchstone.domains.knowledge_graph.data.triples import PreparedTriples, Triples
from torchstone.domains.knowledge_graph.model._scorer import Scorer
from torchstone.domains.knowledge_graph.model.house import HousE, HousESpec
from torchstone.domains.knowledge_graph.model.rotate import RotatE, RotatESpec
from torchstone.domains.knowledge_graph.objectives.link_prediction import filtered_ranks, ranks
from torchstone.model.site import initialise
from torchstone.ops.householder import householder
from torchstone.papers._claim import Claim, Effect, Measured, Number, Paper, Scale
from torchstone.recipe import load_recipe
from torchstone.train import train
from torchstone.train.run import shape_of

__all__ = ["PAPER"]

_BUILDS = (
    "torchstone.ops.householder",
    "torchstone.ops.householder.fast",
    "torchstone.ops.householder.reference",
    "torchstone.domains.knowledge_graph.data.triples",
    "torchstone.domains.knowledge_graph.model._scorer",
    "torchstone.domains.knowledge_graph.model.house",
    "torchstone.domains.knowledge_graph.model.rotate",
    "torchstone.domains.knowledge_graph.objectives.link_prediction",
)

# ------------------------------------------------------------------------------------------------------- identities


def _drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _house(seed: int, **fields: Any) -> HousE:
    """A small model whose parts all show."""
    spec = HousESpec(entities=8, relations=4, dim=24, gamma=6.0, **fields)
    model: Any = initialise(spec.build(), seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "entity":
                parameter.copy_(_drawn(*parameter.shape, seed=seed + len(name)))
    return model


def _largest(values: Iterable[torch.Tensor]) -> float:
    return max(float(value.abs().max()) for value in values)


@torch.no_grad()
def _both_ends(model: Scorer) -> torch.Tensor:
    """The score of every triple by its tail less that by its head."""
    entities, relations = model.spec.sizes()
    head, relation, tail = torch.cartesian_prod(*map(torch.arange, (entities, relations, entities))).T
    by_tail = model(head, relation, torch.zeros_like(head, dtype=torch.bool), tail[:, None])
    return by_tail - model(tail, relation, torch.ones_like(head, dtype=torch.bool), head[:, None])


@torch.no_grad()
def _rotate_apart(seed: int) -> torch.Tensor:
    """Scores of HousE-r of blocks of two less those of RotatE turned by twice the angle between the directions."""
    ours = _house(seed, block=2, projections=0)
    spec = RotatESpec(entities=8, relations=4, dim=24, gamma=6.0)
    theirs: Any = RotatE(spec)
    theirs.entity.copy_(ours.entity)
    a_RnC = torch.atan2(ours.rotation[..., 1], ours.rotation[..., 0])
    theirs.relation.copy_(2 * (a_RnC[..., 0] - a_RnC[..., 1]) * spec.spread / torch.pi)
    given, relation = torch.cartesian_prod(torch.arange(8), torch.arange(4)).T
    sides = [torch.full_like(given, side, dtype=torch.bool) for side in (False, True)]
    return torch.stack([ours(given, relation, side) - theirs(given, relation, side) for side in sides])


@torch.no_grad()
def _commutator(k: int, seed: int) -> torch.Tensor:
    a, b = (_drawn(2 * (k // 2), k, seed=seed + n) for n in (0, 1))
    both = householder(householder(torch.eye(k), a), b)
    return both - householder(householder(torch.eye(k), b), a)


def _strength_after_training(seed: int, steps: int = 50) -> float:
    """The largest strength that 50 steps reach which push all of them up, over its bound."""
    model = _house(seed, block=4, projections=2, max_strength=0.25)
    optimizer, reached = torch.optim.Adam(model.parameters(), lr=0.1), 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        (-(model.strength * model.scale.abs()).sum()).backward()
        optimizer.step()
        reached = max(reached, float(model.strengths().detach().max()))
    return reached / model.spec.max_strength


@torch.no_grad()
def _identities(scale: Scale, first: int) -> Measured:
    rotations = {k: (_drawn(6, k, seed=first + k), _drawn(2 * (k // 2), k, seed=first + 100 + k)) for k in range(2, 33)}
    one = _drawn(1, 5, seed=first)
    eye = torch.eye(5)
    plain, ours = _house(first, block=3, projections=0), _house(first, block=3, projections=2)
    ours.strength.zero_()
    given, relation = torch.cartesian_prod(torch.arange(8), torch.arange(4)).T
    heads = given % 2 == 0
    variants = [{"projections": p, "translation": t, "block": k} for p in (0, 2) for t in (False, True) for k in (2, 5)]
    known = _drawn(7, 50, seed=first) > 0.5
    known[:, 0] = False
    constant = filtered_ranks(torch.full((7, 50), 1.25), torch.zeros(7, dtype=torch.long), known)
    with torch.device("meta"):
        wn18rr = HousESpec(entities=40_943, relations=11, dim=800, block=8, projections=1)
        sizes = {name: parameter.numel() for name, parameter in shape_of(wn18rr).named_parameters()}
    with torch.enable_grad():
        strength = _strength_after_training(first)
    return Measured(
        {
            "change of a length by a rotation": _largest(
                householder(x, u).norm(dim=-1) / x.norm(dim=-1) - 1 for x, u in rotations.values()
            ),
            "distance after turning back": _largest(
                householder(householder(x, u), u.flip(-2)) - x for x, u in rotations.values()
            ),
            "determinant of a rotation less 1": _largest(
                torch.linalg.det(householder(torch.eye(k), u)) - 1 for k, (_, u) in rotations.items()
            ),
            "k = 2 less RotatE by twice the angle": _largest([_rotate_apart(first)]),
            "score by the tail less score by the head": _largest(
                _both_ends(_house(first, **fields)) for fields in variants
            ),
            "determinant of a contraction less 1 - strength": _largest(
                torch.linalg.det(householder(eye, one, tau)) - (1 - tau) for tau in (-2.0, 0.0, 0.4, 1.0, 2.0)
            ),
            "strength 0: HousE less HousE-r": _largest([ours(given, relation, heads) - plain(given, relation, heads)]),
            "strength 2 twice: distance": _largest([householder(householder(eye, one, 2.0), one, 2.0) - eye]),
            "k = 3: two rotations in both orders": _largest([_commutator(3, first)]),
            "k = 2: two rotations in both orders": _largest([_commutator(2, first)]),
            "rank of a constant scorer less the middle": _largest([constant - ((~known).sum(1) + 1) / 2]),
            "strength over its bound after steps": strength,
            "WN18RR: numbers of entities": sizes["entity"],
            "WN18RR: numbers of directions": sizes["rotation"] + sizes["projection"],
            "WN18RR: numbers of strengths": sizes["strength"] + sizes["scale"],
        }
    )


_identities.builds = _BUILDS  # type: ignore[attr-defined]

IDENTITIES = Claim(
    id="identities",
    kind="identity",
    text="Products of 2 floor(k/2) reflections are rotations for k from 2 to 32, undone by the reverse order, "
    "RotatE's at k = 2, and need not commute from k = 3 on; a triple has one score by either end, with contractions "
    "and translation too; a contraction has the determinant 1 - strength and is nothing at strength 0; strengths stay "
    "below their bound in training; a scorer that knows nothing ranks in the middle; HousE on WN18RR has as many "
    "numbers as it should.",
    figure="Householder products reach SO(k); RotatE is k = 2; contractions are invertible; 800 numbers an entity on "
    "WN18RR, blocks of 8, one contraction",
    gates=(
        Number("change of a length by a rotation", high=1e-5),
        Number("distance after turning back", high=1e-5),
        Number("determinant of a rotation less 1", high=1e-4),
        Number("k = 2 less RotatE by twice the angle", high=1e-5),
        Number("score by the tail less score by the head", high=1e-4),
        Number("determinant of a contraction less 1 - strength", high=1e-5),
        Number("strength 0: HousE less HousE-r", low=0.0, high=0.0),
        Number("strength 2 twice: distance", high=1e-5),
        Number("k = 3: two rotations in both orders", low=0.1),
        Number("k = 2: two rotations in both orders", high=1e-6),
        Number("rank of a constant scorer less the middle", low=0.0, high=0.0),
        Number("strength over its bound after steps", high=1.0),
        Number("WN18RR: numbers of entities", low=32_754_400, high=32_754_400),
        Number("WN18RR: numbers of directions", low=88_000, high=88_000),
        Number("WN18RR: numbers of strengths", low=2_222, high=2_222),
    ),
    run=_identities,
)

# ------------------------------------------------------------------------------------------------ graphs and training

_Fact = tuple[str, str, str]
_TUNING_SEED = 500_000
_SHIFT = 100_000
"""Distance of the null arm's seeds from the others'."""
_RATES = (2e-2, 6e-2, 2e-1)


@dataclass(frozen=True)
class _Size:
    """What a scale spends.

    Attributes:
        steps, negatives: of a training, with rows of 128.
        seeds, control_seeds: of arms and of controls.
        rates: learning rates that each arm chooses from, by the validation facts of one other seed.
    """

    steps: int
    negatives: int
    seeds: int
    control_seeds: int
    rates: tuple[float, ...]


@dataclass(frozen=True)
class _Task:
    """A graph, and models that are trained on it.

    Attributes:
        facts: of a seed's graph.
        held_out: share of them that is not trained on.
        arms: models by name.
        controls: arms of which fewer seeds are trained.
        nulls: arms that are another under other seeds: which.
    """

    facts: Callable[[int], list[_Fact]]
    held_out: float
    arms: Mapping[str, Mapping[str, Any]]
    controls: tuple[str, ...]
    nulls: Mapping[str, str]


def _write(folder: Path, facts: list[_Fact], held_out: float, seed: int) -> None:
    """Three files of triples; a fifth of what is held out is for choosing."""
    facts = list(facts)
    random.Random(seed).shuffle(facts)
    trained = len(facts) - round(held_out * len(facts))
    chosen = trained + (len(facts) - trained) // 5
    folder.mkdir()
    for name, part in {"train": facts[:trained], "valid": facts[trained:chosen], "test": facts[chosen:]}.items():
        (folder / f"{name}.txt").write_text("".join("\t".join(fact) + "\n" for fact in part))


def _run(task: _Task, size: _Size, arm: str, seed: int, rate: float) -> tuple[Scorer, PreparedTriples]:
    """A trained model and its data."""
    with tempfile.TemporaryDirectory(prefix="torchstone-house-") as root:
        graph = Path(root) / "graph"
        _write(graph, task.facts(seed), task.held_out, seed)
        recipe = load_recipe(
            {
                "model": {"gamma": 6.0, **task.arms[arm]},
                "data": {"kind": "triples", "path": str(graph), "negatives": size.negatives},
                "objective": "link_prediction",
                "optimizer": {"kind": "adamw", "lr": rate, "weight_decay": 0.0, "betas": [0.9, 0.999]},
                "schedule": "linear",
                "trainer": {
                    "seed": seed,
                    "steps": size.steps,
                    "batch": 128,
                    "clip": None,
                    "threads": 1,
                    "compile": "off",
                    "save_every": size.steps,
                },
                "evaluate": {"every": size.steps, "blocks": 1, "test": False},
            }
        )
        return train(recipe, out=Path(root) / "run", quiet=True).model(), recipe.data.prepare()  # type: ignore[return-value]


@torch.no_grad()
def _ranked(model: Scorer, data: PreparedTriples, split: Triples) -> dict[str, float]:
    """Mean reciprocal filtered rank over both ends of a split's facts, by the name of the relation, and of ``all``."""
    found: dict[str, list[float]] = {"all": []}
    for batch in split.evaluation(256):
        ranks_B = ranks(model, batch)
        for number, rank in zip(batch["relation"].tolist(), ranks_B.tolist(), strict=True):
            for name in ("all", data.relations.names[number]):
                found.setdefault(name, []).append(1 / rank)
    return {name: sum(each) / len(each) for name, each in found.items()}


def _rate(task: _Task, size: _Size, arm: str) -> float:
    """The learning rate with the best mean reciprocal rank on the validation facts of another seed."""

    def found(rate: float) -> float:
        model, data = _run(task, size, arm, _TUNING_SEED, rate)
        return _ranked(model, data, data.valid)["all"]

    return max(size.rates, key=found) if len(size.rates) > 1 else size.rates[0]


def _measured(task: _Task, size: _Size, first: int, metrics: Mapping[str, tuple[str, ...]]) -> Measured:
    """Values by arm and seed of each metric, which is a mean over relations; the first is called as the arm alone."""
    values: dict[str, dict[int, float]] = {}
    numbers: dict[str, float] = {}
    plans = [(arm, arm, 0, size.control_seeds if arm in task.controls else size.seeds) for arm in task.arms]
    plans += [(null, arm, _SHIFT, size.control_seeds) for null, arm in task.nulls.items()]
    rates: dict[str, float] = {}
    for name, arm, shift, seeds in plans:
        if arm not in rates:
            rates[arm] = numbers[f"{arm}: learning rate"] = _rate(task, size, arm)
        for seed in range(first + shift, first + shift + seeds):
            model, data = _run(task, size, arm, seed, rates[arm])
            numbers[f"{arm}: parameters"] = sum(parameter.numel() for parameter in model.parameters())
            ranked = _ranked(model, data, data.test)
            for metric, relations in metrics.items():
                mean = sum(ranked[relation] for relation in relations) / len(relations)
                values.setdefault(f"{name}: {metric}" if metric else name, {})[seed] = mean
    return Measured(numbers, values)


# --------------------------------------------------------------------------------------- rotations that do not commute


class OneOrderSpec(HousESpec):
    """HousE with the inverse forgotten: where a head is sought the tail is turned as a head would be."""

    kind: ClassVar[str] = "house_one_order"
    offered: ClassVar[bool] = False

    def build(self) -> nn.Module:
        return _OneOrder(self)


class _OneOrder(HousE):
    def carry(self, x_BD: torch.Tensor, relation_B: torch.Tensor, seeks_head_B: torch.Tensor) -> torch.Tensor:
        return super().carry(x_BD, relation_B, torch.zeros_like(seeks_head_B))


def _even_permutations() -> list[tuple[int, ...]]:
    """The 60 elements of A5."""

    def even(p: tuple[int, ...]) -> bool:
        return sum(p[i] > p[j] for i, j in itertools.combinations(range(5), 2)) % 2 == 0

    return [p for p in itertools.permutations(range(5)) if even(p)]


def _cayley(seed: int) -> list[_Fact]:
    """Every element of A5 times 8 of its elements, other than 1, drawn by the seed: 480 facts."""
    elements = _even_permutations()
    by = random.Random(f"cayley {seed}").sample(elements[1:], 8)

    def name(p: tuple[int, ...]) -> str:
        return "".join(map(str, p))

    return [(name(g), f"times {name(s)}", name(tuple(g[i] for i in s))) for g in elements for s in by]


_GROUP = _Task(
    facts=_cayley,
    held_out=0.5,
    arms={
        "house-r, k = 3": {"kind": "house", "dim": 24, "block": 3, "projections": 0},
        "house-r, k = 2": {"kind": "house", "dim": 24, "block": 2, "projections": 0},
        "rotate": {"kind": "rotate", "dim": 24},
        "rotate, four times": {"kind": "rotate", "dim": 96},
        "one order": {"kind": "house_one_order", "dim": 24, "block": 3, "projections": 0},
    },
    controls=("rotate", "one order"),
    nulls={"rotate, four times, again": "rotate, four times", "house-r, k = 2, again": "house-r, k = 2"},
)
_GROUP_SIZES = {
    "quick": _Size(steps=300, negatives=64, seeds=2, control_seeds=1, rates=(6e-2,)),
    "evidence": _Size(steps=1500, negatives=64, seeds=5, control_seeds=3, rates=_RATES),
    "gpu": _Size(steps=5000, negatives=256, seeds=10, control_seeds=3, rates=_RATES),
}


def _groups(scale: Scale, first: int) -> Measured:
    found = _measured(_GROUP, _GROUP_SIZES[scale], first, {"": ("all",)})
    return Measured(found.numbers, {**found.values, "every answer first": dict.fromkeys(found.values[_ARM], 1.0)})


_groups.builds = _BUILDS  # type: ignore[attr-defined]

_ARM = "house-r, k = 3"
GROUPS = Claim(
    id="a-group-that-does-not-commute",
    kind="behaviour",
    text="Of the multiplication table of A5, the rotations of an icosahedron, half of the products by 8 elements are "
    "held out. HousE-r with blocks of 3, which hold those rotations, ranks them with a mean reciprocal of at least "
    "0.95, and by more than 0.1 better than both RotatE with four times as many numbers an entity and HousE-r with "
    "blocks of 2, whose rotations commute, each at its best of three learning rates.",
    figure="rotations of blocks of 3 or more numbers do not commute, as compositions of relations need not",
    gates=(
        # 0.1: a tenth of the scale, three times what HousE gains over RotatE on WN18RR (0.511 against 0.476)
        Effect(
            "better than RotatE of four times the size",
            _ARM,
            "rotate, four times",
            margin=0.1,
            null="rotate, four times, again",
            sabotage="one order",
            lower_is_better=False,
        ),
        Effect(
            "better than blocks of 2",
            _ARM,
            "house-r, k = 2",
            margin=0.1,
            null="house-r, k = 2, again",
            sabotage="one order",
            lower_is_better=False,
        ),
        Effect(
            "nearly every answer first", _ARM, "every answer first", margin=-0.05, sabotage="one order",
            lower_is_better=False,
        ),
    ),
    run=_groups,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------- classes and members


class StillStrengthsSpec(HousESpec):
    """HousE whose strengths lose their gradient where they are cut at their bound."""

    kind: ClassVar[str] = "house_still_strengths"
    offered: ClassVar[bool] = False

    def build(self) -> nn.Module:
        return _StillStrengths(self)


class _StillStrengths(HousE):
    def strengths(self) -> torch.Tensor:
        return super().strengths().detach()


class OneContractionSpec(HousESpec):
    """HousE whose contractions are the same for all relations: those of the first."""

    kind: ClassVar[str] = "house_one_contraction"
    offered: ClassVar[bool] = False

    def build(self) -> nn.Module:
        return _OneContraction(self)


class _OneContraction(HousE):
    def _contracted(self, x_BNnk: torch.Tensor, relation_B: torch.Tensor, of_tails_B: torch.Tensor) -> torch.Tensor:
        return super()._contracted(x_BNnk, torch.zeros_like(relation_B), of_tails_B)


_CLASSES, _MEMBERS = 40, 25
_OF_CLASSES = ("member_of", "has_member")
_BETWEEN_MEMBERS = ("next_member", "same_member_of_next_class", "both")


def _classes(seed: int) -> list[_Fact]:
    """40 classes of 25 members: who belongs where, both ways, and three relations between single members, so that it is
    costly to make a class one point: 5,000 facts, the same for every seed."""
    facts = []
    for c, m in itertools.product(range(_CLASSES), range(_MEMBERS)):
        here, next_c, next_m = f"c{c}m{m}", (c + 1) % _CLASSES, (m + 1) % _MEMBERS
        facts += [(here, "member_of", f"c{c}"), (f"c{c}", "has_member", here)]
        facts += [(here, "next_member", f"c{c}m{next_m}"), (here, "same_member_of_next_class", f"c{next_c}m{m}")]
        facts.append((here, "both", f"c{next_c}m{next_m}"))
    return facts


_CLASS = _Task(
    facts=_classes,
    held_out=0.2,
    arms={
        "house": {"kind": "house", "dim": 4, "block": 4, "projections": 2},
        "house-r": {"kind": "house", "dim": 4, "block": 4, "projections": 0},
        "same for all relations": {"kind": "house_one_contraction", "dim": 4, "block": 4, "projections": 2},
        "still strengths": {"kind": "house_still_strengths", "dim": 4, "block": 4, "projections": 2},
        "one order": {"kind": "house_one_order", "dim": 4, "block": 4, "projections": 2},
    },
    controls=("same for all relations", "still strengths", "one order"),
    nulls={"house-r, again": "house-r"},
)
_CLASS_SIZES = {
    "quick": _Size(steps=1000, negatives=48, seeds=1, control_seeds=1, rates=(1.2,)),
    "evidence": _Size(steps=2000, negatives=48, seeds=8, control_seeds=3, rates=(0.6, 1.2, 2.4)),
    "gpu": _Size(steps=10_000, negatives=256, seeds=10, control_seeds=3, rates=(0.6, 1.2, 2.4)),
}


def _mapped(scale: Scale, first: int) -> Measured:
    return _measured(_CLASS, _CLASS_SIZES[scale], first, {"": _OF_CLASSES, "between members": _BETWEEN_MEMBERS})


_mapped.builds = _BUILDS  # type: ignore[attr-defined]

CLASSES = Claim(
    id="many-members-of-a-class",
    kind="behaviour",
    text="Of 40 classes of 25 members, a fifth of who belongs where and of three one-to-one relations between members "
    "is held out. With 4 numbers an entity and two contractions of each end (120 numbers more of 4,240), HousE ranks "
    "the relations between members and classes by more than 0.1 better than HousE-r, and those between members by no "
    "more than 0.02 worse, in as many steps and each at its best of three learning rates. Contractions that are the "
    "same for all relations are measured beside it and no part of the claim.",
    figure="invertible contractions draw the entities of 1-to-N, N-to-1 and N-to-N relations together before "
    "distances are taken",
    gates=(
        Effect(
            "better on relations with classes",
            "house",
            "house-r",
            margin=0.1,  # a tenth of the scale, as above
            null="house-r, again",
            sabotage="still strengths",
            lower_is_better=False,
        ),
        Effect(
            "not worse on relations between members",
            "house: between members",
            "house-r: between members",
            margin=-0.02,  # one answer of fifty
            sabotage="one order: between members",
            lower_is_better=False,
        ),
    ),
    run=_mapped,
)

PAPER = Paper(
    slug="house",
    title="HousE: Knowledge Graph Embedding with Householder Parameterization",
    authors="Rui Li, Jianan Zhao, Chaozhuo Li, Di He et al.",
    year=2022,
    link="https://arxiv.org/abs/2202.07919",
    topics=("knowledge graphs", "link prediction", "embeddings"),
    parts=("model.house", "data.triples", "objective.link_prediction"),
    summary="A relation of a knowledge graph is any rotation of blocks of numbers, written as Householder "
    "reflections, after contractions of head and tail that draw together what a relation maps to one.",
    claims=(IDENTITIES, GROUPS, CLASSES),
)

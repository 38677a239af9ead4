"""FRAGE: Frequency-Agnostic Word Representation (Gong et al. 2018, arXiv 1809.06858)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F

from torchstone.data._task import TaskSpec
from torchstone.interpret.frequency import nearest_popular, probe_accuracy
from torchstone.keys import Key
from torchstone.model.site import initialise
from torchstone.model.transformer import TransformerSpec
from torchstone.objectives import Facts, Objective
from torchstone.objectives.causal_lm import CausalLMSpec
from torchstone.objectives.frequency_adversary import (
    FrequencyAdversary,
    FrequencyAdversarySpec,
    balanced_loss,
    moment_distance,
    sides_of,
)
from torchstone.papers._claim import Claim, Effect, Measured, Number, Paper, Scale, one_thread
from torchstone.recipe import load_recipe
from torchstone.spec import validate
from torchstone.train.training import make_trainer

__all__ = ["PAPER"]

_CLASSES, _RARE, _SUCCESSORS, _SHARE = 60, 3, 5, 0.02

# -------------------------------------------------------------------------------------------------------- identities


def _exact(scale: Scale, first: int) -> Measured:
    numbers: dict[str, float] = {}

    def worst(name: str, value: float) -> None:
        numbers[name] = max(numbers.get(name, 0.0), abs(value))

    for seed in range(first, first + 3):
        torch.manual_seed(seed)  # what the discriminator's first weights are drawn from
        generator, V = Key(seed).generator(), 300
        spec = validate(TransformerSpec, {"width": 16, "depth": 1, "vocabulary": V, "attention": {"heads": 2}})
        model: Any = initialise(spec.build(), seed).double()
        count_V = torch.randint(0, 1000, (V,), generator=generator)
        facts = Facts(V, 0, 1, 2, model=spec, frequencies=functools.partial(torch.clone, count_V))
        batch = {"ids": torch.randint(3, V, (2, 12), generator=generator)}
        batch["next"] = batch["ids"].roll(-1, 1)
        own: Any = FrequencyAdversarySpec(popular=60, weight=0.1, disc_lr=0.5).build(facts).double()
        table_VE, there = model.embedding.table(), own.sides_V >= 0

        # the discriminator's step by the release's form: class weights in a mean cross-entropy, stochastic gradients
        other = torch.nn.Linear(16, 2).double()
        other.load_state_dict(own.judge[0].state_dict())
        descent = torch.optim.SGD(other.parameters(), lr=0.5, weight_decay=own.spec.disc_decay)
        labels = own.sides_V[there]
        shares = torch.stack([(labels == 1).double().mean(), (labels == 0).double().mean()])
        F.cross_entropy(other(table_VE.detach()[there]), labels, shares).backward()
        descent.step()
        own.before_step(model, 0)
        worst("the discriminator's step, off by", float((own.judge[0].weight - other.weight.detach()).abs().max()))
        slopes = [p.grad for p in model.parameters() if p.grad is not None]
        worst("gradients that it leaves on the model", len(slopes))

        # the embeddings' step: the task's gradient, and the rare words' share of the game
        result, plain = own(model, batch, None), CausalLMSpec().build(facts)(model, batch, None)
        term = result.terms["frequency"]
        (both,) = torch.autograd.grad(result.terms["loss"].total + term.weight * term.total, table_VE)
        (task,) = torch.autograd.grad(plain.terms["loss"].total, table_VE)
        p_V = torch.softmax(table_VE.detach() @ own.judge[0].weight.T + own.judge[0].bias, -1)[:, 1]
        toward_E = own.judge[0].weight[1] - own.judge[0].weight[0]
        rare_V = (own.sides_V == 1).double()
        by_hand = 0.1 * (rare_V * (1 - p_V) / rare_V.sum())[:, None] * toward_E
        worst("the embeddings' gradient, off by", float((both - task - by_hand).abs().max()))
        worst("what popular words feel of the game", float((both - task)[own.sides_V == 0].abs().max()))
        worst("gradients on the discriminator", sum(p.grad is not None for p in own.judge.parameters()))

        for popular in (1, 50, V - 10):
            sides_V = sides_of(count_V, popular, [0, 1, 2])
            even = balanced_loss(torch.zeros(V, 2, dtype=torch.float64), sides_V)
            worst("equal logits over the logarithm of two, off by", float(even) / math.log(2) - 1)
        rows_VE = table_VE.detach()
        order = torch.randperm(V, generator=generator)
        worst("moments of one set in two orders, apart by", float(moment_distance(rows_VE, rows_VE[order])))
    return Measured(numbers)


_exact.builds = ("torchstone.objectives.frequency_adversary",)  # type: ignore[attr-defined]

EXACT = Claim(
    id="exact",
    kind="identity",
    text="The discriminator moves by gradient descent on the cross-entropy with class weights and leaves nothing on "
    "the model; the embeddings feel the task and, on rare words alone, the gradient of the game, and leave nothing on "
    "the discriminator; equal logits cost the logarithm of two however words are split; equal sets have equal moments.",
    figure="the objective and the alternating steps of its section 4",
    gates=(
        Number("the discriminator's step, off by", high=1e-12),
        Number("gradients that it leaves on the model", high=0),
        Number("the embeddings' gradient, off by", high=1e-12),
        Number("what popular words feel of the game", high=1e-14),
        Number("gradients on the discriminator", high=0),
        Number("equal logits over the logarithm of two, off by", high=1e-12),
        Number("moments of one set in two orders, apart by", high=1e-10),
    ),
    run=_exact,
)

# --------------------------------------------------------------------------------------------------------- behaviour


class PlantedSpec(TaskSpec):
    """Words of classes that follow each other by a random sparse matrix. Each class has one popular word and three
    rare ones, which mean the same: 2 % of the words of a class are rare, whatever stands around them."""

    kind: ClassVar[str] = "planted_frequencies"
    offered: ClassVar[bool] = False

    length: int = 32
    """Tokens of an example that the model reads."""
    texts: int = 500
    """Examples of the training split."""

    @property
    def vocabulary(self) -> int:
        return _CLASSES * (1 + _RARE)

    @property
    def block(self) -> int:
        return self.length

    def size(self, split: str) -> int:
        return self.texts if split == "train" else self.examples

    def sequences(self, split: str, number_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids_BS = _texts(self.key(), split, self.size(split), self.length + 1)[number_B]
        return ids_BS, np.ones_like(ids_BS, dtype=bool)


@functools.lru_cache(maxsize=4)
def _texts(key: Key, split: str, count: int, length: int) -> np.ndarray:
    """Ids int64 (N, S) of a split; the matrix is the same for all."""
    rng = key.fold("matrix").numpy()
    next_CK = np.stack([rng.permutation(_CLASSES)[:_SUCCESSORS] for _ in range(_CLASSES)])
    odds_CK = rng.dirichlet(np.ones(_SUCCESSORS), _CLASSES)
    rng = key.fold(split).numpy()
    class_N, ids_NS = rng.integers(_CLASSES, size=count), np.empty((count, length), np.int64)
    for t in range(length):
        if t:
            above_N1 = rng.random((count, 1)) > odds_CK[class_N].cumsum(1)[:, :-1]
            class_N = next_CK[class_N, above_N1.sum(1)]
        rare_N = _CLASSES + _RARE * class_N + rng.integers(_RARE, size=count)
        ids_NS[:, t] = np.where(rng.random(count) < _SHARE, rare_N, class_N)
    return ids_NS


class UntaughtSpec(FrequencyAdversarySpec):
    """FRAGE whose discriminator never steps: rare words flee from a direction that nobody follows."""

    kind: ClassVar[str] = "frequency_untaught"
    offered: ClassVar[bool] = False

    def build(self, facts: Facts) -> Objective:
        made = super().build(facts)
        made.before_step = lambda model, step: None  # type: ignore[method-assign]
        return made


_KINDS = np.arange(_CLASSES * (1 + _RARE))
_CLASS_V = torch.from_numpy(np.where(_KINDS < _CLASSES, _KINDS, (_KINDS - _CLASSES) // _RARE))


@dataclass(frozen=True)
class _Size:
    """What a scale spends."""

    steps: int
    seeds: int
    control_seeds: int
    rates: tuple[float, ...]
    weights: tuple[float, ...]
    width: int = 32
    texts: int = 500


_SIZES = {
    "quick": _Size(steps=100, seeds=2, control_seeds=1, rates=(3e-3,), weights=(0.1,)),
    "evidence": _Size(steps=900, seeds=5, control_seeds=3, rates=(1e-3, 3e-3, 1e-2), weights=(0.02, 0.1, 0.3)),
    "gpu": _Size(
        steps=4_000,
        seeds=10,
        control_seeds=5,
        rates=(3e-4, 1e-3, 3e-3),
        weights=(0.02, 0.1, 0.3),
        width=128,
        texts=2_000,
    ),
}
_TUNED, _AGAIN = 50_000, 100_000
"""Distances from the claim's seeds of those that choose, and of the null arm's."""


def _trained(size: _Size, seed: int, lr: float, **objective: Any) -> dict[str, float]:
    """What one training ends with; the plain arm is the game of weight 0, which is plain training to the bit."""
    recipe = {
        "model": {"width": size.width, "depth": 1, "attention": {"heads": 2}},
        "data": {"kind": "planted_frequencies", "seed": seed, "texts": size.texts},
        "objective": {"kind": "frequency_adversary", "popular": _CLASSES, **objective},
        "optimizer": {"lr": lr},
        **one_thread(size.steps, 16, blocks=512),
    }
    trainer, _ = make_trainer(load_recipe(recipe, [{"trainer": {"seed": seed}}]))
    row = {name: value for each in trainer.fit() for name, value in each.items()}
    model, own = cast(Any, trainer.model), cast(FrequencyAdversary, trainer.objective)
    table, sides = model.embedding.table(), own.sides_V
    rare = (sides == 1).nonzero()[:, 0]
    same = _CLASS_V[nearest_popular(table, sides)] == _CLASS_V[rare]
    return {
        "valid": row["valid_loss"],
        "loss": row["test_loss"],
        "probe": probe_accuracy(table, sides, Key(seed).fold("probe")),
        "same class": float(same.double().mean()),
    }


def _planted(scale: Scale, first: int) -> Measured:
    size = _SIZES[scale]
    # first the plain training's best learning rate, then the weight at that rate, both by held-out loss
    plain = {lr: _trained(size, first + _TUNED, lr, weight=0.0)["valid"] for lr in size.rates}
    lr = min(plain, key=plain.__getitem__)
    games = {weight: _trained(size, first + _TUNED, lr, weight=weight)["valid"] for weight in size.weights}
    weight = min(games, key=games.__getitem__)
    arms: dict[str, tuple[int, int, dict[str, Any]]] = {
        "plain": (0, size.seeds, {"weight": 0.0}),
        "game": (0, size.seeds, {"weight": weight}),
        "plain again": (_AGAIN, size.control_seeds, {"weight": 0.0}),
        "untaught": (0, size.control_seeds, {"kind": "frequency_untaught", "weight": weight}),
    }
    values: dict[str, dict[int, float]] = {}
    for arm, (shift, seeds, objective) in arms.items():
        for seed in range(first + shift, first + shift + seeds):
            for name, value in _trained(size, seed, lr, **objective).items():
                values.setdefault(f"{arm}: {name}", {})[seed] = value
    return Measured({"learning rate": lr, "weight": weight}, values)


_planted.builds = (  # type: ignore[attr-defined]
    "torchstone.objectives.frequency_adversary",
    "torchstone.interpret.frequency",
    "torchstone.data._task",
    "torchstone.model.embedding.token",
)

PLANTED = Claim(
    id="rare-words-among-popular-ones",
    kind="behaviour",
    text="Of words that mean the same, three in four of a class are rare. Beside the loss of the next token the game "
    "makes a probe of rare against popular embeddings worse by at least 0.08 of its balanced accuracy, at a held-out "
    "perplexity at most 1 % higher, and no more than 0.01 fewer rare words have a popular word of their own class "
    "nearest. Rate and weight are chosen by held-out loss; the perplexity and the neighbours that the paper gains are "
    "listed beside it.",
    figure="better on ten data sets of four task families; popular and rare words no longer lie apart",
    gates=(
        Effect(
            "frequency is harder to tell",
            "game: probe",
            "plain: probe",
            margin=0.08,
            null="plain again: probe",
            sabotage="untaught: probe",
        ),
        Effect(
            "perplexity is at most 1 % higher",
            "game: loss",
            "plain: loss",
            margin=-0.01,  # nats: the logarithm of 1.01
            sabotage="untaught: loss",
        ),
        Effect(
            "neighbours are no worse",
            "game: same class",
            "plain: same class",
            margin=-0.01,
            sabotage="untaught: same class",
            lower_is_better=False,
        ),
    ),
    run=_planted,
)

PAPER = Paper(
    slug="frage",
    title="FRAGE: Frequency-Agnostic Word Representation",
    authors="Chengyue Gong, Di He, Xu Tan, Tao Qin, Liwei Wang, Tie-Yan Liu",
    year=2018,
    link="https://arxiv.org/abs/1809.06858",
    topics=("embeddings", "adversarial training", "rare words", "language modelling"),
    parts=("objective.frequency_adversary",),
    summary="Embeddings of popular and of rare words lie apart; a discriminator learns to tell them, and the "
    "embeddings learn to fool it, beside any loss over tokens.",
    claims=(EXACT, PLANTED),
)

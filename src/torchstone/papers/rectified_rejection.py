"""Two Coupled Rejection Metrics Can Tell Adversarial Examples Apart (Pang et al. 2022, arXiv 2105.14785)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.objectives import Facts, Objective
from torchstone.papers._claim import Claim, Effect, Measured, Number, Paper, Scale, one_thread
from torchstone.recipe import load_recipe
from torchstone.train.run import build_model
from torchstone.train.training import make_trainer
from torchstone.trust.attacks import Ball, adaptive_pgd, cross_entropy_gain, pgd
from torchstone.trust.model._classifier import Classified
from torchstone.trust.model.mlp import MLPSpec
from torchstone.trust.objectives.adversarial import AdversarialSpec
from torchstone.trust.objectives.rectified_rejection import RectifiedRejection, RectifiedRejectionSpec
from torchstone.trust.rejection import accuracy_at, auc, calibrate, ideal_auxiliary, scores_of, xi_error

__all__ = ["PAPER"]

# ------------------------------------------------------------------------------------------------------------ exact

_CASES = 100_000


def _predictions(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of five classes, from flat to nearly certain, and labels of which many are the likeliest class."""
    sharp = torch.rand(_CASES, 1, generator=generator, dtype=torch.float64) * 8
    logits = torch.randn(_CASES, 5, generator=generator, dtype=torch.float64) * sharp
    label = torch.randint(5, (_CASES,), generator=generator)
    right = torch.rand(_CASES, generator=generator) < 0.4
    return logits.softmax(1), torch.where(right, logits.argmax(1), label)


def _within(ideal: torch.Tensor, xi: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A at random among the xi-errors of `ideal`: half of them by the ratio, half by the difference."""
    u = 2 * torch.rand(_CASES, generator=generator, dtype=torch.float64) - 1
    by_ratio = ideal * torch.exp(u * torch.log(2 / (2 - xi)))
    by_difference = ideal + u * xi / 2
    return torch.where(torch.rand(_CASES, generator=generator) < 0.5, by_ratio, by_difference).clamp(0, 1)


def _theorem() -> dict[str, float]:
    generator = Key(0).fold("rectified-rejection").generator()
    probs, label = _predictions(generator)
    con, right = probs.amax(1), probs.argmax(1) == label
    ideal = ideal_auxiliary(probs, label)
    xi = torch.rand(_CASES, generator=generator, dtype=torch.float64) * 0.999
    rcon = con * _within(ideal, xi, generator)
    sure = con > 1 / (2 - xi)
    # just outside: a right prediction whose A is a little too small, a wrong one whose A is a little too large
    e, just = 0.4, 1 / (2 - 0.4) + 1e-6
    of_right = just * (1 - e / 2 - 1e-4)
    of_wrong = just * ((1 - just) / just + e / 2 + 1e-4)
    return {
        "cases": float(_CASES),
        "violations with the ideal A": float(((con > 0.5) & ((con * ideal > 0.5) != right)).sum()),
        "cases the theorem speaks of": float(sure.sum()),
        "violations within the bound": float((sure & ((rcon > 0.5) != right)).sum()),
        "A* outside of [0, 1]": float(((ideal < 0) | (ideal > 1)).sum()),
        "R-Con above Con": float((rcon > con).sum()),
        "R-Con of a right prediction just outside the bound": of_right,
        "R-Con of a wrong prediction just outside the bound": of_wrong,
    }


def _gradients() -> dict[str, float]:
    """What the auxiliary term moves, on random images; and what the host alone moves when its weight is 0."""
    generator = Key(1).fold("rectified-rejection").generator()
    pixels, label = torch.rand(64, 1, 6, 6, generator=generator), torch.randint(4, (64,), generator=generator)
    spec = MLPSpec.model_validate({"classes": 4, "channels": 1, "image": 6, "hidden": (24, 16), "rejection": {}})
    model: Any = build_model(spec, 0)
    objective = RectifiedRejection(RectifiedRejectionSpec())
    out: Classified = model(pixels)
    right = out.logits.argmax(1) == label
    parameters = [*model.rejection.parameters()]
    of_logits, *of_head = torch.autograd.grad(
        objective.rejection(out, label).sum(), [out.logits, *parameters], allow_unused=True
    )
    fields = {"epsilon": 0.1, "steps": 3}
    grads = []
    for which in (AdversarialSpec(**fields), RectifiedRejectionSpec(**fields, weight=0.0)):
        trained: Any = build_model(spec, 0)
        host = which.build(Facts())
        batch = host.prepare({"pixels": pixels, "label": label}, Key(2))
        counts, result = host.counts(batch), host(trained, batch, None)
        sum(term.weight * term.total / counts[term.over] for term in result.terms.values()).backward()
        grads.append({name: p.grad for name, p in trained.named_parameters() if not name.startswith("rejection.")})
    return {
        "gradient of right predictions' logits": float(of_logits[right].abs().max()),
        "gradient of wrong predictions' logits": float(of_logits[~right].abs().max()),
        "least gradient of a part of A": min(float(g.abs().max()) for g in of_head if g is not None and g.dim() > 1),
        "gradients that weight 0 changes": float(sum(not torch.equal(grads[0][n], grads[1][n]) for n in grads[0])),
    }


def _minimum() -> float:
    """The largest distance of the best A, found on a grid, from T-Con / Con."""
    grid = torch.linspace(1e-4, 1, 10_000, dtype=torch.float64)
    worst = 0.0
    for con, target in ((0.9, 0.05), (0.6, 0.3), (0.51, 0.49), (0.4, 0.1), (0.99, 0.01)):
        rcon = con * grid
        best = grid[(target * rcon.log() + (1 - target) * (-rcon).log1p()).argmax()]
        worst = max(worst, abs(float(best) - target / con))
    return worst


def _exact(scale: Scale, first: int) -> Measured:
    generator = Key(3).fold("rectified-rejection").generator()
    score = torch.rand(999, generator=generator, dtype=torch.float64)
    right = torch.rand(999, generator=generator) < 0.7
    kept = (score[right] >= calibrate(score, right, 0.95)).double().mean()
    return Measured(
        {
            **_theorem(),
            **_gradients(),
            "distance of the best A from T-Con / Con": _minimum(),
            "change of AUC under a monotone map": abs(auc(score, right) - auc((5 * score).exp(), right)),
            "TPR-95 misses 95 % by, in examples": float(abs(kept - 0.95) * right.sum()),
        }
    )


_BUILDS = (
    "torchstone.trust.rejection",
    "torchstone.trust.attacks",
    "torchstone.trust.model._classifier",
    "torchstone.trust.model.mlp",
    "torchstone.trust.objectives.adversarial",
    "torchstone.trust.objectives.rectified_rejection",
)
_exact.builds = _BUILDS  # type: ignore[attr-defined]

EXACT = Claim(
    id="exact",
    kind="identity",
    text="Where Con > 1/(2 - xi) and A is a xi-error of T-Con/Con, R-Con > 1/2 exactly on right predictions, in "
    "100,000 random cases; just outside the bound it fails. The auxiliary term does not move the logits of right "
    "predictions, trains A, is least at A = T-Con/Con, and at weight 0 leaves the host's gradients bit for bit.",
    figure="the coupling theorem, and the two stop-gradients of the training objective",
    gates=(
        Number("violations with the ideal A", low=0, high=0),
        Number("cases the theorem speaks of", low=10_000),
        Number("violations within the bound", low=0, high=0),
        Number("A* outside of [0, 1]", low=0, high=0),
        Number("R-Con above Con", low=0, high=0),
        Number("R-Con of a right prediction just outside the bound", high=0.5),
        Number("R-Con of a wrong prediction just outside the bound", low=0.5),
        Number("gradient of right predictions' logits", low=0, high=0),
        Number("gradient of wrong predictions' logits", low=1e-6),
        Number("least gradient of a part of A", low=1e-6),
        Number("gradients that weight 0 changes", low=0, high=0),
        Number("distance of the best A from T-Con / Con", high=1e-4),
        Number("change of AUC under a monotone map", low=0, high=0),
        Number("TPR-95 misses 95 % by, in examples", high=1),
    ),
    run=_exact,
)

# ------------------------------------------------------------------------------------------------------------ digits


class BlindRejectionSpec(RectifiedRejectionSpec):
    """R-Con with one defect: its target is the confidence of the predicted class, not of the true one."""

    kind: ClassVar[str] = "blind_rejection"
    offered: ClassVar[bool] = False

    def build(self, facts: Facts) -> Objective:
        return BlindRejection(self, facts.classes)


class BlindRejection(RectifiedRejection):
    """Learns that A is 1 everywhere."""

    def target(self, probs_BC: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
        return probs_BC.amax(1)


@dataclass(frozen=True)
class _Size:
    """What a scale spends. `rates` are learning rates of which the best for Con on validation is taken."""

    epochs: int
    seeds: int
    control_seeds: int
    rates: tuple[float, ...]
    tuning_seeds: int


_SIZES: dict[Scale, _Size] = {
    "quick": _Size(epochs=20, seeds=2, control_seeds=1, rates=(1e-3,), tuning_seeds=0),
    "evidence": _Size(epochs=40, seeds=5, control_seeds=3, rates=(1e-3, 3e-3, 1e-2, 3e-2), tuning_seeds=3),
}
_SHIFT = 100_000
"""Distance of the null arm's seeds from the others'."""
_TUNING = 100
"""Distance of the seeds that a learning rate is chosen on."""
_EPSILON, _BATCH, _ALL = 0.15, 100, 1797


def _trained(size: _Size, objective: str, rate: float, seed: int) -> tuple[Any, Any]:
    """A classifier of digits, and its data, whose split has the seed of the training: 1,200 images to train on, 197 to
    choose on, 400 to test."""
    head: dict[str, Any] | None = None if objective == "adversarial" else {}
    steps = size.epochs * 1200 // _BATCH
    sections = one_thread(steps, _BATCH)
    recipe = load_recipe(
        {
            "model": {"kind": "mlp", "hidden": [128, 128], "rejection": head},
            "data": {"kind": "images", "source": "digits", "valid": 197 / _ALL, "test": 400 / _ALL, "seed": seed},
            "objective": {"kind": objective, "epsilon": _EPSILON, "steps": 7},
            "optimizer": {"kind": "adamw", "lr": rate, "weight_decay": 0.0},
            "schedule": {"kind": "constant"},
            "trainer": {**sections["trainer"], "seed": seed, "device": "cpu", "clip": None},
            "evaluate": sections["evaluate"],
        }
    )
    trainer, _ = make_trainer(recipe)
    for _ in range(steps):
        trainer.train_step()
    return trainer.model.eval(), trainer.source


def _attacked(model: Any, split: Any, attack: str, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, int]:
    """Scores of the attacked images by name, which predictions are right, and violations of the theorem."""
    (batch,) = split.evaluation(len(split))
    pixels, label, key = batch["pixels"], batch["label"], Key(seed).fold("attack", attack)
    if attack == "PGD":
        pixels = pgd(cross_entropy_gain(model, label), pixels, Ball(_EPSILON), 50, key=key)
    else:
        pixels = adaptive_pgd(model, pixels, label, Ball(_EPSILON), steps=50, key=key)
    with torch.no_grad():
        out: Classified = model(pixels)
    right = out.logits.argmax(1) == label
    violations = 0
    if out.auxiliary is not None:
        probs, auxiliary = out.logits.double().softmax(1), out.auxiliary.double()
        con, xi = probs.amax(1), xi_error(auxiliary, ideal_auxiliary(probs, label))
        spoken_of = (xi < 1) & (con > 1 / (2 - xi.clamp(max=1)))
        violations = int((spoken_of & ((con * auxiliary > 0.5) != right)).sum())
    return scores_of(out).items(), right, violations


def _chosen_rate(size: _Size, first: int) -> float:
    """The learning rate at which Con, the baseline, tells right from wrong best on validation images under PGD-50."""

    def merit(rate: float) -> float:
        found = 0.0
        for seed in range(first + _TUNING, first + _TUNING + size.tuning_seeds):
            model, source = _trained(size, "rectified_rejection", rate, seed)
            scores, right, _ = _attacked(model, source.valid, "PGD", seed)
            found += auc(scores["con"], right)
        return found

    return max(size.rates, key=merit) if len(size.rates) > 1 else size.rates[0]


def _apart(scale: Scale, first: int) -> Measured:
    if scale not in _SIZES:
        raise TorchstoneError(f"claim tells-attacks-apart: has no scale {scale}; it has {', '.join(_SIZES)}")
    size = _SIZES[scale]
    rate = _chosen_rate(size, first)
    values: dict[str, dict[int, float]] = {}
    violations, spread = 0, range(first, first + size.seeds)

    def keep(name: str, seed: int, value: float) -> None:
        values.setdefault(name, {})[seed] = value

    for seed in spread:
        for objective, whose in (("rectified_rejection", ""), ("adversarial", " without the head")):
            model, source = _trained(size, objective, rate, seed)
            for attack in ("PGD", "adaptive") if not whose else ("PGD",):
                scores, right, found = _attacked(model, source.test, attack, seed)
                violations += found
                keep(f"accuracy{whose}, {attack}", seed, float(right.double().mean()))
                for score, value in scores.items():
                    keep(f"{score}{whose}, {attack}", seed, auc(value, right))
                    if score in ("con", "rcon"):
                        keep(f"accuracy at TPR-95 of {score}{whose}, {attack}", seed, accuracy_at(value, right))
    controls = range(first, first + size.control_seeds)
    for arm, score, objective, seeds in (
        ("con again", "con", "rectified_rejection", [seed + _SHIFT for seed in controls]),
        ("blind rcon", "rcon", "blind_rejection", [*controls]),
    ):
        for seed in seeds:
            model, source = _trained(size, objective, rate, seed)
            for attack in ("PGD", "adaptive"):
                scores, right, _ = _attacked(model, source.test, attack, seed)
                keep(f"{arm}, {attack}", seed, auc(scores[score], right))
    return Measured({"violations of the theorem": float(violations), "learning rate": rate}, values)


_apart.builds = (*_BUILDS, "torchstone.data.images", "torchstone.train.optimizers.adamw")  # type: ignore[attr-defined]

APART = Claim(
    id="tells-attacks-apart",
    kind="behaviour",
    text="On digits, a small network trained by PGD-AT (epsilon 0.15) with the auxiliary head: under PGD-50 the AUC "
    "with which R-Con tells right from wrong predictions is at least 0.02 above that of Con of the same network, under "
    "an adaptive attack that knows the head it is above it, and no input contradicts the theorem. Other scores, "
    "accuracies at TPR-95 and a network without the head are measured beside it and no part of the claim.",
    figure="R-Con above Con and other rejection metrics on CIFAR-10 under PGD and adaptive attacks",
    gates=(
        Effect(
            "AUC under PGD-50",
            "rcon, PGD",
            "con, PGD",
            margin=0.02,  # the smallest gain that would be worth a head
            null="con again, PGD",
            sabotage="blind rcon, PGD",
            lower_is_better=False,
        ),
        Effect(
            "AUC under the adaptive attack",
            "rcon, adaptive",
            "con, adaptive",
            margin=0.0,
            null="con again, adaptive",
            sabotage="blind rcon, adaptive",
            lower_is_better=False,
        ),
        Number("violations of the theorem", low=0, high=0),
    ),
    run=_apart,
)

PAPER = Paper(
    slug="rectified-rejection",
    title="Two Coupled Rejection Metrics Can Tell Adversarial Examples Apart",
    authors="Tianyu Pang, Huishuai Zhang, Di He, Yinpeng Dong, Hang Su, Wei Chen, Jun Zhu, Tie-Yan Liu",
    year=2022,
    link="https://arxiv.org/abs/2105.14785",
    topics=("trust", "adversarial examples", "rejection", "images"),
    parts=("objective.rectified_rejection", "objective.adversarial", "model.mlp", "model.preact_resnet", "data.images"),
    summary="A classifier that may abstain: beside its confidence (Con) a head learns how far to trust it (R-Con), and "
    "the two together tell right from wrong predictions wherever the head is accurate enough.",
    claims=(EXACT, APART),
)

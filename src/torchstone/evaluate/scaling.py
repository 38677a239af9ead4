"""Scaling laws as DeepSeek LLM fits them (DeepSeek-AI 2024, arXiv 2401.02954, section 3).

A model's scale is M, the operations of a training token without embedding and head; the compute of a training is
C = M D for D tokens. Batch size B, learning rate, M and D of the best training, and its loss, are power laws in C:

    eta = eta_0 C^-a    B = B_0 C^b    M = M_0 C^m    D = D_0 C^d    L = E + A C^-c

`fit` finds them in trainings, holds out those of the largest budget, and says how far the predicted loss is off.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.evaluate.intervals import CONFIDENCE, Estimate
from torchstone.files import read_json
from torchstone.model.measure import measure

__all__ = [
    "DEEPSEEK",
    "Budget",
    "HeldOut",
    "IsoFlop",
    "LossLaw",
    "Minimum",
    "Point",
    "PowerLaw",
    "Scaling",
    "Suggestion",
    "best_losses",
    "budgets_of",
    "closed_form",
    "fit",
    "fit_hyperparameters",
    "fit_isoflop",
    "fit_loss",
    "flops_without_embedding",
    "minimum_of",
    "predict",
    "read_laws",
    "shape_near",
    "suggest",
]

NEAR_BEST = 1.0025
"""Runs whose loss is within this factor of the best of their budget count as well tuned."""
SAME_BUDGET = 1.1
"""Trainings whose compute differs by less than this factor are of one budget: steps are whole numbers."""
FEWEST = 3
"""Budgets that a law needs."""


# --------------------------------------------------------------------------------------------------- what is counted


def closed_form(layers: int, width: int, block: int) -> float:
    """M of the paper's models, 72 n d^2 + 12 n d l: forward and backward of one token in a block of l.

    It takes a layer to have 12 d^2 weights, which is attention with as many heads of keys as of queries and a SwiGLU of
    width 8/3 d, and counts every key of the block for every query.
    """
    return 72.0 * layers * width**2 + 12.0 * layers * width * block


def flops_without_embedding(model: nn.Module, block: int) -> float:
    """M of any model: `measure`'s operations of a training token less those of the head, and with every key of the
    block counted.

    Args:
        model: on any device, the meta device too.
        block: tokens of a training sequence.
    """
    causal = getattr(model, "decoder", None) is not None
    # a causal token of a block of 2 l - 1 sees l keys on average, which is what the paper counts for all of them
    whole = measure(model, 2 * block - 1 if causal else block).flops_per_token
    head: Any = getattr(model, "head", None)
    embedding: Any = getattr(model, "embedding", None)
    if head is None:
        return whole
    table = embedding.table() if embedding is not None and getattr(head, "out", head) is None else None
    matrices = sum(weight.numel() for weight in head.parameters() if weight.dim() > 1)
    return whole - 6.0 * (matrices + (0 if table is None else table.numel()))


@dataclass(frozen=True)
class Point:
    """One training.

    Attributes:
        flops_per_token: M, see `flops_without_embedding`.
        tokens: D, trained on.
        loss: on held-out text, in `unit`.
        lr: peak learning rate.
        batch: tokens a step.
        unit: of the loss; those of one fit agree.
        name: what it is called in messages.
    """

    flops_per_token: float
    tokens: float
    loss: float
    lr: float | None = None
    batch: float | None = None
    unit: str = "loss"
    name: str = ""

    @property
    def compute(self) -> float:
        """C = M D, operations."""
        return self.flops_per_token * self.tokens


@dataclass(frozen=True)
class Budget:
    """Trainings of one compute."""

    points: tuple[Point, ...]

    @property
    def compute(self) -> float:
        """Geometric mean of the trainings' compute."""
        return math.exp(float(np.mean([math.log(point.compute) for point in self.points])))

    @property
    def best(self) -> Point:
        """The training of the lowest loss."""
        return min(self.points, key=lambda point: point.loss)

    @property
    def sizes(self) -> list[Point]:
        """The best training of each size, smallest first."""
        found: dict[float, Point] = {}
        for point in sorted(self.points, key=lambda point: (point.flops_per_token, point.loss)):
            found.setdefault(point.flops_per_token, point)
        return list(found.values())

    def __str__(self) -> str:
        return f"budget {self.compute:.3g} FLOPs"


def budgets_of(points: Iterable[Point]) -> list[Budget]:
    """Trainings by budget, the smallest first; two whose compute differs by less than a tenth are of one. Losses of one
    setting, which seeds tell apart, are averaged.

    Raises:
        TorchstoneError: a number that is not positive and finite, or losses in different units.
    """
    points = list(points)
    for point in points:
        for name in ("flops_per_token", "tokens", "loss", "lr", "batch"):
            value = getattr(point, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise TorchstoneError(f"{point.name or 'a training'}: {name} is {value}, must be above zero and finite")
    units = sorted({point.unit for point in points})
    if len(units) > 1:
        raise TorchstoneError(f"scale: losses in {' and in '.join(units)} do not compare")
    settings: dict[tuple[float | None, ...], list[Point]] = {}
    for point in points:
        settings.setdefault((point.flops_per_token, point.tokens, point.lr, point.batch), []).append(point)
    means = [replace(one[0], loss=float(np.mean([point.loss for point in one]))) for one in settings.values()]
    groups: list[list[Point]] = []
    for point in sorted(means, key=lambda point: point.compute):
        if groups and point.compute < SAME_BUDGET * groups[-1][0].compute:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [Budget(tuple(group)) for group in groups]


def _enough(budgets: Sequence[Budget]) -> None:
    if len(budgets) < FEWEST:
        named = ", ".join(f"{budget.compute:.3g}" for budget in budgets) or "none"
        raise TorchstoneError(f"scale: a law needs {FEWEST} budgets or more, there are {len(budgets)} ({named} FLOPs)")


# ------------------------------------------------------------------------------------------------------------ the laws


@dataclass(frozen=True)
class PowerLaw:
    """coefficient * C^exponent, with the exponent's 95 % interval where the data give one."""

    coefficient: float
    exponent: float
    low: float | None = None
    high: float | None = None

    def __call__(self, compute: float) -> float:
        return self.coefficient * compute**self.exponent

    def __str__(self) -> str:
        ends = "" if self.low is None or self.high is None else f" ({self.low:.4f} to {self.high:.4f})"
        return f"{self.coefficient:.4g} C^{self.exponent:.4f}{ends}"


@dataclass(frozen=True)
class LossLaw:
    """irreducible + coefficient * (C / unit)^-exponent.

    Attributes:
        irreducible, coefficient, exponent, unit: of the law; `unit` is the geometric mean of the compute fitted on, so
            that the coefficient is a loss.
        draws: (irreducible, coefficient, exponent) of each bootstrap draw.
    """

    irreducible: float
    coefficient: float
    exponent: float
    unit: float
    draws: tuple[tuple[float, float, float], ...] = ()

    def __call__(self, compute: float) -> float:
        return self.irreducible + self.coefficient * (compute / self.unit) ** -self.exponent

    def __str__(self) -> str:
        return f"{self.irreducible:.4g} + {self.coefficient:.4g} (C / {self.unit:.3g})^-{self.exponent:.4f}"


@dataclass(frozen=True)
class Suggestion:
    """What to train with a budget: peak learning rate, tokens a step, operations a token, tokens in all; None where no
    law says so."""

    compute: float
    lr: float | None = None
    batch: float | None = None
    flops_per_token: float | None = None
    tokens: float | None = None


DEEPSEEK = {
    "lr": PowerLaw(0.3118, -0.1250),
    "batch": PowerLaw(0.2920, 0.3271),
    "flops_per_token": PowerLaw(0.1715, 0.5243),
    "tokens": PowerLaw(5.8316, 0.4757),
}
"""The paper's laws (section 3), for its data, initialisation and optimiser; B and D in tokens."""


def suggest(compute: float, laws: Mapping[str, PowerLaw] = DEEPSEEK) -> Suggestion:
    """What laws, by default DeepSeek's, say of a budget of `compute` operations.

    Raises:
        TorchstoneError: the budget is not above zero, or beyond what anybody trains.
    """
    if not (math.isfinite(compute) and 0 < compute <= 1e40):
        raise TorchstoneError(f"scale: a budget is above zero and at most 1e40 FLOPs, got {compute:g}")
    return Suggestion(compute, **{name: law(compute) for name, law in laws.items()})


def read_laws(path: Path) -> dict[str, PowerLaw]:
    """The laws of a ``scaling.json`` that `scale fit` wrote.

    Raises:
        TorchstoneError: it is something else, or has no law that a suggestion needs.
    """
    body = read_json(path)
    try:
        numbers = {name: body[name] for name in DEEPSEEK if body[name] is not None}
        laws = {name: PowerLaw(float(x["coefficient"]), float(x["exponent"])) for name, x in numbers.items()}
    except (KeyError, TypeError, ValueError):
        raise TorchstoneError(f"{path}: no scaling.json of `scale fit`") from None
    if not laws:
        raise TorchstoneError(f"{path}: has a law of the loss only, which suggests nothing")
    return laws


def shape_near(flops_per_token: float, block: int, ratio: int = 128) -> tuple[int, int]:
    """Depth and width of a model near M: the depth whose width in multiples of 16 is nearest, each layer about `ratio`
    channels wide for every layer there is (the paper's 7B model has 4096 / 30)."""
    wanted = math.log(flops_per_token)

    def off(depth: int, width: int) -> float:
        return abs(math.log(closed_form(depth, width, block)) - wanted)

    depth = 1
    while closed_form(depth + 1, ratio * (depth + 1), block) <= flops_per_token:
        depth += 1
    # 72 n d^2 + 12 n d l = M for d
    choices = []
    for n in {depth, depth + 1}:
        root = (math.sqrt(block**2 + 2 * flops_per_token / n) - block) / 12
        choices += [(n, 16 * max(1, round(root / 16)))]
    return min(choices, key=lambda shape: off(*shape))


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope and height at zero of the least-squares line."""
    away = x - x.mean()
    slope = float(away @ y / (away @ away))
    return slope, float(y.mean() - slope * x.mean())


def _interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    if len(values) < 20:
        return None, None
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _power_law(x: np.ndarray, y: np.ndarray, slopes: Sequence[float] = ()) -> PowerLaw:
    slope, height = _line(x, y)
    return PowerLaw(math.exp(height), slope, *_interval(slopes))


# ------------------------------------------------------------------------------------------------- batch size and lr


def fit_hyperparameters(
    points: Iterable[Point], name: str, bootstrap: int = 200, seed: int = 0
) -> tuple[PowerLaw, list[Point]]:
    """The power law of the learning rate or the batch size in compute, over the trainings within 0.25 % of the best
    loss of their budget.

    Args:
        points: trainings with a grid of values in each budget.
        name: "lr" or "batch".
        bootstrap: draws of well-tuned trainings for the exponent's interval.
        seed: of the draws.

    Returns:
        the law, and the trainings that it was fitted on.

    Raises:
        TorchstoneError: fewer than three budgets, fewer than three values in one, or the best at the edge of its grid;
            names the budget.
    """
    budgets = budgets_of(points)
    _enough(budgets)
    what = {"lr": "learning rates", "batch": "batch sizes"}[name]
    kept: list[Point] = []
    for budget in budgets:
        values = sorted({getattr(point, name) for point in budget.points if getattr(point, name) is not None})
        if len(values) < 3:
            raise TorchstoneError(f"{budget}: has {len(values)} {what}, and an optimum shows among three or more")
        known = Budget(tuple(point for point in budget.points if getattr(point, name) is not None))
        best = getattr(known.best, name)
        if best in (values[0], values[-1]):
            raise TorchstoneError(f"{budget}: the best of its {what}, {best:g}, lies at the edge of the grid")
        kept += [point for point in known.points if point.loss <= NEAR_BEST * known.best.loss]
    x = np.log([point.compute for point in kept])
    y = np.log([getattr(point, name) for point in kept])
    draw, slopes = np.random.default_rng(seed), []
    for _ in range(bootstrap):
        chosen = draw.integers(len(kept), size=len(kept))
        if np.ptp(x[chosen]) > math.log(SAME_BUDGET):
            slopes.append(_line(x[chosen], y[chosen])[0])
    return _power_law(x, y, slopes), kept


# ------------------------------------------------------------------------------------------------------------ IsoFLOP


@dataclass(frozen=True)
class Minimum:
    """The parabola of a budget, loss = a (log M - log flops_per_token)^2 + loss, and its minimum."""

    compute: float
    flops_per_token: float
    tokens: float
    loss: float
    curvature: float


@dataclass(frozen=True)
class IsoFlop:
    """The best split of compute: M and D as power laws, and the minima that they go through."""

    flops_per_token: PowerLaw
    tokens: PowerLaw
    minima: tuple[Minimum, ...]


def minimum_of(budget: Budget) -> tuple[Minimum, np.ndarray]:
    """The minimum of a budget's parabola in log M, and the residuals of the losses, scaled to the noise's size.

    Raises:
        TorchstoneError: fewer than three sizes, or no minimum inside them; names the budget.
    """
    sizes = budget.sizes
    if len(sizes) < 3:
        raise TorchstoneError(f"{budget}: has {len(sizes)} sizes of model, and a parabola needs three or more")
    x, y = np.log([point.flops_per_token for point in sizes]), np.array([point.loss for point in sizes])
    middle = x.mean()
    a, b, c = np.polyfit(x - middle, y, 2)
    top = -b / (2 * a) if a else math.nan
    if not a > 0 or not x[0] < top + middle < x[-1]:
        raise TorchstoneError(
            f"{budget}: its loss has no minimum inside the grid of sizes ({sizes[0].flops_per_token:.3g} to "
            f"{sizes[-1].flops_per_token:.3g} FLOPs a token; best at {budget.best.flops_per_token:.3g})"
        )
    size = math.exp(top + middle)
    rest = y - np.polyval([a, b, c], x - middle)
    free = len(x) - 3
    noise = rest * math.sqrt(len(x) / free) if free else np.zeros(0)
    return Minimum(budget.compute, size, budget.compute / size, float(c - b * b / (4 * a)), float(a)), noise


def best_losses(budgets: Iterable[Budget]) -> list[tuple[float, float]]:
    """(compute, loss) at the best split of each budget: the minimum of its parabola, so that it does not matter where
    the grid of sizes lies; the best training's where no parabola has a minimum inside."""
    found = []
    for budget in budgets:
        try:
            minimum, _ = minimum_of(budget)
            found.append((minimum.compute, minimum.loss))
        except TorchstoneError:
            found.append((budget.best.compute, budget.best.loss))
    return found


def fit_isoflop(points: Iterable[Point], bootstrap: int = 200, seed: int = 0) -> IsoFlop:
    """The best size and tokens as power laws of compute: per budget a parabola in log M through the best loss of each
    size, then a line through the logarithms of the minima.

    The interval of the exponents is that of redrawn residuals of the parabolas, which four sizes a budget give.

    Raises:
        TorchstoneError: fewer than three budgets, fewer than three sizes in one, or no minimum inside its sizes; names
            the budget.
    """
    budgets = budgets_of(points)
    _enough(budgets)
    found = [minimum_of(budget) for budget in budgets]
    minima = [each for each, _ in found]
    noise = np.concatenate([rest for _, rest in found])
    x, y = np.log([each.compute for each in minima]), np.log([each.flops_per_token for each in minima])
    slopes: list[float] = []
    draw = np.random.default_rng(seed)
    for _ in range(bootstrap if noise.size else 0):
        tops = []
        for budget, each in zip(budgets, minima, strict=True):
            z = np.log([point.flops_per_token for point in budget.sizes]) - math.log(each.flops_per_token)
            a, b, _ = np.polyfit(z, each.curvature * z**2 + draw.choice(noise, len(z)), 2)
            # a draw without a minimum inside counts as the edge that it leaves by, not as nothing
            tops.append(float(np.clip(-b / (2 * a), z[0], z[-1])) if a > 0 else float(z[0] if b > 0 else z[-1]))
        slopes.append(_line(x, y + np.array(tops))[0])
    return IsoFlop(
        _power_law(x, y, slopes),
        _power_law(x, x - y, [1 - slope for slope in slopes]),
        tuple(minima),
    )


# --------------------------------------------------------------------------------------------------------------- loss


def _loss_law(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """E, A and c of y = E + A x^-c with E and A not below zero: non-negative least squares along a search over c."""
    from scipy.optimize import minimize_scalar, nnls

    def at(log_c: float) -> tuple[float, np.ndarray]:
        columns = np.stack([np.ones_like(x), x ** -math.exp(log_c)], axis=1)
        values, off = nnls(columns, y)
        return float(off), values

    grid = np.linspace(math.log(1e-3), math.log(4.0), 200)
    start = int(np.argmin([at(value)[0] for value in grid]))
    ends = grid[max(0, start - 1)], grid[min(len(grid) - 1, start + 1)]
    log_c = float(minimize_scalar(lambda value: at(value)[0], bounds=ends, method="bounded", options={"xatol": 1e-9}).x)
    E, A = at(log_c)[1]
    return float(E), float(A), math.exp(log_c)


def fit_loss(curve: Iterable[tuple[float, float]], bootstrap: int = 200, seed: int = 0) -> LossLaw:
    """A power law in compute with an irreducible term, by least squares.

    Args:
        curve: (compute, loss) at the best split of each budget, see `best_losses`.
        bootstrap: draws of the residuals, for the interval of predictions; three budgets leave none.
        seed: of the draws.

    Raises:
        TorchstoneError: fewer than three budgets, or a loss that does not fall with compute.
    """
    pairs = sorted(curve)
    if len(pairs) < FEWEST:
        raise TorchstoneError(f"scale: a law of the loss needs {FEWEST} budgets or more, there are {len(pairs)}")
    compute, y = (np.array(side) for side in zip(*pairs, strict=True))
    if _line(np.log(compute), y)[0] >= 0:
        raise TorchstoneError(
            f"scale: the best loss does not fall from {pairs[0][0]:.3g} to {pairs[-1][0]:.3g} FLOPs "
            f"({pairs[0][1]:.4g} to {pairs[-1][1]:.4g})"
        )
    unit = float(np.exp(np.log(compute).mean()))
    x = compute / unit
    E, A, c = _loss_law(x, y)
    law, free = E + A * x**-c, len(x) - 3
    draws = []
    if free:
        draw, noise = np.random.default_rng(seed), (y - law) * math.sqrt(len(x) / free)
        draws = [_loss_law(x, law + draw.choice(noise, len(x))) for _ in range(bootstrap)]
    return LossLaw(E, A, c, unit, tuple(draws))


def predict(law: LossLaw, compute: float) -> Estimate:
    """The loss that a law gives for a budget; the interval is that of its bootstrap draws."""
    drawn = [LossLaw(*one, law.unit)(compute) for one in law.draws]
    return Estimate(law(compute), *_interval(drawn))


# ---------------------------------------------------------------------------------------------------------- everything


@dataclass(frozen=True)
class HeldOut:
    """The largest budget, which no law has seen: what was predicted of its best training, and what it was.

    Attributes:
        compute: its budget.
        predicted, measured: loss.
        error: predicted over measured, less 1.
        flops_per_token: (predicted, best measured) M; None where sizes were not varied.
    """

    compute: float
    predicted: Estimate
    measured: float
    error: float
    flops_per_token: tuple[float, float] | None = None


@dataclass(frozen=True)
class Scaling:
    """What `fit` found.

    Attributes:
        budgets: all of them, the held-out one too.
        loss: the law of the loss at the best split.
        isoflop: the best split; None where no budget has several sizes.
        lr, batch: laws; None where they could not be fitted.
        tuned: the trainings that the laws of lr and batch stand on.
        held_out: None where there were three budgets only.
        notes: why something is missing.
        unit: of losses.
    """

    budgets: tuple[Budget, ...]
    loss: LossLaw
    isoflop: IsoFlop | None
    lr: PowerLaw | None
    batch: PowerLaw | None
    tuned: dict[str, list[Point]]
    held_out: HeldOut | None
    notes: tuple[str, ...]
    unit: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the contract of ``scale fit --json`` and of scaling.json."""

        def plain(law: PowerLaw | None) -> dict[str, Any] | None:
            return None if law is None else asdict(law)

        iso = self.isoflop
        return {
            "unit": self.unit,
            "budgets": [
                {"compute": budget.compute, "best": asdict(budget.best), "trainings": len(budget.points)}
                for budget in self.budgets
            ],
            "loss": {**{name: getattr(self.loss, name) for name in ("irreducible", "coefficient", "exponent")},
                     "unit_of_compute": self.loss.unit},
            "flops_per_token": plain(iso.flops_per_token if iso else None),
            "tokens": plain(iso.tokens if iso else None),
            "minima": [asdict(each) for each in iso.minima] if iso else [],
            "lr": plain(self.lr),
            "batch": plain(self.batch),
            "held_out": None if self.held_out is None else asdict(self.held_out),
            "notes": list(self.notes),
            "trainings": [asdict(point) for budget in self.budgets for point in budget.points],
        }  # fmt: skip


def fit(points: Iterable[Point], bootstrap: int = 200, seed: int = 0) -> Scaling:
    """Every law that the trainings allow, fitted on all budgets but the largest, and the largest predicted.

    With three budgets none is held out. M and D are fitted where sizes were varied, learning rate and batch size where
    each budget has a grid of them.

    Raises:
        TorchstoneError: fewer than three budgets, a budget without a minimum inside its sizes, a loss that does not
            fall; names the budget.
    """
    budgets = budgets_of(points)
    _enough(budgets)
    notes: list[str] = []
    seen = budgets if len(budgets) == FEWEST else budgets[:-1]
    if seen is budgets:
        notes.append(f"nothing is held out: a law needs {FEWEST} budgets")
    trained = list(itertools.chain.from_iterable(budget.points for budget in seen))
    isoflop = None
    if any(len(budget.sizes) > 1 for budget in seen):
        isoflop = fit_isoflop(trained, bootstrap, seed)
    else:
        notes.append("M and D are not fitted: no budget has several sizes of model")
    laws: dict[str, PowerLaw | None] = {"lr": None, "batch": None}
    tuned: dict[str, list[Point]] = {}
    for name in laws:
        try:
            laws[name], tuned[name] = fit_hyperparameters(trained, name, bootstrap, seed)
        except TorchstoneError as error:
            notes.append(f"{name} is not fitted: {error}")
    law = fit_loss(best_losses(seen), bootstrap, seed)
    held_out = None
    if seen is not budgets:
        best = budgets[-1].best
        loss = predict(law, best.compute)
        sizes = (isoflop.flops_per_token(best.compute), best.flops_per_token) if isoflop else None
        held_out = HeldOut(best.compute, loss, best.loss, loss.value / best.loss - 1, sizes)
    return Scaling(
        tuple(budgets),
        law,
        isoflop,
        laws["lr"],
        laws["batch"],
        tuned,
        held_out,
        tuple(notes),
        budgets[0].points[0].unit,
    )

"""The decision rule: what a handful of seeds allows to say. `compare` and `reproduce` both use it and nothing else.

The unit is the seed. A difference d is variant minus reference under the same seed; its interval is Student's t with
n - 1 degrees of freedom. With several comparisons in one table, p-values are adjusted by Holm's method (Holm 1979).

    better / worse        Holm-adjusted p below 0.05, on the good or the bad side
    equivalent            the 95 % interval lies inside the margin
    no difference shown   neither

Below three seeds there is no verdict. Every verdict comes with the smallest difference that this many seeds with this
spread would have shown in 80 of 100 runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import optimize, stats

from torchstone.errors import TorchstoneError

__all__ = [
    "LEAST_SEEDS",
    "Gate",
    "Interval",
    "Verdict",
    "Word",
    "decide",
    "gate",
    "holm",
    "interval",
    "paired_bootstrap",
    "smallest_shown",
]

LEAST_SEEDS = 3
_ALPHA = 0.05
_POWER = 0.8

Word = Literal["better", "worse", "equivalent", "no difference shown", "no verdict"]
Gate = Literal["holds", "does not hold", "inconclusive"]


@dataclass(frozen=True)
class Interval:
    """A mean over n seeds and its 95 % interval (Student's t); without an interval where n is 1."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Verdict:
    """What is said of one variant against the reference.

    Attributes:
        word: the verdict.
        difference: variant minus reference.
        p: two-sided, of the paired t-test; None without one.
        p_adjusted: after Holm over the comparisons of the table.
        margin: half-width of the region that counts as equivalent, in the metric's unit.
        smallest: difference that would have been shown with 80 % power; None below two seeds.
    """

    word: Word
    difference: Interval
    p: float | None
    p_adjusted: float | None
    margin: float
    smallest: float | None


def interval(values: Sequence[float], confidence: float = 1 - _ALPHA) -> Interval:
    """Mean and Student's t interval with n - 1 degrees of freedom."""
    x = np.asarray(values, dtype=np.float64)
    n, mean = len(x), float(x.mean())
    if n < 2:
        return Interval(mean, -math.inf, math.inf, n)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * x.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def _p_value(d: np.ndarray) -> float:
    """Two-sided p of the paired t-test. Differences that are all one number have no spread: it is zero or it is not."""
    spread = d.std(ddof=1)
    if spread == 0:
        return 1.0 if d[0] == 0 else 0.0
    t = d.mean() / (spread / math.sqrt(len(d)))
    return float(2 * stats.t.sf(abs(t), len(d) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: adjusted p-values, to be compared with the level itself."""
    m = len(p_values)
    adjusted, highest = [0.0] * m, 0.0
    for rank, i in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (m - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def smallest_shown(values: Sequence[float], comparisons: int = 1) -> float | None:
    """The true difference that n seeds with this spread show with 80 % power, by the noncentral t distribution.

    Args:
        values: differences.
        comparisons: of the table; the level is Bonferroni's, the first step of Holm's.
    """
    x = np.asarray(values, dtype=np.float64)
    n = len(x)
    if n < 2:
        return None
    error = float(x.std(ddof=1)) / math.sqrt(n)
    if error == 0:
        return 0.0
    critical = float(stats.t.ppf(1 - _ALPHA / comparisons / 2, n - 1))

    def short(shift: float) -> float:
        return float(stats.nct.sf(critical, n - 1, shift)) - _POWER

    high = critical + 2.0
    while short(high) < 0:
        high *= 1.5
    return float(optimize.brentq(short, 0.0, high)) * error


def decide(
    reference: Sequence[float],
    variants: Mapping[str, Sequence[float]],
    margin: float = 0.005,
    lower_is_better: bool = True,
) -> dict[str, Verdict]:
    """A verdict for each variant, from one metric under the same seeds.

    Args:
        reference: the metric by seed.
        variants: name -> the metric under the same seeds in the same order.
        margin: what counts as equivalent, as a share of the reference's mean.
        lower_is_better: the direction.

    Raises:
        TorchstoneError: a variant has another number of seeds than the reference, or a value that is not finite.
    """
    base = np.asarray(reference, dtype=np.float64)
    differences: dict[str, np.ndarray] = {}
    for name, values in variants.items():
        x = np.asarray(values, dtype=np.float64)
        if x.shape != base.shape:
            raise TorchstoneError(f"{name}: {len(x)} seeds, the reference has {len(base)}; they are paired by seed")
        if not np.isfinite(x).all() or not np.isfinite(base).all():
            raise TorchstoneError(f"{name}: a value that is not finite cannot be compared")
        differences[name] = x - base
    wide = margin * abs(float(base.mean())) if len(base) else 0.0
    tested = {name: d for name, d in differences.items() if len(d) >= LEAST_SEEDS}
    p_values = {name: _p_value(d) for name, d in tested.items()}
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    found: dict[str, Verdict] = {}
    for name, d in differences.items():
        span, smallest = interval(d.tolist()), smallest_shown(d.tolist(), max(1, len(tested)))
        if name not in tested:
            found[name] = Verdict("no verdict", span, None, None, wide, smallest)
            continue
        if adjusted[name] < _ALPHA:
            word: Word = "better" if (span.mean < 0) == lower_is_better else "worse"
        elif -wide <= span.low and span.high <= wide:
            word = "equivalent"
        else:
            word = "no difference shown"
        found[name] = Verdict(word, span, p_values[name], adjusted[name], wide, smallest)
    return found


def gate(differences: Sequence[float], margin: float, lower_is_better: bool = True) -> Gate:
    """Whether an effect lies beyond a margin: the rule of claims.

    With ``lower_is_better``, an effect of at least m means d < -m. A negative margin is a claim of "not worse by more
    than". Holds if the interval lies wholly beyond the margin, does not hold if wholly on the other side, else it is
    inconclusive; below three seeds, or with a seed that diverged, it is inconclusive too.
    """
    if len(differences) < LEAST_SEEDS or not np.isfinite(differences).all():
        return "inconclusive"
    span = interval(differences if lower_is_better else [-d for d in differences])
    if span.high < -margin:
        return "holds"
    return "does not hold" if span.low > -margin else "inconclusive"


def paired_bootstrap(
    reference: Sequence[float], variant: Sequence[float], weights: Sequence[float], draws: int = 10_000, seed: int = 0
) -> Interval:
    """95 % interval of a difference of ratios over held-out documents, drawn with replacement: sum(b - a) / sum(w).

    It answers another question than the seeds do: would other documents of this kind say the same of these models?

    Args:
        reference, variant: a sum a document (bits), under the same seed or averaged over seeds.
        weights: what each document counts (bytes); one that counts 0, because it was not read, is left out.
    """
    w = np.asarray(weights, dtype=np.float64)
    d = (np.asarray(variant, dtype=np.float64) - np.asarray(reference, dtype=np.float64))[w > 0]
    w = w[w > 0]
    if not len(d):
        return Interval(math.nan, -math.inf, math.inf, 0)
    mean, generator = float(d.sum() / w.sum()), np.random.default_rng(seed)
    if len(d) < 2:
        return Interval(mean, -math.inf, math.inf, len(d))
    ratios = np.empty(draws)
    for i in range(draws):
        pick = generator.integers(0, len(d), len(d))
        ratios[i] = d[pick].sum() / w[pick].sum()
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Interval(mean, float(low), float(high), len(d))

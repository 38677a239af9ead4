"""Estimates with their 95 % confidence intervals.

Shares get Wilson's interval (Wilson 1927, JASA 22, 209-212); ratios of sums get the linearised variance of the ratio
estimator (Cochran 1977, Sampling Techniques, section 6.4) and Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from torchstone.errors import TorchstoneError

__all__ = ["CONFIDENCE", "Estimate", "normal", "ratio", "wilson"]

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its 95 % confidence interval; None where the data do not give one."""

    value: float
    low: float | None = None
    high: float | None = None

    def map(self, function: Callable[[float], float]) -> Estimate:
        """The same estimate on another scale; `function` is increasing."""
        return Estimate(*(None if x is None else function(x) for x in (self.value, self.low, self.high)))  # type: ignore[arg-type]

    def __str__(self) -> str:
        ends = "no interval" if self.low is None or self.high is None else f"{self.low:.4f} to {self.high:.4f}"
        return f"{self.value:.4f} ({ends})"


def wilson(right: float, of: int) -> Estimate:
    """A share and Wilson's interval.

    Args:
        right: how many were right; a tie counts a half.
        of: how many there were, at least one.
    """
    share, z2 = right / of, _Z**2
    middle = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = _Z / (1 + z2 / of) * math.sqrt(share * (1 - share) / of + z2 / (4 * of**2))
    # at 0 and 1 an end is the share itself, and rounding must not put it on the other side
    return Estimate(share, min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half)))


def ratio(totals: Sequence[float], sizes: Sequence[float]) -> Estimate:
    """Sum of `totals` over sum of `sizes`, each pair one unit of the sample; no interval from a single unit.

    Raises:
        TorchstoneError: the sizes add up to nothing.
    """
    n, size = len(totals), math.fsum(sizes)
    if not size:
        raise TorchstoneError("ratio: there is nothing to divide by")
    value = math.fsum(totals) / size
    if n < 2:
        return Estimate(value)
    from scipy.special import stdtrit

    squares = math.fsum((total - value * part) ** 2 for total, part in zip(totals, sizes, strict=True))
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * math.sqrt(n / (n - 1) * squares) / size
    return Estimate(value, value - half, value + half)


def normal(value: float, error: float | None) -> Estimate:
    """An estimate whose standard error is given."""
    return Estimate(value) if error is None else Estimate(value, value - _Z * error, value + _Z * error)

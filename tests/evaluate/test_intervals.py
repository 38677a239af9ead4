"""Intervals against published figures, hand calculation, and their coverage."""

from __future__ import annotations

import math
from statistics import fmean, stdev

import pytest

from torchstone.errors import TorchstoneError
from torchstone.evaluate.intervals import Estimate, normal, ratio, wilson


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_that_of_the_literature(right: int, of: int, low: float, high: float) -> None:
    found = wilson(right, of)
    assert found.value == right / of
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    mirrored = wilson(of - right, of)
    assert math.isclose(mirrored.low, 1 - found.high, abs_tol=1e-12)


def test_wilson_holds_the_share_at_both_ends_and_with_half_an_item() -> None:
    for right, of in ((0, 1), (1, 1), (5, 5), (0.5, 1), (2.5, 7)):
        found = wilson(right, of)
        assert 0 <= found.low <= found.value <= found.high <= 1 and found.low < found.high


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_wilson_covers_the_true_share_about_95_times_in_100(p: float) -> None:
    n = 60
    chance = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    covered = sum(chance[k] for k in range(n + 1) if wilson(k, n).low <= p <= wilson(k, n).high)
    assert 0.93 < covered < 0.975


def test_ratio_by_hand() -> None:
    # 9 / 4; residuals -1.25, -0.25, 1.5 with squares 3.875; t of 2 degrees of freedom is 4.302653
    found = ratio([1, 2, 6], [1, 1, 2])
    half = 4.302653 * math.sqrt(3 / 2 * 3.875) / 4
    assert found.value == 2.25
    assert math.isclose(found.high - found.value, half, rel_tol=1e-6)
    assert math.isclose(found.value - found.low, half, rel_tol=1e-6)


def test_ratio_of_equal_sizes_is_the_t_interval_of_a_mean() -> None:
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    found = ratio([7 * value for value in values], [7] * 5)
    assert math.isclose(found.value, fmean(values))
    assert math.isclose(found.high - found.value, 2.776445 * stdev(values) / math.sqrt(5), rel_tol=1e-6)


def test_one_unit_gives_no_interval_and_none_no_ratio() -> None:
    assert ratio([3], [2]) == Estimate(1.5) and str(ratio([3], [2])) == "1.5000 (no interval)"
    with pytest.raises(TorchstoneError, match="nothing to divide by"):
        ratio([], [])


def test_normal_is_the_error_times_1_96() -> None:
    found = normal(2.0, 0.5)
    assert math.isclose(found.high, 2 + 0.5 * 1.959964, rel_tol=1e-6)
    assert normal(2.0, None) == Estimate(2.0)

"""The decision rule against independent arithmetic, and its promises under repetition."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from torchstone.compare.decide import decide, gate, holm, interval, paired_bootstrap, smallest_shown
from torchstone.errors import TorchstoneError


def test_the_interval_is_students() -> None:
    # mean 2, standard deviation 1, n 3: 4.302653 / sqrt(3)
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert math.isclose(found.high - 2.0, 4.30265273 / math.sqrt(3), rel_tol=1e-7)


@pytest.mark.parametrize("n", [3, 5])
def test_intervals_cover_what_they_promise(n: int) -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for row in generator.normal(1.0, 2.0, (8000, n)):
        span = interval(row.tolist())
        hits += span.low <= 1.0 <= span.high
    assert 0.94 <= hits / 8000 <= 0.96


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_the_p_value_is_the_paired_t_tests() -> None:
    a, b = [1.0, 1.1, 0.9, 1.2], [1.3, 1.2, 1.25, 1.4]
    assert decide(a, {"b": b})["b"].p == pytest.approx(stats.ttest_rel(b, a).pvalue)


def test_words() -> None:
    reference = [2.0, 2.1, 1.9, 2.05, 1.95]
    said = {
        name: verdict.word
        for name, verdict in decide(
            reference,
            {
                "better": [x - 0.1 + e for x, e in zip(reference, (0, 0.01, -0.01, 0, 0.01), strict=True)],
                "worse": [x + 0.1 + e for x, e in zip(reference, (0, 0.01, -0.01, 0, 0.01), strict=True)],
                "equal": [x + e for x, e in zip(reference, (0.001, -0.001, 0.002, -0.002, 0.0), strict=True)],
                "noise": [x + e for x, e in zip(reference, (0.1, -0.1, 0.2, -0.2, 0.05), strict=True)],
                "same": reference,
            },
        ).items()
    }
    assert said == {
        "better": "better",
        "worse": "worse",
        "equal": "equivalent",
        "noise": "no difference shown",
        "same": "equivalent",
    }
    turned = decide(reference, {"more": [x + 0.1 + i / 1000 for i, x in enumerate(reference)]}, lower_is_better=False)
    assert turned["more"].word == "better"


def test_one_comparison_among_many_must_be_clearer() -> None:
    reference = [0.0, 0.0, 0.0, 0.0]
    shaky = [0.1, 0.3, 0.15, 0.35]
    assert decide(reference, {"a": shaky})["a"].word == "worse"
    many = {f"noise {i}": [(-1) ** (i + j) * 0.2 for j in range(4)] for i in range(9)}
    assert decide(reference, {"a": shaky, **many})["a"].word == "no difference shown"


def test_two_seeds_give_no_verdict() -> None:
    found = decide([1.0, 1.0], {"a": [0.5, 0.5]})["a"]
    assert found.word == "no verdict" and found.p is None


def test_unequal_seeds_and_broken_numbers_are_refused() -> None:
    with pytest.raises(TorchstoneError, match="a: 2 seeds, the reference has 3"):
        decide([1.0, 2.0, 3.0], {"a": [1.0, 2.0]})
    with pytest.raises(TorchstoneError, match="not finite"):
        decide([1.0, 2.0, 3.0], {"a": [1.0, 2.0, math.nan]})


@pytest.mark.slow
def test_the_smallest_difference_is_shown_in_eighty_of_a_hundred_runs() -> None:
    generator = np.random.default_rng(1)
    spread, n = 0.3, 5
    # the smallest difference at the true spread: any sample of that standard deviation gives it
    sample = generator.normal(size=n)
    sample = spread * (sample - sample.mean()) / sample.std(ddof=1)
    smallest = smallest_shown(sample.tolist())
    assert smallest is not None
    drawn = generator.normal(smallest, spread, (6000, n))
    shown = np.mean([decide([0.0] * n, {"a": row.tolist()}, margin=0)["a"].word == "worse" for row in drawn])
    assert 0.78 <= shown <= 0.82
    with_more = [smallest_shown(sample.tolist(), m) for m in (1, 2, 5)]
    assert all(a < b for a, b in pairwise(with_more))  # type: ignore[operator]


def test_a_claims_gate_has_three_answers() -> None:
    assert gate([-0.2, -0.21, -0.19], 0.1) == "holds"
    assert gate([-0.05, -0.051, -0.049], 0.1) == "does not hold"
    assert gate([-0.2, 0.0, -0.1], 0.1) == "inconclusive"
    assert gate([-0.2, -0.21], 0.1) == "inconclusive"
    assert gate([0.2, 0.21, 0.19], 0.1, lower_is_better=False) == "holds"
    assert gate([0.001, -0.001, 0.0], -0.01) == "holds"  # not worse by more than 0.01
    assert gate([0.05, 0.051, 0.049], -0.01) == "does not hold"


def test_the_bootstrap_over_documents_covers_their_ratio() -> None:
    generator = np.random.default_rng(2)
    hits = 0
    for number in range(300):
        weights = generator.uniform(50, 150, 40)
        reference = 2 * weights + generator.normal(0, 5, 40)
        variant = reference + 0.1 * weights + generator.normal(0, 5, 40)
        span = paired_bootstrap(reference.tolist(), variant.tolist(), weights.tolist(), draws=400, seed=number)
        hits += span.low <= 0.1 <= span.high
    assert hits >= 270


def test_documents_that_were_not_read_are_not_drawn() -> None:
    few = paired_bootstrap([2.0, 0.0, 6.0], [3.0, 0.0, 6.0], [10.0, 0.0, 20.0])
    assert few == paired_bootstrap([2.0, 6.0], [3.0, 6.0], [10.0, 20.0]) and few.low == 0 and few.high == 0.1
    alone = paired_bootstrap([2.0, 0.0], [3.0, 0.0], [10.0, 0.0])
    assert (alone.mean, alone.low, alone.high) == (0.1, -math.inf, math.inf)

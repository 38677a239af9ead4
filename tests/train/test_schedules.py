"""Schedules against their closed forms; all are pure functions of the step."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchstone.errors import TorchstoneError
from torchstone.recipe import ScheduleSpec
from torchstone.spec import kinds, resolve, validate
from torchstone.train.schedules.constant import ConstantSpec
from torchstone.train.schedules.cosine import CosineSpec
from torchstone.train.schedules.linear import LinearSpec
from torchstone.train.schedules.multi_step import MultiStepSpec
from torchstone.train.schedules.wsd import WSDSpec

KINDS = kinds("schedule")


def factors(spec: ScheduleSpec, steps: int) -> list[float]:
    return [spec.factor(step, steps) for step in range(steps)]


def test_constant_stays() -> None:
    assert factors(ConstantSpec(), 5) == [1.0] * 5


def test_cosine_is_half_a_cosine_from_one_to_its_end() -> None:
    found = factors(CosineSpec(end=0.2), 11)
    wanted = [0.2 + 0.8 * (1 + math.cos(math.pi * t / 10)) / 2 for t in range(11)]
    assert found == pytest.approx(wanted)
    assert found[0] == 1.0 and found[5] == pytest.approx(0.6) and found[-1] == pytest.approx(0.2)


def test_linear_is_a_straight_line() -> None:
    assert factors(LinearSpec(), 5) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert factors(LinearSpec(end=0.5), 3) == pytest.approx([1, 0.75, 0.5])


def test_wsd_stays_and_then_falls_over_its_last_share() -> None:
    assert factors(WSDSpec(decay=0.4), 10) == pytest.approx([1] * 6 + [0.75, 0.5, 0.25, 0])
    assert factors(WSDSpec(decay=0.4, end=0.1), 10)[-1] == pytest.approx(0.1)
    root = factors(WSDSpec(decay=0.4, form="sqrt"), 10)
    assert root == pytest.approx([1] * 6 + [1 - math.sqrt(t / 4) for t in (1, 2, 3, 4)])
    assert factors(WSDSpec(decay=0.0), 4) == [1.0] * 4


def test_multi_step_falls_at_its_shares() -> None:
    assert factors(MultiStepSpec(), 10) == [1.0] * 8 + [0.316, 0.1]
    assert factors(MultiStepSpec(at=(0.5,), to=(0.0,)), 4) == [1, 1, 0, 0]


@pytest.mark.parametrize("fields", [{"at": [0.5]}, {"at": [0.9, 0.5]}, {"at": [0.5, 1.5]}, {"at": [], "to": []}])
def test_multi_step_refuses_shares_that_do_not_rise_or_match(fields: dict[str, list[float]]) -> None:
    with pytest.raises(TorchstoneError):
        validate(MultiStepSpec, fields)


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_rises_in_a_line_to_the_peak(kind: str) -> None:
    spec = resolve("schedule", kind)(warmup=4)
    assert factors(spec, 40)[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factors(spec, 40)[4] == pytest.approx(1.0)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(steps=st.integers(1, 300), warmup=st.integers(0, 400))
def test_factors_lie_between_zero_and_one_and_only_fall_after_the_warm_up(kind: str, steps: int, warmup: int) -> None:
    spec = resolve("schedule", kind)(warmup=warmup)
    found = factors(spec, steps)
    assert all(0.0 <= value <= 1.0 for value in found)
    after = found[warmup:]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(after))
    if warmup >= steps:
        assert all(b >= a - 1e-12 for a, b in itertools.pairwise(found)), "a long warm-up only rises"


@pytest.mark.parametrize("kind", KINDS)
def test_the_peak_is_reached_where_there_is_room_for_it(kind: str) -> None:
    assert max(factors(resolve("schedule", kind)(warmup=3), 20)) == pytest.approx(1.0)

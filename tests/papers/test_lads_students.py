"""LADS on students of a language model: questions and explanations are what the claim says, every arm is measured."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from torchstone.data._sides import sides
from torchstone.generate.noise.seeded import SeededNoise
from torchstone.keys import Key
from torchstone.papers import lads
from torchstone.papers._claim import Effect


def test_accounts_ask_four_questions_of_each_bucket_and_students_see_others() -> None:
    for seed in range(5):
        asked, held = lads._questions(Key(seed).numpy(), 100)
        assert len({*asked, *held}) == 164
        assert [*Counter(question[0] + question[3] for question in asked).values()] == [4] * 16
        assert np.bincount(sides(asked)).tolist() == [55, 8, 1]  # as a student splits what it collected


def test_explanations_are_diverse_equally_long_and_right_but_for_one_in_twenty() -> None:
    draw = Key(3).numpy()
    texts = [lads._explanation("23+41=", draw) for _ in range(4000)]
    assert {len(text) for text in texts} == {21} and len({text for text in texts if text.endswith("64")}) == 192
    assert {text[-2:] for text in texts} == {"63", "64", "65"}
    assert np.mean([lads._right("23+41=", text) for text in texts]) == pytest.approx(0.95, abs=0.015)
    assert all(f"3+1{equals}" in text for text in texts for equals in [text[6:8]])
    assert {lads._explanation("10+10=", draw)[-2:] for _ in range(200)} == {"20", "21", "29"}


def test_neither_defect_of_noise_has_the_spread_of_gumbel() -> None:
    one, other = SeededNoise(1), SeededNoise(2)
    spread = {w: float(lads._BothNoises(one, other, w).gumbel(["x"], 0, 20_000).std()) for w in (0.5, 1.0)}
    wanted = math.pi / 6**0.5  # of one Gumbel number
    assert spread == {w: pytest.approx(w * 2**0.5 * wanted, rel=0.05) for w in (0.5, 1.0)}


@pytest.mark.slow
def test_a_quick_look_measures_every_arm() -> None:
    found = lads._students("quick", 3)
    assert {arm for gate in lads.STUDENTS.gates if isinstance(gate, Effect) for arm in gate.needs} <= set(found.values)
    assert all(math.isfinite(value) for by_seed in found.values.values() for value in by_seed.values())
    assert found.values["shared, asked alike: gain"] == {3: 0.0}  # the same texts, once repeats are left out
    assert found.values["independent: gain"][3] == 2 * found.values["half of the independent gain"][3]

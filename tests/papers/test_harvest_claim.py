"""What the claim about harvesting measures, and that a quick look measures every arm."""

from __future__ import annotations

import math

import numpy as np
import pytest

from torchstone.papers._harvest import HARVEST, _one_shot, _quality, _Web
from torchstone.papers._reproduce import run_claim


def test_one_shot_has_the_best_cut_off_at_a_precision() -> None:
    code = np.array([True, False, True, True, False, False, True, True])
    web = _Web([""] * 8, [""] * 8, code, seed=[7])
    scores = np.array([5.0, 4.0, 3.0, 2.0, 1.0, 0.0, -1.0, -9.0])
    # in order: the seed, code, prose, code, code, prose, prose, code: precisions 1, 1, 2/3, 3/4, 4/5, 4/6, 4/7, 5/8
    assert [_one_shot(web, scores, precision) for precision in (1.0, 0.8, 0.75, 0.6)] == [0.4, 0.8, 0.8, 1.0]
    assert _quality(web, scores > 1.5) == (0.6, 0.75)


@pytest.mark.slow
def test_a_quick_look_measures_every_arm() -> None:
    found = run_claim(HARVEST)
    assert found.verdict is None
    assert {need for gate in HARVEST.gates if hasattr(gate, "needs") for need in gate.needs} <= {
        cell["arm"] for cell in found.cells
    }
    assert all(math.isfinite(cell["value"]) and 0 <= cell["value"] <= 1 for cell in found.cells)

"""Every property that a model has, for every router with every layout of experts that it can choose from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from conformance.cases import Case
from conformance.checks import CHECKS, recomputation
from conformance.test_compiled import agree, fresh
from conformance.variants import layouts, variants

pytestmark = pytest.mark.usefixtures("float64")
__all__ = ["fresh"]


@dataclass(frozen=True)
class Experts(Case):
    """The usual model, of one layer, with a layout of experts."""

    layout: str = ""

    def __str__(self) -> str:
        return self.layout

    def data(self, **fields: Any) -> dict[str, Any]:
        return super().data(**{"ffn": layouts()[self.layout], "depth": 1, **fields})


CASES = [Experts(Case.of().choice, name) for name in layouts()]
# every router with the usual layout, every layout with the usual router
FAST = {*variants("router"), *(name for name in layouts() if layouts()[name]["router"] == {"kind": "topk"})}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case), marks=() if case.layout in FAST else pytest.mark.slow) for case in CASES],
)
def test_model_of_experts_has_every_property(case: Experts) -> None:
    for name, (check, applies) in CHECKS.items():
        if applies(case) and name not in ("recomputation", "bfloat16"):
            check(case)
            torch.set_default_dtype(torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_recomputed_activations_change_no_choice_and_no_sum_bit_for_bit(case: Experts) -> None:
    recomputation(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_are_finite_in_bfloat16(case: Experts) -> None:
    CHECKS["bfloat16"][0](case)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("case", [case for case in CASES if "shared" in case.layout], ids=str)
def test_compiled_layer_of_experts_gives_the_same_values_gradients_and_sums(case: Experts) -> None:
    agree(case, "aot_eager", dropout=0.1)


def test_every_variant_of_every_router_is_tried() -> None:
    assert {name for name in variants("router") if name not in layouts()} == set()

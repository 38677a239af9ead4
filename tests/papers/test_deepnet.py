"""DeepNet and Magneto: their claims of arithmetic, and that the arms of the others are what they say."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from torchstone.papers import find_paper
from torchstone.papers._claim import decide_claim
from torchstone.papers._reproduce import recipe_of


@pytest.mark.parametrize(("slug", "claim"), [("deepnet", "bounded-updates"), ("magneto", "scale-cancels")])
def test_claim_of_arithmetic_holds(slug: str, claim: str) -> None:
    found = find_paper(slug).claim(claim)
    assert found is not None and found.run is not None
    verdict, rows = decide_claim(found, found.run("quick", 3).numbers, {})
    assert verdict == "holds", [row for row in rows if row["answer"] != "holds"]


def arm(slug: str, claim: str, name: str) -> Any:
    found = find_paper(slug).claim(claim)
    assert found is not None
    return recipe_of(found, "evidence", name, None).model


def test_arms_of_a_hundred_layers_differ_in_the_residual_alone() -> None:
    names = ("deepnorm", "post", "pre", "no_beta", "no_alpha")
    models = {name: arm("deepnet", "hundred-layers", name) for name in names}
    assert (
        len(
            {
                repr({name: value for name, value in spec.dump().items() if name != "residual"})
                for spec in models.values()
            }
        )
        == 1
    )
    assert {spec.residual.kind for spec in models.values()} == {"deepnorm", "post", "pre"}
    assert {spec.residual.std for spec in models.values()} == {32**-0.5}
    assert models["no_beta"].residual.beta == 1.0 and models["no_alpha"].residual.alpha == 1.0
    assert all(spec.depth == 100 for spec in models.values())


def test_sabotage_of_sub_ln_has_its_gain_and_no_inner_norm() -> None:
    bare, whole = (arm("magneto", "better-than-pre-ln", name) for name in ("subln_bare", "subln"))
    bare, whole = (spec.model_copy(update={"vocabulary": 256}).build() for spec in (bare, whole))
    inner = [[m.inner_norm for m in model.modules() if hasattr(m, "inner_norm")] for model in (bare, whole)]
    assert all(isinstance(m, nn.Identity) for m in inner[0]) and len(inner[0]) == 24
    assert not any(isinstance(m, nn.Identity) for m in inner[1])

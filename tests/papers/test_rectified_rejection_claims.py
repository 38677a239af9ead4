"""The exact claim holds, its gates can fail, and the sabotage is the defect that it says it is."""

from __future__ import annotations

import pytest
import torch

from torchstone.errors import TorchstoneError
from torchstone.objectives import Facts
from torchstone.papers import find_paper
from torchstone.papers import rectified_rejection as paper
from torchstone.trust.model._classifier import Classified
from torchstone.trust.objectives.rectified_rejection import RectifiedRejection


def answers() -> dict[str, str]:
    claim = find_paper("rectified-rejection").claim("exact")
    assert claim is not None and claim.run is not None
    numbers = claim.run("quick", 0).numbers
    return {gate.name: gate.answer(numbers, {}) for gate in claim.gates}


def test_the_exact_claim_holds() -> None:
    assert set(answers().values()) == {"holds"}


def test_a_gradient_that_is_let_through_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(self: RectifiedRejection, out: Classified, label_B: torch.Tensor) -> torch.Tensor:
        probs_BC = out.logits.softmax(1)
        target_B = self.target(probs_BC, label_B)
        return torch.nn.functional.binary_cross_entropy(
            probs_BC.amax(1) * out.auxiliary, target_B.detach(), reduction="none"
        )

    monkeypatch.setattr(RectifiedRejection, "rejection", leaking)
    assert answers()["gradient of right predictions' logits"] == "does not hold"


def test_the_sabotage_learns_that_every_prediction_is_right() -> None:
    probs, label = torch.tensor([[0.7, 0.3], [0.7, 0.3]]), torch.tensor([0, 1])
    right, blind = (spec().build(Facts()) for spec in (paper.RectifiedRejectionSpec, paper.BlindRejectionSpec))
    assert right.target(probs, label).tolist() == pytest.approx([0.7, 0.3])  # type: ignore[attr-defined]
    assert blind.target(probs, label).tolist() == pytest.approx([0.7, 0.7])  # type: ignore[attr-defined]


def test_the_digits_claim_says_which_scales_it_has() -> None:
    claim = find_paper("rectified-rejection").claim("tells-attacks-apart")
    assert claim is not None and claim.run is not None
    with pytest.raises(TorchstoneError, match="has no scale gpu; it has quick, evidence"):
        claim.run("gpu", 0)

"""The published size, and the controls of the claims."""

from __future__ import annotations

import torch

from torchstone.interop.presets import preset
from torchstone.model.tokens import Tokens
from torchstone.papers import find_paper
from torchstone.papers.xpos import HalfXposSpec


def test_the_published_size_has_the_parameters_of_the_closed_form() -> None:
    D, L, V = 1024, 24, 50257
    with torch.device("meta"):
        model = preset("lex-medium").build()
    layer = (4 * D * D + 4 * D) + (8 * D * D + 5 * D) + 2 * 2 * D
    assert sum(parameter.numel() for parameter in model.parameters()) == V * D + L * layer + 2 * D == 353_774_592
    assert model.spec.position.scale_base == model.spec.context / 2


def test_the_arithmetic_holds() -> None:
    claim = find_paper("xpos").claim("factors")
    assert claim is not None and claim.run is not None
    numbers = claim.run("quick", 0).numbers
    assert {gate.name: gate.answer(numbers, {}) for gate in claim.gates} == {gate.name: "holds" for gate in claim.gates}


def test_the_sabotage_fades_with_the_position_and_not_the_distance() -> None:
    tokens = Tokens.blank(4)
    decay = HalfXposSpec(scale_base=1).build(2, 1, 2, 8, True).decay(tokens, tokens)
    for n in range(4):
        q, k = decay.slice(n, n + 1, 0, 4).rebased(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 4, 2))
        torch.testing.assert_close((q * k)[0, 0, :, 0], torch.full((4,), (0.4 / 1.4) ** n))

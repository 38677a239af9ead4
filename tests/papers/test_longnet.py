"""LongNet's published size in closed form, and what its cost claim counts."""

from __future__ import annotations

import torch

from torchstone.interop.presets import preset
from torchstone.papers import find_paper


def test_published_size_has_the_parameters_that_its_parts_say() -> None:
    spec = preset("longnet")
    with torch.device("meta"):
        model = spec.build()
    V, D, F, layers = 100_277, 768, 3072, 12
    layer = 4 * D * D + 2 * D * F + 2 * 2 * D  # projections, feed-forward, two norms with gain and bias
    assert sum(p.numel() for p in model.parameters()) == V * D + layers * layer + 2 * D
    # "constant cost per pattern": 4,267 keys a query whatever the length
    assert round(sum(w / r**2 for w, r in zip(spec.attention.segments, spec.attention.dilations, strict=True))) == 4267


def test_claims_measure_what_their_gates_ask_for() -> None:
    paper = find_paper("longnet")
    cost = paper.claim("linear-cost")
    assert cost is not None and cost.run is not None
    found = cost.run("quick", 0).numbers
    for gate in cost.gates:
        assert gate.answer(found, {}) == "holds", (gate.name, found[gate.name])

"""TIM's layout of BERT-base, counted by hand."""

from __future__ import annotations

import pytest
import torch

from torchstone.interop.presets import preset
from torchstone.model.measure import measure
from torchstone.model.transformer import TransformerSpec
from torchstone.spec import validate


@pytest.mark.parametrize("mechanisms", [1, 2, 4])
def test_parameters_in_closed_form(mechanisms: int) -> None:
    layout = preset("tim-bert-base-layout").dump()
    stack = {**layout["stack"], "mechanisms": mechanisms}
    with torch.device("meta"):
        model = validate(TransformerSpec, {**layout, "stack": stack}).build()
    D, F, V, heads, dim, n = 768, 3072, 30522, 2, 32, mechanisms
    norm, biases = 2 * D, 5 * D + F
    plain = 4 * D * D + 2 * D * F + biases + 2 * norm
    ours = (4 * D * D + 2 * D * F) // n + biases + 3 * norm + 4 * D * heads * dim + D + n
    embedding = (V + 512 + 2) * D + norm
    head = D * D + D + norm + V
    assert measure(model).parameters == 3 * plain + 9 * ours + embedding + head
    assert sum(p.numel() for p in model.encoder.layers[2].parameters()) == ours

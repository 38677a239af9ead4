"""HySparse's published layout: which layers are full, what grows with the length, and parameters in closed form."""

from __future__ import annotations

import pytest
import torch

from torchstone.interop.presets import preset
from torchstone.model.measure import measure
from torchstone.model.transformer import TransformerSpec
from torchstone.spec import validate

LAYOUT = "hysparse-80b-a3b-layout"


def spec(**fields: object) -> TransformerSpec:
    return validate(TransformerSpec, {**preset(LAYOUT).dump(), "vocabulary": 1000, **fields})


def test_five_of_49_layers_are_full() -> None:
    model = spec()
    plan = model.stack.plan(model.plan("decoder"), model.width, True)
    full = [i for i, layer in enumerate(plan) if layer.spec.attention.kind == "softmax"]
    assert full == [0, 12, 24, 36, 48]
    assert [i for i, layer in enumerate(plan) if layer.gives.block_max == 64 and layer.gives.keys_values] == full[:-1]


def test_growing_caches_are_nearly_ten_times_smaller_and_windows_are_constant() -> None:
    with torch.device("meta"):
        sparse, full = measure(spec().build()), measure(spec(stack="plain").build())
    assert full.state_bytes_per_token / sparse.state_bytes_per_token == 49 / 5 == pytest.approx(9.8)
    a_token = full.state_bytes_per_token // 49
    assert (full.state_bytes_fixed, sparse.state_bytes_fixed) == (0, 44 * 128 * a_token)


@pytest.mark.parametrize("gate", ["element", "head"])
@pytest.mark.parametrize(("width", "heads", "kv_heads"), [(256, 8, 8), (512, 16, 2)])
def test_parameters_in_closed_form(width: int, heads: int, kv_heads: int, gate: str) -> None:
    D, F, V = width, 1024, 1000
    K = D // heads
    body = {
        "width": D,
        "attention": {"heads": heads, "kv_heads": kv_heads},
        "ffn": {"kind": "swiglu", "hidden": F},
        "stack": {**preset(LAYOUT).stack.dump(), "gate": gate},
    }
    with torch.device("meta"):
        model = spec(**body).build()
    layer = 2 * D * D + 2 * D * kv_heads * K + 3 * D * F + 2 * D
    gates = 2 * D * (heads * K if gate == "element" else heads)
    assert sum(p.numel() for p in model.parameters()) == 49 * layer + 44 * gates + V * D + D

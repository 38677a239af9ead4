"""Retention as a part: what its card promises beyond the conformance suite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torchstone
from torchstone.errors import TorchstoneError
from torchstone.model.attention.retention import RetentionSpec
from torchstone.model.context import Context

FIELDS: dict[str, Any] = {
    "width": 32, "depth": 3, "vocabulary": 50,
    "attention": {"kind": "retention", "heads": 4},
    "position": {"kind": "rotary", "interleaved": True, "inclusive": True},
}  # fmt: skip


def test_decode_state_does_not_grow_with_the_length() -> None:
    model = torchstone.build(FIELDS)
    bytes_of = [model.state(rows=1, extent=extent).bytes() for extent in (128, 4096)]
    assert bytes_of[0] == bytes_of[1] == 3 * 4 * 8 * 16 * 4  # layers, heads, K, V, float32


def test_decays_are_those_of_the_paper() -> None:
    x = torch.zeros(1, 1, 48)
    decays = torchstone.build(RetentionSpec(heads=6), width=48).part.log_decay(x, Context.alone(x)).exp()[0, :, 0]
    assert decays[0] == pytest.approx(0.96875) and (decays.diff() > 0).all() and (decays < 1).all()


def test_a_factor_on_a_heads_values_is_normalised_away() -> None:
    layer, x = torchstone.build(RetentionSpec(heads=4, eps=1e-10), width=32), torch.randn(2, 9, 32)
    before = layer(x)
    with torch.no_grad():
        layer.part.qkvg.weight[64:80] *= 7.0  # the values of the first head
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"heads": 5}, "attention.heads: 5 heads do not divide width 32"),
        ({"heads": 4, "value_expansion": 1.1}, "attention.value_expansion: 4 heads do not divide a width of 35"),
        ({"heads": 32}, "rotary turns pairs of channels, and 1 of a head of 1 is 1, not even"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TorchstoneError, match=sentence):
        torchstone.build({**FIELDS, "attention": {"kind": "retention", **fields}})


def test_an_encoder_is_refused() -> None:
    with pytest.raises(TorchstoneError, match="attention retention has no bidirectional form"):
        torchstone.build({**FIELDS, "causal": False})

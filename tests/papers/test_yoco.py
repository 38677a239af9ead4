"""YOCO: its published size, counted by hand."""

from __future__ import annotations

import pytest
import torch

from torchstone.interop.presets import preset
from torchstone.model.measure import Measures, measure
from torchstone.model.transformer import TransformerSpec
from torchstone.spec import validate


def measured(**changes: object) -> Measures:
    with torch.device("meta"):
        model = validate(TransformerSpec, {**preset("yoco-3b").dump(), **changes}).build()
    return measure(model, dtype=torch.bfloat16)


def test_parameters_of_the_published_size() -> None:
    D, F, H, G, K, V, half = 3072, 8192, 24, 8, 128, 100288, 13
    around = 3 * D * F + 2 * D
    gated = 5 * D * D + D * H + around  # q, k, v, gate, out, and one decay a head
    cross = 2 * D * D + around
    body = half * gated + half * cross + D + 2 * D * G * K + D
    assert body == 2_829_133_824
    assert measured().parameters == body + 2 * V * D


def test_decode_state_of_the_published_size_and_of_a_plain_decoder_like_it() -> None:
    ours = measured()
    assert ours.state_bytes_per_token == 2 * 8 * 128 * 2 == 4096
    assert ours.state_bytes_fixed == 13 * 24 * 128 * 128 * 4  # sums, in float32
    plain = measured(stack={"kind": "plain"})
    assert plain.state_bytes_per_token == 26 * 4096 == 106_496 and plain.state_bytes_fixed == 0


@pytest.mark.parametrize("window", [1024])
def test_a_window_in_the_first_half_keeps_rings(window: int) -> None:
    attention = {"kind": "softmax", "heads": 24, "kv_heads": 8, "window": window}
    found = measured(stack={"kind": "yoco", "self_attention": attention})
    assert (found.state_bytes_per_token, found.state_bytes_fixed) == (4096, 13 * window * 4096)

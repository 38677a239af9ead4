"""YOCO: its published size, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchstone.interop.presets import preset
from torchstone.model.measure import Measures, measure
from torchstone.model.site import initialise
from torchstone.model.transformer import TransformerSpec
from torchstone.papers._claim import decide_claim
from torchstone.papers._reproduce import recipe_of
from torchstone.papers.yoco import CACHED_ONCE, LOSS, RECALL
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


@pytest.mark.slow
def test_caches_and_the_early_exit_are_as_claimed() -> None:
    assert CACHED_ONCE.run is not None
    assert decide_claim(CACHED_ONCE, CACHED_ONCE.run("quick", 0).numbers, {})[0] == "holds"


def test_the_sabotage_arm_sees_no_further_than_its_window() -> None:
    for claim, window in ((RECALL, 4), (LOSS, 1)):
        spec = recipe_of(claim, "evidence", "yoco_narrow", None).model.model_copy(update={"vocabulary": 300})
        model: Any = initialise(spec.build(), 0)
        reach = 1 + 3 * (window - 1)  # two layers, and once more from the keys and values that the others share
        ids = torch.zeros(1, 20, dtype=torch.int64)
        other = ids.clone()
        other[0, : 20 - reach] = 1
        a, b = (model(x, outputs="last").logits for x in (ids, other))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        other[0, 20 - reach] = 1
        assert (a - model(other, outputs="last").logits).abs().max() > 1e-5

"""DeepSeek-V2's published arithmetic in closed form, and the claims that need no training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchstone.model.measure import measure
from torchstone.model.transformer import TransformerSpec
from torchstone.papers import deepseek_v2, find_paper
from torchstone.papers._reproduce import run_claim
from torchstone.spec import validate


def attention(**fields: Any) -> Any:
    """One published layer's attention, on the meta device."""
    body = {"vocabulary": 1, "depth": 1, "block": "attention_only", "position": {"kind": "rotary", "interleaved": True}}
    with torch.device("meta"):
        return validate(TransformerSpec, {**body, **fields}).build()


def test_a_layers_attention_has_the_published_parameters() -> None:
    """149.23 million of the 236B model; of the Lite model, whose queries have no latent, by the same sum."""
    D, H, C, R, q = 5120, 128, 512, 64, 1536
    large = D * q + q + q * H * (128 + R) + D * (C + R) + C + C * H * (128 + 128) + H * 128 * D
    model = attention(width=D, attention={"kind": "mla", "heads": H, "q_latent": q})
    assert sum(p.numel() for p in model.main.layers[0].attention.parameters()) == large == 149_227_520
    D, H = 2048, 16
    lite = D * H * (128 + R) + D * (C + R) + C + C * H * (128 + 128) + H * 128 * D
    model = attention(width=D, attention={"kind": "mla", "heads": H})
    assert sum(p.numel() for p in model.main.layers[0].attention.parameters()) == lite == 13_763_072


def test_a_token_of_60_layers_takes_69120_bytes_in_bfloat16() -> None:
    model = attention(width=5120, depth=60, attention={"kind": "mla", "heads": 128, "q_latent": 1536})
    assert measure(model, dtype=torch.bfloat16).state_bytes_per_token == 2 * 60 * (512 + 64) == 69_120


@pytest.mark.parametrize("name", ["cache", "absorbed-is-naive"])
def test_claims_without_training_hold(name: str) -> None:
    claim = find_paper("deepseek-v2").claim(name)
    assert claim is not None
    assert {row["answer"] for row in run_claim(claim).gates} == {"holds"}


def test_the_arms_of_the_comparison_are_of_equal_size_and_cache_what_the_claim_says() -> None:
    numbers = deepseek_v2._sizes("quick", 0).numbers
    assert [numbers[f"cache of mla / {name}"] for name in ("mha", "gqa", "mqa")] == [0.25, 0.5, 1.0]
    assert all(abs(numbers[f"parameters of mla / {name}"] - 1) < 0.01 for name in ("mha", "gqa", "mqa"))

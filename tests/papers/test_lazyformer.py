"""LazyFormer: the size of its encoder and what reuse saves, counted by hand."""

from __future__ import annotations

import pytest
import torch

from torchstone.interop.presets import preset
from torchstone.model.measure import Measures, measure
from torchstone.model.transformer import TransformerSpec
from torchstone.papers.lazyformer import PAPER
from torchstone.spec import validate

V, N, D, L = 30_522, 512, 768, 12


def measured(context: int = N, **changes: object) -> Measures:
    with torch.device("meta"):
        model = validate(TransformerSpec, {**preset("lazyformer-base").dump(), "vocabulary": V, **changes}).build()
    return measure(model, context)


def test_parameters_of_the_encoder_in_closed_form() -> None:
    norm, F = 2 * D, 4 * D
    full = 4 * D * D + 4 * D  # queries, keys, values, output
    lazy = 2 * D * D + 2 * D
    around = 2 * D * F + F + D + 2 * norm
    embedding, head = (V + 512 + 2) * D + norm, D * D + D + norm + V
    assert measured(stack="plain").parameters == 12 * (full + around) + embedding + head == 109_514_298
    assert measured().parameters == 6 * full + 6 * lazy + 12 * around + embedding + head
    assert measured(stack="plain").parameters - measured().parameters == 6 * 1_181_184 == 7_087_104


@pytest.mark.parametrize("m", [2, 3, 4, 6])
def test_parameters_of_other_blocks(m: int) -> None:
    lazy = measured(stack={"kind": "lazy", "block_size": m})
    assert measured(stack="plain").parameters - lazy.parameters == (L - L // m) * (2 * D * D + 2 * D)


@pytest.mark.parametrize("m", [2, 4])
def test_multiply_adds_in_closed_form(m: int) -> None:
    """Forward and backward are three times a forward, and a multiply-add is two operations."""
    reusing = L - L // m
    full = measured(stack="plain").flops_per_token
    probs, again = (
        measured(stack={"kind": "lazy", "block_size": m, "reuse": reuse}).flops_per_token
        for reuse in ("probabilities", "queries_keys")
    )
    assert (full - probs) * N / 6 == reusing * (2 * N * D * D + N * N * D)
    assert (full - again) * N / 6 == reusing * 2 * N * D * D


def test_a_decoder_keeps_the_keys_of_first_layers_and_all_values() -> None:
    causal = {"causal": True, "head": "lm"}
    full, lazy = measured(stack="plain", **causal), measured(**causal)
    assert full.state_bytes_per_token == 12 * 2 * D * 4 and lazy.state_bytes_per_token == (6 + 12) * D * 4


def test_the_arithmetic_of_the_claims_is_the_cards() -> None:
    run = PAPER.claim("savings").run  # type: ignore[union-attr]
    assert run is not None
    numbers = run("quick", 0).numbers
    assert numbers["12 layers in blocks of 2: parameters saved"] == 7_087_104
    assert numbers["12 layers in blocks of 2: share of multiply-adds saved"] == pytest.approx(0.1, abs=1e-9)

"""Gated retention as a part: what its card promises beyond the conformance suite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import torchstone
from torchstone.errors import TorchstoneError
from torchstone.model.attention.gated_retention import GatedRetentionSpec
from torchstone.model.attention.retention import RetentionSpec
from torchstone.model.context import Context

pytestmark = pytest.mark.usefixtures("float64")


def layer(**fields: Any) -> Any:
    return torchstone.build(GatedRetentionSpec(heads=4, **fields), width=32, position="rotary").double()


@pytest.mark.parametrize("chunk", [1, 3, 8, 37])
def test_its_three_forms_are_equal_forwards_and_backwards(chunk: int) -> None:
    seen = []
    for fields in ({"form": "parallel"}, {"form": "recurrent"}, {"form": "chunkwise", "chunk": chunk}):
        torch.manual_seed(0)
        part, x_BTD = layer(**fields), torch.randn(2, 37, 32, requires_grad=True)
        with torch.no_grad():
            part.part.decay.weight.normal_(std=2)
        y_BTD = part(x_BTD)
        y_BTD.square().sum().backward()
        seen.append((y_BTD.detach(), x_BTD.grad, part.part.decay.weight.grad))
    for other in seen[1:]:
        for mine, theirs in zip(other, seen[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_with_a_constant_decay_it_is_retention() -> None:
    """Zero weights make every decay 0.5^(1 / temperature); the norm of a head takes retention's divisor out again."""
    temperature = math.log(0.5) / math.log(1 - 2.0**-5)
    gated = torchstone.build(GatedRetentionSpec(heads=1, temperature=temperature, eps=1e-20), width=32).double()
    plain = torchstone.build(RetentionSpec(heads=1, value_expansion=1.0, eps=1e-20), width=32).double()
    with torch.no_grad():
        gated.part.decay.weight.zero_()
        gated.part.qkvg.weight.copy_(plain.part.qkvg.weight)
        gated.part.out.weight.copy_(plain.part.out.weight)
    x_BTD = torch.randn(2, 90, 32)
    torch.testing.assert_close(gated(x_BTD), plain(x_BTD), rtol=1e-9, atol=1e-12)


def test_decays_lie_between_zero_and_one_and_start_near_one() -> None:
    part, x_BTD = layer().part, 50 * torch.randn(2, 9, 32)
    with torch.no_grad():
        part.decay.weight.normal_(std=3)
        decay_BHT = part.log_decay(x_BTD, Context.alone(x_BTD)).exp()
        assert decay_BHT.shape == (2, 4, 9) and (decay_BHT > 0).all() and (decay_BHT <= 1).all()
        assert decay_BHT.min() < 0.1 and decay_BHT.max() > 0.999
        part.decay.weight.zero_()
        decay_BHT = part.log_decay(x_BTD, Context.alone(x_BTD)).exp()
    torch.testing.assert_close(decay_BHT, torch.full_like(decay_BHT, 0.957603), rtol=0, atol=1e-6)


def test_decays_are_made_in_float32_whatever_the_model_computes_in() -> None:
    part = torchstone.build(GatedRetentionSpec(heads=4), width=32).part.bfloat16()
    x_BTD = torch.randn(1, 5, 32, dtype=torch.bfloat16)
    assert part.log_decay(x_BTD, Context.alone(x_BTD)).dtype == torch.float32


def test_decode_state_is_one_sum_a_head_whatever_the_length() -> None:
    fields = {"width": 32, "depth": 3, "vocabulary": 50, "attention": {"kind": "gated_retention", "heads": 4}}
    model = torchstone.build(fields).float()
    assert [model.state(rows=1, extent=extent).bytes() for extent in (128, 4096)] == [3 * 4 * 8 * 8 * 4] * 2


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"attention": {"heads": 5}}, "attention.heads: 5 heads do not divide width 32"),
        ({"position": "alibi"}, "attention gated_retention cannot use position alibi: it has no use for a bias"),
        ({"causal": False}, "attention gated_retention has no bidirectional form"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], sentence: str) -> None:
    base = {"width": 32, "vocabulary": 50, "position": "none"}
    attention = {"kind": "gated_retention", "heads": 4, **fields.get("attention", {})}
    with pytest.raises(TorchstoneError, match=sentence):
        torchstone.build({**base, **fields, "attention": attention})

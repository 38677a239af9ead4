"""xPos and blockwise causal attention: what the paper's card promises beyond the conformance suite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torchstone
from torchstone.errors import TorchstoneError
from torchstone.model.mask import CAUSAL, Blocks, Mask, Window
from torchstone.model.position.rotary import RotarySpec
from torchstone.model.position.xpos import XposSpec
from torchstone.model.tokens import Tokens
from torchstone.model.transformer import Transformer
from torchstone.ops.attention import scores_reference

FIELDS: dict[str, Any] = {
    "width": 32, "depth": 2, "vocabulary": 50, "attention": {"heads": 4}, "position": {"kind": "xpos", "scale_base": 8},
}  # fmt: skip


def scores(spec: XposSpec, q: torch.Tensor, k: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Causal scores (B, H, T, T) at positions from `first` on."""
    module, tokens = spec.build(q.shape[-1], q.shape[1], 32, 64, True), Tokens.blank(q.shape[2])
    tokens = Tokens(tokens.index, position=tokens.index + first)
    rotation, decay = module.rotation(tokens.where), module.decay(tokens, tokens)
    arguments = {"scale": q.shape[-1] ** -0.5, "causal": True, "mask_BHTS": None, "softcap": None}
    return scores_reference(rotation.q(q), rotation.k(k), decay=decay, **arguments)


@pytest.mark.parametrize("scale_base", [16, 512])
def test_a_shift_of_all_positions_changes_no_score(scale_base: float) -> None:
    q, k = torch.randn(2, 1, 2, 300, 64)
    here = scores(XposSpec(scale_base=scale_base), q, k)
    seen = torch.isfinite(here)
    for first in (1, 4_532, 77_777, 100_000):
        there = scores(XposSpec(scale_base=scale_base), q, k, first)
        assert (there - here)[seen].abs().max() < 1e-5 * here[seen].abs().max()


def test_scores_of_one_direction_are_the_paper_s_sum() -> None:
    K, B, gamma = 16, 32.0, 0.4
    found = scores(XposSpec(scale_base=B), torch.ones(1, 1, 90, K), torch.ones(1, 1, 90, K))[0, 0]
    i, distance = torch.arange(K // 2), (torch.arange(90)[:, None] - torch.arange(90)).double()
    zeta, theta = (i / (K / 2) + gamma) / (1 + gamma), 10000.0 ** (-2 * i / K)
    wanted = (zeta ** (distance[..., None] / B) * torch.cos(distance[..., None] * theta)).sum(-1) * 2 / K**0.5
    seen = distance >= 0
    assert zeta[0] == pytest.approx(0.2857, abs=1e-4) and zeta[0] ** (2048 / 512) == pytest.approx(0.00666, abs=1e-5)
    torch.testing.assert_close(found[seen].double(), wanted[seen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields", [{"scale_base": 1e12}, {"gamma": 1e9}])
def test_without_decay_it_is_rotary(float64: None, fields: dict[str, float]) -> None:
    ids = torch.randint(50, (2, 40))
    rotary, ours = (torchstone.build({**FIELDS, "position": position})(ids).logits
                    for position in (RotarySpec(), XposSpec(**fields)))  # fmt: skip
    torch.testing.assert_close(ours, rotary, rtol=1e-7, atol=1e-7)
    faded = torchstone.build(FIELDS)(ids).logits
    assert (faded - rotary).abs().max() > 1e-4


@pytest.mark.parametrize("mask", [CAUSAL & Blocks(6), CAUSAL & Window(9), CAUSAL], ids=["blocks", "window", "full"])
@pytest.mark.parametrize("position", ["xpos", "rotary", "alibi", "t5"])
def test_cached_decoding_equals_one_forward_under_a_mask(mask: Mask, position: str) -> None:
    model: Transformer = torchstone.build({**FIELDS, "position": position})
    lengths, T = torch.tensor([14, 5]), 40
    ids = torch.randint(50, (2, T))
    whole = model(ids, mask=mask).hidden
    state = model.state(2, T, mask=mask)
    assert all(slot.growth == ("growing" if mask == CAUSAL else "ring") for x in state.slots.values() for slot in x)
    valid = torch.arange(14)[None] < lengths[:, None]
    out = model(Tokens.of(ids[:, :14], valid=valid), state=state, mask=mask).hidden
    torch.testing.assert_close(out[valid], whole[:, :14][valid], rtol=0, atol=1e-5)
    for step in range(T - 14):
        at = lengths + step
        out = model(ids.gather(1, at[:, None]), state=state, mask=mask).hidden[:, 0]
        torch.testing.assert_close(out, whole[torch.arange(2), at], rtol=0, atol=1e-5)


def test_a_cache_under_blocks_does_not_grow() -> None:
    model: Transformer = torchstone.build(FIELDS)
    held = [model.state(1, extent, mask=CAUSAL & Blocks(8)).bytes() for extent in (64, 4096)]
    assert held[0] == held[1] < model.state(1, 64).bytes()


def test_padding_on_the_left_moves_no_block(float64: None) -> None:
    model, ids, mask = torchstone.build(FIELDS), torch.randint(50, (1, 23)), CAUSAL & Blocks(4)
    padded = Tokens.of(torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1), valid=torch.arange(26)[None] >= 3)
    torch.testing.assert_close(model(padded, mask=mask).hidden[:, 3:], model(ids, mask=mask).hidden)


@pytest.mark.parametrize("words", [pytest.param("full", marks=pytest.mark.slow), "blocks"])
def test_sixteen_thousand_tokens_in_float16_are_finite(words: str) -> None:
    model = torchstone.build({**FIELDS, "width": 16, "depth": 1, "attention": {"heads": 1}, "position": "xpos"}).half()
    mask = CAUSAL if words == "full" else CAUSAL & Blocks(512)
    with torch.no_grad():
        hidden = model(torch.randint(50, (1, 16_384)), mask=mask, outputs="none").hidden
    assert hidden.dtype == torch.float16 and torch.isfinite(hidden).all()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"causal": False}, "position xpos has no bidirectional form; it needs causal: true"),
        ({"encoder": {"depth": 1}}, "position xpos has no bidirectional form; it needs causal: true"),
        ({"attention": {"heads": 32}}, "xpos turns pairs of channels, and a head of 1 is not even"),
        ({"position": {"kind": "xpos", "scale_base": 0}}, "scale_base"),
        (
            {"attention": {"kind": "retention", "heads": 4}},
            "attention retention cannot use position xpos: it has no use for a decaying rotation",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TorchstoneError, match=sentence):
        torchstone.build({**FIELDS, **fields})


def test_masks_that_it_or_another_cannot_honour_are_refused() -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    for mask in (Mask(), Mask((Window(2),))):
        with pytest.raises(TorchstoneError, match="mask: position xpos has no bidirectional form"):
            torchstone.build(FIELDS)(ids, mask=mask)
    with pytest.raises(TorchstoneError, match="position xpos has no bidirectional form"):
        torchstone.build(torchstone.build(FIELDS).spec.attention, width=32, position="xpos", causal=False)
    other = torchstone.build({**FIELDS, "attention": {"kind": "retention", "heads": 4}, "position": "rotary"})
    with pytest.raises(TorchstoneError, match="attention retention of layer 0 cannot honour 'blocks'; it can: causal"):
        other(ids, mask=CAUSAL & Blocks(2))

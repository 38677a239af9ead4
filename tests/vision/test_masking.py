"""Masks of patches: how many, in which shape, drawn by what."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchstone.keys import Key
from torchstone.vision.masking import MaskSpec

PUBLISHED = MaskSpec(ratio=75.5 / 196)


def largest_rectangle(hidden: torch.Tensor) -> int:
    """Patches of the largest rectangle that is hidden whole."""
    side, best = len(hidden), 0
    for top, left in itertools.product(range(side), repeat=2):
        width = side - left
        for bottom in range(top, side):
            row = hidden[bottom, left : left + width]
            width = int(row.long().cumprod(0).sum())
            if not width:
                break
            best = max(best, (bottom - top + 1) * width)
    return best


def test_blocks_have_the_published_statistics() -> None:
    assert PUBLISHED.target(14) == 75
    masks = PUBLISHED.draw(2000, 14, Key(0))
    counts = torch.tensor([int(mask.sum()) for mask in masks], dtype=torch.float64)
    assert counts.max() == 75 and counts.median() == 75
    assert counts.mean().item() == pytest.approx(74.5, abs=0.3)
    assert 60 <= counts.min() <= 70
    # rectangles: the first has 12 patches or more (16, rounded), where as many single ones make none of this size
    assert all(largest_rectangle(mask) >= 12 for mask in masks[:25])
    alone = MaskSpec(ratio=75.5 / 196, blocks=False)
    singles = alone.draw(25, 14, Key(0))
    assert {int(mask.sum()) for mask in singles} == {75}
    assert sum(largest_rectangle(mask) >= 12 for mask in singles) < 8


@settings(max_examples=60, deadline=None)
@given(
    side=st.integers(2, 20),
    ratio=st.floats(0.05, 0.95),
    least=st.integers(1, 16),
    blocks=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_never_more_than_the_share(side: int, ratio: float, least: int, blocks: bool, seed: int) -> None:
    spec = MaskSpec(ratio=ratio, blocks=blocks, min_patches=least)
    if spec.illegal(side):
        return
    mask, other = spec.draw(2, side, Key(seed))
    assert mask.shape == (side, side) and mask.dtype == torch.bool
    assert int(mask.sum()) <= int(ratio * side**2)
    assert blocks or int(mask.sum()) == int(ratio * side**2)
    assert torch.equal(mask, spec.draw(1, side, Key(seed))[0])
    assert int(other.sum()) <= int(ratio * side**2)


def test_no_block_spans_the_grid() -> None:
    """Sides are strictly below the grid's: where only a row fits, nothing is put in."""
    spec = MaskSpec(ratio=0.34, min_patches=3, aspect=(1 / 3, 1 / 3))
    assert spec.target(3) == 3 and not spec.draw(9, 3, Key(0)).any()
    assert spec.model_copy(update={"ratio": 0.2}).draw(9, 4, Key(0)).sum() == 27


def test_every_place_is_hidden_sometimes() -> None:
    share = PUBLISHED.draw(1000, 14, Key(0)).double().mean(0)
    assert share.min() > 0.01 and share.max() < 0.8

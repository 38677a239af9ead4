from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from torchstone.data.hashing import permute
from torchstone.keys import Key


@given(st.integers(1, 3000), st.integers(-(2**63), 2**63 - 1))
def test_the_permutation_is_a_bijection_for_any_size_and_key(size: int, seed: int) -> None:
    assert sorted(permute(np.arange(size), size, Key(seed))) == list(range(size))


@given(st.integers(1, 2**45), st.integers(0, 2**45))
def test_the_permutation_stays_inside_huge_ranges(size: int, index: int) -> None:
    assert 0 <= permute(np.array([index % size]), size, Key(0))[0] < size


def test_keys_give_different_orders_and_no_visible_structure() -> None:
    orders = [permute(np.arange(1000), 1000, Key(0).fold("epoch", epoch)) for epoch in range(3)]
    assert (orders[0] == orders[1]).mean() < 0.02
    for order in orders:  # neighbours are independent: correlation of 1000 pairs has standard deviation 0.03
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.15
        assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.15


def test_small_ranges_reach_every_order() -> None:
    seen = {tuple(permute(np.arange(3), 3, Key(seed))) for seed in range(200)}
    assert len(seen) == 6

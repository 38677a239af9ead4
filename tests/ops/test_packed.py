"""Numbers in a few bits: equal to quantisation written as loops, as near as a step allows, and exact in bytes."""

from __future__ import annotations

import pytest
import torch

from torchstone.ops.packed import BITS, pack, packed_bytes, unpack


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, shape[-1])


def by_hand(x: list[float], bits: int) -> list[float]:
    """Group by group: the scale is the largest size over the largest whole number, in bfloat16."""
    top, out = 2 ** (bits - 2) - 1, []
    for a in range(0, len(x), 16):
        group = x[a : a + 16]
        scale = torch.tensor(max(map(abs, group)) / top).bfloat16().item()
        out += [0.0 if scale == 0 else max(-top, min(top, round(v / scale))) * scale for v in group]
    return out


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [1, 16, 37, 576])
def test_what_comes_back_is_quantisation_written_as_loops(bits: int, n: int) -> None:
    x = drawn(3, n)
    again = unpack(pack(x, bits), n, bits, torch.float32)
    torch.testing.assert_close(again, torch.tensor([by_hand(row.tolist(), bits) for row in x]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_the_bytes_are_exactly_bits_a_number(bits: int) -> None:
    packed = pack(drawn(2, 5, 576), bits)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 5, 576 * bits // 8)
    assert packed_bytes(576, bits) == 576 * bits // 8 and packed_bytes(577, bits) == 592 * bits // 8


@pytest.mark.parametrize("bits", BITS)
def test_an_error_is_at_most_half_a_step_and_what_the_scale_was_rounded_by(bits: int) -> None:
    x, top = drawn(50, 64), 2 ** (bits - 2) - 1
    largest = x.unflatten(-1, (-1, 16)).abs().amax(-1, keepdim=True)
    error = (unpack(pack(x, bits), 64, bits, torch.float32) - x).abs().unflatten(-1, (-1, 16))
    assert (error <= largest * max(0.5 / top * (1 + 2**-8), 2**-8)).all()


def test_zeros_stay_zeros_and_packing_twice_changes_nothing() -> None:
    assert not unpack(pack(torch.zeros(2, 20), 6), 20, 6, torch.float32).any()
    once = unpack(pack(drawn(4, 48), 6), 48, 6, torch.float64)
    assert once.dtype == torch.float64 and torch.equal(unpack(pack(once, 6), 48, 6, torch.float64), once)

"""Weights of two and three values: quantisation and packed products equal to loops, exact in their whole numbers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import torchstone.ops.bitlinear.packed as packed_file
from torchstone.ops.bitlinear import (
    binary,
    bit_product,
    bit_product_reference,
    blocked_sums,
    looped_sums,
    pack,
    packed_bytes,
    quantise,
    rescale,
    ternary,
    unpack,
)
from torchstone.ops.compiler import compiler_works


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def values(outputs: int, G: int, n: int, levels: int) -> torch.Tensor:
    whole = torch.randint(0, levels, (outputs, G, n), generator=torch.Generator().manual_seed(n))
    return (2 * whole - 1 if levels == 2 else whole - 1).float()


def whole(N: int, G: int, n: int) -> torch.Tensor:
    return torch.randint(-127, 128, (N, G, n), generator=torch.Generator().manual_seed(n)).float()


@pytest.mark.parametrize("bits", [4, 8])
def test_activations_are_the_papers_formula_number_by_number(bits: int) -> None:
    x, Q = drawn(3, 7), 2 ** (bits - 1) - 1
    q, scale = quantise(x, bits)
    for row, found, step in zip(x.tolist(), q.tolist(), scale[:, 0].tolist(), strict=True):
        largest = max(abs(v) for v in row)
        assert step == pytest.approx(largest / Q)
        assert found == [max(-Q, min(Q, round(v * Q / largest))) for v in row]
    assert q.abs().amax() == Q and (q * scale - x).abs().max() <= 0.501 * scale.max()


def test_zeros_stay_zeros_and_halves_go_up_whatever_the_last_bit() -> None:
    assert not quantise(torch.zeros(2, 4), 8)[0].any()
    x = torch.tensor([127.0, 2.5, -2.5, 0.5])
    for nudged in (x, x * (1 + 2**-22), x * (1 - 2**-22), torch.nextafter(x, torch.zeros(4))):
        assert quantise(nudged, 8)[0].tolist() == [127.0, 3.0, -2.0, 1.0]


def test_weights_are_the_papers_formulas_number_by_number() -> None:
    w = drawn(3, 2, 5)
    (signs, beta), (three, beta_three) = binary(w), ternary(w)
    for g in range(2):
        flat = [v for row in w[:, g].tolist() for v in row]
        mean, size = sum(flat) / 15, sum(map(abs, flat)) / 15
        assert beta[g].item() == pytest.approx(size) == beta_three[g].item()
        assert signs[:, g].flatten().tolist() == [1.0 if v >= mean else -1.0 for v in flat]
        assert three[:, g].flatten().tolist() == [max(-1, min(1, round(v / size))) for v in flat]
    assert binary(torch.zeros(2, 1, 3))[0].unique().tolist() == [1.0]  # a sign of 0 would be a third value


def test_a_normal_matrix_has_the_closed_forms_beta_and_share_of_zeros() -> None:
    w = 0.3 * drawn(500, 1, 400)
    three, beta = ternary(w)
    assert beta.item() == pytest.approx(0.3 * math.sqrt(2 / math.pi), rel=0.01)
    zeros = math.erf(0.5 * math.sqrt(2 / math.pi) / math.sqrt(2))  # P(|z| < sqrt(2 / pi) / 2)
    assert (three == 0).float().mean().item() == pytest.approx(zeros, rel=0.02)


@pytest.mark.parametrize("c", [0.01, 3.0])
def test_a_scale_of_the_weights_is_in_beta_alone(c: float) -> None:
    w = drawn(6, 1, 9)
    for rule in (binary, ternary):
        (ours, beta), (scaled, larger) = rule(w), rule(c * w)
        assert torch.equal(ours, scaled)
        torch.testing.assert_close(larger, c * beta)


@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize("n", [1, 8, 13, 64])
def test_packing_is_undone_by_unpacking_and_takes_one_or_two_bits(levels: int, n: int) -> None:
    w = values(3, 2, n, levels)
    packed = pack(w, levels)
    assert packed.dtype == torch.uint8 and packed.shape[-1] == packed_bytes(n, levels)
    assert packed_bytes(64, levels) == (8 if levels == 2 else 16)
    assert torch.equal(unpack(packed, n, levels), w)


@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize(("N", "outputs", "G", "n"), [(1, 5, 1, 13), (4, 3, 2, 8), (1, 7, 3, 5)])
def test_every_path_gives_the_same_whole_numbers(levels: int, N: int, outputs: int, G: int, n: int) -> None:
    q, w = whole(N, G, n), values(outputs, G, n, levels)
    wanted = torch.zeros(N, outputs, G)
    for i, o, g in itertools.product(range(N), range(outputs), range(G)):
        wanted[i, o, g] = sum(int(a) * int(b) for a, b in zip(q[i, g], w[o, g], strict=True))
    packed = pack(w, levels)
    for path in (bit_product_reference, bit_product):
        assert torch.equal(path(q, packed, levels), wanted), path
    padded = torch.nn.functional.pad(q.to(torch.int8), (0, -n % (8 if levels == 2 else 4)))
    blocks, loop = (path(padded, packed, levels - 1) for path in (blocked_sums, looped_sums))
    assert (loop is None) if compiler_works() else torch.equal(loop, blocks)
    assert torch.equal((2 if levels == 2 else 1) * blocks - q.sum(-1)[:, None], wanted)


def test_blocks_of_rows_join_and_the_operator_has_a_shape_without_running() -> None:
    q, w = whole(3, 1, 2048), values(1100, 1, 2048, 3)  # more than 2^20 weights
    packed = pack(w, 3)
    sums = blocked_sums(q.to(torch.int8), packed, 2) - q.sum(-1)[:, None]
    assert torch.equal(sums[..., 0], q[:, 0] @ w[:, 0].T)
    arguments = (q[:, :, :64].to(torch.int8), packed[:5, :, :16], 2)
    torch.library.opcheck(torch.ops.torchstone.code_sums.default, arguments)


def test_the_definition_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHSTONE_OPS", "reference")
    q, w = whole(2, 1, 9), values(4, 1, 9, 3)
    assert torch.equal(bit_product(q, pack(w, 3), 3), bit_product_reference(q, pack(w, 3), 3))


def test_rescaling_adds_groups_up_each_with_its_own_scales() -> None:
    ints, scale, beta = drawn(2, 3, 2), drawn(2, 2, seed=1), drawn(3, 2, seed=2)
    wanted = torch.einsum("nog,ng,og->no", ints, scale, beta)
    torch.testing.assert_close(rescale(ints, scale, beta), wanted)


def test_sums_are_those_of_the_largest_numbers_too() -> None:
    """No accumulator overflows: 60,000 inputs of 127 and -127, with weights of one sign."""
    for levels, sign in ((2, 1), (2, -1), (3, 1), (3, -1)):
        packed = pack(sign * torch.ones(2, 1, 60_000), levels)
        for q in (torch.full((1, 1, 60_000), 127.0), torch.full((1, 1, 60_000), -127.0)):
            assert torch.equal(bit_product(q, packed, levels), (sign * q.sum()).expand(1, 2, 1))


def test_without_a_compiler_the_blocks_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_file, "_loops", lambda: None)
    q, w = whole(1, 2, 9), values(4, 2, 9, 2)
    assert looped_sums(q.to(torch.int8), pack(w, 2), 1) is None
    assert torch.equal(bit_product(q, pack(w, 2), 2), torch.einsum("ngi,ogi->nog", q, w))

"""Products of 8 bits with scales of blocks: numbers, exactness of scales, error beside exact products, gradients."""

from __future__ import annotations

import pytest
import torch

from torchstone.ops.fp8 import LARGEST, dequantise, fp8_linear, fp8_product, product_reference, quantise


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("tile", "rows"), [(128, 1), (128, 128), (16, 1), (7, 7)])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_numbers_keep_four_bits_and_blocks_reach_the_largest(tile: int, rows: int, power_of_two: bool) -> None:
    x = drawn(200, 300) * torch.exp2(drawn(200, 300, seed=1))  # of many sizes
    q, scale = quantise(x, tile, rows, power_of_two)
    assert q.dtype == torch.float8_e4m3fn and scale.shape == (-(-200 // rows), -(-300 // tile))
    number = q.float()
    normal = number.abs() >= 2**-6
    assert normal.float().mean() > 0.9
    error = (dequantise(q, scale, tile, rows) - x).abs()
    assert (error <= 2**-4 * x.abs() * (1 + 1e-5))[normal].all()  # half a step of three bits
    for b in range(scale.shape[0]):
        for c in range(scale.shape[1]):
            largest = number[b * rows : (b + 1) * rows, c * tile : (c + 1) * tile].abs().max()
            assert largest >= LARGEST / 2 if power_of_two else largest == LARGEST
    assert not power_of_two or torch.equal(scale.log2(), scale.log2().round())


def test_a_power_of_two_on_a_tile_scales_the_result_exactly() -> None:
    x = drawn(5, 256)
    (q, scale), (q_two, scale_two) = quantise(x), quantise(x * torch.tensor([1.0] * 128 + [2.0**9] * 128))
    assert torch.equal(q.view(torch.uint8), q_two.view(torch.uint8))
    assert torch.equal(scale_two, scale * torch.tensor([1.0, 2.0**9]))


def test_zeros_stay_zeros_and_what_is_not_finite_stays_so() -> None:
    q, scale = quantise(torch.zeros(3, 130))
    assert not q.float().any() and (scale > 0).all()
    x = torch.ones(2, 256)
    x[0, 3] = torch.nan
    y = dequantise(*quantise(x))
    assert y[0, :128].isnan().any() and torch.equal(y[1], torch.ones(256)) and torch.equal(y[0, 128:], torch.ones(128))


def test_the_product_is_the_sum_over_tiles_of_scaled_sums() -> None:
    a, b = drawn(9, 300).double(), drawn(140, 300, seed=1).double()
    (qa, sa), (qb, sb) = quantise(a), quantise(b, rows=128)
    exact = dequantise(qa, sa) @ dequantise(qb, sb, rows=128).T
    assert off(product_reference(qa, sa, qb, sb, rows_b=128), exact) < 1e-14
    (qa, sa), (qb, sb) = quantise(a.float()), quantise(b.float(), rows=128)
    assert off(fp8_product(qa, sa, qb, sb, rows_b=128), exact) < 1e-6  # sums in float32


def test_error_beside_exact_products() -> None:
    """Two roundings, each of a relative error about uniform within 2^-4 of a number: some 3.7 % of a product's norm,
    whatever the sizes of tiles; and one large channel costs only its own tile."""
    x, w = drawn(256, 512).double(), 0.02 * drawn(384, 512, seed=1).double()
    errors = {}
    for name, tile, rows in (("tiles", 128, 1), ("small tiles", 32, 1), ("all at once", 512, 256)):
        (qa, sa), (qb, sb) = quantise(x, tile, rows), quantise(w, tile, tile)
        errors[name] = off(dequantise(qa, sa, tile, rows) @ dequantise(qb, sb, tile, tile).T, x @ w.T)
    assert all(0.03 < error < 0.045 for error in errors.values()), errors
    large = x.clone()
    large[:, 7] *= 2.0**20  # the largest number of 8 bits is 2^18 times the least
    rest = torch.arange(512) != 7

    def of_rest(tile: int, rows: int) -> float:
        again = dequantise(*quantise(large, tile, rows), tile, rows)
        return off(again[:, rest] @ w[:, rest].T, large[:, rest] @ w[:, rest].T)

    assert of_rest(512, 256) > 0.9 and of_rest(128, 1) < 0.55  # all numbers are lost, or those of one tile of four


@pytest.mark.parametrize("outs", [(12,), (40, 7), (128, 256)])
@pytest.mark.parametrize("tile", [128, 16])
def test_all_three_products_are_of_what_was_quantised(outs: tuple[int, ...], tile: int) -> None:
    x, w, g = (
        drawn(*shape, seed=i).double() for i, shape in enumerate(((2, 75, 96), (sum(outs), 96), (2, 75, sum(outs))))
    )
    x.requires_grad_(), w.requires_grad_()
    y = fp8_linear(x, w.split(outs), tile)
    y.backward(g)

    def through(a: torch.Tensor, rows: int = 1) -> torch.Tensor:
        return dequantise(*quantise(a, tile, rows), tile, rows)

    flat, back = x.detach().flatten(0, 1), g.flatten(0, 1)
    q_x, q_w = through(flat), [through(part, tile) for part in w.detach().split(outs)]
    torch.testing.assert_close(y.flatten(0, 1), q_x @ torch.cat(q_w).T)
    assert x.grad is not None and w.grad is not None
    by_slice = [through(part) @ of for part, of in zip(back.split(outs, -1), q_w, strict=True)]
    torch.testing.assert_close(x.grad.flatten(0, 1), sum(by_slice))
    torch.testing.assert_close(w.grad, through(back.T) @ through(q_x.T).T)  # along rows; x from its 8 bits
    for found, exact in ((x.grad.flatten(0, 1), back @ w.detach()), (w.grad, back.T @ flat)):
        assert 0.02 < off(found, exact) < 0.06


def test_what_needs_no_gradient_gets_none_and_second_ones_are_refused() -> None:
    x, w = drawn(4, 32).requires_grad_(), drawn(8, 32)
    fp8_linear(x, [w]).sum().backward()
    assert x.grad is not None and w.grad is None
    (once,) = torch.autograd.grad(fp8_linear(x, [w]).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()


def test_under_autocast_sums_stay_in_float32_and_the_result_is_of_its_type() -> None:
    x, w = drawn(6, 256), drawn(16, 256, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        y = fp8_linear(x, [w])
    assert y.dtype == torch.bfloat16 and torch.equal(y, fp8_linear(x, [w]).bfloat16())
    assert fp8_linear(x.bfloat16(), [w.bfloat16()]).dtype == torch.bfloat16

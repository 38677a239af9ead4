"""Rotation: the fast path equals the definition, forwards and backwards, over awkward shapes."""

from __future__ import annotations

import pytest
import torch

from torchstone.ops.rotate import rotate, rotate_fast, rotate_reference


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("K", "R"), [(6, 6), (10, 4), (2, 2)])
def test_fast_rotation_equals_the_definition_and_its_gradient(interleaved: bool, K: int, R: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 3, K, generator=generator, dtype=torch.float64).transpose(1, 2).requires_grad_()
    angle = torch.randn(2, 1, 7, R // 2, generator=generator, dtype=torch.float64)
    weight = torch.randn(2, 3, 7, K, generator=generator, dtype=torch.float64)
    outs, grads = [], []
    for function in (rotate_reference, rotate_fast, rotate):
        y = function(x, angle.cos(), angle.sin(), interleaved)
        outs.append(y)
        grads.append(torch.autograd.grad((y * weight).sum(), x)[0])
    for y, grad in zip(outs[1:], grads[1:], strict=True):
        torch.testing.assert_close(y, outs[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(grad, grads[0], rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda t: rotate_fast(t, angle.cos(), angle.sin(), interleaved), (x,))
    assert torch.autograd.gradgradcheck(lambda t: rotate_fast(t, angle.cos(), angle.sin(), interleaved), (x,))


def test_rotation_keeps_lengths_of_pairs() -> None:
    x = torch.randn(1, 1, 5, 8, dtype=torch.float64)
    angle = torch.randn(1, 1, 5, 4, dtype=torch.float64)
    y = rotate(x, angle.cos(), angle.sin())
    torch.testing.assert_close(y[..., :4] ** 2 + y[..., 4:] ** 2, x[..., :4] ** 2 + x[..., 4:] ** 2)

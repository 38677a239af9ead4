"""Reflections: the fast path equals the definition and dense matrices, forwards and backwards."""

from __future__ import annotations

import pytest
import torch

from torchstone.ops.householder import householder, householder_fast, householder_reference

SHAPES = [((5, 3), (5, 2, 3), None), ((4, 7, 6), (4, 1, 5, 6), (4, 1, 5)), ((6,), (2, 3, 4, 6), (3, 4)),
          ((2, 3, 2), (3, 1, 2), (1,)), ((3, 4), (3, 0, 4), None)]  # fmt: skip


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(u_CK: torch.Tensor, strength: torch.Tensor | float = 2.0) -> torch.Tensor:
    """The matrix of the product, from outer products."""
    C, K = u_CK.shape
    product = torch.eye(K, dtype=u_CK.dtype)
    for c in range(C):
        u = u_CK[c] / u_CK[c].dot(u_CK[c]).sqrt()
        tau = strength[c] if isinstance(strength, torch.Tensor) else strength
        product = product @ (torch.eye(K, dtype=u.dtype) - tau * torch.outer(u, u))
    return product


@pytest.mark.parametrize(("x_shape", "u_shape", "s_shape"), SHAPES, ids=str)
def test_paths_agree_with_their_gradients_where_shapes_broadcast(x_shape, u_shape, s_shape) -> None:  # type: ignore[no-untyped-def]
    x, u = drawn(*x_shape).requires_grad_(), drawn(*u_shape, seed=1).requires_grad_()
    strength = 2.0 if s_shape is None else drawn(*s_shape, seed=2).requires_grad_()
    inputs = [x, u] if s_shape is None else [x, u, strength]
    found = []
    for function in (householder_reference, householder_fast):
        y = function(x, u, strength)
        found.append((y, torch.autograd.grad(y, inputs, drawn(*y.shape, seed=3), allow_unused=True)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-12)
    for ours, theirs in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs, rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_differences() -> None:
    x, u, strength = drawn(2, 3, 4), drawn(2, 1, 3, 4, seed=1), drawn(1, 3, seed=2)
    strength[0, 1] = 1.0  # where there is no inverse
    assert torch.autograd.gradcheck(householder, tuple(t.requires_grad_() for t in (x, u, strength)))


@pytest.mark.parametrize("strength", [2.0, torch.tensor([0.5, -3.0, 1.0, 2.0], dtype=torch.float64)], ids=str)
def test_it_is_the_product_of_matrices(strength: torch.Tensor | float) -> None:
    x, u = drawn(9, 5), drawn(4, 5, seed=1)
    torch.testing.assert_close(householder(x, u, strength), x @ dense(u, strength).T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", range(2, 33))
def test_rotations_keep_lengths_and_turn_back(k: int) -> None:
    x, u = drawn(6, k).float(), drawn(2 * (k // 2), k, seed=k).float()
    y = householder(x, u)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(householder(y, u.flip(-2)), x, rtol=0, atol=1e-5)
    assert torch.linalg.det(householder(torch.eye(k), u)).item() == pytest.approx(1, abs=1e-4)


def test_determinants_and_special_strengths() -> None:
    x, u = drawn(4, 3), drawn(1, 3, seed=1)
    for strength in (0.3, -1.5, 1.0):
        assert torch.linalg.det(householder(torch.eye(3).double(), u, strength)).item() == pytest.approx(1 - strength)
    assert torch.equal(householder(x, u, 0.0), x)
    torch.testing.assert_close(householder(householder(x, u), u), x)


def test_directions_may_be_of_any_length_and_zero_is_no_direction() -> None:
    x, u = drawn(4, 3), drawn(2, 3, seed=1)
    torch.testing.assert_close(householder(x, 1e-9 * u), householder(x, 50 * u), rtol=0, atol=1e-12)
    still = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    y = householder(x, still)
    assert torch.equal(y, x)
    y.sum().backward()
    assert still.grad is not None and torch.isfinite(still.grad).all()


def test_the_definition_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    x, u = drawn(4, 3), drawn(2, 3, seed=1)
    quick = householder(x, u)
    monkeypatch.setenv("TORCHSTONE_OPS", "reference")
    torch.testing.assert_close(householder(x, u), quick, rtol=0, atol=1e-14)


def test_half_precision_is_reflected_in_float32() -> None:
    x, u = drawn(4, 3).bfloat16(), drawn(2, 3, seed=1).bfloat16()
    y = householder(x, u)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), householder(x.double(), u.double()), rtol=0, atol=1e-6)

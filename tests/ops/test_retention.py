"""Retention: its forms equal the definition, forwards and backwards, over awkward lengths; and the identities of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from torchstone.ops.retention import chunkwise, retention, retention_chunkwise, retention_reference

B, H, T, K, V = 2, 3, 37, 4, 6


def drawn(dtype: torch.dtype, length: int = T, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v, log decay, fresh, state."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    parts = [normal(B, H, length, n) for n in (K, K, V)] + [-normal(B, H, length).abs()]
    return [*parts, torch.rand(B, length, generator=generator) < 0.1, normal(B, H, K, V)]


def results(function: Callable[..., tuple[torch.Tensor, torch.Tensor]], made: list[torch.Tensor]) -> list[torch.Tensor]:
    """y, the state after it, and the gradients of q, k, v, log decay and state."""
    q, k, v, g, fresh, state = made
    leaves = [x.clone().requires_grad_() for x in (q, k, v, g, state)]
    y, after = function(*leaves[:4], fresh, leaves[4])
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y.detach(), after.detach(), *torch.autograd.grad((y * weight).sum() + after.square().sum(), leaves)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk", [1, 3, 8, T])
def test_chunks_equal_the_definition_and_its_gradient(chunk: int, dtype: torch.dtype, tolerance: float) -> None:
    made = drawn(dtype)
    ours = results(lambda *a: retention_chunkwise(*a, chunk=chunk), made)
    for mine, wanted in zip(ours, results(retention_reference, made), strict=True):
        assert (mine - wanted).abs().max() <= tolerance * max(1.0, float(wanted.abs().max()))


def test_a_second_level_of_sums_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = drawn(torch.float64)
    wanted = results(lambda *a: retention_chunkwise(*a, chunk=1), made)
    monkeypatch.setattr(chunkwise, "_GROUP", 3)
    for mine, plain in zip(results(lambda *a: retention_chunkwise(*a, chunk=1), made), wanted, strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["auto", "parallel", "chunkwise", "recurrent"])
def test_every_form_is_the_same_function(form: str) -> None:
    q, k, v, g, fresh, state = drawn(torch.float64)
    y, after = retention(q, k, v, g, fresh, state, form=form, chunk=5)  # type: ignore[arg-type]
    wanted, last = retention_reference(q, k, v, g, fresh, state)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(after, last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cut", [1, 5, 36])
def test_two_calls_with_the_state_between_equal_one(cut: int) -> None:
    q, k, v, g, fresh, _ = drawn(torch.float64)
    whole, last = retention(q, k, v, g, fresh, chunk=8)
    first, state = retention(*(x[:, :, :cut] for x in (q, k, v, g)), fresh[:, :cut], chunk=8)
    second, after = retention(*(x[:, :, cut:] for x in (q, k, v, g)), fresh[:, cut:], state, chunk=8)
    torch.testing.assert_close(torch.cat([first, second], 2), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(after, last, rtol=0, atol=1e-12)


def test_full_decay_leaves_the_token_itself_and_none_is_linear_attention() -> None:
    q, k, v, *_ = drawn(torch.float64)
    alone, _ = retention(q, k, v, torch.full((1, H, 1), -1e4, dtype=torch.float64), chunk=8)
    torch.testing.assert_close(alone, (q * k).sum(-1, keepdim=True) * v)
    linear, _ = retention(q, k, v, torch.zeros(1, H, 1, dtype=torch.float64), chunk=8)
    torch.testing.assert_close(linear, (q @ k.transpose(-1, -2)).tril() @ v)


def test_the_sum_is_kept_in_float32_where_inputs_are_bfloat16() -> None:
    q, k, v, g, fresh, _ = drawn(torch.bfloat16)
    y, state = retention(q, k, v, g, fresh, chunk=8)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert retention_reference(q, k, v, g, fresh)[1].dtype == torch.float32


def test_the_definition_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    made = drawn(torch.float32)
    monkeypatch.setenv("TORCHSTONE_OPS", "reference")
    assert torch.equal(retention(*made, chunk=4)[0], retention_reference(*made)[0])


def test_no_token_is_no_output() -> None:
    y, state = retention(*drawn(torch.float32, 0))
    assert y.shape == (B, H, 0, V) and state.shape == (B, H, K, V)

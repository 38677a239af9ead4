"""Attention with its log-sum-exp equals the definition, gradients of both included; and results merge by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchstone.ops.attention import attention_lse, attention_reference, fused_lse, merge, shares

SHAPES = [(2, 4, 4, 13, 13, 5), (2, 4, 2, 1, 17, 7), (3, 2, 2, 4, 11, 8), (1, 1, 1, 1, 1, 1), (1, 2, 1, 70, 70, 64)]
MASKS = ["full", "causal", "boolean", "bias", "causal_bias", "causal_boolean"]


def operands(B: int, H: int, G: int, T: int, S: int, K: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    shapes = ((B, H, T, K), (B, G, S, K), (B, G, S, K))
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def arguments(mask: str, B: int, H: int, T: int, S: int) -> dict[str, Any]:
    found: dict[str, Any] = {"causal": mask.startswith("causal")}
    if mask.endswith("boolean"):
        found["mask_BHTS"] = torch.rand(B, 1, T, S) < 0.5  # some queries see no key
    if mask.endswith("bias"):
        found["mask_BHTS"] = torch.randn(B, H, T, S, dtype=torch.float64)
    return found


def results(function: Any, made: list[torch.Tensor], **more: Any) -> list[torch.Tensor]:
    """Output, log-sum-exp, and gradients of a sum that depends on both."""
    out, lse = function(*made, scale=0.3, **more)
    seen = lse.isfinite()
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    total = (out * weight).sum() + (lse[seen] * torch.linspace(-2, 1, int(seen.sum()), dtype=torch.float64)).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(total, made)]


def by_definition(*made: torch.Tensor, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out, _, lse = attention_reference(*made, **more)
    return out, lse


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_log_sum_exp_equal_the_definition_with_gradients_through_both(
    shape: tuple[int, ...], mask: str
) -> None:
    B, H, _, T, S, _ = shape
    made, more = operands(*shape), arguments(mask, B, H, T, S)
    assert fused_lse(made[0], made[2])
    for ours, wanted in zip(results(attention_lse, made, **more), results(by_definition, made, **more), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)


def test_a_query_that_sees_no_key_gives_zeros_and_no_denominator() -> None:
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[0, 0, 2] = False
    out, lse = attention_lse(*operands(2, 3, 3, 5, 5, 8), scale=0.3, mask_BHTS=mask)
    assert lse[0, :, 2].isneginf().all() and not out[0, :, 2].any() and lse.isneginf().sum() == 3


@pytest.mark.parametrize("values", [6, 8])
def test_a_mask_with_a_gradient_takes_the_definition_and_so_do_values_of_another_size(values: int) -> None:
    q, k, v = operands(1, 2, 2, 5, 5, 8)
    v, bias = v[..., :values], torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=values == 8)
    out, lse = attention_lse(q, k, v, scale=0.3, mask_BHTS=bias)
    wanted, _, denominator = attention_reference(q, k, v, scale=0.3, mask_BHTS=bias)
    assert torch.equal(out, wanted) and torch.equal(lse, denominator)
    if bias.requires_grad:
        assert torch.autograd.grad(lse.sum(), bias)[0].abs().sum() > 0


def test_log_sum_exps_are_float32_where_inputs_are_bfloat16_and_have_no_gradient_where_none_is_asked() -> None:
    made = operands(1, 2, 2, 9, 9, 8, torch.bfloat16)
    out, lse = attention_lse(*made, scale=0.3, lse_gradient=False)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert out.requires_grad and not lse.requires_grad


@pytest.mark.parametrize("gradient", [True, False])
def test_merged_results_are_attention_over_all_keys(gradient: bool) -> None:
    q, k, v = operands(2, 4, 2, 5, 12, 8)
    parts = [attention_lse(q, k[:, :, a:b], v[:, :, a:b], scale=0.5) for a, b in ((0, 3), (3, 4), (4, 12))]
    out, lse = merge(*(list(x) for x in zip(*parts, strict=True)), gradient=gradient)
    whole, _, denominator = attention_reference(q, k, v, scale=0.5)
    torch.testing.assert_close(out, whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, denominator, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(out)
    ours, wanted = (torch.autograd.grad((y * weight).sum(), [q, k, v]) for y in (out, whole))
    for name, a, b in zip("qkv", ours, wanted, strict=True):
        # values get the same gradient either way; scores only where shares have one
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10) == (gradient or name == "v"), name


def test_a_query_that_a_bias_leaves_no_key_has_no_gradient() -> None:
    made, bias = operands(1, 2, 2, 5, 5, 8), torch.zeros(1, 2, 5, 5, dtype=torch.float64)
    bias[0, :, 2] = float("-inf")
    for function in (attention_lse, by_definition):
        out, lse = function(*made, scale=0.3, mask_BHTS=bias)
        gradient = torch.autograd.grad(out.sum() + lse[lse.isfinite()].sum(), made)[0]
        assert gradient.isfinite().all() and not gradient[0, :, 2].any() and gradient[0, :, 1].any()


def test_shares_add_up_to_one_and_to_nothing_where_nothing_was_seen() -> None:
    lse_P = torch.tensor([[500.0, -torch.inf, -torch.inf], [500.0, 3.0, -torch.inf]])
    torch.testing.assert_close(shares(lse_P), torch.tensor([[0.5, 0.0, 0.0], [0.5, 1.0, 0.0]]))
    out, lse = merge([torch.ones(3, 2), torch.ones(3, 2)], list(lse_P))
    assert out.tolist() == [[1, 1], [1, 1], [0, 0]] and lse[2].isneginf()

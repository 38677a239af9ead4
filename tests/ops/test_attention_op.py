"""Fast attention equals its definition, forwards and backwards, over awkward shapes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from torchstone.ops.attention import attention, attention_probs, attention_reference, blockwise

SHAPES = [(2, 4, 4, 13, 13, 5), (2, 4, 2, 1, 17, 7), (1, 6, 1, 9, 9, 3), (3, 2, 2, 4, 11, 8), (1, 1, 1, 1, 1, 1)]
SHAPES += [(2, 4, 4, 13, 13, 6, 4), (2, 4, 2, 5, 9, 3, 8), (2, 4, 1, 1, 9, 6, 4)]  # values of another size


def operands(B: int, H: int, G: int, T: int, S: int, K: int, V: int | None = None) -> list[torch.Tensor]:
    shapes = ((B, H, T, K), (B, G, S, K), (B, G, S, V or K))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor, scale: float) -> torch.Tensor:
    """One query, head and row at a time."""
    (B, H, T, _), G = q.shape, k.shape[1]
    rows = []
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = allowed[b, h, t].nonzero().flatten()
                g = h // (H // G)
                weights = torch.softmax(scale * (k[b, g, seen] @ q[b, h, t]), 0)
                rows.append(weights @ v[b, g, seen])
    return torch.stack(rows).view(B, H, T, -1)


def masks(B: int, H: int, T: int, S: int) -> dict[str, dict[str, Any]]:
    some = torch.rand(B, 1, T, S) < 0.5
    some[..., 0] = True
    bias = torch.randn(B, H, T, S, dtype=torch.float64)
    return {
        "full": {},
        "causal": {"causal": True},
        "boolean": {"mask_BHTS": some},
        "boolean_of_one_row": {"mask_BHTS": some[:1]},
        "bias": {"mask_BHTS": bias},
        "bias_of_one_row": {"mask_BHTS": bias[:1]},
        "bias_and_mask": {"mask_BHTS": torch.where(some, bias, float("-inf"))},
    }


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("mask", list(masks(1, 1, 1, 1)))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fast_path_equals_the_definition_forwards_and_backwards(
    shape: tuple[int, ...], mask: str, softcap: float | None
) -> None:
    B, H, _, T, S = shape[:5]
    arguments = {"scale": 0.3, "softcap": softcap, **masks(B, H, T, S)[mask]}
    made = operands(*shape)
    weights = torch.randn(B, H, T, made[2].shape[-1], dtype=torch.float64)
    fast, (slow, probs, lse) = attention(*made, **arguments), attention_reference(*made, **arguments)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(probs.sum(-1), torch.ones(B, H, T, dtype=torch.float64))
    assert torch.isfinite(lse).all()
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), made) for y in (fast, slow)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mask", [*masks(1, 1, 1, 1), "blind", "blind_bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_probabilities_equal_those_of_the_definition_forwards_and_backwards(
    shape: tuple[int, ...], mask: str
) -> None:
    B, H, _, T, S = shape[:5]
    seen = (torch.rand(B, 1, T, S) < 0.5) & (torch.arange(T) < T - 1)[:, None]  # the last query sees no key
    blind = {"blind": seen, "blind_bias": torch.where(seen, torch.randn(B, H, T, S, dtype=torch.float64), -math.inf)}
    arguments: dict[str, Any] = {"mask_BHTS": blind[mask]} if mask in blind else masks(B, H, T, S)[mask]
    made = operands(*shape)
    found = attention_probs(*made, scale=0.3, **arguments)
    wanted = attention_reference(*made, scale=0.3, **arguments)[:2]
    weights = [torch.randn(y.shape, dtype=torch.float64) for y in wanted]
    grads = []
    for each in (found, wanted):
        loss = sum((y * weight).sum() for y, weight in zip(each, weights, strict=True))
        grads.append([*each, *torch.autograd.grad(loss, made)])
    for fast, slow in zip(*grads, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_definition_is_softmax_attention(shape: tuple[int, ...]) -> None:
    B, H, _, T, S, K = shape[:6]
    q, k, v = operands(*shape)
    causal = torch.tensor([[s <= t + S - T for s in range(S)] for t in range(T)]).expand(B, H, T, S)
    for arguments, allowed in (({}, torch.ones_like(causal)), ({"causal": True}, causal)):
        ours = attention_reference(q, k, v, scale=1 / math.sqrt(K), **arguments)[0]
        torch.testing.assert_close(ours, by_hand(q, k, v, allowed, 1 / math.sqrt(K)), rtol=1e-10, atol=1e-10)


def test_log_sum_exp_merges_attention_over_two_sets_of_keys() -> None:
    q, k, v = operands(2, 4, 2, 5, 12, 8)
    whole = attention_reference(q, k, v, scale=0.5)[0]
    parts = [attention_reference(q, k[:, :, part], v[:, :, part], scale=0.5) for part in (slice(0, 5), slice(5, 12))]
    share = torch.softmax(torch.stack([lse for _, _, lse in parts]), 0)
    merged = sum(weight[..., None] * out for weight, (out, _, _) in zip(share, parts, strict=True))
    torch.testing.assert_close(merged, whole, rtol=1e-10, atol=1e-10)


def test_values_may_have_a_size_of_their_own() -> None:
    made = operands(2, 4, 2, 1, 9, 5, V=3)
    out = attention(*made, scale=1.0)
    torch.testing.assert_close(out, attention_reference(*made, scale=1.0)[0], rtol=1e-10, atol=1e-10)
    assert out.shape == (2, 4, 1, 3)


def test_query_that_sees_no_key_gives_zeros_and_no_nan() -> None:
    made = operands(1, 2, 2, 3, 4, 5)
    allowed = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    allowed[:, :, 1] = False
    for softcap in (None, 2.0):
        out = attention(*made, scale=1.0, mask_BHTS=allowed, softcap=softcap)
        assert out[:, :, 1].eq(0).all() and torch.isfinite(out).all()


def test_query_that_sees_no_key_gives_finite_gradients() -> None:
    made = operands(1, 2, 2, 3, 4, 5)
    allowed = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    allowed[:, :, 1] = False
    for softcap in (None, 2.0):
        out = attention(*made, scale=1.0, mask_BHTS=allowed, softcap=softcap)
        for grad in torch.autograd.grad(out.sum(), made):
            assert torch.isfinite(grad).all(), f"softcap={softcap}"


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_blocks_of_queries_equal_all_at_once(softcap: float | None) -> None:
    made = operands(2, 4, 2, 13, 13, 5)

    def mask_of(a: int, b: int) -> tuple[int, int, torch.Tensor | None]:
        t, s = torch.arange(a, b)[:, None], torch.arange(max(0, a - 3), b)[None]
        return max(0, a - 3), b, ((s <= t) & (t - s < 4))[None, None]

    t, s = torch.arange(13)[:, None], torch.arange(13)[None]
    whole = attention(*made, scale=0.3, mask_BHTS=((s <= t) & (t - s < 4))[None, None], softcap=softcap)
    for block in (1, 4, 13, 50):
        ours = blockwise(*made, mask_of=mask_of, scale=0.3, softcap=softcap, block=block)
        torch.testing.assert_close(ours, whole, rtol=1e-10, atol=1e-10)
        pairs = zip(
            *(torch.autograd.grad(y.square().sum(), made, retain_graph=True) for y in (ours, whole)), strict=True
        )
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_forced_reference_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    made = operands(1, 2, 1, 3, 3, 4)
    fast = attention(*made, scale=1.0, causal=True)
    monkeypatch.setenv("TORCHSTONE_OPS", "reference")
    with torch.no_grad():
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
        torch.testing.assert_close(attention(*made, scale=1.0, causal=True), fast.detach())


def test_bfloat16_is_attended_in_float32() -> None:
    q, k, v = (x.detach().bfloat16() for x in operands(1, 2, 2, 6, 6, 8))
    out, probs, lse = attention_reference(q, k, v, scale=0.3)
    assert out.dtype == torch.bfloat16 and probs.dtype == lse.dtype == torch.float32
    wide = attention_reference(q.float(), k.float(), v.float(), scale=0.3)[0]
    torch.testing.assert_close(attention(q, k, v, scale=0.3).float(), wide, rtol=3e-2, atol=3e-2)

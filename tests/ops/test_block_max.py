"""Block maxima: the fast path equals the definition, and both are what the paper's identities say of probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchstone.ops.attention import attention_block_max, attention_block_max_reference, attention_reference, block_max

B, H, G, T, K = 2, 4, 2, 13, 5


def operands(T: int = T, S: int = T, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, T, K), (B, G, S, K), (B, G, S, K + 1))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def masks(T: int, S: int) -> dict[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    some = torch.rand(B, 1, T, S, generator=generator) < 0.6
    some[0, 0, -1] = False  # a query that sees nothing
    bias = torch.randn(B, H, T, S, generator=generator, dtype=torch.float64)
    begins = torch.randint(0, S - 2, (B, T), generator=generator)
    document = torch.arange(S) >= begins[..., None]
    return {
        "full": {},
        "causal": {"causal": True},
        "boolean": {"mask_BHTS": some},
        "bias": {"mask_BHTS": torch.where(some, bias, float("-inf"))},
        "softcap": {"causal": True, "softcap": 1.5},
        "documents": {"mask_BHTS": document[:, None], "first_BT": begins},
        "one_begin_for_all_rows": {"mask_BHTS": document[:1, None], "first_BT": begins[:1]},
    }


@pytest.mark.parametrize("rows", [256, 4])
@pytest.mark.parametrize("block", [1, 4, 20])
@pytest.mark.parametrize("shape", [(13, 13), (3, 13), (1, 9)])
@pytest.mark.parametrize("mask", list(masks(5, 5)))
def test_fast_path_equals_the_definition(
    mask: str, shape: tuple[int, int], block: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_max, "_ROWS", rows)
    made, arguments = operands(*shape), masks(*shape)[mask]
    out, probs, wanted = attention_block_max_reference(*made, scale=0.7, block=block, **arguments)
    fast, found = attention_block_max(*made, scale=0.7, block=block, **arguments)
    assert found.shape == (B, G, shape[0], -(-shape[1] // block))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(fast, out, rtol=0, atol=1e-12)
    assert (found >= 0).all() and (found <= 1).all()
    best = probs.unflatten(1, (G, -1)).amax((2, -1))
    torch.testing.assert_close(found.amax(-1), best, rtol=0, atol=1e-12)  # no probability is in no block


def test_definition_is_the_largest_probability_of_any_head_in_a_documents_block() -> None:
    q, k, v = operands()
    begins = torch.tensor([[0] * 6 + [6] * 7, [0] * 2 + [2] * 11])
    seen = (torch.arange(T) >= begins[..., None]) & (torch.arange(T) <= torch.arange(T)[:, None])
    probs = attention_reference(q, k, v, scale=1.0, mask_BHTS=seen[:, None])[1]
    found = attention_block_max_reference(q, k, v, scale=1.0, block=4, first_BT=begins, mask_BHTS=seen[:, None])[2]
    for b in range(B):
        for g in range(G):
            for t in range(T):
                first = int(begins[b, t])
                for n in range(4):
                    keys = probs[b, 2 * g : 2 * g + 2, t, first + 4 * n : first + 4 * (n + 1)]
                    assert found[b, g, t, n] == (keys.max() if keys.numel() else 0.0)


def test_blocks_of_queries_with_masks_of_their_own_change_nothing() -> None:
    q, k, v = (x.requires_grad_() for x in operands())

    def mask_of(a: int, b: int) -> tuple[int, int, torch.Tensor]:
        return 0, b, torch.ones(1, 1, T, T, dtype=torch.bool).tril()[:, :, a:b, :b]

    ours = attention_block_max(q, k, v, scale=0.7, block=4, mask_of=mask_of)
    wanted = attention_block_max(q, k, v, scale=0.7, block=4, causal=True)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(y[0].square().sum(), (q, k, v)) for y in (ours, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert not ours[1].requires_grad and not wanted[1].requires_grad


def test_maxima_are_float32_where_inputs_are_bfloat16_also_under_autocast() -> None:
    made = operands(dtype=torch.bfloat16)
    wanted = attention_block_max_reference(*(x.float() for x in made), scale=0.7, block=4, causal=True)[2]
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = attention_block_max(*made, scale=0.7, block=4, causal=True)[1]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_the_definition_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    made = operands()
    monkeypatch.setenv("TORCHSTONE_OPS", "reference")
    ours = attention_block_max(*made, scale=0.7, block=4, causal=True)
    out, _, found = attention_block_max_reference(*made, scale=0.7, block=4, causal=True)
    assert torch.equal(ours[0], out) and torch.equal(ours[1], found)

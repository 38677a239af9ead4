"""Attention whose scores fall with distance: products in blocks equal the definition, and stay within their dtype."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from torchstone.ops.attention import Decay, attention, attention_reference, blockwise, scores_reference


def decay_of(T: int, S: int, K: int, fastest: float, rows: int = 1, start: int = 0) -> Decay:
    """The last T of S places."""
    rate_K = torch.linspace(fastest, 0, K, dtype=torch.float64)
    places = start + torch.arange(S).expand(rows, -1)
    return Decay(rate_K, fastest, places[:, S - T :], places)


def operands(H: int, G: int, T: int, S: int, K: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    shapes = ((2, H, T, K), (2, G, S, K), (2, G, S, K))
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("fastest", [0.01, 3.0, 30.0])
def test_scores_are_the_sum_over_channels(fastest: float) -> None:
    q, k, _ = operands(2, 1, 5, 7, 4)
    decay = decay_of(5, 7, 4, fastest)
    scores = scores_reference(q, k, scale=0.5, causal=True, mask_BHTS=None, softcap=None, decay=decay)
    rate, x, y = decay.rate_K.numpy(), q.detach().numpy(), k.detach().numpy()
    for b, h, t, s in np.ndindex(2, 2, 5, 7):
        n = t + 2
        wanted = 0.5 * (x[b, h, t] * y[b, 0, s] * np.exp(-rate * (n - s))).sum() if s <= n else -math.inf
        assert scores[b, h, t, s].item() == pytest.approx(wanted, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("form", ["full", "causal", "boolean", "bias", "blocks"])
@pytest.mark.parametrize("fastest", [0.01, 3.0, 30.0])
def test_products_in_blocks_equal_one_query_at_a_time_forwards_and_backwards(
    monkeypatch: pytest.MonkeyPatch, fastest: float, form: str, softcap: float | None
) -> None:
    T, S, K = 13, 17, 4
    made, decay = operands(4, 2, T, S, K), decay_of(T, S, K, fastest)
    assert (decay.span(torch.float64) >= T) == (fastest == 0.01)
    seen = (torch.rand(2, 1, T, S) < 0.7) & torch.ones(T, S, dtype=torch.bool).tril(S - T)
    seen[..., 0] = True
    bias = torch.where(seen, torch.randn(2, 4, T, S, dtype=torch.float64), float("-inf"))
    arguments: dict[str, Any] = {"scale": 0.3, "softcap": softcap, "decay": decay}
    mask = {"causal": {"causal": True}, "boolean": {"mask_BHTS": seen}, "bias": {"mask_BHTS": bias}}.get(form, {})
    if form == "full":
        T = 1  # every key is before the query only for the last
        made, arguments["decay"] = [made[0][:, :, -1:], *made[1:]], decay_of(1, S, K, fastest)
    if form == "blocks":
        mask = {"mask_BHTS": seen}
        fast = blockwise(*made, mask_of=lambda a, b: (0, S, seen[:, :, a:b]), block=5, **arguments)
    else:
        fast = attention(*made, **mask, **arguments)
    weights = torch.randn(2, 4, T, K, dtype=torch.float64)
    ours = [fast, *torch.autograd.grad((fast * weights).sum(), made)]
    monkeypatch.setenv("TORCHSTONE_OPS", "reference")
    slow = attention_reference(*made, **mask, **arguments)[0]
    for a, b in zip(ours, [slow, *torch.autograd.grad((slow * weights).sum(), made)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fastest", [0.00245, 0.02, 1.0])
def test_no_factor_leaves_the_dtype(dtype: torch.dtype, fastest: float) -> None:
    T = 600
    q, k, v = (x.detach() for x in operands(1, 1, T, T, 4, dtype))
    decay = decay_of(T, T, 4, fastest, start=100_000)
    b = min(T, decay.span(dtype))
    for a in (0, T - b):
        of_q, of_k = decay.slice(a, a + b, 0, T).rebased(q[:, :, a : a + b], k)
        assert torch.isfinite(of_q).all() and torch.isfinite(of_k).all()
    y = attention(q, k, v, scale=0.5, causal=True, decay=decay)
    exact = attention_reference(*(x.double() for x in (q, k, v)), scale=0.5, causal=True, decay=decay)[0]
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=50 * torch.finfo(dtype).eps)

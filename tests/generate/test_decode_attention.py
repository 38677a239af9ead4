"""Attention of one query, in the forms that decoding uses, equals its definition; a state that is extended or forked
goes on as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from generate.small import build, ids
from torchstone.model.tokens import Tokens
from torchstone.ops.attention import attention, attention_reference
from torchstone.ops.attention.decode import decode_loops, decode_wide

SHAPES = [(2, 4, 4, 17, 5), (3, 4, 2, 9, 7), (1, 6, 1, 1, 3), (2, 1, 1, 33, 8)]


def operands(B: int, H: int, G: int, S: int, K: int) -> list[torch.Tensor]:
    shapes = ((B, H, 1, K), (B, G, S, K), (B, G, S, K))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def masks(B: int, H: int, S: int) -> dict[str, torch.Tensor | None]:
    some = torch.rand(B, 1, 1, S) < 0.5
    some[..., 0] = True
    bias = torch.randn(B, H, 1, S, dtype=torch.float64)
    return {
        "none": None,
        "boolean": some,
        "of_one_row": some[:1],
        "bias": torch.where(some, bias, float("-inf")),
        "bias_of_one_row": bias[:1],
        "bias_of_one_head": bias[:, :1],
    }


@pytest.mark.parametrize("mask", list(masks(1, 1, 1)))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_loops_equal_the_definition_forwards_and_backwards(shape: tuple[int, ...], mask: str) -> None:
    B, H, _, S, _ = shape
    made, given = operands(*shape), masks(B, H, S)[mask]
    fast = decode_loops(*made, scale=0.3, mask_BH1S=given)
    slow = attention_reference(*made, scale=0.3, mask_BHTS=given)[0]
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(slow)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), made) for y in (fast, slow)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_decode_loops_give_zeros_to_a_query_that_sees_no_key() -> None:
    made = operands(2, 2, 2, 4, 5)
    allowed = torch.tensor([[True] * 4, [False] * 4])[:, None, None]
    out = decode_loops(*made, scale=1.0, mask_BH1S=allowed)
    assert out[1].eq(0).all() and torch.isfinite(out).all()
    for grad in torch.autograd.grad(out.sum(), made):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("mask", list(masks(1, 1, 1)))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_half_precision_decoding_equals_the_definition_in_float32(shape: tuple[int, ...], mask: str) -> None:
    B, H, _, S, _ = shape
    q, k, v = (x.detach().bfloat16() for x in operands(*shape))
    given = masks(B, H, S)[mask]
    wide = attention_reference(q.float(), k.float(), v.float(), scale=0.3, mask_BHTS=given)[0]
    for dtype in (torch.bfloat16, torch.float16):
        out = attention(q.to(dtype), k.to(dtype), v.to(dtype), scale=0.3, mask_BHTS=given)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), wide, rtol=1e-2, atol=1e-2)
    plain = decode_wide(q[:, :1], k[:, :1], v[:, :1], None, scale=0.3)
    torch.testing.assert_close(plain.float(), wide[:, :1] if mask == "none" else plain.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"position": "alibi"},
        {"attention": {"kind": "softmax", "heads": 4, "window": 3}},
        {"layers": [{"at": [0], "attention": {"kind": "softmax", "heads": 4, "window": 3}}]},
    ],
    ids=str,
)
@torch.no_grad()
def test_extended_state_goes_on_as_one_that_was_large_from_the_start(fields: dict[str, Any]) -> None:
    model, tokens = build(**fields), torch.tensor(ids(12, 12))
    start = torch.tensor([[0] * 12, [0] * 3 + [3] * 9])  # documents, so that their column is extended too
    small, large = model.state(2, 5), model.state(2, 12)
    for a, b in ((0, 4), (4, 5), (5, 9), (9, 12)):
        small.extend(b)
        piece = Tokens(ids=tokens[:, a:b], start=start[:, a:b])
        ours, theirs = (model(piece, state=state).hidden for state in (small, large))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    small.extend(7)
    assert small.extent == 12, "a state never shrinks"


@torch.no_grad()
def test_fork_forgets_the_length_of_rows_that_left() -> None:
    model, tokens = build(), torch.tensor(ids(9, 9, 9))
    state = model.state(3, 9)
    valid = torch.arange(9)[None] < torch.tensor([9, 4, 4])[:, None]
    model(Tokens.of(tokens, valid=valid), state=state)
    rest = state.fork(torch.tensor([1, 2]))
    assert (rest.longest, rest.uniform, state.longest) == (4, True, 9)
    ours = model(tokens[1:, 4:9], state=rest).hidden
    torch.testing.assert_close(ours, model(tokens[1:]).hidden[:, 4:], rtol=1e-5, atol=1e-5)

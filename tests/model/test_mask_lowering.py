"""Every lowering of a mask equals its definition, `Mask.allow`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchstone.errors import TorchstoneError
from torchstone.model import mask as masks
from torchstone.model.context import Context
from torchstone.model.mask import BIDIRECTIONAL, CAUSAL, Blocks, Lowered, Mask, Term, Window, lower, mask_named
from torchstone.model.position import Positions
from torchstone.model.site import Site, initialise
from torchstone.model.tokens import Tokens
from torchstone.ops import attention as kernels
from torchstone.spec import resolve

quick = settings(max_examples=60, deadline=None, derandomize=True)


def dense(low: Lowered, B: int, T: int, S: int, block: int = 5) -> torch.Tensor:
    """What a lowering allows, as (B, T, S)."""
    if low.causal:
        return torch.ones(T, S, dtype=torch.bool).tril(S - T).expand(B, T, S)
    if low.mask_of is None:
        matrix = torch.ones(1, 1, T, S, dtype=torch.bool) if low.matrix_B1TS is None else low.matrix_B1TS
        return matrix[:, 0].expand(B, T, S)
    out = torch.zeros(B, T, S, dtype=torch.bool)
    for a in range(0, T, block):
        first, last, matrix = low.mask_of(a, min(T, a + block))
        out[:, a : a + block, first:last] = True if matrix is None else matrix[:, 0]
    return out


@st.composite
def sequences(draw: st.DrawFn) -> Tokens:
    """One to three rows of one to 23 tokens, perhaps with documents, perhaps with padding left or right."""
    B, T = draw(st.integers(1, 3)), draw(st.integers(1, 23))
    index = torch.arange(T)[None]
    start = valid = None
    if draw(st.booleans()):
        new = torch.tensor([draw(st.lists(st.booleans(), min_size=T, max_size=T)) for _ in range(B)])
        start = torch.where(new, index, 0).cummax(1).values
    if draw(st.booleans()):
        lengths = torch.tensor([draw(st.integers(1, T)) for _ in range(B)])[:, None]
        valid = index < lengths if draw(st.booleans()) else index >= T - lengths
    return Tokens(index, start=start, valid=valid)


def described(causal: bool, window: int | None, blocks: int | None = None) -> Mask:
    mask = CAUSAL if causal else BIDIRECTIONAL
    mask = mask if window is None else mask & Window(window)
    return mask if blocks is None else mask & Blocks(blocks)


sizes = st.none() | st.integers(1, 25)


@quick
@given(sequences(), st.booleans(), sizes, sizes, st.sampled_from(["same", "general"]), st.booleans())
def test_lowering_equals_the_definition(
    tokens: Tokens, causal: bool, window: int | None, blocks: int | None, relation: masks.Relation, flags: bool
) -> None:
    mask, T = described(causal, window, blocks), tokens.index.shape[1]
    allowed = mask.allow(tokens, tokens)
    low = lower(mask, tokens, tokens, relation, flags=flags)
    assert not (low.causal and not flags)
    B = allowed.shape[0]
    assert torch.equal(dense(low, B, T, T), allowed)


@quick
@given(sequences(), st.booleans(), sizes, sizes, st.sampled_from(["same", "general"]), st.booleans())
def test_lowering_in_blocks_equals_the_definition(
    tokens: Tokens, causal: bool, window: int | None, blocks: int | None, relation: masks.Relation, own: bool
) -> None:
    mask, T = described(causal, window, blocks), tokens.index.shape[1]
    if own:  # positions of one's own, that stand still
        tokens = replace(tokens, position=tokens.index // 3)
    before, masks._LARGEST = masks._LARGEST, 4
    try:
        low = lower(mask, tokens, tokens, relation, flags=False)
    finally:
        masks._LARGEST = before
    assert (low.mask_of is not None) == (T > 4)
    allowed = mask.allow(tokens, tokens)
    assert torch.equal(dense(low, allowed.shape[0], T, T), allowed)


@quick
@given(st.integers(1, 20), sizes, sizes)
def test_one_newest_query_equals_the_definition(length: int, window: int | None, blocks: int | None) -> None:
    q, k = Tokens(torch.tensor([[length - 1]])), Tokens(torch.arange(length)[None])
    mask = described(True, window, blocks)
    low = lower(mask, q, k, "last")
    assert torch.equal(dense(low, 1, 1, length), mask.allow(q, k))
    assert mask != CAUSAL or low == Lowered(), "decoding without a window needs no matrix"


@quick
@given(sequences(), st.integers(0, 22), st.none() | st.integers(1, 25))
def test_definition_is_what_the_words_say(tokens: Tokens, t: int, window: int | None) -> None:
    T = tokens.index.shape[1]
    t = t % T
    allowed = described(True, window).allow(tokens, tokens)
    for row in range(allowed.shape[0]):
        for s in range(T):
            seen = s <= t and (window is None or t - s < window)
            if tokens.start is not None:
                seen = seen and bool(tokens.start[row, s] == tokens.start[row, t])
            if tokens.valid is not None:
                seen = seen and bool(tokens.valid[row, s] or not tokens.valid[row, t])
            assert bool(allowed[row, t, s]) == seen


@quick
@given(sequences(), st.integers(1, 9))
def test_blockwise_causal_attention_is_what_the_words_say(tokens: Tokens, size: int) -> None:
    tokens = replace(tokens, valid=None)
    T, allowed = tokens.index.shape[1], (CAUSAL & Blocks(size)).allow(tokens, tokens)
    for row in range(allowed.shape[0]):
        for t in range(T):
            first = 0 if tokens.start is None else int(tokens.start[row, t])
            seen = allowed[row, t].nonzero().flatten().tolist()
            n = t - first  # place in the document
            assert seen == list(range(first + max(0, n // size - 1) * size, t + 1))
            assert min(n + 1, size + 1) <= len(seen) <= 2 * size and t - seen[0] <= 2 * size - 1


@pytest.mark.parametrize("length", [1, 5, 9, 10])
def test_blockwise_causal_attention_is_causal_up_to_two_blocks(length: int) -> None:
    tokens = Tokens.blank(length)
    assert torch.equal((CAUSAL & Blocks(5)).allow(tokens, tokens), CAUSAL.allow(tokens, tokens))
    if length <= 5:
        assert lower(CAUSAL & Blocks(5), tokens, tokens, "same") == Lowered(causal=length > 1)


def test_masks_have_names_on_the_command_line() -> None:
    assert mask_named("full") == CAUSAL
    assert mask_named("window:128") == CAUSAL & Window(128)
    assert mask_named("blocks:64") == CAUSAL & Blocks(64)
    assert [mask_named(words).reach for words in ("full", "window:128", "blocks:64")] == [None, 128, 128]
    for words in ("blocks", "blocks:", "blocks:0", "blocks:-1", "full:3", "ring:3", ""):
        with pytest.raises(TorchstoneError, match="attention: is full, window:SIZE or blocks:SIZE"):
            mask_named(words)


def test_windows_compose_and_equal_terms_stand_once() -> None:
    assert (CAUSAL & Window(3) & Window(3)) == (CAUSAL & Window(3))
    assert (CAUSAL & Window(3)).names == {"causal", "window"}
    assert Window(7).size == 7 and Window(7).name == "window"
    assert CAUSAL.causal and not BIDIRECTIONAL.causal and (Mask() & CAUSAL & Window(2)).causal


def test_term_of_ones_own_is_lowered_like_any_other() -> None:
    class Even(Term):
        name = "even"

        def allow(self, q: Tokens, k: Tokens) -> torch.Tensor:
            return (k.index[:, None, :] % 2 == 0).expand(-1, q.index.shape[1], -1)

    tokens = Tokens.blank(6)
    mask = CAUSAL & Even()
    assert torch.equal(dense(lower(mask, tokens, tokens, "same"), 1, 6, 6), mask.allow(tokens, tokens))


@pytest.mark.parametrize("position", ["none", "rotary", "xpos", "alibi", "t5"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("columns", ["plain", "documents", "padding"])
def test_attention_in_blocks_equals_attention_at_once_forwards_and_backwards(
    float64: None, monkeypatch: pytest.MonkeyPatch, position: str, window: int | None, causal: bool, columns: str
) -> None:
    if position == "xpos" and not causal:
        pytest.skip("xpos has no bidirectional form")
    positions = Positions(64, causal)
    spec = resolve("attention", "softmax")(heads=4, kv_heads=2, window=window)
    site = Site(width=32, position_spec=resolve("position", position)(), positions=positions, causal=causal)
    module = initialise(spec.build(site), 0)
    initialise(positions, 0)
    more = {}
    if columns == "documents":
        more["start"] = torch.tensor([[0] * 9 + [9] * 14, [0] * 23])
    elif columns == "padding":
        more["valid"] = torch.arange(23)[None] < torch.tensor([[23], [11]])
    tokens = Tokens.blank(23, **more)
    x, weights = torch.randn(2, 23, 32), torch.randn(2, 23, 32)
    results = []
    for largest in (4096, 8):
        monkeypatch.setattr(masks, "_LARGEST", largest)
        monkeypatch.setattr(kernels.blockwise, "__kwdefaults__", {**kernels.blockwise.__kwdefaults__, "block": 7})
        ctx = Context(tokens, tokens, CAUSAL if causal else BIDIRECTIONAL, positions=positions)
        flags_say_it = window is None and columns == "plain" and position in ("none", "rotary", "xpos")
        low = ctx.lowered(window, module.position if module.biased else None)
        assert (low.mask_of is not None) == (largest == 8 and not flags_say_it)
        inside = x.clone().requires_grad_()
        y = module(inside, ctx)[0]
        wanted = [inside, *module.parameters(), *positions.parameters()]
        results.append([y, *torch.autograd.grad((y * weights).sum(), wanted)])
    for once, blocks in zip(*results, strict=True):
        torch.testing.assert_close(blocks, once, rtol=1e-10, atol=1e-10)


def test_attention_in_blocks_holds_no_square_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.seen = max(self.seen, tensor.numel())
            return out

    monkeypatch.setattr(masks, "_LARGEST", 64)
    monkeypatch.setattr(kernels.blockwise, "__kwdefaults__", {**kernels.blockwise.__kwdefaults__, "block": 16})
    module = initialise(resolve("attention", "softmax")(heads=1, window=8).build(Site(width=8)), 0)
    x = torch.randn(1, 256, 8, requires_grad=True)
    with Largest() as largest:
        module(x)[0].sum().backward()
    assert largest.seen < 256 * 256 / 4


def test_offset_of_a_key_is_added_to_its_scores(float64: None) -> None:
    module = initialise(resolve("attention", "softmax")(heads=2).build(Site(width=8)), 0)
    x = torch.randn(1, 5, 8)
    twice = Tokens(torch.tensor([[0, 1, 2, 3, 4, 4]]))
    # a key with offset log 2 counts as much as two of it
    with_offset = replace(Tokens.blank(5), offset=torch.tensor([[0.0, 0, 0, 0, 1]]) * torch.tensor(2.0).log())
    doubled = module(torch.cat([x, x[:, 4:]], 1), Context(twice, twice))[0][:, 5]
    torch.testing.assert_close(module(x, Context(with_offset, with_offset))[0][:, 4], doubled)

"""Decode state: what slots hold, and what can be done with a state besides decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchstone.errors import TorchstoneError
from torchstone.model.mask import CAUSAL, Window
from torchstone.model.site import initialise
from torchstone.model.state import Fixed, Growing, Packed, Recurrent, Ring, Slot, State
from torchstone.model.tokens import Tokens
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.ops.packed import pack, unpack
from torchstone.spec import validate


def model(**fields: Any) -> Transformer:
    body = {
        "width": 32,
        "depth": 2,
        "vocabulary": 61,
        "context": 64,
        "attention": {"heads": 4, "kv_heads": 2},
        **fields,
    }
    return initialise(validate(TransformerSpec, body).build(), 0)


def state_of(growth: Any, rows: int = 2, extent: int = 6, **fields: Any) -> State:
    return State({"a": (Slot("s", growth, (3,), **fields),)}, rows, extent)


def test_growing_slot_holds_one_entry_a_token() -> None:
    state = state_of("growing")
    assert isinstance(state.parts["a"], Growing)
    q, k, slots, relation = state.begin(Tokens.blank(2))
    assert relation == "same" and slots.tolist() == [[0, 1]] * 2 and q.index.tolist() == [[0, 1]] * 2
    new = torch.randn(2, 2, 3)
    (cache,) = state.parts["a"].write(slots, k.index.shape[1], s=new)
    assert torch.equal(cache, new)
    state.end()
    q, k, slots, relation = state.begin(Tokens.blank(1))
    assert relation == "last" and slots.tolist() == [[2]] * 2 and k.index.tolist() == [[0, 1, 2]]
    state.end()
    assert state.longest == 3 and state.uniform and state.length_B.tolist() == [3, 3]


def test_rows_of_different_lengths_write_to_slots_of_their_own() -> None:
    state = state_of("growing")
    state.begin(Tokens.blank(3, valid=torch.tensor([[True] * 3, [True, False, False]])))
    state.end()
    assert state.length_B.tolist() == [3, 1] and state.longest == 3 and not state.uniform
    q, k, slots, relation = state.begin(Tokens.blank(1))
    assert relation == "general" and slots.tolist() == [[3], [1]]
    assert CAUSAL.allow(q, k).tolist() == [[[True] * 4], [[True, True, False, False]]]


def test_static_state_keeps_its_shapes() -> None:
    state = State({"a": (Slot("s", "growing", (3,)),)}, 2, 6, static=True)
    for length in (2, 1, 1):
        _, k, _, relation = state.begin(Tokens.blank(length))
        assert k.index.shape == (1, 6) and relation == "general"
        state.end()


def test_state_that_is_full_says_so() -> None:
    state = state_of("growing", extent=4)
    state.begin(Tokens.blank(3))
    state.end()
    with pytest.raises(TorchstoneError, match="3 tokens and 2 more do not fit in an extent of 4"):
        state.begin(Tokens.blank(2))


@pytest.mark.parametrize("pieces", [[1] * 9, [3, 3, 3], [9], [5, 1, 1, 2], [1, 8]])
def test_ring_keeps_the_last_valid_tokens(pieces: list[int]) -> None:
    ring = state_of("ring", size=4).parts["a"]
    assert isinstance(ring, Ring)
    values, at = torch.arange(2 * 9 * 3, dtype=torch.float32).view(2, 9, 3), 0
    for n in pieces:
        q = Tokens(torch.arange(at, at + n)[None])
        (seen,), keys = ring.write(q, s=values[:, at : at + n])
        for i in range(n):  # each query finds its window among the keys, once each
            one = q.slice(i, i + 1)
            allowed = (CAUSAL & Window(4)).allow(one, keys)[0, 0]
            index = keys.index[0][allowed]
            assert sorted(index.tolist()) == list(range(max(0, at + i - 3), at + i + 1))
            assert torch.equal(seen[0][allowed], values[0, index])
        at += n


def test_ring_does_not_keep_padding() -> None:
    ring = state_of("ring", size=3).parts["a"]
    values = torch.arange(2 * 6 * 3, dtype=torch.float32).view(2, 6, 3)
    valid = torch.tensor([[True] * 6, [True, True, False, False, False, False]])
    ring.write(Tokens(torch.arange(6)[None], valid=valid), s=values)
    (seen,), keys = ring.write(Tokens(torch.tensor([[6], [2]])), s=torch.full((2, 1, 3), -1.0))
    allowed = (CAUSAL & Window(3)).allow(Tokens(torch.tensor([[6], [2]])), keys)[:, 0]
    assert sorted(keys.index[0][allowed[0]].tolist()) == [4, 5, 6]
    assert sorted(keys.index[1][allowed[1]].tolist()) == [0, 1, 2]
    assert torch.equal(seen[1][allowed[1] & (keys.index[1] < 2)], values[1, :2])


def test_recurrent_slot_is_replaced_in_place() -> None:
    part = state_of("recurrent").parts["a"]
    assert isinstance(part, Recurrent) and not part.rewinds
    memory = part.tensors["s"]
    part.set(s=torch.ones(2, 3))
    assert part.tensors["s"] is memory and memory.eq(1).all()


def test_fixed_slot_is_computed_once() -> None:
    part = state_of("fixed").parts["a"]
    assert isinstance(part, Fixed) and part.rewinds
    first = part.once(lambda: {"s": torch.ones(2)})
    assert part.once(lambda: {"s": torch.zeros(2)}) is first


def test_slots_of_one_part_grow_alike() -> None:
    with pytest.raises(TypeError, match="grow alike"):
        State({"a": (Slot("s", "growing", (1,)), Slot("z", "recurrent", (1,)))}, 1, 1)


def test_bytes_follow_from_the_slots() -> None:
    built = model()
    state = built.state(3, 10, dtype=torch.bfloat16)
    per_token = sum(slot.bytes(torch.bfloat16) for slots in built.state_spec().values() for slot in slots)
    assert per_token == 2 * 2 * 2 * 8 * 2  # layers, k and v, kv heads, head size, bytes
    assert state.bytes() == 3 * 10 * per_token
    assert Slot("s", "recurrent", (4, 5), dtype=torch.float32).bytes(torch.bfloat16) == 80


def test_state_spec_names_paths_and_head_axes() -> None:
    spec = model(encoder={"depth": 1}).state_spec()
    assert sorted(spec) == [f"decoder.layers.{i}.{name}" for i in range(2) for name in ("attention", "cross")]
    assert {slot.growth for slot in spec["decoder.layers.0.cross"]} == {"fixed"}
    assert all(slot.head_axis == 0 for slots in spec.values() for slot in slots)


def test_window_decodes_in_a_ring_of_its_size_whatever_the_extent() -> None:
    built = model(attention={"heads": 4, "window": 5})
    assert built.state(1, 64).bytes() == built.state(1, 8).bytes()


def test_truncating_a_ring_is_refused_with_the_way_out() -> None:
    state = model(attention={"heads": 4, "window": 5}).state(1, 8)
    assert not state.rewinds
    with pytest.raises(TorchstoneError) as caught:
        state.truncate(2)
    assert str(caught.value) == (
        "state of decoder.layers.0.attention is ring and cannot be truncated; "
        "use snapshot() before the tokens and restore() after"
    )


def test_truncating_never_lengthens() -> None:
    state = model().state(2, 8)
    state.begin(Tokens.blank(3, valid=torch.tensor([[True] * 3, [True, False, False]])))
    state.end()
    state.truncate(2)
    assert state.length_B.tolist() == [2, 1] and state.longest == 2 and not state.uniform
    state.truncate(torch.tensor([1, 5]))
    assert state.length_B.tolist() == [1, 1] and state.uniform


@pytest.mark.parametrize("window", [None, 3])
def test_copies_share_no_memory(window: int | None) -> None:
    built = model(attention={"heads": 4, "window": window})
    state = built.state(2, 8)
    built(torch.randint(0, 61, (2, 4)), state=state)
    for copy in (state.snapshot(), state.fork(torch.tensor([1, 0, 0]))):
        before = {path: {n: t.clone() for n, t in part.tensors.items()} for path, part in copy.parts.items()}
        lengths = copy.length_B.clone()
        built(torch.randint(0, 61, (2, 1)), state=state)
        assert torch.equal(copy.length_B, lengths)
        for path, part in copy.parts.items():
            assert all(torch.equal(part.tensors[name], value) for name, value in before[path].items())


def test_document_that_starts_while_decoding_is_a_document_of_its_own(float64: None) -> None:
    ids, start = torch.randint(0, 61, (1, 9)), torch.tensor([[0, 0, 0, 0, 4, 4, 4, 7, 7]])
    for window in (None, 3):
        built = model(position="learned", attention={"heads": 4, "window": window})
        whole = built(Tokens.of(ids, start=start)).hidden
        state, steps = built.state(1, 9), []
        steps.append(built(ids[:, :4], state=state).hidden)
        for t in range(4, 9):  # a token without a start belongs to the document of the one before
            given = {"start": start[:, t : t + 1]} if t in (4, 7) else {}
            steps.append(built(Tokens.of(ids[:, t : t + 1], **given), state=state).hidden)
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-8, atol=1e-8)


def test_encoder_has_no_state_and_memory_is_asked_for() -> None:
    with pytest.raises(TorchstoneError, match="an encoder has no decode state"):
        model(causal=False).state(1, 4)
    built = model(encoder={"depth": 1})
    with pytest.raises(TorchstoneError, match="memory: an encoder-decoder needs the encoder's inputs"):
        built(torch.zeros(1, 2, dtype=torch.int64))


def test_tokens_beyond_a_table_of_positions_are_refused_in_a_sentence() -> None:
    built = model(position="learned")
    with pytest.raises(TorchstoneError, match=r"65 tokens: position learned knows 64 positions"):
        built(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(TorchstoneError, match=r"65 tokens: position learned knows 64 positions"):
        built.state(1, 65)


def test_decoding_with_a_mask_that_is_not_causal_is_refused() -> None:
    from torchstone.model.mask import BIDIRECTIONAL

    built = model()
    with pytest.raises(TorchstoneError, match="needs a causal mask"):
        built(torch.zeros(1, 2, dtype=torch.int64), state=built.state(1, 4), mask=BIDIRECTIONAL)


@torch.no_grad()
def test_rows_that_are_joined_are_seen_together_at_their_own_positions(float64: None) -> None:
    built, ids_BT = model(), torch.randint(61, (3, 5))
    state = built.state(3, 5)
    lengths = torch.tensor([[5], [3], [5]])
    built(Tokens.of(ids_BT, valid=torch.arange(5) < lengths), state=state)
    one = State.joined([state], shared=1)
    assert one.longest == 5 + 2 + 4 and one.rows == 1 and one.reach == 5
    assert one.position_BS is not None and one.position_BS.tolist() == [[0, 1, 2, 3, 4, 1, 2, 1, 2, 3, 4]]
    for path, part in one.parts.items():
        k = state.parts[path].tensors["k"]
        assert torch.equal(part.tensors["k"][0], torch.cat([k[0], k[1, 1:3], k[2, 1:]]))
    again = State.joined([one, state], shared=1)
    assert again.longest == 11 + 4 + 2 + 4 and torch.equal(again.position_BS[0, :11], one.position_BS[0])  # type: ignore[index]


def test_a_state_that_keeps_no_tokens_apart_cannot_be_joined() -> None:
    for growth in ("ring", "recurrent", "fixed"):
        with pytest.raises(TorchstoneError, match=f"state of a is {growth} and cannot be joined; growing ones can"):
            State.joined([state_of(growth, size=4)])
    documents = state_of("growing")
    documents.begin(Tokens.blank(2, start=torch.tensor([[0, 1]])))
    documents.end()
    with pytest.raises(TorchstoneError, match="rows that hold several documents cannot be joined"):
        State.joined([documents])


def test_tokens_of_which_no_position_is_said_have_the_next_one() -> None:
    state = state_of("growing", rows=2, extent=8)
    state.begin(
        Tokens.blank(2, position=torch.tensor([[4, 5], [0, 1]]), valid=torch.tensor([[True] * 2, [True, False]]))
    )
    state.end()
    q, k, _, _ = state.begin(Tokens.blank(2))
    assert q.where.tolist() == [[6, 7], [1, 2]] and k.where.tolist() == [[4, 5, 6, 7], [0, 1, 2, 3]]
    state.end()
    assert state.reach == 8
    state.truncate(0)
    q, _, _, _ = state.begin(Tokens.blank(1))
    assert q.where.tolist() == [[0], [0]] and state.reach == 0


@torch.no_grad()
def test_offsets_of_keys_are_kept_beside_the_cache(float64: None) -> None:
    built, ids_BT = model(), torch.randint(61, (2, 6))
    tokens = Tokens.of(ids_BT, offset=torch.randn(2, 6))
    whole, state = built(tokens).logits, built.state(2, 6)
    for a, b in ((0, 3), (3, 4), (4, 6)):
        torch.testing.assert_close(built(tokens.slice(a, b), state=state).logits, whole[:, a:b])
    state = built.state(2, 6)
    built(tokens.slice(0, 3), state=state)
    fewer = Tokens.of(ids_BT, offset=torch.cat([tokens.offset[:, :3], torch.zeros(2, 3)], 1))  # type: ignore[index]
    torch.testing.assert_close(built(ids_BT[:, 3:], state=state).logits, built(fewer).logits[:, 3:])


def test_an_attention_without_scores_refuses_offsets() -> None:
    built = model(attention={"kind": "retention", "heads": 4})
    with pytest.raises(TorchstoneError, match="offset: attention retention of layer 0 adds no offsets to the scores"):
        built(Tokens.of(torch.zeros(1, 3, dtype=torch.int64), offset=torch.zeros(1, 3)))


# ---------------------------------------------------------------------------------------------------------- few bits


def test_a_cache_of_few_bits_holds_what_packing_makes_of_each_token() -> None:
    state = State(
        {"a": (Slot("k", "growing", (2, 9)), Slot("n", "growing", (3,), dtype=torch.int64))}, 2, 6, cache_bits=6
    )
    part = state.parts["a"]
    assert isinstance(part, Packed)
    slots, new = torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.randn(2, 3, 2, 9)
    k, n = part.write(slots, 6, k=new, n=torch.arange(18).view(2, 3, 3))
    wanted = unpack(pack(new.flatten(2), 6), 18, 6, torch.float32).view(2, 3, 2, 9)
    assert torch.equal(k[0, :3], wanted[0]) and torch.equal(k[1, 3:], wanted[1])
    assert torch.equal(n[1, 3:], torch.arange(9, 18).view(3, 3))  # whole numbers stay as they are
    assert state.bytes() == 2 * 6 * (2 * 12 + 3 * 8) == 2 * 6 * sum(s.bytes(torch.float32, 6) for s in state.slots["a"])


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_a_state_of_few_bits_forks_rewinds_and_grows_as_a_full_one(static: bool) -> None:
    m, ids = model(), torch.randint(61, (2, 9))
    state = m.state(2, 6, static=static, cache_bits=8)
    m(ids[:, :5], state=state)
    kept, forked = state.snapshot(), state.fork(torch.tensor([1, 0]))
    wanted = m(ids[:, 5:6], state=state).logits
    assert torch.equal(m(ids[:, 5:6], state=kept).logits, wanted)
    assert torch.equal(m(ids[[1, 0], 5:6], state=forked).logits, wanted[[1, 0]])
    state.truncate(5)
    assert torch.equal(m(ids[:, 5:6], state=state).logits, wanted)
    state.extend(9)
    kept = m.state(2, 9, static=static, cache_bits=8)
    m(ids[:, :6], state=kept)
    after = m(ids[:, 6:], state=state).logits
    torch.testing.assert_close(after, m(ids[:, 6:], state=kept).logits, rtol=0, atol=1e-5)
    full = m.state(2, 9)
    m(ids[:, :6], state=full)
    off = (after - m(ids[:, 6:], state=full).logits).abs().max()
    assert 0 < off < 0.02  # of logits of size 0.5


def test_rings_and_sums_are_held_in_full_whatever_the_bits_of_caches() -> None:
    for growth in ("ring", "recurrent"):
        fields = {"size": 4} if growth == "ring" else {}
        state = State({"a": (Slot("s", growth, (3,), **fields),)}, 2, 6, cache_bits=4)
        assert state.parts["a"].tensors["s"].dtype == torch.float32 and not isinstance(state.parts["a"], Packed)


@pytest.mark.parametrize("bits", [0, 3, 9, 16, 6.0])
def test_bits_that_there_are_none_of_are_refused(bits: Any) -> None:
    with pytest.raises(TorchstoneError, match=f"state.cache_bits: from 4 to 8, or None, got {bits}"):
        model().state(1, 4, cache_bits=bits)

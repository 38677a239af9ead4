"""The stack YOCO: what its card promises beyond the conformance suite."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import torchstone
from torchstone.errors import TorchstoneError
from torchstone.model.attention.shared_kv import SharedKVSpec
from torchstone.model.measure import measure
from torchstone.model.taps import Taps
from torchstone.model.tokens import Tokens

pytestmark = pytest.mark.usefixtures("float64")

GATED: dict[str, Any] = {"kind": "gated_retention", "heads": 4, "chunk": 4}
WINDOW: dict[str, Any] = {"kind": "softmax", "heads": 4, "window": 5}
BOTH = pytest.mark.parametrize("first", [GATED, WINDOW], ids=["gated_retention", "window"])


def fields(first: dict[str, Any] = GATED, **more: Any) -> dict[str, Any]:
    return {
        "width": 32,
        "depth": 4,
        "vocabulary": 50,
        "attention": {"kind": "softmax", "heads": 4, "kv_heads": 2},
        "ffn": {"kind": "swiglu", "hidden": 48},
        "residual": {"kind": "pre", "std": 0.3},
        "stack": {"kind": "yoco", "self_attention": first},
        **more,
    }


def drawn(rows: int, length: int) -> torch.Tensor:
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(length))


@BOTH
@pytest.mark.parametrize("length", [1, 3, 4, 8, 11])  # chunks of 4
def test_the_last_position_alone_gives_the_logits_of_the_full_pass(first: dict[str, Any], length: int) -> None:
    model, ids = torchstone.build(fields(first)), drawn(3, length)
    whole = model(ids).logits
    for state in (None, model.state(3, 16), model.state(3, 16, static=True)):
        early = model(ids, state=state, outputs="last")
        torch.testing.assert_close(early.logits[:, 0], whole[:, -1], rtol=1e-9, atol=1e-9)
        assert early.hidden.shape == (3, 1, 32)


@BOTH
def test_so_it_does_for_rows_of_different_lengths_and_the_state_goes_on(first: dict[str, Any]) -> None:
    model, ids, lengths_B = torchstone.build(fields(first)), drawn(3, 16), torch.tensor([9, 1, 6])
    whole, rows = model(ids).logits, torch.arange(3)
    valid = torch.arange(9)[None] < lengths_B[:, None]
    state = model.state(3, 16)
    early = model(Tokens.of(torch.where(valid, ids[:, :9], 7), valid=valid), state=state, outputs="last").logits
    torch.testing.assert_close(early[:, 0], whole[rows, lengths_B - 1], rtol=1e-9, atol=1e-9)
    for step in range(4):
        at_B = lengths_B + step
        early = model(ids.gather(1, at_B[:, None]), state=state, outputs="last").logits
        torch.testing.assert_close(early[:, 0], whole[rows, at_B], rtol=1e-9, atol=1e-9)


def test_so_it_does_for_packed_documents_and_padding_on_the_left() -> None:
    model, ids = torchstone.build(fields()), drawn(2, 9)
    for columns in (
        {"start": torch.tensor([[0] * 4 + [4] * 5, [0] * 8 + [8]])},
        {"valid": torch.arange(9)[None] >= torch.tensor([[3], [0]])},
    ):
        tokens = Tokens.of(ids, **columns)
        whole, early = model(tokens).logits, model(tokens, outputs="last").logits
        torch.testing.assert_close(early[:, 0], whole[:, -1], rtol=1e-9, atol=1e-9)


def test_only_the_last_position_goes_through_the_cross_decoder() -> None:
    model, ids = torchstone.build(fields()), drawn(2, 8)
    for outputs, tokens in (("last", 1), ("all", 8), ("none", 8)):
        taps = Taps(record=["decoder.layers.*.ffn.out", "decoder.keys_values.k"])
        model(ids, outputs=outputs, taps=taps)
        seen = [taps.seen[f"decoder.layers.{layer}.ffn.out"].shape[1] for layer in range(4)]
        assert seen == [8, 8, tokens, tokens]
        assert taps.seen["decoder.keys_values.k"].shape == (2, 2, 8, 8)  # of all tokens, whatever is asked for


@pytest.mark.parametrize("depth", [2, 4, 7])
@BOTH
def test_one_part_has_a_growing_state_whatever_the_depth(first: dict[str, Any], depth: int) -> None:
    model = torchstone.build(fields(first, depth=depth)).float()
    growing = {path: slots for path, slots in model.state_spec().items() if slots[0].growth == "growing"}
    assert list(growing) == ["decoder.keys_values"]
    assert [slot.name for slot in growing["decoder.keys_values"]] == ["k", "v"]
    assert measure(model, dtype=torch.bfloat16).state_bytes_per_token == 2 * 2 * 8 * 2  # k and v, heads, channels
    longer, shorter = (model.state(1, extent, torch.bfloat16).bytes() for extent in (200, 100))
    assert longer - shorter == 100 * 2 * 2 * 8 * 2


def test_a_plain_decoder_has_as_many_caches_as_layers() -> None:
    plain = torchstone.build({**fields(depth=6), "stack": "plain"})
    ours = torchstone.build(fields(depth=6))
    assert measure(plain).state_bytes_per_token == 6 * measure(ours).state_bytes_per_token


def test_layers_of_the_cross_decoder_have_no_keys_and_values() -> None:
    model, D, F = torchstone.build(fields()), 32, 48
    for layer in model.decoder.layers[2:]:
        assert sum(p.numel() for p in layer.parameters()) == 2 * D * D + 3 * D * F + 2 * D
    assert sum(p.numel() for p in model.decoder.keys_values.parameters()) == D + 2 * D * 2 * 8


def test_a_window_as_long_as_the_text_is_full_attention() -> None:
    """Parameters are keyed by their names, so the first layer is that of a plain decoder."""
    ids, found = drawn(2, 9), []
    for stack in ({"kind": "yoco", "self_attention": {"heads": 4, "kv_heads": 2, "window": 9}}, "plain"):
        taps = Taps(record=["decoder.layers.0.x"])
        torchstone.build(fields(stack=stack))(ids, taps=taps)
        found.append(taps.seen["decoder.layers.0.x"])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_a_mask_must_suit_the_attention_of_every_layer() -> None:
    from torchstone.model.mask import BIDIRECTIONAL, CAUSAL, Window

    for mask, sentence in (
        (BIDIRECTIONAL, "has no bidirectional form"),
        (CAUSAL & Window(3), "cannot honour 'window'"),
    ):
        with pytest.raises(TorchstoneError, match=f"attention gated_retention .*{sentence}"):
            torchstone.build(fields())(drawn(1, 5), mask=mask)
    model, ids = torchstone.build(fields(WINDOW)), drawn(1, 9)
    narrow = model(ids, mask=CAUSAL & Window(3))
    early = model(ids, mask=CAUSAL & Window(3), outputs="last")
    torch.testing.assert_close(early.logits[:, 0], narrow.logits[:, -1], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(narrow.logits[:, -1], model(ids).logits[:, -1])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"stack": {"kind": "yoco", "self_attention": {"kind": "softmax", "heads": 4}}},
            "stack.self_attention: the decode state of softmax with these fields grows with the text",
        ),
        (
            {"stack": {"kind": "yoco", "self_attention": {"kind": "gated_retention", "heads": 5}}},
            "stack.self_attention: attention.heads: 5 heads do not divide width 32",
        ),
        (
            {"stack": {"kind": "yoco", "self_attention": {"kind": "shared_kv", "heads": 4}}},
            "stack.self_attention: attention shared_kv needs keys_values of another layer; only a stack can place it",
        ),
        ({"attention": {"kind": "shared_kv"}, "stack": "plain"}, "attention shared_kv needs keys_values"),
        (
            {"position": "alibi"},
            "stack.self_attention: attention gated_retention cannot use position alibi: it has no use for a bias",
        ),
        ({"attention": {"kind": "retention", "heads": 4}}, "must be softmax, not retention"),
        (
            {"attention": {"kind": "softmax", "heads": 4, "window": 8}},
            "stack yoco: attention.window: layers of the cross",
        ),
        ({"causal": False}, "stack yoco: its layers are causal; it has no encoder, alone or beside a decoder"),
        ({"encoder": {"depth": 1}}, "stack yoco: its layers are causal; it has no encoder, alone or beside a decoder"),
        ({"depth": 1}, "stack yoco: each of its two decoders needs a layer, and depth is 1"),
        (
            {"stack": {"kind": "yoco", "self_layers": 4}},
            "each of its two decoders needs a layer, and stack.self_layers is 4 and depth is 4",
        ),
        (
            {"layers": [{"at": [0], "attention": {"heads": 2}}]},
            "stack yoco: attention cannot differ by layer; that of the first layers is stack.self_attention",
        ),
        (
            {"layers": [{"at": [3], "position": {"base": 500.0}}]},
            "stack yoco: position cannot differ by layer from layer 2 on, as keys are turned once for all",
        ),
    ],
)
def test_what_it_cannot_be_is_refused_in_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TorchstoneError, match=re.escape(sentence)):
        torchstone.build(fields(**changes))


def test_the_consumer_alone_is_refused() -> None:
    with pytest.raises(TorchstoneError, match="attention shared_kv needs keys_values of another layer"):
        torchstone.build(SharedKVSpec(heads=4), width=32)


def test_a_patch_of_other_parts_reaches_both_decoders() -> None:
    model = torchstone.build(fields(layers=[{"at": [0, 3], "ffn": {"hidden": 96}}]))
    assert [layer.ffn.down.weight.shape[1] for layer in model.decoder.layers] == [96, 48, 48, 96]

"""Multi-head latent attention as a part: what its card promises beyond the conformance suite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import torchstone
from torchstone.errors import TorchstoneError
from torchstone.model.attention.mla import LatentAttention
from torchstone.model.linear import LinearSpec
from torchstone.model.measure import measure
from torchstone.model.taps import Taps
from torchstone.model.tokens import Tokens

MLA: dict[str, Any] = {"kind": "mla", "heads": 4, "kv_latent": 24, "nope_dim": 8, "rope_dim": 6, "v_dim": 10}
FIELDS: dict[str, Any] = {
    "width": 32, "depth": 3, "vocabulary": 50, "attention": MLA,
    "position": {"kind": "rotary", "interleaved": True},
}  # fmt: skip


def model(**attention: Any) -> Any:
    made = torchstone.build({**FIELDS, "attention": {**MLA, **attention}})
    with torch.no_grad():
        for parameter in made.parameters():  # far from nearly equal scores
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return made


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(2))


def attentions(made: Any) -> list[LatentAttention]:
    return [layer.attention for layer in made.decoder.layers]


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------------------------- forms and cache


@pytest.mark.parametrize("q_latent", [None, 12])
def test_absorbed_decoding_equals_naive_decoding_at_every_position(q_latent: int | None) -> None:
    naive, absorbed = model(form="naive", q_latent=q_latent), model(form="absorbed", q_latent=q_latent)
    a, b, tokens = naive.state(2, 20), absorbed.state(2, 20), ids(2, 20)
    for t in range(20):
        one, other = (m(tokens[:, t : t + 1], state=s).logits for m, s in ((naive, a), (absorbed, b)))
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()


@pytest.mark.usefixtures("float64")
def test_absorbed_and_naive_have_equal_gradients() -> None:
    found = []
    for form in ("naive", "absorbed"):
        made = model(form=form, q_latent=12)
        made(ids(2, 9)).logits.square().mean().backward()
        found.append({name: parameter.grad for name, parameter in made.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 4, 16])
def test_a_token_caches_the_latent_and_one_rotated_key_whatever_the_heads(heads: int) -> None:
    made = model(heads=heads)
    assert made.state(3, 7).bytes() == 3 * 7 * 3 * (24 + 6) * 4  # rows, tokens, layers, elements, float32
    assert measure(made).state_bytes_per_token == 3 * (24 + 6) * 4


def test_auto_trains_naively_and_decodes_absorbed_up_to_where_that_multiplies_less() -> None:
    layer, state = attentions(model())[0], object()
    assert not layer._absorbs(1, None)
    # a new token costs 2 * 24 - 8 - 10 = 30 more a cached one, and a cached one 24 * 18 = 432 to project: 14.4
    assert layer._absorbs(14, state) and not layer._absorbs(15, state)  # type: ignore[arg-type]
    published = attentions(model(kv_latent=512, nope_dim=128, rope_dim=64, v_dim=128))[0]
    assert published._absorbs(170, state) and not published._absorbs(171, state)  # type: ignore[arg-type]
    narrow = attentions(model(kv_latent=8))[0]
    assert narrow._absorbs(10**6, state)  # type: ignore[arg-type]


def test_decoding_costs_what_its_form_costs() -> None:
    assert attentions(model())[0].flops(100) == 2 * 4 * 100 * (8 + 6 + 10)
    assert attentions(model())[0].decode_flops(100) == 2 * 4 * 100 * (24 + 6 + 24)
    # naive: 99 cached tokens' keys and values are projected again
    assert attentions(model(form="naive"))[0].decode_flops(100) == 2 * 4 * (100 * 24 + 99 * 24 * 18)


def test_a_long_prompt_goes_block_by_block_in_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchstone.model import mask

    tokens, start = ids(1, 40), torch.tensor([[0] * 17 + [17] * 23])
    for form in ("naive", "absorbed"):
        made = model(form=form)
        whole = made(Tokens.of(tokens, start=start)).logits
        with monkeypatch.context() as patch:
            patch.setattr(mask, "_LARGEST", 16)
            torch.testing.assert_close(made(Tokens.of(tokens, start=start)).logits, whole, rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- identities


@pytest.mark.usefixtures("float64")
def test_a_latent_of_full_rank_without_rotation_is_multi_head_attention() -> None:
    sizes = {"heads": 4, "kv_latent": 64, "nope_dim": 8, "rope_dim": 0, "v_dim": 8}
    for form in ("naive", "absorbed"):
        latent = torchstone.build({**FIELDS, "position": "none", "attention": {"kind": "mla", **sizes, "form": form}})
        plain = torchstone.build({**FIELDS, "position": "none", "attention": {"kind": "softmax", "heads": 4}})
        for mine, other in zip(latent.decoder.layers, plain.decoder.layers, strict=True):
            mine.attention.kv_norm = nn.Identity()
            with torch.no_grad():
                mine.attention.kv_up.weight.copy_(torch.eye(64))
                mine.attention.qkv.weight.copy_(torch.randn(96, 32))
                other.attention.qkv.weight.copy_(mine.attention.qkv.weight)
                other.attention.out.weight.copy_(mine.attention.out.weight)
                for parameter, copied in zip(mine.ffn.parameters(), other.ffn.parameters(), strict=True):
                    copied.copy_(parameter)
        tokens = ids(2, 13)
        torch.testing.assert_close(latent(tokens).hidden, plain(tokens).hidden, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_shifting_all_positions_changes_nothing_and_shifting_one_changes_its_rotated_part_alone() -> None:
    made, tokens, where = model(), ids(2, 13), torch.arange(13)[None]
    plain = made(Tokens.of(tokens)).logits
    torch.testing.assert_close(made(Tokens.of(tokens, position=where + 29)).logits, plain, rtol=1e-10, atol=1e-10)
    moved = where + 7 * (where == 6)
    assert not torch.allclose(made(Tokens.of(tokens, position=moved)).logits, plain, atol=1e-4)
    with torch.no_grad():
        for layer in attentions(made):  # without rotated keys only the part that sees no position is left
            layer.qkv.weight[-6:] = 0
    assert torch.allclose(
        made(Tokens.of(tokens, position=moved)).logits, made(Tokens.of(tokens)).logits, rtol=0, atol=1e-12
    )


def test_probabilities_can_be_watched_and_replaced_in_both_forms() -> None:
    seen = {}
    for form in ("naive", "absorbed"):
        taps = Taps(
            record=["*.attention.probs", "*.attention.latent"], replace={"*.layers.2.attention.q": torch.zeros_like}
        )
        made, state = model(form=form), None
        if form == "absorbed":
            state = made.state(2, 6)
        made(ids(2, 6), taps=taps, state=state)
        seen[form] = taps.seen
        assert taps.seen["decoder.layers.0.attention.latent"].shape == (2, 6, 24)
        uniform = torch.ones(6, 6).tril() / torch.arange(1.0, 7.0)[:, None]
        torch.testing.assert_close(taps.seen["decoder.layers.2.attention.probs"], uniform.expand(2, 4, 6, 6))
    for name, value in seen["naive"].items():
        torch.testing.assert_close(value, seen["absorbed"][name], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------- projections of other kinds


class BentSpec(LinearSpec):
    """A projection that is not linear in its input."""

    kind: ClassVar[str] = "bent"
    offered: ClassVar[bool] = False
    exact: ClassVar[bool] = False

    def input(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)


def test_projections_that_are_not_linear_are_never_absorbed() -> None:
    bent = torchstone.build({**FIELDS, "linear": "bent"})
    tokens, state = ids(2, 9), bent.state(2, 9)
    steps = torch.cat([bent(tokens[:, t : t + 1], state=state).logits for t in range(9)], 1)
    torch.testing.assert_close(steps, bent(tokens).logits, rtol=0, atol=1e-5)
    with pytest.raises(TorchstoneError) as caught:
        torchstone.build({**FIELDS, "attention": {**MLA, "form": "absorbed"}, "linear": "bent"})
    assert "attention.form: absorbed needs projections that are linear, and bent ones are not" in str(caught.value)


def test_an_update_of_low_rank_is_absorbed_with_its_weight() -> None:
    lora = {**FIELDS, "linear": {"kind": "lora", "rank": 3, "targets": ["k", "v"]}}
    found = []
    for form in ("naive", "absorbed"):
        made = torchstone.build({**lora, "attention": {**MLA, "form": form}})
        with torch.no_grad():
            for layer in attentions(made):
                layer.kv_up.lora_b.copy_(torch.linspace(-1, 1, layer.kv_up.lora_b.numel()).view_as(layer.kv_up.lora_b))
        found.append(made(ids(2, 9)).logits)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


def test_a_projection_that_somebody_has_wrapped_is_used_as_it_is() -> None:
    made, tokens = model(), ids(2, 9)
    for layer in attentions(made):
        layer.kv_up = nn.Sequential(layer.kv_up, nn.Hardtanh(-0.5, 0.5))
    state = made.state(2, 9)
    steps = torch.cat([made(tokens[:, t : t + 1], state=state).logits for t in range(9)], 1)
    torch.testing.assert_close(steps, made(tokens).logits, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("attention", "position", "sentence"),
    [
        ({"rope_dim": 0}, "rotary", "attention.rope_dim: 0 leaves position rotary nothing to rotate"),
        ({"rope_dim": 3}, "rotary", "rotary turns pairs of channels, and 1 of a head of 3 is 3, not even"),
        ({"kv_latent": 0}, "rotary", "kv_latent"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(attention: dict[str, Any], position: str, sentence: str) -> None:
    with pytest.raises(TorchstoneError, match=sentence):
        torchstone.build({**FIELDS, "attention": {**MLA, **attention}, "position": position})


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(TorchstoneError, match="attention mla cannot attend to an encoder"):
        torchstone.build({**FIELDS, "encoder": {"depth": 1}})


# ------------------------------------------------------------------------------------------------ a cache of few bits


@torch.no_grad()
@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.05), (6, 0.2), (4, 0.8)])
def test_decoding_from_a_cache_of_few_bits_stays_near_the_full_one(bits: int, tolerance: float) -> None:
    """The bound is on the root mean square of the difference, in deviations of the logits."""
    made, tokens = model(), ids(4, 40)
    whole = made(tokens).logits
    state = made.state(4, 40, cache_bits=bits)
    steps = [made(tokens[:, :20], state=state).logits]
    steps += [made(tokens[:, t : t + 1], state=state).logits for t in range(20, 40)]
    off = float((torch.cat(steps, 1) - whole).square().mean().sqrt() / whole.std())
    assert tolerance / 10 < off < tolerance
    assert state.bytes() == 4 * 40 * 3 * 2 * bits * 2  # rows, tokens, layers, bytes of 16, two groups for 30 elements

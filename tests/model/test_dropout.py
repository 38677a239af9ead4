"""Dropout and stochastic depth are pure functions of a key, a name and a place."""

from __future__ import annotations

from typing import Any

import torch

from torchstone.keys import Key
from torchstone.model.context import Context
from torchstone.model.site import initialise
from torchstone.model.taps import Taps
from torchstone.model.tokens import Tokens
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.spec import validate

IDS = torch.arange(40).view(4, 10)


def model(**fields: Any) -> Transformer:
    body = {"width": 32, "depth": 3, "vocabulary": 61, "context": 64, "attention": {"heads": 4}, **fields}
    return initialise(validate(TransformerSpec, body).build(), 0)


def context(seed: int = 0, **fields: Any) -> Context:
    tokens = Tokens.blank(4)
    return Context(tokens, tokens, key=Key(seed).tensor(), **fields)


def test_same_key_drops_the_same_and_another_key_others() -> None:
    built = model(dropout=0.2)
    a, b, c = (built(IDS, key=Key(seed).tensor()).hidden for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_nothing_is_dropped_without_a_key() -> None:
    built, plain = model(dropout=0.9, drop_path=0.9, attention={"heads": 4, "dropout": 0.9}), model()
    assert torch.equal(built(IDS).hidden, plain(IDS).hidden)
    assert torch.equal(built.train()(IDS).hidden, built.eval()(IDS).hidden)


def test_global_random_state_plays_no_part() -> None:
    built, key = model(dropout=0.2), Key(1).tensor()
    torch.manual_seed(0)
    before, state = built(IDS, key=key).hidden, torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(built(IDS, key=key).hidden, before)
    torch.manual_seed(0)
    built(IDS, key=key)
    assert torch.equal(torch.get_rng_state(), state)


def test_mean_is_kept_and_the_rate_is_met() -> None:
    x, rate = torch.ones(400, 500), 0.3
    y = context().drop(x, rate, "x")
    kept = (y != 0).double().mean().item()
    assert abs(kept - (1 - rate)) < 4 * (rate * (1 - rate) / x.numel()) ** 0.5
    assert torch.equal(y[y != 0].unique(), torch.tensor([1 / (1 - rate)]))
    assert abs(y.double().mean().item() - 1) < 0.01


def test_names_places_and_layers_have_masks_of_their_own() -> None:
    ctx, x = context(), torch.ones(50, 40)
    layers = [ctx.inside(f"layers.{i}") for i in range(3)]
    masks = [layer.inside(part).drop(x, 0.5, name) for layer in layers for part in ("a", "b") for name in ("x", "y")]
    for i, a in enumerate(masks):
        for b in masks[i + 1 :]:
            assert 0.4 < (a == b).double().mean() < 0.6  # independent coins agree half the time


def test_listening_changes_no_mask() -> None:
    built, key = model(dropout=0.2, drop_path=0.5), Key(1).tensor()
    heard = built(IDS, key=key, taps=Taps(record=["*.ffn.out", "*.x"])).hidden
    assert torch.equal(heard, built(IDS, key=key).hidden)


def test_rows_are_dropped_whole_by_stochastic_depth() -> None:
    x = torch.randn(200, 3, 5)
    y = context().drop(x, 0.4, "x", per_row=True)
    dropped = (y == 0).flatten(1).all(1)
    assert 50 < dropped.sum() < 110
    torch.testing.assert_close(y[~dropped], x[~dropped] / 0.6)


def test_stochastic_depth_grows_from_nothing_to_its_rate() -> None:
    rates = [layer.ffn_residual.drop_path for layer in model(drop_path=0.4, depth=5).decoder.layers]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4]))


def test_dropped_probabilities_keep_their_mean_and_need_no_tap() -> None:
    built = model(attention={"heads": 4, "dropout": 0.5}, depth=1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(5)
    plain = built(IDS).hidden
    many = torch.stack([built(IDS, key=Key(seed).tensor()).hidden for seed in range(40)])
    assert not torch.equal(many[0], plain)
    taps = Taps(record=["*.probs"])
    built(IDS, key=Key(0).tensor(), taps=taps)
    probs = taps.seen["decoder.layers.0.attention.probs"]
    torch.testing.assert_close(probs.sum(-1), torch.ones(4, 4, 10))  # the tap is before dropout


def test_dropout_in_bfloat16_keeps_the_dtype() -> None:
    assert context().drop(torch.ones(3, 4, dtype=torch.bfloat16), 0.5, "x").dtype == torch.bfloat16

"""Pseudo-masked language modelling: one pass is many passes, nothing leaks, blocks as drawn, packed documents apart."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tiny
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.mask import BIDIRECTIONAL, Mask, Roles
from torchstone.model.site import initialise
from torchstone.model.tokens import Tokens
from torchstone.model.transformer import Transformer, TransformerSpec
from torchstone.objectives import Batch, Facts, tokens_of
from torchstone.objectives.pseudo_masked import PseudoMasked, PseudoMaskedSpec, draw_blocks
from torchstone.recipe import load_recipe
from torchstone.spec import validate
from torchstone.train import train

V, T, MASK, PAD, SEP = 30, 20, 0, 1, 2
FACTS = Facts(V, MASK, PAD, SEP)
IDS = torch.randint(3, V, (3, T), generator=Key(0).generator())


def model(**fields: Any) -> Transformer:
    spec = {"width": 16, "depth": 2, "vocabulary": V, "context": 64, "causal": False, "attention": {"heads": 2}}
    spec |= {"position": {"kind": "t5", "buckets": 8}, "residual": {"kind": "pre", "std": 0.4}, "head": "lm", **fields}
    return initialise(validate(TransformerSpec, spec).build(), 0).eval()


def objective(**fields: Any) -> PseudoMasked:
    return PseudoMaskedSpec(rate=0.3, longest=4, **fields).build(FACTS)  # type: ignore[return-value]


def logits(made: Transformer, batch: Batch) -> torch.Tensor:
    found = made(tokens_of(batch, batch["pseudo"]), mask=Mask((Roles(),))).logits
    assert found is not None
    return found


def kept(batch: Batch, row: int, columns: torch.Tensor) -> Tokens:
    """A row's tokens in these columns, for a forward of their own."""
    names = {"role": "role", "position": "position", "valid": "valid", "start": "start"}
    more = {name: batch[name][row : row + 1, columns] for name in names if name in batch}
    return Tokens.of(batch["pseudo"][row : row + 1, columns], **more)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("position", [{"kind": "t5", "buckets": 8}, "learned", "rotary"], ids=str)
@torch.no_grad()
def test_one_pass_is_many_passes(packed: bool, position: Any) -> None:
    made, plain = model(position=position), {"ids": IDS}
    if packed:
        plain["start"] = torch.where(torch.arange(T) < 9, 0, 9).expand(3, -1).contiguous()
    batch = objective().prepare(plain, Key(1))
    whole = logits(made, batch)
    for row in range(3):
        role = batch["role"][row]
        there = batch["valid"][row]
        text = torch.arange(len(role)) < T
        alone = made(kept(batch, row, text.nonzero()[:, 0]), mask=BIDIRECTIONAL).logits[0]
        torch.testing.assert_close(whole[row, :T], alone, rtol=0, atol=1e-5)
        steps = int(role.max())
        assert steps >= 3
        for t in range(1, steps + 1):
            before = text | (there & ~text & (role > 0) & (role < t))
            columns = (before | (role == -t)).nonzero()[:, 0]
            only = made(kept(batch, row, columns), mask=Mask((Roles(),))).logits[0]
            own = role[columns] == -t
            torch.testing.assert_close(whole[row][columns][own], only[own], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_masked_token_tells_nothing_before_its_turn() -> None:
    made, batch = model(), objective().prepare({"ids": IDS[:1]}, Key(2))
    plain, role = logits(made, batch)[0], batch["role"][0]
    steps = int(role.max())
    for t in range(1, steps + 1):
        column = int((role == t).nonzero()[0])
        changed = {**batch, "pseudo": batch["pseudo"].clone()}
        changed["pseudo"][0, column] = (changed["pseudo"][0, column] - 3 + 1) % (V - 3) + 3
        moved = (logits(made, changed)[0] - plain).abs().amax(-1) > 1e-6
        stand_ins = (role < 0) & (-role <= t)
        assert not moved[:T].any() and not moved[stand_ins].any()
        assert moved[(role < 0) & (-role > t)].all()


@torch.no_grad()
def test_the_order_of_columns_does_not_matter() -> None:
    made, batch = model(), objective().prepare({"ids": IDS[:1]}, Key(3))
    order = torch.cat([torch.arange(T), T + torch.randperm(batch["role"].shape[1] - T, generator=Key(4).generator())])
    shuffled = {name: value[:, order] if value.shape == batch["role"].shape else value for name, value in batch.items()}
    torch.testing.assert_close(logits(made, shuffled), logits(made, batch)[:, order], rtol=0, atol=1e-5)


def test_targets_single_blocks_left_to_right_are_a_causal_decoder() -> None:
    """Source 0, target tokens t, stand-ins -t: a stand-in sees the source, t - 1 tokens and itself."""
    role = torch.tensor([[0, 0, 0, 1, 2, 3, -1, -2, -3]])
    seen = Roles().allow(Tokens.blank(9, role=role), Tokens.blank(9, role=role))[0].long()
    assert seen[3:6].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0, 0]]
    assert seen[6:].tolist() == [[1, 1, 1, 0, 0, 0, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0, 1, 0], [1, 1, 1, 1, 1, 0, 0, 0, 1]]
    assert seen[:3, 3:].sum() == 0 and seen[:3, :3].all()


def test_blocks_have_the_sizes_that_were_asked_for() -> None:
    spec, rng, shares, lengths = PseudoMaskedSpec(), np.random.default_rng(0), [], Counter[int]()
    free = np.ones(200, bool)
    for _ in range(800):
        blocks = draw_blocks(free, np.zeros(200), spec, rng, 30.0)
        places = [place for first, last in blocks for place in range(first, last)]
        assert len(places) == len(set(places))
        shares.append(len(places) / 200)
        lengths.update(last - first for first, last in blocks)
    assert 0.15 <= np.mean(shares) <= 0.17 and min(shares) >= 0.15
    total = sum(lengths.values())
    assert abs(lengths[1] / total - 0.6) < 0.03 and set(lengths) == {1, 2, 3, 4, 5, 6}


def test_special_tokens_padding_and_borders_of_documents_are_spared() -> None:
    ids = IDS.clone()
    ids[:, 4] = SEP
    start = torch.where(torch.arange(T) < 10, 0, 10).expand(3, -1).contiguous()
    valid = torch.arange(T) < torch.tensor([[T], [15], [12]])
    for step in range(30):
        batch = objective(blocks=1.0).prepare({"ids": ids, "start": start, "valid": valid}, Key(step))
        masked = batch["targets"][:, :T] >= 0
        assert not masked[:, 4].any() and not (masked & ~valid).any()
        for row in range(3):
            for t in range(1, int(batch["role"][row].max()) + 1):
                own = batch["role"][row] == t
                assert len(set(batch["start"][row, own].tolist())) == 1
        assert torch.equal(batch["targets"][:, :T][masked].sort().values,
                           batch["targets"][:, T:][batch["targets"][:, T:] >= 0].sort().values)  # fmt: skip


def test_the_loss_is_two_cross_entropies_over_the_masked_tokens() -> None:
    made, own = model(), objective(ae=0.5, par=2.0)
    batch = own.prepare({"ids": IDS}, Key(5))
    found, scores = own(made, batch, None), logits(made, batch)
    counts = own.counts(batch)
    assert counts["ae"] == counts["par"] == (batch["targets"][:, :T] >= 0).sum() and counts["tokens"] == IDS.numel()
    for name, part in (("ae", slice(0, T)), ("par", slice(T, None))):
        nll = F.cross_entropy(scores[:, part].flatten(0, 1), batch["targets"][:, part].flatten(), reduction="sum")
        torch.testing.assert_close(found.terms[name].total, nll)
    assert (found.terms["ae"].weight, found.terms["par"].weight) == (0.5, 2.0)
    assert set(objective(par=0.0)(made, batch, None).terms) == {"ae"}


@pytest.mark.slow
def test_at_first_it_is_two_logarithms_of_the_vocabulary_and_it_learns(tmp_path: Path) -> None:
    sections = {**tiny.MASKED, "objective": {"kind": "pseudo_masked"}}
    settings = {"trainer": {"steps": 60, "batch": 8, "save_every": 60}, "evaluate": {"every": 60, "blocks": 8}}
    recipe = tiny.recipe(tmp_path, **sections, **settings, optimizer={"lr": 0.02})
    recipe["model"]["residual"] = {"kind": "pre", "std": 0.02}
    rows = train(recipe, out=tmp_path / "run", quiet=True).metrics()
    first, last = (row["valid_loss"] for row in rows if "valid_loss" in row)
    assert first == pytest.approx(2 * math.log(259), rel=0.05) and last < 0.8 * first


@torch.no_grad()
def test_learned_positions_reach_as_far_as_the_text() -> None:
    made = objective()
    batch = made.prepare({"ids": IDS}, Key(0))
    assert batch["pseudo"].shape[1] > T
    exact = model(position="learned", context=T)
    assert logits(exact, batch).shape[1] == batch["pseudo"].shape[1]
    with pytest.raises(TorchstoneError, match=f"{T} tokens: position learned knows {T - 1} positions"):
        logits(model(position="learned", context=T - 1), batch)


def test_what_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    for fields, message in (
        ({"rate": 0.6}, "objective.rate: .*less than or equal to 0.5"),
        ({"ae": 0, "par": 0}, "ae and par are both 0"),
    ):
        with pytest.raises(TorchstoneError, match=message):
            load_recipe({"objective": {"kind": "pseudo_masked", **fields}})
    with pytest.raises(TorchstoneError, match="has no mask token"):
        PseudoMaskedSpec().build(Facts(V))
    for facts, fields in ((Facts(V, 0, None, 2), {}), (Facts(V, 0, 2, 2), {}), (FACTS, {"stand_in": V})):
        with pytest.raises(TorchstoneError, match="needs a second token beside the mask token; set stand_in"):
            PseudoMaskedSpec(**fields).build(facts)
    with pytest.raises(TorchstoneError, match="needs causal: false"):
        objective().check(model(causal=True))
    retention = tiny.recipe(tmp_path, **{**tiny.MASKED, "objective": {"kind": "pseudo_masked"}})
    retention["model"] |= {"attention": {"kind": "dilated", "heads": 2, "segments": [4], "dilations": [1]}}
    with pytest.raises(TorchstoneError, match="role"):
        train(retention, out=tmp_path / "refused", quiet=True)

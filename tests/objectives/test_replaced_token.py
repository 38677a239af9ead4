"""Replaced-token detection: each loss by hand, what gets whose gradient, where tokens come from, sampling with and
without dropout, the shared embedding, trainings that stop and go on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare

import tiny
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.mask import BIDIRECTIONAL
from torchstone.model.site import initialise
from torchstone.model.transformer import TransformerSpec
from torchstone.objectives import Batch, Facts, tokens_of
from torchstone.objectives.replaced_token import ReplacedToken, ReplacedTokenSpec
from torchstone.spec import validate
from torchstone.train import train
from torchstone.train.checkpoint import load_tensors

V, T = 30, 12
IDS = torch.randint(3, V, (4, T), generator=Key(0).generator())
HEAD = {"kind": "token_classification", "classes": 1, "transform": False}
SECTIONS: dict[str, Any] = {
    "model": {**tiny.MODEL, "depth": 2, "causal": False, "head": HEAD},
    "objective": {"kind": "replaced_token", "generator": {"depth": 1}, "rate": 0.4},
}


def spec(**fields: Any) -> TransformerSpec:
    body = {"width": 16, "depth": 3, "vocabulary": V, "context": 32, "causal": False, "attention": {"heads": 2}}
    body |= {"residual": {"kind": "pre", "std": 0.4}, "position": "learned", "head": HEAD, **fields}
    return validate(TransformerSpec, body)


def pair(seed: int = 0, model: dict[str, Any] | None = None, **fields: Any) -> tuple[Any, ReplacedToken]:
    of = spec(**(model or {}))
    torch.manual_seed(seed)
    body = {"generator": {"depth": 1}, "rate": 0.4, **fields}
    objective: Any = validate(ReplacedTokenSpec, body).build(Facts(V, 0, 1, 2, model=of))
    return initialise(of.build(), seed), objective


def prepared(objective: ReplacedToken, key: int = 1) -> Batch:
    return objective.prepare({"ids": IDS}, Key(key))


def generated(model: Any, objective: ReplacedToken, batch: Batch) -> torch.Tensor:
    """Logits of the generator (N, V) at masked places."""
    objective.generator.embedding.lend(model.embedding)  # type: ignore[union-attr, operator]
    out = objective.generator(tokens_of(batch, batch["masked"]), mask=BIDIRECTIONAL)  # type: ignore[misc]
    return out.logits[batch["targets"] >= 0]


def test_the_three_losses_are_those_of_a_plain_computation() -> None:
    model, objective = pair()
    batch = prepared(objective)
    chosen = batch["targets"] >= 0
    assert chosen.sum() > 10 and torch.equal(batch["masked"] == 0, chosen)
    found = objective(model, batch, None)
    logits = generated(model, objective, batch)
    torch.testing.assert_close(found.terms["generator"].total, F.cross_entropy(logits, IDS[chosen], reduction="sum"))
    drawn = objective._corrupted(model, batch, None)[1]
    corrupted = IDS.clone()
    corrupted[chosen] = drawn
    out = model(corrupted, mask=BIDIRECTIONAL)
    original = (corrupted == IDS).float()
    assert 0 < (original[chosen] == 0).sum() <= chosen.sum() and original[~chosen].all()
    wanted = F.binary_cross_entropy(out.logits[..., 0].sigmoid(), original, reduction="sum")
    torch.testing.assert_close(found.terms["detection"].total, wanted)
    scores = out.hidden[chosen] @ model.embedding.weight.T + objective.bias
    torch.testing.assert_close(found.terms["correction"].total, F.cross_entropy(scores, IDS[chosen], reduction="sum"))
    assert [found.terms[name].weight for name in ("generator", "detection", "correction")] == [1.0, 50.0, 1.0]
    counts = objective.counts(batch)
    assert counts["tokens"] == IDS.numel() and counts["targets"] == chosen.sum()
    assert found.metrics["replaced"] == ((corrupted != IDS).sum(), chosen.sum())


def test_tokens_are_drawn_from_the_generators_predictions() -> None:
    model, objective = pair()
    ids = IDS[:1].expand(20_000, -1)
    batch = {"ids": ids, "masked": ids.clone(), "targets": torch.full_like(ids, -100),
             "draw": torch.arange(20_000) * 7 + 1}  # fmt: skip
    batch["masked"][:, 5], batch["targets"][:, 5] = 0, ids[:, 5]
    with torch.no_grad():
        p = generated(model, objective, {name: value[:1] for name, value in batch.items()})[0].double().softmax(-1)
        drawn = objective._corrupted(model, batch, None)[1]
    counts = torch.bincount(drawn, minlength=V)
    assert chisquare(counts.numpy(), p.numpy() * 20_000).pvalue > 1e-3


def test_each_network_learns_from_its_own_losses() -> None:
    model, objective = pair()
    batch = prepared(objective)
    found = objective(model, batch, None)
    own = [p for p in objective.generator.parameters()]  # type: ignore[union-attr]
    names = {name for name, _ in objective.generator.named_parameters()}  # type: ignore[union-attr]
    assert not any(name.startswith("embedding") for name in names)
    both = found.terms["detection"].total + found.terms["correction"].total
    assert all(grad is None for grad in torch.autograd.grad(both, own, retain_graph=True, allow_unused=True))
    grads = torch.autograd.grad(found.terms["generator"].total, own, retain_graph=True, allow_unused=True)
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads)
    of_model = dict(model.named_parameters())
    reached = torch.autograd.grad(found.terms["generator"].total, list(of_model.values()), allow_unused=True)
    assert {name for name, grad in zip(of_model, reached, strict=True) if grad is not None} == {"embedding.weight"}


@pytest.mark.parametrize("corruption", ["uniform", "oracle"])
def test_other_sources_of_tokens(corruption: str) -> None:
    model, objective = pair(corruption=corruption)
    assert objective.generator is None
    batch = prepared(objective)
    found = objective(model, batch, None)
    assert set(found.terms) == {"detection", "correction"}
    replaced, masked = found.metrics["replaced"]
    if corruption == "oracle":
        assert replaced == 0
        out = model(IDS, mask=BIDIRECTIONAL).logits
        torch.testing.assert_close(found.terms["detection"].total, F.softplus(-out).sum())
    else:
        assert 0 < replaced <= masked
        many = objective._corrupted(model, {**batch, "draw": batch["draw"]}, None)[1]
        assert many.min() >= 0 and many.max() < V and len(many.unique()) > 8
    assert set(pair(corruption=corruption, corrective=0.0)[1](model, batch, None).terms) == {"detection"}


def test_sampling_with_and_without_dropout() -> None:
    def drawn(sampling: str, dropout: float, key: Key | None) -> tuple[torch.Tensor, float]:
        model, objective = pair(sampling=sampling, generator={"depth": 1, "dropout": dropout})
        batch = prepared(objective)
        found, ids = objective._corrupted(model, batch, key)
        return ids, float(found["generator"].total)

    plain = drawn("zero_dropout", 0.0, Key(3))
    for sampling in ("train", "eval"):
        ids, loss = drawn(sampling, 0.0, Key(3))
        assert torch.equal(ids, plain[0]) and loss == pytest.approx(plain[1], rel=1e-6)
    # the lender's own dropout is the model's, so that of the generator is in its layers
    zero, eager, apart = (drawn(sampling, 0.5, Key(3)) for sampling in ("zero_dropout", "train", "eval"))
    assert torch.equal(zero[0], plain[0]) and zero[1] == pytest.approx(plain[1], rel=1e-6)
    assert torch.equal(apart[0], plain[0]) and apart[1] != pytest.approx(plain[1], rel=1e-3)
    assert not torch.equal(eager[0], plain[0]) and eager[1] == apart[1]
    assert torch.equal(drawn("train", 0.5, None)[0], plain[0])


def test_at_first_the_loss_is_that_of_guessing() -> None:
    model, objective = pair(model={"residual": {"kind": "pre", "std": 0.02}})
    batch = prepared(objective)
    found, counts = objective(model, batch, None), objective.counts(batch)
    total = sum(float(term.weight * term.total / counts[term.over]) for term in found.terms.values())
    assert total == pytest.approx(2 * math.log(V) + 50 * math.log(2), rel=0.03)


def test_a_training_with_its_generator_stops_and_goes_on(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, **SECTIONS, trainer={"steps": 4, "save_every": 2}, optimizer={"lr": 0.01})
    whole = train(recipe, out=tmp_path / "whole", quiet=True)
    with tiny.cut_after(3):
        train(recipe, out=tmp_path / "cut", quiet=True)
    cut = train(recipe, out=tmp_path / "cut", resume=True, quiet=True)
    one, other = (load_tensors(each.path / "model.safetensors") for each in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not any("generator" in name for name in one)
    rows = {name: value for row in whole.metrics() for name, value in row.items()}
    assert {"generator", "detection", "correction", "replaced", "valid_replaced", "test_detection_accuracy"} <= set(
        rows
    )
    assert whole.metrics()[-1]["test_loss"] == cut.metrics()[-1]["test_loss"]


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    settings = {"trainer": {"steps": 150, "batch": 8, "save_every": 150}, "evaluate": {"every": 150, "blocks": 8}}
    rows = train(tiny.recipe(tmp_path, **SECTIONS, **settings, optimizer={"lr": 0.01}), out=tmp_path / "r", quiet=True)
    first, last = (row for row in rows.metrics() if "valid_loss" in row)
    assert last["valid_loss"] < 0.9 * first["valid_loss"] and last["valid_replaced"] < first["valid_replaced"]


def test_what_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    def said(**sections: Any) -> str:
        with pytest.raises(TorchstoneError) as caught:
            train(tiny.recipe(tmp_path, **{**SECTIONS, **sections}), out=tmp_path / "run", quiet=True)
        assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
        return str(caught.value)

    objective = SECTIONS["objective"]
    assert "needs causal: false" in said(model={**tiny.MODEL})
    assert "needs model.head: {kind: token_classification, classes: 1}" in said(
        model={**SECTIONS["model"], "head": "mlm"}
    )
    assert "objective.generator.width: 8; with the model's embedding it is 16" in said(
        objective={**objective, "generator": {"width": 8}}
    )
    assert "objective.generator" in said(objective={**objective, "generator": {"dept": 1}})
    assert "less than 1" in said(objective={**objective, "rate": 1.0})
    with pytest.raises(TorchstoneError, match="has no mask token"):
        ReplacedTokenSpec().build(Facts(V))
    with pytest.raises(TorchstoneError, match="needs model transformer"):
        ReplacedTokenSpec().build(Facts(V, 0))

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
    objective._lend(model)
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
    shared = {"embedding.weight", "encoder.positions.learned.weight"}
    assert {name for name, grad in zip(of_model, reached, strict=True) if grad is not None} == shared


@pytest.mark.parametrize("position", ["t5", "learned", "t5_learned"])
def test_tables_of_positions_are_shared_where_dropout_is_the_same(position: str) -> None:
    def made(sampling: str, dropout: float, patch: dict[str, Any]) -> tuple[Any, Any, set[str]]:
        fields = {"position": position, "dropout": dropout}
        model, objective = pair(model=fields, sampling=sampling, generator={"depth": 1, **patch})
        generator: Any = objective.generator
        return model, objective, {name for name, _ in generator.named_parameters() if "position" in name}

    for sampling, patch in (("zero_dropout", {}), ("train", {"dropout": 0.0}), ("train", {"attention": {"heads": 4}})):
        assert made(sampling, 0.1, patch)[2], (sampling, patch)
    for sampling, dropout in (("train", 0.1), ("eval", 0.1), ("zero_dropout", 0.0)):
        model, objective, names = made(sampling, dropout, {})
        assert not names
        term = objective(model, prepared(objective), None).terms["generator"].total
        tables = {name: value for name, value in model.named_parameters() if "position" in name}
        grads = torch.autograd.grad(term, list(tables.values()), retain_graph=True)
        assert tables and all(grad.abs().max() > 0 for grad in grads)
        _, other, names = made("train", dropout, {"dropout": 0.7})
        assert names == set(tables)
        other.generator.load_state_dict({**objective.generator.state_dict(), **tables})
        torch.testing.assert_close(other(model, prepared(other), None).terms["generator"].total, term)


def test_a_generator_that_is_deeper_than_the_model_is_remarked_on() -> None:
    with pytest.warns(UserWarning, match="objective.generator.depth: 4 layers, more than the 3 of the model"):
        pair(generator={"depth": 4})


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


def test_tokens_are_drawn_by_counts_of_the_training_split() -> None:
    counts = torch.arange(V) ** 2
    objective: Any = validate(ReplacedTokenSpec, {"corruption": "unigram", "rate": 0.4}).build(
        Facts(V, 0, 29, 2, model=spec(), frequencies=lambda: counts)
    )
    assert objective.generator is None and objective.state_dict()["below"].shape == (V,)
    ids = torch.full((20_000, 1), 5)
    batch = {"ids": ids, "targets": ids, "draw": torch.arange(20_000) * 7 + 1}
    drawn = torch.bincount(objective._corrupted(None, batch, None)[1], minlength=V)
    wanted = counts.double()
    wanted[[0, 2, 29]] = 0  # special tokens never stand in a text
    seen = wanted > 0
    assert not drawn[~seen].any()
    assert chisquare(drawn[seen].numpy(), (wanted / wanted.sum() * 20_000)[seen].numpy()).pvalue > 1e-3
    model, _ = pair()
    assert set(objective(model, prepared(objective), None).terms) == {"detection", "correction"}
    with pytest.raises(TorchstoneError, match="unigram needs the counts of tokens in the training split"):
        validate(ReplacedTokenSpec, {"corruption": "unigram"}).build(Facts(V, 0, model=spec()))


def test_counts_are_those_of_the_training_split_and_lie_in_checkpoints(tmp_path: Path) -> None:
    objective = {**SECTIONS["objective"], "corruption": "unigram"}
    recipe = tiny.recipe(tmp_path, **{**SECTIONS, "objective": objective}, trainer={"steps": 2, "save_every": 2})
    full, data = tiny.resolved(recipe)
    ids = torch.cat([batch["ids"].flatten() for batch in data.train.evaluation(64)])
    made = tiny.trainer(recipe).objective
    special = torch.tensor([data.tokenizer.mask, data.tokenizer.pad, data.tokenizer.separator])
    counts = torch.bincount(ids[~torch.isin(ids, special)], minlength=full.model.vocabulary)  # type: ignore[attr-defined]
    torch.testing.assert_close(made.below, (counts.cumsum(0) / counts.sum()).float())
    run = train(recipe, out=tmp_path / "run", quiet=True)
    (file,) = run.state.glob("step-*/objective.safetensors")
    assert torch.equal(load_tensors(file)["below"], made.below)


def test_detection_of_masked_tokens_alone() -> None:
    model, objective = pair(detect="masked", weight=3.0)
    batch = prepared(objective)
    chosen, found = batch["targets"] >= 0, objective(model, batch, None)
    corrupted = IDS.masked_scatter(chosen, objective._corrupted(model, batch, None)[1])
    logits = model(corrupted, mask=BIDIRECTIONAL).logits[..., 0][chosen]
    wanted = F.binary_cross_entropy(logits.sigmoid(), (corrupted == IDS)[chosen].float(), reduction="sum")
    term = found.terms["detection"]
    torch.testing.assert_close(term.total, wanted)
    assert (term.over, term.weight) == ("targets", 3.0)
    assert found.metrics["detection_accuracy"][1] == chosen.sum()


def test_correction_that_copies_is_a_mixture_of_what_stands_there_and_the_vocabulary() -> None:
    model, objective = pair(correction="copy", corruption="oracle")
    assert objective(model, prepared(objective), None).terms["correction"].total.isfinite()
    model, objective = pair(correction="copy")
    batch = prepared(objective)
    chosen, found = batch["targets"] >= 0, objective(model, batch, None)
    corrupted = IDS.masked_scatter(chosen, objective._corrupted(model, batch, None)[1])
    out = model(corrupted, mask=BIDIRECTIONAL)
    total = 0.0
    named = (out.hidden @ model.embedding.weight.T + objective.bias).double().softmax(-1)
    for row, at in chosen.nonzero().tolist():
        copy = 1 / (1 + math.exp(-float(out.logits[row, at, 0].detach())))
        kept = copy if corrupted[row, at] == IDS[row, at] else 0.0
        total -= math.log(kept + (1 - copy) * float(named[row, at, IDS[row, at]].detach()))
    term = found.terms["correction"].total
    assert term.item() == pytest.approx(total, rel=1e-5)
    # the probability of copying is what detection makes it
    assert torch.autograd.grad(term, model.head.out.weight, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(term, objective.bias)[0].abs().max() > 0  # type: ignore[arg-type]


def test_sampling_with_and_without_dropout() -> None:
    def drawn(sampling: str, dropout: float, key: Key | None) -> tuple[torch.Tensor, float]:
        fields = {"sampling": sampling, "generator": {"depth": 1, "dropout": dropout}}
        model, objective = pair(model={"position": "rotary"}, **fields)  # without tables, which are shared or not
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
    for name, value in (("vocabulary", 77), ("embedding", {"size": 8}), ("causal", True)):
        patch = {**objective, "generator": {name: value}}
        assert f"objective.generator.{name}: is the model's" in said(objective=patch)
    nothing = {**objective, "weight": 0, "corrective": 0}
    assert "weight and corrective are both 0" in said(objective=nothing)
    assert "less than 1" in said(objective={**objective, "rate": 1.0})
    copies = {**objective, "correction": "copy", "weight": 0}
    assert "copy reuses the probability that detection learns, and its weight is 0" in said(objective=copies)
    with pytest.raises(TorchstoneError, match="has no mask token"):
        ReplacedTokenSpec().build(Facts(V))
    with pytest.raises(TorchstoneError, match="needs model transformer"):
        ReplacedTokenSpec().build(Facts(V, 0))

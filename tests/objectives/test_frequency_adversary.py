"""FRAGE: the game by its definition, each side's own gradient, nothing at weight 0, sides by counts, moments."""

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
from torchstone.objectives import Facts
from torchstone.objectives.causal_lm import CausalLM
from torchstone.objectives.frequency_adversary import (
    FrequencyAdversary,
    FrequencyAdversarySpec,
    balanced_loss,
    moment_distance,
    sides_of,
)
from torchstone.recipe import load_recipe
from torchstone.train import train
from torchstone.train.memory import training_memory
from torchstone.train.training import facts_of

POPULAR = 12


def recipe(folder: Path, sections: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    objective = {"kind": "frequency_adversary", "popular": POPULAR, **fields}
    return tiny.recipe(folder, objective=objective, **(sections or {}))


def trainer(folder: Path, sections: dict[str, Any] | None = None, **fields: Any) -> Any:
    return tiny.trainer(recipe(folder, sections, **fields))


def table(made: Any) -> torch.Tensor:
    found: torch.Tensor = made.model.embedding.table()
    return found


def batch_of(made: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = made.source.train.batch(Key(0), 0, 3)
    return found


def test_sides_go_by_counts_and_special_tokens_have_none() -> None:
    count = torch.tensor([90, 5, 7, 7, 0, 7, 80, 0])
    assert sides_of(count, 3, [0]).tolist() == [-1, 1, 0, 0, 1, 1, 0, 1]
    assert sides_of(count, 1, [0, 6], vocabulary=7).tolist() == [-1, 1, 0, 1, 1, 1, -1, -1]
    for popular in (7, 100):
        with pytest.raises(TorchstoneError, match=f"popular is {popular}, which leaves none of 7 tokens rare"):
            sides_of(count, popular, [0])


def test_popular_tokens_are_the_most_frequent_of_the_training_split(folder: Path) -> None:
    full, prepared = tiny.resolved(recipe(folder))
    text = "".join(document.text for document in prepared.texts("train"))
    seen = Counter(text.encode())
    facts = facts_of(prepared, full)
    assert facts.frequencies is not None
    counts = facts.frequencies()
    # ids of the byte tokenizer are bytes; a rest shorter than a block has at most that many more
    assert all(0 <= seen[byte] - int(counts[byte]) <= prepared.train.block for byte in range(256))
    expected = sorted(range(256), key=lambda byte: (-int(counts[byte]), byte))[:POPULAR]
    made = trainer(folder).objective
    assert sorted(expected) == (made.sides_V == 0).nonzero()[:, 0].tolist()
    assert (made.sides_V == -1).sum() == len({facts.mask, facts.pad, facts.separator} - {None})


@pytest.mark.parametrize("rare_only", [False, True])
def test_the_loss_is_the_task_minus_the_discriminators(rare_only: bool, folder: Path) -> None:
    made = trainer(folder, weight=0.3, rare_only=rare_only)
    batch, own = batch_of(made), made.objective
    found, plain = own(made.model, batch, None), CausalLM()(made.model, batch, None)
    torch.testing.assert_close(found.terms["loss"].total, plain.terms["loss"].total, rtol=0, atol=0)
    weight, bias = own.judge[0].weight, own.judge[0].bias
    nll: dict[int, list[float]] = {0: [], 1: []}
    right: dict[int, list[bool]] = {0: [], 1: []}
    for token, side in enumerate(own.sides_V.tolist()):
        if side >= 0:
            a, b = (weight @ table(made)[token] + bias).tolist()
            nll[side].append(math.log(math.exp(a) + math.exp(b)) - (a, b)[side])
            right[side].append((a, b)[side] > (b, a)[side])
    each = {side: np.mean(values) for side, values in nll.items()}
    expected = each[1] if rare_only else (each[0] + each[1]) / 2
    term = found.terms["frequency"]
    assert term.weight == -0.3 and term.total.item() == pytest.approx(float(expected), rel=1e-5)
    assert own.counts(batch)[term.over] == 1
    accuracy = np.mean([np.mean(values) for values in right.values()])
    assert found.metrics["discriminator_accuracy"][0].item() == pytest.approx(float(accuracy), rel=1e-6)


def test_equal_logits_cost_the_logarithm_of_two_however_the_words_are_split() -> None:
    for popular in (1, 7, 39):
        side = torch.cat([torch.zeros(popular), torch.ones(40 - popular)]).long()
        assert balanced_loss(torch.full((40, 2), 0.7), side).item() == pytest.approx(math.log(2), rel=1e-6)
        logits = torch.randn(40, 2)
        shares = torch.tensor([(40 - popular) / 40, popular / 40])
        torch.testing.assert_close(balanced_loss(logits, side), F.cross_entropy(logits, side, shares))


@pytest.mark.parametrize("hidden", [0, 5])
def test_the_discriminators_steps_are_those_of_gradient_descent_with_class_weights(hidden: int, folder: Path) -> None:
    made = trainer(folder, hidden=hidden, disc_lr=0.5, disc_decay=0.01, inner_steps=3)
    own, E = made.objective, table(made).shape[1]
    sizes = [E, *([hidden] if hidden else []), 2]
    layers: list[torch.nn.Module] = [torch.nn.Linear(sizes[0], sizes[1])]
    if hidden:
        layers += [torch.nn.ReLU(), torch.nn.Linear(hidden, 2)]
    other = torch.nn.Sequential(*layers)
    other.load_state_dict(own.judge.state_dict())
    descent = torch.optim.SGD(other.parameters(), lr=0.5, weight_decay=0.01)
    there = own.sides_V >= 0
    labels, rows = own.sides_V[there], table(made).detach()[there]
    weights = torch.stack([(labels == 1).float().mean(), (labels == 0).float().mean()])
    for _ in range(3):
        descent.zero_grad()
        F.cross_entropy(other(rows), labels, weights).backward()
        descent.step()
    own.before_step(made.model, 0)
    for (name, found), expected in zip(own.judge.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-7, msg=name)


def test_first_weights_of_the_discriminator_are_uniform_up_to_a_tenth(folder: Path) -> None:
    one = trainer(folder, {"model": {**tiny.MODEL, "width": 256}}).objective.judge[0]
    assert 0.095 < one.weight.abs().max() <= 0.1 and abs(one.weight.std() - 0.1 / 3**0.5) < 0.005
    assert not one.bias.any()
    again = trainer(folder, {"model": {**tiny.MODEL, "width": 256}}).objective.judge[0]
    assert torch.equal(one.weight, again.weight)
    other = trainer(folder, {"model": {**tiny.MODEL, "width": 256}, "trainer": {"seed": 1}}).objective.judge[0]
    assert not torch.equal(one.weight, other.weight)


def test_each_side_moves_by_its_own_step_alone(folder: Path) -> None:
    made = trainer(folder, weight=1.0)
    before = table(made).detach().clone()
    made.objective.before_step(made.model, 0)
    assert torch.equal(table(made), before) and all(p.grad is None for p in made.model.parameters())
    judge = {name: value.clone() for name, value in made.objective.judge.named_parameters()}
    made.gradients([batch_of(made)], 0)
    made.optim.step()
    for name, value in made.objective.judge.named_parameters():
        assert torch.equal(value, judge[name]) and value.grad is None
    assert not torch.equal(table(made), before)
    assert not any(name.name.startswith("objective") for name in made.named)


@pytest.mark.parametrize("tied", [False, True])
def test_rare_words_alone_are_moved(tied: bool, folder: Path) -> None:
    head = {"model": {**tiny.MODEL, "head": {"kind": "lm", "tied": tied}}}
    for rare_only in (True, False):
        made = trainer(folder, head, rare_only=rare_only)
        term, _ = made.objective.compare(made.model)
        (slope,) = torch.autograd.grad(term.total, table(made))
        moved, sides = slope.abs().sum(1) > 0, made.objective.sides_V
        assert moved[sides == 1].all() and not moved[sides == -1].any()
        assert moved[sides == 0].all() != rare_only and moved[sides == 0].any() != rare_only


def test_one_sides_step_undoes_the_others(folder: Path) -> None:
    """Of the share of rare words that the discriminator tells rightly."""
    made = trainer(folder, weight=1.0, disc_lr=1.0, inner_steps=30)
    own, rare = made.objective, made.objective.sides_V == 1

    def told() -> float:
        return float((own.judge(table(made))[rare].argmax(-1) == 1).float().mean())

    own.judge[0].bias.copy_(torch.tensor([0.1, 0.0]))
    at_first = told()
    own.before_step(made.model, 0)
    learned = told()
    assert learned > at_first
    term, _ = own.compare(made.model)
    (slope,) = torch.autograd.grad(term.weight * term.total, table(made))
    with torch.no_grad():
        table(made).sub_(40 * slope)
    assert told() < learned


def test_weight_zero_is_the_tasks_own_training_to_the_bit(folder: Path) -> None:
    sections: dict[str, Any] = {"model": {**tiny.MODEL, "dropout": 0.2}, "trainer": {"clip": 0.1, "ema": 0.9}}
    plain = tiny.trainer(tiny.recipe(folder, **sections))
    still, moved = trainer(folder, sections, weight=0.0), trainer(folder, sections, weight=0.5)
    rows = [[made.train_step() for _ in range(4)][-1] for made in (plain, still, moved)]
    assert rows[0].items() <= rows[1].items() and rows[0]["loss"] != rows[2]["loss"]
    one, other, third = (made.tensors() for made in (plain, still, moved))
    for part in ("model", "optimizer", "ema"):
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(value, other[part][name]) for name, value in one[part].items())
    assert any(not torch.equal(value, third["model"][name]) for name, value in one["model"].items())
    ends = [made.measure_split(made.source.valid, "valid") for made in (plain, still)]
    assert {"valid_loss", "valid_bits_per_byte"} <= set(ends[0]) and ends[0].items() <= ends[1].items()
    assert 0 <= ends[1]["valid_discriminator_accuracy"] <= 1


@pytest.mark.slow
def test_a_training_stops_and_goes_on(tmp_path: Path) -> None:
    data = recipe(tmp_path, {"trainer": {"steps": 4, "save_every": 2}}, hidden=4, disc_lr=0.5, weight=0.5)
    whole = train(data, out=tmp_path / "whole", quiet=True)
    with tiny.cut_after(3):
        train(data, out=tmp_path / "cut", quiet=True)
    tiny.assert_same_run(train(data, out=tmp_path / "cut", resume=True, quiet=True), whole)


def test_micro_batches_are_one_batch_over_whole_steps(folder: Path) -> None:
    """The discriminator steps once a step, however many micro-batches it has."""
    fields: dict[str, Any] = {"weight": 0.5, "disc_lr": 0.5}
    whole = trainer(folder, {"trainer": {"batch": 4}}, **fields)
    parts = trainer(folder, {"trainer": {"batch": 2, "accumulate": 2}}, **fields)
    for _ in range(3):
        row, other = whole.train_step(), parts.train_step()
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
    for found, expected in zip(parts.objective.judge.parameters(), whole.objective.judge.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_moments_by_their_definition_and_of_sets(folder: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.gamma(2.0, size=(30, 5)), rng.normal(size=(12, 5))

    def moments(x: np.ndarray) -> list[np.ndarray]:
        unit = (x - x.mean(0)) / x.std(0)
        return [x.mean(0), x.var(0), (unit**3).mean(0), (unit**4).mean(0)]

    expected = sum(np.sqrt(((p - q) ** 2).sum()) for p, q in zip(moments(a), moments(b), strict=True))
    first, second = torch.from_numpy(a), torch.from_numpy(b)
    assert moment_distance(first, second).item() == pytest.approx(expected, rel=1e-12)
    order = torch.from_numpy(rng.permutation(30))
    torch.testing.assert_close(moment_distance(first[order], second), moment_distance(first, second))
    assert moment_distance(first[order], first).item() < 1e-12
    made = trainer(folder, match="moments", weight=0.3)
    own = made.objective
    assert own.judge is None and not own.state_dict()
    term, _scores = own.compare(made.model)
    sides, found = own.sides_V, table(made).detach().double()
    assert term.weight == 0.3
    expected = moment_distance(found[sides == 0], found[sides == 1]).item()
    assert term.total.item() == pytest.approx(expected, rel=1e-4)
    row = made.train_step()
    assert row["moment_distance"] == pytest.approx(expected, rel=1e-4) and row["frequency"] == pytest.approx(
        0.3 * row["moment_distance"], rel=1e-5
    )


def test_it_stands_beside_other_tasks_too(folder: Path) -> None:
    made = trainer(folder, {"model": tiny.MASKED["model"]}, task=tiny.MASKED["objective"])
    assert {"loss", "frequency", "discriminator_accuracy"} <= set(made.train_step())
    assert not made.objective.codes


def test_a_synthetic_task_has_counts_too() -> None:
    data = {"data": {"kind": "recall"}, "model": dict(tiny.MODEL), "trainer": {"steps": 1, "batch": 2, "threads": 1}}
    counts = tiny.trainer({**data, "objective": {"kind": "frequency_adversary", "popular": 4}})
    assert (counts.objective.sides_V == 0).sum() == 4


def test_inspect_knows_its_memory(folder: Path) -> None:
    full, _ = tiny.resolved(recipe(folder))
    assert training_memory(full).activations is not None


def test_what_does_not_fit_is_one_sentence(folder: Path) -> None:
    for fields, message in (
        ({"weight": -1}, "objective.weight: .*greater than or equal to 0"),
        ({"popular": 0}, "objective.popular: .*greater than or equal to 1"),
        ({"task": {"kind": "dpo"}}, "task dpo cannot stand beside it"),
        ({"task": {"kind": "frequency_adversary"}}, "task frequency_adversary cannot stand beside it"),
    ):
        with pytest.raises(TorchstoneError, match=message):
            load_recipe({"objective": {"kind": "frequency_adversary", **fields}})
    with pytest.raises(TorchstoneError, match="popular is 1,000, which leaves none of"):
        trainer(folder, popular=1000)
    with pytest.raises(TorchstoneError, match="needs the counts of tokens in the training split"):
        FrequencyAdversarySpec().build(Facts(30))
    with pytest.raises(TorchstoneError, match="needs a model with an embedding of tokens"):
        FrequencyAdversarySpec().build(Facts(30, frequencies=lambda: torch.zeros(30)))
    made = trainer(folder)
    assert isinstance(made.objective, FrequencyAdversary)
    with pytest.raises(TorchstoneError, match=r"needs model\.causal: true"):
        made.objective.check(trainer(folder, {"model": tiny.MASKED["model"]}, task=tiny.MASKED["objective"]).model)

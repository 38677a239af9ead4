"""Scores of triples: dense matrices written here, both ends, the paper's identities and its numbers of parameters."""

from __future__ import annotations

import math
from typing import Any

import knowledge
import numpy as np
import pytest
import torch

from torchstone.domains.knowledge_graph.model._scorer import Scorer
from torchstone.errors import TorchstoneError
from torchstone.model.measure import measure
from torchstone.model.site import initialise
from torchstone.recipe import load_recipe
from torchstone.spec import resolve, validate
from torchstone.train.run import shape_of

E, R = 9, 4


def model_of(seed: int = 0, **fields: Any) -> Any:
    """A scorer in float64 whose parameters are all of size one."""
    kind = fields.pop("kind")
    spec: Any = validate(resolve("model", kind), {"gamma": 6.0, "entities": E, "relations": R, **fields})
    model = initialise(spec.build(), seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def every() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Head, relation and tail of every triple."""
    return torch.cartesian_prod(torch.arange(E), torch.arange(R), torch.arange(E)).unbind(1)  # type: ignore[return-value]


def scores(model: Scorer, by_head: bool) -> torch.Tensor:
    """Of every triple, with the head or the tail as the candidate."""
    head, relation, tail = every()
    given, sought = (tail, head) if by_head else (head, tail)
    return model(given, relation, torch.full_like(head, by_head, dtype=torch.bool), sought[:, None])[:, 0]


def naive(model: Any, head: int, relation: int, tail: int) -> float:
    """The score by the formula, with matrices."""
    parameters = {name: value.detach().numpy() for name, value in model.named_parameters()}
    h, t = parameters["entity"][head], parameters["entity"][tail]
    if model.spec.kind == "transe":
        return model.spec.gamma - np.abs(h + parameters["relation"][relation] - t).sum()
    if model.spec.kind == "rotate":
        angle = parameters["relation"][relation] * np.pi / model.spec.spread
        h, t = h[::2] + 1j * h[1::2], t[::2] + 1j * t[1::2]
        return model.spec.gamma - np.abs(h * np.exp(1j * angle) - t).sum()
    k, distance = model.spec.block, 0.0
    for n in range(model.spec.dim // k):
        x, y = h[n * k : (n + 1) * k], t[n * k : (n + 1) * k]
        if model.spec.projections:
            for end in (0, 1):
                size = parameters["strength"][end, relation, 0] * np.abs(parameters["scale"][end, relation, n])
                matrix = knowledge.dense_contraction(
                    parameters["projection"][end, relation, n], np.minimum(size, model.spec.max_strength)
                )
                x, y = (matrix @ x, y) if end == 0 else (x, matrix @ y)
        if model.spec.translation:
            x = x + parameters["translation"][relation, n]
        distance += np.linalg.norm(knowledge.dense_rotation(parameters["rotation"][relation, n]) @ x - y)
    return model.spec.gamma - distance


@pytest.mark.parametrize("name", knowledge.MODELS)
def test_scores_are_those_of_the_formula_by_either_end(name: str) -> None:
    model = model_of(**knowledge.MODELS[name])
    wanted = [naive(model, *map(int, triple)) for triple in zip(*every(), strict=True)]
    for by_head in (False, True):
        np.testing.assert_allclose(scores(model, by_head).detach(), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", knowledge.MODELS)
def test_ends_mix_in_a_batch_and_all_entities_are_candidates_in_pieces(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(**knowledge.MODELS[name])
    head, relation, tail = every()
    by_head = torch.arange(len(head)) % 3 == 0
    mixed = model(torch.where(by_head, tail, head), relation, by_head, torch.where(by_head, head, tail)[:, None])[:, 0]
    torch.testing.assert_close(mixed, torch.where(by_head, scores(model, True), scores(model, False)))
    whole = model(head[:7], relation[:7], by_head[:7])
    assert whole.shape == (7, E)
    monkeypatch.setattr("torchstone.domains.knowledge_graph.model._scorer._AT_ONCE", 2 * 7 * model.entity.shape[1])
    with torch.no_grad():
        torch.testing.assert_close(model(head[:7], relation[:7], by_head[:7]), whole)
    candidates = torch.tensor([[3, 1, 3]]).expand(7, 3)
    torch.testing.assert_close(model(head[:7], relation[:7], by_head[:7], candidates), whole[:, [3, 1, 3]])


@pytest.mark.parametrize("name", knowledge.MODELS)
def test_gradients_are_those_of_the_formula(name: str) -> None:
    """By differences, of one number of each parameter that a triple meets."""
    model = model_of(**knowledge.MODELS[name])
    one = torch.tensor([2]), torch.tensor([1]), torch.tensor([True]), torch.tensor([[5]])
    model(*one).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None
        place = np.unravel_index(int(parameter.grad.abs().argmax()), parameter.shape)
        with torch.no_grad():
            at = float(parameter[place])
            ends = []
            for step in (1e-6, -1e-6):
                parameter[place] = at + step
                ends.append(naive(model, 5, 1, 2))
            parameter[place] = at
        assert parameter.grad[place] != 0, parameter_name
        assert float(parameter.grad[place]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5), parameter_name


def test_two_reflections_of_pairs_are_rotate_by_twice_the_angle_between_them() -> None:
    ours = model_of(kind="house", dim=8, block=2, projections=0)
    theirs = model_of(kind="rotate", dim=8)
    with torch.no_grad():
        theirs.entity.copy_(ours.entity)
        for r in range(R):
            for n in range(4):
                (ax, ay), (bx, by) = ours.rotation[r, n].tolist()
                theirs.relation[r, n] = 2 * (math.atan2(ay, ax) - math.atan2(by, bx)) / math.pi * theirs.spec.spread
    for by_head in (False, True):
        torch.testing.assert_close(scores(ours, by_head), scores(theirs, by_head), rtol=0, atol=1e-10)


def test_without_strength_contractions_are_nothing_bit_for_bit() -> None:
    plain, ours = (model_of(kind="house", dim=12, block=3, projections=p) for p in (0, 2))
    with torch.no_grad():
        ours.entity.copy_(plain.entity)
        ours.rotation.copy_(plain.rotation)
        ours.strength.zero_()
        assert torch.equal(scores(ours, False), scores(plain, False))
        ours.strength.fill_(0.1)
        assert not torch.equal(scores(ours, False), scores(plain, False))


def test_strengths_stay_below_their_bound_and_are_free_below_zero() -> None:
    model = model_of(kind="house", dim=12, block=3, projections=2, max_strength=0.25)
    tau = model.strengths()
    assert tau.max() == 0.25 and tau.min() < -1  # some of size one are above, some far below
    wanted = np.minimum(model.strength.detach().numpy() * np.abs(model.scale.detach().numpy()), 0.25)
    np.testing.assert_array_equal(tau.detach().numpy(), wanted)


def test_first_values_are_those_of_the_reference_code() -> None:
    spec: Any = validate(
        resolve("model", "house"), {"dim": 800, "block": 8, "gamma": 6.0, "entities": 500, "relations": 40}
    )
    model = initialise(spec.build(), 0)
    bound = (6 + 2) / (100 * math.sqrt(8))
    for name in ("entity", "rotation", "projection"):
        value = model.get_parameter(name)
        assert 0.99 * bound < value.abs().max() <= bound and abs(value.mean()) < 0.02 * bound, name
    assert torch.equal(model.strength[1], -model.strength[0]) and 0.008 < model.strength.abs().max() <= 0.01
    assert 0.99 < model.scale.abs().max() <= 1
    rotate: Any = validate(resolve("model", "rotate"), {"dim": 1000, "gamma": 6.0, "entities": 50, "relations": 40})
    turned = initialise(rotate.build(), 0)
    assert 0.98 * 8 / 500 < turned.entity.abs().max() <= 8 / 500
    assert 0.98 < (turned.relation / rotate.spread).abs().max() <= 1  # angles from -pi to pi


@pytest.mark.parametrize(
    ("fields", "entities", "relations"),
    [
        ({"kind": "house", "dim": 800, "block": 8}, 40_943 * 800, 11 * 100 * 8 * (8 + 2) + 2 * (11 + 11 * 100)),
        ({"kind": "house", "dim": 800, "block": 13, "projections": 0}, 40_943 * 61 * 13, 11 * 61 * 13 * 12),
        ({"kind": "house", "dim": 800, "block": 8, "projections": 1, "translation": True}, 40_943 * 800,
         11 * 100 * 8 * (8 + 2) + 2 * (11 + 11 * 100) + 11 * 800),
        ({"kind": "rotate", "dim": 1000}, 40_943 * 1000, 11 * 500),
        ({"kind": "transe", "dim": 1000}, 40_943 * 1000, 11 * 1000),
    ],
)  # fmt: skip
def test_parameters_on_wn18rr(fields: dict[str, Any], entities: int, relations: int) -> None:
    recipe = load_recipe(
        {
            "model": {**fields, "entities": 40_943, "relations": 11},
            "data": {"kind": "triples", "path": "none"},
            "objective": "link_prediction",
        }
    )
    counts = measure(shape_of(recipe.model))
    assert counts.parameters == entities + relations
    assert counts.active_parameters == 2 * entities // 40_943 + relations // 11


def refused(match: str, **model: Any) -> None:
    with pytest.raises(TorchstoneError, match=match):
        shape_of(load_recipe({"model": {"entities": 3, "relations": 2, **model}, "objective": "link_prediction",
                              "data": {"kind": "triples", "path": "none"}}).model)  # fmt: skip


def test_what_cannot_be_is_refused() -> None:
    refused("block 9 is larger than dim 8", kind="house", dim=8, block=9)
    refused("block", kind="house", dim=8, block=1)
    refused("max_strength", kind="house", max_strength=1.0)
    refused("dim", kind="rotate", dim=7)
    refused("model.relations: is required to build", kind="transe", relations=None)
    refused("unknown field|extra|projection", kind="transe", projections=1)

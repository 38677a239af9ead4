"""HousE's claims: the identities at quick scale, the graphs, the arms' numbers, the defects, and what gates look at."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from torchstone.model.site import initialise
from torchstone.papers import house
from torchstone.papers._claim import Effect, decide_claim
from torchstone.spec import resolve, validate


def test_identities_hold() -> None:
    assert house.IDENTITIES.run is not None
    verdict, rows = decide_claim(house.IDENTITIES, house.IDENTITIES.run("quick", 0).numbers, {})
    assert verdict == "holds", rows


def test_the_group_is_that_of_the_even_permutations() -> None:
    facts = house._cayley(3)
    heads, relations, tails = (Counter(fact[n] for fact in facts) for n in range(3))
    assert len(set(facts)) == 480 and len(relations) == 8
    assert set(heads.values()) == set(tails.values()) == {8} and len(heads) == 60
    for name in heads:
        swaps, p = 0, [int(c) for c in name]
        for place in range(5):  # sort by swaps: an even number of them
            while p[place] != place:
                other = p[place]
                p[place], p[other], swaps = p[other], p[place], swaps + 1
        assert swaps % 2 == 0
    by = {(h, r): t for h, r, t in facts}
    there = [r for r in relations if r != "times 01234"]
    apart = [by[by["01234", a], b] != by[by["01234", b], a] for a in there for b in there if a != b]
    assert len(there) == 8 and any(apart)  # none is 1, and they do not all commute
    assert house._cayley(3) == facts != house._cayley(4)


def test_classes_have_members_and_members_have_neighbours() -> None:
    facts = house._classes(0)
    count = Counter(relation for _, relation, _ in facts)
    assert len(set(facts)) == 5000 and set(count.values()) == {1000} and set(house._OF_CLASSES) < set(count)
    assert len({name for h, _, t in facts for name in (h, t)}) == 1040
    of = {h: t for h, r, t in facts if r == "member_of"}
    assert all(of[t] == h for h, r, t in facts if r == "has_member")
    assert all(of[h] == of[t] and h != t for h, r, t in facts if r == "next_member")
    for relation in set(count) - set(house._OF_CLASSES):
        assert Counter(t for _, r, t in facts if r == relation) == Counter(list(of))  # one to one


def test_what_is_held_out_is_split(tmp_path: Path) -> None:
    house._write(tmp_path / "graph", house._cayley(0), 0.5, 0)
    parts = {name: (tmp_path / "graph" / f"{name}.txt").read_text().splitlines() for name in ("train", "valid", "test")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 240, "valid": 48, "test": 192}
    assert len({line for part in parts.values() for line in part}) == 480


def model_of(arm: dict[str, Any], entities: int, relations: int) -> Any:
    fields = {"entities": entities, "relations": relations, "gamma": 6.0, **arm}
    spec: Any = validate(resolve("model", fields.pop("kind")), fields)
    return initialise(spec.build(), 0)


def test_numbers_of_the_arms() -> None:
    count = {
        name: sum(p.numel() for p in model_of(dict(arm), 60, 8).parameters()) for name, arm in house._GROUP.arms.items()
    }
    assert count == {
        "house-r, k = 3": 1824,
        "house-r, k = 2": 1824,
        "rotate": 1536,
        "rotate, four times": 6144,
        "one order": 1824,
    }
    arms = {name: model_of(dict(arm), 1040, 5) for name, arm in house._CLASS.arms.items()}
    count = {name: sum(p.numel() for p in model.parameters()) for name, model in arms.items()}
    assert count == {"house-r": 4240, **dict.fromkeys(set(house._CLASS.arms) - {"house-r"}, 4240 + 120)}


@torch.no_grad()
def test_one_order_turns_both_ends_alike() -> None:
    ours, theirs = (model_of(dict(house._GROUP.arms[name]), 60, 8) for name in ("house-r, k = 3", "one order"))
    theirs.load_state_dict(ours.state_dict())
    given, relation = torch.arange(8), torch.arange(8)
    tails, heads = torch.zeros(8, dtype=torch.bool), torch.ones(8, dtype=torch.bool)
    assert torch.equal(theirs(given, relation, tails), ours(given, relation, tails))
    assert torch.equal(theirs(given, relation, heads), ours(given, relation, tails))
    assert (theirs(given, relation, heads) - ours(given, relation, heads)).abs().max() > 1e-3


def class_arms(*names: str) -> list[Any]:
    """Models of the second claim whose contractions show, with the first one's values."""
    made = [model_of(dict(house._CLASS.arms[name]), 9, 5) for name in names]
    with torch.no_grad():
        made[0].strength.copy_(torch.randn(2, 5, 1, 2, generator=torch.Generator().manual_seed(0)))
    for model in made[1:]:
        model.load_state_dict(made[0].state_dict())
    return made


QUERY = torch.arange(5), torch.arange(5), torch.zeros(5, dtype=torch.bool)


@torch.no_grad()
def test_the_same_contractions_serve_all_relations() -> None:
    ours, theirs = class_arms("house", "same for all relations")
    assert (theirs(*QUERY) - ours(*QUERY)).abs().max() > 1e-3
    for value in (ours.projection, ours.strength, ours.scale):
        value.copy_(value[:, :1].expand_as(value))
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs(*QUERY), ours(*QUERY))


def test_still_strengths_score_alike_and_do_not_move() -> None:
    ours, theirs = class_arms("house", "still strengths")
    scores = [model(*QUERY) for model in (ours, theirs)]
    assert torch.equal(*scores)
    for each in scores:
        each.sum().backward()
    assert ours.strength.grad.any() and theirs.strength.grad is None and theirs.projection.grad.any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("claim", "sizes"),
    [(house.GROUPS, house._GROUP_SIZES), (house.CLASSES, house._CLASS_SIZES)],
    ids=["groups", "classes"],
)
def test_claims_run_and_every_gate_has_its_arms(
    claim: Any, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sizes, "quick", house._Size(4, 3, seeds=2, control_seeds=1, rates=(0.01, 0.02)))
    found = claim.run("quick", 0)
    for gate in claim.gates:
        assert isinstance(gate, Effect)
        assert set(found.values[gate.arm]) == set(found.values[gate.against]) == {0, 1}
        assert set(gate.needs) <= set(found.values)
        if gate.null is not None:
            assert set(found.values[gate.null]) == {100_000} and len(found.values[gate.sabotage]) == 1
    assert all(math.isfinite(value) for by_seed in found.values.values() for value in by_seed.values())

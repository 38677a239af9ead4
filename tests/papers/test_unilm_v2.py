"""UniLMv2's claim of behaviour: what is measured of spans, the sabotage arm, and that every arm is measured."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import tiny
from torchstone.keys import Key
from torchstone.model.mask import BIDIRECTIONAL
from torchstone.model.tokens import Tokens
from torchstone.objectives import Facts
from torchstone.objectives.pseudo_masked import PseudoMaskedSpec
from torchstone.papers import find_paper, unilm_v2
from torchstone.papers._pages import run_claim

FACTS = Facts(30, 0, 1, 2)


def test_spans_are_scored_as_by_a_pass_for_each(tmp_path: Any) -> None:
    trainer = tiny.trainer(tiny.recipe(tmp_path, **{**tiny.MASKED, "objective": {"kind": "pseudo_masked"}}))
    found, model = unilm_v2._held_out(trainer, 5), trainer.model
    ids_NT = next(iter(trainer.source.test.evaluation(5, 5)))["ids"]  # type: ignore[union-attr]
    generator = Key(0).fold("spans").generator()
    length = torch.randint(3, 7, (5, 1), generator=generator)[:, 0]
    first = (torch.rand(5, generator=generator) * (16 - length + 1)).long()
    once, each, mask = [], [], 257
    for ids_T, a, n in zip(ids_NT, first.tolist(), length.tolist(), strict=True):
        for known in range(n):
            seen = ids_T.clone()
            seen[a + known : a + n] = mask
            logprobs = model(Tokens.of(seen[None]), mask=BIDIRECTIONAL).logits[0].log_softmax(-1)
            each.append(-logprobs[a + known, ids_T[a + known]].item())
            once += [-logprobs[a + k, ids_T[a + k]].item() for k in range(n if known == 0 else 0)]
    assert found["at once"] == pytest.approx(sum(once) / len(once), rel=1e-4)
    assert found["a pass a token"] == pytest.approx(sum(each) / len(each), rel=1e-4)
    assert found["stand-ins"] != pytest.approx(found["at once"], rel=1e-4)


def test_the_sabotage_arm_shows_a_stand_in_what_it_stands_for() -> None:
    ids = torch.randint(3, 30, (1, 20), generator=Key(0).generator())
    good = PseudoMaskedSpec().build(FACTS).prepare({"ids": ids}, Key(0))
    bad = unilm_v2.CountedFromZeroSpec().build(FACTS).prepare({"ids": ids}, Key(0))
    assert torch.equal(bad["role"], torch.where(good["role"] > 0, good["role"] - 1, good["role"]))
    assert torch.equal(bad["pseudo"], good["pseudo"]) and good["role"].max() >= 1


def test_second_halves_are_predicted() -> None:
    ids = torch.randint(3, 30, (2, 21), generator=Key(0).generator())
    batch = unilm_v2.SecondHalvesSpec().build(FACTS).prepare({"ids": ids[:, :-1], "next": ids[:, 1:]}, Key(0))
    assert batch["targets"][:, :11].tolist() == ids[:, 10:].tolist()
    assert batch["role"][:, 11:21].abs().sum() == 0


@pytest.mark.slow
def test_a_quick_look_measures_every_arm() -> None:
    claim = find_paper("unilm-v2").claim("one-model-for-both")
    assert claim is not None
    found = run_claim(claim)
    arms = {cell["arm"] for cell in found.cells}
    assert {need for gate in claim.gates for need in gate.needs} <= arms
    assert all(math.isfinite(cell["value"]) for cell in found.cells)

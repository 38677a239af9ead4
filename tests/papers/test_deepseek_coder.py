"""DeepSeek-Coder's claim that needs no training, and what the other one trains and measures."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from torchstone.data.infilling import Sentinels
from torchstone.data.tokenizer import BYTE_CHARACTERS, byte_level
from torchstone.evaluate.scoring import Scorer
from torchstone.model.site import initialise
from torchstone.model.transformer import TransformerSpec
from torchstone.papers import deepseek_coder, find_paper
from torchstone.papers._reproduce import run_claim
from torchstone.papers.deepseek_coder import ForgottenSpec
from torchstone.spec import validate


def test_the_claim_without_training_holds() -> None:
    claim = find_paper("deepseek-coder").claim("exact")
    assert claim is not None
    found = run_claim(claim)
    assert {row["answer"] for row in found.gates} == {"holds"}, found.numbers


def test_the_forgotten_arm_leaves_the_parts_in_their_places() -> None:
    encoding: Any = ForgottenSpec(tokenizer="bytes").encoding()
    assert encoding.arranged(Sentinels(7, 8, 9), [1, 2], [3], [4]) == [7, 1, 2, 8, 3, 9, 4]
    assert encoding.settings != deepseek_coder.InfillingDataSpec(tokenizer="bytes").encoding().settings


def test_nats_are_of_the_second_ids_after_the_first() -> None:
    fields = {"width": 16, "depth": 1, "vocabulary": 262, "context": 32, "attention": {"heads": 2}}
    model: Any = initialise(validate(TransformerSpec, fields).build(), 0).eval()
    scorer = Scorer(model, byte_level({character: value for value, character in enumerate(BYTE_CHARACTERS)}))
    pairs = [([256, 5, 6], [7, 8]), ([256], [9, 10, 11])]
    total = 0.0
    for before, ids in pairs:
        with torch.no_grad():
            logprobs = model(torch.tensor([[*before, *ids]])).logits[0].log_softmax(-1)
        total -= sum(float(logprobs[len(before) - 1 + n, token]) for n, token in enumerate(ids))
    assert deepseek_coder._nats(scorer, pairs) == pytest.approx(total / 5, rel=1e-5)


@pytest.mark.slow
def test_a_quick_look_measures_every_arm() -> None:
    claim = find_paper("deepseek-coder").claim("half")
    assert claim is not None
    found = run_claim(claim)
    arms = {cell["arm"] for cell in found.cells}
    assert {need for gate in claim.gates for need in gate.needs} <= arms
    assert all(math.isfinite(cell["value"]) for cell in found.cells)

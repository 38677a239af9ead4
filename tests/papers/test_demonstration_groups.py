"""Structured prompting's claim of behaviour: its arms are the prompts that they are named after."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from torchstone.adapt import StructuredPrompt
from torchstone.data.episodes import EpisodesSpec
from torchstone.generate import Engine
from torchstone.model.site import initialise
from torchstone.model.transformer import TransformerSpec
from torchstone.papers import structured_prompting as paper
from torchstone.papers._claim import Effect
from torchstone.spec import validate

SIZE = paper._Size(steps=0, seeds=1, rules=2, questions=3, fit=4)
SPEC = EpisodesSpec(**SIZE.data, demonstrations=4 * 16, questions=3)
LABELS = [[8], [9], [10], [11]]


@pytest.fixture(scope="module")
def engine() -> Engine:
    fields = {
        "width": 32,
        "depth": 2,
        "vocabulary": SPEC.vocabulary,
        "context": 14,
        "attention": {"heads": 4},
        "position": "alibi",
        "residual": {"kind": "pre", "std": 0.3},
    }
    return Engine(initialise(validate(TransformerSpec, fields).build(), 0).eval(), compile="off")


@pytest.fixture(scope="module")
def episodes() -> np.ndarray:
    return SPEC.sequences("test", np.arange(2))[0]


@pytest.fixture(scope="module")
def answers(engine: Engine, episodes: np.ndarray) -> dict[str, torch.Tensor]:
    return paper._answered(SIZE, engine, SPEC, *episodes.tolist())


@torch.no_grad()
def plain(engine: Engine, prompt: np.ndarray, asked: np.ndarray) -> torch.Tensor:
    """Probabilities of the labels after one ordinary prompt."""
    rows = [
        engine.model(torch.tensor([[*prompt.ravel(), *question]])).logits[0, -1].softmax(-1)[8:] for question in asked
    ]
    return torch.stack(rows).double()


def test_arms_are_the_prompts_that_they_are_named_after(
    engine: Engine, episodes: np.ndarray, answers: dict[str, torch.Tensor]
) -> None:
    mine, other = episodes.reshape(2, -1, 3)
    asked, groups = mine[64:, :2], mine[:64].reshape(16, 4, 3)

    def same(arm: str, wanted: torch.Tensor) -> None:
        torch.testing.assert_close(answers[arm], wanted, rtol=0, atol=1e-5)

    alone = [plain(engine, group, asked) for group in groups[:8]]
    same("conventional", alone[0])
    same("conventional again", alone[1])
    same("ensemble", torch.stack(alone).mean(0))
    same("concatenated", plain(engine, groups[:8], asked))
    same("conventional, 1 demonstrations", plain(engine, groups[0][:1], asked))

    def prompted(some: np.ndarray, **options: Any) -> torch.Tensor:
        made = StructuredPrompt(engine, group_length=12, bos=None, **options)
        made.add(some.reshape(-1, 12).tolist())
        return made.score(asked.tolist(), LABELS).exp()

    same("structured", prompted(groups[:8]))
    same("structured, 16 groups", prompted(groups))
    same("not weighed", prompted(groups[:8], weight=1))
    same("not emptied", prompted(np.concatenate([other[:28].reshape(7, 4, 3), groups[:1]])))
    assert (answers["structured"] - answers["not weighed"]).abs().max() > 1e-4


@pytest.mark.slow
def test_the_claim_runs_and_every_gate_has_its_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    size = paper._Size(steps=3, seeds=2, rules=2, questions=2, fit=4, batch=2)
    monkeypatch.setitem(paper._SIZES, "quick", size)
    assert paper.MORE.run is not None
    values = paper.MORE.run("quick", 0).values
    assert all(isinstance(gate, Effect) and set(gate.needs) <= set(values) for gate in paper.MORE.gates)
    assert all(set(by_seed) == {0, 1} and 0 <= min(by_seed.values()) <= 1 for by_seed in values.values())

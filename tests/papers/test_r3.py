"""The claims of routing replay: what is disturbed and when, what is compared, and that they run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchstone.keys import Key
from torchstone.model.routed import routed_layers
from torchstone.objectives import Batch, Facts
from torchstone.papers import r3
from torchstone.papers._claim import Claim, decide_claim
from torchstone.spec import validate
from torchstone.train import training

PROMPTS: Batch = {
    "ids": torch.tensor([[0, 3, 4, 9], [0, 5, 1, 1]]),
    "valid": torch.tensor([[True] * 4, [True, True, False, False]]),
    "example": torch.tensor([3, 4]),
}


def experts() -> Any:
    return r3._model(0, {"kind": "topk", "normalise": True}).eval()


def objective(**fields: Any) -> Any:
    usual = {"rewards": [{"kind": "language", "alphabet": "abcdef"}], "sampling": {"max_new_tokens": 6}, "group": 3}
    spec = validate(r3.NoisySpec, {**usual, "truncated": "keep", "replay": "rollout", **fields})
    return spec.build(Facts(r3._VOCABULARY, tokenizer=r3._Letters(), rows={n: {} for n in range(9)}))


def test_noise_is_on_routers_only_while_answers_to_train_on_are_written() -> None:
    model = experts()

    def written(count: int, noise: float, key: int = 1) -> list[tuple[int, ...]]:
        with torch.no_grad():
            found = objective(noise=noise)._answers(model, PROMPTS, count, Key(key), True)
        assert all("score" not in router.__dict__ for router in routed_layers(model).values())
        return [each.logprobs for each in found]

    assert written(3, 0.5) == written(3, 0.5) != written(3, 0.0)
    assert written(1, 0.5) == written(1, 0.0)
    batch = objective(noise=0.5).collect(model, PROMPTS, Key(1))
    plain = {name: value for name, value in batch.items() if name != "routes"}
    live, replayed = (objective()(model, rows, Key(0)).metrics["sampler_kl"][0] for rows in (plain, batch))
    assert 0 < replayed < live


def test_the_defect_gives_each_token_the_routes_of_the_one_before() -> None:
    model = experts()
    right, wrong = (
        objective(noise=0.5, turned=turned)._answers(model, PROMPTS, 3, Key(1), True) for turned in (False, True)
    )
    for a, b in zip(right, wrong, strict=True):
        assert a.ids == b.ids and a.routes is not None and b.routes is not None
        assert np.array_equal(a.routes[:-1], b.routes[1:]) and np.array_equal(a.routes[-1], b.routes[0])


def test_engines_are_compared_on_the_same_tokens_and_weights() -> None:
    model, ids = experts(), torch.arange(2_000).view(40, 50) % 39
    found = r3._disagreement(model, ids, Key(0))
    assert found["own routes"] == found["live"] and found["replayed"] != found["live"]
    assert found["routes of the token before"][0] > found["live"][0]
    assert 0 < found["apart"][0] <= found["apart"][1] < 0.5
    assert next(model.parameters()).dtype == torch.float32


def test_sums_are_right_and_those_to_measure_with_are_not_trained_on(tmp_path: Path) -> None:
    r3._write(tmp_path, replace(r3._SIZES["quick"], measured=100), 3)
    valid, sums = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("valid", "sums")
    )
    assert len(valid) == 100 and len({row["prompt"] for row in valid + sums}) == len(valid + sums) == r3._BELOW**2
    for row in valid + sums:
        a, b = row["prompt"].removesuffix("=").split("+")
        assert int(a) + int(b) == int(row["answer"]) == int(row["response"])


@pytest.mark.slow
@pytest.mark.parametrize("claim", [r3.MISMATCH, r3.TRAINING], ids=lambda claim: claim.id)
def test_claims_of_replay_run(claim: Claim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "plot_curve", lambda *arguments: None)
    assert claim.run is not None
    measured = claim.run("quick", 5)
    verdict, rows = decide_claim(claim, measured.numbers, {a: [*v.values()] for a, v in measured.values.items()})
    assert verdict == "inconclusive" and len(rows) == len(claim.gates)  # one seed decides nothing
    arms = [arm for gate in claim.gates for arm in gate.needs]
    assert np.isfinite([value for arm in arms for value in measured.values[arm].values()]).all()

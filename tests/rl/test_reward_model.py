"""Reward models: the loss of the paper, written here anew; what a run of it thinks of texts; what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.objectives import Batch
from torchstone.recipe import load_recipe
from torchstone.rl.objectives.reward_model import RewardModel, RewardModelObjectiveSpec
from torchstone.rl.reward import Scorer
from torchstone.rl.reward.reward_model import ModelReward, RewardModelSpec
from torchstone.rl.trajectory import read
from torchstone.train import training
from torchstone.train.run import RunFolder, build_model
from torchstone.train.training import train

HEAD: dict[str, Any] = {"kind": "classification", "classes": 1, "pool": "last"}
SHORT: dict[str, Any] = {"steps": 5, "batch": 4, "device": "cpu", "threads": 1, "compile": "off", "log_every": 1,
                         "save_every": 2}  # fmt: skip
Gradients = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "plot_curve", lambda *arguments: None)


# ------------------------------------------------------------------------------------------------------- the loss


def model_of(seed: int = 1, **fields: Any) -> nn.Module:
    body = {**tiny.MODEL, "vocabulary": 30, "context": 16, "residual": {"std": 0.3}, "head": HEAD, **fields}
    return build_model(load_recipe({"model": body}).model, seed).double()


def batch_of(count: int = 4, length: int = 9) -> Batch:
    """Prompts of three or four tokens and responses of two to five, padded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 30, (count, 2, length), generator=generator)
    prompt = 3 + torch.arange(count) % 2
    size = prompt[:, None] + torch.randint(2, 6, (count, 2), generator=generator)
    at = torch.arange(length)
    valid = at < size[..., None]
    after = torch.randint(0, 30, (count, 2, length), generator=generator)
    return {"ids": ids, "next": torch.where(valid & (at >= prompt[:, None, None] - 1), after, -100), "valid": valid}


def rewards_of(model: Any, batch: Batch) -> torch.Tensor:
    """(B, 2), from the last state of each row, one by one and without its padding."""
    rows = []
    for ids_2T, valid_2T in zip(batch["ids"], batch["valid"], strict=True):
        for ids, valid in zip(ids_2T, valid_2T, strict=True):
            hidden_TD = model(ids[valid][None], outputs="none").hidden[0]
            rows.append(model.head.out(hidden_TD[-1])[0])
    return torch.stack(rows).view(-1, 2)


def loss_of(objective: RewardModel, model: nn.Module, batch: Batch) -> tuple[float, Gradients]:
    """Mean loss and its gradient, as the engine takes them."""
    model.zero_grad()
    pairs = objective.counts(batch)["pairs"]
    terms = objective(model, batch, Key(0)).terms.values()
    loss = sum((term.weight * term.total / pairs for term in terms), torch.zeros(()))
    loss.backward()
    return loss.item(), gradient_of(model)


def gradient_of(model: nn.Module) -> Gradients:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: Gradients, wanted: Gradients) -> None:
    assert found.keys() == wanted.keys() and any(value.abs().max() > 1e-4 for value in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("centering", [0.0, 0.3])
def test_value_gradient_and_metrics_are_those_of_the_formula(float64: None, centering: float) -> None:
    model, batch = model_of(), batch_of(6)
    objective = RewardModel(RewardModelObjectiveSpec(centering=centering))
    found, gradient = loss_of(objective, model, batch)
    model.zero_grad()
    r = rewards_of(model, batch)
    naive = sum(
        (-(a - b).sigmoid().log() + centering * (a + b) ** 2 for a, b in r.unbind()), torch.zeros(())
    ) / len(r)  # fmt: skip
    naive.backward()
    assert found == pytest.approx(naive.item(), rel=1e-12)
    assert_close(gradient, gradient_of(model))
    scores = objective.evaluate(model, batch).scores
    assert {name: (total / count).item() for name, (total, count) in scores.items()} == pytest.approx(
        {
            "accuracy": (r[:, 0] > r[:, 1]).double().mean().item(),
            "reward_margin": (r[:, 0] - r[:, 1]).mean().item(),
            "reward_chosen": r[:, 0].mean().item(),
            "reward_rejected": r[:, 1].mean().item(),
        }
    )
    assert objective.evaluate(model, batch).terms.keys() == {"loss"}


def test_responses_that_are_the_same_have_ln_2_and_a_tie_counts_half(float64: None) -> None:
    batch, objective = batch_of(), RewardModel(RewardModelObjectiveSpec())
    same = {name: value[:, :1].expand(-1, 2, -1).contiguous() for name, value in batch.items()}
    result = objective.evaluate(model_of(), same)
    assert result.terms["loss"].total.item() / 4 == pytest.approx(math.log(2), abs=1e-12)
    assert result.scores["accuracy"][0].item() == 2


def test_a_constant_on_all_rewards_changes_the_loss_only_where_they_are_centred(float64: None) -> None:
    model, batch = model_of(), batch_of()
    plain, centred = (RewardModel(RewardModelObjectiveSpec(centering=c)) for c in (0.0, 0.1))
    before = [loss_of(each, model, batch)[0] for each in (plain, centred)]
    with torch.no_grad():
        model.head.out.bias.add_(3.0)  # type: ignore[union-attr, operator]
    after = [loss_of(each, model, batch)[0] for each in (plain, centred)]
    assert after[0] == pytest.approx(before[0], rel=1e-12) and after[1] > before[1] + 1


def test_padding_order_and_pairs_without_a_target_change_nothing(float64: None) -> None:
    model, batch, objective = model_of(), batch_of(), RewardModel(RewardModelObjectiveSpec(centering=0.1))
    loss, gradient = loss_of(objective, model, batch)
    fill = {"ids": 7, "next": -100, "valid": False}
    longer = {name: nn.functional.pad(value, (0, 4), value=fill[name]) for name, value in batch.items()}
    other = {**batch, "ids": torch.where(batch["valid"], batch["ids"], 11)}
    turned = {name: value.flip(0) for name, value in batch.items()}
    empty = batch_of(2)
    empty["next"][:] = -100
    more = {name: torch.cat([value, empty[name]]) for name, value in batch.items()}
    for same in (longer, other, turned, more):
        found, theirs = loss_of(objective, model, same)
        assert found == pytest.approx(loss, rel=1e-12)
        assert_close(theirs, gradient)
    model.head.register_forward_hook(  # type: ignore[union-attr]
        lambda module, inputs, out: torch.where(torch.arange(len(out))[:, None] >= 8, torch.nan, out)
    )
    found, theirs = loss_of(objective, model, more)
    assert found == pytest.approx(loss, rel=1e-12)
    assert_close(theirs, gradient)


# ---------------------------------------------------------------------------------------------------------- a run


def test_cut_and_resumed_equals_uncut_bit_for_bit(tmp_path: Path) -> None:
    def run(name: str, resume: bool = False) -> RunFolder:
        made = tiny.compared(
            tmp_path,
            model={**tiny.MODEL, "dropout": 0.2},
            objective={"centering": 0.01},
            optimizer={"lr": 0.01},
            trainer={**SHORT, "accumulate": 2, "ema": 0.9},
        )
        return train(made, out=tmp_path / name, resume=resume, quiet=True)

    whole = run("whole")
    with tiny.cut_after(3):
        run("cut")
    tiny.assert_same_run(run("cut", resume=True), whole)
    rows = whole.metrics()
    assert {"accuracy", "reward_margin", "reward_chosen", "reward_rejected"} <= rows[1].keys()
    assert {"valid_accuracy", "valid_reward_margin"} <= rows[0].keys() and rows[-1]["test_accuracy"] >= 0


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    made, text = tiny.compared(tmp_path), tiny.recipe(tmp_path)

    def refused(match: str, **sections: Any) -> None:
        with pytest.raises(TorchstoneError, match=match):
            train({**made, **sections}, out=tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()

    for head in ({"kind": "lm"}, {**HEAD, "classes": 2}, {"kind": "token_classification", "classes": 1}):
        refused(
            r"needs one logit a text, and the model's are \(4, .*\); set model.head: {kind: classification, classes: 1",
            model={**tiny.MODEL, "head": head},
        )
    refused("set model.head.pool: last", model={**tiny.MODEL, "head": {**HEAD, "pool": "first"}})
    refused("objective reward_model compares pairs, and data text has none", data=text["data"])
    refused("data preferences has pairs, and objective causal_lm compares none", objective="causal_lm")


def test_an_encoder_scores_too(tmp_path: Path) -> None:
    for pool in ("first", "mean"):
        model = {**tiny.MODEL, "causal": False, "head": {**HEAD, "pool": pool}, "residual": {"std": 0.3}}
        row = tiny.trainer(tiny.compared(tmp_path, model=model)).train_step()
        assert row["loss"] > 0 and row["reward_margin"] != 0


# ----------------------------------------------------------------------------------------------------- the reward


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `sft`, a policy, and `rm`, a reward model that began from it and prefers long answers."""
    folder = tmp_path_factory.mktemp("rewards")
    tiny.saved(folder / "sft", {**tiny.recipe(folder), "model": {**tiny.MODEL, "context": 32}})
    rows = [{"prompt": f"{n}?", "chosen": "ab" * (2 + n % 4), "rejected": "b" * (1 + n % 2)} for n in range(60)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "init_from": str(folder / "sft"),
        "model": {"head": HEAD},
        "data": {"kind": "preferences", "path": str(folder / "pairs.jsonl"), "block": 24},
        "objective": "reward_model",
        "optimizer": {"lr": 0.02},
        "trainer": {**SHORT, "steps": 25, "batch": 8},
        "evaluate": {"every": 25},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "plot_curve", lambda *arguments: None)
        train(recipe, out=folder / "rm", quiet=True)
    return folder


def reward(folder: Path, **fields: Any) -> ModelReward:
    found = RewardModelSpec(run=str(folder / "rm"), device="cpu", **fields).build()
    assert isinstance(found, ModelReward)
    return found


def test_a_reward_model_begins_from_a_policy_and_learns(folder: Path) -> None:
    run = RunFolder(folder / "rm")
    measured = [row["valid_accuracy"] for row in run.metrics() if "valid_accuracy" in row]
    assert measured[-1] == 1.0 and run.metrics()[1]["loss"] == pytest.approx(math.log(2), abs=0.1)
    assert run.recipe.data.tokenizer.dump()["kind"] == "bytes"  # type: ignore[attr-defined]
    (better, worse) = reward(folder).batch(["abababab", "b"], [{"prompt": "7?"}] * 2)
    assert better is not None and worse is not None and better > worse + 1


def test_a_text_scores_the_same_alone_in_any_batch_and_in_the_objective(folder: Path) -> None:
    run = RunFolder(folder / "rm")
    pairs = run.recipe.data.prepare().train
    batch = pairs.batch(Key(0), 0, 6)
    model = run.model()
    with torch.no_grad():
        scores = RewardModel(RewardModelObjectiveSpec()).evaluate(model, batch).scores
        both = rewards_of(model, batch)
    assert scores["reward_chosen"][0].item() == pytest.approx(both[:, 0].sum().item(), abs=1e-5)
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    tokenizer = run.tokenizer()
    prompts = [tokenizer.decode(pairs.pairs[n].prompt) for n in batch["example"]]
    rows = [next(line for line in lines if line["prompt"] == prompt) for prompt in prompts]
    texts = [row[side] for row in rows for side in ("chosen", "rejected")]
    twice = [row for row in rows for _ in range(2)]
    wanted = pytest.approx(both.flatten().tolist(), abs=1e-5)
    assert [reward(folder)(text, row) for text, row in zip(texts, twice, strict=True)] == wanted
    for size in (3, 32):
        assert reward(folder, batch=size).batch(texts, twice) == wanted
    assert reward(folder).batch(texts[::-1], twice[::-1])[::-1] == wanted


def test_only_the_last_match_is_scored_and_a_text_without_one_as_an_empty_one(folder: Path) -> None:
    row, whole = {"prompt": "7?"}, reward(folder)
    last = reward(folder, inside="<a>(.*?)</a>")
    assert last("b<a>bb</a>b<a>ab\nab</a>bb", row) == whole("ab\nab", row) != whole("bb", row)
    assert last("b<a>abab", row) == whole("", row)
    assert reward(folder, inside="ab+")("aab b abb a", row) == whole("abb", row)
    assert reward(folder, inside="x(y)?")("abx", row) == whole("", row)  # a group that takes no part


def test_prompts_lose_their_beginning_and_answers_without_room_are_not_scored(folder: Path) -> None:
    scored, alone = reward(folder), reward(folder, prompt=None)
    room = 24 - 1  # the separator in front
    long = "0123456789" * 4
    assert scored("abab", {"prompt": long}) == scored("abab", {"prompt": long[-(room - 4) :]})
    assert scored("abab", {"prompt": long}) != scored("abab", {"prompt": long[-(room - 5) :]})
    assert scored("a" * room, {"prompt": long}) == alone("a" * room, {}) is not None
    assert scored("a" * (room + 1), {"prompt": ""}) is None
    assert scored.batch(["a" * 30, "ab"], [{"prompt": 7}] * 2) == [None, pytest.approx(scored("ab", {"prompt": "7"}))]
    assert scored.batch([], []) == []
    assert reward(folder, prompt="question").spec.columns == ("question",) and alone.spec.columns == ()


def test_bad_runs_are_refused_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    for run, match in (
        (folder / "nowhere", "nowhere: no such run"),
        (tmp_path, "not a run"),
        (folder / "sft", "reward reward_model: .*sft was trained by causal_lm, not by reward_model"),
    ):
        with pytest.raises(TorchstoneError, match=match):
            RewardModelSpec(run=str(run)).build()
    with pytest.raises(ValueError, match="is no regular expression"):
        RewardModelSpec(run="run", inside="(")


def test_policies_are_trained_and_sampled_by_it(folder: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    rewards = [
        {"kind": "reward_model", "run": str(folder / "rm"), "device": "cpu"},
        {"kind": "reward_model", "run": str(folder / "rm"), "device": "cpu", "inside": "b.*", "weight": 0.5},
    ]
    made = tiny.prompted(tmp_path, objective={"rewards": rewards}, trainer={**SHORT, "steps": 2})
    run = train(made, out=tmp_path / "policy", quiet=True)
    row = next(row for row in run.metrics() if "reward" in row)
    assert row["unscored"] == 0 and row["reward_std"] > 0
    assert row["reward"] == pytest.approx(row["reward_reward_model"] + 0.5 * row["reward_reward_model_2"])
    out = tmp_path / "out.jsonl"
    asked = f"{{kind: reward_model, run: {folder / 'rm'}, device: cpu}}"
    done = cli(
        "rl", "sample", run.path, tmp_path / "sums.jsonl", "--n", 2, "--limit", 3, "--reward", asked, "--out", out
    )
    assert done.status == 0, done.err
    for each in read(out)[0]:
        wanted = reward(folder)(each.text, {"prompt": each.prompt_text})
        assert each.rewards["reward_model"] == pytest.approx(wanted, abs=1e-5)


# -------------------------------------------------------------------------------------------- many answers at once


class Lengths:
    """Scores texts by their length; notes how often it is asked."""

    def __init__(self, extra: Sequence[Any] = ()) -> None:
        self.asked, self.extra = 0, extra

    def __call__(self, text: str, row: Mapping[str, Any]) -> float | None:
        raise AssertionError("is asked for all at once")

    def batch(self, texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        self.asked += 1
        return [*(len(text) * row["by"] for text, row in zip(texts, rows, strict=True)), *self.extra]


def scorer_of(rule: Any) -> Scorer:
    scorer = Scorer([])
    scorer.rules = {"lengths": (RewardModelSpec(run="none"), rule)}
    return scorer


def test_a_reward_that_scores_many_is_asked_once_and_every_number_is_looked_at() -> None:
    texts, rows, examples = ["a", "bb", "ccc"], [{"by": 1}, {"by": 2}, {"by": 3}], [4, 4, 5]
    rule = Lengths()
    found = scorer_of(rule).score_all(texts, rows, examples)
    assert [each["lengths"] for each in found] == [1, 4, 9] and rule.asked == 1
    with pytest.raises(TorchstoneError, match="lengths: gave 4 scores for 3 answers, the first of them to prompt 4"):
        scorer_of(Lengths([1.0])).score_all(texts, rows, examples)
    for bad in (math.nan, math.inf, "1"):
        with pytest.raises(
            TorchstoneError, match=r"lengths: gave .* for an answer to prompt 5; a finite number or None"
        ):
            rule.batch = lambda texts, rows, bad=bad: [1.0, None, bad]  # type: ignore[method-assign, misc]
            scorer_of(rule).score_all(texts, rows, examples)
    with pytest.raises(
        TorchstoneError, match=r"failed for 3 answers, the first of them to prompt 4 \(KeyError: 'by'\)"
    ):
        scorer_of(Lengths()).score_all(texts, [{}, {}, {}], examples)
    assert scorer_of(Lengths()).score_all([], [], []) == []

"""Rollouts: what is sampled is what is trained on, whatever stands beside it; records of it; a training of it, cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from policies import Letters, transformer

import tiny
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.objectives import Facts, tokens_of
from torchstone.recipe import load_recipe
from torchstone.rl import logprobs
from torchstone.rl.objectives.policy_gradient import PolicyGradient, PolicyGradientSpec
from torchstone.rl.reward import Scorer
from torchstone.rl.reward.language import LanguageSpec
from torchstone.rl.rollout import PolicySampling, rollout
from torchstone.rl.trajectory import batch_of, dump, read
from torchstone.spec import validate
from torchstone.train import training
from torchstone.train.checkpoint import load_tensors
from torchstone.train.memory import training_memory
from torchstone.train.training import train

ROWS: dict[int, dict[str, Any]] = {n: {"answer": "b"} for n in range(20)}
PROMPTS = [[0, 3, 4], [0, 9], [0, 3, 4, 8, 8, 8, 2], [0, 20]]


def sampled(model: Any, count: int = 3, prompts: Any = PROMPTS, examples: Any = (5, 6, 7, 8), **fields: Any) -> Any:
    sampling = PolicySampling(**{"max_new_tokens": 7, **fields})
    scorer = Scorer([LanguageSpec(alphabet="abcdefghijkl")])
    return rollout(model, Letters(), prompts, examples, count, sampling, Key(3), scorer, ROWS)


def objective(**fields: Any) -> PolicyGradient:
    usual = {"rewards": [{"kind": "language", "alphabet": "abcdefghijkl"}], "sampling": {"max_new_tokens": 7}}
    spec = validate(PolicyGradientSpec, {**usual, "group": 3, "truncated": "keep", **fields})
    return PolicyGradient(spec, Facts(30, tokenizer=Letters(), rows=ROWS))


def test_an_answer_is_the_same_alone_in_any_batch_and_at_any_place_of_it() -> None:
    model = transformer()
    every = sampled(model)
    assert len({each.ids for each in every}) > 8 and {each.finish for each in every} == {"eos", "length"}
    alone = sampled(model, prompts=PROMPTS[1:2], examples=[6])
    assert [each.ids for each in alone] == [each.ids for each in every[3:6]]
    turned = sampled(model, prompts=PROMPTS[::-1], examples=[8, 7, 6, 5])
    assert [each.ids for each in turned[9:]] == [each.ids for each in every[:3]]
    more = sampled(model, count=5)
    assert [each.ids for each in more[5:8]] == [each.ids for each in every[3:6]]
    twice = sampled(model, prompts=[PROMPTS[1]] * 2, examples=[6, 6])
    assert len({each.ids for each in twice}) > 3  # a prompt that stands twice gets other answers the second time


@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8, "temperature": 1.5}],
    ids=lambda f: "-".join(f) or "-",
)  # fmt: skip
@pytest.mark.parametrize(
    "part",
    [{}, {"attention": {"kind": "retention", "heads": 2}}, {"attention": {"kind": "mla", "heads": 2}},
     {"position": "alibi"}, {"ffn": {"kind": "moe", "experts": 4}}, {"position": {"kind": "xpos"}}],
    ids=["softmax", "retention", "mla", "alibi", "moe", "xpos"],
)  # fmt: skip
def test_log_probabilities_of_cached_decoding_are_those_of_one_forward(part: dict[str, Any], fields: Any) -> None:
    """And so the ratio is 1, also where the sampler cuts its distribution."""
    model, made = transformer(**part).eval(), objective(sampling={"max_new_tokens": 7, **fields})
    batch = made.batch(model, sampled(model, **fields), [n // 3 for n in range(12)])
    with torch.no_grad():
        own = made._log_probabilities(model, batch)
    where = batch["next"] >= 0
    torch.testing.assert_close(own[where], batch["sampler"][where], atol=2e-5, rtol=0)
    if fields:  # over the whole vocabulary they would not be
        with torch.no_grad():
            whole = objective()._log_probabilities(model, batch)
        assert (whole[where] - own[where]).abs().max() > 0.05
    assert made(model, batch, Key(0)).metrics["sampler_gap"][0] / where.sum() < 2e-5


def test_a_token_that_the_policy_would_no_longer_keep_still_has_a_probability() -> None:
    model, other, made = transformer(), transformer(1), objective(sampling={"max_new_tokens": 7, "top_k": 1})
    batch = made.batch(model, sampled(model, top_k=1), [n // 3 for n in range(12)])
    with torch.no_grad():
        assert not made._log_probabilities(model, batch).any()  # one token holds everything
        moved = made._log_probabilities(other, batch)
    assert torch.isfinite(moved).all() and (moved < 0).any()


def test_log_probabilities_in_parts_have_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = transformer(), objective(sampling={"max_new_tokens": 7, "temperature": 0.8, "top_p": 0.9})
    batch = made.batch(model, sampled(model, temperature=0.8, top_p=0.9), [n // 3 for n in range(12)])

    def found() -> list[torch.Tensor]:
        loss = made(model, batch, Key(0)).terms["loss"].total
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    whole = found()
    monkeypatch.setattr(logprobs, "_LOGITS", 30 * 7)
    for a, b in zip(found(), whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_the_loss_is_over_what_was_written_and_nothing_is_tokenised_again() -> None:
    """Ids that no tokenizer would give for their own text are trained on as they are."""
    model, found = transformer(), sampled(transformer())
    batch = batch_of(found, 1)
    for row, each in enumerate(found):
        whole = [*each.prompt, *each.ids]
        assert batch["ids"][row][batch["valid"][row]].tolist() == whole[:-1]
        assert batch["next"][row][batch["next"][row] >= 0].tolist() == list(each.ids)
        first = len(each.prompt) - 1
        assert batch["next"][row, first : first + len(each.ids)].tolist() == list(each.ids)
        assert each.truncated == (each.ids[-1] != 0)
    logits = model(tokens_of(batch)).logits.log_softmax(-1)
    assert torch.isfinite(logits[batch["valid"]]).all()


def test_trajectories_come_back_as_they_were_dumped_and_changed_ids_are_refused(tmp_path: Path) -> None:
    found, settings, file = sampled(transformer()), {"temperature": 1.0}, tmp_path / "dump.jsonl"
    dump(file, found, settings)
    again, same = read(file)
    assert again == found and same == settings
    lines = file.read_text().splitlines()
    broken: dict[str, Any] = json.loads(lines[1])

    def refused(match: str, **changes: Any) -> None:
        file.write_text("\n".join([lines[0], json.dumps({**broken, **changes})]))
        with pytest.raises(TorchstoneError, match=match):
            read(file)

    refused(r"line 2: its ids are not those that were sampled", ids=[*broken["ids"][:-1], 29])
    refused(r"line 2: \d ids and 0 log-probabilities", logprobs=[])
    refused("line 2: was sampled with other settings", sampling={"temperature": 0.5})
    refused("line 2: no trajectory", something=1)
    file.write_text("\n")
    with pytest.raises(TorchstoneError, match="holds no trajectory"):
        read(file)


# --------------------------------------------------------------------------------------------------------- a training


def trained(folder: Path, name: str, resume: bool = False, **sections: Any) -> Any:
    return train(tiny.prompted(folder, **sections), out=folder / name, resume=resume, quiet=True)


@pytest.fixture(autouse=True)
def _no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "plot_curve", lambda *arguments: None)


STEPS: dict[str, Any] = {"steps": 5, "batch": 4, "accumulate": 2, "device": "cpu", "threads": 1, "compile": "off",
                         "log_every": 1, "save_every": 1}  # fmt: skip


@pytest.mark.parametrize(
    "rounds", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_cut_and_resumed_equals_uncut_bit_for_bit_also_between_rounds(tmp_path: Path, rounds: int) -> None:
    hard: dict[str, Any] = {
        "model": {**tiny.MODEL, "dropout": 0.2},
        "optimizer": {"lr": 0.01},
        "objective": {"rounds": rounds, "advantage": "batch_std"},
        "trainer": STEPS,
    }
    whole = trained(tmp_path, "whole", **hard)
    with tiny.cut_after(4):
        trained(tmp_path, "cut", **hard)
    kept = tmp_path / "cut" / "state" / "step-00000003" / "collected.safetensors"
    assert kept.exists() is (rounds > 1)
    if rounds > 1:
        assert {name.partition(".")[0] for name in load_tensors(kept)} == {"0", "1"}
    tiny.assert_same_run(trained(tmp_path, "cut", resume=True, **hard), whole)
    rows = [row for row in whole.metrics() if "loss" in row]
    wanted = {"reward", "reward_language", "reward_std", "flat_groups", "length", "truncated", "entropy", "clip_low",
              "clip_high", "sampler_gap", "sampler_kl", "sampler_far"}  # fmt: skip
    assert wanted <= rows[0].keys()
    assert rows[0]["sampler_gap"] < 1e-5 and rows[0]["entropy"] > 5
    assert {"valid_reward", "valid_pass@1", "valid_length", "valid_truncated"} <= whole.metrics()[0].keys()


def test_rounds_use_each_answer_once_and_whole_groups(tmp_path: Path) -> None:
    made = tiny.prompted(tmp_path, objective={"rounds": 4}, trainer={"batch": 8, "accumulate": 2})
    trainer = tiny.trainer(made)
    once = tiny.trainer(tiny.prompted(tmp_path, trainer={"batch": 8, "accumulate": 2}))
    whole = once.micro_batches(0)
    parts = [trainer.micro_batches(step) for step in range(4)]
    for micro in range(2):
        for name in ("ids", "next", "advantage", "example"):
            joined = torch.cat([part[micro][name] for part in parts])
            assert torch.equal(joined, whole[micro][name])
        assert all(len(part[micro]["ids"]) == 8 for part in parts)
        assert all(len(set(part[micro]["example"][:4].tolist())) == 1 for part in parts)
    assert not torch.equal(trainer.micro_batches(4)[0]["example"], whole[0]["example"])


def test_nothing_is_dropped_while_answers_are_written_and_trained_on(tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.prompted(tmp_path, model={**tiny.MODEL, "dropout": 0.5}))
    batches = trainer.micro_batches(0)
    assert trainer.model.training
    row = trainer.gradients(batches, 0)
    assert row["sampler_gap"] < 1e-5


def test_measuring_samples_by_the_example_alone(tmp_path: Path) -> None:
    found = []
    for batch in (2, 3):
        trainer = tiny.trainer(tiny.prompted(tmp_path, trainer={"batch": batch}))
        found.append(trainer.measure_split(trainer.source.valid, "valid"))  # type: ignore[arg-type]
    assert found[0] == pytest.approx(found[1]) and found[0]["valid_loss"] == pytest.approx(-found[0]["valid_reward"])


def test_a_reference_is_loaded_where_it_counts(tmp_path: Path) -> None:
    tiny.saved(tmp_path / "base", {**tiny.recipe(tmp_path), "trainer": {"seed": 7}})
    made = tiny.prompted(tmp_path, objective={"kl": {"beta": 0.1}}, trainer=STEPS, init_from=str(tmp_path / "base"))
    run = train(made, out=tmp_path / "held", quiet=True)
    rows = [row for row in run.metrics() if "kl" in row]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[-1]["kl"] > 0
    assert not any("reference" in name for name in load_tensors(run.path / "model.safetensors"))
    free = tiny.trainer({**made, "objective": {**made["objective"], "kl": {"beta": 0.0, "reference": "nowhere"}}})
    assert free.objective.reference is None


def test_what_does_not_go_together_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    def refused(match: str, **sections: Any) -> None:
        with pytest.raises(TorchstoneError, match=match):
            trained(tmp_path, "run", **sections)
        assert not (tmp_path / "run").exists()

    refused(
        r"reward exact: '.*sums.jsonl' line 1 has no field 'solution'",
        objective={"rewards": [{"kind": "exact", "answer": "solution"}]},
    )
    refused(r"trainer.batch: 2 does not divide into 4 rounds", objective={"rounds": 4})
    refused(r"needs a decoder alone; the model is none", model={**tiny.MODEL, "causal": False, "head": "mlm"})
    refused(r"reward python: no such file", objective={"rewards": [{"kind": "python", "function": "none.py:f"}]})
    (tmp_path / "f.py").write_text("def f(text, row):\n    return float('nan')\n")
    own = {"rewards": [{"kind": "python", "function": str(tmp_path / "f.py") + ":f"}]}
    refused(r"reward python: gave nan for an answer to '.*' line \d+; a finite number or None is needed", objective=own)
    made = {**tiny.recipe(tmp_path), "objective": tiny.prompted(tmp_path)["objective"]}
    with pytest.raises(TorchstoneError, match="needs prompts, as of data prompts"):
        train(made, out=tmp_path / "run", quiet=True)


def test_memory_is_known_but_for_what_answers_take(tmp_path: Path) -> None:
    found = training_memory(
        load_recipe(tiny.prompted(tmp_path, model={**tiny.MODEL, "vocabulary": 259, "context": 24}))
    )
    assert found.activations is None and found.weights == found.gradients > 0


@pytest.mark.slow
def test_a_policy_learns_what_is_rewarded_and_nothing_from_a_coin(tmp_path: Path) -> None:
    (tmp_path / "coin.py").write_text(
        "import hashlib\n\n\ndef coin(text, row):\n"
        "    return hashlib.sha256((text + row['prompt']).encode()).digest()[0] % 2\n"
    )
    settings = {"steps": 60, "batch": 8, "device": "cpu", "threads": 1, "compile": "off"}
    coin = {"rewards": [{"kind": "python", "function": f"{tmp_path / 'coin.py'}:coin"}]}
    watched = tiny.prompted(tmp_path)["objective"]["rewards"]
    for rewards, low, high in ((watched, 0.7, 1.0), ([*coin["rewards"], {**watched[0], "weight": 0.0}], 0.0, 0.45)):
        run = trained(tmp_path, f"run{low}", optimizer={"lr": 0.02}, trainer=settings, objective={"rewards": rewards})
        last = [row for row in run.metrics() if "reward_language" in row][-1]
        assert low <= last["reward_language"] <= high, last

"""Policy gradients: against the exact gradient of three tokens, naive loops and TRL; what changes nothing."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import policies
import pytest
import torch
from policies import LONGEST, Table, answers, log_probability, objective, written

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.objectives import Batch
from torchstone.rl.advantage import advantages
from torchstone.rl.objectives.policy_gradient import PolicyGradient, Written, token_losses

ADVANTAGES = ("group_std", "group_mean", "leave_one_out", "batch_std", "none")
AGGREGATES = ("token_mean", "sequence_mean", "constant")


@pytest.fixture(autouse=True)
def _float64(float64: None) -> Iterator[None]:
    yield


def reward_of(answer: tuple[int, ...]) -> float:
    """Something that hangs on all of an answer, its end too."""
    return float(np.sin(1 + sum((n + 2) * (token + 1) for n, token in enumerate(answer))) + 0.3 * len(answer))


def step_loss(made: PolicyGradient, model: Any, batches: list[Batch]) -> torch.Tensor:
    """The loss of a step, as the engine puts it together."""
    batches = made.agree(batches, lambda x: x)
    counts = [made.counts(batch) for batch in batches]
    total = torch.zeros(())
    for batch in batches:
        (term,) = made(model, batch, Key(0)).terms.values()
        total = total + term.weight * term.total / sum(count[term.over] for count in counts)
    return total


def gradient(made: PolicyGradient, model: Any, *batches: Batch) -> torch.Tensor:
    return torch.autograd.grad(step_loss(made, model, list(batches)), model.weight_VD)[0]


def naive_advantage(rewards: list[float], how: str) -> list[float]:
    mean = sum(rewards) / len(rewards)
    std = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
    if how == "none":
        return rewards
    if how == "leave_one_out":
        return [r - (sum(rewards) - r) / (len(rewards) - 1) for r in rewards]
    if how == "group_mean" or std == 0:
        return [r - mean for r in rewards]
    return [(r - mean) / std for r in rewards]  # with one group the step's deviation is the group's


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_the_expected_gradient_is_that_of_the_formula_over_all_pairs_of_answers(advantage: str, aggregate: str) -> None:
    """Every pair that a group of two can be, weighted by its probability. For the aggregation by a constant the sum is
    known without pairs: the policy gradient itself, or half of it with a mean that holds the answer too."""
    model, made = Table(), objective(group=2, advantage=advantage, aggregate=aggregate)
    every = answers()
    logps = [log_probability(model, answer) for answer in every]
    probability = [float(logp.sum().exp()) for logp in logps]
    assert len(every) == 15 and sum(probability) == pytest.approx(1, abs=1e-12)
    trajectories = [written(model, answer, reward_of(answer)) for answer in every]
    found, wanted = torch.zeros(3, 27), torch.zeros(())
    for a, b in itertools.product(range(len(every)), repeat=2):
        weight = probability[a] * probability[b]
        batch = made.batch(model, [trajectories[a], trajectories[b]], [0, 0])
        found += weight * gradient(made, model, batch)
        sizes = len(every[a]), len(every[b])
        for n, A, size in zip((a, b), naive_advantage([reward_of(every[a]), reward_of(every[b])], advantage), sizes,
                              strict=True):  # fmt: skip
            share = {"token_mean": 1 / sum(sizes), "sequence_mean": 0.5 / size, "constant": 0.5 / LONGEST}[aggregate]
            wanted = wanted - weight * A * share * logps[n].sum()
    torch.testing.assert_close(found, torch.autograd.grad(wanted, model.weight_VD, retain_graph=True)[0], atol=1e-12,
                               rtol=1e-10)  # fmt: skip
    factor = {"group_mean": 0.5, "leave_one_out": 1.0, "none": 1.0}.get(advantage)
    if aggregate == "constant" and factor is not None:
        expected = sum(logp.sum().exp() * reward_of(answer) for logp, answer in zip(logps, every, strict=True))
        exact = torch.autograd.grad(expected / LONGEST, model.weight_VD)[0]  # type: ignore[arg-type, operator]
        torch.testing.assert_close(found, -factor * exact, atol=1e-12, rtol=1e-10)
        assert exact.abs().max() > 1e-2


def some(model: Table, rewards: Any = None, count: int = 8) -> list[Any]:
    every = answers()
    given = [reward_of(every[(3 * n) % 15]) for n in range(count)] if rewards is None else rewards
    return [written(model, every[(3 * n) % 15], reward, n // 4) for n, reward in enumerate(given)]


# ------------------------------------------------------------------------------------------------------- advantages


def test_a_groups_advantages_add_up_to_nothing_and_have_the_deviation_of_a_population() -> None:
    rewards, groups = [0.1, 0.9, -2.0, 0.4, 5.0, 5.5], [0, 0, 0, 0, 1, 1]
    for how in ("group_std", "group_mean", "leave_one_out"):
        found, spread = advantages(rewards, groups, how)  # type: ignore[arg-type]
        for group in (0, 1):
            assert abs(found[np.array(groups) == group].sum()) < 1e-12
        assert spread[0] == pytest.approx(np.std(rewards[:4])) and spread[4] == pytest.approx(0.25)
    found, _ = advantages(rewards, groups, "group_std")
    assert found[:4].std() == pytest.approx(1) and found[4:].std() == pytest.approx(1)
    sample, _ = np.std(rewards[:4], ddof=1), None
    assert (found[0] * np.std(rewards[:4])) == pytest.approx(0.1 - np.mean(rewards[:4]))
    assert found[0] != pytest.approx((0.1 - np.mean(rewards[:4])) / sample, rel=1e-3)


@pytest.mark.parametrize("how", ["group_std", "group_mean", "leave_one_out", "batch_std"])
def test_a_group_of_equal_rewards_has_advantages_of_exactly_nothing(how: Any) -> None:
    for reward in (0.0, 1.0, 0.1 + 0.2, 1e6 / 3):
        found, spread = advantages([reward] * 5 + [1.0, 2.0], [0] * 5 + [1] * 2, how)
        assert not found[:5].any() and not spread[:5].any() and np.isfinite(found).all() and found[5:].any()


@pytest.mark.parametrize("how", ["group_std", "group_mean", "leave_one_out"])
def test_what_cannot_be_scored_is_in_no_mean(how: Any) -> None:
    with_none, spread = advantages([1.0, None, 3.0, 8.0], [0, 0, 0, 0], how)
    without, same = advantages([1.0, 3.0, 8.0], [0, 0, 0], how)
    assert with_none[[0, 2, 3]] == pytest.approx(without) and with_none[1] == 0 and spread[0] == same[0]
    alone, _ = advantages([None, 2.0, None], [0, 0, 0], how)
    assert not alone.any()


# ------------------------------------------------------------------------------------------------ what changes nothing


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_micro_batches_padding_and_order_change_nothing(advantage: str, aggregate: str) -> None:
    model, made = Table(), objective(group=4, advantage=advantage, aggregate=aggregate)
    found, groups = some(model), [0, 0, 0, 0, 1, 1, 1, 1]
    whole = gradient(made, model, made.batch(model, found, groups))
    assert whole.abs().max() > 1e-3

    def same(*batches: Batch) -> None:
        torch.testing.assert_close(gradient(made, model, *batches), whole, atol=1e-13, rtol=1e-10)

    same(*(made.batch(model, found[n : n + 4], groups[n : n + 4]) for n in (0, 4)))
    order = [6, 1, 7, 0, 3, 2, 5, 4]
    same(made.batch(model, [found[n] for n in order], [groups[n] for n in order]))
    batch = made.batch(model, found, groups)
    wider = {
        name: torch.nn.functional.pad(value, (0, 5), value=-100 if name == "next" else 0)
        if name in ("ids", "valid", "next", "sampler") else value for name, value in batch.items()
    }  # fmt: skip
    same(wider)
    pieces = [
        {name: value[a:b] for name, value in made.agree([batch], lambda x: x)[0].items()} for a, b in ((0, 3), (3, 8))
    ]
    total = objective(group=4, advantage="none" if advantage == "batch_std" else advantage, aggregate=aggregate)
    torch.testing.assert_close(gradient(total, model, *pieces), whole, atol=1e-13, rtol=1e-10)


def test_what_is_not_written_by_the_policy_may_be_anything() -> None:
    """Prompt, padding, and the rows that could not be scored: hidden states of NaN there are never looked at."""
    model, made = Table(), objective(group=4)
    batch = made.batch(model, some(model, [1.0, 0.0, None, 0.5] * 2), [0] * 4 + [1] * 4)
    clean = gradient(made, model, batch)
    outside = batch["next"] < 0
    assert outside[2].all() and outside[6].all() and not outside[0].all()
    handle = model.register_forward_hook(
        lambda module, inputs, out: replace(out, hidden=torch.where(outside[..., None], torch.nan, out.hidden))
    )
    batch = {**batch, "sampler": torch.where(outside, torch.nan, batch["sampler"])}
    torch.testing.assert_close(gradient(made, model, batch), clean, rtol=0, atol=0)
    handle.remove()
    left = [each for n, each in enumerate(some(model, [1.0, 0.0, None, 0.5] * 2)) if n % 4 != 2]
    torch.testing.assert_close(gradient(made, model, made.batch(model, left, [0] * 3 + [1] * 3)), clean)


def test_the_end_token_is_trained_and_the_prompt_is_not() -> None:
    model, made = Table(), objective(group=2, advantage="none", aggregate="token_mean")
    batch = made.batch(model, [written(model, (1, 0), 1.0), written(model, (0,), 0.0)], [0, 0])
    assert batch["next"].tolist() == [[1, 0], [0, -100]] and batch["ids"][0].tolist() == [0, 1]
    found = gradient(made, model, batch)
    logp = log_probability(model, (1, 0))
    torch.testing.assert_close(found, torch.autograd.grad(-logp.sum() / 3, model.weight_VD)[0])
    batch["next"][0, 1] = -100  # the defect: the end is taken for padding
    assert not torch.allclose(gradient(made, model, batch), found)


def test_groups_without_variance_move_nothing_also_under_a_reference() -> None:
    model = Table()
    for flat, moved in ((False, False), (True, True)):
        made = objective(group=4, kl={"beta": 0.5, "flat_groups": flat, "reference": "r"})
        made.__dict__["reference"] = Table(1)
        batch = made.batch(model, some(model, [1.0] * 8), [0] * 4 + [1] * 4)
        assert bool(gradient(made, model, batch).any()) is moved
        metrics = made(model, batch, Key(0)).metrics
        assert metrics["flat_groups"][0] == metrics["flat_groups"][1] == 8 and metrics["kl"][0] > 0


# --------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_the_two_corners_that_clip_have_no_gradient_and_the_others_have(ratio: str) -> None:
    for advantage, away, clipped in ((1.0, 0.5, True), (1.0, -0.5, False), (-1.0, -0.5, True), (-1.0, 0.5, False)):
        logp = torch.full((2,), -1.0, requires_grad=True)
        of = Written(torch.tensor([0, 0]), torch.tensor([2]), logp, logp.detach() - away, logp.detach() - away,
                     torch.tensor([advantage]))  # fmt: skip
        loss, seen = token_losses(objective(ratio=ratio, clip=[0.2, 0.3]).spec, of)
        loss.sum().backward()
        assert bool(logp.grad.any()) is not clipped  # type: ignore[union-attr]
        assert seen["clip_high"].any() == (clipped and away > 0) and seen["clip_low"].any() == (clipped and away < 0)


def test_the_divergence_is_never_negative_and_its_mean_is_the_kl() -> None:
    """Over all tokens of a vocabulary of five, weighted by the policy."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(5, generator=generator).log_softmax(-1) for _ in range(2))
    spec = objective(kl={"beta": 1.0, "reference": "r"}).spec
    zero = torch.zeros(5)
    of = Written(torch.arange(5), torch.ones(5), ours, ours, ours, zero, theirs)
    loss, seen = token_losses(spec, of)
    assert (seen["kl"] > 0).all() and torch.equal(loss, seen["kl"])
    kl = (ours.exp() * (ours - theirs)).sum()
    torch.testing.assert_close((ours.exp() * seen["kl"]).sum(), kl, rtol=1e-12, atol=1e-12)
    assert not token_losses(spec, replace(of, reference_N=ours))[1]["kl"].any()


def test_foreign_log_probabilities_are_corrected() -> None:
    old, zero = torch.log(torch.tensor([0.5, 0.4, 0.1])), torch.zeros(3)
    sampler = torch.log(torch.tensor([0.5, 0.1, 0.4]))  # weights 1, 4, 1/4
    for how, wanted in (("none", [1, 1, 1]), ("truncate", [1, 3, 0.25]), ("mask", [1, 0, 0.0])):
        of = Written(torch.arange(3), torch.ones(3), old, old, sampler, zero + 1)
        loss, seen = token_losses(objective(correction=how, cap=3.0).spec, of)
        torch.testing.assert_close(-loss, torch.tensor(wanted, dtype=old.dtype))
        assert (seen["sampler_kl"] >= 0).all() and seen["sampler_gap"][1] == pytest.approx(np.log(4))
        assert seen["sampler_far"].tolist() == [False, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize(
    ("theirs", "ours"), [("grpo", "sequence_mean"), ("bnpo", "token_mean"), ("dr_grpo", "constant")]
)
def test_loss_and_gradient_are_trls_on_the_same_log_probabilities(theirs: str, ours: str, ratio: str) -> None:
    """`trl.GRPOTrainer._compute_loss` itself, of a stand-in for its trainer, with old, reference and sampler
    log-probabilities of their own."""
    trl = pytest.importorskip("trl")
    R, T = 6, 5
    generator = torch.Generator().manual_seed(0)
    logp = (-torch.rand(R, T, generator=generator)).requires_grad_()
    old, reference, sampler = (logp.detach() + 0.4 * torch.randn(R, T, generator=generator) for _ in range(3))
    advantage = torch.randn(R, generator=generator)
    mask = torch.arange(T) < torch.tensor([5, 1, 3, 4, 2, 5])[:, None]
    same = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, num_processes=1,
        reduce=lambda x, reduction: x,
    )  # fmt: skip
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp, torch.zeros(R, T), None),
        model=SimpleNamespace(training=True), accelerator=same, beta=0.3, epsilon_low=0.2, epsilon_high=0.28,
        loss_type=theirs, importance_sampling_level=ratio, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        aux_loss_enabled=False, use_vllm=True, vllm_importance_sampling_correction=True, max_completion_length=9,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
    )  # fmt: skip
    weight = (old - sampler).exp().clamp(max=2.0)
    blank = torch.zeros(R, T, dtype=torch.long)
    inputs = {
        "prompt_ids": blank[:, :1], "prompt_mask": blank[:, :1] + 1, "completion_ids": blank,
        "completion_mask": mask.long(), "advantages": advantage, "old_per_token_logps": old,
        "ref_per_token_logps": reference, "importance_sampling_ratio": weight,
    }  # fmt: skip
    loss = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    (wanted,) = torch.autograd.grad(loss, logp)

    spec = objective(
        ratio=ratio, clip=[0.2, 0.28], kl={"beta": 0.3, "reference": "r"}, correction="truncate", cap=2.0
    ).spec
    row = mask.nonzero()[:, 0]
    of = Written(row, mask.sum(1), logp[mask], old[mask], sampler[mask], advantage, reference[mask])
    each, _ = token_losses(spec, of)
    mine = {
        "sequence_mean": (each / mask.sum(1)[row]).sum() / R,
        "token_mean": each.sum() / mask.sum(),
        "constant": each.sum() / (R * 9),
    }[ours]
    assert mine.item() == pytest.approx(loss.item(), rel=1e-10)
    torch.testing.assert_close(torch.autograd.grad(mine, logp)[0], wanted, rtol=1e-9, atol=1e-12)


def test_bad_options_are_one_sentence() -> None:
    for fields, match in (
        ({"group": 1}, "group"),
        ({"rewards": []}, "rewards"),
        ({"clip": [0.0, 0.2]}, "clip"),
        ({"sampling": {"temperature": 0.0}}, "temperature"),
        ({"cap": 0.5}, "cap"),
    ):
        with pytest.raises(TorchstoneError, match=match):
            objective(**fields)
    with pytest.raises(TorchstoneError, match="needs a reference"):
        policies.objective(kl={"beta": 0.1}).spec.build(policies.Facts(3))

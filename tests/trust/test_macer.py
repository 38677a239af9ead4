"""MACER: the loss by a naive loop, what its radius moves, a batch and its pieces, recipe and resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import tiny
from tiny import assert_same_run, cut_after
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.objectives import Facts
from torchstone.train import training
from torchstone.trust.objectives.macer import MACER, MACERSpec

Batch = dict[str, torch.Tensor]


def recipe(folder: Path, sections: dict[str, Any] | None = None, **objective: Any) -> dict[str, Any]:
    made = tiny.images(folder, **(sections or {}))
    made["objective"] = {"kind": "macer", "sigma": 0.3, "copies": 5, "beta": 3.0, "weight": 2.0, **objective}
    return made


def trainer_of(folder: Path, **objective: Any) -> Any:
    torch.set_default_dtype(torch.float64)
    return tiny.trainer(recipe(folder, **objective), torch.float64)


def prepared(trainer: Any, rows: int = 6) -> Batch:
    """A batch whose third example does not count, and half of whose labels are what the model says under noise."""
    batch: Batch = trainer.source.train.batch(Key(3), 0, rows)
    batch["pixels"] = batch["pixels"].double()
    batch = trainer.objective.prepare(batch, Key(4))
    noisy = batch["pixels"][:, None] + trainer.objective.spec.sigma * batch["noise"]
    with torch.no_grad():
        guess = trainer.model(noisy.flatten(0, 1)).logits.unflatten(0, noisy.shape[:2]).mean(1).argmax(1)
    batch["label"] = torch.where(torch.arange(rows) % 2 == 1, guess, batch["label"])
    batch["label"][2] = -100
    return batch


def gradients(trainer: Any, batches: list[Batch]) -> tuple[Batch, float]:
    trainer.optim.zero_grad()
    loss = trainer.gradients(batches, 0)["loss"]
    return {p.name: p.value.grad.clone() for p in trainer.named if p.value.grad is not None}, loss


def assert_same(found: tuple[Batch, float], wanted: tuple[Batch, float]) -> None:
    assert found[0].keys() == wanted[0].keys() and any(value.abs().max() > 1e-4 for value in wanted[0].values())
    for name, value in wanted[0].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-9, atol=1e-12)
    assert found[1] == pytest.approx(wanted[1], rel=1e-10)


def naive(model: Any, batch: Batch, spec: MACERSpec) -> tuple[torch.Tensor, int]:
    """One example and one copy at a time; and how many radii were raised."""
    normal, losses, raised = torch.distributions.Normal(0.0, 1.0), [], 0
    for x, y, noise in zip(batch["pixels"], batch["label"].tolist(), batch["noise"], strict=True):
        if y < 0:
            continue
        logits = [model((x + spec.sigma * d)[None]).logits[0] for d in noise]
        z = sum(torch.softmax(u, 0) for u in logits) / len(logits)
        loss = -torch.log(z[y] + 1e-10)
        zb = sum(torch.softmax(spec.beta * u, 0) for u in logits) / len(logits)
        second, first = sorted(range(len(zb)), key=lambda c: zb[c].item())[-2:]
        if first == y:
            xi = normal.icdf(zb[first]) - normal.icdf(zb[second])
            if math.isfinite(xi.item()) and abs(xi.item()) <= spec.gamma:
                loss, raised = loss + spec.weight * spec.sigma / 2 * (spec.gamma - xi), raised + 1
        losses.append(loss)
    return torch.stack(losses).mean(), raised


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


# ------------------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("gamma", [8.0, 0.4])
def test_the_loss_is_its_formula_one_copy_at_a_time(gamma: float, folder: Path, float64: None) -> None:
    trainer = trainer_of(folder, gamma=gamma, beta=6.0)
    batch = prepared(trainer, 12)
    wanted, raised = naive(trainer.model, batch, trainer.objective.spec)
    assert 0 < raised < 11
    wanted.backward()
    grads = {p.name: p.value.grad.clone() for p in trainer.named if p.value.grad is not None}
    assert_same(gradients(trainer, [batch]), (grads, wanted.item()))


@pytest.mark.parametrize("copies", [1, 4])
def test_without_weight_it_is_training_on_noise(copies: int, folder: Path, float64: None) -> None:
    trainer = trainer_of(folder, weight=0, copies=copies)
    batch, model = prepared(trainer), trainer.model
    keep = batch["label"] >= 0
    noisy, label = (batch["pixels"][:, None] + 0.3 * batch["noise"])[keep], batch["label"][keep]
    if copies == 1:
        wanted = F.cross_entropy(model(noisy[:, 0]).logits, label)
    else:
        each = torch.stack([F.log_softmax(model(noisy[:, k]).logits, 1) for k in range(copies)])
        wanted = F.nll_loss(each.logsumexp(0) - math.log(copies), label)
    wanted.backward()
    grads = {p.name: p.value.grad.clone() for p in trainer.named if p.value.grad is not None}
    found, loss = gradients(trainer, [batch])
    assert loss == pytest.approx(wanted.item(), abs=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-6, atol=1e-8)


def test_before_its_step_the_radius_has_no_weight(folder: Path, float64: None) -> None:
    late, light, heavy = trainer_of(folder, weight_from=2), trainer_of(folder, weight=0), trainer_of(folder)
    batch = prepared(late)
    wanted = [gradients(one, [batch]) for one in (light, heavy)]
    for step in (0, 1, 2, 3):
        late.objective.before_step(late.model, step)
        assert_same(gradients(late, [batch]), wanted[step >= 2])
    assert wanted[0][1] < wanted[1][1]


def shortfall(s_C: torch.Tensor, label: int, sigma: float = 0.5, gamma: float = 8.0) -> torch.Tensor:
    """L_R of one example whose averaged softmax is `s_C`, from the objective itself."""
    objective = MACER(MACERSpec(sigma=sigma, copies=1, beta=1.0, gamma=gamma))
    xi_B, active_B = objective.radius(s_C.log()[None, None], torch.tensor([label]))
    return torch.where(active_B, sigma / 2 * (gamma - xi_B), 0.0)[0]


def test_the_radius_is_raised_where_the_prediction_is_right_up_to_gamma(float64: None) -> None:
    s = torch.tensor([0.6, 0.3, 0.1])
    assert shortfall(s, 0).item() == pytest.approx(0.25 * (8 - stats.norm.ppf(0.6) + stats.norm.ppf(0.3)))
    assert shortfall(s, 1) == 0 and shortfall(s, -100) == 0
    assert shortfall(torch.tensor([0.97, 0.02, 0.01]), 0, gamma=3.0) == 0  # xi 3.9
    for saturated in ([1.0, 0.0, 0.0], [0.5, 0.5, 0.0]):
        found = shortfall(torch.tensor(saturated), 0)
        assert found.isfinite() and (found == 0) == (saturated[1] == 0)


def test_the_slope_of_the_radius_is_one_over_the_normal_density(float64: None) -> None:
    def of(s1: torch.Tensor, s2: torch.Tensor) -> torch.Tensor:
        return shortfall(torch.stack([s1, s2, 1 - s1 - s2]), 0)

    s1, s2 = (torch.tensor(value, requires_grad=True) for value in (0.6, 0.3))
    assert torch.autograd.gradcheck(of, (s1, s2))
    slopes = torch.autograd.grad(of(s1, s2), (s1, s2))
    for sign, slope, s in zip((-1, 1), slopes, (0.6, 0.3), strict=True):
        assert slope.item() == pytest.approx(sign * 0.25 / stats.norm.pdf(stats.norm.ppf(s)))


def test_saturated_copies_leave_finite_gradients() -> None:
    objective = MACER(MACERSpec(copies=2, beta=16))
    logits = torch.tensor([[[50.0, 0, 0], [60, 0, 0]], [[0.3, 0.1, 0], [0.2, 0, 0]]], requires_grad=True)
    xi_B, active_B = objective.radius(logits, torch.zeros(2, dtype=torch.long))
    assert active_B.tolist() == [False, True]
    (slope,) = torch.autograd.grad(torch.where(active_B, 8 - xi_B, 0.0).sum(), logits)
    assert slope.isfinite().all() and (slope[0] == 0).all() and slope[1].any()


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("sizes", [(1, 5), (2, 1, 3)], ids=str)
def test_one_batch_equals_unequal_micro_batches(sizes: tuple[int, ...], folder: Path, float64: None) -> None:
    trainer = trainer_of(folder)
    batch = prepared(trainer)
    split = {name: value.split(sizes) for name, value in batch.items()}
    pieces = [{name: parts[i] for name, parts in split.items()} for i in range(len(sizes))]
    assert_same(gradients(trainer, pieces), gradients(trainer, [batch]))


def test_what_does_not_count_is_never_looked_at(folder: Path, float64: None) -> None:
    trainer = trainer_of(folder)
    batch = prepared(trainer)
    other = {**batch, "pixels": batch["pixels"].clone()}
    other["pixels"][2] = 1 - other["pixels"][2]
    assert_same(gradients(trainer, [other]), gradients(trainer, [batch]))
    grads, loss = gradients(trainer, [{**batch, "label": torch.full_like(batch["label"], -100)}])
    assert loss == 0 and not any(value.any() for value in grads.values())


def test_noise_is_of_the_key_and_of_each_copy() -> None:
    objective = MACERSpec(copies=2000).build(Facts())
    batch = {"pixels": torch.rand(2, 1, 3, 3), "label": torch.tensor([0, 1])}
    one, again, other = (objective.prepare(batch, Key(seed))["noise"] for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other) and one.shape == (2, 2000, 1, 3, 3)
    rows = one.flatten(2).transpose(1, 2).flatten(0, 1)  # each place of each image over its copies
    assert torch.allclose(rows @ rows.T / 2000, torch.eye(18), atol=0.12)


def test_evaluation_says_the_same_every_time_and_leaves_the_radius_out(folder: Path, float64: None) -> None:
    trainer = trainer_of(folder)
    row = trainer.measure_split(trainer.source.valid, "valid")
    assert row == trainer.measure_split(trainer.source.valid, "valid")
    light = trainer_of(folder, weight=0)
    assert light.measure_split(light.source.valid, "valid")["valid_loss"] == row["valid_loss"]
    assert 0 <= row["valid_accuracy"] <= 1 and 0 <= row["valid_noisy_accuracy"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("model", [{}, {"kind": "preact_resnet", "width": 2, "blocks": [1, 1]}], ids=["mlp", "resnet"])
def test_a_training_that_was_cut_goes_on_bit_for_bit(
    model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "plot_curve", lambda *arguments: None)
    made = recipe(tmp_path, {"trainer": {"steps": 6, "save_every": 2, "accumulate": 2}}, weight_from=4)
    made["model"] = model or made["model"]
    whole = training.train(made, out=tmp_path / "whole", quiet=True)
    with cut_after(3):
        training.train(made, out=tmp_path / "cut", quiet=True)
    assert_same_run(training.train(made, out=tmp_path / "cut", resume=True, quiet=True), whole)


def test_what_does_not_go_together_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    def refusal(made: dict[str, Any]) -> str:
        with pytest.raises(TorchstoneError) as caught:
            training.train(made, out=tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()
        return str(caught.value)

    for field, value in (("sigma", 0), ("copies", 0), ("beta", 0), ("gamma", 0), ("weight", -1), ("weight_from", -1)):
        assert f"objective.{field}" in refusal(recipe(folder, **{field: value}))
    said = refusal(tiny.recipe(folder, objective={"kind": "macer"}))
    assert said == "data text is of tokens, and objective macer of images"
    patches = {"embedding": {"kind": "patch", "image": 6, "patch": 3, "channels": 1}, "causal": False}
    few = {**patches, "position": "learned", "head": {"kind": "classification", "classes": 2, "pool": "mean"}}
    small = {"width": 12, "depth": 1, "attention": {"heads": 2}, **few}
    assert "needs 3 classes, the model has 2" in refusal({**recipe(folder), "model": small})
    with pytest.raises(TorchstoneError, match="needs a model of images"):
        MACER(MACERSpec()).check(torch.nn.Linear(2, 2))
    with pytest.raises(TorchstoneError, match=r"set data\.kind: images"):
        MACER(MACERSpec()).prepare({"ids": torch.zeros(1, 2)}, Key(0))

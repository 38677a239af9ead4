"""Adversarial training: each host by its formula, one step however it is divided, what the auxiliary term moves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tiny
from distributed import run_ranks
from tiny import assert_same_run, cut_after
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.objectives import Facts
from torchstone.recipe import load_recipe
from torchstone.spec import resolve, validate
from torchstone.train import training
from torchstone.train.engine import Trainer
from torchstone.train.mesh import Mesh
from torchstone.train.run import build_model
from torchstone.trust.objectives.adversarial import Adversarial
from torchstone.trust.objectives.rectified_rejection import RectifiedRejection, RectifiedRejectionSpec

PLAIN = {"rejection": {"norm": "none"}}
SECTIONS: dict[str, dict[str, Any]] = {
    "pgd_at": {},
    "trades": {"objective": {"host": "trades", "beta": 3.0}},
    "natural": {"objective": {"epsilon": 0}},
    "rectified": {"model": PLAIN, "objective": {"kind": "rectified_rejection", "weight": 0.7}},
    "rectified-trades": {"model": PLAIN, "objective": {"kind": "rectified_rejection", "host": "trades"}},
}


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(autouse=True)
def _float64(float64: None) -> Iterator[None]:
    yield


def trainer_of(name: str, folder: Path, **fields: Any) -> Trainer:
    torch.set_default_dtype(torch.float64)
    sections = {key: dict(value) for key, value in SECTIONS[name].items()}
    if accumulate := fields.pop("accumulate", None):
        sections["trainer"] = {"accumulate": accumulate}
    return tiny.trainer(tiny.images(folder, **sections), torch.float64, **fields)


def prepared(trainer: Trainer, rows: int = 6) -> dict[str, torch.Tensor]:
    """A batch whose third example does not count."""
    batch = trainer.source.train.batch(Key(3), 0, rows)
    batch["pixels"] = batch["pixels"].double()
    batch["label"][2] = -100
    return trainer.objective.prepare(batch, Key(4))


def pieces(batch: dict[str, torch.Tensor], *sizes: int) -> list[dict[str, torch.Tensor]]:
    split = {name: value.split(sizes) for name, value in batch.items()}
    return [{name: parts[i] for name, parts in split.items()} for i in range(len(sizes))]


def gradients(trainer: Trainer, batches: list[dict[str, torch.Tensor]]) -> tuple[dict[str, torch.Tensor], float]:
    trainer.optim.zero_grad()
    loss = trainer.gradients(batches, 0)["loss"]
    return {p.name: p.value.grad.clone() for p in trainer.named if p.value.grad is not None}, loss


def assert_same(found: tuple[dict[str, torch.Tensor], float], wanted: tuple[dict[str, torch.Tensor], float]) -> None:
    assert found[0].keys() == wanted[0].keys() and any(value.abs().max() > 1e-4 for value in wanted[0].values())
    for name, value in wanted[0].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-10, atol=1e-12)
    assert found[1] == pytest.approx(wanted[1], rel=1e-10)


@pytest.mark.parametrize("sizes", [(1, 5), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("name", SECTIONS)
def test_one_batch_equals_unequal_micro_batches(name: str, sizes: tuple[int, ...], folder: Path) -> None:
    trainer = trainer_of(name, folder)
    batch = prepared(trainer)
    assert_same(gradients(trainer, pieces(batch, *sizes)), gradients(trainer, [batch]))


def of_two_ranks(mesh: Mesh, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in SECTIONS:
        trainer = trainer_of(name, folder, mesh=mesh)
        found[name] = gradients(trainer, [pieces(prepared(trainer), 1, 5)[mesh.rank]])
        found[f"{name} valid"] = trainer.measure_split(trainer.source.valid, "valid")  # type: ignore[arg-type]
        found[f"{name} trained"] = [
            trainer_step["loss"] for trainer_step in _steps(trainer_of(name, folder, mesh=mesh))
        ]
    found["statistics"] = statistics(trainer_with_norm(folder, mesh=mesh))
    return found


def _steps(trainer: Trainer) -> list[dict[str, Any]]:
    return [trainer.train_step() for _ in range(3)]


def trainer_with_norm(folder: Path, **fields: Any) -> Trainer:
    """Of one micro-batch a rank, or of one rank and two micro-batches."""
    model = {"kind": "preact_resnet", "width": 2, "blocks": [1, 1], "rejection": {}}
    sections: dict[str, Any] = {"objective": {"kind": "rectified_rejection", "host": "trades"}}
    if "mesh" not in fields:
        sections["trainer"] = {"accumulate": 2}
    recipe = tiny.images(folder, **sections)
    return tiny.trainer({**recipe, "model": model}, torch.float64, **fields)


def statistics(trainer: Trainer) -> dict[str, torch.Tensor]:
    _steps(trainer)
    return {name: value.clone() for name, value in trainer.model.named_buffers()}


@pytest.mark.slow
def test_two_ranks_equal_one(folder: Path) -> None:
    ranks = None
    for name in SECTIONS:
        trainer = trainer_of(name, folder)
        whole = gradients(trainer, [prepared(trainer)])
        valid = trainer.measure_split(trainer.source.valid, "valid")  # type: ignore[arg-type]
        losses = [row["loss"] for row in _steps(trainer_of(name, folder, accumulate=2))]
        ranks = ranks or run_ranks(of_two_ranks, 2, folder)
        for rank in ranks:
            assert_same(rank[name], whole)
            assert rank[f"{name} valid"] == pytest.approx(valid, rel=1e-10)
            assert rank[f"{name} trained"] == pytest.approx(losses, rel=1e-10)
    assert ranks is not None
    alone = statistics(trainer_with_norm(folder))
    for rank in ranks:
        for name, value in alone.items():
            torch.testing.assert_close(rank["statistics"][name], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["mlp", "preact_resnet"])
@pytest.mark.slow
def test_a_training_that_was_cut_goes_on_bit_for_bit(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(training, "plot_curve", lambda *arguments: None)
    model = {"rejection": {}} if kind == "mlp" else {"kind": kind, "width": 2, "blocks": [1, 1], "rejection": {}}
    recipe = tiny.images(
        tmp_path,
        objective={"kind": "rectified_rejection"},
        trainer={"steps": 6, "save_every": 2, "accumulate": 2},
    )
    recipe["model"] = {"kind": "mlp", **model}
    whole = training.train(recipe, out=tmp_path / "whole", quiet=True)
    with cut_after(3):
        training.train(recipe, out=tmp_path / "cut", quiet=True)
    assert_same_run(training.train(recipe, out=tmp_path / "cut", resume=True, quiet=True), whole)


# ------------------------------------------------------------------------------------------------------------ formulas


def attacked(model: Any, batch: dict[str, torch.Tensor], loss: Any, epsilon: float, steps: int) -> torch.Tensor:
    """PGD written out, one example at a time."""
    found = []
    for row in range(len(batch["pixels"])):
        x, here = batch["pixels"][row : row + 1], slice(row, row + 1)
        z = (x + batch["noise"][here]).clamp(x - epsilon, x + epsilon).clamp(0, 1)
        for _ in range(steps):
            z = z.detach().requires_grad_()
            loss(model(z).logits, here).backward(inputs=[z])
            assert z.grad is not None
            z = (z + epsilon / 4 * z.grad.sign()).clamp(x - epsilon, x + epsilon).clamp(0, 1)
        found.append(z.detach())
    return torch.cat(found)


def test_pgd_at_is_the_cross_entropy_of_attacked_images(folder: Path) -> None:
    trainer = trainer_of("pgd_at", folder)
    batch, model = prepared(trainer), trainer.model
    keep = batch["label"] >= 0

    def loss(logits: torch.Tensor, here: slice) -> torch.Tensor:
        return F.cross_entropy(logits, batch["label"][here], reduction="sum")

    x = attacked(model, batch, loss, 0.1, 3)
    assert isinstance(trainer.objective, Adversarial)
    torch.testing.assert_close(trainer.objective.attack(model, batch)[keep], x[keep])
    wanted = F.cross_entropy(model(x[keep]).logits, batch["label"][keep])
    found = trainer.gradients([batch], 0)
    assert found["loss"] == pytest.approx(wanted.item(), rel=1e-10)
    right = (model(x[keep]).logits.argmax(1) == batch["label"][keep]).double().mean()
    assert found["attacked_accuracy"] == pytest.approx(right.item())
    clean = F.cross_entropy(model(batch["pixels"][keep]).logits, batch["label"][keep])
    assert wanted > clean


def test_trades_is_clean_cross_entropy_and_a_divergence(folder: Path) -> None:
    trainer = trainer_of("trades", folder)
    batch, model = prepared(trainer), trainer.model
    keep = batch["label"] >= 0
    p = model(batch["pixels"]).logits.softmax(1)

    def divergence(logits: torch.Tensor, here: slice) -> torch.Tensor:
        return (p[here].detach() * (p[here].detach() / logits.softmax(1)).log()).sum()

    x = attacked(model, batch, divergence, 0.1, 3)
    q = model(x).logits.softmax(1)
    kl = (p * (p / q).log()).sum(1)[keep].mean()
    wanted = -p[keep].gather(1, batch["label"][keep, None]).log().mean() + 3 * kl
    wanted.backward()
    grads = {p.name: p.value.grad.clone() for p in trainer.named if p.value.grad is not None}
    found, loss = gradients(trainer, [batch])
    assert loss == pytest.approx(wanted.item(), rel=1e-9) and kl > 0
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-8, atol=1e-10)


def test_without_epsilon_it_is_plain_training(folder: Path) -> None:
    trainer = trainer_of("natural", folder)
    batch = prepared(trainer)
    keep = batch["label"] >= 0
    plain = F.cross_entropy(trainer.model(batch["pixels"][keep]).logits, batch["label"][keep])
    assert trainer.gradients([batch], 0)["loss"] == pytest.approx(plain.item(), rel=1e-12)
    assert "noise" not in batch
    scores = trainer.measure_split(trainer.source.valid, "valid")  # type: ignore[arg-type]
    assert "valid_accuracy" in scores and "valid_robust_accuracy" not in scores


def test_evaluation_reports_clean_and_robust_accuracy_and_what_is_accepted(folder: Path) -> None:
    more = {"optimizer": {"lr": 0.01}, "trainer": {"batch": 16}}
    trainer = tiny.trainer(tiny.images(folder, **SECTIONS["rectified"], **more), torch.float64)
    for _ in range(60):
        trainer.train_step()
    trainer.objective = RectifiedRejectionSpec(epsilon=0.25, steps=5).build(Facts())  # an attack beyond the training's
    row = trainer.measure_split(trainer.source.valid, "valid")  # type: ignore[arg-type]
    again = trainer.measure_split(trainer.source.valid, "valid")  # type: ignore[arg-type]
    assert row == again  # the same noise every time
    assert row["valid_accuracy"] > 0.6 > row["valid_robust_accuracy"]
    assert 0 <= row["valid_accepted"] <= 1 and 0 <= row["valid_accepted_accuracy"] <= 1
    assert all(p.value.requires_grad for p in trainer.named)


def test_what_does_not_count_is_never_looked_at(folder: Path) -> None:
    for name in SECTIONS:
        trainer = trainer_of(name, folder)
        batch = prepared(trainer)
        clean = gradients(trainer, [batch])
        other = {**batch, "pixels": batch["pixels"].clone()}
        other["pixels"][2] = 1 - other["pixels"][2]
        assert_same(gradients(trainer, [other]), clean)
        none = {**batch, "label": torch.full_like(batch["label"], -100)}
        grads, loss = gradients(trainer, [none])
        assert loss == 0 and not any(value.any() for value in grads.values())


# --------------------------------------------------------------------------------------------------- the auxiliary term


def rectified(folder: Path, **fields: Any) -> tuple[Any, RectifiedRejection, dict[str, torch.Tensor], torch.Tensor]:
    trainer = trainer_of("rectified", folder)
    batch = prepared(trainer, 40)
    batch["label"][2] = 0
    objective = RectifiedRejection(RectifiedRejectionSpec(**fields))
    out = trainer.model(batch["pixels"])
    return trainer.model, objective, batch, out.logits.argmax(1) == batch["label"]


def test_the_term_is_its_formula_one_example_at_a_time(folder: Path) -> None:
    model, objective, batch, _ = rectified(folder)
    out = model(batch["pixels"])
    found = objective.rejection(out, batch["label"])
    for row, label in enumerate(batch["label"].tolist()):
        probs = out.logits[row].softmax(0)
        rcon, target = (probs.max() * out.auxiliary[row]).item(), probs[label].item()
        wanted = F.binary_cross_entropy(torch.tensor(rcon), torch.tensor(target))
        assert found[row].item() == pytest.approx(wanted.item(), rel=1e-9)


def test_it_moves_no_logit_of_a_right_prediction_and_the_head_everywhere(folder: Path) -> None:
    model, objective, batch, right = rectified(folder)
    assert right.any() and not right.all()
    out = model(batch["pixels"])
    each = objective.rejection(out, batch["label"])
    (of_logits,) = torch.autograd.grad(each.sum(), out.logits, retain_graph=True)
    assert (of_logits[right] == 0).all() and (of_logits[~right].abs().amax(1) > 0).all()
    (of_head,) = torch.autograd.grad(each.sum(), out.auxiliary)
    assert (of_head.abs() > 0).all()
    # of wrong predictions, Con moves and the target does not
    logits = out.logits.detach().requires_grad_()
    target = logits.softmax(1).gather(1, batch["label"][:, None])[:, 0].detach()
    rcon = logits.softmax(1).amax(1) * out.auxiliary.detach()
    plain = F.binary_cross_entropy(rcon, target, reduction="sum")
    (wanted,) = torch.autograd.grad(plain, logits)
    torch.testing.assert_close(of_logits[~right], wanted[~right])


def test_its_best_head_is_the_ideal_one(folder: Path) -> None:
    model, objective, batch, _ = rectified(folder)
    out = model(batch["pixels"])
    probs = out.logits.softmax(1).detach()
    ideal = probs.gather(1, batch["label"][:, None])[:, 0] / probs.amax(1)
    inside = ideal < 1
    a = ideal.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective.rejection(out._replace(auxiliary=a), batch["label"]).sum(), a)
    assert slope.abs().max() < 1e-9
    for step in (-0.02, 0.02):
        moved = objective.rejection(out._replace(auxiliary=(ideal + step).clamp(1e-3, 1)), batch["label"])
        assert (moved[inside] > objective.rejection(out._replace(auxiliary=ideal), batch["label"])[inside]).all()


def test_extreme_confidence_stays_finite() -> None:
    spec: Any = validate(resolve("model", "mlp"), {"classes": 2, "channels": 1, "image": 2, **PLAIN})
    out = build_model(spec, 0)(torch.rand(4, 1, 2, 2))
    logits = torch.tensor([[1e4, -1e4], [1e4, -1e4], [0.0, 0.0], [-1e4, 1e4]], requires_grad=True)
    extreme = out._replace(logits=logits, auxiliary=torch.tensor([1.0, 1.0, 0.0, 0.0], requires_grad=True))
    each = RectifiedRejection(RectifiedRejectionSpec()).rejection(extreme, torch.tensor([0, 1, 0, 0]))
    grads = torch.autograd.grad(each.sum(), [logits, extreme.auxiliary])
    assert each.isfinite().all() and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("host", ["pgd_at", "trades"])
def test_at_weight_0_the_classifier_trains_as_under_the_host_alone(host: str, folder: Path) -> None:
    # clipping would add up the norms of more gradients, zeros among them, in another order
    model = {"rejection": {}}
    trainers = [
        tiny.trainer(tiny.images(folder, model=fields, objective={"host": host, **more}, trainer={"clip": None}))
        for fields, more in (
            ({}, {"kind": "adversarial"}),
            (model, {"kind": "rectified_rejection", "weight": 0}),
            (model, {"kind": "rectified_rejection", "weight": 1}),
        )
    ]
    for trainer in trainers:
        _steps(trainer)
    plain, zero, one = ({name: p for name, p in trainer.model.named_parameters()} for trainer in trainers)
    assert all(torch.equal(zero[name], value) for name, value in plain.items())
    assert not all(torch.equal(one[name], value) for name, value in plain.items())


# -------------------------------------------------------------------------------------------------------- other models

PATCHES: dict[str, Any] = {
    "width": 12,
    "depth": 1,
    "attention": {"heads": 2},
    "causal": False,
    "position": "learned",
    "embedding": {"kind": "patch", "image": 6, "patch": 3, "channels": 1},
    "head": {"kind": "classification", "classes": 3, "pool": "mean"},
}


def test_a_transformer_over_patches_is_attacked_too(folder: Path) -> None:
    trainer = tiny.trainer({**tiny.images(folder), "model": PATCHES}, torch.float64)
    trainer.objective.check(trainer.model)
    batch = prepared(trainer)
    assert_same(gradients(trainer, pieces(batch, 2, 4)), gradients(trainer, [batch]))
    torch.set_default_dtype(torch.float32)  # that of pixels
    trainer = tiny.trainer({**tiny.images(folder), "model": PATCHES})
    row = trainer.measure_split(trainer.source.valid, "valid")  # type: ignore[arg-type]
    assert 0 <= row["valid_robust_accuracy"] <= row["valid_accuracy"] + 0.2
    dropped = {**PATCHES, "dropout": 0.5}
    losses = [tiny.trainer({**tiny.images(folder), "model": one}).train_step()["loss"] for one in (PATCHES, dropped)]
    assert losses[0] != losses[1]
    few = {**PATCHES, "head": {"kind": "classification", "classes": 2}}
    with pytest.raises(TorchstoneError, match="the data have 3 classes, the model 2"):
        training.make_trainer(load_recipe({**tiny.images(folder), "model": few}))


def test_plain_classification_takes_the_same_models(folder: Path) -> None:
    recipe = {**tiny.images(folder), "objective": {"kind": "classification"}}
    trainer, plain = (tiny.trainer(one, torch.float64) for one in (recipe, tiny.images(folder, **SECTIONS["natural"])))
    batch = prepared(plain)
    assert_same(gradients(trainer, [batch]), gradients(plain, [batch]))


# ------------------------------------------------------------------------------------------------------------ refusals


def test_fractions_are_distances() -> None:
    spec = validate(resolve("objective", "adversarial"), {"epsilon": "8/255", "step_size": "2/255"})
    assert spec.epsilon == 8 / 255 and spec.step_size == 2 / 255  # type: ignore[attr-defined]
    for wrong in ("8/0", "a/b", "/", "9/8"):
        with pytest.raises(TorchstoneError, match=r"objective\.epsilon"):
            load_recipe({"objective": {"kind": "adversarial", "epsilon": wrong}})


def test_what_does_not_go_together_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    def refusal(recipe: dict[str, Any]) -> str:
        with pytest.raises(TorchstoneError) as caught:
            training.train(recipe, out=tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()
        return str(caught.value)

    torch.set_default_dtype(torch.float32)
    images = tiny.images(folder)
    assert "set model.rejection" in refusal({**images, "objective": "rectified_rejection"})
    said = refusal(tiny.recipe(folder, objective={"kind": "adversarial"}))
    assert said == "data text is of tokens, and objective adversarial of images"
    assert (
        refusal({**images, "objective": "causal_lm"}) == "data images is of images, and objective causal_lm of tokens"
    )
    assert "takes images of 1 x 7 x 7, got 1 x 6 x 6" in refusal({**images, "model": {**images["model"], "image": 7}})
    assert "model.classes: 2 is fewer" in refusal({**images, "model": {**images["model"], "classes": 2}})
    assert "trades needs it" in refusal(tiny.images(folder, objective={"host": "trades", "random_start": False}))


def test_a_host_without_noise_starts_at_the_image(folder: Path) -> None:
    objective = validate(resolve("objective", "adversarial"), {"random_start": False}).build(Facts())  # type: ignore[attr-defined]
    batch = {"pixels": torch.rand(2, 1, 2, 2), "label": torch.tensor([0, 1])}
    assert objective.prepare(batch, Key(0)) is batch

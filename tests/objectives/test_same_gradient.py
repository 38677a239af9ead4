"""One batch, k unequal micro-batches and two ranks give one gradient; what is ignored is never looked at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from distributed import run_ranks
from objective_cases import objective_cases
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.objectives import Facts, tokens_of
from torchstone.objectives.causal_lm import CausalLM
from torchstone.objectives.masked_lm import MaskedLM, MaskedLMSpec
from torchstone.spec import kinds, resolve
from torchstone.train.engine import Trainer
from torchstone.train.mesh import Mesh

CASES = {kind: case for kind, case in objective_cases().items() if case.gradient is not None}
Gradients = dict[str, torch.Tensor]


def asked(test: str) -> list[str]:
    """Objectives that a test makes sense for."""
    return [kind for kind, case in CASES.items() if test not in case.exempt]


def recipe_of(objective: str, folder: Path, **model: Any) -> dict[str, Any]:
    make, sections = CASES[objective].gradient  # type: ignore[misc]
    return make(folder, **{**sections, "model": {**sections["model"], **model}})


def trainer_of(objective: str, folder: Path, **fields: Any) -> Trainer:
    torch.set_default_dtype(torch.float64)
    return tiny.trainer(recipe_of(objective, folder), torch.float64, **fields)


def targets_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What is predicted, below zero where nothing is."""
    return next(batch[name] for name in ("targets", "next", "label") if name in batch)


def ragged(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A prepared batch of six rows with very different numbers of targets, one row with none."""
    group = getattr(getattr(trainer.objective, "spec", None), "group", 1)
    batch = trainer.source.train.batch(Key(3), 0, 6 // group)
    batch = trainer.objective.prepare(batch, Key(4))
    with torch.no_grad():
        batch = trainer.objective.collect(trainer.model, batch, Key(5))
    targets = targets_of(batch)
    for row, kept in enumerate((0, 1, 16, 3, 16, 9)):
        if targets.dim() > 1:
            targets[row, kept:] = -100
        elif kept in (0, 3):
            targets[row] = -100
    batch.setdefault("valid", torch.ones_like(batch["ids"], dtype=torch.bool))
    return batch


def pieces(batch: dict[str, torch.Tensor], *sizes: int) -> list[dict[str, torch.Tensor]]:
    split = {name: value.split(sizes) for name, value in batch.items()}
    return [{name: parts[i] for name, parts in split.items()} for i in range(len(sizes))]


def gradients(trainer: Trainer, batches: list[dict[str, torch.Tensor]]) -> tuple[Gradients, float]:
    trainer.optim.zero_grad()
    row = trainer.gradients(batches, 0)
    return {p.name: p.value.grad.clone() for p in trainer.named if p.value.grad is not None}, row["loss"]


def assert_same(found: tuple[Gradients, float], wanted: tuple[Gradients, float]) -> None:
    assert found[0].keys() == wanted[0].keys()
    assert any(value.abs().max() > 1e-4 for value in wanted[0].values())
    for name, value in wanted[0].items():
        torch.testing.assert_close(
            found[0][name], value, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert found[1] == pytest.approx(wanted[1], rel=1e-10)


def of_two_ranks(mesh: Mesh, folder: Path) -> dict[str, Any]:
    """What one of two ranks finds; see the tests below."""
    found: dict[str, Any] = {}
    for name in CASES:
        trainer = trainer_of(name, folder, mesh=mesh)
        found[name] = gradients(trainer, [pieces(ragged(trainer), 1, 5)[mesh.rank]])
        found[f"{name} valid"] = trainer.measure_split(trainer.source.valid, "valid")
        found[f"{name} one batch"] = trainer.measure_split(trainer.source.valid, "valid", limit=1)
        trained = tiny.trainer(recipe_of(name, folder, dropout=0.3), torch.float64, mesh=mesh)
        found[f"{name} trained"] = [trained.train_step()["loss"] for _ in range(3)]
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.getbasetemp()
    for name in CASES:
        tiny.resolved(recipe_of(name, folder))  # the cache is there before the ranks start
    return run_ranks(of_two_ranks, 2, folder)


@pytest.fixture(autouse=True)
def _float64(float64: None) -> Iterator[None]:
    yield


def test_every_objective_over_tokens_is_checked_here() -> None:
    """Those over other examples are in the tests of their domain."""
    over_tokens = {kind for kind in kinds("objective") if resolve("objective", kind).example in ("tokens", None)}  # type: ignore[attr-defined]
    assert over_tokens == set(CASES)


@pytest.mark.parametrize("sizes", [(6,), (1, 5), (2, 1, 3), (1, 1, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("objective", CASES)
def test_one_batch_equals_unequal_micro_batches(objective: str, sizes: tuple[int, ...], folder: Path) -> None:
    trainer = trainer_of(objective, folder)
    batch = ragged(trainer)
    assert_same(gradients(trainer, pieces(batch, *sizes)), gradients(trainer, [batch]))


@pytest.mark.parametrize("objective", CASES)
def test_two_ranks_with_unequal_rows_equal_one_batch(
    objective: str, folder: Path, two_ranks: list[dict[str, Any]]
) -> None:
    trainer = trainer_of(objective, folder)
    whole = gradients(trainer, [ragged(trainer)])
    for rank in two_ranks:
        assert_same(rank[objective], whole)


@pytest.mark.parametrize("objective", CASES)
def test_two_ranks_train_as_one_rank_with_two_micro_batches(
    objective: str, folder: Path, two_ranks: list[dict[str, Any]]
) -> None:
    """Masking and dropout included: they are keyed by the number of the micro-batch over all ranks."""
    recipe = recipe_of(objective, folder, dropout=0.3)
    recipe["trainer"]["accumulate"] = 2
    trainer = tiny.trainer(recipe, torch.float64)
    losses = [trainer.train_step()["loss"] for _ in range(3)]
    for rank in two_ranks:
        assert rank[f"{objective} trained"] == pytest.approx(losses, rel=1e-10)


@pytest.mark.parametrize("objective", CASES)
def test_two_ranks_validate_as_one_also_with_fewer_batches_than_ranks(
    objective: str, folder: Path, two_ranks: list[dict[str, Any]]
) -> None:
    trainer = trainer_of(objective, folder)
    assert trainer.source.valid is not None
    for limit, name in ((None, "valid"), (1, "one batch")):
        alone = trainer.measure_split(trainer.source.valid, "valid", limit)
        for rank in two_ranks:
            assert rank[f"{objective} {name}"] == pytest.approx(alone, rel=1e-10)


@pytest.mark.parametrize("objective", asked("nan"))
def test_not_a_number_in_rows_without_target_changes_nothing(objective: str, folder: Path) -> None:
    trainer = trainer_of(objective, folder)
    batch = ragged(trainer)
    clean = gradients(trainer, [batch])
    ignored = targets_of(batch) < 0

    def poison(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        if objective == "classification":
            return replace(output, logits=torch.where(ignored[:, None], torch.nan, output.logits))
        return replace(output, hidden=torch.where(ignored.flatten(0, -2)[..., None], torch.nan, output.hidden))

    trainer.model.register_forward_hook(poison)
    assert_same(gradients(trainer, [batch]), clean)


def test_not_a_number_in_rows_without_target_changes_no_single_likelihood(folder: Path) -> None:
    trainer = trainer_of("causal_lm", folder)
    batch = ragged(trainer)
    assert isinstance(trainer.objective, CausalLM)
    clean = trainer.objective.evaluate(trainer.model, batch).nll_BT
    trainer.model.register_forward_hook(
        lambda module, inputs, output: replace(
            output, hidden=torch.where((batch["next"] < 0)[..., None], torch.nan, output.hidden)
        )
    )
    assert torch.equal(trainer.objective.evaluate(trainer.model, batch).nll_BT, clean)


@pytest.mark.parametrize("objective", asked("no_targets"))
def test_a_batch_without_any_target_has_no_gradient_and_no_loss(objective: str, folder: Path) -> None:
    trainer = trainer_of(objective, folder)
    batch = ragged(trainer)
    targets_of(batch)[:] = -100
    found, loss = gradients(trainer, [batch])
    assert loss == 0.0
    assert all(not value.any() for value in found.values())


def test_causal_loss_is_the_cross_entropy_of_the_next_token(folder: Path) -> None:
    trainer = trainer_of("causal_lm", folder)
    batch = trainer.source.train.batch(Key(0), 0, 3)
    logits = trainer.model(tokens_of(batch)).logits
    known = batch["next"] >= 0
    plain = torch.nn.functional.cross_entropy(logits[known], batch["next"][known])
    assert trainer.gradients([batch], 0)["loss"] == pytest.approx(plain.item(), rel=1e-10)
    assert trainer.objective.evaluate(trainer.model, batch).nll_BT.sum().item() == pytest.approx(
        plain.item() * known.sum().item(), rel=1e-10
    )


def test_masking_hides_the_shares_that_the_recipe_says() -> None:
    facts = Facts(vocabulary=50, mask=47, pad=48, separator=49)
    objective = MaskedLM(MaskedLMSpec(rate=0.2, masked=0.7, random=0.2), facts)
    ids = torch.randint(0, 40, (200, 100))
    ids[:, 10], ids[:, 11] = 49, 48
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[:, 90:] = False
    made = objective.prepare({"ids": ids, "valid": valid}, Key(1))
    chosen = made["targets"] >= 0
    assert torch.equal(made["targets"][chosen], ids[chosen])
    assert not chosen[:, [10, 11]].any() and not chosen[:, 90:].any()
    assert torch.equal(made["masked"][~chosen], ids[~chosen])
    assert chosen[:, :10].double().mean().item() == pytest.approx(0.2, abs=0.02)
    hidden, kept = made["masked"][chosen] == 47, made["masked"][chosen] == ids[chosen]
    assert hidden.double().mean().item() == pytest.approx(0.7, abs=0.03)
    assert kept.double().mean().item() == pytest.approx(0.1 + 0.2 / 50, abs=0.02)
    again = objective.prepare({"ids": ids, "valid": valid}, Key(1))
    assert torch.equal(again["masked"], made["masked"]) and torch.equal(again["targets"], made["targets"])
    other = objective.prepare({"ids": ids, "valid": valid}, Key(2))
    assert not torch.equal(other["targets"], made["targets"])


def test_masked_lm_needs_a_mask_token() -> None:
    with pytest.raises(TorchstoneError, match="no mask token"):
        MaskedLMSpec().build(Facts(vocabulary=10))


def test_causal_lm_refuses_an_encoder(folder: Path) -> None:
    trainer = trainer_of("masked_lm", folder)
    with pytest.raises(TorchstoneError, match="causal: true"):
        CausalLM().check(trainer.model)

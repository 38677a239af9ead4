"""What a model carries from step to step: a row's own, forgotten where a stream begins, kept in checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tiny
from tiny import assert_same_run, cut_after
from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.model.carry import carry_of
from torchstone.objectives import Batch, Objective, Result, Term, tokens_of
from torchstone.recipe import TrainerSpec
from torchstone.spec import resolve
from torchstone.train.engine import Source, Trainer
from torchstone.train.mesh import Mesh
from torchstone.train.run import RunFolder
from torchstone.train.training import _rehearse

Recipe = Callable[..., dict[str, Any]]
Run = Callable[..., RunFolder]
MODEL = {**tiny.MODEL, "depth": 2, "stack": {"kind": "longmem", "memory": {"tokens": 48, "retrieve": 8}}}
TRAINER = {"steps": 12, "batch": 2, "device": "cpu", "threads": 1, "compile": "off", "log_every": 1, "save_every": 3}


@pytest.fixture
def streams(tmp_path: Path, recipe: Recipe) -> Recipe:
    """A tiny recipe over documents in order, whose model remembers; segments are of 16 bytes, documents of 150."""
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(20):
        tiny.text(folder / f"{number:02}.txt", seed=number, lines=5)
    data = {"kind": "documents", "corpus": {"kind": "text", "path": str(folder)}}
    return lambda **sections: recipe(**{"model": MODEL, "data": data, **sections})


def by_hand(trainer: Trainer, batches: Sequence[Batch], bank: Any, train: bool) -> list[float]:
    """Mean loss of each batch with a bank that is given, forgotten and committed here."""
    model, found = trainer.model, []
    for batch in batches:
        bank.forget(batch["begins"].nonzero()[:, 0].tolist())
        with torch.set_grad_enabled(train):
            logits = model(tokens_of(batch), bank=bank).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch["next"].flatten(), ignore_index=-100)
        if train:
            trainer.optim.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.spec.clip or math.inf)
            trainer.optim.step()
        bank.commit()
        found.append(loss.item())
    return found


def test_training_is_that_of_a_loop_by_hand(streams: Recipe) -> None:
    steps = 14  # a document has ten segments: rows forget on the way
    trainer, other = (tiny.trainer(streams(trainer=TRAINER)) for _ in range(2))
    batches = [trainer.source.train.batch(Key(0).fold("data"), step, 2) for step in range(steps)]
    assert 0 < sum(int(batch["begins"].sum()) for batch in batches[1:]) < steps
    found = [trainer.train_step()["loss"] for _ in range(steps)]
    wanted = by_hand(other, batches, carry_of(other.model, 2), train=True)
    assert found == pytest.approx(wanted, rel=1e-5)
    forgetful = tiny.trainer(streams(trainer=TRAINER, data={**streams()["data"], "forget": "segment"}))
    assert [forgetful.train_step()["loss"] for _ in range(steps)] != pytest.approx(found, rel=1e-5)


def test_measuring_carries_too_and_leaves_what_training_carries_alone(streams: Recipe) -> None:
    trainer = tiny.trainer(streams(trainer=TRAINER))
    for _ in range(5):
        trainer.train_step()
    before = {name: value.clone() for name, value in trainer.tensors()["carry"].items()}
    row = trainer.measure_split(trainer.source.train, "valid", 60)
    after = trainer.tensors()["carry"]
    assert before and all(torch.equal(value, after[name]) for name, value in before.items())
    trainer.model.eval()
    batches = list(trainer.source.train.evaluation(2, 60))
    count = torch.tensor([float((batch["next"] >= 0).sum()) for batch in batches])
    each = by_hand(trainer, batches, carry_of(trainer.model, 2), train=False)
    there = count > 0
    assert row["valid_loss"] == pytest.approx(
        float((torch.tensor(each)[there] * count[there]).sum() / count.sum()), rel=1e-5
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_cut_and_resumed_equals_uncut_bit_for_bit(
    run: Run, streams: Recipe, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    sections = {name: streams()[name] for name in ("model", "data")}
    sections["trainer"] = {**TRAINER, "accumulate": accumulate, "ema": 0.9 if accumulate > 1 else None}
    whole = run("whole", **sections)
    for steps in (7, 10):
        with cut_after(steps):
            run("cut", resume=True, **sections)
    assert_same_run(run("cut", resume=True, **sections), whole)
    kept = whole.checkpoints().load()
    assert kept is not None and len(kept.tensors["carry"]) == 4 * accumulate
    # without what was carried the same weights go on otherwise
    monkeypatch.setattr(Trainer, "_restore_carries", lambda self, saved: None)
    with cut_after(7):
        run("other", **sections)
    other = run("other", resume=True, **sections)
    assert tiny.rows_without_times(other)[-1] != tiny.rows_without_times(whole)[-1]


def test_accumulated_micro_batches_equal_one_large_batch(streams: Recipe) -> None:
    one = tiny.trainer(streams(trainer={**TRAINER, "batch": 4}), torch.float64)
    two = tiny.trainer(streams(trainer={**TRAINER, "batch": 2, "accumulate": 2}), torch.float64)
    found = [[trainer.train_step()["loss"] for _ in range(12)] for trainer in (one, two)]
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_a_model_that_carries_nothing_reads_streams_like_any_batch(streams: Recipe) -> None:
    trainer = tiny.trainer(streams(model=tiny.MODEL, trainer=TRAINER))
    assert math.isfinite(trainer.train_step()["loss"]) and not trainer.carries and "carry" not in trainer.tensors()


def test_a_checkpoint_of_another_memory_is_refused(run: Run, streams: Recipe) -> None:
    sections = {name: streams()[name] for name in ("model", "data")}
    kept = run("run", **sections, trainer=TRAINER).checkpoints().load()
    assert kept is not None
    wider = tiny.trainer(streams(trainer={**TRAINER, "batch": 3}))
    with pytest.raises(
        TorchstoneError, match="bank: these tensors are no memory of this model and this number of rows"
    ):
        wider.restore(kept)


def test_ranks_are_refused_before_anything_is_written(streams: Recipe) -> None:
    trainer = tiny.trainer(streams(trainer=TRAINER))
    full, _ = tiny.resolved(streams(trainer=TRAINER))
    two = Mesh()
    two.ranks = 2
    with pytest.raises(TorchstoneError, match="what a model carries from step to step is kept on one rank only"):
        _rehearse(trainer.model, trainer.objective, trainer.source.train, full, trainer.device, two)


# -- a stranger's model, with a recurrent state of its own


class Sums:
    """A carry from outside the package: a vector a row."""

    def __init__(self, rows: int) -> None:
        self.h_BD, self.next_BD = torch.zeros(rows, 4), torch.zeros(rows, 4)

    def arguments(self) -> dict[str, Any]:
        return {"past": self}

    def commit(self) -> None:
        self.h_BD = self.next_BD

    def forget(self, rows: Sequence[int]) -> None:
        self.h_BD[list(rows)] = 0

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {"h_BD": self.h_BD}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.h_BD = tensors["h_BD"].clone()


class Stranger(nn.Module):
    """Adds up what it reads, and what it read before."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)

    def carry(self, rows: int) -> Sums:
        return Sums(rows)

    def forward(self, ids_BT: torch.Tensor, past: Sums | None = None) -> torch.Tensor:
        assert past is not None
        past.next_BD = past.h_BD + F.one_hot(ids_BT % 4, 4).float().sum(1)
        return (self.embedding(ids_BT).sum(1) * past.h_BD).sum()


class Plain(Objective):
    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"targets": torch.tensor(1), "tokens": torch.tensor(1)}

    def forward(self, model: nn.Module, batch: Batch, key: Key | None) -> Result:
        assert isinstance(model.embedding, nn.Embedding)  # what stands in the model's place shows its parts
        return Result({"loss": Term(model(batch["ids"]))})


class Counting:
    """Row 0 begins anew every third step, row 1 never."""

    bytes = tokens = 0

    def batch(self, key: Key, step: int, size: int, *rest: Any, **more: Any) -> Batch:
        return {
            "ids": torch.tensor([[step % 4], [1]]),
            "begins": torch.tensor([step % 3 == 0, step == 0]),
        }

    def evaluation(self, size: int, limit: int | None = None) -> Any:
        return iter(())


def test_a_model_from_outside_carries_by_the_same_protocol() -> None:
    optimizer, schedule = (
        resolve(family, kind)() for family, kind in (("optimizer", "adamw"), ("schedule", "constant"))
    )
    trainer = Trainer(Stranger(), Plain(), Source(Counting()), optimizer, schedule, TrainerSpec(steps=9, batch=2))
    for _ in range(5):
        trainer.train_step()
    carried = trainer.tensors()["carry"]["0.h_BD"]
    assert carried.tolist() == [[1.0, 0.0, 0.0, 1.0], [0.0, 5.0, 0.0, 0.0]]  # steps 3 and 4; all five

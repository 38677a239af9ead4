"""ZeRO, stage 1: ranks that share the optimiser's state train as ranks that do not, bit for bit, and leave the same
checkpoints, which go on with any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from distributed import run_ranks
from torchstone.errors import TorchstoneError
from torchstone.recipe import load_recipe
from torchstone.train.checkpoint import Checkpoint, load_tensors
from torchstone.train.engine import Trainer
from torchstone.train.memory import training_memory
from torchstone.train.mesh import Mesh
from torchstone.train.optimizers import named_parameters
from torchstone.train.run import RunFolder
from torchstone.train.training import train
from torchstone.train.zero import shares

OPTIMIZERS = ({"kind": "adamw"}, {"kind": "muon"}, {"kind": "sgd", "momentum": 0.9})


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        f"{part}/{name}": value.detach().clone()
        for part, tensors in trainer.tensors().items()
        for name, value in tensors.items()
    }


def both(mesh: Mesh, folder: Path, optimizer: dict[str, Any]) -> dict[str, Any]:
    recipe = tiny.recipe(folder, optimizer={"lr": 0.01, **optimizer}, trainer={"ema": 0.9})
    mesh.zero = 0
    plain = tiny.trainer(recipe, mesh=mesh)
    mesh.zero = 1
    sharing = tiny.trainer(recipe, mesh=mesh)
    rows = [(plain.train_step(), sharing.train_step()) for _ in range(4)]
    kept, shared = state(plain), state(sharing)
    again = tiny.trainer(recipe, mesh=mesh)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for full, value in (shared if mesh.first else kept).items():  # what a checkpoint of the first rank holds
        part, _, name = full.partition("/")
        parts.setdefault(part, {})[name] = value
    again.restore(Checkpoint(4, parts, {}))
    rows.append((sharing.train_step(), again.train_step()))
    return {
        "rows": rows,
        "plain": kept,
        "shared": shared,
        "own": {p.name for p in sharing.named if p.value in sharing.optim.state},
        "all": {p.name for p in sharing.named},
        "ends": (state(sharing), state(again)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer["kind"])
def test_shared_state_trains_as_state_of_each_rank(optimizer: dict[str, Any], tmp_path: Path) -> None:
    tiny.resolved(tiny.recipe(tmp_path))  # the cache is there before the ranks start
    a, b = run_ranks(both, 2, tmp_path, optimizer)
    assert all(one == other for one, other in a["rows"])
    assert a["own"] | b["own"] == a["all"] and not a["own"] & b["own"]
    assert a["plain"].keys() == a["shared"].keys()  # the whole state is in the first rank's checkpoint
    assert all(torch.equal(a["plain"][name], a["shared"][name]) for name in a["plain"])
    assert all(torch.equal(value, b["plain"][name]) for name, value in b["shared"].items())
    for rank in (a, b):
        sharing, again = rank["ends"]
        assert sharing.keys() == again.keys() and all(torch.equal(sharing[name], again[name]) for name in sharing)


def runs(mesh: Mesh, folder: Path) -> None:
    recipe = tiny.recipe(folder, trainer={"steps": 6})
    plain, sharing = {**recipe, "parallel": {"data": 2}}, {**recipe, "parallel": {"data": 2, "zero": 1}}
    train(plain, out=folder / "plain", quiet=True)
    train(sharing, out=folder / "sharing", quiet=True)


@pytest.mark.slow
def test_a_run_has_the_checkpoint_of_one_that_shares_nothing(tmp_path: Path) -> None:
    tiny.resolved(tiny.recipe(tmp_path))
    run_ranks(runs, 2, tmp_path)
    plain, sharing = RunFolder(tmp_path / "plain"), RunFolder(tmp_path / "sharing")
    ours, theirs = sharing.model().state_dict(), plain.model().state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    a, b = (load_tensors(run.path / "state" / "step-00000006" / "optimizer.safetensors") for run in (plain, sharing))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_shares_are_even_and_in_order() -> None:
    model = load_recipe(
        {"model": {**tiny.MODEL, "width": 64, "depth": 4, "vocabulary": 300, "context": 8}}
    ).model.build()
    named = named_parameters([("", model)])
    for ranks in (1, 2, 3, 5):
        found = shares(named, ranks)
        assert sorted(p.name for share in found for p in share) == sorted(p.name for p in named)
        sizes = [sum(p.value.numel() for p in share) for share in found]
        largest = max(p.value.numel() for p in named)
        assert max(sizes) - min(sizes) <= largest
        assert all([p for p in named if p in share] == share for share in found)
    with pytest.raises(TorchstoneError, match="2 ranks cannot share 1 parameters"):
        shares(named[:1], 2)


def test_the_estimate_counts_the_share_of_a_rank(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    whole = training_memory(tiny.resolved(recipe)[0])
    shared = training_memory(tiny.resolved({**recipe, "parallel": {"data": 2, "zero": 1}})[0])
    assert 0.5 * whole.optimizer <= shared.optimizer < 0.75 * whole.optimizer
    assert shared.weights == whole.weights and shared.gradients == whole.gradients

"""Child-tuning: the update's moments, who moves and who does not, the published decay, Fisher information by hand, and
trainings that stop and go on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from torchstone.adapt.child_tuning import ChildTuningSpec, TaskFree, children
from torchstone.errors import TorchstoneError
from torchstone.files import read_json
from torchstone.keys import Key
from torchstone.recipe import load_recipe
from torchstone.train import train
from torchstone.train.checkpoint import load_tensors
from torchstone.train.engine import Trainer
from torchstone.train.optimizers import NamedParameter
from torchstone.train.run import RunFolder
from torchstone.train.training import make_trainer

SHORT = {"steps": 4, "save_every": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("child")
    return train(tiny.recipe(folder, model={**tiny.MODEL, "causal": False, "head": "mlm"},
                             objective={"kind": "masked_lm"}), out=folder / "base", quiet=True).path  # fmt: skip


def tuned(base: Path, adapt: dict[str, Any] | None, **sections: Any) -> dict[str, Any]:
    """A recipe that tunes the run on labelled texts."""
    made = tiny.labelled(base.parent, **sections)
    head = made["model"]["head"]
    made["model"] = {"head": head}
    return {**made, "init_from": str(base), **({} if adapt is None else {"adapt": {"kind": "child_tuning", **adapt}})}


def trainer(recipe: dict[str, Any]) -> Trainer:
    return make_trainer(load_recipe(recipe, start=lambda run: RunFolder(run).start()))[0]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def moved(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_the_update_has_the_mean_of_the_gradient_and_the_variance_of_the_formula() -> None:
    """Section 2.3: E[g M / p] = g and Var[g M / p] = (1 - p) / p g^2."""
    value = nn.Parameter(torch.zeros(4))
    gate = TaskFree(ChildTuningSpec(share=0.3), [NamedParameter("w", value, (4,), False)], Key(0))
    g, draws = torch.tensor([1.0, -2.0, 0.5, 0.0]), []
    for step in range(20_000):
        value.grad = g.clone()
        gate.before(step)
        draws.append(value.grad)
    found = torch.stack(draws)
    torch.testing.assert_close(found.mean(0), g, rtol=0, atol=4 * 2 * (0.7 / 0.3 / 20_000) ** 0.5)
    torch.testing.assert_close(found.var(0), 0.7 / 0.3 * g.square(), rtol=0.03, atol=0)
    assert torch.equal(found[0], found[0]) and not torch.equal(found[0], found[1])
    again = nn.Parameter(torch.zeros(4))
    again.grad = g.clone()
    TaskFree(ChildTuningSpec(share=0.3), [NamedParameter("w", again, (4,), False)], Key(0)).before(7)
    assert torch.equal(again.grad, found[7])


@pytest.mark.parametrize("form", ["task_free", "task_driven"])
def test_with_all_elements_it_is_plain_tuning_to_the_bit(base: Path, form: str) -> None:
    plain, child = trainer(tuned(base, None)), trainer(tuned(base, {"form": form, "share": 1.0}))
    for _ in range(3):
        assert plain.train_step()["loss"] == child.train_step()["loss"]
    assert moved(weights(plain.model), weights(child.model)) == set()


def test_children_alone_move_and_the_rest_tunes_as_ever(base: Path) -> None:
    settings = {"optimizer": {"kind": "adamw", "lr": 0.01, "weight_decay": 0.1}}
    plain, child = trainer(tuned(base, None, **settings)), trainer(tuned(base, {"share": 0.2}, **settings))
    before = weights(child.model)
    plain.train_step(), child.train_step()
    first, usual = weights(child.model), weights(plain.model)
    masked = {p.name: p.value for p in child.named if ".layers." in p.name}
    for name in set(before) - set(masked):
        assert torch.equal(first[name], usual[name]), name
    child.train_step()
    masks: dict[str, torch.Tensor] = child.gate.children  # type: ignore[union-attr]
    assert masks.keys() == masked.keys()
    count = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == math.ceil(0.2 * count)
    for name, value in weights(child.model).items():
        if name in masks:
            assert torch.equal(value[~masks[name]], before[name][~masks[name]])
            assert (value != before[name])[masks[name]].float().mean().nan_to_num(1.0) > 0.9


def test_as_published_the_rest_decays(base: Path) -> None:
    settings = {"optimizer": {"kind": "adamw", "lr": 0.01, "weight_decay": 0.1}}
    child = trainer(tuned(base, {"share": 0.2, "decay": "all"}, **settings))
    before = weights(child.model)
    for _ in range(3):
        child.train_step()
    masks: dict[str, torch.Tensor] = child.gate.children  # type: ignore[union-attr]
    after = weights(child.model)
    for p in child.named:
        if p.name in masks:
            factor = (1 - 0.01 * 0.1) ** 3 if p.decays else 1.0
            torch.testing.assert_close(after[p.name][~masks[p.name]], factor * before[p.name][~masks[p.name]],
                                       rtol=1e-5, atol=1e-8)  # fmt: skip


@pytest.mark.parametrize("fisher", ["batch", "example"])
def test_fisher_information_is_the_mean_squared_gradient(base: Path, fisher: str) -> None:
    child = trainer(tuned(base, {"share": 0.4, "fisher": fisher, "examples": 6}))
    child.gate.begin(child)  # type: ignore[union-attr]
    plain = trainer(tuned(base, None))
    size, wanted = (2 if fisher == "batch" else 1), {}
    batches = list(plain.source.train.evaluation(size, 6))
    assert len(batches) == 6 // size
    for batch in batches:
        plain.model.zero_grad()
        out = plain.model(tiny_tokens(batch))
        nn.functional.cross_entropy(out.logits, batch["label"]).backward()
        for name, parameter in plain.model.named_parameters():
            if ".layers." in name:
                wanted[name] = wanted.get(name, 0) + parameter.grad.square() / len(batches)  # type: ignore[union-attr]
    every = torch.cat([value.flatten() for value in wanted.values()])
    least = every.sort(descending=True).values[math.ceil(0.4 * len(every)) - 1]
    masks: dict[str, torch.Tensor] = child.gate.children  # type: ignore[union-attr]
    for name, value in wanted.items():
        close = (value - least).abs() < 1e-4 * least
        assert torch.equal(masks[name][~close], (value >= least)[~close]), name


def tiny_tokens(batch: dict[str, torch.Tensor]) -> Any:
    from torchstone.objectives import tokens_of

    return tokens_of(batch)


def test_children_are_nested_and_never_without_information() -> None:
    fisher = {"a": torch.tensor([3.0, 0.0, 1.0, 0.0]), "b": torch.tensor([[2.0, 0.0], [0.5, 4.0]])}
    sets = {share: children(fisher, share) for share in (0.1, 0.25, 0.5, 0.9, 1.0)}
    assert sets[0.1]["b"].tolist() == [[False, False], [False, True]] and not sets[0.1]["a"].any()
    assert sets[0.25]["a"].tolist() == [True, False, False, False]
    assert sum(int(mask.sum()) for mask in sets[0.9].values()) == 5  # three have none
    assert all(mask.all() for mask in sets[1.0].values())
    shares = sorted(sets)
    for small, large in itertools.pairwise(shares):
        assert all((sets[small][name] <= sets[large][name]).all() for name in fisher)


@pytest.mark.parametrize("form", ["task_free", "task_driven"])
def test_a_training_cut_and_resumed_equals_the_uncut_one(base: Path, tmp_path: Path, form: str) -> None:
    recipe = tuned(base, {"form": form, "share": 0.3}, trainer=SHORT)
    whole = train(recipe, out=tmp_path / "whole", quiet=True)
    with tiny.cut_after(3):
        train(recipe, out=tmp_path / "cut", quiet=True)
    cut = train(recipe, out=tmp_path / "cut", resume=True, quiet=True)
    one, other = (load_tensors(each.path / "model.safetensors") for each in (whole, cut))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    losses = [[row["loss"] for row in each.metrics() if "loss" in row] for each in (whole, cut)]
    assert losses[0] == losses[1]


def test_it_is_tuned_from_the_command_line(base: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    import yaml

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tuned(base, {"share": 0.3}, trainer=SHORT)))
    said = cli("train", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    assert said.status == 0, said.err
    assert RunFolder(tmp_path / "run").metrics()[-1]["test_accuracy"] >= 0
    assert read_json(tmp_path / "run" / "config.json")["spec"]["head"]["kind"] == "classification"


@pytest.mark.parametrize(
    ("adapt", "message"),
    [
        ({"share": 0}, "adapt.share: .*greater than 0"),
        ({"share": 1.5}, "adapt.share: .*less than or equal to 1"),
        ({"scope": ["*.nothing.*"]}, r"adapt.scope: no parameter that trains is named '\*.nothing.\*'"),
        ({"scope": []}, "adapt.scope: .*at least 1"),
        ({"form": "free"}, "adapt.form"),
    ],
)
def test_what_cannot_be_is_one_sentence(base: Path, adapt: dict[str, Any], message: str) -> None:
    with pytest.raises(TorchstoneError, match=message):
        trainer(tuned(base, adapt))
    with pytest.raises(TorchstoneError, match="adapt: needs init_from"):
        load_recipe({"adapt": {"kind": "child_tuning"}})

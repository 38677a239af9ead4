"""LoRA: what trains, what it computes, and that it starts from the run it adapts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import torchstone
from torchstone.errors import TorchstoneError
from torchstone.model.linear.lora import LoraLinear, LoraSpec
from torchstone.model.site import Site, initialise
from torchstone.recipe import load_recipe
from torchstone.train import train
from torchstone.train.checkpoint import load_tensors


def randomise(module: LoraLinear) -> LoraLinear:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
    return module


@pytest.fixture
def base(tmp_path: Path) -> Any:
    return train(tiny.recipe(tmp_path), out=tmp_path / "base", quiet=True)


def adapt(tmp_path: Path, base: Any, steps: int = 4, **fields: Any) -> Any:
    recipe = tiny.recipe(tmp_path, trainer={"steps": steps}, optimizer={"lr": 0.01})
    recipe = {**recipe, "init_from": str(base.path), "adapt": {"kind": "lora", "rank": 2, **fields}}
    del recipe["model"]
    return train(recipe, out=tmp_path / "adapted", quiet=True)


def test_the_update_of_each_target_slice_is_the_scaled_product_of_its_two_matrices() -> None:
    spec = LoraSpec(rank=3, alpha=6.0, targets=("q", "v"))
    linear = randomise(Site(width=8, linear_spec=spec).linear(8, (4, 2, 6), ("q", "k", "v"), bias=True))
    x = torch.randn(5, 8, dtype=torch.float64)
    linear = linear.double()
    y = x @ linear.weight.T + linear.bias
    y[:, 0:4] += 2.0 * (x @ linear.lora_a[0:3].T) @ linear.lora_b[0:4].T
    y[:, 6:12] += 2.0 * (x @ linear.lora_a[3:6].T) @ linear.lora_b[4:10].T
    torch.testing.assert_close(linear(x), y)
    torch.testing.assert_close(x @ linear.merged().T + linear.bias, y)


def test_a_projection_without_a_target_role_is_a_plain_one() -> None:
    linear = Site(width=8, linear_spec=LoraSpec(targets=("q",))).linear(8, 4, "down")
    assert type(linear).__name__ == "Linear" and len(list(linear.parameters())) == 1


def test_adaptation_starts_where_the_run_ended_and_moves_the_updates_alone(tmp_path: Path, base: Any) -> None:
    run = adapt(tmp_path, base)
    first, last = (
        next(r["valid_loss"] for r in rows if "valid_loss" in r) for rows in (run.metrics(), base.metrics()[::-1])
    )
    assert first == last
    before, after = (load_tensors(x.path / "model.safetensors") for x in (base, run))
    assert set(after) - set(before) == {name for name in after if "lora_" in name} != set()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(after[name].any() for name in after if name.endswith("lora_b"))


def test_also_trains_in_full_what_it_names(tmp_path: Path, base: Any) -> None:
    run = adapt(tmp_path, base, also=["*.norm.weight"], targets=["q"])
    before, after = (load_tensors(x.path / "model.safetensors") for x in (base, run))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith("norm.weight")} != set()


def test_a_stopped_adaptation_resumes_bit_for_bit(tmp_path: Path, base: Any) -> None:
    whole = adapt(tmp_path, base)
    (tmp_path / "adapted").rename(tmp_path / "whole")
    with tiny.cut_after(3):
        adapt(tmp_path, base)
    recipe = load_recipe(tmp_path / "whole" / "recipe.yaml")
    cut = train(recipe, out=tmp_path / "adapted", resume=True, quiet=True)
    whole.path = tmp_path / "whole"
    tiny.assert_same_run(cut, whole)


def test_the_recipe_of_an_adapted_run_takes_model_and_tokenizer_from_the_run(tmp_path: Path, base: Any) -> None:
    run = adapt(tmp_path, base)
    assert run.recipe.model.linear.kind == "lora" and run.recipe.model.width == base.recipe.model.width
    assert run.tokenizer().hash == base.tokenizer().hash
    assert run.model().spec == run.recipe.model


def test_inspect_counts_what_trains(tmp_path: Path, base: Any) -> None:
    counts = torchstone.inspect({"init_from": str(base.path), "adapt": {"kind": "lora", "rank": 2, "targets": ["q"]}})
    # one layer, q alone: A (2, 16) and B (16, 2)
    assert counts["parameters"] == 64
    assert counts["training_bytes"]["gradients"] == 4 * 64
    assert counts["training_bytes"]["weights"] > 4 * 64


def test_a_new_head_starts_fresh_and_is_named(tmp_path: Path, base: Any, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny.recipe(tmp_path, model={"head": {"kind": "lm", "tied": False}}, trainer={"steps": 1})
    run = train({**recipe, "init_from": str(base.path)}, out=tmp_path / "next")
    assert "new: head.out.weight" in capsys.readouterr().err
    assert "head.out.weight" in load_tensors(run.path / "model.safetensors")


REFUSED = {
    "adapt without init_from": ({"adapt": "lora"}, "adapt: needs init_from"),
    "unknown role": (
        {"init_from": "BASE", "adapt": {"kind": "lora", "targets": ["qkv"]}},
        "adapt.targets: needs one or more of q, k",
    ),
    "unknown pattern": (
        {"init_from": "BASE", "adapt": {"kind": "lora", "also": ["nothing.*"]}},
        "no parameter is named 'nothing.*'",
    ),
    "no such run": ({"init_from": "nowhere", "adapt": "lora"}, "nowhere: no such run"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_adapted_is_said_in_a_sentence(tmp_path: Path, base: Any, what: str) -> None:
    sections, message = REFUSED[what]
    data = {**tiny.recipe(tmp_path), **json.loads(json.dumps(sections).replace("BASE", str(base.path)))}
    with pytest.raises(TorchstoneError, match=re.escape(message)):
        train(data, out=tmp_path / "refused", quiet=True)
    assert not (tmp_path / "refused").exists()


def test_another_lora_on_top_is_refused(tmp_path: Path, base: Any) -> None:
    run = adapt(tmp_path, base)
    data = {"init_from": str(run.path), "adapt": {"kind": "lora", "rank": 3}}
    with pytest.raises(TorchstoneError, match="has another LoRA already"):
        train(data, out=tmp_path / "refused", quiet=True)


def test_first_values_are_keyed_by_name() -> None:
    spec = LoraSpec(rank=3, targets=("q", "v"))
    one, two = (initialise(Site(width=8, linear_spec=spec).linear(8, (4, 2, 6), ("q", "k", "v")), 0) for _ in range(2))
    assert torch.equal(one.lora_a, two.lora_a) and one.lora_a.abs().max() <= 8**-0.5 and not one.lora_b.any()

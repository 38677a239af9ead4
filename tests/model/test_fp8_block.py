"""Projections of 8 bits with scales of blocks: which there are, experts by themselves, and a training with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from torchstone import api
from torchstone.model.linear.fp8_block import FP8Bank, FP8BlockSpec, FP8Linear
from torchstone.model.site import Site, initialise
from torchstone.ops.experts import group, grouped_product_reference

MODEL: dict[str, Any] = {
    "width": 32,
    "depth": 2,
    "vocabulary": 61,
    "attention": {"heads": 4},
    "ffn": {"kind": "moe", "experts": 4, "hidden": 12, "shared": 1, "router": "sigmoid_bias"},
}


def test_which_parts_are_of_8_bits() -> None:
    model: Any = api.build({**MODEL, "linear": "fp8_block", "embedding": {"size": 16}, "head": {"tied": False}})
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if hasattr(module, "weight")}
    eights = {name.split(".", 3)[-1] for name, kind in kinds.items() if kind in ("FP8Linear", "FP8Bank")}
    assert eights == {"attention.qkv", "attention.out", "ffn.up", "ffn.down", "ffn.shared.up", "ffn.shared.down"}
    assert kinds["embedding.project"] == kinds["head.out"] == "Linear"


def test_each_expert_has_its_own_rows_and_blocks() -> None:
    spec, experts = FP8BlockSpec(tile=8), torch.tensor([[0, 2], [2, 4], [0, 2], [2, 0]])  # none for 1, and 4 is none
    bank: Any = initialise(spec.bank(4, 32, (5, 7), ("gate", "up"), _normal), 0)
    assert isinstance(bank, FP8Bank)
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    groups = group(experts, 4)
    y = bank(x, groups)
    y.square().sum().backward()
    quantised = torch.cat([spec.weight(part) for part in bank.weight.detach().split(bank.slices)])
    wanted = grouped_product_reference(spec.input(x.detach()), quantised.unflatten(0, (4, -1)), groups.expert_M)
    torch.testing.assert_close(y.detach(), wanted, rtol=1e-5, atol=1e-5)
    own = bank.weight.grad.unflatten(0, (4, -1)).abs().amax((1, 2))
    assert (own > 0).tolist() == [True, False, True, False]
    for e in (0, 2):  # as of a projection of its own
        one: Any = FP8Linear(32, (5, 7), ("gate", "up"), False, spec, _normal)
        one.weight.data.copy_(bank.weight.detach().unflatten(0, (4, -1))[e])
        mine = x.detach()[groups.expert_M == e]
        one(mine).square().sum().backward()
        assert torch.equal(one.weight.grad, bank.weight.grad.unflatten(0, (4, -1))[e])


def _normal(weight: torch.Tensor, role: str, generator: torch.Generator) -> None:
    weight.normal_(generator=generator)


def test_inputs_and_weights_are_functions_of_the_spec() -> None:
    spec = FP8BlockSpec(tile=16)
    made: Any = initialise(Site(width=32, linear_spec=spec).linear(32, (20, 7), ("up", "gate")), 0)
    x = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(1))
    weight = torch.cat([spec.weight(part) for part in made.weight.split(made.slices)])
    torch.testing.assert_close(made(x), spec.input(x) @ weight.T)


@pytest.mark.slow
@pytest.mark.parametrize("ffn", [tiny.MODEL["ffn"], MODEL["ffn"]])
def test_a_training_follows_the_one_in_floats(ffn: dict[str, Any], tmp_path: Path) -> None:
    losses = {}
    for linear in ("dense", {"kind": "fp8_block", "tile": 8}):
        trainer = tiny.trainer(
            tiny.recipe(tmp_path, model={"ffn": ffn, "linear": linear}, optimizer={"lr": 0.01}, trainer={"steps": 60})
        )
        losses[str(linear)] = [trainer.train_step()["loss"] for _ in range(60)]
    dense, eight = losses.values()
    assert eight[-1] < 0.7 * eight[0] and abs(eight[-1] - dense[-1]) < 0.05 * dense[-1] and eight != dense

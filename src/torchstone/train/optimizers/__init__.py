"""Optimisers over named parameters, grouped by rule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from torchstone.model.linear import Linear, LinearBank
from torchstone.model.site import parameter_name
from torchstone.recipe import OptimizerSpec
from torchstone.spec import lazy_parts

__all__ = ["NamedParameter", "OptimizerSpec", "named_parameters"]

__getattr__ = lazy_parts(__name__)


@dataclass(frozen=True)
class NamedParameter:
    """A parameter and what grouping rules may know of it.

    Attributes:
        name: its path, without wrappers' prefixes.
        value: the parameter.
        slices: sizes along its first axis of the projections fused in it; one slice for others.
        hidden: whether it is the matrix of a projection inside the model, not an embedding, a head or a vector.
        experts: how many experts' matrices it holds; 1 for all else.
    """

    name: str
    value: nn.Parameter
    slices: tuple[int, ...]
    hidden: bool
    experts: int = 1

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: matrices yes, norms and biases no."""
        return self.value.dim() >= 2


def named_parameters(modules: Iterable[tuple[str, nn.Module]]) -> list[NamedParameter]:
    """Trainable parameters of modules (prefix, module), each once, in a fixed order."""
    found: dict[int, NamedParameter] = {}
    for prefix, root in modules:
        for path, module in root.named_modules():
            for name, value in module.named_parameters(recurse=False):
                if not value.requires_grad or id(value) in found:
                    continue
                full = parameter_name(".".join(step for step in (prefix, path, name) if step))
                fused = isinstance(module, Linear | LinearBank) and name == "weight"
                hidden = fused and not {"head", "embed"} & set(module.roles)
                slices = module.slices if fused else (value.shape[0] if value.dim() else 1,)
                experts = module.count if isinstance(module, LinearBank) else 1
                found[id(value)] = NamedParameter(full, value, tuple(slices), hidden, experts)
    return list(found.values())


def decay_groups(named: Iterable[NamedParameter], weight_decay: float, **more: object) -> list[dict[str, object]]:
    """Two parameter groups: those that decay and those that do not."""
    named = list(named)
    groups: list[dict[str, object]] = []
    for decays in (True, False):
        members = [p.value for p in named if p.decays == decays]
        if members:
            groups.append({"params": members, "weight_decay": weight_decay if decays else 0.0, **more})
    return groups


def set_factor(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale every group's learning rate to `factor` of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor

"""Optimisers over named parameters, grouped by rule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

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
        rate: factor on the learning rate.
    """

    name: str
    value: nn.Parameter
    slices: tuple[int, ...]
    hidden: bool
    experts: int = 1
    rate: float = 1.0

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: matrices yes, norms and biases no."""
        return self.value.dim() >= 2


def below_top(root: nn.Module) -> dict[int, int]:
    """How many steps a model's parameters, by `id`, lie below its head: 1 in the last layer of L, L + 1 in embeddings.

    A position's table is of the one layer that reads it, or of the embedding to which it is added; one that several
    layers read lies at the top, as in BEiT's fine-tuning.
    """
    stacks: dict[str, Any] = getattr(root, "stacks", {})
    steps: dict[int, int] = {}

    def put(module: nn.Module, step: int) -> None:
        steps.update((id(parameter), step) for parameter in module.parameters())

    for stack in stacks.values():
        readers: dict[str, set[int]] = {}
        for i, layer in enumerate(stack.layers):
            put(layer, len(stack.layers) - i)
            for module in layer.modules():
                if isinstance(key := getattr(module, "position", None), str):
                    readers.setdefault(key, set()).add(i)
        for key, layers in readers.items():
            if len(layers) == 1:
                put(stack.positions[key], len(stack.layers) - min(layers))
        if stack.absolute is not None:
            put(stack.positions[stack.absolute], len(stack.layers) + 1)
    if stacks:
        put(root.embedding, max(len(stack.layers) for stack in stacks.values()) + 1)  # type: ignore[arg-type]
    return steps


def named_parameters(modules: Iterable[tuple[str, nn.Module]], layer_decay: float = 1.0) -> list[NamedParameter]:
    """Trainable parameters of modules (prefix, module), each once, in a fixed order. `layer_decay` is the factor on the
    learning rate for each step of `below_top`."""
    found: dict[int, NamedParameter] = {}
    for prefix, root in modules:
        steps = below_top(root) if layer_decay != 1 else {}
        for path, module in root.named_modules():
            for name, value in module.named_parameters(recurse=False):
                if not value.requires_grad or id(value) in found:
                    continue
                full = parameter_name(".".join(step for step in (prefix, path, name) if step))
                fused = isinstance(module, Linear | LinearBank) and name == "weight"
                hidden = fused and not {"head", "embed"} & set(module.roles)
                slices = module.slices if fused else (value.shape[0] if value.dim() else 1,)
                experts = module.count if isinstance(module, LinearBank) else 1
                rate = layer_decay ** steps.get(id(value), 0)
                found[id(value)] = NamedParameter(full, value, tuple(slices), hidden, experts, rate)
    return list(found.values())


def by_rate(named: Iterable[NamedParameter]) -> list[tuple[float, list[NamedParameter]]]:
    """Parameters by their factor on the learning rate, the largest first."""
    named = list(named)
    rates = sorted({p.rate for p in named}, reverse=True)
    return [(rate, [p for p in named if p.rate == rate]) for rate in rates]


def decay_groups(
    named: Iterable[NamedParameter], weight_decay: float, *, peak: float, **more: object
) -> list[dict[str, object]]:
    """Parameter groups: for each factor on the learning rate, whose peak is `peak`, those that decay and those that do
    not."""
    groups: list[dict[str, object]] = []
    for rate, alike in by_rate(named):
        for decays in (True, False):
            members = [p.value for p in alike if p.decays == decays]
            if members:
                decay = weight_decay if decays else 0.0
                groups.append({"params": members, "weight_decay": decay, "peak": rate * peak, **more})
    return groups


def set_factor(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale every group's learning rate to `factor` of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor

"""What a training needs in memory: weights, gradients, optimiser state, and what autograd keeps.

The last is not guessed from a formula: the model and its loss run once on fake tensors, which have shapes and no
memory, and what autograd saves is added up. So it is right for any part.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from torchstone.keys import Key
from torchstone.objectives import Batch, Facts, Objective
from torchstone.ops.cross_entropy import logits_at_once
from torchstone.recipe import Recipe
from torchstone.train.engine import autocast
from torchstone.train.environment import choose_device
from torchstone.train.optimizers import named_parameters
from torchstone.train.run import RunFolder
from torchstone.train.zero import shares

__all__ = ["TrainingMemory", "training_memory"]

_LOGIT = 3 * 4
"""Bytes of a logit of the chunked loss at work: itself, its exponential and its gradient."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one rank. `activations` is None where the objective cannot run without data."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int | None
    work: int

    @property
    def peak(self) -> int:
        """All together, at the end of the forward pass."""
        return self.weights + self.gradients + self.optimizer + self.ema + (self.activations or 0) + self.work


def training_memory(recipe: Recipe) -> TrainingMemory:
    """Bytes that a step of `recipe` needs above the idle process; its vocabulary must be known. The data
    are read where their examples are no tokens."""
    vocabulary = getattr(recipe.model, "vocabulary", None)
    none = torch.zeros(vocabulary or 0, dtype=torch.int64)  # sizes are the same whatever a text holds
    runs: Any = {"init_from": recipe.init_from, "load": lambda run: RunFolder(run).require().model()}
    facts = Facts(vocabulary, 1, 2, 0, model=recipe.model, frequencies=lambda: none, **runs)
    objective = recipe.objective.build(facts)
    batch = _batch(recipe, objective)
    counts = objective.counts(batch)
    selected = int(counts["targets" if "targets" in counts else "tokens"]) if "ids" in batch else 0
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = recipe.model.build()
        if recipe.adapt is not None:
            recipe.adapt.prepare(model)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        beside = [] if objective.reference is None else [*objective.reference.parameters()]
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        optimizer = _optimizer_bytes(recipe, model)
        activations = _activations(recipe, model, objective, batch, selected, recipe.trainer.recompute)
        layers = sum(len(stack.layers) for stack in getattr(model, "stacks", {}).values())
        if activations is not None and recipe.trainer.recompute and layers:
            # in the backward pass one layer's activations are there again, and gradients of about their size
            every = _activations(recipe, model, objective, batch, selected, False) or activations
            activations += 2 * (every - activations) // layers
    rows = recipe.trainer.batch * getattr(recipe.data, "block", 1)
    return TrainingMemory(
        weights + sum(p.numel() * p.element_size() for p in beside),
        trained,
        optimizer,
        weights if recipe.trainer.ema else 0,
        activations,
        _LOGIT * min(logits_at_once(_device_type(recipe)), rows * (vocabulary or 1)),
    )


def _device_type(recipe: Recipe) -> str:
    asked = recipe.trainer.device
    return choose_device(asked).type if asked == "auto" else asked.partition(":")[0]


def _optimizer_bytes(recipe: Recipe, model: nn.Module) -> int:
    """Bytes of the optimiser's state on a rank, by letting it take one step on fake gradients."""
    named = named_parameters([("", model)])
    if recipe.parallel.zero:
        named = max(shares(named, recipe.parallel.data), key=lambda own: sum(p.value.numel() for p in own))
    optimizer = recipe.optimizer.build(named)
    for p in named:
        p.value.grad = torch.zeros_like(p.value)
    optimizer.step()
    size = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    for p in named:
        p.value.grad = None
    return size


def _batch(recipe: Recipe, objective: Objective) -> Batch:
    """A prepared batch of ordinary tokens; of what is none, a real one."""
    if recipe.data.example != "tokens":
        rows = recipe.data.prepare().train.batch(Key(0), 0, recipe.trainer.batch)
        return objective.prepare(rows, Key(0))
    shape = (recipe.trainer.batch, *((2,) if recipe.data.paired else ()), getattr(recipe.data, "block", 1))
    batch = {"ids": torch.full(shape, 3), "next": torch.full(shape, 3)}
    if getattr(recipe.data, "separate_documents", False):
        batch["start"] = torch.zeros(shape, dtype=torch.int64)
    return objective.prepare(batch, Key(0))


class _Selected(TorchDispatchMode):
    """What a mask selects has the size that it has in a real batch: how many a fake mask selects, nobody knows."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index.Tensor:
            source, (mask, *others) = args
            if mask is not None and mask.dtype == torch.bool and not others:
                return source.new_empty(self.count, *source.shape[mask.dim() :])
        return func(*args, **(kwargs or {}))


def _activations(
    recipe: Recipe, model: nn.Module, objective: Objective, batch: Batch, selected: int, recompute: bool
) -> int | None:
    """Bytes that autograd keeps of one micro-batch, each storage once, without the parameters themselves."""
    own = {id(p.untyped_storage()) for p in [*model.parameters(), *objective.parameters()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            kept[id(storage)] = storage
        return tensor

    for stack in getattr(model, "stacks", {}).values():
        stack.recompute = recompute
    if type(objective).collect is not Objective.collect:  # how long samples will be, nobody knows
        return None
    try:
        with (
            warnings.catch_warnings(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            autocast(torch.device("cpu"), recipe.trainer),
            _Selected(selected),
        ):
            warnings.simplefilter("ignore")
            result = objective(model, batch, Key(0))
            sum(term.total for term in result.terms.values())
    except Exception:  # an objective that asks fake tensors for their values
        return None
    return sum(storage.nbytes() for storage in kept.values())

"""What a training needs in memory: weights, gradients, optimiser state, and what autograd keeps.

The last is not guessed from a formula: the model and its loss run once on fake tensors, which have shapes and no
memory, and what autograd saves is added up. So it is right for any part.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from torchstone.keys import Key
from torchstone.objectives import Facts, Objective
from torchstone.recipe import Recipe
from torchstone.train.engine import autocast
from torchstone.train.optimizers import named_parameters

__all__ = ["TrainingMemory", "training_memory"]

_WORK = 3 * (1 << 23) * 4
"""Bytes of the chunked loss at work: logits, their exponentials and the gradient of one chunk."""


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
    """Bytes that a step of `recipe` needs above the idle process; its vocabulary must be known."""
    device = torch.device("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = recipe.model.build()
        objective = recipe.objective.build(Facts(getattr(recipe.model, "vocabulary", None), 1, 2, 0))
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        optimizer = _optimizer_bytes(recipe, model)
        activations = _activations(recipe, model, objective, device)
    vocabulary = getattr(recipe.model, "vocabulary", None) or 1
    rows = recipe.trainer.batch * getattr(recipe.data, "block", 1)
    return TrainingMemory(
        weights,
        weights,
        optimizer,
        weights if recipe.trainer.ema else 0,
        activations,
        min(_WORK, 3 * 4 * rows * vocabulary),
    )


def _optimizer_bytes(recipe: Recipe, model: nn.Module) -> int:
    """Bytes of the optimiser's state, by letting it take one step on fake gradients."""
    named = named_parameters([("", model)])
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


def _activations(recipe: Recipe, model: nn.Module, objective: Objective, device: torch.device) -> int | None:
    """Bytes that autograd keeps of one micro-batch, each storage once, without the parameters themselves."""
    own = {id(p.untyped_storage()) for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            kept[id(storage)] = storage
        return tensor

    rows, block = recipe.trainer.batch, getattr(recipe.data, "block", 1)
    batch = {"ids": torch.zeros(rows, block, dtype=torch.int64), "next": torch.zeros(rows, block, dtype=torch.int64)}
    if getattr(recipe.data, "separate_documents", False):
        batch["start"] = torch.zeros(rows, block, dtype=torch.int64)
    for stack in getattr(model, "stacks", {}).values():
        stack.recompute = recipe.trainer.recompute
    try:
        with (
            warnings.catch_warnings(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            autocast(device, recipe.trainer),
        ):
            warnings.simplefilter("ignore")
            result = objective(model, objective.prepare(batch, Key(0)), Key(0))
            sum(term.total for term in result.terms.values())
    except Exception:  # data-dependent shapes: a fake tensor has no data
        return None
    return sum(storage.nbytes() for storage in kept.values())

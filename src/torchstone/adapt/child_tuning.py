"""Child-tuning (Xu et al. 2021, arXiv 2109.05687): a run is tuned with all its weights forwards and a part of its
gradient backwards.

    g_t M_t / p,  M_t ~ Bernoulli(p) anew each step              task-free (section 2.1)
    g_t M,        M = 1 where the Fisher information is among    task-driven (section 2.2)
                  the largest share p of all masked elements

    F_i = mean over batches of (dL / dw_i)^2, one pass over the training split, dropout on, before the first step

Masks come after the gradient is summed and clipped, before the optimiser's moments. With the task-driven form an
element that is no child keeps its value to the bit, or is left to the optimiser's decay (`decay: all`, as published).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from torchstone.errors import TorchstoneError
from torchstone.keys import Key
from torchstone.recipe import AdaptSpec

if TYPE_CHECKING:
    from torchstone.train.engine import Trainer
    from torchstone.train.gate import GradientGate
    from torchstone.train.optimizers import NamedParameter

__all__ = ["ChildTuningSpec", "TaskDriven", "TaskFree", "children"]


class ChildTuningSpec(AdaptSpec):
    """Tune a run by a part of its gradient: drawn anew each step, or that of the task's largest Fisher information."""

    paper: ClassVar[str] = "Xu et al. 2021, arXiv 2109.05687"

    form: Literal["task_free", "task_driven"] = "task_driven"
    """Masks drawn each step (Child-Tuning_F), or one by Fisher information (Child-Tuning_D)."""
    share: float = Field(0.3, gt=0, le=1)
    """p, share of the masked elements that moves."""
    scope: tuple[str, ...] = Field(("*.layers.*",), min_length=1)
    """Patterns of the parameters that are masked; all else, as embeddings and the head, is tuned in full."""
    fisher: Literal["batch", "example"] = "batch"
    """Whose gradient is squared: that of a micro-batch (`trainer.batch` examples), as published, or each example's."""
    examples: int | None = Field(None, ge=1)
    """Examples that Fisher information is estimated on; None takes the whole training split."""
    decay: Literal["children", "all"] = "children"
    """Task-driven: which masked elements weight decay, and any other move of the optimiser, applies to."""

    def gate(self, named: Sequence[NamedParameter], key: Key) -> GradientGate:
        masked = [p for p in named if any(fnmatchcase(p.name, pattern) for pattern in self.scope)]
        unused = [pattern for pattern in self.scope if not any(fnmatchcase(p.name, pattern) for p in named)]
        if unused:
            raise TorchstoneError(f"adapt.scope: no parameter that trains is named {unused[0]!r}")
        return TaskFree(self, masked, key) if self.form == "task_free" else TaskDriven(self, masked)


class TaskFree:
    """The gradient's elements, each kept with probability p and divided by it."""

    def __init__(self, spec: ChildTuningSpec, masked: Sequence[NamedParameter], key: Key) -> None:
        self.share, self.masked, self.key = spec.share, masked, key

    def begin(self, trainer: Trainer) -> None:
        pass

    def before(self, step: int) -> None:
        for p in self.masked:
            if p.value.grad is not None:
                generator = self.key.fold("child", step, p.name).generator()
                kept = torch.rand(p.value.shape, generator=generator) < self.share
                p.value.grad.mul_(kept.to(p.value.grad.device) / self.share)

    def after(self, step: int) -> None:
        pass

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        pass


class TaskDriven:
    """The gradient of the children: one mask a training.

    Attributes:
        children: bool, by parameter; empty before the training begins.
    """

    def __init__(self, spec: ChildTuningSpec, masked: Sequence[NamedParameter]) -> None:
        self.spec, self.masked = spec, masked
        self.children: dict[str, torch.Tensor] = {}
        self._before: dict[str, torch.Tensor] = {}

    def begin(self, trainer: Trainer) -> None:
        fisher = {p.name: torch.zeros_like(p.value, dtype=torch.float32) for p in self.masked}
        turns = 0
        for _ in trainer.pass_gradients(trainer.spec.batch if self.spec.fisher == "batch" else 1, self.spec.examples):
            turns += 1
            for p in self.masked:
                if p.value.grad is not None:
                    fisher[p.name] += p.value.grad.float().square()
        if not turns:
            raise TorchstoneError("adapt child_tuning: the training split has no example to estimate on")
        self.children = children({name: value / turns for name, value in fisher.items()}, self.spec.share)

    def before(self, step: int) -> None:
        for p in self.masked:
            if p.value.grad is not None:
                p.value.grad.mul_(self.children[p.name])
        if self.spec.decay == "children" and self.spec.share < 1:
            self._before = {p.name: p.value.detach().clone() for p in self.masked}

    def after(self, step: int) -> None:
        with torch.no_grad():
            for p in self.masked:
                if p.name in self._before:
                    p.value.copy_(torch.where(self.children[p.name], p.value, self._before[p.name]))
        self._before = {}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"children.{name}": value for name, value in self.children.items()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        saved = {name.removeprefix("children."): value for name, value in tensors.items()}
        if saved and {name: value.shape for name, value in saved.items()} != {
            p.name: p.value.shape for p in self.masked
        }:
            raise TorchstoneError("the checkpoint's masks are of other parameters than adapt.scope names")
        self.children = {p.name: saved[p.name].to(p.value.device) for p in self.masked if saved}


def children(fisher: Mapping[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    """Masks (bool, by name) of the share of all elements together whose Fisher information is largest; of an element
    without any only where all are taken."""
    if share == 1:
        return {name: torch.ones_like(value, dtype=torch.bool) for name, value in fisher.items()}
    every = torch.cat([value.flatten().cpu() for value in fisher.values()])
    count = math.ceil(share * len(every))
    least = every.kthvalue(len(every) - count + 1).values.item()
    return {name: (value >= least) & (value > 0) for name, value in fisher.items()}

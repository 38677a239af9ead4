"""The training engine: any `nn.Module`, any objective, any source of batches.

One step: batches, what the model adds to them, and their counts first, over all micro-batches and ranks; then for each
micro-batch the terms' sums, each divided by its count and weighted, and a backward pass; then one move of the
optimiser. Every random draw is a function of (seed, purpose, step, micro-batch), so a step depends on nothing but the
weights and its number.

A module of the model may have ``before_step(step)``, called before step number `step` (from 0), and
``after_step(step, sums)``, called after the optimiser moved, with its layer's own sums of the step over all
micro-batches and ranks, by name.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from torchstone.errors import TorchstoneError
from torchstone.files import full_disk
from torchstone.keys import Key
from torchstone.model.carry import Carry, Carrying, carry_of
from torchstone.model.site import parameter_name
from torchstone.objectives import Batch, Objective
from torchstone.recipe import AdaptSpec, EvaluateSpec, OptimizerSpec, ScheduleSpec, TrainerSpec
from torchstone.train.checkpoint import Checkpoint
from torchstone.train.environment import autocast
from torchstone.train.gate import GradientGate
from torchstone.train.mesh import Mesh
from torchstone.train.optimizers import named_parameters, set_factor
from torchstone.train.progress import Progress
from torchstone.train.run import RunFolder, load_weights
from torchstone.train.zero import Shares

__all__ = ["DocumentedSplit", "ScoredSplit", "Source", "Split", "Stopped", "Trainer"]


class Split(Protocol):
    """A source of batches. `bytes` and `tokens` are those of the text, for bits per byte."""

    bytes: int
    tokens: int

    def batch(
        self, key: Key, step: int, size: int, micro: int = 0, accumulate: int = 1, rank: int = 0, ranks: int = 1
    ) -> Batch:
        """The batch of a step: a pure function of the arguments."""
        ...

    def evaluation(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Batches in order."""
        ...


@runtime_checkable
class ScoredSplit(Split, Protocol):
    """A split that has metrics of its own, of a model's likeliest tokens."""

    def score(self, predicted_BT: torch.Tensor, batch: Batch) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
        """Metrics by name, each a sum and its count. `predicted_BT` is -1 where the batch has no target."""
        ...


@runtime_checkable
class DocumentedSplit(Split, Protocol):
    """A split that knows which of its `documents` each target belongs to."""

    documents: int

    def documents_of(self, block_B: np.ndarray) -> np.ndarray:
        """Numbers of documents (B, T), from a batch's ``example``."""
        ...


def _by_document(split: DocumentedSplit, nll_BT: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Nats, and targets, of each document (2, documents), float64, on the CPU."""
    where_BT = torch.from_numpy(split.documents_of(batch["example"].cpu().numpy()))
    there_BT = (batch["next"] >= 0).cpu()
    both = torch.stack([nll_BT.cpu()[there_BT].double(), torch.ones(int(there_BT.sum()), dtype=torch.float64)])
    return torch.zeros(2, split.documents, dtype=torch.float64).index_add_(1, where_BT[there_BT], both)


def _order(name: str) -> tuple[int, str]:
    """Where "12.ids" stands among names that begin with a number."""
    micro, _, rest = name.partition(".")
    return int(micro), rest


@dataclass(frozen=True)
class Source:
    """The splits that a training reads."""

    train: Split
    valid: Split | None = None
    test: Split | None = None


class Stopped(Exception):
    """A signal asked to stop, and a checkpoint was written."""

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__(f"stopped at step {step}")
        self.step, self.signal = step, signal_number


@dataclass
class Trainer:
    """A training in progress.

    Args:
        model, objective: what is trained and what is minimised.
        source: batches.
        optimizer, schedule, spec, evaluate: the recipe's sections.
        device: where the model lies.
        mesh: ranks.
        folder: the run to write into; None keeps everything in memory.
        flops_per_token: forward and backward, for the utilisation that is shown on devices whose peak is known.
        adapt: how the model of another run is adapted; its gate stands before the optimiser.
    """

    model: nn.Module
    objective: Objective
    source: Source
    optimizer: OptimizerSpec
    schedule: ScheduleSpec
    spec: TrainerSpec
    evaluate: EvaluateSpec = EvaluateSpec()
    device: torch.device = torch.device("cpu")
    mesh: Mesh = field(default_factory=Mesh)
    folder: RunFolder | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    flops_per_token: float | None = None
    quiet: bool = False
    tensorboard: Any = None
    adapt: AdaptSpec | None = None

    def __post_init__(self) -> None:
        self.key = Key(self.spec.seed)
        self.step = 0
        """Completed steps."""
        self.best = math.inf
        self.rows: list[dict[str, Any]] = []
        self.objective.to(self.device)
        self.named = named_parameters([("", self.model), ("objective", self.objective)], self.optimizer.layer_decay)
        if not self.named:
            raise TorchstoneError("nothing to train: no parameter requires a gradient")
        self.shares = Shares(self.named, self.mesh) if self.mesh.zero and self.mesh.ranks > 1 else None
        own = self.named if self.shares is None else self.shares.own
        self.optim: torch.optim.Optimizer = self.optimizer.build(own)
        self.gate: GradientGate | None = None
        if self.adapt is not None:
            self.gate = self.adapt.gate(self.named, self.key.fold("gate"))
        self.ema = {p.name: p.value.detach().clone() for p in self.named} if self.spec.ema is not None else None
        if self.objective.rounds > 1:
            self._check_rounds()
        self._collected: list[Batch] = []
        """Batches of which steps to come take their parts, by micro-batch."""
        self.carries: dict[int, Carry] = {}
        """What the model carries from step to step, by micro-batch; none where batches are no streams."""
        modules = [(parameter_name(path), module) for path, module in self.model.named_modules()]
        self._before = [module for _, module in modules if hasattr(module, "before_step")]
        self._after = [(path, module) for path, module in modules if hasattr(module, "after_step")]
        self._sums: dict[str, torch.Tensor] = {}
        """What layers summed for themselves over the last step, by "path:name"."""
        self._signal: int | None = None
        self._saved: int | None = None
        # sums are taken in float64 where the device has it
        self._wide = torch.float32 if self.device.type == "mps" else torch.float64

    # -- one step

    def micro_batches(self, step: int) -> list[Batch]:
        """Batches of this rank for `step`, prepared and collected."""
        rounds = self.objective.rounds
        if rounds == 1:
            return self._collect(step)
        part = step % rounds
        if part == 0:
            self._collected = self._collect(step // rounds)
        parts = [{name: value.chunk(rounds)[part] for name, value in batch.items()} for batch in self._collected]
        if part == rounds - 1:
            self._collected = []
        return parts

    def _collect(self, step: int) -> list[Batch]:
        """All micro-batches of this rank's batch number `step`."""
        batches = []
        for micro in range(self.spec.accumulate):
            batch = self.source.train.batch(
                self.key.fold("data"),
                step,
                self.spec.batch,
                micro,
                self.spec.accumulate,
                self.mesh.rank,
                self.mesh.ranks,
            )
            batch = self.objective.prepare(self._move(batch), self._key("prepare", step, micro))
            batches.append(self._with_model(batch, self._key("collect", step, micro)))
        return self.objective.agree(batches, self.mesh.sum)

    @torch.no_grad()
    def _with_model(self, batch: Batch, key: Key) -> Batch:
        """The batch with what the objective collects from the model."""
        if type(self.objective).collect is Objective.collect:
            return batch
        self._mode(training=False)
        with autocast(self.device, self.spec):
            batch = self.objective.collect(self.model, batch, key)
        self._mode(training=True)
        return batch

    def _check_rounds(self) -> None:
        rounds = self.objective.rounds
        if self.spec.batch % rounds:
            raise TorchstoneError(f"trainer.batch: {self.spec.batch} does not divide into {rounds} rounds of objective")
        if self.mesh.ranks > 1:
            raise TorchstoneError(
                f"parallel.data: is {self.mesh.ranks}, and rows for {rounds} rounds are kept on one rank only"
            )

    def _key(self, purpose: str, step: int, micro: int) -> Key:
        # k micro-batches on one rank and one on each of k ranks draw alike
        return self.key.fold(purpose, step, micro * self.mesh.ranks + self.mesh.rank)

    def _move(self, batch: Batch) -> Batch:
        return (
            batch
            if self.device.type == "cpu"
            else {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        )

    def gradients(self, batches: list[Batch], step: int) -> dict[str, float]:
        """Add the gradient of one step's loss to the parameters and give the loss and its terms.

        Raises:
            TorchstoneError: a term is not finite; names the step, the batch and the first such tensor.
        """
        counts = self._counts(batches)
        totals: dict[str, torch.Tensor] = {}
        metrics: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for micro, batch in enumerate(batches):
            key = self._key("dropout", step, micro)
            # modules that are not ours draw from torch's own generator: keyed too, so that resuming repeats it
            torch.manual_seed(key.fold("torch").value & (2**63 - 1))
            with autocast(self.device, self.spec):
                result = self.objective(self._carrying(self.carries, micro, batch), batch, key)
                loss = torch.zeros((), device=self.device)
                for name, term in result.terms.items():
                    share = term.weight * term.total / counts[term.over]
                    totals[name] = totals.get(name, 0) + share.detach()
                    loss = loss + share
            loss.backward()
            for name, (total, count) in result.metrics.items():
                old = metrics.get(name, (0, 0))
                metrics[name] = (old[0] + total.detach(), old[1] + count)
        # what a module has frozen since has no gradient on any rank, and its optimiser state must not move it
        self.mesh.sum_gradients(p.value for p in self.named if p.value.requires_grad)
        values = self.mesh.sum(torch.stack([total.to(self._wide) for total in totals.values()]))
        row = dict(zip(totals, values.tolist(), strict=True))
        row["loss"] = sum(row.values()) if len(row) > 1 or "loss" not in row else row["loss"]
        for name, (total, count) in metrics.items():
            total, count = total.to(self.device, self._wide), count.to(self.device, self._wide)
            sums = total.flatten(), count.flatten().expand(total.numel())
            both = self.mesh.sum(torch.stack(sums))
            if ":" in name:
                self._sums[name] = both[0]
                continue
            mean = both[0] / both[1].clamp(min=1)
            row[name] = mean.item() if mean.numel() == 1 else mean.tolist()
        if not math.isfinite(row["loss"]):
            self._explain(batches, step, f"loss {row['loss']}")
        return row

    def _carrying(self, carries: dict[int, Carry], micro: int, batch: Batch) -> Any:
        """The model, with what it carries for the rows of this batch, of which some begin anew."""
        if "begins" not in batch:
            return self.model
        begins_B = batch["begins"].cpu()
        if micro not in carries or bool(begins_B.all()):  # another number of rows begins anew
            carry = carry_of(self.model, len(begins_B))
            if carry is None:
                return self.model
            carries[micro] = carry
        carries[micro].forget(begins_B.nonzero()[:, 0].tolist())
        return Carrying(self.model, carries[micro])

    def _counts(self, batches: list[Batch]) -> dict[str, torch.Tensor]:
        each = [self.objective.counts(batch) for batch in batches]
        names = list(each[0])
        # a count may be a number of the host's
        wide = [[counts[name].to(self.device, self._wide) for counts in each] for name in names]
        local = torch.stack([torch.stack(counts).sum() for counts in wide])
        return dict(zip(names, self.mesh.sum(local).clamp(min=1), strict=True))

    def train_step(self) -> dict[str, Any]:
        """One step; a row of metrics."""
        if self.gate is not None and self.step == 0:
            self.gate.begin(self)
        self._mode(training=True)
        self._forget_gradients()
        factor = self.schedule.factor(self.step, self.spec.steps)
        set_factor(self.optim, factor)
        for module in self._before:
            module.before_step(self.step)
        self.objective.before_step(self.model, self.step)
        batches = self.micro_batches(self.step)
        row: dict[str, Any] = self.gradients(batches, self.step)
        parameters = [p.value for p in self.named]
        norm = self._norm()
        row["grad_norm"] = norm.item()
        if not math.isfinite(row["grad_norm"]):
            self._explain(batches, self.step, f"gradient norm {row['grad_norm']}")
        if self.spec.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.spec.clip, norm)
        if self.gate is not None:
            self.gate.before(self.step)
        with autocast(self.device, self.spec):  # Muon's products are matrix work like the model's
            self.optim.step()
        if self.shares is not None:
            self.shares.spread()
        if self.gate is not None:
            self.gate.after(self.step)
        for carry in self.carries.values():
            carry.commit()
        self._after_step()
        if self.ema is not None and self.spec.ema is not None:
            with torch.no_grad():
                for p in self.named:
                    self.ema[p.name].lerp_(p.value, 1 - self.spec.ema)
        self.step += 1
        return {"step": self.step, **row, "lr": factor * self.optimizer.lr}

    def pass_gradients(self, size: int, limit: int | None = None) -> Iterator[None]:
        """Goes once over the training split in order: after each turn the parameters hold the gradient of the loss of
        `size` examples alone, the same on all ranks.

        Args:
            size: examples a batch.
            limit: examples in all, at most.
        """
        self._mode(training=True)
        for number, batch in enumerate(self.source.train.evaluation(size, limit)):
            self._forget_gradients()
            batch = self.objective.prepare(self._move(batch), self.key.fold("pass", number))
            batch = self._with_model(batch, self.key.fold("pass collect", number))
            self.gradients(self.objective.agree([batch], self.mesh.sum), number)
            yield
        self._forget_gradients()
        self._sums, self.carries = {}, {}

    def _forget_gradients(self) -> None:
        for p in self.named:
            p.value.grad = None

    def _norm(self) -> torch.Tensor:
        """The norm of the gradient that is clipped."""
        grads = [(p.value.grad, p.experts) for p in self.named if p.value.grad is not None]
        if self.spec.clip_norm == "total":
            return torch.nn.utils.get_total_norm([grad for grad, _ in grads])
        norms = [torch.linalg.vector_norm(grad) / experts**0.5 for grad, experts in grads]
        return torch.linalg.vector_norm(torch.stack(norms))

    def _after_step(self) -> None:
        """Hand to each module that waits for it what its layer summed over the micro-batches and ranks of this step."""
        for path, module in self._after:
            pairs = ((name.partition(":"), value) for name, value in self._sums.items())
            if own := {name: value for (layer, _, name), value in pairs if path.startswith(f"{layer}.")}:
                module.after_step(self.step, own)
        self._sums = {}

    def _explain(self, batches: list[Batch], step: int, what: str) -> None:
        """Find the first tensor that is not finite and say so.

        Raises:
            TorchstoneError: always.
        """
        name = self._first_bad(batches, step)
        examples = [batch["example"].tolist() for batch in batches if "example" in batch]
        rows = f", examples {examples[0][:8]}" if examples else ""
        raise TorchstoneError(
            f"step {step + 1}: {what} is not finite; batch {step}{rows}; first in {name}; "
            "the weights are those of the step before, the last checkpoint is good"
        )

    def _first_bad(self, batches: list[Batch], step: int) -> str:
        if bad := self._bad_weight():
            return bad
        seen: list[str] = []
        hooks = []

        def watch(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                tensors = (
                    [output]
                    if isinstance(output, torch.Tensor)
                    else [
                        t
                        for t in (
                            output
                            if isinstance(output, tuple | list)
                            else vars(output).values()
                            if hasattr(output, "__dict__")
                            else ()
                        )
                        if isinstance(t, torch.Tensor)
                    ]
                )
                if not seen and any(t.is_floating_point() and not torch.isfinite(t).all() for t in tensors):
                    seen.append(f"the output of {path}")

            return hook

        for path, module in self.model.named_modules():
            hooks.append(module.register_forward_hook(watch(parameter_name(path) or "the model")))
        try:
            with torch.no_grad(), autocast(self.device, self.spec), suppress(Exception):
                for micro, batch in enumerate(batches):
                    self.objective(self._carrying(self.carries, micro, batch), batch, self._key("dropout", step, micro))
                    if seen:
                        return seen[0]
        finally:
            for hook in hooks:
                hook.remove()
        for p in self.named:
            if p.value.grad is not None and not torch.isfinite(p.value.grad).all():
                return f"the gradient of {p.name}"
        return "the loss itself"

    def _bad_weight(self) -> str:
        """Names the first parameter that is not finite; empty if all are."""
        return next((f"the parameter {p.name}" for p in self.named if not torch.isfinite(p.value).all()), "")

    # -- validation

    def measure_split(self, split: Split, prefix: str, limit: int | None = None) -> dict[str, Any]:
        """Loss (and bits per byte, where the objective codes text; and the split's own metrics) over a split, with the
        averaged weights if kept."""
        return self._measure(split, prefix, limit)[0]

    @torch.no_grad()
    def _measure(self, split: Split, prefix: str, limit: int | None) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The row of `measure_split`, and where documents can be told apart ``bits`` and ``bytes`` of each."""
        self._mode(training=False)
        sums: dict[str, torch.Tensor] = {}
        weights: dict[str, tuple[str, float]] = {}
        carries: dict[int, Carry] = {}

        def add(name: str, value: torch.Tensor) -> None:
            sums[name] = sums.get(name, 0) + share * value.to(self.device, self._wide)

        with self._averaged():
            for number, batch in enumerate(split.evaluation(self.spec.batch, limit)):
                # every rank looks at the first batch, so that all know the terms, and the first rank counts it
                if number and number % self.mesh.ranks != self.mesh.rank:
                    continue
                share = float(number % self.mesh.ranks == self.mesh.rank)
                batch = self.objective.prepare(self._move(batch), self.key.fold("evaluate", prefix, number))
                with autocast(self.device, self.spec):
                    model = self._carrying(carries, 0, batch)
                    result = self.objective.evaluate(model, batch, isinstance(split, ScoredSplit))
                for carry in carries.values():
                    carry.commit()
                for name, term in result.terms.items():
                    add(f"term {name}", term.total)
                    weights[name] = term.over, term.weight
                for name, count in self.objective.counts(batch).items():
                    add(f"count {name}", count)
                if isinstance(split, ScoredSplit) and result.predicted_BT is not None:
                    for name, pair in split.score(result.predicted_BT, batch).items():
                        add(f"score {name}", torch.stack(pair))
                for name, (total, count) in result.scores.items():
                    add(f"score {name}", torch.stack([total.to(self._wide), count.to(self._wide)]))
                if isinstance(split, DocumentedSplit) and result.nll_BT is not None:
                    add("documents", _by_document(split, result.nll_BT, batch))
        self._mode(training=True)
        if not weights:
            return {}, None
        sums = {name: self.mesh.sum(value).cpu() for name, value in sums.items()}
        each = {
            name: sums[f"term {name}"].item() / max(1.0, sums[f"count {over}"].item())
            for name, (over, _) in weights.items()
        }
        row = {f"{prefix}_loss": sum(weights[name][1] * value for name, value in each.items())}
        if self.objective.codes and split.bytes:
            # every token but the first is a target
            row[f"{prefix}_bits_per_byte"] = each["loss"] / math.log(2) * (split.tokens - 1) / split.bytes
        for name, both in sums.items():
            kind, _, score = name.partition(" ")
            if kind == "score":
                row[f"{prefix}_{score}"] = (both[0] / both[1].clamp(min=1)).item()
        if "documents" not in sums:
            return row, None
        nats, targets = sums["documents"]
        # a document counts its share of the split's bytes by its tokens
        size = targets * split.bytes / (split.tokens - 1)
        return row, {"bits": (nats / math.log(2)).tolist(), "bytes": size.tolist()}

    def _mode(self, training: bool) -> None:
        self.model.train(training)
        self.objective.train(training)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The moving average in the place of the weights, if there is one."""
        if self.ema is None:
            yield
            return
        kept = {p.name: p.value.detach().clone() for p in self.named}
        try:
            for p in self.named:
                p.value.copy_(self.ema[p.name])
            yield
        finally:
            for p in self.named:
                p.value.copy_(kept[p.name])

    # -- state

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Everything that resuming needs, by file and name, on the first rank; all ranks have to ask at once."""
        out = {
            "model": {parameter_name(name): value for name, value in self.model.state_dict().items()},
            "optimizer": self._optimizer_tensors(),
        }
        objective = {name: value for name, value in self.objective.state_dict().items()}
        if objective:
            out["objective"] = objective
        if self.gate is not None and (kept := self.gate.tensors()):
            out["gate"] = kept
        if self.carries:
            out["carry"] = {
                f"{micro}.{name}": value
                for micro, carry in self.carries.items()
                for name, value in carry.tensors().items()
            }
        if self._collected:
            out["collected"] = {
                f"{micro}.{name}": value for micro, batch in enumerate(self._collected) for name, value in batch.items()
            }
        if self.ema is not None:
            own = {name: value for name, value in self.ema.items() if name.startswith("objective.")}
            out["ema"] = {**out["model"], **{name: value for name, value in self.ema.items() if name not in own}}
            if own:
                out["ema_objective"] = own
        return out

    def _optimizer_tensors(self) -> dict[str, torch.Tensor]:
        state = {p.name: self.optim.state.get(p.value, {}) for p in self.named}
        if self.shares is not None:
            state |= self.shares.gathered(self.optim.state)
        return {
            f"optimizer.{key}.{name}": torch.as_tensor(value)
            for name, values in state.items()
            for key, value in values.items()
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            TorchstoneError: it is of another model or optimiser.
        """
        load_weights(self.model, checkpoint.tensors["model"], "the checkpoint's model")
        if self.objective.state_dict():
            load_weights(self.objective, checkpoint.tensors.get("objective", {}), "the checkpoint's objective")
        self.objective.check(self.model)
        saved = checkpoint.tensors.get("optimizer", {})
        state: dict[str, dict[str, torch.Tensor]] = {}
        names = {p.name: p for p in self.named}
        for full, value in saved.items():
            key, _, name = full.removeprefix("optimizer.").partition(".")
            if name not in names:
                raise TorchstoneError(f"the checkpoint's optimizer holds {name}, which is no parameter here")
            state.setdefault(name, {})[key] = value
        # numbers, as of steps, are the host's, but for kernels that move all parameters of a device at once
        there = {id(p) for group in self.optim.param_groups if group.get("fused") for p in group["params"]}
        own = {p.name for p in (self.named if self.shares is None else self.shares.own)}
        for name, values in state.items():
            if name not in own:
                continue
            parameter = names[name].value
            self.optim.state[parameter] = {
                key: value.to(parameter.device if value.dim() or id(parameter) in there else "cpu", copy=True)
                for key, value in values.items()
            }
        if self.ema is not None:
            averages = {**checkpoint.tensors.get("ema", {}), **checkpoint.tensors.get("ema_objective", {})}
            for name, value in self.ema.items():
                if name not in averages or averages[name].shape != value.shape:
                    raise TorchstoneError(f"the checkpoint has no moving average of {name}")
                value.copy_(averages[name])
        if self.gate is not None:
            self.gate.restore(checkpoint.tensors.get("gate", {}))
        self._restore_carries(checkpoint.tensors.get("carry", {}))
        self._collected = []
        for full, value in sorted(checkpoint.tensors.get("collected", {}).items(), key=lambda pair: _order(pair[0])):
            micro, _, name = full.partition(".")
            if int(micro) == len(self._collected):
                self._collected.append({})
            self._collected[-1][name] = value.to(self.device)
        self.step = self._saved = checkpoint.step
        self.best = checkpoint.facts.get("best") if checkpoint.facts.get("best") is not None else math.inf  # type: ignore[assignment]

    def _restore_carries(self, saved: Mapping[str, torch.Tensor]) -> None:
        self.carries = {}
        for micro in sorted({int(name.partition(".")[0]) for name in saved}):
            carry = carry_of(self.model, self.spec.batch)
            if carry is None:
                raise TorchstoneError("the checkpoint holds what a model carried from step to step; this one does not")
            lead = f"{micro}."
            carry.restore({name[len(lead) :]: value for name, value in saved.items() if name.startswith(lead)})
            self.carries[micro] = carry

    def save(self, best: bool = False) -> None:
        """Write a checkpoint and make its weights the run's.

        Raises:
            TorchstoneError: a weight is not finite, or the disk is full; the last checkpoint stays.
        """
        if bad := self._bad_weight():
            raise TorchstoneError(
                f"step {self.step}: {bad} is not finite after the optimiser's move; "
                "nothing is written, the last checkpoint is good"
            )
        self._saved = self.step
        tensors = {} if self.folder is None else self.tensors()
        if self.folder is None or not self.mesh.first:
            self.mesh.barrier()
            return
        keep = self.folder.checkpoints(self.spec.keep_last)
        best_value = self.best if math.isfinite(self.best) else None
        path = keep.save(self.step, tensors, {**self.facts, "best": best_value}, best)
        self.folder.publish(path)
        self.mesh.barrier()

    # -- the loop

    def fit(self) -> list[dict[str, Any]]:
        """Train to the last step, validating, saving and logging on the way.

        Raises:
            TorchstoneError: something is not finite, or the disk is full.
            Stopped: SIGINT or SIGTERM came; a checkpoint was written.
        """
        with self._signals(), Progress(self.spec.steps, self.step, self.quiet or not self.mesh.first) as progress:
            began, counted = time.perf_counter(), self.step
            if self.step == 0:
                self._validate(progress)
            while self.step < self.spec.steps:
                row = self.train_step()
                last = self.step == self.spec.steps
                if self.step % self.spec.log_every == 0 or last or self.step == 1:
                    now = time.perf_counter()
                    row |= self._speed(now - began, self.step - counted)
                    began, counted = now, self.step
                    self._log(row, progress)
                paused = time.perf_counter()
                best = False
                if self.step % self.evaluate.every == 0 or last:
                    best = self._validate(progress)
                if self.step % self.spec.save_every == 0 or last or (best and self.spec.keep_best):
                    self.save(best and self.spec.keep_best)
                if self._stop_asked():
                    if self._saved != self.step:
                        self.save()
                    raise Stopped(self.step, self._signal or signal.SIGTERM)
                began += time.perf_counter() - paused
            tested = any("test_loss" in row and row["step"] == self.step for row in self.rows)
            if self.evaluate.test and self.source.test is not None and not tested:
                row, documents = self._measure(self.source.test, "test", self.evaluate.test_blocks)
                if documents is not None and self.folder is not None and self.mesh.first:
                    self.folder.write_documents(documents)
                self._log({"step": self.step, **row}, progress)
        return self.rows

    def _stop_asked(self) -> bool:
        if self.mesh.group is None:
            return self._signal is not None
        return bool(self.mesh.sum(torch.tensor(float(self._signal is not None), device=self.device)) > 0)

    def _speed(self, seconds: float, steps: int) -> dict[str, float]:
        block = getattr(self.source.train, "block", None)
        rows = steps * self.spec.batch * self.spec.accumulate * self.mesh.ranks
        speed = {"seconds_per_step": seconds / max(1, steps)}
        if block is not None:
            speed["tokens_per_second"] = rows * block / max(seconds, 1e-9)
            peak = _peak(self.device)
            if peak and self.flops_per_token:
                speed["mfu"] = speed["tokens_per_second"] * self.flops_per_token / (peak * self.mesh.ranks)
        return speed

    def _validate(self, progress: Progress) -> bool:
        """Measure and log the validation split; whether it is the best so far."""
        if self.source.valid is None:
            return False
        row = self.measure_split(self.source.valid, "valid", self.evaluate.blocks)
        if not row:
            return False
        if not math.isfinite(row["valid_loss"]):
            first = self._bad_weight() or "an activation"
            raise TorchstoneError(
                f"step {self.step}: the validation loss {row['valid_loss']} is not finite; first in "
                f"{first}; the last checkpoint is good"
            )
        self._log({"step": self.step, **row}, progress)
        better = row["valid_loss"] < self.best
        self.best = min(self.best, row["valid_loss"])
        return better and self.step > 0

    def _log(self, row: dict[str, Any], progress: Progress) -> None:
        self.rows.append(row)
        if not self.mesh.first:
            return
        progress.row(row)
        if self.folder is not None:
            with full_disk(self.folder.path), open(self.folder.path / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if self.tensorboard is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    self.tensorboard.add_scalar(name, value, row["step"])

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask to stop after the step; a second SIGINT stops at once."""
        if threading.current_thread() is not threading.main_thread() or self.folder is None:
            yield
            return

        def ask(number: int, frame: Any) -> None:
            if self._signal is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._signal = number

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


_PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12, "3090": 71e12}
"""Dense bf16 FLOP/s of devices, from their data sheets."""


def _peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)

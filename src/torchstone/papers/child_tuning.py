"""Raise a Child in Large Language Model: Child-Tuning (Xu et al. 2021, arXiv 2109.05687)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from torchstone.adapt.child_tuning import ChildTuningSpec, TaskDriven, TaskFree, children
from torchstone.data.corpora.stdlib import StdlibSpec
from torchstone.data.images import Images, ImagesDataSpec
from torchstone.data.labelled import Labelled, LabelledTexts
from torchstone.keys import Key
from torchstone.model.site import initialise
from torchstone.model.transformer import TransformerSpec
from torchstone.objectives import Facts, tokens_of
from torchstone.objectives.classification import ClassificationObjectiveSpec
from torchstone.papers._claim import Claim, Effect, Measured, Number, Paper, Scale, one_thread
from torchstone.papers._teachers import teacher
from torchstone.recipe import AdaptSpec, load_recipe
from torchstone.spec import validate
from torchstone.train import RunFolder
from torchstone.train.engine import Source, Trainer
from torchstone.train.optimizers import NamedParameter
from torchstone.train.optimizers.adamw import AdamWSpec
from torchstone.train.run import load_weights
from torchstone.trust.model.mlp import MLPSpec

__all__ = ["PAPER"]

# ------------------------------------------------------------------------------------------------------------- exactly


def _moments(scale: Scale, first: int) -> Measured:
    """Largest relative errors over shares, and what must not move."""
    draws = 20_000 if scale == "quick" else 100_000
    numbers: dict[str, float] = {"mean of an update, relative error": 0.0, "variance of an update, relative error": 0.0}
    gradient = torch.linspace(0.2, 2.0, 64)
    for share in (0.2, 0.3, 0.4):
        value = nn.Parameter(torch.zeros(64))
        gate = TaskFree(ChildTuningSpec(share=share), [NamedParameter("w", value, (64,), False)], Key(first))
        total, squares = torch.zeros(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)
        for step in range(draws):
            value.grad = gradient.clone()
            gate.before(step)
            total += value.grad
            squares += value.grad.double().square()
        mean, wanted = total / draws, gradient.double()
        variance = (squares / draws - mean.square()).mean()
        off = {
            "mean of an update, relative error": float(((mean - wanted) / wanted).mean().abs()),
            "variance of an update, relative error": float(
                (variance / ((1 - share) / share * wanted.square().mean()) - 1).abs()
            ),
        }
        numbers |= {name: max(numbers[name], error) for name, error in off.items()}
    fisher = {"a": torch.rand(40, 30, generator=Key(first).generator()), "b": torch.zeros(100)}
    masks = {share: children(fisher, share) for share in (0.1, 0.2, 0.3)}
    wanted_counts = {0.1: 130, 0.2: 260, 0.3: 390}
    numbers["children more or fewer than the share of all elements"] = max(
        abs(sum(int(mask.sum()) for mask in masks[share].values()) - count) for share, count in wanted_counts.items()
    )
    numbers["children of a smaller share that a larger one lacks"] = float(
        sum(int((masks[0.1][name] & ~masks[0.2][name]).sum()) for name in fisher)
    )
    numbers["children without information"] = float(sum(int(masks[share]["b"].sum()) for share in masks))
    return Measured(numbers)


_moments.builds = ("torchstone.adapt.child_tuning",)  # type: ignore[attr-defined]

MOMENTS = Claim(
    id="moments",
    kind="identity",
    text="A task-free update has the gradient for its mean and (1 - p) / p of its square for its variance. Task-driven "
    "children are the share of all elements together, nested in the share, and none has no Fisher information.",
    figure="section 2.3: E[dw] = -eta g, Var[dw] = eta^2 sigma^2 / (p |B|) + (1 - p) eta^2 g^2 / p",
    gates=(
        Number("mean of an update, relative error", high=0.02),
        Number("variance of an update, relative error", high=0.02),
        Number("children more or fewer than the share of all elements", low=0, high=0),
        Number("children of a smaller share that a larger one lacks", low=0, high=0),
        Number("children without information", low=0, high=0),
    ),
    run=_moments,
)

# ------------------------------------------------------------------------------------------- few examples, other target


class _FixedChildren(TaskDriven):
    """Children by something else than Fisher information: chance, or the least of it."""

    def __init__(self, spec: ChildTuningSpec, masked: list[NamedParameter], how: str, key: Key) -> None:
        super().__init__(spec, masked)
        self.how, self.key = how, key

    def begin(self, trainer: Trainer) -> None:
        if self.how == "chance":
            scores = {
                p.name: torch.rand(p.value.shape, generator=self.key.fold(p.name).generator()) for p in self.masked
            }
            self.children = children(scores, self.spec.share)
            return
        every = ChildTuningSpec(share=1 - self.spec.share)
        most = TaskDriven(every, self.masked)
        most.begin(trainer)
        self.children = {name: ~mask for name, mask in most.children.items()}


class _OtherChildren(ChildTuningSpec):
    """A defect: children that are not the task's."""

    kind = "child_tuning_defect"
    offered = False

    how: str = "chance"
    """chance or least."""

    def gate(self, named: Any, key: Key) -> Any:
        task_driven: Any = super().gate(named, key)
        return _FixedChildren(self, task_driven.masked, self.how, key)


_ARMS: dict[str, AdaptSpec | None] = {
    "plain": None,
    "plain again": None,
    "task-free 0.3": ChildTuningSpec(form="task_free", share=0.3),
    "task-driven 0.1": ChildTuningSpec(share=0.1),
    "task-driven 0.3": ChildTuningSpec(share=0.3),
    "chance 0.1": _OtherChildren(share=0.1),
    "chance 0.1 again": _OtherChildren(share=0.1),
    "least information 0.1": _OtherChildren(share=0.1, how="least"),
}
_RIGHT_MORE_OFTEN = (
    Effect(
        "better than plain tuning",
        "task-driven 0.1",
        "plain",
        margin=0.005,
        null="plain again",
        sabotage="least information 0.1",
        lower_is_better=False,
    ),
    Effect(
        "better than a mask by chance",
        "task-driven 0.1",
        "chance 0.1",
        margin=0.01,
        null="chance 0.1 again",
        sabotage="least information 0.1",
        lower_is_better=False,
    ),
)
"""Gates of both claims below."""
_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
_AGAIN, _TUNING = 100_000, 500_000


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 1, 8, 8) in [0, 1] and labels of scikit-learn's digits, in one order for all seeds."""
    prepared = ImagesDataSpec(source="digits", valid=0.0, test=0.0).prepare()
    (batch,) = prepared.train.evaluation(len(prepared.train))
    return batch["pixels"].numpy(), batch["label"].numpy()


def _shifted(x_N1II: np.ndarray) -> np.ndarray:
    """One pixel to the right, and less contrast."""
    moved = np.zeros_like(x_N1II)
    moved[..., 1:] = x_N1II[..., :-1]
    return (0.25 + 0.5 * moved).astype(np.float32)


def _tune(
    model: Any,
    examples: Images | LabelledTexts,
    adapt: AdaptSpec | None,
    seed: int,
    steps: int,
    batch: int,
    lr: float,
    classes: int = 10,
    schedule: Mapping[str, Any] | None = None,
) -> None:
    """Train a model in place; at a constant learning rate where no schedule is given."""
    settings = {"steps": steps, "batch": batch, "threads": 1, "seed": seed, "save_every": steps, "compile": "off"}
    recipe = load_recipe({"schedule": schedule or {"kind": "constant"}, "trainer": settings})
    trainer = Trainer(
        model,
        ClassificationObjectiveSpec().build(Facts(classes=classes)),
        Source(examples),
        AdamWSpec(lr=lr, weight_decay=0.0),
        recipe.schedule,
        recipe.trainer,
        quiet=True,
        adapt=adapt,
    )
    for _ in range(steps):
        trainer.train_step()


def _accuracy(model: nn.Module, examples: Images | LabelledTexts) -> float:
    model.eval()
    right = 0
    with torch.no_grad():
        for batch in examples.evaluation(2000):
            logits = model(batch["pixels"] if "pixels" in batch else tokens_of(batch)).logits
            right += int((logits.argmax(-1) == batch["label"]).sum())
    return right / len(examples)


class _Task:
    """A network that learned half of the digits, and 60 examples of the others, moved and dimmed, 20 % mislabelled."""

    def __init__(self, digits: tuple[np.ndarray, np.ndarray], seed: int, steps: int) -> None:
        pixels, label = digits
        rng = Key(seed).fold("digits").numpy()
        order = rng.permutation(len(label))
        source, rest = order[:900], order[900:]
        self.source = Images(pixels, label, source)
        moved, noisy = _shifted(pixels), label.copy()
        tuned, valid, test = rest[:60], rest[60:120], rest[120:]
        wrong = tuned[rng.permutation(60)[:12]]
        noisy[wrong] = rng.integers(0, 10, 12)
        self.tune, self.valid, self.test = (
            Images(moved, noisy, tuned),
            Images(moved, label, valid),
            Images(moved, label, test),
        )
        torch.set_num_threads(1)
        self.base = self._network(seed)
        _tune(self.base, self.source, None, seed, steps, 32, 1e-3)

    def _network(self, seed: int) -> Any:
        return initialise(MLPSpec(hidden=(128, 128, 128), classes=10, channels=1, image=8).build(), seed)

    def tuned(self, adapt: AdaptSpec | None, seed: int, lr: float, steps: int) -> nn.Module:
        model = self._network(seed)
        model.load_state_dict(self.base.state_dict())
        _tune(model, self.tune, adapt, seed, steps, 16, lr)
        return model


def _at_its_best(
    arms: Sequence[str],
    tasks: Mapping[int, Any],
    judged: Sequence[Any],
    rates: Sequence[float],
    tuned: Callable[[Any, str, int, float], nn.Module],
    numbers: dict[str, float],
) -> Iterator[tuple[str, int, Any, nn.Module]]:
    """Arm, seed, task and tuned model, by arm. A learning rate is the one that is right most often on what the judged
    tasks keep for validation; `numbers` gets it."""
    for arm in arms:
        like = arm.removesuffix(" again")
        if arm == like:
            found = {
                lr: np.mean([_accuracy(tuned(task, arm, n, lr), task.valid) for n, task in enumerate(judged)])
                for lr in rates
            }
            numbers[f"{arm}: learning rate"] = max(rates, key=found.__getitem__)
        lr = numbers[f"{like}: learning rate"]
        for seed, task in tasks.items():
            yield arm, seed, task, tuned(task, arm, seed + (_AGAIN if arm != like else 0), lr)


def _few(scale: Scale, first: int) -> Measured:
    digits = _digits()
    seeds, before, steps = (2, 100, 50) if scale == "quick" else (10, 600, 150)
    tasks = {seed: _Task(digits, seed, before) for seed in range(first, first + seeds)}
    judged = [_Task(digits, _TUNING + seed, before) for seed in range(first, first + max(2, seeds // 2))]
    values: dict[str, dict[int, float]] = defaultdict(dict)
    numbers: dict[str, float] = {}

    def tuned(task: _Task, arm: str, seed: int, lr: float) -> nn.Module:
        return task.tuned(_ARMS[arm], seed, lr, steps)

    for arm, seed, task, model in _at_its_best(tuple(_ARMS), tasks, judged, _RATES, tuned, numbers):
        values[arm][seed] = _accuracy(model, task.test)
        values[f"{arm}: source"][seed] = _accuracy(model, task.source)
    return Measured(numbers, values)


_few.builds = (  # type: ignore[attr-defined]
    "torchstone.adapt.child_tuning",
    "torchstone.objectives.classification",
    "torchstone.trust.model.mlp",
)


def _keeps_more(sabotage: str) -> Effect:
    return Effect(
        "keeps more of what it knew",
        "task-driven 0.1: source",
        "plain: source",
        margin=0.02,
        null="plain again: source",
        sabotage=sabotage,
        lower_is_better=False,
    )


FEW = Claim(
    id="few-noisy-examples",
    kind="behaviour",
    text="Tuned on 60 digits, moved, dimmed and a fifth of them mislabelled, a network whose gradient is masked by "
    "Fisher information (a tenth of it) is right on the target at least 0.5 points more often than in plain tuning and "
    "at least one point more often than with a mask by chance, and keeps at least two points more of what it knew. "
    "Every arm at its own best learning rate.",
    figure="GLUE, small tasks: 1.5 to 8.6 points on average",
    gates=(
        *_RIGHT_MORE_OFTEN,
        _keeps_more("plain again: source"),
    ),
    run=_few,
    scales=("quick", "evidence"),
    withdrawn="its last gate had the null arm for its sabotage; see few-noisy-examples-and-another-mask",
)

FEW_AND_ANOTHER_MASK = replace(
    FEW,
    id="few-noisy-examples-and-another-mask",
    gates=(*_RIGHT_MORE_OFTEN, _keeps_more("chance 0.1: source")),
    withdrawn=None,
)

# ----------------------------------------------------------------------------------------- an encoder, few snippets


@dataclass(frozen=True)
class _Size:
    """What a scale spends: steps of the encoder and of a tuning, tasks, tasks that judge learning rates, the rates, and
    snippets of a class on each side."""

    before: int
    steps: int
    seeds: int
    judged: int
    rates: tuple[float, ...]
    train: int
    valid: int
    test: int


_SIZES = {
    "quick": _Size(20, 4, 2, 1, (3e-3,), 4, 2, 4),
    "evidence": _Size(1500, 40, 7, 2, (1e-3, 3e-3, 1e-2), 20, 50, 50),
}
_SCRATCH = "from scratch"
_CHARACTERS = 96


def _encoder_recipe(steps: int) -> dict[str, Any]:
    settings = one_thread(steps, 16, blocks=64, test_blocks=64)
    settings["trainer"] |= {"seed": 0, "device": "cpu"}
    return {
        "model": {
            "width": 64,
            "depth": 3,
            "causal": False,
            "attention": {"heads": 4, "bias": "all"},
            "ffn": {"kind": "mlp", "bias": True},
            "norm": "layernorm",
            "head": "mlm",
        },
        "data": {"corpus": "stdlib", "tokenizer": "bytes", "block": 128},
        "objective": {"kind": "masked_lm", "rate": 0.3},
        "optimizer": {"kind": "muon", "lr": 1e-2},
        "schedule": {"kind": "linear", "warmup": min(20, steps // 2)},
        **settings,
    }


@cache
def _packages() -> dict[str, list[str]]:
    """Files of the eight packages of the library that have most of them, those too short for snippets left out. White
    space, much of what snippets would be, is one space."""
    files = defaultdict(list)
    for document in StdlibSpec().documents():
        package, _, rest = document.name.partition("/")
        text = " ".join(document.text.split())
        if rest and package != "encodings" and len(text) > 5 * _CHARACTERS:
            files[package].append(text)
    return {name: files[name] for name in sorted(sorted(files, key=lambda name: -len(files[name]))[:8])}


class _Snippets:
    """Which package a snippet is from: half of each package's files to tune on, a fifth for validation, the rest to
    test; a snippet is any part of any file."""

    def __init__(self, taught: RunFolder, size: _Size, seed: int) -> None:
        self.taught, self.steps = taught, size.steps
        found: dict[str, list[Labelled]] = {"train": [], "valid": [], "test": []}
        counts = {"train": size.train, "valid": size.valid, "test": size.test}
        packages = _packages()
        for package, files in packages.items():
            rng = Key(seed).fold("snippets", package).numpy()
            order = rng.permutation(len(files))
            half, seventy = len(files) // 2, len(files) // 2 + -(-len(files) // 5)
            parts = {"train": order[:half], "valid": order[half:seventy], "test": order[seventy:]}
            for side, count in counts.items():
                for _ in range(count):
                    text = files[rng.choice(parts[side])]
                    at = int(rng.integers(len(text) - _CHARACTERS))
                    found[side].append(Labelled((text[at : at + _CHARACTERS],), package))
        number: dict[str | int, int] = {name: n for n, name in enumerate(packages)}
        self.train, self.valid, self.test = (
            LabelledTexts(found[side], number, _CHARACTERS + 2, taught.tokenizer()) for side in found
        )

    def tuned(self, adapt: AdaptSpec | None, seed: int, lr: float, scratch: bool = False) -> nn.Module:
        torch.set_num_threads(1)
        head = {"kind": "classification", "classes": len(_packages()), "pool": "mean"}
        spec = {**self.taught.model_spec.dump(), "head": head}
        model: Any = initialise(validate(TransformerSpec, spec).build(), seed)
        if not scratch:
            encoder = {n: value for n, value in self.taught.model().state_dict().items() if not n.startswith("head.")}
            load_weights(model, encoder, self.taught.path, new=lambda name: name.startswith("head."))
        warm = {"kind": "linear", "warmup": self.steps // 10}
        _tune(model, self.train, adapt, seed, self.steps, 16, lr, len(_packages()), warm)
        return model


def _encoder(scale: Scale, first: int) -> Measured:
    size = _SIZES[scale]
    taught = teacher(_encoder_recipe(size.before))
    tasks = {seed: _Snippets(taught, size, seed) for seed in range(first, first + size.seeds)}
    judged = [_Snippets(taught, size, _TUNING + seed) for seed in range(first, first + size.judged)]
    values: dict[str, dict[int, float]] = defaultdict(dict)
    numbers: dict[str, float] = {}

    def tuned(task: _Snippets, arm: str, seed: int, lr: float) -> nn.Module:
        return task.tuned(_ARMS.get(arm), seed, lr, scratch=arm == _SCRATCH)

    for arm, seed, task, model in _at_its_best((*_ARMS, _SCRATCH), tasks, judged, size.rates, tuned, numbers):
        values[arm][seed] = _accuracy(model, task.test)
    return Measured(numbers, values)


_encoder.builds = (  # type: ignore[attr-defined]
    "torchstone.adapt.child_tuning",
    "torchstone.data.labelled",
    "torchstone.model.head.classification",
    "torchstone.objectives.classification",
    "torchstone.objectives.masked_lm",
    "torchstone.train.optimizers.muon",
)

ENCODER = Claim(
    id="encoder",
    kind="behaviour",
    text="An encoder of masked bytes of the standard library, files of its tasks among them, is tuned on 20 snippets "
    "of each of eight packages. With a gradient masked by Fisher information (a tenth of it) it names the package of "
    "snippets of other files right at least 0.5 points more often than in plain tuning and at least one point more "
    "often than with a mask by chance. Every arm at its own best learning rate; an encoder from scratch is reported.",
    figure="GLUE, small tasks: 1.5 to 8.6 points on average",
    gates=_RIGHT_MORE_OFTEN,
    run=_encoder,
    scales=("quick", "evidence"),
)

PAPER = Paper(
    slug="child-tuning",
    title="Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning",
    authors="Runxin Xu, Fuli Luo, Zhiyuan Zhang, Chuanqi Tan, Baobao Chang, Songfang Huang, Fei Huang",
    year=2021,
    link="https://arxiv.org/abs/2109.05687",
    topics=("fine-tuning", "regularisation"),
    parts=("adapt.child_tuning",),
    summary="Tune with all weights forwards and a part of the gradient backwards: drawn anew each step, or where the "
    "task's Fisher information is largest.",
    claims=(MOMENTS, FEW, FEW_AND_ANOTHER_MASK, ENCODER),
)

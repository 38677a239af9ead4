"""Structured Prompting: Scaling In-Context Learning to 1,000 Examples (Hao et al. 2022, arXiv 2212.06713)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchstone.adapt.structured_prompting import StructuredPrompt
from torchstone.data.episodes import EpisodesSpec
from torchstone.generate import Engine
from torchstone.model.site import initialise
from torchstone.model.transformer import TransformerSpec
from torchstone.papers._claim import Claim, Effect, Measured, Number, Paper, Scale
from torchstone.recipe import load_recipe
from torchstone.spec import validate
from torchstone.train import train

__all__ = ["PAPER"]

_GROUP, _OWN, _VOCABULARY = 24, 6, 50


def _logits(prompt: StructuredPrompt, own: list[int]) -> torch.Tensor:
    """Of tokens after the groups, (T, V)."""
    state = prompt.prefix.fork(torch.zeros(1, dtype=torch.int64))
    state.extend(state.longest + len(own))
    with torch.no_grad():
        logits = prompt.engine.model(torch.tensor([own]), state=state).logits
    assert logits is not None
    return logits[0]


def _identities(scale: Scale, first: int) -> Measured:
    """Largest differences over positions and seeds, and what was read."""
    numbers: dict[str, float] = {}

    def worst(name: str, found: torch.Tensor, wanted: torch.Tensor, choose: Callable[..., float] = max) -> None:
        difference = float((found - wanted).abs().max())
        numbers[name] = choose(numbers.get(name, difference), difference)

    for position in ("rotary", "alibi", "none", "learned"):
        for seed in range(first, first + 3):
            fields = {
                "width": 64,
                "depth": 3,
                "vocabulary": _VOCABULARY,
                "context": 64,
                "attention": {"heads": 4, "kv_heads": 2},
                "position": position,
                "residual": {"kind": "pre", "std": 0.3},
            }
            model = initialise(validate(TransformerSpec, fields).build(), seed)
            drawn = torch.Generator().manual_seed(seed)
            groups = torch.randint(_VOCABULARY, (8, _GROUP), generator=drawn).tolist()
            own = torch.randint(_VOCABULARY, (_OWN,), generator=drawn).tolist()

            def prompt(*some: list[int], model: Any = model, **options: Any) -> StructuredPrompt:
                fields = {"group_length": _GROUP, "bos": None, "batch": 1, **options}
                made = StructuredPrompt(Engine(model, compile="off"), **fields)
                made.add(some)
                return made

            one = _logits(prompt(groups[0]), own)
            with torch.no_grad():
                plain = model(torch.tensor([[*groups[0], *own]]), outputs="all").logits[0, -_OWN:]
            worst("one group, from an ordinary prompt", one, plain)
            worst("eight groups alike, from one", _logits(prompt(*[groups[0]] * 8), own), one)
            worst("the same without the weight", _logits(prompt(*[groups[0]] * 8, weight=1), own), one, min)
            read: list[int] = []
            hook = model.register_forward_pre_hook(lambda module, x, read=read: read.append(x[0].ids.numel()))
            eight = prompt(*groups)
            hook.remove()
            numbers["tokens read for eight groups, in groups"] = sum(read) / _GROUP
            numbers["forwards for eight groups"] = len(read)
            worst("groups in another order", _logits(prompt(*groups[::-1]), own), _logits(eight, own))
    return Measured(numbers)


_identities.builds = ("torchstone.adapt.structured_prompting", "torchstone.model.state")  # type: ignore[attr-defined]

IDENTITIES = Claim(
    id="groups-as-one",
    kind="identity",
    text="One group gives the logits of an ordinary prompt; M groups that are all the same give those of one, and do "
    "not without the weight; the order of groups does not matter; every group is read once.",
    figure="rescaled attention, equation 5; encoding costs M L^2 instead of (M L)^2",
    gates=(
        Number("one group, from an ordinary prompt", high=1e-4),
        Number("eight groups alike, from one", high=1e-4),
        Number("the same without the weight", low=1e-2),
        Number("groups in another order", high=1e-4),
        Number("tokens read for eight groups, in groups", low=8, high=8),
        Number("forwards for eight groups", low=8, high=8),
    ),
    run=_identities,
)

# ------------------------------------------------------------------------------------------------------- behaviour

# Arms are prompts of one model, so differences are of the prompts alone. "conventional again" has other 32
# demonstrations of the same rule; "not emptied" is the defect: all groups but one were left by another rule's prompt.


@dataclass(frozen=True)
class _Size:
    """What a scale spends. A window of the model is `fit` demonstrations and a question; episodes of training have as
    many, those of the test `questions` questions after as many groups of `fit` as there are at most."""

    steps: int
    seeds: int
    rules: int
    questions: int = 8
    fit: int = 32
    batch: int = 16
    data: Mapping[str, Any] = field(default_factory=lambda: {"features": 2, "values": 4, "labels": 4})
    model: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "fp32"


_SIZES = {
    "quick": _Size(steps=600, seeds=1, rules=20),
    "evidence": _Size(steps=2500, seeds=5, rules=100),
    "gpu": _Size(
        steps=20_000,
        seeds=5,
        rules=500,
        batch=64,
        data={"features": 3, "values": 16, "labels": 4},
        model={"width": 512, "depth": 8, "attention": {"heads": 8}},
        precision="bf16",
    ),
}
_GROUPS = (2, 4, 8, 16)
_GATED = 8
"""Groups at which the claim is decided."""


def _trained(size: _Size, seed: int, folder: Path) -> Engine:
    """A decoder trained on episodes that fill its window."""
    model = {"width": 64, "depth": 3, "attention": {"heads": 8}, "ffn": {"kind": "mlp", "hidden": 128}, **size.model}
    recipe = {
        # small weights leave all scores alike for thousands of steps before a demonstration is looked up
        "model": {**model, "position": "alibi", "residual": {"kind": "pre", "std": 0.15}},
        "data": {"kind": "episodes", **size.data, "demonstrations": size.fit, "seed": seed},
        "optimizer": {"kind": "adamw", "lr": 4e-3, "weight_decay": 0.0},
        "schedule": {"kind": "wsd", "warmup": 100, "decay": 0.2},
        "trainer": {
            "seed": seed,
            "steps": size.steps,
            "batch": size.batch,
            "threads": 1,
            "precision": size.precision,
            "compile": "off",
            "save_every": size.steps,
        },
        "evaluate": {"every": size.steps, "blocks": 64, "test": False},
    }
    run = train(load_recipe(recipe), out=folder / f"seed-{seed}", quiet=True)
    return Engine.of_run(run, compile="off")


def _probabilities(
    engine: Engine,
    groups: list[list[int]],
    asked: list[list[int]],
    labels: list[list[int]],
    weight: float | None = None,
) -> torch.Tensor:
    """Of each label after each question (N, L)."""
    length = len(groups[0])
    prompt = StructuredPrompt(
        engine, group_length=length, weight=weight, bos=None, window=length + len(asked[0]) + 1, batch=64
    )
    prompt.add(groups)
    return prompt.score(asked, labels).exp()


def _answered(
    size: _Size, engine: Engine, spec: EpisodesSpec, ids: list[int], others: list[int]
) -> dict[str, torch.Tensor]:
    """Probabilities (N, L) of the labels of an episode's questions by arm; `others` is another episode."""
    each = spec.features + 1  # tokens of an example
    examples = [ids[n : n + each] for n in range(0, len(ids), each)]
    asked = [example[:-1] for example in examples[spec.demonstrations :]]
    labels = [[spec.features * spec.values + label] for label in range(spec.labels)]
    group, end = size.fit * each, spec.demonstrations * each
    groups, foreign = ([some[n : n + group] for n in range(0, end, group)] for some in (ids, others))

    def after(some: list[list[int]], weight: float | None = None) -> torch.Tensor:
        return _probabilities(engine, some, asked, labels, weight)

    M = _GATED
    alone = [after([one]) for one in groups[:M]]
    return {
        "conventional": alone[0],
        "conventional again": alone[1],
        "ensemble": torch.stack(alone).mean(0),
        "structured": after(groups[:M]),
        "not weighed": after(groups[:M], weight=1),
        "concatenated": after([ids[: M * group]]),
        "not emptied": after([*foreign[: M - 1], groups[0]]),
        **{f"conventional, {n} demonstrations": after([groups[0][: n * each]]) for n in (size.fit // 4, size.fit // 2)},
        **{f"structured, {m} groups": after(groups[:m]) for m in _GROUPS if m != M},
    }


def _more_demonstrations(scale: Scale, first: int) -> Measured:
    size = _SIZES[scale]
    values: dict[str, dict[int, float]] = {}
    for seed in range(first, first + size.seeds):
        spec = EpisodesSpec(**size.data, demonstrations=size.fit * max(_GROUPS), questions=size.questions, seed=seed)
        episodes_BS = spec.sequences("test", np.arange(size.rules))[0]
        label_BE = episodes_BS.reshape(size.rules, -1, spec.features + 1)[..., -1] - spec.features * spec.values
        wanted_BQ = torch.from_numpy(label_BE[:, spec.demonstrations :])
        right: dict[str, float] = {}
        with tempfile.TemporaryDirectory(prefix="torchstone-episodes-") as folder:
            engine = _trained(size, seed, Path(folder))
        for n, ids_S in enumerate(episodes_BS):
            for arm, share_QL in _answered(size, engine, spec, ids_S.tolist(), episodes_BS[n - 1].tolist()).items():
                right[arm] = right.get(arm, 0.0) + float((share_QL.argmax(1) == wanted_BQ[n]).sum())
        for arm, count in right.items():
            values.setdefault(arm, {})[seed] = count / wanted_BQ.numel()
    return Measured(values=values)


_more_demonstrations.builds = (  # type: ignore[attr-defined]
    "torchstone.adapt.structured_prompting",
    "torchstone.data._task",
    "torchstone.data.episodes",
    "torchstone.model.attention.softmax",
    "torchstone.model.position.alibi",
    "torchstone.model.state",
)

_ARM: dict[str, Any] = {"arm": "structured", "lower_is_better": False}
MORE = Claim(
    id="more-than-the-window-holds",
    kind="behaviour",
    text="Of a rule that only its demonstrations show, a decoder whose window holds 32 of them labels at least 3 "
    "points more questions right after 8 groups of 32 than after one, and at most 1 point fewer than after the same "
    "256 in one prompt past its window, or without the weight. An ensemble of the 8 groups' answers and other numbers "
    "of groups and demonstrations are measured beside it and no part of the claim.",
    figure="classification gains over conventional prompting and varies less from one choice of demonstrations to the "
    "next, with 1,000 of them, for models of 1.3B to 176B",
    gates=(
        Effect(
            "more demonstrations than the window holds are worth it",
            against="conventional",
            margin=0.03,
            null="conventional again",
            sabotage="not emptied",
            **_ARM,
        ),
        Effect("not worse than one long prompt", against="concatenated", margin=-0.01, sabotage="not emptied", **_ARM),
        Effect(
            "not worse than without the weight", against="not weighed", margin=-0.01, sabotage="not emptied", **_ARM
        ),
    ),
    run=_more_demonstrations,
)

PAPER = Paper(
    slug="structured-prompting",
    title="Structured Prompting: Scaling In-Context Learning to 1,000 Examples",
    authors="Yaru Hao, Yutao Sun, Li Dong, Zhixiong Han, Yuxian Gu, Furu Wei",
    year=2022,
    link="https://arxiv.org/abs/2212.06713",
    topics=("in-context learning", "demonstrations", "long context", "parallel context", "decoding"),
    parts=(),
    summary="How a frozen model can learn from more demonstrations than its window holds: groups encoded apart at the "
    "same positions, seen together by an input whose own tokens weigh as much as there are groups.",
    claims=(IDENTITIES, MORE),
)

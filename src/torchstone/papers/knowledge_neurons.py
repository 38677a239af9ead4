"""Knowledge Neurons in Pretrained Transformers (Dai et al. 2022, arXiv 2104.08696)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from torchstone.data.blocks import shuffled
from torchstone.interpret.knowledge_neurons import Fact, KnowledgeNeurons, Unit, drop_shared
from torchstone.keys import Key
from torchstone.model.site import initialise
from torchstone.model.transformer import Transformer
from torchstone.objectives import Batch, Facts
from torchstone.objectives.masked_lm import MaskedLM, MaskedLMSpec
from torchstone.papers._claim import Claim, Effect, Measured, Number, Paper, Scale
from torchstone.recipe import Recipe, load_recipe
from torchstone.train.engine import Source, Trainer

__all__ = ["PAPER"]

_RELATIONS, _SUBJECTS, _OBJECTS, _TEMPLATES, _FILLERS, _LENGTH = 6, 20, 10, 8, 40, 8
_MASK = 0
_SUBJECT = 1
_RELATION = _SUBJECT + _SUBJECTS
_OBJECT = _RELATION + _RELATIONS
_FILLER = _OBJECT + _RELATIONS * _OBJECTS
_VOCABULARY = _FILLER + _FILLERS
_KNOWN = 0.995
"""Share of sentences whose answer is known when training ends."""


class _World:
    """Facts (relation, subject) -> object, each in eight wordings; a split of the engine.

    A wording of a relation has its word, five fillers, and places of its own for the subject and the answer.
    """

    bytes = tokens = 0
    block = _LENGTH

    def __init__(self, seed: int) -> None:
        draw = Key(seed).fold("world").numpy()
        pool = np.arange(_SUBJECTS) % _OBJECTS
        self.object_RS = np.stack([_OBJECT + r * _OBJECTS + draw.permutation(pool) for r in range(_RELATIONS)])
        sentences = []
        self.prompts: dict[tuple[int, int], list[tuple[int, ...]]] = {}
        self.examples: list[tuple[np.ndarray, int, int]] = []
        for r in range(_RELATIONS):
            for _ in range(_TEMPLATES):
                order = draw.permutation(_LENGTH)
                row = _FILLER + draw.integers(0, _FILLERS, _LENGTH)
                row[order[0]] = _RELATION + r
                sentences.append((r, row, order[1], order[2]))
        for r, row, subject_at, answer_at in sentences:
            for s in range(_SUBJECTS):
                prompt = row.copy()
                prompt[subject_at], prompt[answer_at] = _SUBJECT + s, _MASK
                self.prompts.setdefault((r, s), []).append(tuple(prompt.tolist()))
                self.examples.append((prompt, answer_at, self.object_RS[r, s]))

    def batch(self, key: Key, step: int, size: int, *rest: int) -> Batch:
        """`masked` and `targets` (B, T), of sentences in another order each time through."""
        return self._of(shuffled(len(self.examples), key, step * size, size))

    def evaluation(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        """All sentences, at once."""
        yield self._of(np.arange(len(self.examples)))

    def _of(self, numbers: np.ndarray) -> Batch:
        masked = torch.from_numpy(np.stack([self.examples[n][0] for n in numbers]))
        targets = torch.full_like(masked, -100)
        for row, n in enumerate(numbers):
            targets[row, self.examples[n][1]] = int(self.examples[n][2])
        return {"ids": torch.where(targets >= 0, targets, masked), "masked": masked, "targets": targets}

    def fact(self, r: int, s: int) -> Fact:
        """A fact, its prompts as ids."""
        return Fact(tuple(self.prompts[r, s]), int(self.object_RS[r, s]))


class _Cloze(MaskedLM):
    """The answer is masked, and nothing else."""

    def prepare(self, batch: Batch, key: Key) -> Batch:
        return batch


def _recipe(steps: int, seed: int) -> Recipe:
    return load_recipe(
        {
            "model": {
                "width": 96,
                "depth": 4,
                "vocabulary": _VOCABULARY,
                "context": _LENGTH,
                "causal": False,
                "attention": {"heads": 4},
                "ffn": {"kind": "mlp", "hidden": 384},
                "norm": "layernorm",
                "position": "learned",
                "head": "lm",
            },
            "objective": "masked_lm",
            "optimizer": {"kind": "adamw", "lr": 2e-3},
            "schedule": {"kind": "constant", "warmup": 50},
            "trainer": {"steps": steps, "batch": 96, "threads": 1, "compile": "off", "seed": seed, "save_every": steps},
        }
    )


def _trained(world: _World, steps: int, seed: int) -> tuple[Transformer, float]:
    """The model as soon as it knows (almost) every sentence's answer, and the share that it knows.

    Trained on, every answer's probability comes so near to 1 that nothing moves it.
    """
    torch.set_num_threads(1)
    recipe = _recipe(steps, seed)
    model: Any = initialise(recipe.model.build(), seed)
    objective = _Cloze(MaskedLMSpec(), Facts(_VOCABULARY, _MASK))
    trainer = Trainer(model, objective, Source(world), recipe.optimizer, recipe.schedule, recipe.trainer, quiet=True)
    (batch,) = world.evaluation(0)
    at, accuracy = batch["targets"] >= 0, 0.0
    for step in range(1, steps + 1):
        trainer.train_step()
        if step % 20 == 0:
            model.eval()
            with torch.no_grad():
                found = model(batch["masked"]).logits[at].argmax(-1)
            accuracy = float((found == batch["targets"][at]).float().mean())
            if accuracy >= _KNOWN:
                break
    return model.eval(), accuracy


def _others(units: list[Unit], layers: list[int], draw: np.random.Generator) -> list[Unit]:
    """As many units, drawn from all that are not among these."""
    every = [(layer, unit) for layer, size in enumerate(layers) for unit in range(size)]
    left = [unit for unit in every if unit not in set(units)]
    return [left[n] for n in draw.choice(len(left), len(units), replace=False)]


def _measure(scale: Scale, first: int) -> Measured:
    steps, seeds, per_relation = (1500, 1, 2) if scale == "quick" else (1500, 5, 10)
    values: dict[str, dict[int, float]] = {}
    numbers: dict[str, float] = {"training accuracy, least": 1.0, "completeness of 20 midpoints, off by": 0.0}
    counts = []
    for seed in range(first, first + seeds):
        world, draw = _World(seed), Key(seed).fold("units").numpy()
        model, accuracy = _trained(world, steps, seed)
        numbers["training accuracy, least"] = min(numbers["training accuracy, least"], accuracy)
        kn = KnowledgeNeurons(model, mask=_MASK)
        keys = [(r, s) for r in range(_RELATIONS) for s in range(per_relation)]
        facts = {key: world.fact(*key) for key in keys}
        found: dict[tuple[int, int], list[Unit]] = {}
        for r in range(_RELATIONS):
            of = kn.find_all({str(key[1]): facts[key] for key in keys if key[0] == r})
            found |= {(r, int(s)): [(each.layer, each.unit) for each in units] for s, units in of.items()}
        sizes = [len(a_M) for a_M in kn.activations(facts[keys[0]].prompts[0])]
        counts.append(sum(map(len, found.values())) / len(found))

        def p(key: tuple[int, int], facts: Any = facts, kn: KnowledgeNeurons = kn) -> float:
            fact = facts[key]
            return float(np.mean([kn.probability(prompt, fact.answer) for prompt in fact.prompts]))

        plain = {key: p(key) for key in keys}
        losses: dict[str, list[float]] = {}

        def lose(name: str, units: list[Unit], key: tuple[int, int], p: Any = p, plain: Any = plain,
                 losses: Any = losses, kn: KnowledgeNeurons = kn) -> None:  # fmt: skip
            with kn.suppress(units):
                losses.setdefault(name, []).append(1 - p(key) / plain[key])

        for key, units in found.items():
            if not units:  # nothing is suppressed, and nothing lost
                continue
            elsewhere = [other for other in keys if other[0] != key[0] and found[other]]
            another = elsewhere[draw.integers(len(elsewhere))]
            mean = [torch.stack(each).mean(0) for each in zip(*map(kn.activations, facts[key].prompts), strict=True)]
            ranked = sorted((float(a), (layer, i)) for layer, a_M in enumerate(mean) for i, a in enumerate(a_M))
            loud = [unit for _, unit in ranked[-len(units) :]]
            lose("knowledge neurons", units, key)
            lose("largest activations", loud, key)
            lose("random units", _others(units, sizes, draw), key)
            lose("another relation's neurons", found[another], key)
            lose("other facts", units, another)
        mean_of = {name: float(np.mean(each)) for name, each in losses.items()}
        for name, value in mean_of.items():
            values.setdefault(name, {})[seed] = value
            values.setdefault(f"a third: {name}", {})[seed] = value / 3
        values.setdefault("three times: largest activations", {})[seed] = 3 * mean_of["largest activations"]
        values.setdefault("nothing", {})[seed] = 0.0
        for name, share in _updates(kn, facts, found, world, sizes, draw).items():
            values.setdefault(name, {})[seed] = share
        prompt, answer = facts[keys[0]].prompts[0], facts[keys[0]].answer
        before = kn.probability(prompt, answer)
        for layer, scores in enumerate(kn.attribute(prompt, answer)):
            with kn.suppress([(layer, unit) for unit in range(len(scores))]):
                off = abs(float(scores.sum()) - before + kn.probability(prompt, answer))
            name = "completeness of 20 midpoints, off by"
            numbers[name] = max(numbers[name], off)
    return Measured({**numbers, "knowledge neurons of a fact": float(np.mean(counts))}, values)


def _updates(
    kn: KnowledgeNeurons, facts: Any, found: Any, world: _World, sizes: list[int], draw: Any
) -> dict[str, float]:
    """Share of facts whose likeliest answer, in most wordings, is another object of the relation after an edit."""
    won: dict[str, list[float]] = {}
    factual: dict[tuple[int, int], list[Unit]] = {}
    for r in range(_RELATIONS):
        factual |= drop_shared({key: units for key, units in found.items() if key[0] == r})
    for key, own in factual.items():
        if not own:
            continue
        r = key[0]
        old = facts[key].answer
        pool = [_OBJECT + r * _OBJECTS + n for n in range(_OBJECTS)]
        new = int(draw.choice([each for each in pool if each != old]))
        random = _others(own, sizes, draw)
        for name, chosen, (less, more) in (
            ("update of knowledge neurons", own, (old, new)),
            ("update of random units", random, (old, new)),
            ("update of other random units", _others(own, sizes, draw), (old, new)),
            ("update, old and new exchanged", own, (new, old)),
        ):
            edit = kn.update(chosen, less, more)
            best = []
            for prompt in facts[key].prompts:
                chance = {each: kn.probability(prompt, each) for each in pool}
                best.append(max(pool, key=chance.__getitem__))
            edit.undo()
            won.setdefault(name, []).append(float(np.mean([each == new for each in best]) > 0.5))
    return {name: float(np.mean(each)) for name, each in won.items()}


_measure.builds = (  # type: ignore[attr-defined]
    "torchstone.interpret.integrated_gradients",
    "torchstone.interpret.knowledge_neurons",
    "torchstone.model.taps",
    "torchstone.model.feedforward.mlp",
    "torchstone.objectives.masked_lm",
)

PLANTED = Claim(
    id="planted-facts",
    kind="behaviour",
    text="In an encoder that learned 120 planted facts, suppressing a fact's knowledge neurons takes at least 4 % of "
    "the probability of its answer, three times what as many of the most active units take; facts of other relations "
    "lose less than a third as much; rewriting the neurons' columns makes another answer win at least 20 points more "
    "often than rewriting random units does.",
    figure="suppressed, the right answer loses 29 %, activation-picked neurons take 1.5 %; 34.4 % of updates succeed, "
    "of random neurons none",
    gates=(
        Number("training accuracy, least", low=0.99),
        Number("completeness of 20 midpoints, off by", high=1e-2),
        Effect(
            "suppressed, the answer loses 4 %",
            "knowledge neurons",
            "nothing",
            margin=0.04,
            null="random units",
            sabotage="another relation's neurons",
            lower_is_better=False,
        ),
        Effect(
            "three times the loss by the most active units",
            "knowledge neurons",
            "three times: largest activations",
            margin=0.0,
            null="random units",
            sabotage="another relation's neurons",
            lower_is_better=False,
        ),
        Effect(
            "other facts lose less than a third",
            "a third: knowledge neurons",
            "other facts",
            margin=0.0,
            null="a third: random units",
            sabotage="a third: another relation's neurons",
            lower_is_better=False,
        ),
        Effect(
            "updates win 20 points more often",
            "update of knowledge neurons",
            "update of random units",
            margin=0.2,
            null="update of other random units",
            sabotage="update, old and new exchanged",
            lower_is_better=False,
        ),
    ),
    run=_measure,
)

PAPER = Paper(
    slug="knowledge-neurons",
    title="Knowledge Neurons in Pretrained Transformers",
    authors="Damai Dai, Li Dong, Yaru Hao, Zhifang Sui, Baobao Chang, Furu Wei",
    year=2022,
    link="https://arxiv.org/abs/2104.08696",
    topics=("interpretation", "attribution", "editing"),
    parts=(),
    summary="Integrated gradients find the hidden units that a fact's answer hangs on; suppressed, amplified or "
    "rewritten, they change that fact and little else.",
    claims=(PLANTED,),
)

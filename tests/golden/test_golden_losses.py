"""The first ten losses of one tiny training per part and objective are those of the day when they were written.

A change here is a change of what a method computes, of initialisation, of data order, of an optimiser: intended or not.
Intended: ``make golden`` writes them anew, and the change says why.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conformance.variants import variants
from torchstone.keys import Key
from torchstone.objectives import Batch, Facts, Objective, Result, Term
from torchstone.recipe import Recipe, load_recipe
from torchstone.spec import FAMILIES, kinds
from torchstone.train.engine import Source, Trainer
from torchstone.train.run import build_model

FILE = Path(__file__).with_name("losses.json")
STEPS, ROWS, BLOCK, VOCABULARY = 10, 4, 12, 41
ELSEWHERE = {"corpus", "data", "tokenizer", "model", "adapt", "noise"}
"""Families that a loss does not show: data has tests of its own, and the model is the Transformer of all cases."""


class Tokens:
    """Text of no corpus: ids that repeat with some noise, in two documents, and a label for each row."""

    bytes = tokens = 0

    def batch(self, key: Key, step: int, size: int, micro: int = 0, accumulate: int = 1, rank: int = 0,
              ranks: int = 1) -> Batch:  # fmt: skip
        generator = Key(0).fold("golden", step, micro).generator()
        phase = torch.randint(0, VOCABULARY - 4, (size, 1), generator=generator)
        noise = torch.randint(0, 3, (size, BLOCK + 1), generator=generator)
        stream = 3 + (phase + 5 * torch.arange(BLOCK + 1) + noise) % (VOCABULARY - 4)
        start = torch.where(torch.arange(BLOCK) < BLOCK // 2, 0, BLOCK // 2).expand(size, -1).contiguous()
        return {"ids": stream[:, :-1].contiguous(), "next": stream[:, 1:].contiguous(), "start": start,
                "label": phase[:, 0] % 2}  # fmt: skip

    def evaluation(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        return iter(())


class Pictures(Tokens):
    """Stripes, in the place of ids: their direction is the label."""

    def batch(self, key: Key, step: int, size: int, *rest: int) -> Batch:
        generator = Key(0).fold("pictures", step).generator()
        label = torch.randint(0, 2, (size,), generator=generator)
        stripes = torch.arange(8).float().mul(2).sin().expand(size, 2, 8, 8)
        pixels = torch.where(label.view(-1, 1, 1, 1) == 1, stripes, stripes.transpose(2, 3))
        return {"ids": pixels + 0.1 * torch.randn(pixels.shape, generator=generator), "label": label}


class Labelled(Pictures):
    """The same with values from 0 to 1, for adversarial training."""

    def batch(self, key: Key, step: int, size: int, *rest: int) -> Batch:
        rows = super().batch(key, step, size, *rest)
        return {"pixels": torch.sigmoid(rows["ids"]), "label": rows["label"]}


class Pairs(Tokens):
    """Two rows an example, both after one first half: one goes on by the rule, one by chance."""

    def batch(self, key: Key, step: int, size: int, micro: int = 0, accumulate: int = 1, rank: int = 0,
              ranks: int = 1) -> Batch:  # fmt: skip
        rows = super().batch(key, step, size, micro)
        chosen = torch.cat([rows["ids"], rows["next"][:, -1:]], 1)
        generator = Key(0).fold("rejected", step, micro).generator()
        rejected = torch.randint(3, VOCABULARY, chosen.shape, generator=generator)
        both = torch.stack([chosen, torch.where(torch.arange(BLOCK + 1) < BLOCK // 2, chosen, rejected)], 1)
        after = torch.where(torch.arange(BLOCK) < BLOCK // 2 - 1, -100, both[..., 1:])
        return {"ids": both[..., :-1].contiguous(), "next": after, "valid": torch.ones_like(after, dtype=torch.bool)}


class Triples(Tokens):
    """Facts of a ring, i + r + 1 = j, with the head taken away at odd steps."""

    def batch(self, key: Key, step: int, size: int, *rest: int) -> Batch:
        generator = Key(0).fold("triples", step).generator()
        head, relation = (torch.randint(0, most, (size,), generator=generator) for most in (13, 3))
        return {"head": head, "relation": relation, "tail": (head + relation + 1) % 13,
                "seeks_head": torch.full((size,), step % 2 == 1),
                "negative": torch.randint(0, 13, (size, 5), generator=generator),
                "weight": 1 + relation.float()}  # fmt: skip


class Classify(Objective):
    """Cross-entropy of one label a row, or of the id's parity at each token."""

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"rows": torch.tensor(len(batch["label"]))}

    def forward(self, model: nn.Module, batch: Batch, key: Key | None) -> Result:
        logits = model(batch["ids"], key=None if key is None else key.tensor()).logits
        label = batch["label"] if logits.dim() == 2 else batch["ids"].flatten() % 2
        loss = nn.functional.cross_entropy(logits.flatten(0, -2), label, reduction="sum")
        return Result({"loss": Term(loss, "rows")})


MORE: dict[str, dict[str, Any]] = {
    "schedule": {"warmup": 2},
    "schedule.multi_step": {"at": (0.3, 0.6)},
    "schedule.wsd": {"decay": 0.7},
    "optimizer": {"lr": 0.02},
}
"""Fields that make a kind show within ten steps."""


def cases() -> dict[str, dict[str, Any]]:
    """Name -> sections of the recipe."""
    made: dict[str, dict[str, Any]] = {"base": {}}
    for family in FAMILIES:
        if family in ELSEWHERE:
            continue
        for kind in kinds(family):
            name = f"{family}.{kind}"
            if family in ("objective", "optimizer", "schedule"):
                made[name] = {family: {"kind": kind, **MORE.get(family, {}), **MORE.get(name, {})}}
            elif family == "scaling":
                made[name] = {"model": {"position": {"kind": "rotary", "scaling": variants("scaling")[kind]}}}
            elif family == "router":
                active = 1 if kind == "stable" else 2
                router = variants("router")[kind]
                made[name] = {"model": {"ffn": {"kind": "moe", "experts": 4, "active": active, "router": router}}}
            else:
                heads = {"heads": 2} if family == "attention" else {}
                made[name] = {"model": {family: {**heads, **variants(family)[kind]}}}
    # parts that a causal language model has no place for
    images = {"kind": "mlp", "classes": 2, "channels": 2, "image": 8, "hidden": [16, 8], "rejection": {}}
    for name in ("adversarial", "rectified_rejection"):
        made[f"objective.{name}"] |= {"model": images, "data": {"kind": "images", "path": "none"}}
    encoder = {"causal": False, "head": {"kind": "mlm"}}
    made["objective.masked_lm"]["model"] = made["head.mlm"]["model"] = encoder
    made["objective.pseudo_masked"]["model"] = {**encoder, "position": "t5"}
    made["head.mlm"]["objective"] = {"kind": "masked_lm"}
    made["objective.dpo"] |= {"data": {"kind": "preferences", "path": "none"}, "init_from": "none"}
    made["objective.link_prediction"] |= {
        "model": {"kind": "house", "entities": 13, "relations": 3, "dim": 12, "block": 3, "projections": 2},
        "data": {"kind": "triples", "path": "none"},
    }
    made["objective.link_prediction"]["objective"]["regulariser"] = 0.1
    made["objective.classification"]["model"] = {"causal": False, "head": {"kind": "classification", "pool": "last"}}
    detector = {"kind": "token_classification", "classes": 1}
    made["objective.replaced_token"]["model"] = {"causal": False, "head": detector}
    made["objective.replaced_token"]["objective"]["generator"] = {"depth": 1}
    made["objective.minilm_v2"]["objective"] |= {"teacher": "another", "relation_heads": 4}
    made["objective.multi_token"]["model"] = made["stack.multi_token"]["model"]
    made["stack.multi_token"]["objective"] = {"kind": "multi_token"}
    made["embedding.patch"]["model"] |= {"causal": False, "head": {"kind": "classification"}, "position": "learned"}
    made["form.encoder"] = {"model": {"causal": False, "head": {"kind": "classification", "pool": "mean"}}}
    # a text meets the first network alone, which is `mlp`
    made["ffn.multiway"]["model"]["ffn"] |= {"activation": "relu2"}
    made["dropout"] = {"model": {"dropout": 0.2, "drop_path": 0.2, "attention": {"dropout": 0.2}}}
    made["bf16"] = {"trainer": {"precision": "bf16"}}
    made["accumulate"] = {"trainer": {"accumulate": 2, "batch": 2}}
    return made


CASES = cases()


def recipe_of(sections: dict[str, Any]) -> Recipe:
    base: dict[str, Any] = {
        "model": {
            "width": 16,
            "depth": 2,
            "attention": {"heads": 2},
            "vocabulary": VOCABULARY,
            "context": 32,
            "residual": {"std": 0.2},
        },  # from the usual 0.02 all scores are nearly equal and parts hardly differ
        "optimizer": {"lr": 0.01},
        "schedule": {"kind": "constant"},
        "trainer": {"steps": STEPS, "batch": ROWS, "device": "cpu", "threads": 1, "compile": "off"},
    }
    return load_recipe(base, [sections])


def head_of(recipe: Recipe) -> str:
    """The kind of the model's head; empty where it has none."""
    return getattr(getattr(recipe.model, "head", None), "kind", "")


def batches_of(recipe: Recipe) -> Tokens:
    if recipe.data.example != "tokens":
        return Triples() if recipe.data.example == "triples" else Labelled()
    return Pairs() if recipe.data.paired else Tokens() if recipe.model.embedding.of_tokens else Pictures()  # type: ignore[attr-defined]


def ten_losses(sections: dict[str, Any]) -> list[float]:
    recipe = recipe_of(sections)
    model = build_model(recipe.model, recipe.trainer.seed)
    another = build_model(recipe.model, recipe.trainer.seed + 1)
    facts = Facts(
        VOCABULARY, 0, 1, 2, 2, "none",
        lambda run: another if run == "another" else build_model(recipe.model, recipe.trainer.seed),
        recipe.model,
        lambda: torch.arange(VOCABULARY),
    )  # fmt: skip
    own = recipe.objective.kind in ("classification", "replaced_token")
    classifies = head_of(recipe).endswith("classification") and not own
    objective = Classify() if classifies else recipe.objective.build(facts)
    source = Source(batches_of(recipe))
    trainer = Trainer(model, objective, source, recipe.optimizer, recipe.schedule, recipe.trainer, quiet=True)
    return [float(f"{trainer.train_step()['loss']:.9g}") for _ in range(STEPS)]


def stored() -> dict[str, list[float]]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


@pytest.fixture
def written() -> Callable[[str, list[float]], None]:
    def write(name: str, losses: list[float]) -> None:
        known = {**stored(), name: losses}
        rows = [f' "{key}": {json.dumps(known[key])}' for key in sorted(known) if key in CASES]
        FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n")

    return write


@pytest.mark.parametrize("name", CASES)
def test_first_ten_losses_are_the_kept_ones(name: str, written: Callable[[str, list[float]], None]) -> None:
    losses = ten_losses(CASES[name])
    if os.environ.get("TORCHSTONE_GOLDEN") == "write":
        written(name, losses)
    assert name in stored(), f"no golden losses of {name}: make golden"
    assert losses == pytest.approx(stored()[name], rel=2e-5 if name != "bf16" else 1e-3)  # CPUs differ by up to 1.6e-5


def test_every_kind_has_an_entry_and_every_entry_a_case() -> None:
    wanted = {f"{family}.{kind}" for family in set(FAMILIES) - ELSEWHERE for kind in kinds(family)}
    assert wanted <= set(stored())
    assert set(stored()) == set(CASES)


def test_trainings_learn_and_parts_differ() -> None:
    """Golden numbers of models that do nothing would guard nothing."""
    known = stored()
    for name, sections in CASES.items():
        if head_of(recipe_of(sections)) == "lm":
            assert known[name][-1] < known[name][0], name
    usual = {name for name, sections in CASES.items() if recipe_of(sections) == recipe_of({})}
    others = {name: tuple(losses) for name, losses in known.items() if name not in usual - {"base"}}
    others.pop("head.mlm")  # the training of objective.masked_lm
    others.pop("stack.multi_token")  # that of objective.multi_token
    others.pop("stack.multiway")  # ids alone are of one modality, and meet stack.plain
    for name, losses in others.items():
        for other, theirs in others.items():
            apart = max(abs(a - b) / b for a, b in zip(losses, theirs, strict=True))
            assert name == other or apart > 1e-4, f"{name} and {other} could be exchanged unnoticed"

"""The first ten losses of one tiny training per part and objective are those of the day when they were written.

A change here is a change of what a method computes, of initialisation, of data order, of an optimiser: intended or not.
Intended: ``make golden`` writes them anew, and the change says why.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conformance.variants import variants
from golden.batches import VOCABULARY, Pairs, Pictures, Tokens
from objective_cases import objective_cases
from torchstone.keys import Key
from torchstone.objectives import Batch, Facts, Objective, Result, Term
from torchstone.recipe import Recipe, load_recipe
from torchstone.spec import FAMILIES, kinds
from torchstone.train.engine import Source, Trainer
from torchstone.train.run import build_model

FOLDER = Path(__file__).with_name("losses")
STEPS, ROWS = 10, 4
ELSEWHERE = {"corpus", "data", "tokenizer", "model", "adapt", "noise", "reward"}
"""Families that a loss does not show: data has tests of its own, and the model is the Transformer of all cases."""
ROUNDED = {"linear.bitlinear", "linear.fp8_block"}
"""Trained in float64: where numbers are rounded to few values, the last bits of a CPU's float32 decide some of them."""


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
    for kind, case in objective_cases().items():
        own = made[f"objective.{kind}"]
        for section, body in case.golden.items():
            own[section] = {**own.get(section, {}), **body} if isinstance(body, dict) else body
    # parts that a causal language model has no place for
    made["head.mlm"] = {"model": {"causal": False, "head": {"kind": "mlm"}}, "objective": {"kind": "masked_lm"}}
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
    case = objective_cases().get(recipe.objective.kind)
    if case is not None and case.batches is not None:
        return case.batches()
    return Pairs() if recipe.data.paired else Tokens() if recipe.model.embedding.of_tokens else Pictures()  # type: ignore[attr-defined]


def ten_losses(sections: dict[str, Any]) -> list[float]:
    recipe = recipe_of(sections)
    model = build_model(recipe.model, recipe.trainer.seed)
    another = build_model(recipe.model, recipe.trainer.seed + 1)
    case = objective_cases().get(recipe.objective.kind)
    facts = Facts(
        VOCABULARY, 0, 1, 2, 2, "none",
        lambda run: another if run == "another" else build_model(recipe.model, recipe.trainer.seed),
        recipe.model,
        lambda: torch.arange(VOCABULARY),
    )  # fmt: skip
    facts = replace(facts, **({} if case is None else case.facts))
    classifies = head_of(recipe).endswith("classification") and recipe.objective.kind == "causal_lm"
    objective = Classify() if classifies else recipe.objective.build(facts)
    source = Source(batches_of(recipe))
    trainer = Trainer(model, objective, source, recipe.optimizer, recipe.schedule, recipe.trainer, quiet=True)
    return [float(f"{trainer.train_step()['loss']:.9g}") for _ in range(STEPS)]


def stored() -> dict[str, list[float]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


@pytest.mark.parametrize("name", CASES)
def test_first_ten_losses_are_the_kept_ones(name: str, request: pytest.FixtureRequest) -> None:
    if name in ROUNDED:
        request.getfixturevalue("float64")
    losses, file = ten_losses(CASES[name]), FOLDER / f"{name}.json"
    if os.environ.get("TORCHSTONE_GOLDEN") == "write":
        file.write_text(json.dumps(losses) + "\n")
    assert file.exists(), f"no golden losses of {name}: make golden"
    assert losses == pytest.approx(
        json.loads(file.read_text()), rel=2e-5 if name != "bf16" else 1e-3
    )  # CPUs differ by up to 1.6e-5


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

"""A training that takes a second: its recipe, its text, its trainer."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchstone.model.site import parameter_name
from torchstone.recipe import Recipe, load_recipe
from torchstone.train.checkpoint import load_tensors, save_tensors
from torchstone.train.engine import Source, Trainer
from torchstone.train.run import RunFolder, build_model
from torchstone.train.training import _objective, _resolve, facts_of

MODEL: dict[str, Any] = {"width": 16, "depth": 1, "attention": {"heads": 2}, "ffn": {"kind": "mlp", "hidden": 24}}


def text(path: Path, seed: int = 0, lines: int = 120) -> Path:
    """A file of words, about 30 bytes a line."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(40)]
    path.write_text("".join(" ".join(rng.choices(words, k=6)) + ".\n" for _ in range(lines)))
    return path


def recipe(folder: Path, **sections: Any) -> dict[str, Any]:
    """Plain data of a tiny recipe whose text and cache lie in `folder`; sections are laid over it."""
    corpus = folder / "corpus.txt"
    if not corpus.exists():
        text(corpus)
    base: dict[str, Any] = {
        "model": dict(MODEL),
        "data": {
            "corpus": {"kind": "text", "path": str(corpus)},
            "tokenizer": "bytes",
            "block": 16,
            "cache": str(folder / "cache"),
        },
        "schedule": {"kind": "constant"},
        "trainer": {
            "steps": 4,
            "batch": 2,
            "device": "cpu",
            "threads": 1,
            "compile": "off",
            "log_every": 1,
            "save_every": 2,
        },
        "evaluate": {"every": 4, "blocks": 2},
    }
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section} if isinstance(section, dict) else section
    return base


def pairs(path: Path, count: int = 40, seed: int = 0) -> Path:
    """A file of preferences over short words: of each prompt two responses."""
    rng = random.Random(seed)

    def words(most: int) -> str:
        return " ".join("".join(rng.choices("abcdefghij", k=rng.randint(1, 3))) for _ in range(rng.randint(1, most)))

    rows = [{"prompt": f"{number} {words(2)}?", "chosen": words(3), "rejected": words(2)} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def preferences(folder: Path, **sections: Any) -> dict[str, Any]:
    """Plain data of a tiny recipe of direct preference optimisation, whose pairs and reference lie in `folder`."""
    made = recipe(folder, **sections)
    if not (reference := folder / "reference").exists():
        saved(reference, {**recipe(folder), "trainer": {"seed": 7}})
    if not (file := folder / "pairs.jsonl").exists():
        pairs(file)
    kept = {name: made["data"][name] for name in ("tokenizer", "cache")}
    made["data"] = {"kind": "preferences", "path": str(file), "block": 24, **kept}
    return {**made, "objective": {"kind": "dpo", "reference": str(reference), **sections.get("objective", {})}}


def compared(folder: Path, **sections: Any) -> dict[str, Any]:
    """Plain data of a tiny recipe of a reward model, over the same pairs."""
    made = preferences(folder, **sections)
    head = {"kind": "classification", "classes": 1, "pool": "last"}
    made["model"] = {"head": head, **made["model"]}
    return {**made, "objective": {"kind": "reward_model", **sections.get("objective", {})}}


def sums(path: Path) -> Path:
    """A file of prompts: additions of two digits, with their answers."""
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompted(folder: Path, **sections: Any) -> dict[str, Any]:
    """Plain data of a tiny recipe of policy gradients, whose prompts lie in `folder`: to write letters is rewarded."""
    made = recipe(folder, **sections)
    if not (file := folder / "sums.jsonl").exists():
        sums(file)
    kept = {name: made["data"][name] for name in ("tokenizer", "cache")}
    made["data"] = {"kind": "prompts", "path": str(file), "block": 24, **kept}
    letters = {"kind": "language", "alphabet": "".join(map(chr, range(64, 128))), "inside": "^.*"}
    usual = {
        "kind": "policy_gradient",
        "group": 4,
        "sampling": {"max_new_tokens": 5},
        "rewards": [letters],
        "truncated": "keep",
    }
    return {**made, "objective": {**usual, **sections.get("objective", {})}}


def labelled(folder: Path, **sections: Any) -> dict[str, Any]:
    """Plain data of a tiny recipe of classification, whose examples lie in `folder`."""
    made = recipe(folder, **sections)
    if not (file := folder / "labelled.jsonl").exists():
        examples(file)
    kept = {name: made["data"][name] for name in ("tokenizer", "cache")}
    made["data"] = {"kind": "labelled", "path": str(file), "block": 16, **kept}
    made["model"] = {"causal": False, "head": {"kind": "classification", "classes": 3, "pool": "mean"}, **made["model"]}
    return {**made, "objective": {"kind": "classification", **sections.get("objective", {})}}


def distilled(folder: Path, **sections: Any) -> dict[str, Any]:
    """Plain data of a tiny recipe whose student learns the relations of a wider teacher, which lies in `folder`."""
    if not (teacher := folder / "teacher").exists():
        saved(teacher, recipe(folder, model={**MODEL, "depth": 3, "width": 24, "attention": {"heads": 3}}))
    objective = {"kind": "minilm_v2", "teacher": str(teacher), "relation_heads": 8, **sections.get("objective", {})}
    return {**recipe(folder, **sections), "objective": objective}


def examples(path: Path, count: int = 60, seed: int = 0) -> Path:
    """A file of short texts of three classes, each with letters that it likes."""
    rng, liked = random.Random(seed), {"red": "abc", "green": "def", "blue": "ghi"}
    labels = [rng.choice(list(liked)) for _ in range(count)]
    rows = [
        {"text": f"{n} " + "".join(rng.choices(liked[label] + "jkl", k=rng.randint(3, 9))), "label": label}
        for n, label in enumerate(labels)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


MASKED: dict[str, Any] = {
    "model": {**MODEL, "causal": False, "head": "mlm"},
    "objective": {"kind": "masked_lm", "rate": 0.3},
}
"""Sections that make it a masked language model."""


def images(folder: Path, **sections: Any) -> dict[str, Any]:
    """Plain data of a tiny recipe of adversarial training: stripes of 6 x 6 pixels, whose place is their class."""
    if not (file := folder / "stripes.npz").exists():
        rng = np.random.default_rng(0)
        label = rng.integers(3, size=120)
        pixels = rng.random((120, 1, 6, 6)) * 0.6
        pixels[np.arange(120), 0, 2 * label] += 0.4
        np.savez(file, x=pixels, y=label)
    made = recipe(folder, **sections)
    made["model"] = {"kind": "mlp", "hidden": [20, 12], **sections.get("model", {})}
    made["data"] = {"kind": "images", "path": str(file), "valid": 0.2, **sections.get("data", {})}
    made["objective"] = {"kind": "adversarial", "epsilon": 0.1, "steps": 3, **sections.get("objective", {})}
    return made


def resolved(data: Recipe | dict[str, Any]) -> tuple[Recipe, Any]:
    """The recipe with what its data decide filled in, and the data."""
    loaded = data if isinstance(data, Recipe) else load_recipe(data)
    prepared = loaded.data.prepare()
    precision = "fp32" if loaded.trainer.precision == "auto" else loaded.trainer.precision
    return _resolve(loaded, prepared, 1, precision), prepared


def saved(path: Path, data: dict[str, Any]) -> RunFolder:
    """A run of the recipe's first weights, without a training."""
    full, prepared = resolved(data)
    run = RunFolder(path)
    run.begin(full, prepared.tokenizer, {})
    model = build_model(full.model, full.trainer.seed)
    save_tensors(path / "model.safetensors", {parameter_name(name): x for name, x in model.state_dict().items()})
    return run


def trainer(data: dict[str, Any], dtype: torch.dtype = torch.float32, **fields: Any) -> Trainer:
    """A trainer in memory, without a run directory."""
    full, prepared = resolved(data)
    objective = _objective(full, facts_of(prepared, full)).to(dtype)
    model = build_model(full.model, full.trainer.seed).to(dtype)
    for stack in getattr(model, "stacks", {}).values():
        stack.recompute = full.trainer.recompute
    source = Source(prepared.train, prepared.valid, prepared.test)
    made: dict[str, Any] = {"quiet": True, "evaluate": full.evaluate, **fields}
    return Trainer(model, objective, source, full.optimizer, full.schedule, full.trainer, **made)


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder` with its content; None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


class Cut(BaseException):
    """A power cut, as far as one process can have it: nothing after it runs but `finally`."""


@contextmanager
def cut_after(steps: int) -> Iterator[None]:
    """The training inside is cut once it has done that many steps, before it logs or saves the last of them."""
    whole = Trainer.train_step

    def step(self: Trainer) -> dict[str, Any]:
        row = whole(self)
        if self.step >= steps:
            raise Cut
        return row

    with pytest.MonkeyPatch.context() as patch, suppress(Cut):
        patch.setattr(Trainer, "train_step", step)
        yield


def rows_without_times(run: RunFolder) -> list[dict[str, Any]]:
    """Rows of metrics without what a clock decides."""
    clock = ("seconds_per_step", "tokens_per_second", "mfu")
    return [{name: value for name, value in row.items() if name not in clock} for row in run.metrics()]


def assert_same_run(found: RunFolder, wanted: RunFolder) -> None:
    """Weights, averages, optimiser, objective and metrics agree bit for bit."""
    newest = [(folder.state / "LATEST").read_text() for folder in (found, wanted)]
    assert newest[0] == newest[1]
    files = [sorted(path.name for path in (folder.state / newest[0]).iterdir()) for folder in (found, wanted)]
    assert files[0] == files[1]
    for name in files[1]:
        ours, theirs = found.state / newest[0] / name, wanted.state / newest[0] / name
        if name == "state.json":
            vary = {"recipe": 0, "sha256": 0, "files": 0}
            assert {**json.loads(ours.read_text()), **vary} == {**json.loads(theirs.read_text()), **vary}
        else:
            assert_same_tensors(ours, theirs)
    for name in ("model.safetensors", "model_ema.safetensors"):
        assert (found.path / name).exists() == (wanted.path / name).exists()
        if (wanted.path / name).exists():
            assert_same_tensors(found.path / name, wanted.path / name)
    assert rows_without_times(found) == rows_without_times(wanted)


def assert_same_tensors(found: Path, wanted: Path) -> None:
    """Two files hold the same tensors, bit for bit."""
    ours, theirs = load_tensors(found), load_tensors(wanted)
    assert ours.keys() == theirs.keys()
    differ = [name for name, value in theirs.items() if not torch.equal(ours[name], value)]
    assert not differ, f"{wanted.name}: {differ} differ"

"""A knowledge graph that trains in a second, and its recipe."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

Fact = tuple[str, str, str]
RING = 14


def ring(folder: Path, seed: int = 0) -> Path:
    """14 places on a ring, three distances between them, and one relation of many to one: 56 facts."""
    facts: list[Fact] = [(f"p{i}", f"plus{j}", f"p{(i + j) % RING}") for i in range(RING) for j in (1, 2, 5)]
    facts += [(f"p{i}", "parity", f"p{i % 2}") for i in range(RING)]
    random.Random(seed).shuffle(facts)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in {"train": facts[:40], "valid": facts[40:47], "test": facts[47:]}.items():
        write(folder / f"{name}.txt", part)
    return folder


def write(path: Path, facts: list[Fact]) -> Path:
    path.write_text("".join("\t".join(fact) + "\n" for fact in facts))
    return path


MODELS: dict[str, dict[str, Any]] = {
    "transe": {"kind": "transe", "dim": 5},
    "rotate": {"kind": "rotate", "dim": 8},
    "house_r": {"kind": "house", "dim": 12, "block": 3, "projections": 0},
    "house": {"kind": "house", "dim": 12, "block": 4, "projections": 2, "max_strength": 0.4},
    "house_r_plus": {"kind": "house", "dim": 12, "block": 2, "projections": 0, "translation": True},
    "house_plus": {"kind": "house", "dim": 15, "block": 5, "translation": True},
}
"""TransE, RotatE and the four variants of the paper."""


def recipe(folder: Path, **sections: Any) -> dict[str, Any]:
    """Plain data of a recipe whose graph lies in `folder`; sections are laid over it."""
    graph = folder / "graph"
    if not graph.exists():
        ring(graph)
    base: dict[str, Any] = {
        "model": {**MODELS["house_plus"], "gamma": 6.0},
        "data": {"kind": "triples", "path": str(graph), "negatives": 5},
        "objective": {"kind": "link_prediction", "regulariser": 0.01},
        "optimizer": {"lr": 0.02, "weight_decay": 0.0},
        "schedule": {"kind": "multi_step", "at": [0.5], "to": [0.1]},
        "trainer": {
            "steps": 6,
            "batch": 4,
            "clip": None,
            "device": "cpu",
            "threads": 1,
            "compile": "off",
            "log_every": 1,
            "save_every": 2,
        },
        "evaluate": {"every": 3},
    }
    for name, section in sections.items():
        base[name] = (
            {**base.get(name, {}), **section} if isinstance(section, dict) and "kind" not in section else section
        )
    return base


def facts(folder: Path, split: str) -> list[Fact]:
    """The lines of a split, read without the library."""
    return [tuple(line.split("\t")) for line in (folder / f"{split}.txt").read_text().splitlines()]  # type: ignore[misc]


def rank(scores: list[float], answer: int, others: set[int]) -> float:
    """The filtered rank by counting: one, those above, and half of those level with the answer."""
    rivals = [score for entity, score in enumerate(scores) if entity != answer and entity not in others]
    return 1 + sum(s > scores[answer] for s in rivals) + sum(s == scores[answer] for s in rivals) / 2


def dense_rotation(u_CK: np.ndarray) -> np.ndarray:
    """The matrix of a product of reflections."""
    product = np.eye(u_CK.shape[1])
    for u in u_CK:
        u = u / np.sqrt((u * u).sum())
        product = product @ (np.eye(len(u)) - 2 * np.outer(u, u))
    return product


def dense_contraction(p_CK: np.ndarray, strength_C: np.ndarray) -> np.ndarray:
    """The matrix of a product of contractions."""
    product = np.eye(p_CK.shape[1])
    for p, tau in zip(p_CK, strength_C, strict=True):
        p = p / np.sqrt((p * p).sum())
        product = product @ (np.eye(len(p)) - tau * np.outer(p, p))
    return product

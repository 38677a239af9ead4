"""Running claims, and evidence: what a recorded run leaves, what makes it stale, and verdicts computed from it anew."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import itertools
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchstone.compare import Arm, Estimate, Options, from_patch
from torchstone.compare.matrix import train_variants
from torchstone.errors import TorchstoneError
from torchstone.files import read_json, write_json
from torchstone.papers._claim import Arms, Claim, Effect, Paper, Scale, Setting, decide_claim
from torchstone.recipe import Recipe, parse_override
from torchstone.spec import resolve

__all__ = [
    "EVIDENCE",
    "Outcome",
    "confirm",
    "evidence_of",
    "read_evidence",
    "recipe_of",
    "record",
    "run_claim",
    "stale",
    "status",
]

EVIDENCE = Path(__file__).parent / "evidence"
"""A JSON file a paper, written by `record` alone."""

FIRST_SEED = {"quick": 0, "evidence": 1000, "gpu": 1000}
"""Seeds below 200 are for looking around; evidence begins at 1000."""
_SHIFT = 100_000
"""Distance of a shifted arm's seeds from the others'."""
FORMAT = 1


@dataclass(frozen=True)
class Outcome:
    """What one run of a claim found.

    Attributes:
        claim: which.
        scale: at which.
        verdict: holds, does not hold, inconclusive or not discriminating; None at quick scale.
        gates: each gate's answer, margin and controls.
        numbers: what was measured, without seeds; differences of the gates' arms are among them.
        cells: one entry a trained cell or a function's value: arm, seed, value, and where it came from.
        seconds: of the whole.
    """

    claim: Claim
    scale: Scale
    verdict: str | None
    gates: list[dict[str, Any]]
    numbers: dict[str, float]
    cells: list[dict[str, Any]]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the contract of ``reproduce --json``."""
        margins = [row["margin"] for row in self.gates if "margin" in row]
        return {
            "id": self.claim.id,
            "kind": self.claim.kind,
            "text": self.claim.text,
            "figure": self.claim.figure,
            "verdict": self.verdict,
            "gates": self.gates,
            "measured": self.numbers,
            "margin": margins[0] if margins else None,
            "seeds": sorted({cell["seed"] for cell in self.cells if not cell.get("shifted")}),
            "seconds": self.seconds,
            "scale": self.scale,
        }


def run_claim(
    claim: Claim,
    scale: Scale = "quick",
    out: Path | None = None,
    jobs: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Run one claim.

    Args:
        claim: which.
        scale: "quick" gives no verdict that is kept; "evidence" and "gpu" do.
        out: folder of the comparison's cells, to continue it; None takes a temporary one.
        jobs: cells at once.
        say: takes lines of progress.

    Raises:
        TorchstoneError: the claim has no such scale, or cannot run here.
    """
    began = time.perf_counter()
    numbers: dict[str, float] = {}
    cells: list[dict[str, Any]] = []
    if scale not in claim.scales:
        raise TorchstoneError(f"claim {claim.id}: has no scale {scale}; it has {', '.join(claim.scales)}")
    if claim.run is not None:
        found = claim.run(scale, FIRST_SEED[scale])
        numbers |= {name: float(value) for name, value in found.numbers.items()}
        cells += [
            {"arm": arm, "seed": seed, "value": float(value)}
            for arm, by_seed in found.values.items()
            for seed, value in by_seed.items()
        ]
    if claim.arms is not None:
        with tempfile.TemporaryDirectory(prefix="torchstone-claim-") as folder:
            cells += _compared(claim, claim.arms, scale, Path(folder) if out is None else out, jobs, say)
    values = _values(cells)
    numbers |= _differences(claim, values)
    verdict, gates = decide_claim(claim, numbers, values)
    kept = None if scale == "quick" else verdict
    return Outcome(claim, scale, kept, gates, numbers, cells, time.perf_counter() - began)


def _compared(
    claim: Claim, arms: Arms, scale: Scale, out: Path, jobs: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Cells of the claim's arms: those that are controls alone under fewer seeds than the rest, shifted ones under
    others."""
    setting = arms.settings.get(scale)
    if setting is None:
        raise TorchstoneError(f"claim {claim.id}: has no scale {scale}; it has {', '.join(arms.settings)}")
    controls = {arm for gate in claim.gates for arm in gate.control_arms}
    controls -= {arm for gate in claim.gates if isinstance(gate, Effect) for arm in (gate.arm, gate.against)}
    main = [name for name in arms.patches if name not in controls]
    first = FIRST_SEED[scale]
    groups = [(main, setting.seeds, 0, "main")]
    groups += [([n for n in arms.patches if n in controls - set(arms.shifted)], setting.control_seeds, 0, "controls")]
    groups += [
        ([n for n in arms.patches if n in controls & set(arms.shifted)], setting.control_seeds, _SHIFT, "shifted")
    ]
    cells: list[dict[str, Any]] = []
    for names, count, shift, where in groups:
        if not names:
            continue
        seeds = tuple(range(first + shift, first + shift + count))
        for arm in _train(arms, names, setting, seeds, out / where, jobs, say):
            for seed, cell in sorted(arm.cells[1.0].items()):
                value = cell.get("metrics", {}).get(arms.metric)
                done = cell.get("status") == "done" and isinstance(value, int | float)
                cells.append(
                    {
                        "arm": arm.name,
                        "seed": seed,
                        "value": value if done else math.inf,
                        "metric": arms.metric,
                        "status": cell.get("status"),
                        "recipe": cell.get("recipe"),
                        "corpus": cell.get("corpus"),
                        "loss_digest": cell.get("loss_digest"),
                        "seconds": round(float(cell.get("seconds") or 0.0), 3),
                        "threads": cell.get("threads"),
                        "tuned": arm.tuned,
                        **({"shifted": True} if shift else {}),
                    }
                )
    return cells


def _train(
    arms: Arms,
    names: list[str],
    setting: Setting,
    seeds: tuple[int, ...],
    out: Path,
    jobs: int,
    say: Callable[[str], None],
) -> tuple[Arm, ...]:
    recipe = _with(arms.recipe, setting.patch)
    for module in arms.imports:
        importlib.import_module(module)
    variants = [from_patch(name, recipe, dict(arms.patches[name])) for name in names]
    options = Options(seeds=seeds, jobs=jobs, tune=setting.tune, imports=arms.imports)
    made = train_variants(variants, out, options, say)
    assert not isinstance(made, Estimate)
    return tuple(made[1])


def recipe_of(claim: Claim, scale: Scale, arm: str, tuned: Mapping[str, Any] | None) -> Recipe:
    """The recipe of an arm at a scale, at the value that tuning chose."""
    assert claim.arms is not None
    body = _with(claim.arms.recipe, claim.arms.settings[scale].patch)
    for module in claim.arms.imports:
        importlib.import_module(module)
    recipe = from_patch(arm, body, dict(claim.arms.patches[arm])).recipe
    return recipe if tuned is None else recipe.override(parse_override(f"{tuned['field']}={tuned['choice']!r}"))


def _with(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """Nested plain data with a nested patch laid over it."""
    out = dict(base)
    for name, value in patch.items():
        old = out.get(name)
        out[name] = _with(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out


def _values(cells: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Arm -> values in the order of its seeds."""
    found: dict[str, list[float]] = {}
    for cell in sorted(cells, key=lambda cell: cell["seed"]):
        found.setdefault(cell["arm"], []).append(float(cell["value"]))
    return found


def _differences(claim: Claim, values: Mapping[str, list[float]]) -> dict[str, float]:
    """Means of the arms, and of the differences that the gates look at."""
    found = {f"{arm}": sum(x) / len(x) for arm, x in values.items() if x}
    for gate in claim.gates:
        if isinstance(gate, Effect):
            d = gate.differences(values, gate.arm)
            found[f"{gate.arm} - {gate.against}"] = sum(d) / len(d) if d else math.nan
    return {name: value for name, value in found.items() if math.isfinite(value)}


# ------------------------------------------------------------------------------------------------------------- evidence


def record(paper: Paper, outcomes: list[Outcome]) -> Path:
    """Write evidence of claims, beside that of the paper's other claims.

    Raises:
        TorchstoneError: a quick look, which is no evidence; fewer than five seeds of an arm that a gate needs.
    """
    for outcome in outcomes:
        if outcome.scale == "quick":
            raise TorchstoneError(f"claim {outcome.claim.id}: a quick look is no evidence; use --scale evidence")
        for gate in outcome.claim.gates:
            if isinstance(gate, Effect):
                for arm in (gate.arm, gate.against):
                    count = sum(cell["arm"] == arm for cell in outcome.cells)
                    if count < 5:
                        raise TorchstoneError(f"claim {outcome.claim.id}: {arm} has {count} seeds; evidence needs 5")
    path = EVIDENCE / f"{paper.slug}.json"
    kept = read_evidence(paper.slug)
    for outcome in outcomes:
        kept[outcome.claim.id] = {
            "scale": outcome.scale,
            "verdict": outcome.verdict,
            "gates": outcome.gates,
            "numbers": outcome.numbers,
            "cells": [_finite(cell) for cell in outcome.cells],
            "seconds": round(outcome.seconds, 1),
            "claim": claim_hash(outcome.claim),
            "sources": sources(outcome.claim),
            "commit": _commit(),
            "machine": {
                "torch": torch.__version__,
                "python": sys.version.split()[0],
                "cpu": torch.backends.cpu.get_cpu_capability(),
                "system": platform.system(),
            },
        }
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"format": FORMAT, "slug": paper.slug, "claims": kept})
    return path


def _finite(cell: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: what diverged is kept as null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in cell.items()
    }


def read_evidence(slug: str) -> dict[str, dict[str, Any]]:
    """Claim -> what was recorded of it; empty if nothing was."""
    path = EVIDENCE / f"{slug}.json"
    if not path.is_file():
        return {}
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("claims"), dict):
        raise TorchstoneError(f"{path}: no evidence")
    return dict(data["claims"])


def evidence_of(claim: Claim, kept: Mapping[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """The verdict computed anew from the numbers and cells of a record."""
    cells = [{**cell, "value": math.inf if cell["value"] is None else cell["value"]} for cell in kept["cells"]]
    return decide_claim(claim, kept["numbers"], _values(cells))


def status(claim: Claim, kept: Mapping[str, Any] | None) -> str:
    """How a table shows a claim: its verdict, "stale" or "not measured"."""
    if kept is None:
        return "not measured"
    return "stale" if stale(claim, kept) else str(kept["verdict"])


def stale(claim: Claim, kept: Mapping[str, Any]) -> list[str]:
    """What has changed since the evidence was recorded: the claim itself, or the source of a part that it built."""
    changed = ["the claim"] if kept["claim"] != claim_hash(claim) else []
    now, then = sources(claim), kept.get("confirmed", kept)["sources"]
    return changed + sorted(name for name in {*now, *then} if now.get(name) != then.get(name))


def confirm(slug: str, claim: Claim, how: str) -> None:
    """Note beside a record that today's sources compute what those of its commit did, and how that was seen."""
    kept = read_evidence(slug)
    kept[claim.id]["confirmed"] = {"by": how, "commit": _commit(), "sources": sources(claim)}
    write_json(EVIDENCE / f"{slug}.json", {"format": FORMAT, "slug": slug, "claims": kept})


def claim_hash(claim: Claim) -> str:
    """SHA-256 of everything that a claim declares, its function's source included."""
    arms = None if claim.arms is None else repr(claim.arms)
    code = "" if claim.run is None else inspect.getsource(inspect.unwrap(claim.run))
    body = [claim.id, claim.kind, claim.text, claim.figure, repr(claim.gates), arms, code]
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()


def sources(claim: Claim) -> dict[str, str]:
    """Module -> SHA-256 of its file, for every kind that a claim's recipes name or their stacks place, with the kinds
    that it derives from, and every module that the claim's function names."""
    modules = set(getattr(claim.run, "builds", ()))
    for family, kind in _kinds(claim):
        # up to the root of the family, which computes nothing
        line = itertools.takewhile(lambda base: "family" not in vars(base), resolve(family, kind).__mro__)
        modules |= {base.__module__ for base in line}
    # a kind that a claim's own file defines is part of the claim
    return {name: _digest(name) for name in sorted(modules) if not name.startswith("torchstone.papers.")}


def _kinds(claim: Claim) -> Iterator[tuple[str, str]]:
    """(family, kind) of every part in the recipes of a claim's arms."""
    from torchstone.model.transformer import TransformerSpec
    from torchstone.spec import PartSpec, Spec

    def walk(value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, PartSpec):
            yield value.family, value.kind
        if isinstance(value, Spec):
            for name in type(value).model_fields:
                yield from walk(getattr(value, name))

    if claim.arms is not None:
        for module in claim.arms.imports:
            importlib.import_module(module)
        for patch in claim.arms.patches.values():
            recipe = from_patch("arm", dict(claim.arms.recipe), dict(patch)).recipe
            for part in (recipe.model, recipe.optimizer, recipe.objective, recipe.data):
                yield from walk(part)
            if isinstance(recipe.model, TransformerSpec):
                for side in ("encoder", "decoder"):
                    for layer in recipe.model.placed(side):
                        yield from walk(layer)


def _digest(module: str) -> str:
    file = importlib.import_module(module).__file__
    assert file is not None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _commit() -> str | None:
    """The commit of this source, if it is a repository; with a plus if files of the package, evidence aside, differ."""
    root = Path(__file__).parents[3]
    try:
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--", "src", ":!src/torchstone/papers/evidence"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")

"""`compare`: variants times seeds, trained under the same conditions, and what that allows to say.

OUT/comparison.json   what is compared; another comparison is refused
OUT/probe/            cost of each variant, measured before anything else
OUT/tune/             cells of the grid, on seeds of their own
OUT/cells/            variant / steps / seed: a run and its result.json
OUT/results.json, report.html, *.png
"""

from __future__ import annotations

import fcntl
import math
import numbers as numbers_abc
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchstone.compare.cell import finished, sized
from torchstone.compare.cost import Estimate, cut_to, estimate, probe_all, same_time
from torchstone.compare.decide import LEAST_SEEDS
from torchstone.compare.match import match
from torchstone.compare.options import Options
from torchstone.compare.pool import run_all, run_on_ray
from torchstone.compare.report import html_page, plots
from torchstone.compare.result import Arm, Metric, Result
from torchstone.compare.variants import Variant
from torchstone.errors import TorchstoneError, nearest
from torchstone.files import full_disk, read_json, write_bytes, write_json
from torchstone.recipe import Recipe, parse_override
from torchstone.train.environment import choose_device, choose_precision, choose_threads, environment

__all__ = [
    "Estimate",
    "Options",
    "compare_functions",
    "compare_recipes",
    "locked",
    "run_cells",
    "settled",
    "train_variants",
]

_TUNING_SEEDS = 500_000
"""First seed of tuning: no report uses it."""
_EXTENSIONS = 2


def compare_recipes(
    variants: Sequence[Variant], out: str | Path, options: Options, say: Callable[[str], None] | None = None
) -> Result | Estimate:
    """Train every variant under every seed and compare.

    Cells that were finished before are not trained again. A cell that diverges, or whose process dies twice, is a
    result: it is reported, and its variant gets no verdict.

    Returns:
        the result; with ``dry_run`` the estimate.

    Raises:
        TorchstoneError: fewer than two variants, two of one name, a variant that cannot be matched or built, a folder
            that holds another comparison or in which one is at work, a budget too small.
    """
    _check(variants, options)
    made = train_variants(variants, out, options, say)
    if isinstance(made, Estimate):
        return made
    folder, arms, variants = made
    metric = options.metric or _metric(arms, options)
    known = {name for arm in arms for cells in arm.cells.values() for c in cells.values() for name in c["metrics"]}
    if known and metric.name not in known:
        names = ", ".join(sorted(known))
        raise TorchstoneError(
            f"compare: no cell measured {metric.name!r}{nearest(metric.name, known)}; there are {names}"
        )
    result = Result(
        tuple(arms),
        metric,
        tuple(sorted(options.seeds)),
        tuple(sorted(options.budgets)),
        options.margin,
        _facts(variants, options),
    )
    write_json(folder / "results.json", result.to_dict())
    write_bytes(folder / "report.html", html_page(result).encode())
    plots(result, folder)
    return result


def train_variants(
    variants: Sequence[Variant], out: str | Path, options: Options, say: Callable[[str], None] | None = None
) -> tuple[Path, list[Arm], list[Variant]] | Estimate:
    """What `compare_recipes` does before it compares; one variant is enough.

    Returns:
        the folder, the arms with their cells, and the variants as matching and tuning left them; with ``dry_run`` the
        estimate.
    """
    say = say or (lambda text: print(text, file=sys.stderr, flush=True))
    variants = list(variants)
    if options.match in ("parameters", "flops"):
        variants = match([replace(v, recipe=sized(v.recipe)) for v in variants], options.match, options.tolerance)
    variants = [replace(v, recipe=settled(v.recipe)) for v in variants]
    folder = Path(out)
    with locked(folder):
        _claim(folder, variants, options)
        for description in dict.fromkeys(_prepare(variant.recipe) for variant in variants):
            say(description)
        probes = probe_all(folder, variants, options.imports, say)
        if options.match == "wall":
            variants = same_time(variants, probes)
        expected = estimate(variants, probes, options)
        if options.budget is not None and expected.seconds > options.budget:
            variants, expected = cut_to(variants, probes, options)
            steps = variants[0].recipe.trainer.steps
            say(f"--budget: {steps} steps instead of {_steps_before(folder)}")
        say(str(expected))
        if options.dry_run:
            return expected
        tuned: dict[str, dict[str, Any]] = {}
        if options.tune is not None:
            variants, tuned = _tune(folder, variants, options, say)
        return folder, _cells(folder, variants, probes, tuned, options, say), variants


def compare_functions(
    functions: Mapping[str, Callable[[int], Mapping[str, float]]],
    seeds: Sequence[int],
    metric: Metric | None = None,
    margin: float = 0.005,
) -> Result:
    """Compare functions from a seed to metrics: a user's own training script gets the same seeds and the same rule.

    Raises:
        TorchstoneError: fewer than two, or one that gives no such metric.
    """
    if len(functions) < 2:
        raise TorchstoneError("compare: needs two variants or more")
    _check_seeds(seeds)
    if not 0 <= margin < 1:
        raise TorchstoneError(f"compare: margin is a share from 0 to 1, got {margin}")
    arms = []
    for name, function in functions.items():
        cells = {}
        for seed in sorted(seeds):
            began = time.perf_counter()
            found = function(seed)
            numbers = isinstance(found, Mapping) and all(isinstance(x, numbers_abc.Real) for x in found.values())
            if not numbers or not found:
                raise TorchstoneError(f"{name}: seed {seed} gave {found!r:.80}; a variant gives a mapping of numbers")
            metrics = {key: float(value) for key, value in found.items()}
            bad = [key for key, value in metrics.items() if not math.isfinite(value)]
            status, reason = ("diverged", f"{bad[0]} is not finite") if bad else ("done", None)
            seconds = time.perf_counter() - began
            cells[int(seed)] = {
                "status": status,
                "reason": reason,
                "metrics": metrics,
                "seconds": seconds,
                "seed": seed,
            }
        arms.append(Arm(name, cells={1.0: cells}))
    first = next(iter(arms[0].cells[1.0].values()))["metrics"]
    metric = metric or Metric(next(iter(first), ""))
    for arm in arms:
        for seed, cell in arm.cells[1.0].items():
            if metric.name not in cell["metrics"]:
                given = ", ".join(cell["metrics"]) or "nothing"
                raise TorchstoneError(f"{arm.name}: seed {seed} gave no {metric.name!r}, but {given}")
    return Result(tuple(arms), metric, tuple(sorted(int(seed) for seed in seeds)), margin=margin)


# ------------------------------------------------------------------------------------------------------ before training


def _check(variants: Sequence[Variant], options: Options) -> None:
    if len(variants) < 2:
        raise TorchstoneError("compare: needs two variants or more")
    names = [variant.name for variant in variants]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise TorchstoneError(f"compare: two variants are called {twice}")
    _check_seeds(options.seeds)
    if options.jobs < 1 or options.tuning_seeds < 1:
        raise TorchstoneError("compare: --jobs and --tuning-seeds are 1 or more")
    if not 0 <= options.margin < 1:
        raise TorchstoneError(f"compare: --margin is a share from 0 to 1, got {options.margin}")
    if options.budget is not None and len(options.seeds) < LEAST_SEEDS:
        raise TorchstoneError(f"compare: --budget cuts steps, never seeds, and a verdict needs {LEAST_SEEDS} seeds")
    if not options.budgets or min(options.budgets) <= 0:
        raise TorchstoneError("compare: --budgets are factors above zero")
    for variant in variants:
        steps = [max(1, round(variant.recipe.trainer.steps * factor)) for factor in options.budgets]
        if len(set(steps)) != len(steps):
            raise TorchstoneError(f"compare: two of --budgets come to the same number of steps ({min(steps)})")


def _check_seeds(seeds: Sequence[int]) -> None:
    if not seeds or len(set(seeds)) != len(seeds):
        raise TorchstoneError("compare: needs seeds, each once")


def settled(recipe: Recipe) -> Recipe:
    """The recipe with what it leaves to the machine filled in, so that every cell has the same; tested at the end."""
    trainer = recipe.trainer
    device = choose_device(trainer.device)
    patch = {
        "threads": choose_threads(trainer.threads),
        "precision": choose_precision(trainer.precision, device),
        "seed": 0,
        "tensorboard": False,
    }
    return recipe.override({"trainer": patch, "evaluate": {"test": True}})


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one comparison at work in a folder.

    Raises:
        TorchstoneError: another is.
    """
    if folder.is_file():
        raise TorchstoneError(f"{folder}: is a file, not a folder for a comparison")
    with full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 (held until the end)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TorchstoneError(f"{folder}: another comparison is at work there") from None
        yield
    finally:
        lock.close()


def _claim(folder: Path, variants: Sequence[Variant], options: Options) -> None:
    """Write down what is compared here, or find the same.

    Raises:
        TorchstoneError: another comparison, or something else, lies there.
    """
    path = folder / "comparison.json"
    mine = {
        "variants": {variant.name: variant.recipe.dump() for variant in variants},
        "match": options.match,
        "tune": None if options.tune is None else [options.tune[0], list(options.tune[1])],
    }
    if path.is_file():
        before = read_json(path)
        if before != mine:
            raise TorchstoneError(f"{folder}: holds another comparison; choose another --out")
        return
    others = [entry.name for entry in folder.iterdir() if entry.name != ".lock"]
    if others:
        raise TorchstoneError(f"{folder}: exists and is no comparison (it holds {min(others)}); choose another --out")
    write_json(path, mine)


def _steps_before(folder: Path) -> int:
    body = read_json(folder / "comparison.json")
    return int(next(iter(body["variants"].values()))["trainer"]["steps"])


def _prepare(recipe: Recipe) -> str:
    """Make the data once, before workers ask for it; its description."""
    prepared: Any = recipe.data.prepare()
    return str(prepared.description)


# ------------------------------------------------------------------------------------------------------------- training


def _seeded(recipe: Recipe, seed: int, factor: float = 1.0) -> Recipe:
    steps = max(1, round(recipe.trainer.steps * factor))
    return recipe.override({"trainer": {"seed": seed, "steps": steps}})


def run_cells(
    wanted: Sequence[tuple[str, Recipe, Path]], options: Options, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Results of cells, those that were finished before without training."""
    results: list[dict[str, Any] | None] = [finished(folder, recipe) for _, recipe, folder in wanted]
    todo = [number for number, result in enumerate(results) if result is None]
    requests = [
        {
            "do": "train",
            "imports": list(options.imports),
            "recipe": wanted[number][1].dump(),
            "folder": str(wanted[number][2].resolve()),
        }
        for number in todo
    ]
    if options.ray and requests:
        accelerated = choose_device(wanted[0][1].trainer.device).type == "cuda"
        answers = run_on_ray(requests, wanted[0][1].trainer.threads or 1, int(accelerated))
    else:
        devices = [str(i) for i in range(torch.cuda.device_count())] if options.jobs > 1 else []
        answers = run_all(requests, options.jobs, devices=devices)
    began = time.perf_counter()
    for count, (position, answer) in enumerate(answers, 1):
        number = todo[position]
        name, recipe, _ = wanted[number]
        answer.setdefault("seed", recipe.trainer.seed)
        answer.setdefault("metrics", {})
        results[number] = answer
        left = (time.perf_counter() - began) / count * (len(todo) - count)
        value = next(
            (
                f"{key} {answer['metrics'][key]:.4f}"
                for key in ("test_accuracy", "test_bits_per_byte", "test_loss")
                if key in answer["metrics"]
            ),
            answer["status"],
        )
        if answer["status"] != "done":
            value = f"{answer['status']} ({answer.get('reason')})"
        say(f"cell {count}/{len(todo)}: {name}: {value}; about {left / 60:.1f} minutes left")
    return [result for result in results if result is not None]


def _cells(
    folder: Path,
    variants: Sequence[Variant],
    probes: Mapping[str, dict[str, Any]],
    tuned: Mapping[str, dict[str, Any]],
    options: Options,
    say: Callable[[str], None],
) -> list[Arm]:
    """Every cell, seed by seed, so that an interrupted comparison has whole pairs."""
    arms = [
        Arm(variant.name, variant.patch, variant.notes, {}, probes[variant.name], tuned.get(variant.name))
        for variant in variants
    ]
    wanted, places = [], []
    for factor in sorted(options.budgets):
        for seed in options.seeds:
            for arm, variant in zip(arms, variants, strict=True):
                probe = probes[variant.name]
                if "seconds_per_step" not in probe:
                    fits = probe.get("fits")
                    reason = f"{probe.get('reason')}; " + (f"batch {fits} would fit" if fits else "no batch would fit")
                    arm.cells.setdefault(factor, {})[seed] = {
                        "status": probe.get("status", "memory"),
                        "reason": reason,
                        "metrics": {},
                        "seed": seed,
                    }
                    continue
                recipe = _seeded(variant.recipe, seed, factor)
                path = folder / "cells" / variant.folder / f"steps-{recipe.trainer.steps}" / f"seed-{seed}"
                wanted.append((f"{variant.name} seed {seed}", recipe, path))
                places.append((arm, factor, seed))
    for (arm, factor, seed), result in zip(places, run_cells(wanted, options, say), strict=True):
        arm.cells.setdefault(factor, {})[seed] = result
    return arms


def _tune(
    folder: Path, variants: Sequence[Variant], options: Options, say: Callable[[str], None]
) -> tuple[list[Variant], dict[str, dict[str, Any]]]:
    """The variants, each at the best value of its grid by validation loss; an optimum at an edge extends the grid."""
    assert options.tune is not None
    path, grid = options.tune
    scores: dict[str, dict[float, float]] = {variant.name: {} for variant in variants}
    todo: dict[str, list[float]] = {variant.name: list(grid) for variant in variants}
    for extension in range(_EXTENSIONS + 1):
        wanted, places = [], []
        for variant in variants:
            for value in todo[variant.name]:
                recipe = _set(variant.recipe, path, value).override({"evaluate": {"test": False}})
                for seed in range(_TUNING_SEEDS, _TUNING_SEEDS + options.tuning_seeds):
                    where = folder / "tune" / variant.folder / f"{value:g}" / f"seed-{seed}"
                    wanted.append((f"{variant.name} {path}={value:g}", _seeded(recipe, seed), where))
                    places.append((variant.name, value))
        losses: dict[tuple[str, float], list[float]] = {}
        for place, result in zip(places, run_cells(wanted, options, say), strict=True):
            loss = result.get("valid_loss") if result.get("status") == "done" else None
            losses.setdefault(place, []).append(math.inf if loss is None else loss)
        for (name, value), found in losses.items():
            scores[name][value] = float(np.mean(found))
        todo = {name: _beyond(found) if extension < _EXTENSIONS else [] for name, found in scores.items()}
        if not any(todo.values()):
            break
    done: dict[str, dict[str, Any]] = {}
    chosen = []
    for variant in variants:
        by_value = dict(sorted(scores[variant.name].items()))
        if not any(math.isfinite(score) for score in by_value.values()):
            raise TorchstoneError(f"variant {variant.name}: diverged at every {path} of {list(by_value)}")
        choice = min(by_value, key=by_value.__getitem__)
        done[variant.name] = {
            "field": path,
            "grid": list(by_value),
            "scores": [score if math.isfinite(score) else None for score in by_value.values()],
            "choice": choice,
            "edge": choice in (min(by_value), max(by_value)),
            "seeds": list(range(_TUNING_SEEDS, _TUNING_SEEDS + options.tuning_seeds)),
        }
        chosen.append(replace(variant, recipe=_set(variant.recipe, path, choice)))
    return chosen, done


def _set(recipe: Recipe, path: str, value: float) -> Recipe:
    return recipe.override(parse_override(f"{path}={value!r}"))


def _beyond(scores: Mapping[float, float]) -> list[float]:
    """The next value beyond the edge at which the best one lies; none if it lies inside."""
    values = sorted(scores)
    best = min(values, key=lambda value: scores[value])
    if best == values[0]:
        return [values[0] ** 2 / values[1]]
    return [values[-1] ** 2 / values[-2]] if best == values[-1] else []


# -------------------------------------------------------------------------------------------------------------- results


def _metric(arms: Sequence[Arm], options: Options) -> Metric:
    """Bits per byte where the data are text, what a task measures where they are a task, else the loss."""
    names: set[str] = set()
    for arm in arms:
        for cell in arm.cells.get(max(options.budgets), {}).values():
            names |= set(cell.get("metrics", {}))
    if "test_accuracy" in names:
        return Metric("test_accuracy", lower_is_better=False)
    return Metric("test_bits_per_byte" if "test_bits_per_byte" in names else "test_loss")


def _facts(variants: Sequence[Variant], options: Options) -> dict[str, Any]:
    recipe = variants[0].recipe
    varied = {text.partition("=")[0].split(".")[0] for variant in variants for text in variant.patch}
    varied |= {text.partition("=")[0].removeprefix("model.").split(".")[0] for v in variants for text in v.patch}
    fixed = {
        "corpus": str(getattr(getattr(recipe.data, "corpus", None), "kind", recipe.data.kind)),
        "width": getattr(recipe.model, "width", None),
        "depth": getattr(recipe.model, "depth", None),
        "block": getattr(recipe.data, "block", None),
        "optimizer": recipe.optimizer.kind,
        "lr": recipe.optimizer.lr,
        "schedule": recipe.schedule.kind,
        "steps": recipe.trainer.steps,
        "batch": recipe.trainer.batch,
    }
    tune = None
    if options.tune is not None:
        values = ", ".join(f"{value:g}" for value in options.tune[1])
        tune = f"{options.tune[0]} over {values}, on seeds from {_TUNING_SEEDS}, by validation loss"
        varied.add(options.tune[0].rpartition(".")[2])
    device = choose_device(recipe.trainer.device)
    return {
        "steps": recipe.trainer.steps,
        "match": options.match,
        "tune": tune,
        "jobs": options.jobs,
        "not_varied": [f"{name} {value}" for name, value in fixed.items() if value is not None and name not in varied],
        "environment": environment(device, recipe.trainer.threads or os.cpu_count() or 1, recipe.trainer.compile, 1),
    }

"""What a comparison will cost: probes of each variant, the estimate, and steps cut to a budget or to equal time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchstone.compare.cell import sized
from torchstone.compare.decide import LEAST_SEEDS
from torchstone.compare.options import Options
from torchstone.compare.pool import run_all
from torchstone.compare.variants import Variant
from torchstone.errors import TorchstoneError
from torchstone.files import read_json, write_json
from torchstone.recipe import Recipe
from torchstone.train.environment import choose_device

__all__ = ["Estimate", "cut_to", "estimate", "probe_all", "same_time"]

_FEWEST_STEPS = 10


@dataclass
class Estimate:
    """What a comparison will cost."""

    cells: int
    tokens: int
    seconds: float
    peak_bytes: int
    disk_bytes: int

    def __str__(self) -> str:
        minutes = self.seconds / 60
        return (
            f"{self.cells} cells, {self.tokens:,} tokens, about {minutes:,.1f} minutes, "
            f"{self.peak_bytes / 2**30:.2f} GiB of memory, {self.disk_bytes / 2**30:.2f} GiB of disk"
        )


def probe_all(
    folder: Path, variants: Sequence[Variant], imports: Sequence[str], say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """What each variant costs, each in a process of its own with nothing beside it."""
    found: dict[str, dict[str, Any]] = {}
    todo = []
    for variant in variants:
        path = folder / "probe" / f"{variant.folder}.json"
        kept = read_json(path) if path.is_file() else None
        if isinstance(kept, dict) and kept.get("recipe") == variant.recipe.hash():
            found[variant.name] = kept
        else:
            todo.append(variant)
    if todo:
        say(f"probing {len(todo)} variants")
    requests = [{"do": "probe", "imports": list(imports), "recipe": variant.recipe.dump()} for variant in todo]
    for number, answer in run_all(requests, fresh=True):
        variant = todo[number]
        if answer.get("status") == "refused":
            raise TorchstoneError(f"variant {variant.name}: {answer['reason']}")
        if "seconds_per_step" not in answer:
            answer["fits"] = _batch_that_fits(variant.recipe)
        found[variant.name] = {**answer, "recipe": variant.recipe.hash()}
        path = folder / "probe" / f"{variant.folder}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, found[variant.name])
    return found


def _batch_that_fits(recipe: Recipe) -> int | None:
    """The largest batch, halving the recipe's, whose predicted memory is below the machine's."""
    from torchstone.train.memory import training_memory
    from torchstone.train.run import memory_of

    there = memory_of(choose_device(recipe.trainer.device))
    recipe, batch = sized(recipe), recipe.trainer.batch
    while there is not None and batch > 1:
        batch //= 2
        if training_memory(recipe.override({"trainer": {"batch": batch}})).peak < there:
            return batch
    return None


def _seconds(variant: Variant, probe: Mapping[str, Any], factor: float, test: bool) -> float:
    """Of one cell."""
    if "seconds_per_step" not in probe:
        return 0.0
    steps = variant.recipe.trainer.steps * factor
    blocks = (steps // variant.recipe.evaluate.every + 2) * probe["valid_blocks"] + test * probe["test_blocks"]
    return probe["startup_seconds"] + steps * probe["seconds_per_step"] + blocks * probe["seconds_per_block"]


def estimate(variants: Sequence[Variant], probes: Mapping[str, Mapping[str, Any]], options: Options) -> Estimate:
    seconds, tokens, cells = 0.0, 0.0, 0
    grid = len(options.tune[1]) * options.tuning_seeds if options.tune else 0
    for variant in variants:
        trainer = variant.recipe.trainer
        each = trainer.batch * trainer.accumulate * getattr(variant.recipe.data, "block", 1) * trainer.steps
        for factor, count, test in [(1.0, grid, False), *((b, len(options.seeds), True) for b in options.budgets)]:
            seconds += count * _seconds(variant, probes[variant.name], factor, test)
            tokens += count * each * factor
            cells += count
    peak = max((int(probe.get("peak_bytes", 0)) for probe in probes.values()), default=0)
    each_cell = max((int(probe.get("disk_bytes", 0)) for probe in probes.values()), default=0)
    state = max((int(probe.get("state_bytes", 0)) for probe in probes.values()), default=0)
    disk = each_cell * cells + state * options.jobs  # weights stay, checkpoints go when a cell is done
    return Estimate(cells, int(tokens), seconds / max(1, options.jobs), peak * options.jobs, disk)


def cut_to(
    variants: Sequence[Variant], probes: Mapping[str, Mapping[str, Any]], options: Options
) -> tuple[list[Variant], Estimate]:
    """The variants with fewer steps, in proportion, so that the whole fits the budget."""
    assert options.budget is not None
    most = min(variant.recipe.trainer.steps for variant in variants)
    floor = max(_FEWEST_STEPS, *(variant.recipe.schedule.warmup + 1 for variant in variants))

    def at(steps: int) -> list[Variant]:
        return [
            replace(
                variant,
                recipe=variant.recipe.override(
                    {"trainer": {"steps": max(floor, round(variant.recipe.trainer.steps * steps / most))}}
                ),
            )
            for variant in variants
        ]

    low, high = floor, most
    least = estimate(at(low), probes, options)
    if least.seconds > options.budget:
        raise TorchstoneError(
            f"compare: --budget of {options.budget / 60:.1f} minutes is too small: {least.cells} cells of {floor} "
            f"steps take about {least.seconds / 60:.1f}; take fewer variants, or at least {LEAST_SEEDS} seeds"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if estimate(at(middle), probes, options).seconds <= options.budget else (low, middle)
    return at(low), estimate(at(low), probes, options)


def same_time(variants: Sequence[Variant], probes: Mapping[str, Mapping[str, Any]]) -> list[Variant]:
    """Steps of each variant set so that all take the time of the first."""
    if any("seconds_per_step" not in probes[variant.name] for variant in variants):
        raise TorchstoneError("compare: --match wall needs every variant to run here")
    first = variants[0].recipe.trainer.steps * probes[variants[0].name]["seconds_per_step"]
    found = [variants[0]]
    for variant in variants[1:]:
        steps = max(1, round(first / probes[variant.name]["seconds_per_step"]))
        recipe = variant.recipe.override({"trainer": {"steps": steps}})
        found.append(replace(variant, recipe=recipe, notes=(*variant.notes, f"--match wall: {steps} steps")))
    return found

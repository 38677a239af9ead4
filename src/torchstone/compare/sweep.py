"""Trainings for scaling laws: read from runs and files, or swept over budgets and sizes.

OUT/sweep.json                     the recipe that is swept; another one is refused
OUT/cells/SIZE-BUDGET.../seed-N    a run and its result.json, as in a comparison
OUT/scaling.json, *.png            what was fitted
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from torchstone.compare.cell import sized
from torchstone.compare.matrix import locked, run_cells, settled
from torchstone.compare.options import Options
from torchstone.errors import TorchstoneError
from torchstone.evaluate.records import Record, read_records
from torchstone.evaluate.scaling import FEWEST, Point, flops_without_embedding
from torchstone.files import read_json, write_json
from torchstone.recipe import Recipe
from torchstone.train.run import RunFolder, shape_of

__all__ = ["Grid", "Size", "point_of", "read_points", "sizes_of", "sweep"]

FEWEST_STEPS = 20
"""Of a training: fewer would miss their budget by more than 2.5 %."""


# ------------------------------------------------------------------------------------------------------------- reading


def point_of(run: RunFolder) -> Point | None:
    """What a run is to a scaling law; None if it has not come to its end.

    Raises:
        TorchstoneError: its data have no blocks of tokens.
    """
    recipe, rows = run.recipe, run.metrics()
    if max((row["step"] for row in rows), default=0) < recipe.trainer.steps:
        return None
    measured = [
        (row[name], f"{split} {words}")
        for split in ("test", "valid")
        for key, words in (("bits_per_byte", "bits per byte"), ("loss", "nats per token"))
        for row in reversed(rows)
        if row.get(name := f"{split}_{key}") is not None
    ]
    if not measured:
        return None
    block = getattr(recipe.data, "block", None)
    if block is None:
        raise TorchstoneError(f"{run.path}: its data ({recipe.data.kind}) have no blocks of tokens to count")
    batch = recipe.trainer.batch * recipe.trainer.accumulate * recipe.parallel.data * block
    loss, unit = measured[0]
    size = flops_without_embedding(shape_of(recipe.model), block)
    return Point(size, recipe.trainer.steps * batch, loss, recipe.optimizer.lr, batch, unit, str(run.path))


def read_points(sources: Iterable[str | Path], say: Callable[[str], None] | None = None) -> list[Point]:
    """Trainings of run directories, of folders that hold runs (a comparison's, a sweep's), and of files of JSON
    objects, one a line, with the fields of `Point` (`compute` may stand for one of its factors).

    Runs that have not come to their end are left out, and `say` is told so.

    Raises:
        TorchstoneError: a source is missing or holds no training, or a record lacks a number.
    """
    say = say or (lambda text: print(text, file=sys.stderr))
    found: list[Point] = []
    for source in map(Path, sources):
        if not source.is_dir():
            found += [_point_of(record) for record in read_records(str(source))]
            continue
        # what tuned a comparison was measured on another split
        inside = source / "cells" if (source / "cells").is_dir() else source
        runs = [RunFolder(path.parent) for path in sorted(inside.rglob("recipe.yaml"))]
        runs = [run for run in runs if run.exists()]
        if not runs:
            raise TorchstoneError(f"{source}: neither a run nor a folder that holds runs")
        for run in runs:
            point = point_of(run)
            if point is None:
                say(f"{run.path}: left out, it has not come to its end")
            else:
                found.append(point)
    return found


def _point_of(record: Record) -> Point:
    numbers: dict[str, float] = {}
    for name in ("compute", "flops_per_token", "tokens", "loss", "lr", "batch"):
        value = record.fields.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
            raise TorchstoneError(f"{record.where}: {name} must be a number above zero, got {str(value)[:40]!r}")
        numbers[name] = float(value)
    compute = numbers.pop("compute", None)
    for name, other in (("flops_per_token", "tokens"), ("tokens", "flops_per_token")):
        if name not in numbers and compute is not None and other in numbers:
            numbers[name] = compute / numbers[other]
    missing = [name for name in ("flops_per_token", "tokens", "loss") if name not in numbers]
    if missing:
        raise TorchstoneError(f"{record.where}: has no {' and no '.join(missing)}")
    return Point(**numbers, unit=str(record.fields.get("unit", "loss")), name=record.where)


# --------------------------------------------------------------------------------------------------------------- sweep


@dataclass(frozen=True)
class Size:
    """A width, and a depth unless that of the recipe stays."""

    width: int
    depth: int | None = None

    def __str__(self) -> str:
        return str(self.width) if self.depth is None else f"{self.width}x{self.depth}"


def sizes_of(text: str) -> tuple[Size, ...]:
    """``32x2,48x2,64`` as widths and depths.

    Raises:
        TorchstoneError: something else, or fewer than three.
    """
    found = []
    for part in text.split(","):
        read = re.fullmatch(r"\s*([1-9][0-9]{0,6})(?:x([1-9][0-9]{0,4}))?\s*", part)
        if read is None:
            raise TorchstoneError(f"--sizes: needs WIDTH or WIDTHxDEPTH, as in 32x2,48x2,64x3; got {part!r}")
        found.append(Size(int(read[1]), int(read[2]) if read[2] else None))
    if len(set(found)) < 3:
        raise TorchstoneError(f"--sizes: needs three sizes or more, got {text!r}")
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Grid:
    """What is swept: every budget with every size, learning rate, batch and seed.

    Attributes:
        budgets: operations without embedding and head; the largest is held out of fits.
        sizes: of the model; a feed-forward width that the recipe sets goes with the width, heads stay.
        lrs: peak learning rates; empty keeps the recipe's.
        batches: sequences in a micro-batch; empty keeps the recipe's.
        seeds: losses are averaged over them.
    """

    budgets: tuple[float, ...]
    sizes: tuple[Size, ...]
    lrs: tuple[float, ...] = ()
    batches: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0,)


def sweep(
    recipe: Recipe,
    grid: Grid,
    out: str | Path,
    jobs: int = 1,
    say: Callable[[str], None] | None = None,
    imports: Sequence[str] = (),
) -> list[Point]:
    """Train every cell of a grid, each for the steps that its budget pays for; cells that were finished before are not
    trained again, and cells that diverge are left out.

    Args:
        recipe: what is swept.
        grid: over what.
        out: the sweep's folder, in which it can be continued.
        jobs: cells at once.
        say: takes lines of progress.
        imports: modules that workers import first.

    Raises:
        TorchstoneError: a size that cannot be built, a budget that pays for too few steps, a folder that holds
            something else; nothing is then written.
    """
    say = say or (lambda text: print(text, file=sys.stderr, flush=True))
    recipe, folder = settled(recipe), Path(out)
    cells = _cells(recipe, grid)
    _check_folder(folder, recipe)
    wanted = [
        (f"{name} seed {seed}", cell.override({"trainer": {"seed": seed}}), folder / "cells" / name / f"seed-{seed}")
        for name, cell in cells.items()
        for seed in grid.seeds
    ]
    with locked(folder):
        write_json(folder / "sweep.json", {"recipe": recipe.dump()})
        results = run_cells(wanted, Options(jobs=jobs, imports=tuple(imports)), say)
    refused = next((result["reason"] for result in results if result["status"] == "refused"), None)
    if refused is not None:
        raise TorchstoneError(str(refused))
    found = []
    for (name, _, where), result in zip(wanted, results, strict=True):
        point = point_of(RunFolder(where / "run")) if result["status"] == "done" else None
        if point is None:
            say(f"{name}: left out, {result['status']} ({result.get('reason')})")
        else:
            found.append(point)
    return found


def _check_folder(folder: Path, recipe: Recipe) -> None:
    if (folder / "sweep.json").is_file():
        if read_json(folder / "sweep.json") != {"recipe": recipe.dump()}:
            raise TorchstoneError(f"{folder}: holds a sweep of another recipe; choose another --out")
    elif folder.is_dir() and (others := [entry.name for entry in folder.iterdir() if entry.name != ".lock"]):
        raise TorchstoneError(f"{folder}: exists and is no sweep (it holds {min(others)}); choose another --out")


def _cells(recipe: Recipe, grid: Grid) -> dict[str, Recipe]:
    """The recipe of every cell but for its seed, by name."""
    budgets = sorted(set(grid.budgets))
    if len(budgets) <= FEWEST:
        raise TorchstoneError(f"--budgets: needs {FEWEST + 1} or more, the largest to be held out; got {len(budgets)}")
    near = next((low for low, high in pairwise(budgets) if high < 1.2 * low), None)
    if near is not None:
        raise TorchstoneError(f"--budgets: one and the next differ by a factor of 1.2 or more, {near:g} does not")
    cells: dict[str, Recipe] = {}
    for size in grid.sizes:
        model = sized(_resized(recipe, size))
        block = getattr(model.data, "block", None)
        if block is None:
            raise TorchstoneError(f"scale: the data of the recipe ({recipe.data.kind}) have no blocks of tokens")
        each = flops_without_embedding(shape_of(model.model), block)
        for budget, lr, rows in product(budgets, grid.lrs or (None,), grid.batches or (None,)):
            trainer = recipe.trainer
            batch = (rows or trainer.batch) * trainer.accumulate * recipe.parallel.data * block
            steps = round(budget / (each * batch))
            least = max(FEWEST_STEPS, recipe.schedule.warmup + 1)
            if steps < least:
                raise TorchstoneError(
                    f"--budgets: {budget:g} FLOPs are {steps} steps of size {size} ({each:.3g} FLOPs a token, "
                    f"{batch:,} tokens a step), and {least} are needed"
                )
            patch: dict[str, Any] = {"trainer": {"steps": steps}}
            name = f"{size}-{budget:g}"
            if lr is not None:
                patch["optimizer"], name = {"lr": lr}, f"{name}-lr{lr:g}"
            if rows is not None:
                patch["trainer"]["batch"], name = rows, f"{name}-batch{rows}"
            cells[name] = model.override(patch)
    return cells


def _resized(recipe: Recipe, size: Size) -> Recipe:
    before = getattr(recipe.model, "width", None)
    if before is None:
        raise TorchstoneError(f"scale: model {recipe.model.kind} has no width to sweep")
    model: dict[str, Any] = {"width": size.width}
    if size.depth is not None:
        model["depth"] = size.depth
    hidden = getattr(getattr(recipe.model, "ffn", None), "hidden", None)
    if hidden is not None:
        model["ffn"] = {"hidden": max(1, round(hidden * size.width / before))}
    try:
        return recipe.override({"model": model})
    except TorchstoneError as error:
        raise TorchstoneError(f"size {size}: {error}") from None

"""Run pieces of recorded evidence again and compare: `make evidence-check [CELLS=2]`.

Of the trained cells some are drawn, and as many of the claims that are functions; none that takes longer than two
minutes. Of a function each gate must answer as recorded, and a number that is gated from both sides must
agree to three digits. (What is gated from one side may be of the size of rounding, what is not gated a time.) Where
processor, torch and threads are those of the record, a cell's losses must agree bit for bit; elsewhere its value must
lie within 3 %.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from torchstone.compare.cell import run_cell
from torchstone.compare.matrix import settled
from torchstone.papers import find_paper, slugs
from torchstone.papers._claim import Claim, decide_claim
from torchstone.papers._reproduce import FIRST_SEED, read_evidence, recipe_of, stale

PATIENCE = 120
"""Seconds beyond which nothing is run again."""


def main() -> int:
    """Draw, run, compare; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=2)
    parser.add_argument("--draw", type=int, default=0, help="seed of the draw")
    options = parser.parse_args()
    cells: list[tuple[str, Claim, dict[str, Any], dict[str, Any]]] = []
    functions: list[tuple[str, Claim, dict[str, Any]]] = []
    for slug in slugs():
        kept = read_evidence(slug)
        for claim in find_paper(slug).claims:
            record = kept.get(claim.id)
            if record is None or stale(claim, record):
                continue
            if claim.run is not None and record["seconds"] <= PATIENCE:
                functions.append((slug, claim, record))
            trained = [cell for cell in record["cells"] if cell.get("recipe") and cell["status"] == "done"]
            cells += [(slug, claim, record, cell) for cell in trained if cell["seconds"] <= PATIENCE]
    draw = random.Random(options.draw)
    some = draw.sample(functions, min(options.cells, len(functions)))
    drawn = draw.sample(cells, min(options.cells, len(cells)))
    wrong = sum(not numbers_agree(*piece) for piece in some) + sum(not cell_agrees(*piece) for piece in drawn)
    print(f"{len(some)} of {len(functions)} functions and {len(drawn)} of {len(cells)} cells run again, {wrong} differ")
    return int(wrong > 0)


def numbers_agree(slug: str, claim: Claim, record: dict[str, Any]) -> bool:
    """Whether a function gives the answers of its record again."""
    assert claim.run is not None
    found = claim.run(record["scale"], FIRST_SEED[record["scale"]])
    values = {arm: list(by_seed.values()) for arm, by_seed in found.values.items()}
    rows = decide_claim(claim, found.numbers, values)[1]
    off = [row["gate"] for row, old in zip(rows, record["gates"], strict=True) if row["answer"] != old["answer"]]
    for row in rows:
        name = row["gate"]
        if {"low", "high"} <= row.keys() and not math.isclose(
            found.numbers[name], record["numbers"][name], rel_tol=1e-3
        ):
            off.append(name)
    print(f"{slug} {claim.id}: {'agrees' if not off else f'does not agree: {off}'}", flush=True)
    return not off


def cell_agrees(slug: str, claim: Claim, record: dict[str, Any], cell: dict[str, Any]) -> bool:
    """Whether a cell gives its recorded losses again."""
    recipe = settled(recipe_of(claim, record["scale"], cell["arm"], cell["tuned"])).override(
        {"trainer": {"seed": cell["seed"], "threads": cell["threads"]}}
    )
    name = f"{slug} {claim.id} {cell['arm']} seed {cell['seed']}"
    if recipe.hash() != cell["recipe"]:  # a field that came since then, at a value that must change nothing
        print(f"{name}: its recipe has other fields than the recorded one")
    with tempfile.TemporaryDirectory() as folder:
        found = run_cell(recipe, Path(folder))
    if found["corpus"] != cell["corpus"]:
        print(f"{name}: another corpus than the recorded one; not compared")
        return True
    value = found["metrics"][cell["metric"]]
    here = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    same = all(record["machine"][name] == here[name] for name in here)
    agrees = found["loss_digest"] == cell["loss_digest"] if same else abs(value / cell["value"] - 1) < 0.03
    how = "bit for bit" if same else "within 3 %"
    print(
        f"{name}: {value:.6f}, recorded {cell['value']:.6f}; {'agrees' if agrees else 'does not agree'} {how}",
        flush=True,
    )
    return agrees


if __name__ == "__main__":
    sys.exit(main())

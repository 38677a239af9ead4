"""Keep evidence whose sources changed and whose computation did not: `make evidence-confirm [SLUG=tim]`.

A change of a shared file makes the evidence of every claim that uses it stale, though most such changes alter no
number. For each stale claim that is itself unchanged this runs the same beginning from the sources of the recorded
commit and from today's, both on this machine: the first steps of every arm of a comparison, with a measurement of the
validation split; a function at its quick scale, of which what gates look at counts. Where all numbers agree bit for
bit, the record notes today's sources as confirmed, by what, and at which commit. Where they do not it stays stale, and
is to be recorded anew. What differs only later than in the first steps is not seen; the note says how many were taken.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STEPS, BLOCKS = 20, 4


def beginning(slug: str, name: str, tuned: dict[str, Any]) -> dict[str, Any]:
    """What a claim computes first, by the sources that are imported: numbers by arm, or those of its function."""
    import torch

    from torchstone.compare.matrix import settled
    from torchstone.papers import find_paper
    from torchstone.papers._reproduce import FIRST_SEED, recipe_of
    from torchstone.train.training import make_trainer

    claim = find_paper(slug).claim(name)
    assert claim is not None
    found: dict[str, Any] = {}
    if claim.arms is not None:
        for arm in claim.arms.patches:
            recipe = settled(recipe_of(claim, "evidence", arm, tuned.get(arm)))
            torch.set_num_threads(1)
            trainer = make_trainer(recipe.override({"trainer": {"seed": FIRST_SEED["evidence"], "threads": 1}}))[0]
            rows: list[dict[str, Any]] = [trainer.train_step() for _ in range(min(STEPS, recipe.trainer.steps))]
            if trainer.source.valid is not None:
                rows.append(trainer.measure_split(trainer.source.valid, "valid", BLOCKS))
            found[arm] = rows
    if claim.run is not None:
        measured = claim.run("quick", FIRST_SEED["quick"])
        gated = {gate.name for gate in claim.gates}
        found["numbers"] = {name: float(value) for name, value in measured.numbers.items() if name in gated}
        found["values"] = {arm: dict(by_seed) for arm, by_seed in measured.values.items()}
    return found


def by_sources(root: Path, slug: str, claim: str, tuned: dict[str, Any]) -> str | None:
    """`beginning` in a process that imports the package from `root`; None, with its error shown, if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--begin", slug, claim, json.dumps(tuned)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    if done.returncode:
        print(done.stderr[-1500:], file=sys.stderr)
        return None
    return done.stdout.splitlines()[-1]


def unpack(commit: str, recorded: dict[str, str], into: Path) -> bool:
    """The package's sources as of a commit; False if this repository has not got them as they were recorded."""
    packed = subprocess.run(["git", "-C", str(ROOT), "archive", commit, "src"], capture_output=True)
    if packed.returncode:
        return False
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(into, filter="data")
    for module, digest in recorded.items():
        path = into / "src" / module.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            return False
    return True


def main() -> int:
    """Confirm what can be; 1 if something stays stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slug", nargs="*", help="papers; all if none is named")
    parser.add_argument("--begin", nargs=3, metavar=("SLUG", "CLAIM", "TUNED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.begin:
        slug, claim, tuned = options.begin
        with contextlib.redirect_stdout(sys.stderr):
            found = beginning(slug, claim, json.loads(tuned))
        print(json.dumps(found))
        return 0

    from torchstone.papers import find_paper, slugs
    from torchstone.papers._reproduce import confirm, read_evidence, stale

    left = 0
    for slug in options.slug or slugs():
        kept = read_evidence(slug)
        for each in find_paper(slug).claims:
            record = kept.get(each.id)
            if record is None or not (changed := stale(each, record)):
                continue
            name = f"{slug} {each.id}"
            if "the claim" in changed or not record["commit"]:
                print(f"{name}: the claim itself changed; record it anew", flush=True)
                left += 1
                continue
            tuned = {cell["arm"]: cell["tuned"] for cell in record["cells"] if cell.get("tuned")}
            with tempfile.TemporaryDirectory() as folder:
                if not unpack(record["commit"].rstrip("+"), record["sources"], Path(folder)):
                    print(f"{name}: its sources are not those of commit {record['commit']} here", flush=True)
                    left += 1
                    continue
                before = by_sources(Path(folder), slug, each.id, tuned)
            today = by_sources(ROOT, slug, each.id, tuned)
            if before is None or before != today:
                print(f"{name}: computes something else than at {record['commit'][:12]}; record it anew", flush=True)
                left += 1
                continue
            how = [f"{STEPS} steps of every arm"] * (each.arms is not None) + ["the quick function"] * bool(each.run)
            confirm(slug, each, " and ".join(how))
            print(f"{name}: confirmed by {' and '.join(how)}", flush=True)
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main())

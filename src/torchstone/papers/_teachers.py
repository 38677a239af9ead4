"""Teachers of claims: a run that a recipe trains once a machine, however many claims, seeds and processes ask for it.

A teacher is kept in ``<cache>/teachers/<key>``, the cache being that of tokenised text. The key goes by the recipe, by
its corpus, and by the sources that a training runs through: a change of one trains another. A run is trained beside its
place and renamed into it when it is whole; a second process that wants the same one waits.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torchstone
from torchstone.files import digest, full_disk
from torchstone.recipe import load_recipe
from torchstone.train import RunFolder, train

__all__ = ["teacher"]

_SOURCES = ("keys.py", "spec.py", "recipe.py", "data", "model", "objectives", "ops", "train")


def teacher(recipe: Mapping[str, Any]) -> RunFolder:
    """The run of a recipe whose data is text, from the cache, or trained now.

    Raises:
        TorchstoneError: bad input, or the cache cannot be written.
    """
    made: Any = load_recipe(recipe)
    folder = made.data.cache_folder() / "teachers"
    run = RunFolder(folder / _key(made))
    with full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{run.path.name}.lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not run.path.exists():
                with tempfile.TemporaryDirectory(prefix=".training-", dir=folder) as beside:
                    os.replace(train(made, out=Path(beside) / "run", quiet=True).path, run.path)
    return run.require()


def _key(recipe: Any) -> str:
    """64 hexadecimal digits."""
    root = Path(torchstone.__file__).parent
    files = [file for name in _SOURCES for file in sorted((root / name).rglob("*.py"))]
    files += [root / name for name in _SOURCES if name.endswith(".py")]
    sources = {str(file.relative_to(root)): digest(file) for file in files}
    body = [recipe.hash(), recipe.data.corpus.fingerprint(), sources]
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()

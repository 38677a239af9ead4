"""A cell: one variant under one seed, trained and measured; and the probe that says beforehand what it will cost.

Both run in a process of their own, which `serve` is the main loop of, so that a cell that dies takes nothing with it,
and memory is measured from a clean start.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchstone.errors import TorchstoneError
from torchstone.files import read_json, write_json
from torchstone.recipe import Recipe, load_recipe

__all__ = ["RESULT", "answer", "finished", "probe", "run_cell", "serve", "sized"]

RESULT = "result.json"
_PROBE_STEPS = 5


def finished(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The result of a cell that was trained before with exactly this recipe; None if there is none."""
    path = folder / RESULT
    if not path.is_file():
        return None
    result = read_json(path)
    return result if isinstance(result, dict) and result.get("recipe") == recipe.hash() else None


def run_cell(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Train one cell, or go on with it, and measure it.

    Args:
        recipe: with its seed.
        folder: the cell's; the run lies in ``run/``.

    Returns:
        status ("done" or "diverged") with `reason`; metrics of the last test row; the validation curve; the best and
        the last validation loss; seconds; digest of the loss curve; corpus hash; bits and bytes of each held-out
        document, where there are any.
    """
    from torchstone.train import train

    began = time.perf_counter()
    before = _seconds(folder)
    base: dict[str, Any] = {"recipe": recipe.hash(), "seed": recipe.trainer.seed, "status": "done", "reason": None}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        run = train(recipe, out=folder / "run", resume=True, quiet=True)
    except TorchstoneError as error:
        if "not finite" not in str(error):
            raise
        base |= {"status": "diverged", "reason": str(error)}
        from torchstone.train.run import RunFolder

        run = RunFolder(folder / "run")
    finally:
        write_json(folder / "seconds.json", before + time.perf_counter() - began)
    rows = run.metrics()
    test: Mapping[str, Any] = next((row for row in reversed(rows) if "test_loss" in row), {})
    curve = [[row["step"], row["valid_loss"]] for row in rows if "valid_loss" in row]
    losses = [row["loss"] for row in rows if "loss" in row]
    rows_a_step = recipe.trainer.batch * recipe.trainer.accumulate
    result = {
        **base,
        "metrics": {name: value for name, value in test.items() if name != "step" and isinstance(value, int | float)},
        "curve": curve,
        "valid_loss": curve[-1][1] if curve else None,
        "loss_digest": hashlib.sha256(json.dumps(losses).encode()).hexdigest(),
        "seconds": before + time.perf_counter() - began,
        "threads": run.recipe.trainer.threads,
        "steps": recipe.trainer.steps,
        "tokens": recipe.trainer.steps * rows_a_step * getattr(recipe.data, "block", 1),
        "corpus": read_json(run.path / "environment.json").get("corpus"),
    }
    if base["status"] == "done":
        result["documents"] = run.documents()
    write_json(folder / RESULT, result)
    shutil.rmtree(run.state, ignore_errors=True)  # nothing goes on from here
    return result


def _seconds(folder: Path) -> float:
    """Seconds that earlier attempts at this cell took."""
    path = folder / "seconds.json"
    return float(read_json(path)) if path.is_file() else 0.0


def sized(recipe: Recipe) -> Recipe:
    """The recipe with the sizes that its data decide, where it leaves them open: what is counted must be known."""
    from torchstone.train.training import sizes_of

    if all(getattr(recipe.model, name, 0) is not None for name in recipe.data.fills):
        return recipe
    sizes = sizes_of(recipe, recipe.data.prepare())
    return recipe.override({"model": {n: value for n, value in sizes.items() if getattr(recipe.model, n) is None}})


def probe(recipe: Recipe, steps: int = _PROBE_STEPS) -> dict[str, Any]:
    """Speed, memory and disk of a recipe, from a few steps with nothing else at work.

    Returns:
        seconds_per_step, tokens_per_second, startup_seconds, seconds_per_block of an evaluation and the blocks of one,
        peak_bytes above the process before the model was made, predicted_bytes, disk_bytes that
        a cell leaves, state_bytes while it trains. Where the prediction is above the machine's memory: status "memory",
        and the reason.
    """
    import torch

    from torchstone.model.measure import measure
    from torchstone.train.environment import choose_device
    from torchstone.train.memory import training_memory
    from torchstone.train.run import memory_of
    from torchstone.train.training import make_trainer

    # asked before anything is made: a machine that runs out of memory takes other work with it
    need, there = training_memory(sized(recipe)).peak, memory_of(choose_device(recipe.trainer.device))
    if there is not None and need > there:
        reason = f"needs about {need / 2**30:,.1f} GiB of memory, {there / 2**30:,.1f} are there"
        return {"status": "memory", "reason": reason}
    began = time.perf_counter()
    idle = _forget_peak()
    # cost does not depend on the learning rate, and one at which a recipe diverges must not stop the probe
    trainer, resolved = make_trainer(recipe.override({"optimizer": {"lr": 1e-12}}))
    startup = time.perf_counter() - began
    for _ in range(2):
        trainer.train_step()
    began = time.perf_counter()
    for _ in range(steps):
        trainer.train_step()
    per_step = (time.perf_counter() - began) / steps
    tokens = recipe.trainer.batch * recipe.trainer.accumulate * getattr(resolved.data, "block", 1)
    began = time.perf_counter()
    if trainer.source.valid is not None:
        trainer.measure_split(trainer.source.valid, "valid", recipe.trainer.batch)
    per_block = (time.perf_counter() - began) / recipe.trainer.batch
    spec = resolved.evaluate
    valid, test = [0 if split is None else len(split) for split in (trainer.source.valid, trainer.source.test)]  # type: ignore[arg-type]
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    counts = measure(trainer.model, getattr(resolved.data, "block", 1), torch.float32)
    return {
        "seconds_per_step": per_step,
        "tokens_per_second": tokens / per_step,
        "startup_seconds": startup,
        "seconds_per_block": per_block,
        "valid_blocks": min(valid, spec.blocks or valid),
        "test_blocks": min(test, spec.test_blocks or test),
        "peak_bytes": _peak() - idle,
        "predicted_bytes": need,
        "disk_bytes": weights,
        "state_bytes": weights * 3 * (resolved.trainer.keep_last + 1),
        "parameters": counts.parameters,
        "flops_per_token": counts.flops_per_token,
        "state_bytes_per_token": counts.state_bytes_per_token,
        "state_bytes_fixed": counts.state_bytes_fixed,
    }


def _forget_peak() -> int:
    """Begin to measure the peak anew; what is held now, in bytes (on an accelerator: of its memory)."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak of what was imported does not count
        return _resident("VmRSS")
    return _peak()


def _peak() -> int:
    """The most that was held since then."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with suppress(OSError):
        return _resident("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _resident(name: str) -> int:
    """A size from Linux' account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _leave_with(parent: int) -> None:
    """End this process when its parent is gone: somebody may go on with the same cell."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Do what a request asks; a sentence instead of an error that a cell may have."""
    try:
        for module in request["imports"]:
            importlib.import_module(module)
        recipe = load_recipe(request["recipe"])
        if request["do"] == "probe":
            return probe(recipe)
        return run_cell(recipe, Path(request["folder"]))
    except TorchstoneError as error:
        return {"status": "refused", "reason": str(error)}
    except MemoryError:
        return {"status": "memory", "reason": "out of memory"}
    except RuntimeError as error:
        short = str(error).splitlines()[0] if str(error) else type(error).__name__
        full = "out of memory" in str(error) or "can't allocate" in str(error)
        return {"status": "memory" if full else "failed", "reason": short[:300]}


def serve() -> None:
    """Answer requests, one JSON document a line on standard input, until it ends: the worker's side."""
    out = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints must not mix with answers
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    for line in sys.stdin:
        out.write(json.dumps(answer(json.loads(line))) + "\n")
        out.flush()

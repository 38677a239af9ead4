"""The forms of a scaling study: a table in text, and plots."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from torchstone.evaluate.scaling import DEEPSEEK, PowerLaw, Scaling, best_losses
from torchstone.files import full_disk, write_bytes, write_json

__all__ = ["text_of", "write_report"]


def text_of(found: Scaling) -> str:
    """Budgets, laws beside DeepSeek's, and the held-out prediction."""
    header = ("budget [FLOPs]", "trainings", "sizes", "best M [FLOPs/token]", "D [tokens]", "lr", found.unit)
    rows = [header]
    for budget in found.budgets:
        best, lr = budget.best, "-" if budget.best.lr is None else f"{budget.best.lr:.3g}"
        counts = (str(len(budget.points)), str(len(budget.sizes)))
        size = (f"{best.flops_per_token:.3e}", f"{best.tokens:.3e}", lr, f"{best.loss:.4f}")
        rows.append((f"{budget.compute:.3e}", *counts, *size))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.append("")
    iso = found.isoflop
    for name, law, theirs in (
        ("M", iso and iso.flops_per_token, DEEPSEEK["flops_per_token"]),
        ("D", iso and iso.tokens, DEEPSEEK["tokens"]),
        ("lr", found.lr, DEEPSEEK["lr"]),
        ("B", found.batch, DEEPSEEK["batch"]),
    ):
        if law is not None:
            lines.append(f"{name:<3}= {law}; DeepSeek LLM {theirs}")
    lines.append(f"{'L':<3}= {found.loss}")
    if found.held_out is not None:
        held = found.held_out
        lines.append(
            f"held out: {held.compute:.3e} FLOPs, predicted {held.predicted}, measured {held.measured:.4f}, "
            f"error {100 * held.error:+.2f} %"
        )
        if held.flops_per_token is not None:
            lines.append(f"          M predicted {held.flops_per_token[0]:.3e}, best {held.flops_per_token[1]:.3e}")
    return "\n".join([*lines, *found.notes])


def write_report(found: Scaling, folder: Path) -> list[Path]:
    """Write the plots and, last, ``scaling.json``; their paths."""
    with full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, picture in _plots(found):
        write_bytes(folder / name, picture)
        paths.append(folder / name)
    write_json(folder / "scaling.json", found.to_dict())
    return [*paths, folder / "scaling.json"]


def _plots(found: Scaling) -> Iterator[tuple[str, bytes]]:
    yield "loss.png", _loss(found)
    if found.isoflop is not None:
        yield "isoflop.png", _isoflop(found)
    if found.lr is not None or found.batch is not None:
        yield "hyperparameters.png", _hyperparameters(found)


def _figure(columns: int = 1) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(6.5 * columns, 4.5), layout="constrained")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _span(found: Scaling) -> np.ndarray:
    compute = [budget.compute for budget in found.budgets]
    return np.geomspace(min(compute) / 1.5, max(compute) * 1.5, 100)


def _loss(found: Scaling) -> bytes:
    figure = _figure()
    axes, x = figure.subplots(), _span(found)
    seen = found.budgets if found.held_out is None else found.budgets[:-1]
    for budget in found.budgets:
        axes.plot([p.compute for p in budget.points], [p.loss for p in budget.points], ".", color="0.75", ms=4)
    axes.plot(x, [found.loss(c) for c in x], color="C0", label="E + A C^-c")
    axes.plot(*zip(*best_losses(seen), strict=True), "o", color="C0", label="fitted on")
    if found.held_out is not None:
        held = found.held_out
        axes.plot([held.compute], [held.measured], "*", color="C3", ms=12, label=f"held out, {100 * held.error:+.2f} %")
    axes.set(xscale="log", xlabel="compute C [FLOPs]", ylabel=found.unit, title="Loss at the best split")
    axes.legend()
    axes.grid(alpha=0.3)
    return _png(figure)


def _isoflop(found: Scaling) -> bytes:
    assert found.isoflop is not None
    figure = _figure(2)
    (left, right), minima = figure.subplots(1, 2), {each.compute: each for each in found.isoflop.minima}
    for number, budget in enumerate(found.budgets):
        color, sizes = f"C{number % 10}", budget.sizes
        left.plot([p.flops_per_token for p in sizes], [p.loss for p in sizes], "o", color=color, ms=4,
                  label=f"{budget.compute:.2g}" + ("" if budget.compute in minima else ", held out"))  # fmt: skip
        if (best := minima.get(budget.compute)) is not None:
            x = np.geomspace(sizes[0].flops_per_token, sizes[-1].flops_per_token, 50)
            left.plot(x, best.loss + best.curvature * np.log(x / best.flops_per_token) ** 2, color=color, lw=1)
            left.plot([best.flops_per_token], [best.loss], "x", color=color)
    left.set(xscale="log", xlabel="model scale M [FLOPs/token]", ylabel=found.unit, title="One curve a budget [FLOPs]")
    left.legend(fontsize=8)
    x, law = _span(found), found.isoflop.flops_per_token
    right.plot(list(minima), [each.flops_per_token for each in minima.values()], "o", label="minima")
    right.plot(x, [law(c) for c in x], label=f"M = {law}")
    right.set(xscale="log", yscale="log", xlabel="compute C [FLOPs]", ylabel="best M [FLOPs/token]", title="Best split")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return _png(figure)


def _hyperparameters(found: Scaling) -> bytes:
    laws: list[tuple[str, str, PowerLaw]] = [
        (name, words, law)
        for name, words, law in (("lr", "learning rate", found.lr), ("batch", "batch [tokens]", found.batch))
        if law is not None
    ]
    figure, x = _figure(len(laws)), _span(found)
    for axes, (name, words, law) in zip(figure.subplots(1, len(laws), squeeze=False)[0], laws, strict=True):
        points = found.tuned[name]
        axes.plot(
            [p.compute for p in points], [getattr(p, name) for p in points], "o", label="within 0.25 % of the best"
        )
        axes.plot(x, [law(c) for c in x], label=str(law))
        axes.set(xscale="log", yscale="log", xlabel="compute C [FLOPs]", ylabel=words, title="Well-tuned trainings")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    return _png(figure)

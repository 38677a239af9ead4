"""Progress of a training: a bar with rate and time left on a terminal, plain lines elsewhere; and the curve."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torchstone.files import write_with

__all__ = ["Progress", "plot_curve"]


class Progress:
    """Says on stderr how far a training is. `quiet` says nothing."""

    def __init__(self, steps: int, start: int = 0, quiet: bool = False, every: float = 10.0) -> None:
        self.steps, self.start, self.quiet, self.every = steps, start, quiet, every
        self._bar: Any = None
        self._task: Any = None
        self._said = 0.0

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("train", total=self.steps, completed=self.start, text="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def row(self, row: Mapping[str, Any]) -> None:
        """Show a row of metrics."""
        if self.quiet:
            return
        step, text = row["step"], _text(row)
        if self._bar is not None:
            if "loss" in row:
                self._bar.update(self._task, completed=step, text=text)
            else:
                self._bar.console.print(f"step {step}: {text}", highlight=False)
            return
        now = time.monotonic()
        if "loss" not in row or now - self._said >= self.every or step >= self.steps:
            self._said = now
            left = (self.steps - step) * row["seconds_per_step"] if "seconds_per_step" in row else None
            tail = f"  left {left:.0f} s" if left else ""
            self.say(f"step {step}/{self.steps}  {text}{tail}")

    def say(self, text: str) -> None:
        """One line."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


def _text(row: Mapping[str, Any]) -> str:
    names = {
        "loss": "loss {:.4f}",
        # of policy gradients, whose loss says nothing
        "reward": "reward {:.4f}",
        "length": "length {:.1f}",
        "truncated": "truncated {:.0%}",
        "flat_groups": "flat groups {:.0%}",
        "tokens_per_second": "{:,.0f} tok/s",
        "mfu": "mfu {:.1%}",
        "valid_loss": "valid loss {:.4f}",
        "valid_bits_per_byte": "valid {:.4f} bits/byte",
        "test_loss": "test loss {:.4f}",
        "test_bits_per_byte": "test {:.4f} bits/byte",
    }
    # what a split of its own kind measures: accuracies
    own = [name for name in row if name.startswith(("valid_", "test_")) and name not in names]
    names |= {name: name.replace("_", " ") + " {:.4f}" for name in own}
    return "  ".join(form.format(row[name]) for name, form in names.items() if row.get(name) is not None)


def plot_curve(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Learning curve as PNG: training and validation loss in nats, and bits per byte on the right where known."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, label in (("loss", "training"), ("valid_loss", "validation"), ("test_loss", "test")):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            marker = "" if name == "loss" else "o"
            axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=4, linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss [nats per target]", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    coded = [row for row in rows if row.get("valid_bits_per_byte") is not None and row.get("valid_loss")]
    if coded:
        ratio = coded[-1]["valid_bits_per_byte"] / coded[-1]["valid_loss"]
        right = axes.secondary_yaxis("right", functions=(lambda y: y * ratio, lambda y: y / ratio))
        right.set_ylabel("bits per byte")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_with(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    pyplot.close(figure)

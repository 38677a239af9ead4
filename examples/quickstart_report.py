"""What a finished training on Python source learned: ``python examples/quickstart_report.py runs/quickstart``.

Prints the bits per byte of held-out files beside those of general compressors, the learning curve, and a sample with
the share of it that Python's parser accepts. Every number is computed here or read from the run.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import lzma
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torchstone
from torchstone.errors import TorchstoneError
from torchstone.files import read_json

LINES, SEED, TEMPERATURE, TOP_P = 40, 0, 0.8, 0.95
TOGETHER, ROUNDS = 4, 8
"""Samples drawn at a time, and how many times at most, until there are enough lines."""
MEANING = (
    "How that is counted: a stretch starts at a line that begins in column 0 and ends before another such line or at "
    "the end. From the top of each text, the longest stretch that ast.parse accepts is taken, then the longest after "
    "it, and so on; their lines are the accepted ones. Blank lines do not count."
)


def held_out(run: torchstone.Run) -> list[str]:
    """Texts of the run's test split.

    Raises:
        TorchstoneError: the corpus is no longer the one that the run was trained on.
    """
    prepared = run.recipe.data.prepare()
    trained = read_json(run.path / "environment.json").get("corpus")
    if trained != prepared.hash:
        raise TorchstoneError(f"{run.path}: the corpus has changed since the run, its test split cannot be had again")
    return [document.text for document in prepared.texts("test")]


def bits_per_byte(run: torchstone.Run) -> float:
    """Code length of the whole test split under the run's model, in bits per byte of UTF-8.

    Raises:
        TorchstoneError: the run did not get to its test.
    """
    measured = [row["test_bits_per_byte"] for row in run.metrics() if row.get("test_bits_per_byte") is not None]
    if not measured:
        raise TorchstoneError(f"{run.path}: metrics.jsonl has no test_bits_per_byte; the run is not finished")
    return measured[-1]


def compressed(texts: Iterable[str]) -> dict[str, float]:
    """Bits per byte of the texts, one after another in one file, by compressor."""
    data = "".join(texts).encode()
    sizes = {"gzip -9": len(gzip.compress(data, 9, mtime=0)), "xz -9": len(lzma.compress(data, preset=9))}
    return {name: 8 * size / max(1, len(data)) for name, size in sizes.items()}


def verdict(model: float, others: dict[str, float]) -> str:
    """One sentence: which is lower, the model or the best of the others, and by how much."""
    name = min(others, key=lambda other: others[other])
    apart = abs(model - others[name])
    if model < others[name]:
        return f"The model is lower: {apart:.4f} bits per byte ({apart / others[name]:.1%}) below the better, {name}."
    if model > others[name]:
        return f"{name} is lower: {apart:.4f} bits per byte ({apart / model:.1%}) below the model."
    return f"The model and {name} are equal."


def curve(rows: Sequence[dict[str, Any]], width: int = 48, most: int = 12) -> str:
    """Validation bits per byte by step, a bar a row, drawn from zero; the loss in nats where bits mean nothing."""
    name = "valid_bits_per_byte" if any("valid_bits_per_byte" in row for row in rows) else "valid_loss"
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if len(points) > most:  # first, last and evenly between
        points = [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]
    top = max((value for _, value in points), default=1.0)
    lines = [f"{step:>8}  {value:7.4f}  {'#' * max(1, round(width * value / top))}" for step, value in points]
    return "\n".join([f"{'step':>8}  {'valid bits per byte' if name != 'valid_loss' else 'valid loss [nats]'}", *lines])


def length(texts: Iterable[str]) -> int:
    """Lines of several texts in all."""
    return sum(text.count("\n") + 1 for text in texts)


def sample(run: torchstone.Run, lines: int = LINES, seed: int = SEED) -> list[str]:
    """Texts of `lines` lines in all, each written from nothing: another one is begun where one ends early.

    Each is at most as long as a training block. A line that the last token cut short is left out.
    """
    texts: list[str] = []
    for number in range(ROUNDS):
        for done in run.generate(
            [""] * TOGETHER,
            max_new_tokens=getattr(run.recipe.data, "block", 256) - 1,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            seed=seed + number,
        ):
            text = done.text.rpartition("\n")[0] if done.finish == "length" else done.text.rstrip("\n")
            if text.strip():
                texts.append("\n".join(text.split("\n")[: lines - length(texts)]))
            if length(texts) >= lines:
                return texts
    return texts


def parses(text: str) -> bool:
    """Whether `ast.parse` accepts the text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True


def accepted(text: str) -> tuple[int, int]:
    """Lines of the text in stretches that `ast.parse` accepts, and lines in all; see `MEANING`."""
    lines = text.split("\n")
    starts = [i for i, line in enumerate(lines) if line and not line[0].isspace()]
    good, at = 0, 0
    while at < len(starts):
        ends = [*starts[at + 1 :], len(lines)]
        longest = next((n for n in range(len(ends), 0, -1) if parses("\n".join(lines[starts[at] : ends[n - 1]]))), 0)
        if longest:
            good += sum(bool(line.strip()) for line in lines[starts[at] : ends[longest - 1]])
        at += max(1, longest)
    return good, sum(bool(line.strip()) for line in lines)


def share(texts: Iterable[str]) -> tuple[int, int]:
    """`accepted` of several texts, each parsed by itself."""
    pairs = [accepted(text) for text in texts]
    return sum(good for good, _ in pairs), sum(total for _, total in pairs)


def percent(pair: tuple[int, int]) -> str:
    """A share as a percentage and as a fraction."""
    return f"{pair[0] / max(1, pair[1]):.1%} ({pair[0]:,} of {pair[1]:,} lines)"


def report(run: torchstone.Run) -> None:
    """Print everything on stdout."""
    texts = held_out(run)
    others, model = compressed(texts), bits_per_byte(run)
    print(f"\nBits per byte of {len(texts):,} held-out files ({sum(len(text.encode()) for text in texts):,} bytes)")
    for name, value in {"the model": model, **others}.items():
        print(f"    {name:<10} {value:.4f}")
    print(verdict(model, others))
    print("(The model was trained on other files of the corpus, and its weights do not count.")
    print(" The compressors see these files alone, as one.)")
    print(f"\nLearning curve: {run.path / 'plots' / 'learning_curve.png'}")
    print(curve(run.metrics()))
    written = sample(run)
    print(f"\nSample: {length(written)} lines in {len(written)} texts, ", end="")
    print(f"temperature {TEMPERATURE}, top_p {TOP_P}, seed {SEED}")
    for text in written:
        print("-" * 80)
        print(text)
    print("-" * 80)
    print(f"ast.parse accepts {percent(share(written))} of the sample.")
    heads = ["\n".join(text.split("\n")[:LINES]) for text in texts]
    print(f"By the same measure, of the first {LINES} lines of each held-out file: {percent(share(heads))}.")
    print(MEANING)


def main() -> int:
    """The command line: one line and status 2 for bad input."""
    parser = argparse.ArgumentParser(description="Report on a run trained on Python source.")
    parser.add_argument("run", metavar="RUN", help="a run directory")
    try:
        report(torchstone.load(parser.parse_args().run))
    except TorchstoneError as error:
        print(f"quickstart_report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`evaluate`: several tasks on one run. Everything is read and checked before the model is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torchstone.errors import TorchstoneError
from torchstone.evaluate.classification import classification, label_names, read_examples
from torchstone.evaluate.infilling import infilling, read_holes
from torchstone.evaluate.intervals import CONFIDENCE
from torchstone.evaluate.lengths import bits_by_length
from torchstone.evaluate.minimal_pairs import minimal_pairs, read_pairs
from torchstone.evaluate.multiple_choice import multiple_choice, read_questions
from torchstone.evaluate.progress import Progress
from torchstone.evaluate.result import Result
from torchstone.evaluate.scoring import Scorer
from torchstone.evaluate.text import perplexity, read_documents
from torchstone.files import write_json
from torchstone.generate.infilling import mode_of, stand_in_of
from torchstone.model.mask import mask_named
from torchstone.train.run import RunFolder

__all__ = ["Sources", "evaluate", "report"]

Sources = str | Path | Sequence[str | Path]
"""One or several sources of items."""


def evaluate(
    run: RunFolder,
    *,
    text: Sources = (),
    multiple_choice: Sources = (),
    classification: Sources = (),
    minimal_pairs: Sources = (),
    infilling: Sources = (),
    tasks: str | Sequence[str] = (),
    include_path: str | Path | None = None,
    window: int | None = None,
    stride: int | None = None,
    lengths: Sequence[int] = (),
    last: int | None = None,
    attention: str = "full",
    limit: int | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    batch: int = 16,
    out: str | Path | None = None,
    quiet: bool = True,
) -> list[Result]:
    """Evaluate a run.

    Args:
        run: its newest weights are evaluated.
        text: files, folders, globs, ``.jsonl`` files or ``-`` (standard input): perplexity and bits per byte of each.
        multiple_choice, classification, minimal_pairs: JSON-lines files: accuracy on each.
        infilling: ``.jsonl`` files, or texts of which a line each is left out: how well it is written again.
        tasks: tasks of lm-evaluation-harness (extra `eval`).
        include_path: a folder with task files for it.
        window, stride: of texts; see `Scorer.windows`.
        lengths, last: bits per byte of texts by the length of what is read, in the place of perplexity; see
            `bits_by_length`.
        attention: what a model that reads from left to right may see: "full", "window:128", "blocks:64"; see
            `torchstone.model.mask.mask_named`.
        limit: documents or items of each source, at most.
        device, precision, batch: where and how the model runs.
        out: file for the report as JSON.
        quiet: no progress on standard error.

    Returns:
        A result a source and task, in this order.

    Raises:
        TorchstoneError: nothing to evaluate, bad input, a model that the task makes no sense for.
    """
    sources = [
        *((_text, source) for source in _several(text)),
        *((_multiple_choice, source) for source in _several(multiple_choice)),
        *((_classification, source) for source in _several(classification)),
        *((_minimal_pairs, source) for source in _several(minimal_pairs)),
        *((_infilling, source) for source in _several(infilling)),
    ]
    names = _several(tasks)
    if not sources and not names:
        raise TorchstoneError(
            "evaluate: nothing to do; give text, multiple-choice, classification, minimal-pairs, infilling or tasks"
        )
    if limit is not None and limit < 1:
        raise TorchstoneError(f"evaluate: limit is {limit}, 1 or more is needed")
    if include_path is not None and not names:
        raise TorchstoneError("evaluate: include-path is for tasks, and none is named")
    if out is not None and (Path(out).is_dir() or not Path(out).absolute().parent.is_dir()):
        raise TorchstoneError(f"{out}: cannot be written; a file in a folder that exists is needed")
    if names and importlib.util.find_spec("lm_eval") is None:
        raise TorchstoneError(
            "tasks: need lm-evaluation-harness, which is not installed: pip install 'torchstone[eval]'"
        )
    if lengths and (window is not None or stride is not None):
        raise TorchstoneError("evaluate: window and stride slide over a text, and lengths do not; give one of them")
    if lengths and not _several(text):
        raise TorchstoneError("evaluate: lengths are for text, and none is given")
    if last is not None and not lengths:
        raise TorchstoneError("evaluate: last is for lengths, and none are given")
    mask = mask_named(attention)
    options = {"limit": limit, "window": window, "stride": stride, "lengths": tuple(lengths), "last": last}
    ready = [prepare(source, run, options) for prepare, source in sources]
    scorer = Scorer.of_run(
        run, device=device, precision=precision, batch=batch, attention=mask, progress=Progress(quiet)
    )
    results = [task(scorer) for task in ready]
    if names:
        from torchstone.evaluate.harness import HarnessModel, run_tasks

        model = HarnessModel(scorer, run.generation_settings().get("eos_token_id"))
        results += run_tasks(model, names, include_path, limit)
    if out is not None:
        write_json(Path(out), report(run, results))
    return results


def report(run: RunFolder, results: Sequence[Result]) -> dict[str, Any]:
    """Results as one document for JSON."""
    return {"run": str(run.path), "confidence": CONFIDENCE, "results": [result.dump() for result in results]}


Task = Callable[[Scorer], Result]


def _several(sources: Any) -> list[str]:
    return [str(sources)] if isinstance(sources, str | Path) else [str(source) for source in sources]


def _text(source: str, run: RunFolder, options: dict[str, Any]) -> Task:
    documents = read_documents(source, options["limit"])
    if options["lengths"]:
        return lambda scorer: bits_by_length(scorer, documents, source, options["lengths"], options["last"])
    return lambda scorer: perplexity(scorer, documents, source, options["window"], options["stride"])


def _multiple_choice(source: str, run: RunFolder, options: dict[str, Any]) -> Task:
    questions = read_questions(source, options["limit"])
    return lambda scorer: multiple_choice(scorer, questions, source)


def _classification(source: str, run: RunFolder, options: dict[str, Any]) -> Task:
    examples, names = read_examples(source, options["limit"]), label_names(run.config)
    return lambda scorer: classification(scorer, examples, names, source)


def _minimal_pairs(source: str, run: RunFolder, options: dict[str, Any]) -> Task:
    pairs = read_pairs(source, options["limit"])
    return lambda scorer: minimal_pairs(scorer, pairs, source)


def _infilling(source: str, run: RunFolder, options: dict[str, Any]) -> Task:
    holes, mode, stand_in = read_holes(source, options["limit"]), mode_of(run), stand_in_of(run)
    return lambda scorer: infilling(scorer, holes, source, mode, stand_in)

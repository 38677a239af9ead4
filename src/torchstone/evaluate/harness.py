"""lm-evaluation-harness (Gao et al., github.com/EleutherAI/lm-evaluation-harness): its tasks on our scorer and engine.

Imported only where its tasks are asked for; it needs the extra `eval`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from traceback import walk_tb
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from torchstone.errors import TorchstoneError, nearest
from torchstone.evaluate.intervals import Estimate, normal, wilson
from torchstone.evaluate.result import Result
from torchstone.evaluate.scoring import Scorer
from torchstone.generate import Engine, Sampling
from torchstone.spec import validate

__all__ = ["HarnessModel", "run_tasks"]

_SHARES = ("acc", "acc_norm", "exact_match")
"""Metrics that are shares of items that were right."""
_NEW_TOKENS = 256
"""Tokens that a task allows if it does not say."""
_BOOTSTRAP = 1000
"""Samples from which the harness gets the standard error of metrics that have no formula for it."""


class HarnessModel(LM):
    """The harness' model interface on a scorer.

    Args:
        scorer: gives log-likelihoods; of a masked language model, pseudo-log-likelihoods.
        eos: tokens that end a text that is written; None is the tokenizer's separator.
    """

    def __init__(self, scorer: Scorer, eos: int | Sequence[int] | None = None) -> None:
        super().__init__()
        self.scorer, self.eos = scorer, eos
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """What writes texts.

        Raises:
            TorchstoneError: the model cannot generate.
        """
        if self._engine is None:
            scorer = self.scorer
            if scorer.masked:
                raise TorchstoneError("evaluate: a masked language model writes no text, which this task asks for")
            # batches of all sizes and lengths come once each: nothing that would pay for compiling
            self._engine = Engine(scorer.model, scorer.tokenizer, compile="off", eos=self.eos, start=scorer.start)
        return self._engine

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding would give it) of each continuation after its context."""
        jobs = [
            (number, job)
            for number, request in enumerate(requests)
            for job in self.scorer.continuation(*request.args[:2]).jobs
        ]
        totals, greedy = [0.0] * len(requests), [True] * len(requests)
        for number, score in self.scorer.score(jobs, "loglikelihood", len(jobs), greedy=True):
            totals[number] += score.logprob
            greedy[number] = greedy[number] and bool(score.greedy)
        return list(zip(totals, greedy, strict=True))

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Log-likelihood of each whole text. As the interface says, windows lie side by side; the last one is full."""
        size, _ = self.scorer.sizes(None, None)
        room = size - sum(map(len, self.scorer.frame)) if self.scorer.masked else size
        jobs = [
            (number, job)
            for number, request in enumerate(requests)
            for window in self.scorer.windows(request.args[0], size, room)
            for job in window
        ]
        totals = self.scorer.totals(jobs, "loglikelihood_rolling", len(jobs))
        return [totals.get(number, 0.0) for number in range(len(requests))]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The text that follows each context, up to a stop string."""
        texts = [""] * len(requests)
        alike: dict[Sampling, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(_sampling(request.args[1]), []).append(number)
        done = 0
        for sampling, numbers in alike.items():
            ids = {number: self._prompt(requests[number].args[0], sampling) for number in numbers}
            order = sorted(numbers, key=lambda number: len(ids[number]), reverse=True)
            for a in range(0, len(order), self.scorer.batch):
                some = order[a : a + self.scorer.batch]
                prompts = [ids[number] for number in some]
                given = {"prompts": None, "memory": prompts} if self.scorer.seq2seq else {"prompts": prompts}
                for number, completion in zip(
                    some, self.engine.generate(**given, sampling=sampling, requests=some), strict=True
                ):
                    texts[number] = completion.text
                done += len(some)
                self.scorer.progress.at("generate_until", done, len(requests))
        self.scorer.progress.end()
        return texts

    def _prompt(self, text: str, sampling: Sampling) -> list[int]:
        """A prompt's tokens; one that leaves no room for new tokens loses its beginning."""
        ids = self.scorer.tokenizer.encode_input(text) or [self.scorer.start]
        model = self.scorer.model
        if model.encoder is not None:
            return ids if model.encoder.limit is None else ids[-model.encoder.limit :]
        return ids if model.limit is None else ids[-max(1, model.limit - sampling.max_new_tokens) :]


def _sampling(options: Mapping[str, Any]) -> Sampling:
    """What the harness calls generation arguments, as ours; greedy unless sampling is asked for."""
    until = options.get("until") or []
    fields = {
        "max_new_tokens": options.get("max_gen_toks", _NEW_TOKENS),
        "temperature": options.get("temperature", 1.0) if options.get("do_sample") else 0.0,
        "stop": tuple(text for text in ([until] if isinstance(until, str) else until) if text),
    }
    if options.get("do_sample"):
        fields |= {name: options[name] for name in ("top_k", "top_p", "min_p") if options.get(name)}
    return validate(Sampling, fields, "generation_kwargs")


def run_tasks(
    model: HarnessModel, tasks: Sequence[str], include_path: str | Path | None = None, limit: int | None = None
) -> list[Result]:
    """Run tasks of the harness.

    A share of right items gets Wilson's interval, any other metric the harness' own standard error times 1.96.

    Args:
        model: what is evaluated.
        tasks: names of tasks, groups or tags.
        include_path: a folder with task files of one's own, which come first.
        limit: items of each task.

    Raises:
        TorchstoneError: no such task or folder, or a task that cannot be loaded or run.
    """
    with redirect_stdout(sys.stderr):
        manager = _manager(tasks, include_path)
        try:
            found: Any = simple_evaluate(
                model,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                bootstrap_iters=_BOOTSTRAP,
                log_samples=False,
            )
        except Exception as error:  # a task file or its data set may do anything wrong
            if (
                sum("torchstone" in frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))
                > 1
            ):
                raise  # it came through the model, and is bad input of ours or a defect
            text = " ".join(str(error).split())[:200]
            raise TorchstoneError(f"tasks {', '.join(tasks)}: {type(error).__name__}: {text}") from error
    results = []
    for name, metrics in found["results"].items():
        items = found.get("n-samples", {}).get(name, {}).get("effective")
        facts = {} if items is None else {"items": items}
        results.append(Result(name, "lm-evaluation-harness", dict(_estimates(metrics, items)), facts))
    return results


def _manager(tasks: Sequence[str], include_path: str | Path | None) -> TaskManager:
    if include_path is not None and not Path(include_path).is_dir():
        raise TorchstoneError(f"include-path: {str(include_path)!r} is no folder")
    manager = None
    if include_path is not None:
        # the index of the thousands of tasks that come with the harness takes seconds to read
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
    if manager is None or set(tasks) - set(manager.all_tasks):
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in tasks:
        if name not in manager.all_tasks:
            raise TorchstoneError(
                f"tasks: lm-evaluation-harness has no task {name!r}{nearest(name, manager.all_tasks)}"
            )
    return manager


def _estimates(metrics: Mapping[str, Any], items: int | None) -> list[tuple[str, Estimate]]:
    """(name, estimate) of each metric; keys of the harness are ``metric,filter`` and ``metric_stderr,filter``."""
    out = []
    for key, value in metrics.items():
        name, comma, filtered = key.partition(",")
        if not comma or name.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        shown = name if filtered == "none" else key
        right = None if items is None else value * items
        if right is not None and name in _SHARES and abs(right - round(right)) < 1e-6:
            out.append((shown, wilson(round(right), items or 1)))
            continue
        error = metrics.get(f"{name}_stderr,{filtered}")
        out.append((shown, normal(value, error if isinstance(error, int | float) else None)))
    return out

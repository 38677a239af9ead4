"""Scorer: log-likelihoods of tokens under a model, in batches.

A causal model gives a token the probability that follows from the tokens before it. A masked language model has no
such product; its *pseudo-log-likelihood* (Salazar et al. 2020, arXiv 1910.14659, equation 1) hides one token at a time
and adds up what the model gives to each from both sides. Both become jobs: ids to read, places to look at, tokens that
are expected there.

Shapes: B rows, T tokens, N scored places, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import nn

from torchstone.data import Tokenizer
from torchstone.errors import TorchstoneError
from torchstone.evaluate.progress import Progress
from torchstone.model.head import Product
from torchstone.model.mask import BIDIRECTIONAL, CAUSAL, Mask
from torchstone.model.state import State
from torchstone.model.tokens import Tokens
from torchstone.model.transformer import Transformer
from torchstone.ops.cross_entropy import linear_nll
from torchstone.train.environment import choose_device
from torchstone.train.run import RunFolder

__all__ = ["Continuation", "Job", "Score", "Scorer"]

K = TypeVar("K")

_BATCHES = 64
"""Batches whose jobs are sorted by length together: more of them pad less and hold more."""
_LOGITS = 1 << 23
"""Logits that may exist at once."""
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Job:
    """One row of a forward: `ids` to read, and at each of `at` the token of `targets` that is expected there.

    For an encoder-decoder `ids` are the decoder's and `memory` the encoder's.
    """

    ids: Sequence[int]
    at: Sequence[int]
    targets: Sequence[int]
    memory: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """Sum of the log-likelihoods of a job's targets in nats, and whether each is the most probable token of its
    place (None if that was not asked for)."""

    logprob: float
    greedy: bool | None = None


@dataclass(frozen=True, slots=True)
class Continuation:
    """Jobs whose scores add up to the log-likelihood of a text after a prompt.

    `cut` is the number of the prompt's tokens that did not fit into the model's positions.
    """

    jobs: list[Job]
    cut: int


class Scorer:
    """Scores tokens with one model.

    Args:
        model: with a head over the vocabulary, or of classification.
        tokenizer: of its texts.
        masked: whether it is a masked language model; None looks at whether it has a decoder.
        start: token that an empty prompt stands for, and that the decoder of an encoder-decoder starts from; None is
            the tokenizer's separator.
        batch: rows of a forward. It changes no figure beyond rounding.
        attention: which of the tokens before it a token sees, in a model that reads from left to right.
        prefix: decode state of one row that stands before every text, in the place of start token and template.
        progress: says how far it is; None says nothing.

    Raises:
        TorchstoneError: the model is none of ours, `batch` is below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        masked: bool | None = None,
        start: int | None = None,
        batch: int = 16,
        attention: Mask = CAUSAL,
        prefix: State | None = None,
        progress: Progress | None = None,
    ) -> None:
        if not isinstance(model, Transformer):
            raise TorchstoneError(
                f"evaluate: model {getattr(model, 'kind', type(model).__name__)} is no transformer of tokens"
            )
        if batch < 1:
            raise TorchstoneError(f"evaluate: batch is {batch}, 1 or more is needed")
        self.model, self.tokenizer, self.batch = model.eval(), tokenizer, batch
        self.masked = model.decoder is None if masked is None else masked
        if self.masked and attention != CAUSAL:
            raise TorchstoneError(
                "evaluate: attention is for models that read from left to right; this reads both ways"
            )
        if not self.masked:
            model.check_mask(attention)
        self.attention = attention
        self.device = next(model.parameters()).device
        self.prefix = prefix
        self.progress = Progress(quiet=True) if progress is None else progress
        self._start = start

    @classmethod
    def of_run(
        cls,
        run: RunFolder,
        *,
        device: str = "cpu",
        precision: str = "fp32",
        batch: int = 16,
        attention: Mask = CAUSAL,
        progress: Progress | None = None,
    ) -> Scorer:
        """The scorer of a run directory's newest weights.

        Raises:
            TorchstoneError: no weights or no tokenizer, a device that is not there, a precision other than fp32 and
                bf16.
        """
        if precision not in _PRECISIONS:
            raise TorchstoneError(f"evaluate: precision is one of {', '.join(_PRECISIONS)}, not {precision!r}")
        tokenizer, settings = run.tokenizer(), run.generation_settings()
        model = run.model(device=_device(device), dtype=_PRECISIONS[precision])
        seq2seq = getattr(model, "encoder", None) is not None and getattr(model, "decoder", None) is not None
        start = settings.get("decoder_start_token_id" if seq2seq else "bos_token_id")
        masked = getattr(model, "decoder", None) is None or run.recipe.objective.kind == "masked_lm"
        return cls(model, tokenizer, masked=masked, start=start, batch=batch, attention=attention, progress=progress)

    # -- what the model is

    @property
    def seq2seq(self) -> bool:
        """Whether it is an encoder-decoder."""
        return self.model.encoder is not None and self.model.decoder is not None

    @property
    def start(self) -> int:
        """The token that an empty prompt stands for.

        Raises:
            TorchstoneError: none is known.
        """
        return self.tokenizer.separator if self._start is None else self._start

    @property
    def mask(self) -> int:
        """The mask token of a masked language model.

        Raises:
            TorchstoneError: its tokenizer has none.
        """
        if self.tokenizer.mask is None:
            raise TorchstoneError("evaluate: a masked language model needs a mask token, and its tokenizer has none")
        return self.tokenizer.mask

    @property
    def window(self) -> int | None:
        """Tokens of a full context: the model's `context`, as far as its positions reach."""
        sizes = [size for size in (self.model.spec.context, self.limit) if size is not None]
        return min(sizes, default=None)

    @property
    def limit(self) -> int | None:
        """Positions that a text may take, None if any number."""
        taken = 0 if self.prefix is None else self.prefix.reach
        return None if self.model.limit is None else self.model.limit - taken

    # -- from texts to jobs

    def windows(self, text: str, window: int | None = None, stride: int | None = None) -> Iterator[list[Job]]:
        """The jobs of each window over a text, in which every token is scored once.

        A causal model's windows end where the last of their scored tokens is predicted, so all but the first hold
        `window` tokens of left context for it and at least ``window - stride`` for each other; the first starts with
        what stands before a document. A masked model's window scores the tokens that lie deepest in it.

        Args:
            text: one document.
            window: tokens that the model reads at once; None is the model's context.
            stride: tokens between windows, at most `window`; None is half of it.

        Raises:
            TorchstoneError: sizes that do not go together, half of a surrogate pair, an encoder-decoder.
        """
        if self.seq2seq:
            raise TorchstoneError(
                "evaluate: the text of an encoder-decoder has no perplexity of its own; ask multiple-choice questions, "
                "or evaluate a decoder"
            )
        self.model.vocabulary_head()
        ids = self.tokenizer.encode(text)
        size, step = self.sizes(window, stride)
        if self.masked:
            return self._masked_windows(ids, size, step)
        before, _ = self.frame
        return self._causal_windows([*before, *ids], len(before), size, step)

    def sizes(self, window: int | None, stride: int | None) -> tuple[int, int]:
        """Window and stride with their defaults.

        Raises:
            TorchstoneError: they do not go together.
        """
        size = self.window if window is None else window
        if size is None:
            raise TorchstoneError("evaluate: the model names no context; give window")
        if self.limit is not None and size > self.limit:
            raise TorchstoneError(f"evaluate: window is {size}, the model knows {self.limit} positions")
        frame = sum(map(len, self.frame))
        least = max(1, frame + self.masked)  # a causal model's frame alone predicts the first token
        if size < least:
            raise TorchstoneError(f"evaluate: window is {size}, {least} or more is needed")
        room = size - frame if self.masked else size
        step = max(1, room // 2) if stride is None else stride
        if not 1 <= step <= room:
            raise TorchstoneError(f"evaluate: stride is {step}, with this window 1 to {room} is possible")
        return size, step

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """What stands before and after a document: the tokens of the tokenizer's template, or the start token, which
        stood there in training, or nothing if there is neither. A causal model reads nothing after it."""
        if self.prefix is not None:
            return [], []
        before, after = self.tokenizer.template
        if not before and not (after and self.masked):
            with suppress(TorchstoneError):
                before = [self.start]
        return before, after if self.masked else []

    @staticmethod
    def _causal_windows(ids: list[int], before: int, window: int, stride: int) -> Iterator[list[Job]]:
        done, end = max(1, before), min(len(ids), window + 1)
        while done < end:
            begin = max(0, end - 1 - window)
            yield [Job(ids[begin : end - 1], range(done - 1 - begin, end - 1 - begin), ids[done:end])]
            done, end = end, min(len(ids), end + stride)

    def _masked_windows(self, ids: list[int], window: int, stride: int) -> Iterator[list[Job]]:
        room = window - sum(map(len, self.frame))
        begin, done = 0, 0
        while done < len(ids):
            following = min(begin + stride, max(0, len(ids) - room))
            last = following <= begin
            # the border between two windows is the middle of what both see
            end = len(ids) if last else (following + begin + room) // 2
            yield self._hidden(ids[begin : begin + room], range(done - begin, end - begin))
            begin, done = following, end

    def _hidden(self, ids: Sequence[int], at: Iterable[int]) -> list[Job]:
        """A job for each of `at`, in which that token alone is hidden."""
        jobs, (before, after) = [], self.frame
        for i in at:
            place = len(before) + i
            row = [*before, *ids, *after]
            row[place] = self.mask
            jobs.append(Job(row, (place,), (ids[i],)))
        return jobs

    def continuation(self, prompt: str, text: str, where: str = "evaluate") -> Continuation:
        """The jobs that score `text` after `prompt`.

        The two are encoded together, and the tokens after the prompt's own are scored: a token may reach across the
        seam. Blanks at the end of the prompt count as the text's, since tokens tend to begin with them. An empty prompt
        stands for the start token. An encoder-decoder reads the prompt in its encoder. A prompt that is too long loses
        its beginning.

        Args:
            prompt: may be empty.
            text: is not.
            where: for messages.

        Raises:
            TorchstoneError: the text alone is longer than the model's positions, an empty prompt without a start
                token.
        """
        self.model.vocabulary_head()
        if self.seq2seq:
            return self._in_decoder(prompt, text, where)
        shorter = prompt.rstrip()
        own, whole = self.tokenizer.encode_batch([shorter, prompt + text])
        if not whole:
            raise TorchstoneError(f"{where}: the tokenizer makes no token of {text!r}")
        # a text that melts into the prompt's last token is scored with that token
        seam = min(len(own), len(whole) - 1)
        limit = self.limit
        if self.masked:
            room = None if limit is None else limit - sum(map(len, self.frame))
            cut = self._cut(len(whole), len(whole) - seam, room, where)
            return Continuation(self._hidden(whole[cut:], range(seam - cut, len(whole) - cut)), cut)
        # as in generation, the start token stands for an empty prompt only
        before = (
            [] if self.prefix is not None and seam else self.tokenizer.template[0] or ([] if seam else [self.start])
        )
        ids, seam = [*before, *whole], seam + len(before)
        cut = self._cut(len(ids) - 1, len(ids) - seam, limit, where)
        ids, seam = ids[cut:], seam - cut
        return Continuation([Job(ids[:-1], range(seam - 1, len(ids) - 1), ids[seam:])], cut)

    def _in_decoder(self, prompt: str, text: str, where: str) -> Continuation:
        assert self.model.encoder is not None
        ids = [self.start, *self.tokenizer.encode(text)]
        self._cut(len(ids) - 1, len(ids) - 1, self.model.limit, where)
        memory = self.tokenizer.encode_input(prompt) or [self.start]
        cut = self._cut(len(memory), 0, self.model.encoder.limit, where)
        return Continuation([Job(ids[:-1], range(len(ids) - 1), ids[1:], memory[cut:])], cut)

    @staticmethod
    def _cut(length: int, scored: int, limit: int | None, where: str) -> int:
        """Tokens to leave out of `length` at the beginning."""
        if limit is None or length <= limit:
            return 0
        if scored > limit:
            raise TorchstoneError(f"{where}: {scored} tokens to score, the model knows {limit} positions")
        return length - limit

    # -- from jobs to scores

    def score(
        self, jobs: Iterable[tuple[K, Job]], title: str, of: int | None = None, greedy: bool = False
    ) -> Iterator[tuple[K, Score]]:
        """The score of each job beside its key, in the order of the jobs.

        Args:
            jobs: are read as they are needed, so there may be more than fit into memory.
            title, of: for the progress.
            greedy: whether to find out if the targets are the most probable tokens.

        Raises:
            TorchstoneError: the model gives numbers that are not finite.
        """

        def run(rows: list[tuple[K, Job]]) -> list[tuple[K, Score]]:
            scores = self._scores([job for _, job in rows], greedy)
            return [(key, score) for (key, _), score in zip(rows, scores, strict=True)]

        return self._sorted(jobs, lambda row: (len(row[1].ids), len(row[1].memory or ())), run, title, of)

    def totals(self, jobs: Iterable[tuple[K, Job]], title: str, of: int | None = None) -> dict[K, float]:
        """The sum of the log-likelihoods by key."""
        sums: dict[K, float] = {}
        for key, score in self.score(jobs, title, of):
            sums[key] = sums.get(key, 0.0) + score.logprob
        return sums

    def classify(self, rows: Sequence[Sequence[int]], title: str) -> list[int]:
        """The most probable class of each row of ids.

        Raises:
            TorchstoneError: the model gives numbers that are not finite.
        """

        @torch.inference_mode()
        def run(rows: list[Sequence[int]]) -> list[int]:
            logits_BC = self.model(self._padded(rows), **self._sight()).logits
            self._check(logits_BC)
            return logits_BC.argmax(-1).tolist()

        return list(self._sorted(rows, len, run, title, len(rows)))

    def _sorted(
        self,
        rows: Iterable[Any],
        length: Callable[[Any], Any],
        run: Callable[[list[Any]], list[Any]],
        title: str,
        of: int | None,
    ) -> Iterator[Any]:
        """What `run` gives for batches of rows of like length, in the order of the rows."""
        rest, done = iter(rows), 0
        while some := list(islice(rest, _BATCHES * self.batch)):
            order = sorted(range(len(some)), key=lambda i: length(some[i]), reverse=True)
            results: list[Any] = [None] * len(some)
            for a in range(0, len(order), self.batch):
                chosen = order[a : a + self.batch]
                for i, result in zip(chosen, run([some[i] for i in chosen]), strict=True):
                    results[i] = result
                done += len(chosen)
                self.progress.at(title, done, of)
            yield from results
        self.progress.end()

    @torch.inference_mode()
    def _scores(self, jobs: list[Job], greedy: bool) -> list[Score]:
        memory = {"memory": self._padded([job.memory or () for job in jobs])} if self.seq2seq else {}
        inputs = self._padded([job.ids for job in jobs])
        state = None
        if self.prefix is not None:
            state = self.prefix.fork(torch.zeros(len(jobs), dtype=torch.int64, device=self.device))
            state.extend(state.longest + inputs.index.shape[1])
        out = self.model(inputs, state=state, outputs="none", **self._sight(), **memory)
        counts = [len(job.at) for job in jobs]
        row_N = torch.arange(len(jobs)).repeat_interleave(torch.tensor(counts)).to(self.device)
        at_N = torch.tensor([at for job in jobs for at in job.at], device=self.device)
        target_N = torch.tensor([target for job in jobs for target in job.targets], device=self.device)
        product = self.model.vocabulary_head().product(out.hidden[row_N, at_N], self.model.embedding.table())
        nll_N = linear_nll(product.h, product.weight, target_N, bias_V=product.bias, softcap=product.softcap)
        self._check(nll_N)
        sums = [-piece.double().sum().item() for piece in nll_N.cpu().split(counts)]
        if not greedy:
            return [Score(total) for total in sums]
        best = [bool(piece.all()) for piece in _is_best(product, target_N).cpu().split(counts)]
        return [Score(total, same) for total, same in zip(sums, best, strict=True)]

    def _sight(self) -> dict[str, Any]:
        return {"mask": BIDIRECTIONAL if self.masked else self.attention}

    def _check(self, x: torch.Tensor) -> None:
        if not torch.isfinite(x).all():
            raise TorchstoneError("evaluate: the model gives numbers that are not finite")

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tokens:
        """Rows (B, T) padded on the right, which causality or `valid` hides."""
        T = max(map(len, rows))
        ids_BT = torch.tensor([[*row, *[0] * (T - len(row))] for row in rows], device=self.device)
        length_B1 = torch.tensor([[len(row)] for row in rows], device=self.device)
        alike = all(len(row) == T for row in rows)
        return Tokens.of(ids_BT, valid=None if alike else torch.arange(T, device=self.device)[None] < length_B1)


def _device(name: str) -> torch.device:
    try:
        return choose_device(name)
    except RuntimeError:  # what torch says of a word that names no device
        raise TorchstoneError(f"evaluate: no device {name!r}; allowed: auto, cpu, cuda, cuda:N, mps") from None


def _is_best(product: Product, target_N: torch.Tensor) -> torch.Tensor:
    """Whether each target (N,) has the largest logit of its row."""
    rows = max(1, _LOGITS // product.weight.shape[0])
    best = [
        Product(product.h[a : a + rows], product.weight, product.bias, product.softcap).logits().argmax(-1)
        for a in range(0, len(target_N), rows)
    ]
    return torch.cat(best) == target_N

"""Structured prompting (Hao et al. 2022, arXiv 2212.06713): more demonstrations than fit into a model's window.

The demonstrations are cut into M groups of equal length. Each group is encoded by itself, at the same positions
(section 2.1), and what comes after sees the keys and values of all groups. A token that comes after counts for M of a
group's, so that its share of the attention is what it would be after one group (section 2.2, equation 5)::

    p(j) ~ exp(s_j)       j a token of any group
    p(j) ~ M exp(s_j)     j the query itself or a token before it, after the groups

Softmax does not change when all its scores are moved, so the cache holds the weight as a score offset -log M on the
groups' keys, made once, and no exponential is multiplied by M. Encoding costs M L^2 instead of (M L)^2 for one prompt
of M L tokens.

Shapes: B groups encoded at once, T tokens, S cached tokens, N inputs, O options.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast, get_args

import torch

from torchstone.data import Tokenizer
from torchstone.errors import TorchstoneError
from torchstone.evaluate.scoring import Job, Scorer
from torchstone.generate import Completion, Engine, Sampling
from torchstone.model.state import State
from torchstone.model.tokens import Tokens
from torchstone.train.run import RunFolder

__all__ = ["Align", "Groups", "StructuredPrompt", "grouped"]

Align = Literal["truncate", "space", "mask"]
Text = str | Sequence[int]
"""A text, or its token ids."""
_Label = TypeVar("_Label", str, Sequence[int])


@dataclass(frozen=True)
class Groups:
    """What came of a call of `StructuredPrompt.add`.

    Attributes:
        groups: groups that were encoded.
        tokens: their tokens in all, without the start token.
        dropped: tokens of the last group, left out because it was not full; 0 if none was.
    """

    groups: int
    tokens: int
    dropped: int


def grouped(demonstrations: Sequence[Sequence[int]], length: int, align: Align) -> tuple[list[list[int]], list[int]]:
    """Groups of at most `length` tokens, in order, and the tokens of the last one where it was not filled.

    A group ends with the demonstration that fills it. One that would overfill it is the last of its group with
    `truncate`, which keeps the group's last `length` tokens, and the first of the next group otherwise.

    Raises:
        TorchstoneError: a demonstration alone is longer than a group, and nothing may be cut.
    """
    groups: list[list[int]] = []
    now: list[int] = []
    for number, ids in enumerate(demonstrations):
        if len(ids) > length and align != "truncate":
            raise TorchstoneError(
                f"demonstration {number}: {len(ids)} tokens, group_length is {length}; align: truncate cuts it"
            )
        if len(now) + len(ids) > length:
            groups.append([*now, *ids][-length:] if align == "truncate" else now)
            now = [] if align == "truncate" else list(ids)
        else:
            now = [*now, *ids]
        if len(now) == length:
            groups.append(now)
            now = []
    return groups, now


class StructuredPrompt:
    """A prompt of groups of demonstrations, encoded once, after which inputs are scored and continued.

    Args:
        source: a run, or an engine with its model and tokenizer. The cache belongs to the weights of this moment.
        group_length: L, tokens of a group; start token, group and input go into the window together.
        align: how a group that is not full is brought to the groups' common end. `truncate` overfills it and cuts its
            beginning, `space` puts blanks before it, `mask` leaves its first positions empty.
        weight: what a token after the groups counts for against one of a group; None is M, the number of groups, and
            1 leaves the attention as it is.
        scale_bos: whether the start token too is weighed as if it stood once in every group.
        bos: token before the groups, shared by all; "start" is the engine's, None is none.
        window: tokens that the model was trained to see; None is its `context`, as far as its positions reach.
        batch: groups, and afterwards inputs, in one forward. Every input in it has a copy of the cache.

    Raises:
        TorchstoneError: a group that is too long for the window, a model that cannot attend to groups encoded apart,
            an option that does not exist.
    """

    def __init__(
        self,
        source: RunFolder | Engine,
        *,
        group_length: int,
        align: Align = "truncate",
        weight: float | None = None,
        scale_bos: bool = False,
        bos: int | Literal["start"] | None = "start",
        window: int | None = None,
        batch: int = 8,
    ) -> None:
        self.engine = source if isinstance(source, Engine) else Engine.of_run(source, compile="off")
        model = self.engine.model
        if align not in get_args(Align):
            raise TorchstoneError(f"align: one of {', '.join(get_args(Align))}, not {align!r}")
        if weight is not None and not 0 < weight < math.inf:
            raise TorchstoneError(f"weight: needs a positive number, got {weight}")
        if batch < 1:
            raise TorchstoneError(f"batch: is {batch}, 1 or more is needed")
        start = self.engine.start if bos == "start" else bos
        self._before = [] if start is None else [start]
        known = [size for size in (window or model.spec.context, model.limit) if size is not None]
        self.window: int | None = min(known, default=None)
        if group_length < 1 or (self.window is not None and len(self._before) + group_length >= self.window):
            room = "" if self.window is None else f" to {self.window - len(self._before) - 1}"
            raise TorchstoneError(
                f"group_length: is {group_length}, 1{room} is possible"
                + ("" if self.window is None else f" with a window of {self.window} tokens")
            )
        model.check_offsets()
        State.joined([model.state(1, 1)])  # refuses what cannot be joined before anything is encoded
        self.group_length, self.align, self.weight, self.scale_bos = group_length, align, weight, scale_bos
        self.batch = batch
        self.groups = 0
        """M, the number of groups."""
        self._state: State | None = None

    @property
    def prefix(self) -> State:
        """Decode state of one row: the start token and all groups.

        Raises:
            TorchstoneError: there are no groups yet.
        """
        if self._state is None:
            raise TorchstoneError("structured prompt: holds no demonstrations yet; add some")
        return self._state

    def add(self, demonstrations: Sequence[Text]) -> Groups:
        """Encode demonstrations, joined as they stand, in groups; those encoded before stay as they are.

        A last group that is not full is left out, with a line on stderr, unless it is the only one.

        Raises:
            TorchstoneError: a demonstration is longer than a group and `align` does not cut, a text without a
                tokenizer, an id that is none.
        """
        ids = [self._ids(text, f"demonstration {number}") for number, text in enumerate(demonstrations)]
        groups, rest = grouped(ids, self.group_length, self.align)
        if rest and not groups and not self.groups:
            groups, rest = [rest], []
        if rest:
            print(
                f"structured prompt: the last group has {len(rest)} of {self.group_length} tokens and is left out",
                file=sys.stderr,
            )
        if self.align == "space":
            groups = [[*self._spaces(self.group_length - len(group)), *group] for group in groups]
        if groups:
            states = [self._encode(groups[a : a + self.batch]) for a in range(0, len(groups), self.batch)]
            held = [] if self._state is None else [self._state]
            self._state = State.joined([*held, *states], shared=len(self._before))
            self.groups += len(groups)
            self._weigh()
        return Groups(len(groups), sum(map(len, groups)), len(rest))

    def _spaces(self, count: int) -> list[int]:
        if count == 0:
            return []
        space = self._ids(" ", "align space")
        if len(space) != 1:
            raise TorchstoneError(
                f"align: space needs a tokenizer with one token for a blank, and it makes {len(space)}"
            )
        return space * count

    def _ids(self, text: Text, what: str) -> list[int]:
        """Tokens without special ones."""
        if isinstance(text, str):
            if self.engine.tokenizer is None:
                raise TorchstoneError(f"{what}: is a text, and the engine has no tokenizer; give token ids")
            return self.engine.tokenizer.encode(text)
        bad = next((token for token in text if not 0 <= token < self.engine.vocabulary), None)
        if bad is not None:
            raise TorchstoneError(f"{what}: no token {bad} in a vocabulary of {self.engine.vocabulary}")
        return list(text)

    @torch.no_grad()
    def _encode(self, groups: list[list[int]]) -> State:
        """State of B rows: the start token, then each group so that it ends at position L."""
        first, device = len(self._before), self.engine.device
        rows = [[*self._before, *group] for group in groups]
        T = max(map(len, rows))
        ids_BT = torch.tensor([[*row, *[0] * (T - len(row))] for row in rows], device=device)
        length_B1 = torch.tensor([[len(row)] for row in rows], device=device)
        order_T = torch.arange(T, device=device)
        empty_B1 = first + self.group_length - length_B1  # positions that a group does not fill
        position_BT = torch.where(order_T < first, order_T, order_T + empty_B1)
        state = self.engine.model.state(len(rows), T)
        tokens = Tokens.of(ids_BT, position=position_BT, valid=order_T < length_B1)
        self.engine.model(tokens, state=state, outputs="none")
        return state

    def _weigh(self) -> None:
        """Score offsets of the cached keys: minus the logarithm of what a later token counts for."""
        weight = self.groups if self.weight is None else self.weight
        order_S = torch.arange(self.prefix.extent, device=self.engine.device)
        kept_S = (order_S < len(self._before)) & self.scale_bos
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        offset_BS = torch.where(kept_S, 0.0, -math.log(weight)).to(dtype)[None]
        self.prefix.offset_BS = None if weight == 1 else offset_BS

    # -- after the groups

    def scorer(self) -> Scorer:
        """A scorer of texts that stand after the groups: what `torchstone.evaluate.multiple_choice` takes.

        Raises:
            TorchstoneError: there are no groups yet.
        """
        tokenizer = cast(Tokenizer, self.engine.tokenizer)  # token ids are scored without one
        return Scorer(self.engine.model, tokenizer, batch=self.batch, prefix=self.prefix)

    def score(self, inputs: Sequence[Text], options: Sequence[Text], per_token: bool = False) -> torch.Tensor:
        """Log-probability (N, O), in nats, of each option after each input; with `per_token` of a token of it.

        Input and option are joined as they stand: a blank between them has to be in one of the two.

        Raises:
            TorchstoneError: there are no groups yet, an input that is too long for the window, one without tokens.
        """
        scorer, jobs = self.scorer(), []
        scores_NO = torch.zeros(len(inputs), len(options), dtype=torch.float64)
        length_NO = torch.ones_like(scores_NO)
        for n, text in enumerate(inputs):
            for o, option in enumerate(options):
                job = self._job(scorer, text, option, f"input {n}")
                length_NO[n, o] = len(job.targets)
                jobs.append(((n, o), job))
        for (n, o), score in scorer.totals(jobs, "structured prompt", len(jobs)).items():
            scores_NO[n, o] = score
        return scores_NO / length_NO if per_token else scores_NO

    def _job(self, scorer: Scorer, text: Text, option: Text, where: str) -> Job:
        if isinstance(text, str) and isinstance(option, str):
            self._ids(text, where)
            continuation = scorer.continuation(text, option, where)
            (job,), cut = continuation.jobs, continuation.cut
        else:
            ids, targets, cut = self._ids(text, where), self._ids(option, "option"), 0
            if not ids or not targets:
                raise TorchstoneError(f"{where}: input and option need a token each")
            job = Job([*ids, *targets[:-1]], range(len(ids) - 1, len(ids) + len(targets) - 1), targets)
        self._fits(cut + len(job.ids), where)
        return job

    def _fits(self, length: int, where: str) -> None:
        taken = len(self._before) + self.group_length
        if self.window is not None and taken + length > self.window:
            raise TorchstoneError(
                f"{where}: {length} tokens do not fit into a window of {self.window} after {taken}; "
                "make group_length smaller"
            )

    def classify(self, inputs: Sequence[Text], labels: Sequence[_Label], per_token: bool = False) -> list[_Label]:
        """The label with the highest `score` after each input.

        Raises:
            TorchstoneError: as `score`.
        """
        return [labels[int(best)] for best in self.score(inputs, labels, per_token).argmax(1)]

    def generate(self, prompts: Sequence[Text], sampling: Sampling | None = None, **more: Any) -> list[Completion]:
        """Continue each prompt after the groups; the arguments are those of `torchstone.generate.Engine.generate`.

        Raises:
            TorchstoneError: there are no groups yet, a prompt that is too long for the window.
        """
        rows = [self._ids(prompt, f"prompt {n}") for n, prompt in enumerate(prompts)]
        for n, row in enumerate(rows):
            self._fits(len(row), f"prompt {n}")
        return self.engine.generate(rows, sampling, prefix=self.prefix, **more)

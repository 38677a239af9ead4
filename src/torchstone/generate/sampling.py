"""Sampling: how a token is chosen from logits. Pure functions of scores, composed in the order that users know.

    scores = sampling.adjust(logits, history)      # penalties, temperature, truncation
    ids = argmax(scores + gumbel)                   # or argmax(scores) at temperature 0

Each function equals the processor of Hugging Face transformers of the same name, so settings carry over.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field, field_validator

from torchstone.generate.noise import NoiseSource, Request
from torchstone.ops import at_least_float32
from torchstone.spec import Spec

__all__ = ["Choice", "Guide", "History", "Sampling", "min_p", "repetition_penalty", "temperature", "top_k", "top_p"]


@dataclass(frozen=True)
class History:
    """What a score function may know of the rows besides their logits.

    Attributes:
        requests: name of each row.
        step: number of new tokens that every row has.
        ids: prompt and new tokens of each row so far.
        seen_BV: which tokens each row's prompt and text hold; None unless the sampling asks for it.
    """

    requests: Sequence[Request]
    step: int
    ids: Sequence[Sequence[int]]
    seen_BV: torch.Tensor | None = None


Guide = Callable[[torch.Tensor, History], torch.Tensor]
"""A score function from outside, (B, V) -> (B, V): classifier guidance, grammars, watermark biases. It sees the logits
before everything else."""


def repetition_penalty(scores_BV: torch.Tensor, seen_BV: torch.Tensor, penalty: float) -> torch.Tensor:
    """Scores of seen tokens divided by `penalty` where positive, multiplied where negative (Keskar et al. 2019, arXiv
    1909.05858, section 4.1)."""
    lower = torch.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty)
    return torch.where(seen_BV, lower, scores_BV)


def temperature(scores_BV: torch.Tensor, value: float) -> torch.Tensor:
    """Scores divided by `value`."""
    return scores_BV / value


def top_k(scores_BV: torch.Tensor, k: int) -> torch.Tensor:
    """The `k` best scores of each row, and all that tie with the last of them; -inf elsewhere."""
    least = scores_BV.topk(min(k, scores_BV.shape[-1]), -1).values[..., -1:]
    return scores_BV.masked_fill(scores_BV < least, float("-inf"))


def top_p(scores_BV: torch.Tensor, p: float) -> torch.Tensor:
    """The fewest best tokens whose probabilities sum to at least `p` (Holtzman et al. 2019, arXiv 1904.09751, section
    3.1); -inf elsewhere. At least one token stays."""
    if p >= 1.0:
        return scores_BV
    ordered, order = scores_BV.sort(-1)
    drop = ordered.softmax(-1).cumsum(-1) <= 1 - p
    drop[..., -1] = False
    return scores_BV.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), float("-inf"))


def min_p(scores_BV: torch.Tensor, p: float) -> torch.Tensor:
    """Tokens at least `p` times as probable as the best (Nguyen et al. 2024, arXiv 2407.01082, section 3); -inf
    elsewhere."""
    probs = scores_BV.softmax(-1)
    drop = probs < p * probs.amax(-1, keepdim=True)
    return scores_BV.masked_fill(drop, float("-inf"))


@dataclass(frozen=True)
class Choice:
    """One new token of each row, and what was asked to be recorded of it.

    Attributes:
        ids_B: the tokens.
        logprobs_B: their log-probabilities in the model's own distribution (temperature 1, nothing cut or penalised).
        adjusted_B: their log-probabilities in the distribution that they were drawn from.
        best_Bn: the n most probable tokens of the model's own distribution.
        best_logprobs_Bn: their log-probabilities.
    """

    ids_B: torch.Tensor
    logprobs_B: torch.Tensor | None = None
    adjusted_B: torch.Tensor | None = None
    best_Bn: torch.Tensor | None = None
    best_logprobs_Bn: torch.Tensor | None = None


class Sampling(Spec):
    """How text is written: from which part of the distribution, how much of it, when to end."""

    temperature: float = Field(1.0, ge=0, le=100)
    """Scores are divided by it; 0 takes the best token (greedy)."""
    top_k: int | None = Field(None, ge=1)
    """Sample among the k best tokens."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Sample among the fewest best tokens that hold this probability."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Drop tokens less probable than this share of the best one's probability."""
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    """Above 1, tokens of the prompt and of the text so far become less probable."""
    max_new_tokens: int = Field(128, ge=1)
    """Tokens to write at most."""
    stop: tuple[str, ...] = ()
    """Texts before which writing ends."""
    seed: int = 0
    """Seed of the sampling noise."""
    logprobs: int | None = Field(None, ge=0, le=1000)
    """Record log-probabilities: of the chosen token, and of this many most probable ones."""

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("an empty text would end every generation before its first token")
        return value

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Fields that a ``generation_config.json`` sets, by its own rule: without ``do_sample`` the best token is
        taken."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        found = {name: settings[name] for name in names if settings.get(name) is not None}
        if not found.get("top_k"):
            found.pop("top_k", None)  # 0 keeps all
        return found if settings.get("do_sample") else {**found, "temperature": 0.0}

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken, without noise."""
        return self.temperature == 0.0

    @property
    def plain(self) -> bool:
        """Whether the choice is the argmax of the logits themselves and nothing is recorded."""
        return self.greedy and self.repetition_penalty == 1.0 and self.logprobs is None

    def adjust(
        self, logits_BV: torch.Tensor, history: History | None = None, guides: Sequence[Guide] = ()
    ) -> torch.Tensor:
        """Scores (B, V), at least float32, whose softmax is what is sampled from; at temperature 0 only guides and
        penalties apply, since nothing else changes which token is best."""
        scores = at_least_float32(logits_BV)
        for guide in guides:
            assert history is not None
            scores = guide(scores, history)
        if self.repetition_penalty != 1.0:
            assert history is not None and history.seen_BV is not None
            scores = repetition_penalty(scores, history.seen_BV, self.repetition_penalty)
        if self.greedy:
            return scores
        if self.temperature != 1.0:
            scores = temperature(scores, self.temperature)
        if self.top_k is not None:
            scores = top_k(scores, self.top_k)
        if self.top_p is not None:
            scores = top_p(scores, self.top_p)
        if self.min_p is not None:
            scores = min_p(scores, self.min_p)
        return scores

    def choose(
        self, logits_BV: torch.Tensor, history: History, noise: NoiseSource, guides: Sequence[Guide] = ()
    ) -> Choice:
        """A token for each row, an exact sample of ``softmax(adjust(logits))``."""
        scores = self.adjust(logits_BV, history, guides)
        if self.greedy:
            ids = scores.argmax(-1)
        else:
            drawn = noise.gumbel(history.requests, history.step, scores.shape[-1], scores.device)
            ids = (scores + drawn).argmax(-1)
        if self.logprobs is None:
            return Choice(ids)
        own = at_least_float32(logits_BV).log_softmax(-1)
        at = ids[:, None]
        # at temperature 0 the distribution that is drawn from holds one token
        adjusted = torch.zeros_like(own[:, 0]) if self.greedy else scores.log_softmax(-1).gather(1, at)[:, 0]
        best = own.topk(min(self.logprobs, own.shape[-1]), -1) if self.logprobs else None
        return Choice(
            ids,
            own.gather(1, at)[:, 0],
            adjusted,
            None if best is None else best.indices,
            None if best is None else best.values,
        )

"""What a model of preferences thinks of an answer: the reward for helpfulness and harmlessness in the last stage of
DeepSeek-R1 (DeepSeek-AI 2025, arXiv 2501.12948, section 2.3.4), where helpfulness is judged by the final summary alone
and harmlessness by the whole text, thoughts included.

The text becomes a row as in the pairs that the model was trained on (`torchstone.data.preferences`), by its own
tokenizer: front, prompt, answer, and the reward is read at the last token. A prompt that is too long loses its
beginning. An answer that leaves no room in a row cannot be scored: its kind was left out of the training too.

The prompt is a field of the row as it stands there, without a template that the policy's data may put around it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator

from torchstone.errors import TorchstoneError
from torchstone.model.tokens import Tokens
from torchstone.rl.reward import Reward, RewardSpec
from torchstone.train.environment import choose_device
from torchstone.train.run import RunFolder

__all__ = ["ModelReward", "RewardModelSpec"]


class RewardModelSpec(RewardSpec):
    """The score of a run that was trained on preferences by ``objective: reward_model``."""

    paper: ClassVar[str] = "DeepSeek-AI 2025, arXiv 2501.12948"

    run: str = Field(min_length=1)
    """Directory of that run."""
    prompt: str | None = Field("prompt", min_length=1)
    """The field that holds the prompt; None scores answers by themselves."""
    inside: str | None = Field(None, min_length=1)
    """Regular expression; only its last match is scored, or that one's first group: a final summary. Where it finds
    none the empty text is scored. None scores the whole answer."""
    batch: int = Field(32, ge=1, le=65536)
    """Answers that are scored at once."""
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """Where the model runs."""

    @field_validator("inside")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return value

    @property
    def columns(self) -> tuple[str, ...]:
        return () if self.prompt is None else (self.prompt,)

    def build(self) -> Reward:
        folder = RunFolder(self.run).require()
        kind = folder.recipe.objective.kind
        if kind != "reward_model":
            raise TorchstoneError(f"reward reward_model: {self.run} was trained by {kind}, not by reward_model")
        return ModelReward(self, folder)


class ModelReward:
    """The reward; its model is read when it is first asked.

    Args:
        spec: what is scored, and where.
        folder: the run.
    """

    def __init__(self, spec: RewardModelSpec, folder: RunFolder) -> None:
        self.spec, self.folder = spec, folder
        self._model: Any = None
        self.block: int = folder.recipe.data.block  # type: ignore[attr-defined]
        self.tokenizer = folder.tokenizer()

    def __call__(self, text: str, row: Mapping[str, Any]) -> float | None:
        return self.batch([text], [row])[0]

    @torch.no_grad()
    def batch(self, texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
        """The reward of each text, answers to prompts in `rows`; the same alone and among others."""
        prompts = ["" if self.spec.prompt is None else str(row[self.spec.prompt]) for row in rows]
        encoded = self.tokenizer.encode_batch([*prompts, *map(self._judged, texts)])
        ids = [self._row(*both) for both in zip(encoded[: len(texts)], encoded[len(texts) :], strict=True)]
        found: list[float | None] = [None] * len(texts)
        fit = sorted((n for n, some in enumerate(ids) if some), key=lambda n: len(ids[n]))
        for first in range(0, len(fit), self.spec.batch):
            some = fit[first : first + self.spec.batch]
            for n, reward in zip(some, self._scores([ids[n] for n in some]), strict=True):
                found[n] = reward
        return found

    def _judged(self, text: str) -> str:
        if self.spec.inside is None:
            return text
        found = list(re.finditer(self.spec.inside, text, re.DOTALL))
        return found[-1].group(min(1, found[-1].re.groups)) or "" if found else ""

    def _row(self, prompt: list[int], answer: list[int]) -> list[int]:
        """Ids of a row; none where the answer does not fit."""
        front = self.tokenizer.front
        room = self.block - len(front) - len(answer)
        return [*front, *prompt[max(0, len(prompt) - room) :], *answer] if room >= 0 else []

    def _scores(self, ids: Sequence[Sequence[int]]) -> list[float]:
        if self._model is None:
            self._model = self.folder.model(device=choose_device(self.spec.device))
        device = next(self._model.parameters()).device
        longest = max(map(len, ids))
        ids_BT = torch.tensor([[*some, *[self.tokenizer.pad] * (longest - len(some))] for some in ids], device=device)
        length_B = torch.tensor([len(some) for some in ids], device=device)
        valid_BT = torch.arange(longest, device=device) < length_B[:, None]
        # whatever precision the policy trains in
        with torch.autocast(device.type, enabled=False):
            return self._model(Tokens.of(ids_BT, valid=valid_BT)).logits[:, 0].tolist()

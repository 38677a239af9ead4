"""The answer itself, or the part of it that a pattern captures, is that of the prompt's field."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator

from torchstone.rl.reward import Reward, RewardSpec

__all__ = ["ExactSpec"]


class ExactSpec(RewardSpec):
    """1 for the text of a field of the prompt, blanks around it aside."""

    answer: str = Field("answer", min_length=1)
    """The field that holds the right answer."""
    pattern: str | None = Field(None, min_length=1)
    """Regular expression whose first group, where it matches last, is compared; None compares the whole text."""

    @field_validator("pattern")
    @classmethod
    def _captures(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                groups = re.compile(value).groups
            except re.error as error:
                raise ValueError(f"is no regular expression: {error}") from None
            if groups < 1:
                raise ValueError("needs a group: the part in parentheses is compared")
        return value

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.answer,)

    def answer_of(self, text: str) -> str | None:
        if self.pattern is None:
            return text.strip()
        found = [match.group(1) for match in re.finditer(self.pattern, text, re.DOTALL)]
        return found[-1].strip() if found and found[-1] is not None else None

    def build(self) -> Reward:
        def reward(text: str, row: Mapping[str, Any]) -> float:
            return float(self.answer_of(text) == str(row[self.answer]).strip())

        return reward

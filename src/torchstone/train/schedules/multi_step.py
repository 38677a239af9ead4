"""A learning rate that falls in steps (DeepSeek LLM, arXiv 2401.02954, section 2.3)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from torchstone.train.schedules import ScheduleSpec

__all__ = ["MultiStepSpec"]


class MultiStepSpec(ScheduleSpec):
    """The peak, then lower plateaus from given shares of the training on."""

    paper: ClassVar[str] = "DeepSeek-AI 2024, arXiv 2401.02954"

    at: tuple[float, ...] = Field((0.8, 0.9), min_length=1)
    """Shares of the steps at which the rate falls, rising."""
    to: tuple[float, ...] = Field((0.316, 0.1), min_length=1)
    """Share of the peak from each of them on."""

    @model_validator(mode="after")
    def _match(self) -> MultiStepSpec:
        if len(self.at) != len(self.to):
            raise ValueError(f"at has {len(self.at)} entries and to has {len(self.to)}; they belong together")
        if list(self.at) != sorted(self.at) or not all(0 <= share <= 1 for share in (*self.at, *self.to)):
            raise ValueError("at must rise, and all shares lie between 0 and 1")
        return self

    def shape(self, step: int, steps: int) -> float:
        factor = 1.0
        for share, level in zip(self.at, self.to, strict=True):
            if step >= share * steps:
                factor = level
        return factor

"""A learning rate that falls in a straight line."""

from __future__ import annotations

from pydantic import Field

from torchstone.train.schedules import ScheduleSpec

__all__ = ["LinearSpec"]


class LinearSpec(ScheduleSpec):
    """From the peak to `end` in a straight line."""

    end: float = Field(0.0, ge=0, le=1)
    """Share of the peak at the last step."""

    def shape(self, step: int, steps: int) -> float:
        return 1.0 + (self.end - 1.0) * min(1.0, step / max(1, steps - 1))

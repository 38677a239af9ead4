"""A learning rate that falls along half a cosine (Loshchilov and Hutter 2016, arXiv 1608.03983, eq. 5, no restart)."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field

from torchstone.train.schedules import ScheduleSpec

__all__ = ["CosineSpec"]


class CosineSpec(ScheduleSpec):
    """From the peak to `end` along half a cosine."""

    paper: ClassVar[str] = "Loshchilov and Hutter 2016, arXiv 1608.03983"

    end: float = Field(0.1, ge=0, le=1)
    """Share of the peak at the last step."""

    def shape(self, step: int, steps: int) -> float:
        done = min(1.0, step / max(1, steps - 1))
        return self.end + (1.0 - self.end) * 0.5 * (1.0 + math.cos(math.pi * done))

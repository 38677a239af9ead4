"""A learning rate that stays."""

from __future__ import annotations

from torchstone.train.schedules import ScheduleSpec

__all__ = ["ConstantSpec"]


class ConstantSpec(ScheduleSpec):
    """The peak rate after the warm-up."""

    def shape(self, step: int, steps: int) -> float:
        return 1.0

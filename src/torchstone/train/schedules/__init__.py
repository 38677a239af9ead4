"""Schedules of the learning rate: pure functions of the step, so that resuming needs no state."""

from __future__ import annotations

from torchstone.recipe import ScheduleSpec
from torchstone.spec import lazy_parts

__all__ = ["ScheduleSpec"]

__getattr__ = lazy_parts(__name__)

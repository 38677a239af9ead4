"""Warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395, section 4.2): constant, then a short fall."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from torchstone.train.schedules import ScheduleSpec

__all__ = ["WSDSpec"]


class WSDSpec(ScheduleSpec):
    """The peak for most of the training, then a fall to `end` over its last part."""

    paper: ClassVar[str] = "Hu et al. 2024, arXiv 2404.06395"

    decay: float = Field(0.2, ge=0, le=1)
    """Share of the steps that the fall takes."""
    end: float = Field(0.0, ge=0, le=1)
    """Share of the peak at the last step."""
    form: Literal["linear", "sqrt"] = "linear"
    """Shape of the fall: a straight line, or one minus the square root (Haegele et al. 2024, arXiv 2405.18392)."""

    def shape(self, step: int, steps: int) -> float:
        fall = round(self.decay * steps)
        begin = steps - fall
        if step < begin:
            return 1.0
        done = min(1.0, (step - begin + 1) / max(1, fall))
        return 1.0 + (self.end - 1.0) * (done if self.form == "linear" else done**0.5)

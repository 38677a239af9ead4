"""T5's relative bias beside BERT's learned vectors (METRO-LM; Bajaj et al. 2022, arXiv 2204.06644).

The bias of `t5` in every layer, and one vector per position that is added to the token embedding, as `learned` has it.
"""

from __future__ import annotations

from typing import ClassVar

from torchstone.model.position import PositionSpec
from torchstone.model.position.learned import LearnedSpec
from torchstone.model.position.t5 import T5Spec

__all__ = ["T5LearnedSpec"]


class T5LearnedSpec(T5Spec):
    """A learned score bias per head and bucket of distance, and a learned vector per position."""

    paper: ClassVar[str] = "Bajaj et al. 2022, arXiv 2204.06644"

    @property
    def added(self) -> PositionSpec:
        return LearnedSpec(std=self.std)

"""Whether an answer has the form that DeepSeek-R1 (2025, arXiv 2501.12948, section 2.2.2) rewards: thoughts in one pair
of tags, then the answer in another, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from torchstone.rl.reward import Reward, RewardSpec

__all__ = ["ThinkFormatSpec"]

_FORM = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")


class ThinkFormatSpec(RewardSpec):
    """1 for exactly ``<think>..</think><answer>..</answer>``, each tag once."""

    paper: ClassVar[str] = "DeepSeek-AI 2025, arXiv 2501.12948"

    def build(self) -> Reward:
        def reward(text: str, row: Mapping[str, Any]) -> float:
            return float(_FORM.fullmatch(text) is not None and len(_TAG.findall(text)) == 4)

        return reward

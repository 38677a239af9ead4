r"""Whether the final answer is the right number or formula: the accuracy reward of DeepSeek-R1 (2025, arXiv
2501.12948, section 2.2.2), by rules.

The answer is what stands last in ``<answer>..</answer>`` or ``\boxed{..}``, whichever closes last in the text; in a
tag that holds a box, the box counts. Both sides are put into one form before they are compared: no blanks, bold, signs
of dollars or per cent, or text around; minus signs, commas between thousands and zeros behind the point alike;
``\frac{a}{b}`` as a/b and fractions and decimals by their value. Nothing is evaluated beyond that: 2+2 is not 4.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from fractions import Fraction
from typing import Any, ClassVar

from pydantic import Field

from torchstone.rl.reward import Reward, RewardSpec

__all__ = ["ANSWER_TAG", "MathAnswerSpec", "final_answer", "normal_form"]

ANSWER_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
"""Each ``<answer>..</answer>`` that closes, from the last that opens."""
_FRAC = re.compile(r"\\[dt]?frac(?:\{([^{}]*)\}\{([^{}]*)\}|(\d)(\d))")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:/\d+)?")
_DIGITS = 4000
"""Digits of a number that are read; Python refuses more than 4,300."""
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d*)?")


class MathAnswerSpec(RewardSpec):
    r"""1 where the last ``\boxed{..}`` or ``<answer>`` holds the right number or formula."""

    paper: ClassVar[str] = "DeepSeek-AI 2025, arXiv 2501.12948"

    answer: str = Field("answer", min_length=1)
    """The field that holds the right answer, alone or, as in GSM8K, behind ``####``."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.answer,)

    def answer_of(self, text: str) -> Hashable | None:
        found = final_answer(text)
        return None if found is None else normal_form(found)

    def build(self) -> Reward:
        def reward(text: str, row: Mapping[str, Any]) -> float:
            wanted, found = str(row[self.answer]).rpartition("####")[2], final_answer(text)
            wanted = boxed[-1][1] if (boxed := _boxed(wanted)) else wanted
            return float(found is not None and normal_form(found) == normal_form(wanted))

        return reward


def _boxed(text: str) -> list[tuple[int, str]]:
    r"""End and content of each ``\boxed{..}`` that closes, braces inside balanced."""
    found, opened = [], []  # where braces opened that are not closed yet: behind a box's, or None
    for match in re.finditer(r"\\boxed\s*\{|[{}]", text):
        if match.group() != "}":
            opened.append(match.end() if len(match.group()) > 1 else None)
        elif opened and (first := opened.pop()) is not None:
            found.append((match.start(), text[first : match.start()]))
    return found


def final_answer(text: str) -> str | None:
    """What a text gives as its answer; None if it gives none."""
    found = [(match.end(), match.group(1)) for match in ANSWER_TAG.finditer(text)] + _boxed(text)
    if not found:
        return None
    answer = max(found)[1]
    return inner[-1][1] if (inner := _boxed(answer)) else answer


def normal_form(text: str) -> str | Fraction:
    """One form of all ways to write a number, else of the text."""
    text = text.replace("\u2212", "-").replace("\u2013", "-").replace("\uff0d", "-")
    text = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[,;:! ()$%]|\\left|\\right|[\s$]", "", text).rstrip(".")
    text = re.sub(r"^\*\*(.*)\*\*$", r"\1", text)
    text = _FRAC.sub(r"\1\3/\2\4", text)
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if len(text) <= _DIGITS and _NUMBER.fullmatch(text):
        top, _, bottom = text.partition("/")
        if not bottom or int(bottom):
            return Fraction(top) / int(bottom or 1)
    return text

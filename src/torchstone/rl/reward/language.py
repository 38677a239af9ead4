"""How much of a text is in one script: the language consistency reward of DeepSeek-R1 (2025, arXiv 2501.12948, section
2.3.2), which keeps chains of thought from mixing languages.

A word counts if all its letters are of the target, letters being told by their Unicode names; with an `alphabet` each
character that is of any listed kind counts by itself.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator

from torchstone.rl.reward import Reward, RewardSpec

__all__ = ["LanguageSpec"]


class LanguageSpec(RewardSpec):
    """The share of a text's words in one script, or of its characters in one alphabet."""

    paper: ClassVar[str] = "DeepSeek-AI 2025, arXiv 2501.12948"

    script: str = Field("latin", min_length=1)
    """First word of the Unicode names of its letters: latin, cyrillic, greek, cjk, hangul, arabic."""
    alphabet: str | None = Field(None, min_length=1)
    """Characters that count as the target's, in the place of a script."""
    others: str | None = Field(None, min_length=1)
    """With an alphabet: characters that count against it; None is all others but blanks."""
    inside: str | None = Field(None, min_length=1)
    """Regular expression; only what it matches is looked at, or its first group. None looks at the whole text."""

    @model_validator(mode="after")
    def _sound(self) -> LanguageSpec:
        if self.others is not None and self.alphabet is None:
            raise ValueError("others: goes with an alphabet, and none is given")
        try:
            re.compile(self.inside or "")
        except re.error as error:
            raise ValueError(f"inside: is no regular expression: {error}") from None
        return self

    def build(self) -> Reward:
        inside = None if self.inside is None else re.compile(self.inside, re.DOTALL)

        def reward(text: str, row: Mapping[str, Any]) -> float:
            if inside is not None:
                text = "\n".join(match.group(min(1, inside.groups)) or "" for match in inside.finditer(text))
            good, all = self._by_character(text) if self.alphabet is not None else self._by_word(text)
            return good / all if all else 0.0

        return reward

    def _by_character(self, text: str) -> tuple[int, int]:
        assert self.alphabet is not None
        good = sum(text.count(character) for character in set(self.alphabet))
        if self.others is None:
            return good, sum(not character.isspace() for character in text)
        return good, good + sum(text.count(character) for character in set(self.others) - set(self.alphabet))

    def _by_word(self, text: str) -> tuple[int, int]:
        words = [letters for word in text.split() if (letters := [c for c in word if c.isalpha()])]
        return sum(all(_script(letter) == self.script.lower() for letter in word) for word in words), len(words)


@functools.cache
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").split(" ")[0].lower()

"""Root of the `data` family: what a model is trained on."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, ClassVar

from torchstone.spec import PartSpec, kinds

__all__ = ["DataSpec"]


class DataSpec(PartSpec):
    """What a model is trained on: packed text, a synthetic task; domains add formats of their own.

    ``data: ./my_files`` is short for a `text` corpus of that path, ``data: records.jsonl`` for a `jsonl` corpus,
    ``data: stdlib`` for that corpus and ``data: recall`` for that kind (unless a file of that name exists).
    """

    family: ClassVar[str] = "data"
    default_kind: ClassVar[str] = "text"
    paired: ClassVar[bool] = False
    """Whether an example is two rows that an objective compares: ids (B, 2, T) in the place of (B, T)."""
    example: ClassVar[str] = "tokens"
    """What an example is made of; a recipe's model and objective say the same, or nothing."""
    separated: ClassVar[bool] = False
    """Whether each example is a row that begins as `Tokenizer.front` says, as prompts with their answers do."""
    fills: ClassVar[tuple[str, ...]] = ("vocabulary", "context")
    """Fields of a model that the data fill in where they are open."""

    @classmethod
    def short(cls, value: str) -> dict[str, Any]:
        if not os.path.exists(value):
            if value in kinds("corpus"):
                return {"kind": "text", "corpus": {"kind": value}}
            if value in kinds("data"):
                return {"kind": value}
        return {"kind": "text", "corpus": {"kind": "jsonl" if value.endswith(".jsonl") else "text", "path": value}}

    def prepare(self, progress: Callable[[str], None] | None = None) -> Any:
        """The splits, ready to train on: `train`, `valid`, `test`, `description`, `hash` and `tokenizer` as in
        `torchstone.data.Prepared`; `tokenizer` is None where the ids are no text. What it may have besides: `sizes`,
        numbers by name (entities, classes) that a model takes where its field of that name is open; `names` by the
        same words, which a run keeps.
        """
        raise NotImplementedError

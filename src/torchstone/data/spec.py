"""Root of the `data` family: what a model is trained on."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torchstone.spec import PartSpec, kinds

if TYPE_CHECKING:
    from torchstone.data.prepare import Prepared

__all__ = ["DataSpec"]


class DataSpec(PartSpec):
    """What a model is trained on. `text` is packed text; domains add formats of their own.

    ``data: ./my_files`` is short for a `text` corpus of that path, ``data: records.jsonl`` for a `jsonl` corpus, and
    ``data: stdlib`` for that corpus (unless a file of that name exists).
    """

    family: ClassVar[str] = "data"
    default_kind: ClassVar[str] = "text"

    @classmethod
    def short(cls, value: str) -> dict[str, Any]:
        if value in kinds("corpus") and not os.path.exists(value):
            return {"kind": "text", "corpus": {"kind": value}}
        return {"kind": "text", "corpus": {"kind": "jsonl" if value.endswith(".jsonl") else "text", "path": value}}

    def prepare(self, progress: Callable[[str], None] | None = None) -> Prepared:
        """The splits, ready to train on, made once and cached."""
        raise NotImplementedError

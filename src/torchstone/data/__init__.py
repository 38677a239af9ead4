"""Data: corpora -> split -> tokenizer -> memory-mapped blocks -> batches.

`DataSpec` says what, `prepare` does it once and caches it, `Blocks` serves batches that are pure functions of a key and
a step. Importing this package imports neither torch nor numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchstone.data.corpora import CorpusSpec, Document
from torchstone.data.prepare import Prepared, prepare
from torchstone.data.spec import DataSpec
from torchstone.data.text import TextDataSpec
from torchstone.data.tokenizers import TokenizerSpec

if TYPE_CHECKING:
    from torchstone.data.blocks import Blocks
    from torchstone.data.tokenizer import Tokenizer

__all__ = [
    "Blocks",
    "CorpusSpec",
    "DataSpec",
    "Document",
    "Prepared",
    "TextDataSpec",
    "Tokenizer",
    "TokenizerSpec",
    "prepare",
]

_LAZY = {"Blocks": "blocks", "Tokenizer": "tokenizer"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)

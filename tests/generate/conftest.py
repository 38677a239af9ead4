"""What several tests of generation share."""

from __future__ import annotations

import pytest

from torchstone.data.tokenizer import BYTE_CHARACTERS, Tokenizer, byte_level


@pytest.fixture(scope="session")
def letters() -> Tokenizer:
    """A tokenizer of bytes: 256 of them and three special tokens."""
    return byte_level({character: i for i, character in enumerate(BYTE_CHARACTERS)})

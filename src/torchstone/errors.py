"""The one error class: a sentence for the person who typed the input."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["TorchstoneError", "nearest"]


class TorchstoneError(Exception):
    """Bad input or a broken environment, said in one sentence.

    The message names the thing, what was found and what is allowed. The command line prints it as one line and exits
    with status 2; from Python it is an ordinary exception. A bug in Torchstone itself raises something else.
    """


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest of `allowed`, or an empty string when nothing is close."""
    match = difflib.get_close_matches(str(word), [str(name) for name in allowed], n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""

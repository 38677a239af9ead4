"""Text from tokens as they come: complete characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from torchstone.data import Tokenizer

__all__ = ["Writer"]


class Writer:
    """Turns the tokens of one row into pieces of text.

    What could be the beginning of a stop string is held back until it is known not to be one. `stopped` tells that a
    stop string came; the text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = ()) -> None:
        self._stream = None if tokenizer is None else tokenizer.stream()
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that this token makes certain; empty while a character or a stop string may be incomplete."""
        if self._stream is None:
            return ""
        piece = self._stream.add(token)
        return self._release(piece) if self._stop else piece

    def end(self) -> str:
        """The rest, when no more tokens come. Half a character at the end is dropped."""
        if self._stream is None or self.stopped:
            return ""
        piece = self._stream.end().rstrip("\ufffd")
        text = self._release(piece) if self._stop else piece
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _release(self, piece: str) -> str:
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

"""Progress of an evaluation: one line on stderr, rewritten in place on a terminal."""

from __future__ import annotations

import sys
import time

__all__ = ["Progress"]


class Progress:
    """Says on stderr how far an evaluation is. `quiet` says nothing."""

    def __init__(self, quiet: bool = False, every: float = 10.0) -> None:
        self.quiet = quiet
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._every = 0.2 if self._terminal else every
        self._said, self._open = time.monotonic(), False

    def at(self, title: str, done: int, of: int | None = None) -> None:
        """`done` sequences of `title` are scored."""
        now = time.monotonic()
        if self.quiet or now - self._said < self._every:
            return
        self._said = now
        text = f"{title}: {done:,}{'' if of is None else f' of {of:,}'} sequences"
        if self._terminal:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
            self._open = True
        else:
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line."""
        if self._open:
            print(file=sys.stderr, flush=True)
            self._open = False

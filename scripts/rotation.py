"""pytest plugin: one slice of the slow tests, chosen by a count, within a time limit.

    PYTHONPATH=scripts ROTATION_COUNT=$(git rev-list --count HEAD) pytest -p rotation

A run with count c takes the slow tests i, i + SLICES, i + 2 * SLICES, ... in order of their names, where i = c modulo
SLICES. It begins at another one of them in each round, so that a slice longer than the limit still gets to all its
tests. After ROTATION_SECONDS (default 180) no further test starts; how many did not is in the summary.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import pytest

SLICES = 11  # prime: if the count always grows by the same number of commits, every slice still has its turn
SHARE = 0.618  # of a slice: how far the beginning moves each round, so that beginnings spread evenly

T = TypeVar("T")


def choose(tests: Sequence[T], count: int, slices: int = SLICES) -> list[T]:
    """The tests of the run with this count, in the order in which they are run."""
    turn, index = divmod(count, slices)
    mine = list(tests[index::slices])
    start = int(turn * SHARE * len(mine)) % len(mine) if mine else 0
    return mine[start:] + mine[:start]


class Rotation:
    def __init__(self, count: int, seconds: float) -> None:
        self.count, self.seconds = count, seconds
        self.slow = self.chosen = self.left = 0
        self.start: float | None = None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        slow = sorted((item for item in items if item.get_closest_marker("slow")), key=lambda item: item.nodeid)
        chosen = choose(slow, self.count)
        self.slow, self.chosen = len(slow), len(chosen)
        kept = set(chosen)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = chosen

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        self.start = self.start or time.monotonic()
        if time.monotonic() - self.start < self.seconds:
            return None
        self.left += 1
        return True  # dealt with: neither started nor reported as skipped

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist tells the main one
            session.config.workeroutput["rotation"] = (self.slow, self.chosen, self.left)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.slow, self.chosen, left = getattr(node, "workeroutput", {}).get("rotation", (self.slow, self.chosen, 0))
        self.left += left

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(
            f"rotation: slice {self.count % SLICES} of {SLICES} has {self.chosen} of {self.slow} slow tests; "
            f"{self.left} of them not started within {self.seconds:g} s"
        )


def pytest_configure(config: pytest.Config) -> None:
    count = int(os.environ.get("ROTATION_COUNT", "0"))
    config.pluginmanager.register(Rotation(count, float(os.environ.get("ROTATION_SECONDS", "180"))), "rotation-slice")

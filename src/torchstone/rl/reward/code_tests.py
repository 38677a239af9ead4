"""Whether a program passes its tests: the accuracy reward of DeepSeek-R1 (2025, arXiv 2501.12948, section 2.2.2) for
code.

The program is the last fenced block of the text, else what stands in ``<answer>..</answer>``, else all of it. It runs
in a Python process of its own, in an empty folder, with the tests behind it, and has passed where all of them ran to
their end: a program that leaves before them has not. Time, memory and the size of files are limited. That keeps a
training going; it is no sandbox. A program may read files and reach the network: train where that does no harm.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from torchstone.rl.reward import Reward, RewardSpec
from torchstone.rl.reward.math_answer import ANSWER_TAG

__all__ = ["CodeTestsSpec", "program_of"]

_FENCED = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
_LARGEST = 1 << 24
"""Bytes of a file that a program may write."""


class CodeTestsSpec(RewardSpec):
    """1 where a Python program passes the tests of its prompt."""

    paper: ClassVar[str] = "DeepSeek-AI 2025, arXiv 2501.12948"

    tests: str = Field("tests", min_length=1)
    """The field that holds the tests: Python that raises where one fails, or a list of such lines."""
    seconds: float = Field(10.0, gt=0, le=3600)
    """Time of a program and its tests."""
    memory: int = Field(1024, ge=64, le=2**20)
    """Its memory, in MiB, where the system can limit it."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.tests,)

    def build(self) -> Reward:
        def reward(text: str, row: Mapping[str, Any]) -> float:
            tests = row[self.tests]
            return float(self._passes(program_of(text), "\n".join(tests) if isinstance(tests, list) else str(tests)))

        return reward

    def _passes(self, program: str, tests: str) -> bool:
        # known to nothing that the program can import or guess
        word = secrets.token_hex(16)
        with tempfile.TemporaryDirectory(prefix="torchstone-tests-") as folder:
            file = Path(folder) / "program.py"
            file.write_text(f"{program}\n\n{tests}\n\nprint({word!r})\n", encoding="utf-8", errors="replace")
            with open(Path(folder) / "said", "w+b") as said:
                running = subprocess.Popen(
                    [sys.executable, "-I", "-c", _LIMITED, str(self.memory << 20), str(_LARGEST), str(file)],
                    cwd=folder,
                    env={},
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
                with suppress(subprocess.TimeoutExpired):
                    running.wait(self.seconds)
                with suppress(OSError):  # what it has started too; nothing is left where it ended by itself
                    os.killpg(running.pid, signal.SIGKILL)
                passed = running.wait() == 0
                said.seek(0)
                return passed and said.read().rstrip().endswith(word.encode())


def program_of(text: str) -> str:
    """The program that a text gives."""
    found = _FENCED.findall(text) or ANSWER_TAG.findall(text)
    return found[-1] if found else text


_LIMITED = """
import runpy, sys
try:
    import resource
    for what, most in ((resource.RLIMIT_AS, int(sys.argv[1])), (resource.RLIMIT_FSIZE, int(sys.argv[2]))):
        resource.setrlimit(what, (most, most))
except (ImportError, ValueError, OSError):
    pass
file = sys.argv[3]
sys.argv = [file]
runpy.run_path(file, run_name="__main__")
"""
"""Sets the limits, then becomes the program."""

"""The slice of the slow tests that continuous integration runs: scripts/rotation.py."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
_spec = importlib.util.spec_from_file_location("rotation", SCRIPTS / "rotation.py")
assert _spec is not None and _spec.loader is not None
rotation = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(rotation)


@pytest.mark.parametrize("tests", [0, 1, 10, 11, 100, 1003])
def test_consecutive_counts_cover_every_test_once(tests: int) -> None:
    for start in (0, 5, 12345):
        seen = [test for i in range(rotation.SLICES) for test in rotation.choose(range(tests), start + i)]
        assert sorted(seen) == list(range(tests))


@pytest.mark.parametrize("per_run", [1, 2, 5, 10])
def test_every_test_gets_run_even_if_only_a_few_of_a_slice_fit(per_run: int) -> None:
    tests = range(440)  # 40 a slice
    rounds = 4 * 40 // per_run
    seen = {test for count in range(rounds * rotation.SLICES) for test in rotation.choose(tests, count)[:per_run]}
    assert seen == set(tests)


def test_constant_number_of_commits_between_runs_misses_no_slice() -> None:
    for step in range(1, rotation.SLICES):
        assert {(7 + run * step) % rotation.SLICES for run in range(rotation.SLICES)} == set(range(rotation.SLICES))


@pytest.mark.parametrize("processes", [0, 2])
def test_only_slow_tests_of_the_slice_start_and_none_after_the_time(tmp_path: Path, processes: int) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow: slow\n")
    (tmp_path / "test_some.py").write_text(
        "import time, pytest\n"
        "def test_fast(): pass\n"
        "@pytest.mark.slow\n@pytest.mark.parametrize('i', range(66))\n"
        "def test_slow(i): time.sleep(0.1)\n"
    )

    def run(seconds: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "rotation", "-p", "xdist.plugin", "-n", str(processes)],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                "PYTHONPATH": str(SCRIPTS),
                "ROTATION_COUNT": "25",
                "ROTATION_SECONDS": seconds,
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "rotation: slice 3 of 11 has 6 of 66 slow tests; 0 of them not started within 60 s" in run("60")
    hurried = run("0.05")
    started = max(processes, 1)  # each process starts one
    assert f"{6 - started} of them not started within 0.05 s" in hurried
    assert f"{started} passed" in hurried

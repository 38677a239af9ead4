"""`make run` and `make test` on machines that lack something, with a Python and a pip that only pretend."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
TOOLS = ["sh", "cat", "chmod", "cksum", "cp", "cut", "dirname", "echo", "make", "mkdir", "mv", "rm", "sed"]

# Answers what setup.sh asks of a Python. The environment that its `-m venv` makes contains a copy of itself, whose
# pip writes its arguments to pip.log and obeys the file pip.fails: "STATUS PATTERN" or "kill PATTERN".
PYTHON = """#!/bin/sh
case "$1 $2" in
    "-c import venv, ensurepip") exit {no_venv} ;;
    "-c import sys; sys.exit("*) exit {too_old} ;;
    "-c import sys; print("*) echo {version} ;;
    "-m venv")
        echo venv >>pip.log
        mkdir -p "$3/bin" && : >"$3/pyvenv.cfg" && cp "$0" "$3/bin/python" ;;
    "-m pip")
        shift 2
        echo "$*" >>pip.log
        if [ -f pip.fails ]; then
            read -r how pattern <pip.fails
            case "$*" in
                *$pattern*) if [ "$how" = kill ]; then kill -9 $$; else exit "$how"; fi ;;
            esac
        fi ;;
    *) echo "unexpected: $*" >&2; exit 70 ;;
esac
"""


class Machine:
    """A copy of what setting up needs, and a search path on which nothing else is."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.repo = folder / "bin", folder / "a repository"
        self.bin.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            if found is None:
                pytest.skip(f"needs {tool}")
            (self.bin / tool).symlink_to(found)
        self.repo.mkdir()
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.repo)
        shutil.copytree(ROOT / "scripts", self.repo / "scripts", ignore=shutil.ignore_patterns("__pycache__"))

    def python(self, name: str = "python3", version: str = "3.11", no_venv: int = 0, too_old: int = 0) -> None:
        path = self.bin / name
        path.write_text(PYTHON.format(version=version, no_venv=no_venv, too_old=too_old))
        path.chmod(0o755)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.repo, env={"PATH": str(self.bin), **environment}, capture_output=True, text=True
        )

    def setup(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("sh", "scripts/setup.sh", *arguments, **environment)

    def log(self) -> list[str]:
        """What was asked of venv and pip since the last call."""
        path = self.repo / "pip.log"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [
            re.sub(r"--disable-pip-version-check |-q |--no-compile |-c constraints.txt ", "", line) for line in lines
        ]

    def fail(self, how: str, pattern: str) -> None:
        (self.repo / "pip.fails").write_text(f"{how} {pattern}\n")

    def files(self) -> set[str]:
        return {str(path.relative_to(self.repo)) for path in self.repo.rglob("*")}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("target", ["run", "test"])
def test_missing_venv_module_gives_one_line_and_status_2_and_changes_nothing(machine: Machine, target: str) -> None:
    machine.python(no_venv=1)
    before = machine.files()
    done = machine.setup(target)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "python3 has no venv module; on Debian or Ubuntu: sudo apt install python3-venv\n"
    by_make = machine.run("make", target)
    assert by_make.returncode == 2
    assert by_make.stderr.splitlines()[0] == done.stderr.strip()
    assert machine.files() == before


def test_old_python_gives_one_line_and_status_2_and_changes_nothing(machine: Machine) -> None:
    machine.python(version="3.9", too_old=1)
    before = machine.files()
    done = machine.setup()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "needs Python 3.11 or later and found 3.9" in done.stderr
    assert machine.files() == before


def test_no_python_gives_one_line_and_status_2(machine: Machine) -> None:
    done = machine.setup()
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "found none" in done.stderr


@pytest.mark.parametrize("broken", [{"version": "3.9", "too_old": 1}, {"no_venv": 1}])
def test_another_python_is_taken_if_python3_does_not_do(machine: Machine, broken: dict[str, int]) -> None:
    machine.python(**broken)  # type: ignore[arg-type]
    machine.python("python3.13", version="3.13")
    done = machine.setup()
    assert done.returncode == 0, done.stderr
    assert "with python3.13" in done.stdout


def test_first_call_installs_torch_then_the_package_and_the_second_runs_no_pip(machine: Machine) -> None:
    machine.python()
    assert machine.setup("run").returncode == 0
    assert machine.log() == ["venv", "install torch", "install -e ."]
    second = machine.setup("run")
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert machine.log() == []


def test_tests_add_their_extra_and_then_both_are_set_up(machine: Machine) -> None:
    machine.python()
    machine.setup("run")
    machine.log()
    assert machine.setup("test").returncode == 0
    assert machine.log() == ["install torch", "install -e .[test]"]
    assert machine.setup("run").returncode == machine.setup("test").returncode == 0
    assert machine.log() == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed_into_the_same_environment(machine: Machine, name: str) -> None:
    machine.python()
    machine.setup()
    machine.log()
    with (machine.repo / name).open("a") as file:
        file.write("# changed\n")
    assert machine.setup().returncode == 0
    assert machine.log() == ["install torch", "install -e ."]


def test_moved_repository_gets_a_new_environment(machine: Machine) -> None:
    machine.python()
    machine.setup()
    machine.log()
    machine.repo = machine.repo.rename(machine.repo.with_name("moved"))
    assert machine.setup().returncode == 0
    assert machine.log()[0] == "venv"


@pytest.mark.parametrize("pattern", ["torch", "-e"])
def test_setup_that_was_killed_starts_afresh(machine: Machine, pattern: str) -> None:
    machine.python()
    machine.fail("kill", pattern)
    assert machine.setup().returncode != 0
    machine.log()
    (machine.repo / "pip.fails").unlink()
    assert machine.setup().returncode == 0
    assert machine.log() == ["venv", "install torch", "install -e ."]


def test_setup_whose_pip_failed_goes_on_in_the_same_environment(machine: Machine) -> None:
    machine.python()
    machine.fail("1", "-e")
    assert machine.setup().returncode == 1
    machine.log()
    (machine.repo / "pip.fails").unlink()
    assert machine.setup().returncode == 0
    assert machine.log() == ["install torch", "install -e ."]


def test_torch_index_serves_torch_and_otherwise_comes_last(machine: Machine) -> None:
    machine.python()
    machine.fail("1", "--no-index")  # pip's find-links have no torch
    assert machine.setup(TORCH_INDEX_URL="https://wheels.example/cpu").returncode == 0
    assert machine.log()[2:] == [
        "install --index-url https://wheels.example/cpu --no-deps torch",
        "install --extra-index-url https://wheels.example/cpu -e .",
    ]


def test_wheel_that_pip_already_finds_comes_before_the_torch_index(machine: Machine) -> None:
    machine.python()
    assert machine.setup(TORCH_INDEX_URL="https://wheels.example/cpu").returncode == 0
    assert machine.log() == ["venv", "install --no-index --no-deps torch", "install -e ."]


@pytest.mark.parametrize("steps", ["", "20"])
def test_run_trains_then_reports_and_a_second_run_resumes(machine: Machine, steps: str) -> None:
    machine.python()
    machine.setup()
    for name in ("python", "torchstone"):
        path = machine.repo / ".venv/bin" / name
        path.write_text('#!/bin/sh\necho "${0##*/} $*"\n')
        path.chmod(0o755)
    run = f"runs/quickstart-{steps}" if steps else "runs/quickstart"
    override = f"trainer.steps={steps} " if steps else ""
    report = f"python examples/quickstart_report.py {run}"
    first = machine.run("sh", "scripts/run.sh", STEPS=steps)
    assert first.stdout.splitlines() == [f"torchstone train quickstart {override}--out {run}", report]
    (machine.repo / run).mkdir(parents=True)
    second = machine.run("sh", "scripts/run.sh", STEPS=steps)
    assert second.stdout.splitlines() == [f"torchstone train quickstart {override}--resume --out {run}", report]


def test_help_names_every_target(machine: Machine) -> None:
    named = set(re.findall(r"^make ([\w-]+)", machine.run("make").stdout, re.MULTILINE))
    declared = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert declared is not None
    assert named == set(declared[1].split()) - {"help"}


def test_constraints_pin_what_is_required_within_its_range() -> None:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = {name.lower(): Version(version) for name, _, version in (line.partition("==") for line in lines if line)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    for requirement in map(Requirement, needed):
        assert requirement.name.lower() in pins, f"constraints.txt does not pin {requirement.name}"
    extras = [text for extra in project["optional-dependencies"].values() for text in extra]
    for requirement in map(Requirement, [*needed, *extras]):
        version = pins.get(requirement.name.lower())
        assert version is None or version in requirement.specifier, f"constraints.txt: {requirement} against {version}"

"""Every code block in the documents runs, every recipe in them is valid, every link leads somewhere.

What happens to which block is written in CONTRIBUTING.md under Documents.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCUMENTS = [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if path.exists()]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))
LANGUAGES = {"python", "bash", "yaml", "json", "toml", "text", "mermaid"}
RECIPE_KEYS = {"model", "data", "objective", "optimizer", "schedule", "trainer", "parallel", "adapt", "init_from"}
SECONDS = 300  # for all blocks of one document

# Runs the blocks that it reads from standard input. A padded source gives tracebacks the document's own line numbers.
DRIVER = """
import json, subprocess, sys
from pathlib import Path
namespace = {"__name__": "__main__"}
for block in json.load(sys.stdin):
    if block["save_as"]:
        Path(block["save_as"]).write_text(block["text"])
    elif block["language"] == "python":
        exec(compile("\\n" * block["line"] + block["text"], block["path"], "exec"), namespace)
    else:
        for command in block["commands"]:
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], stdin=subprocess.DEVNULL)
            if done.returncode:
                sys.exit(f"{block['path']}:{block['line']}: status {done.returncode} from: {command}")
"""


@dataclass(frozen=True)
class Block:
    path: Path
    line: int  # of the opening fence, from 1
    language: str
    text: str
    reason: str  # why it is not run; empty if it is

    @property
    def where(self) -> str:
        return f"{self.path.name}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    """The fenced blocks of a Markdown file."""
    blocks: list[Block] = []
    lines = path.read_text().splitlines()
    opened: re.Match[str] | None = None
    start, before = 0, ""
    for number, line in enumerate(lines, 1):
        if opened is None:
            opened = re.match(r"(\s*)(`{3,}|~{3,})\s*([\w+-]*)", line)
            start = number
            before = line if opened is None and line.strip() else before
        elif re.fullmatch(rf"\s*{re.escape(opened[2][0])}{{{len(opened[2])},}}\s*", line):
            text = textwrap.dedent("\n".join(lines[start : number - 1])) + "\n"
            exempt = re.fullmatch(r"\s*<!-- not run: (\S.*?) -->\s*", before)
            blocks.append(Block(path, start, opened[3], text, exempt[1] if exempt else ""))
            opened, before = None, ""
    assert opened is None, f"{path.name}:{start}: this block is not closed"
    return blocks


def commands_of(block: Block) -> list[str]:
    """The lines of a bash block, continued ones joined, without comments and prompts."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in map(str.strip, lines) if line and not line.startswith("#")]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def only_sets_up(command: str) -> bool:
    """Whether a command changes the machine or the repository. It is not run; what it names must exist."""
    words = shlex.split(command, comments=True)
    while words and re.match(r"[A-Za-z_]\w*=", words[0]):
        words = words[1:]
    match words:
        case ["make", *rest]:
            missing = {word for word in rest if "=" not in word and not word.startswith("-")} - make_targets()
            assert not missing, f"the Makefile has no target {', '.join(sorted(missing))}: {command}"
        case ["pip", "install", *rest] | ["python" | "python3", "-m", "pip", "install", *rest]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            for extras in re.findall(r"(?:torchstone|\.)\[([\w,-]+)\]", " ".join(rest)):
                missing = set(extras.split(",")) - set(project["optional-dependencies"])
                assert not missing, f"pyproject.toml has no extra {', '.join(sorted(missing))}: {command}"
        case ["sudo", *_] | ["git", "clone", *_] | ["cd", *_] | ["." | "source", ".venv/bin/activate"]:
            pass
        case _:
            return False
    return True


def check_recipe(data: object, where: str) -> None:
    """A mapping with a recipe's keys is a valid recipe, once there is a `torchstone.recipe` to say so."""
    if not isinstance(data, dict) or not RECIPE_KEYS & data.keys():
        return
    if importlib.util.find_spec("torchstone") is None or importlib.util.find_spec("torchstone.recipe") is None:
        return
    from torchstone.errors import TorchstoneError
    from torchstone.recipe import Recipe
    from torchstone.spec import validate

    try:
        validate(Recipe, data)
    except TorchstoneError as error:
        pytest.fail(f"{where}: not a valid recipe: {error}")


def plan(blocks: list[Block]) -> list[dict[str, object]]:
    """What the driver has to do. Checks everything that can be checked without running it."""
    todo: list[dict[str, object]] = []
    for block in blocks:
        assert block.language in LANGUAGES, (
            f"{block.where}: language {block.language!r} of the block; allowed: {', '.join(sorted(LANGUAGES))}"
        )
        if block.reason:
            warnings.warn(f"{block.where} not run: {block.reason}", stacklevel=1)
            continue
        commands: list[str] = []
        save_as = ""
        if block.language == "yaml":
            check_recipe(yaml.safe_load(block.text), block.where)
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "bash":
            commands = [command for command in commands_of(block) if not only_sets_up(command)]
        if block.language in ("python", "yaml", "json", "toml"):
            name = re.match(r"# ([\w-]+\.\w+)\n", block.text)
            save_as = name[1] if name else ""
        if block.language == "python" or commands or save_as:
            todo.append(
                {
                    "path": str(block.path),
                    "line": block.line,
                    "language": block.language,
                    "text": block.text,
                    "commands": commands,
                    "save_as": save_as,
                }
            )
    return todo


def run(todo: list[dict[str, object]], folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(todo),
        cwd=folder,
        # tests beside this one use the cores too: threads that wait must not spin
        env={**os.environ, "PATH": path, "MPLBACKEND": "Agg", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


LONG = {
    "add-a-part.md",
    "adversarial.md",
    "anti-distillation.md",
    "api.md",
    "bitnet.md",
    "code.md",
    "compare.md",
    "distillation.md",
    "evaluate.md",
    "fine-tuning.md",
    "getting-started.md",
    "harvest.md",
    "hugging-face.md",
    "knowledge-neurons.md",
    "longmem.md",
    "multi-token-prediction.md",
    "preferences.md",
    "scaling.md",
    "recipes.md",
    "replaced-tokens.md",
    "reproduce.md",
    "structured-prompting.md",
    "torchscale.md",
}
"""Documents whose blocks take more than some seconds each."""


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=str(path.relative_to(ROOT)), marks=[pytest.mark.slow] if path.name in LONG else [])
        for path in DOCUMENTS
    ],
)
def test_every_block_runs(path: Path, tmp_path: Path) -> None:
    todo = plan(blocks_of(path))
    if todo:
        done = run(todo, tmp_path)
        assert done.returncode == 0, f"{path.name}: {done.stderr[-4000:]}\n{done.stdout[-1000:]}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    text = re.sub(r"^\s*(`{3,}|~{3,}).*?^\s*\1\s*$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    missing = [target for target in targets if ":" not in target and not (path.parent / target).exists()]
    assert not missing, f"{path.name} links to files that do not exist: {', '.join(missing)}"


def written(folder: Path, text: str) -> list[Block]:
    path = folder / "page.md"
    path.write_text(text)
    return blocks_of(path)


def test_blocks_run_in_order_in_one_folder_and_share_variables(tmp_path: Path) -> None:
    blocks = written(
        tmp_path,
        "```python\nn = 2\n```\n\n```yaml\n# some.yaml\na: 1\n```\n- in a list\n  ```bash\n  test -f some.yaml  # yes\n"
        "  echo 40 \\\n    > forty\n  ```\n````python\nn += int(open('forty').read())\nassert n == 42, '```'\n````\n",
    )
    assert [block.language for block in blocks] == ["python", "yaml", "bash", "python"]
    done = run(plan(blocks), tmp_path)
    assert done.returncode == 0, done.stderr


def test_python_block_with_a_name_is_saved_and_can_be_imported(tmp_path: Path) -> None:
    blocks = written(
        tmp_path, "```python\n# forty.py\nn = 40\n```\n```python\nimport forty\nassert forty.n == 40\n```\n"
    )
    done = run(plan(blocks), tmp_path)
    assert done.returncode == 0, done.stderr


def test_failing_python_block_is_reported_with_its_line(tmp_path: Path) -> None:
    done = run(plan(written(tmp_path, "text\n\n```python\nn = 1\nassert n == 2\n```\n")), tmp_path)
    assert done.returncode != 0
    assert 'page.md", line 5' in done.stderr


def test_failing_bash_line_is_reported_and_the_rest_not_run(tmp_path: Path) -> None:
    done = run(plan(written(tmp_path, "```bash\nfalse | true\ntouch later\n```\n")), tmp_path)
    assert done.returncode != 0
    assert "status 1 from: false | true" in done.stderr
    assert not (tmp_path / "later").exists()


def test_exempted_block_is_announced_and_not_run(tmp_path: Path) -> None:
    blocks = written(tmp_path, "<!-- not run: needs a GPU -->\n```python\n1 / 0\n```\n")
    with pytest.warns(UserWarning, match=r"page.md:2 not run: needs a GPU"):
        assert plan(blocks) == []


@pytest.mark.parametrize(
    "comment", ["<!-- not run: -->", "<!-- not run: why -->\n\nother text", "<!-- not run -->", "<!-- skip: why -->"]
)
def test_block_without_a_reason_directly_before_it_is_run(tmp_path: Path, comment: str) -> None:
    assert len(plan(written(tmp_path, f"{comment}\n```python\n1 / 0\n```\n"))) == 1


@pytest.mark.parametrize("language", ["", "sh", "console", "py"])
def test_unknown_language_is_refused(tmp_path: Path, language: str) -> None:
    with pytest.raises(AssertionError, match="language"):
        plan(written(tmp_path, f"```{language}\ntrue\n```\n"))


@pytest.mark.parametrize(
    "command", ["make run", "TORCH_INDEX_URL=x make run  # why", "pip install -e '.[test,hf]'", "sudo apt install git"]
)
def test_setting_up_is_not_run(command: str) -> None:
    assert only_sets_up(command)


@pytest.mark.parametrize(
    "command", ["torchstone doctor", "python -c 1", "pip list", "makeinfo x", "A=1 torchstone doctor"]
)
def test_other_commands_are_run(command: str) -> None:
    assert not only_sets_up(command)


@pytest.mark.parametrize("command", ["make nothing", "make run nothing", "pip install 'torchstone[nothing]'"])
def test_setting_up_names_what_exists(command: str) -> None:
    with pytest.raises(AssertionError, match="nothing"):
        only_sets_up(command)


def test_recipe_with_a_wrong_field_is_refused() -> None:
    pytest.importorskip("torchstone.recipe", reason="there is no torchstone.recipe yet", exc_type=ImportError)
    with pytest.raises(pytest.fail.Exception, match="not a valid recipe"):
        check_recipe({"trainer": {"stepps": 1}}, "page.md:1")

"""The lines that put a part into somebody else's model run for every kind, and the pages that list things are whole."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main

import torchstone
from torchstone.cli.app import app
from torchstone.cli.groups import groups
from torchstone.recipe import EvaluateSpec, ParallelSpec, Recipe, TrainerSpec
from torchstone.spec import FAMILIES, Spec, kinds, resolve

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


parts_page = load(ROOT / "scripts" / "parts_page.py")
report = load(ROOT / "examples" / "quickstart_report.py")
KINDS = [(family, kind) for family in parts_page.ALONE for kind in kinds(family)]


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_part_goes_into_somebody_elses_model(family: str, kind: str) -> None:
    cls = resolve(family, kind)
    if not parts_page.stands_alone(cls):
        pytest.skip(f"{family} {kind} takes {', '.join(sorted(cls.takes))} of another layer")  # type: ignore[attr-defined]
    exec(parts_page.snippet(cls), {})


def test_page_of_parts_says_what_is_true_of_those_that_it_lists() -> None:
    """A part that is new is added to it by `make pages`, not by whoever adds the part."""
    text = (DOCS / "parts.md").read_text(encoding="utf-8")
    assert text == parts_page.page(parts_page.listed(text)), "make pages"


@pytest.mark.parametrize("name", torchstone.__all__)
def test_every_public_name_is_in_the_api_page_with_its_arguments(name: str) -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    section = re.search(rf"^### `{name}`\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None, f"docs/api.md has no heading for torchstone.{name}"
    public = getattr(importlib.import_module("torchstone.api"), name, None)
    if inspect.isfunction(public):
        stated = re.search(rf"torchstone\.{name}\((.*?)\) -> ", section[1])
        assert stated is not None
        assert stated[1] == arguments(public)


def arguments(function: Callable[..., Any]) -> str:
    """Arguments with defaults, without types."""
    bare = [p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values()]
    return str(inspect.Signature(bare))[1:-1].replace("'", '"')


def test_every_field_of_sampling_is_in_the_api_page() -> None:
    from torchstone.generate import Sampling

    text = (DOCS / "api.md").read_text(encoding="utf-8")
    assert not [name for name in Sampling.model_fields if f"`{name}`" not in text]


@pytest.mark.parametrize("section", [TrainerSpec, EvaluateSpec, ParallelSpec])
def test_every_field_of_a_section_is_in_the_page_of_recipes(section: type[Spec]) -> None:
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    assert not [name for name in section.model_fields if f"`{name}`" not in text]


def glossary() -> set[str]:
    """Terms that the glossary defines: what stands in code at the head of a row or item."""
    text = (DOCS / "glossary.md").read_text(encoding="utf-8")
    return {
        term
        for line in re.findall(r"^(?:\| |- )(.+?)(?: \||: )", text, re.MULTILINE)
        for term in re.findall(r"`([^`]+)`", line)
    }


def test_every_verb_recipe_key_and_family_is_in_the_glossary() -> None:
    verbs = set(typer.main.get_command(app).commands) - {name for name, _ in groups()}  # type: ignore[attr-defined]
    missing = sorted({*verbs, *Recipe.model_fields, *FAMILIES} - glossary())
    assert not missing, f"docs/glossary.md does not have {', '.join(missing)}"


def test_every_verb_of_a_wing_is_in_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))
    for wing, group in groups():
        for verb in typer.main.get_group(group).commands:
            assert f"torchstone {wing} {verb}" in text, f"no page of docs/ shows torchstone {wing} {verb}"


def test_part_of_another_package_is_found_by_its_entry_point(tmp_path: Path) -> None:
    """The example of docs/add-a-part.md, as it is found once its package is installed."""
    text = (DOCS / "add-a-part.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"^```\w+\n# ([\w.]+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    (tmp_path / "my_parts.py").write_text(blocks["my_parts.py"])
    info = tmp_path / "my_parts-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-parts\nVersion: 0.1\n")
    points = tomllib.loads(blocks["pyproject.toml"])["project"]["entry-points"]["torchstone.parts"]
    lines = "".join(f"{name} = {target}\n" for name, target in points.items())
    (info / "entry_points.txt").write_text(f"[torchstone.parts]\n{lines}")
    code = (
        "import sys\nfrom torchstone.spec import kinds, resolve\n"
        f"for name in {list(points)}:\n"
        "    family, kind = name.split('.')\n"
        "    resolve(family, kind)\n"
        "    assert kind in kinds(family)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "good", "total"),
    [
        ("def f():\n    return 1\n\nx = (\n    1\n)\n", 5, 5),
        ("'''A docstring whose\nsecond line is in column 0.\n'''\nx = 1", 4, 4),
        ("    indented = 1\nno python here\ndef f(:\n    a\nx = 1", 1, 5),
        ("x = 1\nif x:\n", 1, 2),
        ("# -\n\0", 1, 2),
        ("\n \n", 0, 0),
        ("", 0, 0),
    ],
)
def test_share_of_lines_that_the_parser_accepts(text: str, good: int, total: int) -> None:
    assert report.accepted(text) == (good, total)


def test_report_says_which_is_lower_and_by_how_much() -> None:
    others = {"gzip -9": 2.0, "xz -9": 1.6}
    assert report.verdict(1.2, others) == "The model is lower: 0.4000 bits per byte (25.0%) below the better, xz -9."
    assert report.verdict(2.0, others) == "xz -9 is lower: 0.4000 bits per byte (20.0%) below the model."
    assert report.verdict(1.6, others) == "The model and xz -9 are equal."


def test_report_compresses_all_files_as_one() -> None:
    sizes = report.compressed(["held out " * 100] * 10)
    assert set(sizes) == {"gzip -9", "xz -9"}
    assert max(sizes.values()) < 1


def test_curve_is_thinned_and_drawn_from_zero() -> None:
    rows = [{"step": step, "loss": 1.0, "valid_bits_per_byte": 4.0 - step / 50} for step in range(101)]
    lines = report.curve(rows, width=40).splitlines()
    assert len(lines) == 13
    assert lines[1].endswith("4.0000  " + "#" * 40)
    assert lines[-1].endswith("2.0000  " + "#" * 20)
    assert report.curve([{"step": 0, "valid_loss": 2.0}]).splitlines()[0].endswith("valid loss [nats]")

"""Repositories as documents: which files need which, in which order they come, which are kept."""

from __future__ import annotations

import importlib.util
import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from torchstone.data import Prepared
from torchstone.data.corpora._dependencies import dependencies, ordered
from torchstone.data.corpora._rules import keeps
from torchstone.data.corpora.repositories import RepositoriesSpec
from torchstone.errors import TorchstoneError


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


# ------------------------------------------------------------------------------------------------------ dependencies


@pytest.mark.parametrize(
    ("line", "needs"),
    [
        ("import pkg.util", {"src/pkg/util.py"}),
        ("import os, pkg.util as u, pkg.sub.deep", {"src/pkg/util.py", "src/pkg/sub/deep.py"}),
        ("from pkg import util", {"src/pkg/util.py"}),
        ("from pkg import name_of_a_class", {"src/pkg/__init__.py"}),
        ("from pkg.util import (\n    one,  # a word, and another\n    two,\n)", {"src/pkg/util.py"}),
        ("from . import util, other", {"src/pkg/util.py", "src/pkg/other.py"}),
        ("from .sub import deep", {"src/pkg/sub/deep.py"}),
        ("from .util import x", {"src/pkg/util.py"}),
        ("    from .util import x  # inside a function", {"src/pkg/util.py"}),
        ("import util", set()),  # a module of a package is not found by its last name
        ("import json\nfrom collections import abc", set()),
        ("# import pkg.util\nx = 'import pkg.util'", set()),
        ("import pkg.missing", set()),
        ("from pkg.user import x", set()),  # itself
    ],
)
def test_python_imports_find_their_files(line: str, needs: set[str]) -> None:
    names = ["pkg/__init__.py", "pkg/util.py", "pkg/other.py", "pkg/json.py", "pkg/sub/__init__.py", "pkg/sub/deep.py"]
    files = {f"src/{name}": "" for name in names} | {"src/pkg/user.py": line}
    assert dependencies(files, "repository")["src/pkg/user.py"] == needs


def test_a_package_may_be_the_repository_and_scripts_lie_beside_each_other() -> None:
    files = {"__init__.py": "", "a.py": "from .b import x", "sub/__init__.py": "", "sub/c.py": "from ..b import y"}
    files |= {
        "b.py": "",
        "d.py": "from mine.b import x",
        "tools/one.py": "import two",
        "tools/two.py": "",
        "two.py": "",
    }
    needs = dependencies(files, "mine")
    assert needs["a.py"] == needs["sub/c.py"] == needs["d.py"] == {"b.py"}
    assert needs["tools/one.py"] == {"tools/two.py"}


def test_other_languages_find_their_files() -> None:
    files = {
        "src/main/java/org/x/App.java": "package org.x;\nimport org.x.util.Text;\nimport static org.x.Math.abs;\n"
        "import org.x.shapes.*;\nimport java.util.List;\n",
        "src/main/java/org/x/util/Text.java": "",
        "src/main/java/org/x/Math.java": "",
        "src/main/java/org/x/shapes/Dot.java": "",
        "src/main/java/org/x/shapes/Line.java": "",
        "App.cs": "using System;\nusing Mine.Text;\nusing Short = Mine.Other;\n",
        "Text.cs": "namespace Mine.Text\n{\n}\n",
        "More.cs": "namespace Mine.Text;\n",
        "Other.cs": "namespace Mine.Other;\n",
        "src/main.c": '#include <stdio.h>\n# include "util.h"\n#include "../include/mine/far.h"\n',
        "src/util.h": "",
        "lib/util.h": "",
        "include/mine/far.h": "",
    }
    needs = dependencies(files, "r")
    home = "src/main/java/org/x"
    assert needs[f"{home}/App.java"] == {
        f"{home}/{name}.java" for name in ("util/Text", "Math", "shapes/Dot", "shapes/Line")
    }
    assert needs["App.cs"] == {"Text.cs", "More.cs", "Other.cs"}
    assert needs["src/main.c"] == {"src/util.h", "include/mine/far.h"}


# ------------------------------------------------------------------------------------------------------------- order


def naive(needs: dict[str, set[str]]) -> list[str]:
    """Algorithm 1 of the paper as it is written, over groups by size."""
    parts = [{path} for path in needs]
    for a, others in needs.items():
        for b in others:
            touched = [part for part in parts if a in part or b in part]
            parts = [part for part in parts if part not in touched] + [set().union(*touched)]
    order: list[str] = []
    for part in sorted(parts, key=lambda part: (-len(part), min(part))):
        left = set(part)
        while left:
            file = min(left, key=lambda path: (len(needs[path] & left), path))
            left.remove(file)
            order.append(file)
    return order


@pytest.mark.parametrize("share", [0.03, 0.1, 0.3])
def test_the_order_is_the_papers_with_and_without_cycles(share: float) -> None:
    rng = random.Random(1)
    for number in range(60):
        files = [f"{name}.py" for name in rng.sample(range(100, 999), 15)]
        needs = {
            file: {other for other in (files if number % 2 else files[:at]) if other != file and rng.random() < share}
            for at, file in enumerate(files)
        }
        order = ordered(needs)
        shuffled = list(needs.items())
        rng.shuffle(shuffled)
        assert order == naive(needs) == ordered(dict(shuffled))
        assert sorted(order) == sorted(files)
        if number % 2 == 0:
            assert all(order.index(other) < order.index(file) for file in files for other in needs[file])


def test_a_repository_is_one_text_in_order_with_paths(tmp_path: Path) -> None:
    root = write(
        tmp_path / "repo",
        {
            "a_main.py": "import m_model\n",
            "m_model.py": "import z_util\n",
            "z_util.py": "letters = 1\n",
            "alone.lua": "local letters = 1\n",
            "style.css": "body { color: red }\n",
            ".git/config.py": "hidden\n",
            "node_modules/x.js": "installed\n",
            "picture.png": "no code",
            "empty.py": "",
        },
    )
    (document,) = RepositoriesSpec(path=str(root)).documents()
    assert document.name == "repo"
    assert document.text == (
        "#z_util.py\nletters = 1\n\n#m_model.py\nimport z_util\n\n#a_main.py\nimport m_model\n\n"
        "--alone.lua\nlocal letters = 1\n\n/* style.css */\nbody { color: red }\n"
    )


@pytest.mark.parametrize("name", ["yaml", "typer", pytest.param("networkx", marks=pytest.mark.slow)])
def test_installed_packages_are_read_whole_and_always_alike(name: str) -> None:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        pytest.skip(f"{name} is not installed")
    spec = RepositoriesSpec(path=str(Path(found.origin).parent), rules=False)
    (document,) = spec.documents()
    files = sorted(Path(found.origin).parent.rglob("*.py"))
    assert len(files) > 5
    for file in files:
        if text := file.read_text():
            path = file.relative_to(Path(found.origin).parent).as_posix()
            assert f"#{path}\n{text}" in document.text
    assert next(spec.documents()) == document


# ------------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("suffix", "text", "kept"),
    [
        (".py", "a" * 1000 + "\n" * 10, True),
        (".py", "a" * 1001 + "\n" * 20, False),
        (".py", ("a" * 100 + "\n") * 3, True),
        (".py", ("a" * 100 + "\n") * 2 + "a" * 101, False),
        (".py", "a" * 25 + "1" * 75, True),
        (".py", "a" * 249 + "\n" * 10 + "1" * 741, False),
        (".py", " \n\n", False),
        (".xml", '<?xml version="1.0"?>\n<letters/>', False),
        (".xsl", '<?xml version="1.0"?>\n<letters/>', True),
        (".py", "abc = 1\n" * 12 + "abcd<?xml version=", True),  # begins at the 101st character
        (".html", "<p>" + "word\n" * 20 + "</p>", False),  # 99 characters are seen
        (".html", "<p>" + "words\n" * 20 + "</p>", True),
        (".html", "<p>" + "words\n" * 20 + "</p>" + "<i></i>\n" * 58, True),  # 119 of 591
        (".html", "<p>" + "words\n" * 20 + "</p>" + "<i></i>\n" * 59, False),
        (".html", "<style>" + "words\n" * 20 + "</style>", False),
        (".json", "a" * 49, False),
        (".json", "a" * 50, True),
        (".yaml", "abcdefghi\n" * 500, True),
        (".yml", "abcdefghi\n" * 500 + "a", False),
    ],
)
def test_rules_at_their_thresholds(suffix: str, text: str, kept: bool) -> None:
    assert keeps(suffix, text) is kept


def test_rules_can_be_left_out(tmp_path: Path) -> None:
    root = write(tmp_path / "r", {"a.py": "x = 1\n", "b.py": "1\n"})
    assert "b.py" not in next(RepositoriesSpec(path=str(root)).documents()).text
    assert "#b.py\n1\n" in next(RepositoriesSpec(path=str(root), rules=False).documents()).text


# ------------------------------------------------------------------------------------------------ several repositories


def test_near_duplicates_go_as_whole_repositories(tmp_path: Path, words: Callable[[int, int], str]) -> None:
    text = words(1, 40)
    write(tmp_path / "first", {"a.py": text, "b.py": words(2, 40)})
    write(tmp_path / "fork", {"a.py": text.replace("a", "b", 3), "b.py": words(2, 40)})
    write(tmp_path / "other", {"a.py": words(3, 40)})
    path = str(tmp_path / "*")
    assert [d.name for d in RepositoriesSpec(path=path).documents()] == ["first", "other"]
    assert [d.name for d in RepositoriesSpec(path=path, near_duplicates=True).documents()] == ["first", "fork", "other"]
    names = [str(tmp_path / name) for name in ("other", "fork")]
    assert [d.name for d in RepositoriesSpec(path=names).documents()] == ["other", "fork"]


def test_the_fingerprint_sees_texts_names_and_settings(tmp_path: Path) -> None:
    root = write(tmp_path / "r", {"a.py": "x = 1\n"})
    prints = [
        RepositoriesSpec(path=str(root)).fingerprint(),
        RepositoriesSpec(path=str(root), rules=False).fingerprint(),
    ]
    (root / "a.py").write_text("y = 1\n")
    prints.append(RepositoriesSpec(path=str(root)).fingerprint())
    (root / "a.py").rename(root / "b.py")
    prints.append(RepositoriesSpec(path=str(root)).fingerprint())
    assert all(a != b for a, b in itertools.combinations(prints, 2))
    (root / "picture.png").write_bytes(b"\xff")
    assert RepositoriesSpec(path=str(root)).fingerprint() == prints[-1]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no", "no such folder"),
        ("no*", "empty corpus: no folder matches"),
        ("file.py", "is a file, and a repository is"),
    ],
)
def test_what_is_no_repository_is_refused(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "file.py").write_text("x")
    with pytest.raises(TorchstoneError, match=message):
        list(RepositoriesSpec(path=str(tmp_path / path)).documents())


def test_an_undecodable_byte_is_named_with_file_and_offset(tmp_path: Path) -> None:
    root = write(tmp_path / "r", {"a.py": "x = 1\n"})
    (root / "bad.py").write_bytes(b"ab\xff")
    with pytest.raises(TorchstoneError, match=r"bad.py' is not UTF-8: byte 0xff at offset 2"):
        list(RepositoriesSpec(path=str(root)).documents())


def test_a_corpus_of_repositories_is_split_and_packed(
    tmp_path: Path, words: Callable[[int, int], str], ready: Callable[..., Prepared]
) -> None:
    for number in range(40):
        write(tmp_path / "all" / str(number), {"b.py": "import c\n" + words(number, 5), "c.py": words(100 + number, 5)})
    prepared = ready({"kind": "repositories", "path": str(tmp_path / "all" / "*")})
    assert prepared.description.startswith(f"{tmp_path}/all/*: 40 repositories, ")
    assert prepared.train.documents + prepared.valid.documents + prepared.test.documents == 40
    assert all(document.text.startswith("#c.py\n") for document in prepared.texts("train"))

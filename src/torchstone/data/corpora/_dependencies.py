"""What the files of a repository need of each other, by regular expressions, and the order that follows.

The languages whose files are looked into are those of DeepSeek-Coder (Guo et al. 2024, arXiv 2401.14196, section 2.2):
Python, Java, C#, C and C++. The paper gives its algorithm of ordering, and of the expressions the keywords alone; how a
name finds its file is written here.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

__all__ = ["dependencies", "ordered"]

_PYTHON = re.compile(
    r"^[ \t]*(?:from[ \t]+(\.*)([\w.]*)[ \t]+import[ \t]*(\([^)]*\)|[^\n#]*)|import[ \t]+([^\n#]+))", re.MULTILINE
)
_JAVA = re.compile(r"^\s*import\s+(static\s+)?([\w.]+?)(\.\*)?\s*;", re.MULTILINE)
_USING = re.compile(r"^\s*(?:global\s+)?using\s+(?:static\s+)?(?:\w+\s*=\s*)?([\w.]+)\s*;", re.MULTILINE)
_NAMESPACE = re.compile(r"^\s*namespace\s+([\w.]+)", re.MULTILINE)
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*["<]([^">\n]+)[">]', re.MULTILINE)
_C = (".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".hxx", ".cu", ".cuh")

Files = Mapping[str, str]
"""Paths within a repository, with forward slashes -> text."""


class _Index:
    """Names -> the files that they may stand for."""

    def __init__(self) -> None:
        self._files: dict[str, list[str]] = {}

    def add(self, name: str, path: str) -> None:
        self._files.setdefault(name, []).append(path)

    def all(self, name: str) -> list[str]:
        """Every file of that name."""
        return self._files.get(name, [])

    def nearest(self, name: str, path: str) -> list[str]:
        """Of the files of that name the one that shares most folders with `path`, the first of equal ones; or none."""
        folders = path.split("/")[:-1]

        def apart(found: str) -> tuple[int, str]:
            shared = 0
            for mine, its in zip(folders, found.split("/")[:-1], strict=False):
                if mine != its:
                    break
                shared += 1
            return -shared, found

        return [min(self._files[name], key=apart)] if name in self._files else []


def dependencies(files: Files, root: str) -> dict[str, set[str]]:
    """Which other files of the repository each file imports, includes or uses.

    Args:
        files: of the repository.
        root: name of its folder, which is the first of its modules' names if it is a Python package itself.
    """
    needs: dict[str, set[str]] = {path: set() for path in files}
    for found_of in (_python(files, root), _java(files), _c_sharp(files), _c(files)):
        for path, found in found_of:
            needs[path].update(found)
            needs[path].discard(path)
    return needs


def _with(files: Files, *suffixes: str) -> list[PurePosixPath]:
    return [path for path in map(PurePosixPath, sorted(files)) if path.suffix.lower() in suffixes]


def _python(files: Files, root: str) -> Iterator[tuple[str, list[str]]]:
    paths, modules = _with(files, ".py", ".pyi"), _Index()
    packages = {path.parent for path in paths if path.stem == "__init__"}
    whole = (root,) if PurePosixPath() in packages else ()
    for path in paths:
        parts = path.parts[:-1] if path.stem == "__init__" else (*path.parts[:-1], path.stem)
        # a module's name begins below the first folder that is no package; others may begin at the repository's root
        top = next((len(above.parts) for above in path.parents if above not in packages), None)
        for start in {0, top or 0}:
            modules.add(".".join((*whole, *parts) if start == 0 else parts[start:]), str(path))
    for path in paths:
        found: list[str] = []
        here, folder = str(path), (*whole, *path.parts[:-1])
        for dots, module, names, plain in _PYTHON.findall(files[here]):
            if dots:
                above = folder[: len(folder) + 1 - len(dots)]
                module = ".".join([*above, module] if module else above)
            for name in re.sub(r"#.*|[()\\;]", " ", plain or names).split(","):
                word = name.split()[0] if name.strip() else ""
                if plain:
                    found += modules.nearest(word, here)
                else:
                    found += modules.nearest(f"{module}.{word}".strip("."), here) or modules.nearest(module, here)
        yield here, found


def _java(files: Files) -> Iterator[tuple[str, list[str]]]:
    paths, classes, packages = _with(files, ".java"), _Index(), _Index()
    for path in paths:
        for start in range(len(path.parts)):
            classes.add(".".join(path.with_suffix("").parts[start:]), str(path))
            packages.add(".".join(path.parts[start:-1]), str(path))
    for path in paths:
        found: list[str] = []
        for static, name, star in _JAVA.findall(files[str(path)]):
            if star and not static:
                found += packages.all(name)
            else:
                found += classes.nearest(name if star or not static else name.rpartition(".")[0], str(path))
        yield str(path), found


def _c_sharp(files: Files) -> Iterator[tuple[str, list[str]]]:
    paths, spaces = _with(files, ".cs"), _Index()
    for path in paths:
        for name in set(_NAMESPACE.findall(files[str(path)])):
            spaces.add(name, str(path))
    for path in paths:
        yield str(path), [other for name in _USING.findall(files[str(path)]) for other in spaces.all(name)]


def _c(files: Files) -> Iterator[tuple[str, list[str]]]:
    paths, ends = _with(files, *_C), _Index()
    for path in paths:
        for start in range(len(path.parts)):
            ends.add("/".join(path.parts[start:]), str(path))
    for path in paths:
        found: list[str] = []
        for name in _INCLUDE.findall(files[str(path)]):
            parts = [part for part in name.split("/") if part not in (".", "")]
            while parts and parts[0] == "..":
                parts.pop(0)
            found += ends.nearest("/".join(parts), str(path))
        yield str(path), found


def ordered(needs: Mapping[str, set[str]]) -> list[str]:
    """Every file once, after what it needs where no cycle forbids it (Guo et al. 2024, algorithm 1).

    Files that hang together stay together, the most files first. Of those left always comes next one that needs the
    fewest others that are left: none if there is no cycle. Of equal ones the first by path.
    """
    needed: dict[str, list[str]] = {path: [] for path in needs}
    for path in sorted(needs):
        for other in needs[path]:
            needed[other].append(path)
    left = {path: len(others) for path, others in needs.items()}
    groups = sorted(_connected(needs, needed), key=lambda group: (-len(group), min(group)))
    order: list[str] = []
    for group in groups:
        heap, done = [(left[path], path) for path in group], set()
        heapq.heapify(heap)
        while heap:
            count, path = heapq.heappop(heap)
            if path in done or count != left[path]:
                continue
            done.add(path)
            order.append(path)
            for other in needed[path]:
                left[other] -= 1
                heapq.heappush(heap, (left[other], other))
    return order


def _connected(needs: Mapping[str, set[str]], needed: Mapping[str, list[str]]) -> Iterator[list[str]]:
    """Groups of files that hang together."""
    seen: set[str] = set()
    for first in needs:
        if first in seen:
            continue
        seen.add(first)
        group, rest = [], [first]
        while rest:
            path = rest.pop()
            group.append(path)
            for other in (*needs[path], *needed[path]):
                if other not in seen:
                    seen.add(other)
                    rest.append(other)
        yield group

"""Writes docs/parts.md from the catalogue: every kind, its fields, and how it goes into somebody else's model.

python scripts/parts_page.py            # write the page
python scripts/parts_page.py --check    # status 1 if the page is not up to date
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from torchstone.cli.catalogue import catalogue
from torchstone.spec import FAMILIES, PartSpec, family_root, resolve

PAGE = Path(__file__).parents[1] / "docs" / "parts.md"
ALONE = ("attention", "ffn", "norm")
"""Families whose parts are of use by themselves."""
HEADING = """# Parts

<!-- Written by scripts/parts_page.py; edit the parts, not this page. -->

Every kind of every family that comes with Torchstone, with its fields. `torchstone parts` prints the same, and the
kinds that other installed packages add; [add-a-part.md](add-a-part.md) says how. In a recipe, a part is
`{kind: NAME, field: value}`, and the bare word `NAME` is short for `{kind: NAME}`.

The kinds of attention, feed-forward and norm work by themselves: each has the lines that put it into somebody else's
model, as a module from (B, T, D) to (B, T, D).
"""


def snippet(cls: type[PartSpec]) -> str:
    """Six lines of Python that use a kind without recipe, trainer or context."""
    fields = "heads=4" if cls.family == "attention" else ""
    consumed = getattr(cls, "consumes", frozenset())
    position = next((kind for gives, kind in (("rotation", "rotary"), ("bias", "alibi")) if gives in consumed), None)
    more = f', position="{position}"' if position else ""
    return (
        "import torch\n"
        "import torchstone\n"
        f"from {FAMILIES[cls.family]} import {cls.__name__}\n"
        "\n"
        f"part = torchstone.build({cls.__name__}({fields}), width=64{more})\n"
        "mine = torch.nn.Sequential(torch.nn.Linear(10, 64), part)\n"
        "assert mine(torch.randn(2, 16, 10)).shape == (2, 16, 64)\n"
    )


def stands_alone(cls: type[PartSpec]) -> bool:
    """Whether a kind is of use by itself: of a family of `ALONE`, and in need of no other layer."""
    return cls.family in ALONE and not getattr(cls, "takes", None)


def ours(family: str | None = None) -> list[dict[str, Any]]:
    """Entries of the catalogue that come with the package."""
    return [
        entry
        for entry in catalogue(family)
        if resolve(entry["family"], entry["kind"]).__module__.startswith("torchstone.")
    ]


def listed(text: str) -> set[tuple[str, str]]:
    """Family and kind of every part that a page has."""
    return set(re.findall(r"^### (\w+): (\w+)$", text, re.MULTILINE))


def page(only: set[tuple[str, str]] | None = None) -> str:
    """The whole document; with `only`, that of these parts."""
    text, family = [HEADING], ""
    for entry in ours():
        if only is not None and (entry["family"], entry["kind"]) not in only:
            continue
        if entry["family"] != family:
            family = entry["family"]
            root = family_root(family)
            usual = getattr(root, "default_kind", "")
            text.append(f"## {family}\n\n{root.summary()}{f' Default: `{usual}`.' if usual else ''}\n")
        text.append(_entry(entry))
    return "\n".join(text)


def _entry(entry: dict[str, Any]) -> str:
    cls = resolve(entry["family"], entry["kind"])
    lines = [f"### {entry['family']}: {entry['kind']}", "", entry["summary"]]
    if entry["paper"]:
        lines += ["", f"Source: {entry['paper']}."]
    if entry["fields"]:
        lines += ["", "| field | type | default | bounds | what it is |", "|---|---|---|---|---|"]
        for name, field in entry["fields"].items():
            cells = (f"`{name}`", field["type"], _value(field["default"]), field["bounds"], field["description"])
            lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    if stands_alone(cls):
        lines += ["", "```python", snippet(cls).rstrip("\n"), "```"]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    """A default as a recipe spells it."""
    words = {None: "null", True: "true", False: "false", (): "[]"}
    if isinstance(value, list | tuple) and value:
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_value(inner)}" for name, inner in value.items()) + "}"
    return (
        words.get(value, str(value)) if not isinstance(value, int | float) or isinstance(value, bool) else f"{value:g}"
    )


def main() -> int:
    """Write the page, or compare it."""
    if sys.argv[1:] == ["--check"]:
        same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()
        print(f"{PAGE.name} is up to date" if same else f"{PAGE.name} is out of date: python scripts/parts_page.py")
        return 0 if same else 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

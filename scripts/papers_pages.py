"""Write docs/papers/*.md and the README's table from the papers' files and their evidence."""

from __future__ import annotations

import re
from pathlib import Path

from torchstone.papers import find_paper, slugs
from torchstone.papers._pages import page, table

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- papers -->", "<!-- end of papers -->"


def main() -> None:
    """Write all of them."""
    folder = ROOT / "docs" / "papers"
    folder.mkdir(exist_ok=True)
    for slug in slugs():
        (folder / f"{slug}.md").write_text(page(find_paper(slug)), encoding="utf-8")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    made = re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{table()}\n{END}", text, flags=re.DOTALL)
    readme.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()

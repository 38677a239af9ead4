"""Write docs/papers/*.md and the README's table from the papers' files and their evidence.

python scripts/papers_pages.py           # all of them
python scripts/papers_pages.py frage     # the page of one paper
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from torchstone.papers import find_paper, slugs
from torchstone.papers._pages import page, table

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- papers -->", "<!-- end of papers -->"


def main() -> None:
    """Write those that are asked for."""
    folder = ROOT / "docs" / "papers"
    folder.mkdir(exist_ok=True)
    for slug in sys.argv[1:] or slugs():
        (folder / f"{slug}.md").write_text(page(find_paper(slug)), encoding="utf-8")
    if sys.argv[1:]:
        return
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    made = re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{table()}\n{END}", text, flags=re.DOTALL)
    readme.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()

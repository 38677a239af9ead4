"""Papers: metadata, the parts they introduced, and claims that run. One file a paper; its name is the slug."""

from __future__ import annotations

import importlib
import pkgutil

from torchstone.errors import TorchstoneError, nearest
from torchstone.papers._claim import Arms, Claim, Effect, Measured, Number, Paper, Setting, one_thread

__all__ = [
    "Arms",
    "Claim",
    "Effect",
    "Measured",
    "Number",
    "Paper",
    "Setting",
    "find_paper",
    "one_thread",
    "search_papers",
    "slugs",
]


def slugs() -> list[str]:
    """The papers that have a file."""
    names = (module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return sorted(name.replace("_", "-") for name in names)


def find_paper(slug: str) -> Paper:
    """The paper of a slug; imports its file alone.

    Raises:
        TorchstoneError: there is none; names the nearest.
    """
    if slug not in slugs():
        raise TorchstoneError(f"no paper {slug!r}{nearest(slug, slugs())}; papers: {', '.join(slugs())}")
    return importlib.import_module(f"torchstone.papers.{slug.replace('-', '_')}").PAPER


def search_papers(query: str | None = None) -> list[Paper]:
    """All papers in whose title, authors, year, topics, parts or verdicts every word of the query stands."""
    from torchstone.papers._reproduce import read_evidence, status

    found = []
    for paper in map(find_paper, slugs()):
        kept = read_evidence(paper.slug)
        verdicts = [status(claim, kept.get(claim.id)) for claim in paper.claims]
        words = [paper.slug, paper.title, paper.authors, str(paper.year), *paper.topics, *paper.parts, *verdicts]
        text = " ".join(words).casefold()
        if query is None or all(word in text for word in query.casefold().split()):
            found.append(paper)
    return found

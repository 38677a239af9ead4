"""What the commands `papers` and `reproduce` say, and the pages and the table that are generated from evidence."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torchstone.errors import TorchstoneError, nearest
from torchstone.files import write_bytes, write_json
from torchstone.papers import find_paper, slugs
from torchstone.papers._claim import Claim, Effect, Paper, Scale
from torchstone.papers._reproduce import Outcome, evidence_of, read_evidence, record, run_claim, stale, status

__all__ = ["STATES", "describe", "listing", "page", "run_all_papers", "run_paper", "table", "text_of"]

STATES = ("holds", "does not hold", "inconclusive", "not discriminating", "stale", "not measured")


def describe(paper: Paper) -> dict[str, Any]:
    """A paper as plain data: the contract of ``papers --json``."""
    kept = read_evidence(paper.slug)
    return {
        "slug": paper.slug,
        "title": paper.title,
        "authors": paper.authors,
        "year": paper.year,
        "link": paper.link,
        "topics": list(paper.topics),
        "parts": list(paper.parts),
        "summary": paper.summary,
        "claims": [_described(claim, kept.get(claim.id)) for claim in paper.claims],
    }


def _described(claim: Claim, kept: dict[str, Any] | None) -> dict[str, Any]:
    state = status(claim, kept)
    body: dict[str, Any] = {
        "id": claim.id,
        "kind": claim.kind,
        "text": claim.text,
        "figure": claim.figure,
        "state": state,
        "withdrawn": claim.withdrawn,
    }
    if kept is not None:
        body |= {"verdict": state, "measured": kept["numbers"], "stale": stale(claim, kept)}
    return body


def listing(paper: Paper) -> str:
    """One paper in text."""
    lines = [f"{paper.title} ({paper.year})", paper.authors, paper.link, "", paper.summary, ""]
    lines += [f"parts: {', '.join(paper.parts)}", f"topics: {', '.join(paper.topics)}"]
    for claim in describe(paper)["claims"]:
        lines += ["", f"{claim['id']} ({claim['kind']}): {claim['state']}", f"  {claim['text']}"]
        lines.append(f"  the paper: {claim['figure']}")
        if claim.get("withdrawn"):
            lines.append(f"  withdrawn: {claim['withdrawn']}")
        for name, value in (claim.get("measured") or {}).items():
            lines.append(f"  {name}: {value:.4g}")
        if claim.get("stale"):
            lines.append(f"  changed since it was recorded: {', '.join(claim['stale'])}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------- running


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_paper(
    slug: str, claim: str | None, scale: Scale, recorded: bool, out: Path | None, jobs: int
) -> dict[str, Any]:
    """Run a paper's claims: the contract of ``reproduce SLUG --json``; JSON and a plot lie in `out` beside the cells.

    Raises:
        TorchstoneError: no such paper or claim; a quick look was to be recorded.
    """
    paper = find_paper(slug)
    if recorded and scale == "quick":
        raise TorchstoneError("reproduce: --record needs --scale evidence; a quick look is no evidence")
    chosen = [each for each in paper.claims if claim is None or each.id == claim]
    if not chosen:
        names = [each.id for each in paper.claims]
        raise TorchstoneError(f"{slug}: no claim {claim!r}{nearest(claim or '', names)}; claims: {', '.join(names)}")
    outcomes = [
        run_claim(each, scale, None if out is None else out / each.id, jobs, _say)
        for each in chosen
        if claim is not None or each.withdrawn is None
    ]
    if recorded:
        _say(f"recorded in {record(paper, outcomes)}")
    report = _report(paper, scale, outcomes)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "reproduced.json", report)
        for outcome in outcomes:
            if (picture := _plot(outcome)) is not None:
                write_bytes(out / f"{outcome.claim.id}.png", picture)
    return report


def _report(paper: Paper, scale: Scale, outcomes: list[Outcome]) -> dict[str, Any]:
    return {
        "paper": {"slug": paper.slug, "title": paper.title, "year": paper.year},
        "scale": scale,
        "claims": [outcome.to_dict() for outcome in outcomes],
    }


def run_all_papers(scale: Scale, budget: float | None, jobs: int) -> list[dict[str, Any]]:
    """Claims of all papers, those that took the shortest time when they were recorded first, while the budget lasts."""
    todo = []
    for slug in slugs():
        paper = find_paper(slug)
        kept = read_evidence(slug)
        for each in paper.claims:
            if each.withdrawn is None:
                todo.append((float(kept.get(each.id, {}).get("seconds", 600.0)), slug, each, paper))
    began, reports = time.perf_counter(), []
    for expected, slug, each, paper in sorted(todo, key=lambda item: item[:2]):
        # a quick look takes at most three minutes, whatever the evidence took
        cost = min(expected, 180.0) if scale == "quick" else expected
        if budget is not None and time.perf_counter() - began + cost > budget:
            _say(f"{slug} {each.id}: left out, it takes about {cost:.0f} s and the budget is {budget:.0f}")
            continue
        try:
            reports.append(_report(paper, scale, [run_claim(each, scale, jobs=jobs, say=_say)]))
        except TorchstoneError as error:
            _say(f"{slug} {each.id}: {error}")
    return reports


def text_of(report: dict[str, Any]) -> str:
    """A report in text: what the paper says, what was found, margin, verdict, seeds, cost."""
    lines = [f"{report['paper']['title']} ({report['paper']['year']}), scale {report['scale']}"]
    for claim in report["claims"]:
        said = claim["verdict"] or "quick look, no verdict kept"
        lines += [
            "",
            f"{claim['id']} ({claim['kind']}): {said}",
            f"  {claim['text']}",
            f"  the paper: {claim['figure']}",
        ]
        lines += [f"  here: {name} = {value:.4g}" for name, value in claim["measured"].items()]
        for gate in claim["gates"]:
            limit = _limit(gate)
            controls = "".join(f"; {arm} (control): {answer}" for arm, answer in gate.get("controls", {}).items())
            lines.append(f"  gate {gate['gate']}: {gate['answer']} ({limit}){controls}")
        seeds = claim["seeds"]
        shown = f"seeds {seeds[0]} to {seeds[-1]}, " if seeds else ""
        lines.append(f"  {shown}{claim['seconds']:.0f} s")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text of a table's cell in Markdown."""
    return text.replace("|", "\\|")


def _limit(gate: dict[str, Any]) -> str:
    """What a gate asks, in words."""
    if "margin" in gate:
        return f"margin {gate['margin']:g}"
    words = {"low": "at least", "high": "at most"}
    return ", ".join(f"{word} {gate[name]:g}" for name, word in words.items() if name in gate)


def _plot(outcome: Outcome) -> bytes | None:
    """Values of every arm, a dot a seed; None where a claim has no arms."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(cell["arm"] for cell in outcome.cells))
    if not arms:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, arm in enumerate(arms):
        values = [cell["value"] for cell in outcome.cells if cell["arm"] == arm]
        axes.plot([number] * len(values), values, "o", alpha=0.7)
    axes.set_xticks(range(len(arms)), arms, rotation=20)
    axes.set(title=outcome.claim.id, ylabel="value")
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------ pages


def page(paper: Paper) -> str:
    """The paper's page in Markdown, from its file and its evidence."""
    kept = read_evidence(paper.slug)
    parts = ", ".join(f"`{part}`" for part in paper.parts)
    lines = [f"# {paper.title}", "", f"{paper.authors}, {paper.year}. [{paper.link}]({paper.link})", ""]
    lines += [paper.summary, "", f"Parts: {parts}. `torchstone reproduce {paper.slug}` runs what follows.", ""]
    for claim in paper.claims:
        found = kept.get(claim.id)
        lines += [f"## {claim.id}: {status(claim, found)}", "", claim.text, "", f"The paper: {claim.figure}.", ""]
        if claim.withdrawn is not None:
            lines += [f"Withdrawn: {claim.withdrawn}", ""]
        if found is None:
            continue
        _, gates = evidence_of(claim, found)
        lines += ["| measured | value |", "|---|---|"]
        lines += [f"| {_cell(name)} | {value:.4g} |" for name, value in found["numbers"].items()]
        lines += ["", "| gate | answer | limit | controls |", "|---|---|---|---|"]
        for gate in gates:
            limit = _limit(gate)
            controls = ", ".join(f"{arm}: {answer}" for arm, answer in gate.get("controls", {}).items()) or "-"
            lines.append(f"| {_cell(gate['gate'])} | {gate['answer']} | {limit} | {controls} |")
        seeds = sorted({cell["seed"] for cell in found["cells"] if not cell.get("shifted")})
        cost = f"{found['seconds']:.0f} s, torch {found['machine']['torch']}"
        if again := found.get("confirmed"):
            cost += f"; confirmed at {again['commit'][:12]} by {again['by']}"
        lines += ["", (f"Seeds {seeds[0]} to {seeds[-1]}; " if seeds else "") + cost + ".", ""]
    return "\n".join(lines).rstrip() + "\n"


def table(only: Collection[str] | None = None) -> str:
    """The README's table of papers, all or `only` these, with counts of what was found in its heading."""
    rows, counts, effects = [], Counter[str](), 0
    for slug in slugs():
        if only is not None and slug not in only:
            continue
        paper, kept = find_paper(slug), read_evidence(slug)
        states = [(claim, status(claim, kept.get(claim.id))) for claim in paper.claims]
        counts.update(state for _, state in states)
        effects += sum(
            any(isinstance(gate, Effect) for gate in claim.gates) and state not in ("stale", "not measured")
            for claim, state in states
        )
        said = "; ".join(f"{claim.id}: {state}" for claim, state in states)
        rows.append(f"| [{slug}](docs/papers/{slug}.md) | {paper.title} | {paper.year} | {said} |")
    heading = ", ".join(f"{counts[state]} {state}" for state in STATES)
    # an effect gate holds by chance, where there is none, in at most one of forty runs (one side of a 95 % interval)
    return "\n".join(
        [
            f"At this scale: {heading}. Of {effects} effects that were measured, at most {effects / 40:.2f} are to be "
            "expected to hold by chance.",
            "",
            "| paper | title | year | claims |",
            "|---|---|---|---|",
            *rows,
        ]
    )

"""The forms of a result: a table in text, plots, and one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchstone.files import write_bytes

if TYPE_CHECKING:
    from torchstone.compare.decide import Interval, Verdict
    from torchstone.compare.result import Arm, Result

__all__ = ["html_page", "plots", "text_table"]


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _span(found: Interval | None) -> str:
    """``1.2345 [1.2300, 1.2400]``."""
    if found is None:
        return "no value"
    return f"{found.mean:.4f}" + (f" [{found.low:.4f}, {found.high:.4f}]" if found.n > 1 else "")


def _signed(found: Interval | None) -> str:
    if found is None:
        return "-"
    return f"{found.mean:+.4f}" + (f" [{found.low:+.4f}, {found.high:+.4f}]" if found.n > 1 else "")


def _said(verdict: Verdict | None) -> str:
    return "not compared" if verdict is None else verdict.word


def _bytes(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 2**20:,.0f} MiB" if value >= 2**20 else f"{value:,.0f} B"


def _costs(arm: Arm) -> list[str]:
    """Tokens/s, peak memory, decode state and arithmetic, each in words."""
    probe = arm.probe
    if not probe.get("tokens_per_second"):
        return ["-"] * 4
    fixed = probe.get("state_bytes_fixed") or 0
    state = f"{probe['state_bytes_per_token']:,} B/token" + (f" + {fixed:,} B" if fixed else "")
    flops = f"{probe['flops_per_token'] / 1e6:,.2f} M/token"
    return [f"{probe['tokens_per_second']:,.0f}", _bytes(probe.get("peak_bytes")), state, flops]


def rows(result: Result) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table; the first row is the reference."""
    spans, verdicts, documents = result.intervals(), result.verdicts(), result.documents()
    by_documents = any(found is not None for found in documents.values())
    header = ["variant", result.metric.name, "difference", "verdict", "smallest shown"]
    header += ["over documents"] if by_documents else []
    costs = any(arm.probe for arm in result.arms)
    header += ["tokens/s", "peak memory", "decode state", "FLOPs"] if costs else []
    body = []
    for arm in result.arms:
        first = arm is result.arms[0]
        verdict = verdicts.get(arm.name)
        said = "reference" if first else _said(verdict)
        if arm.tuned is not None and arm.tuned.get("edge"):
            said += " (edge)"
        row = [
            arm.name,
            _span(spans[arm.name]),
            "" if first else _signed(verdict.difference if verdict else None),
            said,
        ]
        row.append("" if first else _number(verdict.smallest if verdict else None))
        if by_documents:
            row.append("" if first else _signed(documents.get(arm.name)))
        body.append(row + (_costs(arm) if costs else []))
    return header, body


def notes(result: Result) -> list[str]:
    """What a reader must know beside the table."""
    facts, said = result.facts, []
    n = len(result.seeds)
    said.append(
        f"{n} seed{'s' if n != 1 else ''}; intervals are Student's t over seeds (95 %), verdicts are adjusted for "
        f"{max(1, len(result.arms) - 1)} comparison{'s' if len(result.arms) != 2 else ''} (Holm); equivalent is within "
        f"{100 * result.margin:g} % of the reference"
    )
    if n < 3:
        said.append("fewer than 3 seeds: no verdict")
    said.append(
        "tuned: " + facts["tune"] if facts.get("tune") else "untuned: every variant has the recipe's own settings"
    )
    if facts.get("match", "none") != "none":
        said.append(f"matched by {facts['match']}")
    if facts.get("match") == "wall":
        said.append("steps were set by the clock of this machine: the table is not repeatable")
    for arm in result.arms:
        said += [f"{arm.name}: {text}" for text in (*arm.notes, *arm.troubles(result.budgets[-1]))]
        if arm.tuned is not None:
            edge = ", at the edge of the grid after two extensions" if arm.tuned.get("edge") else ""
            said.append(f"{arm.name}: {arm.tuned['field']} = {arm.tuned['choice']:g} of {arm.tuned['grid']}{edge}")
    for name, trend in result.trends().items() if len(result.budgets) > 1 else ():
        if trend is not None:
            gaps = ", ".join(f"x{budget:g}: {_signed(gap)}" for budget, gap in trend.gaps.items())
            said.append(f"{name} by budget: {gaps}; per doubling {_signed(trend.per_doubling)}")
    if facts.get("not_varied"):
        said.append("not varied, and so not known to matter or not: " + ", ".join(facts["not_varied"]))
    return said


def text_table(result: Result) -> str:
    """Columns in plain text, and the notes below."""
    header, body = rows(result)
    widths = [max(len(row[i]) for row in (header, *body)) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *body)
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, "", *notes(result)])


# ------------------------------------------------------------------------------------------------------------ plots


def plots(result: Result, folder: Path) -> list[Path]:
    """``learning_curves.png`` and, where costs are known, ``loss_by_cost.png``."""
    made = []
    for name, draw in (("learning_curves", _curves), ("loss_by_cost", _by_cost)):
        picture = draw(result)
        if picture is not None:
            write_bytes(folder / f"{name}.png", picture)
            made.append(folder / f"{name}.png")
    return made


def _figure() -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _curves(result: Result) -> bytes | None:
    figure = _figure()
    axes, drawn = figure.subplots(), False
    for number, arm in enumerate(result.arms):
        for cell in arm.cells.get(result.budgets[-1], {}).values():
            curve = [point for point in cell.get("curve") or [] if point[0] > 0]
            if curve:
                label = None if any(line.get_label() == arm.name for line in axes.lines) else arm.name
                axes.plot(*zip(*curve, strict=True), color=f"C{number % 10}", alpha=0.7, lw=1.2, label=label)
                drawn = True
    if not drawn:
        return None
    axes.set(xlabel="step", ylabel="validation loss", title="Learning curves, one line a seed")
    axes.legend()
    axes.grid(alpha=0.3)
    return _png(figure)


def _by_cost(result: Result) -> bytes | None:
    figure = _figure()
    axes, drawn, spans = figure.subplots(), False, result.intervals()
    for number, arm in enumerate(result.arms):
        span, flops = spans[arm.name], arm.probe.get("flops_per_token")
        tokens = next((cell.get("tokens") for cell in arm.cells.get(result.budgets[-1], {}).values()), None)
        if span is None or not flops or not tokens:
            continue
        bar = [[span.mean - span.low], [span.high - span.mean]] if span.n > 1 else None
        axes.errorbar(
            [flops * tokens], [span.mean], yerr=bar, fmt="o", color=f"C{number % 10}", label=arm.name, capsize=3
        )
        drawn = True
    if not drawn:
        return None
    axes.set(xlabel="training FLOPs", ylabel=result.metric.name, title="Result against cost, 95 % intervals")
    axes.legend()
    axes.grid(alpha=0.3)
    return _png(figure)


# ------------------------------------------------------------------------------------------------------------- page


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ccc; padding: .35rem .7rem; text-align: left; vertical-align: top; }
tbody tr:first-child { background: #f4f4f4; }
img { max-width: 100%; } pre { background: #f4f4f4; padding: .7rem; overflow: auto; }
.wide { overflow-x: auto; }
"""


def html_page(result: Result) -> str:
    """One page with everything in it: no file beside it is needed."""
    header, body = rows(result)
    escape = html.escape
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    said = "".join(f"<li>{escape(text)}</li>" for text in notes(result))
    pictures = "".join(
        f'<p><img alt="{alt}" src="data:image/png;base64,{base64.b64encode(picture).decode()}"></p>'
        for alt, picture in (("learning curves", _curves(result)), ("result against cost", _by_cost(result)))
        if picture is not None
    )
    seeds = "".join(
        f"<tr><td>{escape(arm.name)}</td><td>{seed}</td><td>{escape(str(cell.get('status')))}</td>"
        f"<td>{_number(cell.get('metrics', {}).get(result.metric.name))}</td><td>{_number(cell.get('valid_loss'))}</td>"
        f"<td>{_number(cell.get('seconds'), 0)}</td></tr>"
        for arm in result.arms
        for seed, cell in sorted(arm.cells.get(result.budgets[-1], {}).items())
    )
    facts = "\n".join(f"{name}: {value}" for name, value in result.facts.items() if name != "not_varied")
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Comparison</title><style>{_STYLE}</style>"
        f"<h1>Comparison of {len(result.arms)} variants</h1><div class='wide'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{lines}</tbody></table></div><ul>{said}</ul>{pictures}"
        f"<h2>Every seed</h2><table><thead><tr><th>variant</th><th>seed</th><th>status</th>"
        f"<th>{escape(result.metric.name)}</th><th>valid loss</th><th>seconds</th></tr></thead><tbody>{seeds}</tbody>"
        f"</table><h2>How it was made</h2><pre>{escape(facts)}</pre></html>\n"
    )

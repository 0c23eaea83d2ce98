"""The report of a comparison on several federations: ranks with their critical difference, and the way to each one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from consilience.core.checkpoint import write_atomically
from consilience.measure.ranks import Ranks
from consilience.report.answer import p_value
from consilience.report.markup import Cell, Column, note, section, table
from consilience.report.words import NONE, Scale, display, fixed, listed, plural

Boards = Mapping[str, Sequence[Mapping[str, Any]]]


def verdict(ranks: Ranks) -> str:
    """In words, what the ranks show."""
    k, n = len(ranks.order), len(ranks.ranks)
    over = f"over {plural(n, 'federation')}"
    lead = f"{_name(ranks.order[0])} has the best mean rank {over} ({fixed(ranks.mean[ranks.order[0]], 2)})"
    if not ranks.could_find:
        return (
            f"<b>{lead}</b>, but so few federations cannot show a difference between {plural(k, 'method')}: the "
            f"critical difference is {fixed(ranks.critical, 2)} ranks, and no two can lie further apart than {k - 1}."
        )
    if ranks.p >= ranks.alpha:
        return (
            f"<b>No difference was found</b> between {plural(k, 'method')} {over} (Friedman, "
            f"{p_value(ranks.p)}; the smallest possible is {p_value(ranks.smallest)}). {lead}."
        )
    best = ranks.order[0]
    near = next((c for c in ranks.cliques if best in c), [best])
    worse = [m for m in ranks.order if m not in near]
    tied = [_name(m) for m in near if m != best]
    text = f"<b>{lead}</b>: methods differ (Friedman, {p_value(ranks.p)})"
    if worse:
        text += f", and it ranks better than {listed([_name(m) for m in worse])}"
    return text + (f"; between it and {listed(tied)} none was found." if tied else ".")


def verdict_of(folder: Path) -> str:
    """:func:`verdict` of a folder's ranks.json."""
    return verdict(Ranks(**json.loads((folder / "ranks.json").read_text("utf-8"))))


def _name(label: str) -> str:
    return escape(display(label, label.partition(":")[0]))


def write_overview(folder: Path, titles: Mapping[str, str], boards: Boards, ranks: Ranks) -> Path:
    """Write report.html over several federations. titles: what each folder's federation is called."""
    from string import Template

    shown = [
        ("ranks", "Ranks", _ranks_section(ranks)),
        ("federations", "Every federation", _scores_section(titles, boards, ranks)),
    ]
    parts = [
        f'<section id="answer" aria-labelledby="answer-h"><p class="question">Which method is best over these '
        f'{len(titles)} federations?</p><h1 class="answer" id="answer-h">{verdict(ranks)}</h1></section>\n'
    ]
    parts += [section(anchor, i, title, *content) for i, (anchor, title, content) in enumerate(shown, 2)]
    contents = [("answer", "Answer"), *((anchor, title) for anchor, title, _ in shown)]
    assets = files("consilience.report") / "assets"
    page = Template((assets / "page.html").read_text("utf-8")).substitute(
        title=f"{len(ranks.order)} methods on {len(titles)} federations · Consilience",
        css=(assets / "page.css").read_text("utf-8"),
        subject=f"{plural(len(ranks.order), 'method')} on {plural(len(titles), 'federation')}",
        contents="".join(
            f'<li><a href="#{anchor}"><span>{i}</span>{title}</a></li>' for i, (anchor, title) in enumerate(contents, 1)
        ),
        sections="".join(parts),
        key="",
        blob=json.dumps(EMPTY),
        script=(assets / "page.js").read_text("utf-8"),
    )
    write_atomically(folder / "report.html", page)
    return folder / "report.html"


EMPTY: dict[str, Any] = {
    "methods": [],
    "slots": 8,
    "rows": 1,
    "seeds": [],
    "scale": {"noun": "", "unit": "", "points": "", "digits": 1, "lower": False},
    "curves": {"axes": [], "measures": [], "of": {}},
    "strip": {"gain": False, "dots": {}},
    "federation": [],
    "plane": {},
}
"""What the page's script needs where nothing is drawn by it."""


def _ranks_section(ranks: Ranks) -> tuple[str, str]:
    near = fixed(ranks.critical, 2)
    finding = f"Mean ranks that differ by less than {near} may differ by chance; a bar joins such methods."
    test = "exact" if ranks.exact else "by Iman and Davenport&rsquo;s F"
    text = (
        "Rank 1 is best; ties share the mean of their ranks. A federation counts once: seeds within it are averaged "
        f"before. Friedman&rsquo;s test, {test}: {p_value(ranks.p)}; with so few federations the smallest possible is "
        f"{p_value(ranks.smallest)}. Nemenyi&rsquo;s critical difference at &alpha; = {ranks.alpha:g} "
        "(Dem&scaron;ar, JMLR 2006)."
    )
    return finding, f'<figure><div class="plot">{rank_plot(ranks)}</div></figure>{note(text)}'


def rank_plot(ranks: Ranks, width: float = 760.0) -> str:
    """The critical difference diagram: mean ranks on a line, best at the left, bars over methods within it."""
    k = len(ranks.order)
    left, right, top = 150.0, width - 150.0, 58.0
    half = (k + 1) // 2
    bars = len(ranks.cliques)
    height = top + 20 + 9 * bars + 24 * half + 12

    def x(rank: float) -> float:
        return left + (right - left) * (rank - 1) / max(1, k - 1)

    def line(x1: float, y1: float, x2: float, y2: float, more: str = "") -> str:
        stroke = more or 'stroke="var(--ink)"'
        return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {stroke}/>'

    parts = [line(left, top, right, top)]
    for rank in range(1, k + 1):
        parts.append(line(x(rank), top - 5, x(rank), top))
        parts.append(f'<text x="{x(rank):.1f}" y="{top - 9:.1f}" text-anchor="middle">{rank}</text>')
    span = min(ranks.critical, k - 1) if k > 1 else 0
    parts.append(line(left, 22, x(1 + span), 22, 'stroke="var(--ink)" stroke-width="2"'))
    more = "" if ranks.could_find else " (wider than the scale)"
    parts.append(f'<text x="{left:.1f}" y="15">critical difference {fixed(ranks.critical, 2)}{more}</text>')
    for i, clique in enumerate(ranks.cliques):
        y = top + 12 + 9 * i
        ends = x(ranks.mean[clique[0]]) - 4, x(ranks.mean[clique[-1]]) + 4
        parts.append(line(ends[0], y, ends[1], y, 'stroke="var(--ink3)" stroke-width="4"'))
    for i, method in enumerate(ranks.order):
        best = i < half
        row = i if best else k - 1 - i
        y, at = top + 22 + 9 * bars + 24 * row, x(ranks.mean[method])
        edge, anchor = (left - 8, "end") if best else (right + 8, "start")
        parts.append(line(at, top, at, y, 'stroke="var(--ink2)"') + line(at, y, edge, y, 'stroke="var(--ink2)"'))
        shift = -6 if best else 6
        label = f"{_name(method)} {fixed(ranks.mean[method], 2)}"
        parts.append(
            f'<text class="lab-ink" x="{edge + shift:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">{label}</text>'
        )
    told = ", ".join(f"{_name(m)} {fixed(ranks.mean[m], 2)}" for m in ranks.order)
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="100%" style="max-width:{width:.0f}px" role="img" '
        f'aria-label="Mean ranks: {told}. Critical difference {fixed(ranks.critical, 2)}.">{"".join(parts)}</svg>'
    )


def _scores_section(titles: Mapping[str, str], boards: Boards, ranks: Ranks) -> tuple[str, str]:
    lower = any(row.get("loss") is not None for rows in boards.values() for row in rows)
    scale = Scale(lower)
    columns = [Column("Federation"), *(Column(display(m, m.partition(":")[0]), scale.unit) for m in ranks.order)]
    rows = []
    for part, board in boards.items():
        by = {row["method"]: row for row in board}
        best = min(ranks.ranks[part].values())
        cells = []
        for method in ranks.order:
            value = by[method].get(scale.noun)
            top = ranks.ranks[part][method] == best
            cells.append(Cell(NONE if value is None else scale.number(value), value, "best" if top else ""))
        rows.append((f'<a href="{escape(part)}/report.html">{escape(titles[part])}</a>', cells))
    mean = [Cell(fixed(ranks.mean[m], 2), ranks.mean[m]) for m in ranks.order]
    inner = table("Scores on every federation.", "Scores", columns, [*rows, ("Mean rank", mean)])
    inner += note(
        f"{scale.noun.capitalize()}, mean over seeds; bold: best. Each name leads to the federation&rsquo;s own report."
    )
    seeds = min(row["seeds"] for board in boards.values() for row in board)
    return f"Every federation was run with {plural(seeds, 'seed')} or more.", inner

"""The leaderboard of the report: scores with intervals drawn, ties as bars, and what each method costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from statistics import fmean
from typing import NamedTuple

from consilience.report.answer import leaderboard_finding
from consilience.report.chosen import chosen_table
from consilience.report.facts import Entry, Facts
from consilience.report.markup import Cell, colour, mark, named, note, section
from consilience.report.words import NBSP, NONE, plural


class Forest:
    """The axis of the drawn intervals. A few seeds can make one wider than all scores: it is cut at the edge."""

    def __init__(self, facts: Facts) -> None:
        means = [e.mean for e in facts.entries]
        reach = 1.5 * max(max(means) - min(means), 0.02 if not facts.lower else 0.02 * max(map(abs, means)), 1e-9)
        lows = [i[0] for e in facts.entries if (i := e.interval)] + means
        highs = [i[1] for e in facts.entries if (i := e.interval)] + means
        low, high = max(min(lows), min(means) - reach), min(max(highs), max(means) + reach)
        pad = 0.06 * (high - low) or 0.01
        self.low, self.high = low - pad, high + pad
        self.scale = facts.scale

    def at(self, value: float) -> float:
        """Percent from the left edge."""
        return 100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def ticks(self) -> list[float]:
        """Round values, about three or more; none that a share cannot have."""
        most = (self.high - self.low) / 3
        power = 10.0 ** math.floor(math.log10(most))
        step = max(s * power for s in (1, 2, 5) if s * power <= most * 1.0001)
        low, high = (self.low, self.high) if self.scale.lower else (max(0.0, self.low), min(1.0, self.high))
        return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]

    def axis(self) -> str:
        """The numbers above the intervals."""
        ticks, factor = self.ticks(), self.scale.factor
        step = factor * (ticks[1] - ticks[0] if len(ticks) > 1 else 1.0)
        digits = max(0, math.ceil(-math.log10(step) - 1e-9))
        return "".join(
            f'<span{" class=wide" if i % 2 else ""} style="left:{self.at(t):.2f}%">{t * factor:.{digits}f}</span>'
            for i, t in enumerate(ticks)
        )

    def bar(self, entry: Entry, local: Entry | None) -> str:
        """One method's mean and interval."""
        lines = "".join(f'<i class="g0" style="left:{self.at(t):.2f}%"></i>' for t in self.ticks())
        if local is not None:
            lines += f'<i class="gl" style="left:{self.at(local.mean):.2f}%"></i>'
        if interval := entry.interval:
            left, right = self.at(interval[0]), self.at(interval[1])
            lines += f'<i class="ci" style="left:{left:.2f}%;width:{right - left:.2f}%;background:{colour(entry)}"></i>'
        return f'<div class="fp">{lines}<span style="left:{self.at(entry.mean):.2f}%">{mark(entry, "pt")}</span></div>'


def lanes(facts: Facts) -> dict[str, str]:
    """The bars that join methods without a significant difference, by label."""
    cells = {e.label: "" for e in facts.ranked}
    letters: dict[str, str] = {e.label: "" for e in facts.ranked}
    for k, clique in enumerate(facts.comparison.cliques):
        lane = k % 3
        for i, label in enumerate(clique):
            ends = (" a" if i == 0 else "") + (" z" if i == len(clique) - 1 else "")
            css = f"lane{' odd' if lane % 2 else ''}{ends}"
            cells[label] += f'<i class="{css}" style="left:{6 * lane}px"></i>'
            letters[label] += chr(ord("a") + k % 26)
    told = '<span class="lt"><span class="sr">ties with group </span>{}</span>'
    return {label: html and html + told.format(letters[label]) for label, html in cells.items()}


class Measured(NamedTuple):
    """A column beside the score."""

    title: str
    small: str
    up: bool
    cell: Callable[[Entry], Cell]


def _number(value: float | None, text: Callable[[float], str]) -> Cell:
    return Cell(NONE, "") if value is None else Cell(text(value), value)


def _columns(facts: Facts) -> list[Measured]:
    """What there is to say of a method beside its score; at most five."""
    scale, traffic, key = facts.scale, facts.traffic_unit, "virtual_s" if facts.virtual else "wall_s"
    clock, several = facts.clock(key), len(facts.seeds) > 1
    columns = []
    if not facts.lower:
        columns.append(
            Measured(
                "Worst 10 %",
                "<span class=wide>of clients, </span>%",
                False,
                lambda e: _number(e.last("clients", "worst10"), scale.number),
            )
        )
    if facts.local is not None:
        over = "<span class=wide>over Local" + (f", </span>{scale.points}" if scale.points else "</span>")
        cases = f"of {len(facts.best.gains)}<span class=wide> clients{' &times; seeds' if several else ''}</span>"
        columns += [
            Measured(
                "Gain",
                over,
                False,
                lambda e: _number(fmean(d.value for d in e.gains) if e.gains else None, scale.signed),
            ),
            Measured("Lose", cases, True, lambda e: _number(len(e.losers) if e.gains else None, "{:.0f}".format)),
        ]
    else:
        if not facts.lower:
            columns.append(
                Measured(
                    "Clients",
                    "<span class=wide>mean, </span>%",
                    False,
                    lambda e: _number(e.last("clients", "mean"), scale.number),
                )
            )
        if several:
            columns.append(
                Measured(
                    "Spread", "SD<span class=wide> of seeds</span>", True, lambda e: _number(e.spread, scale.number)
                )
            )
    return [
        *columns,
        Measured(
            "Traffic",
            f"{traffic.name}<span class=wide> per client</span>",
            True,
            lambda e: _number(e.traffic or None, traffic.number),
        ),
        Measured(
            "Time",
            f"{'virtual' if facts.virtual else 'wall'} {clock.name}",
            True,
            lambda e: _number(e.last(key), clock.number),
        ),
    ]


def _row(facts: Facts, entry: Entry, forest: Forest, rank: str, order: int, ties: str) -> str:
    interval = entry.interval
    beside = f' <span class="ci">{facts.scale.beside(entry.mean, *interval)}</span>' if interval else ""
    first = order == 0 and len(facts.ranked) > 1
    values = [column.cell(entry) for column in _columns(facts)]
    cells = "".join(f'<td role="cell" class="c{i}" data-v="{c.value}">{c.html}</td>' for i, c in enumerate(values, 1))
    return (
        f'<tr role="row"{" class=win" if first else ""}><td role="cell" class="rk" data-v="{order + 1}">{rank}</td>'
        f'<td role="cell" class="tie">{ties}</td><th scope="row" role="rowheader" class="mt">{named(entry)}</th>'
        f'<td role="cell" class="key ac" data-v="{entry.mean}">{facts.scale.number(entry.mean)}{beside}</td>'
        f'<td role="cell" class="forest l" aria-hidden="true">{forest.bar(entry, facts.local)}</td>{cells}</tr>'
    )


def leaderboard_section(facts: Facts, number: int) -> str:
    """Section "Leaderboard"."""
    forest, ties, compared = Forest(facts), lanes(facts), facts.comparison
    ranks = {}
    for e in facts.ranked:
        rank = compared.rank[e.label]
        shared = sum(r == rank for r in compared.rank.values()) > 1
        ranks[e.label] = f"{rank}{'=' if shared else ''}" if compared.tested else ""
    head = "".join(
        f'<th class="c{i}" scope="col" role="columnheader"><button type="button"{" data-dir=asc" if c.up else ""}>'
        f"{c.title}</button><small>{c.small}</small></th>"
        for i, c in enumerate(_columns(facts), 1)
    )
    tested = '<span class="sr">No significant difference group</span>'
    unit = f"{facts.scale.unit} ± 95 % CI".strip() if len(facts.seeds) > 1 else facts.scale.unit
    body = "".join(_row(facts, e, forest, ranks[e.label], i, ties[e.label]) for i, e in enumerate(facts.ranked))
    refs = "".join(_row(facts, e, forest, "", len(facts.ranked) + i, "") for i, e in enumerate(facts.references))
    seeds = plural(len(facts.seeds), "seed")
    caption = f"Methods ranked by {facts.scale.noun}, mean over {seeds}. Columns can be sorted."
    inner = (
        '<table class="lb sortable" data-sorted="rank" role="table">'
        f'<caption class="sr">{escape(caption)}</caption><thead role="rowgroup"><tr role="row">'
        '<th class="rk" scope="col" role="columnheader" aria-sort="ascending"><button type="button" data-dir="asc">#'
        f'</button></th><th class="tie" scope="col" role="columnheader">{tested}<span aria-hidden="true">'
        f'{"Tie" if compared.cliques else ""}</span></th><th class="l mt" scope="col" role="columnheader">Method</th>'
        '<th class="ac" scope="col" role="columnheader"><button type="button"'
        f"{' data-dir=asc' if facts.lower else ''}>{facts.scale.noun.capitalize()}</button><small>{unit}</small></th>"
        f'<th class="forest l" scope="col" role="columnheader"><span class="sr">{facts.scale.noun.capitalize()}, drawn'
        f'</span><div class="fpx" aria-hidden="true">{forest.axis()}</div></th>{head}</tr></thead>'
        f'<tbody role="rowgroup">{body}</tbody>'
        + (f'<tbody role="rowgroup" class="refs">{refs}</tbody>' if refs else "")
        + "</table>"
    )
    return section(
        "leaderboard", number, "Leaderboard", leaderboard_finding(facts), inner + _notes(facts) + chosen_table(facts)
    )


def _notes(facts: Facts) -> str:
    what = (
        "that of the global model on the global test set"
        if facts.metric == "global"
        else "the mean over clients of the model each would deploy, on its own test data"
    )
    over = f"mean over {len(facts.seeds)} seeds" if len(facts.seeds) > 1 else "one seed"
    text = f"{facts.scale.noun.capitalize()} is {what}, after the last round; {over}. "
    compared = facts.comparison
    if compared.tested and len(facts.ranked) > 1:
        text += (
            "A bar joins methods that do not differ significantly (paired t-tests over seeds, Holm-corrected, "
            "&alpha; = 0.05). Rank is 1 plus the number of methods that are significantly better."
        )
        if compared.detectable and (facts.lower or compared.detectable < 1):
            text += (
                f" With {plural(len(facts.seeds), 'seed')}, a difference below about "
                f"{facts.scale.gap(compared.detectable)} would often go unnoticed."
            )
    elif len(facts.ranked) > 1:
        text += "With one seed there are no intervals, tests or ranks: add --seeds 5."
    notes = note(text)
    if facts.references:
        which = {
            "local": f"Local (each client alone{', dashed line' if facts.local else ''})",
            "centralised": "Centralised (data pooled in one place)",
        }
        named_refs = " and ".join(dict.fromkeys(which[e.reference] for e in facts.references))
        single = len({e.reference for e in facts.references}) == 1
        notes += note(f"{named_refs} {'is a reference and is' if single else 'are references and are'} not ranked.")
    return notes.replace(" %", f"{NBSP}%")

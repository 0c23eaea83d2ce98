"""What bytes buy: how far every method gets with what it sends, with a server or without, compressed or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from consilience.measure.board import costs_to_target
from consilience.measure.target import Cost
from consilience.report.blob import Point, curve
from consilience.report.facts import SLOTS, Entry, Facts
from consilience.report.markup import SHAPES, Cell, Column, colour, named, note, section, table
from consilience.report.words import NONE, Unit, byte_unit, fixed, plural

NEAR = 0.95
"""Without a target, bytes are counted to so much of the best method's accuracy."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760.0, 340.0, 52.0, 16.0, 14.0, 44.0


class Frame(NamedTuple):
    """Ranges of the chart: decades of bytes in their unit, and scores as they are written."""

    unit: Unit
    factor: float
    left: float
    right: float
    low: float
    high: float

    def x(self, amount: float) -> float:
        """Of bytes."""
        share = (math.log10(amount / self.unit.factor) - self.left) / (self.right - self.left)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, score: float) -> float:
        """Of a score."""
        share = (score * self.factor - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def lines(facts: Facts) -> list[tuple[Entry, list[Point]]]:
    """Of every method that sends anything, the curve of the score that ranks, from its first byte on."""
    keys = ("global", facts.scale.noun) if facts.metric == "global" else ("clients", "mean")
    found = [(entry, [p for p in curve(entry, keys) if p.bytes > 0]) for entry in facts.entries]
    return [(entry, points) for entry, points in found if points]


def goal(facts: Facts) -> float | None:
    """The target that was asked for, or ``NEAR`` of the best method's accuracy; None: a loss has no such share."""
    asked = facts.compare.get("target")
    if asked is not None:
        return float(asked)
    return None if facts.lower else NEAR * facts.best.mean


def traffic_section(facts: Facts, number: int) -> str:
    """Section "What bytes buy"."""
    drawn, target = lines(facts), goal(facts)
    costs = {} if target is None else {e.label: _bytes(facts, e, target) for e, _ in drawn}
    unit = facts.traffic_unit
    reached = byte_unit(c.median or c.beyond for c in costs.values()) if costs else unit
    columns = [Column("Method"), Column(facts.scale.noun.capitalize(), facts.scale.unit, facts.lower)]
    columns += [Column(title, f"{unit.name} per client", True) for title in ("Up", "Down", "Both")]
    if target is not None:
        columns.append(Column(f"To {facts.scale.text(target)}", f"{reached.name} per client", True))
    rows = []
    for entry, _ in drawn:
        amounts = [(entry.last(key) or 0.0) / entry.clients for key in ("bytes_up", "bytes_down")]
        cells = [Cell(facts.scale.number(entry.mean), entry.mean)]
        cells += [Cell(_amount(v, unit) if v else NONE, v or "") for v in (*amounts, entry.traffic)]
        if target is not None:
            cells.append(_cost(costs[entry.label], reached, min(_known(costs), default=None)))
        rows.append((named(entry), cells))
    noun = facts.scale.noun
    inner = (
        f"<figure><figcaption><b>{noun.capitalize()} against bytes</b>per client, up and down, on a logarithmic scale; "
        f'a mark where a method ended.</figcaption><div class="scroll" role="region" aria-label="Chart" tabindex="0">'
        f"{chart(facts, drawn)}</div></figure>"
        + table(f"{noun.capitalize()} and bytes of every method.", "Bytes", columns, rows)
        + note(_note(facts, target))
    )
    return section("traffic", number, "What bytes buy", finding(facts), inner)


def _bytes(facts: Facts, entry: Entry, target: float) -> Cost:
    """What reaching the target takes of bytes, up and down, for each client."""
    cost = costs_to_target(entry.runs, facts.metric, target, lower=facts.lower)["bytes"]

    def shared(value: float | None) -> float | None:
        return None if value is None else value / entry.clients

    return Cost(shared(cost.median), shared(cost.least), shared(cost.most), cost.beyond / entry.clients)


def _known(costs: dict[str, Cost]) -> list[float]:
    return [cost.median for cost in costs.values() if cost.median is not None]


def _amount(value: float, unit: Unit) -> str:
    """Bytes in a unit; two digits at least, since methods differ by orders of magnitude."""
    scaled = value / unit.factor
    return fixed(scaled, max(unit.digits, 1 - math.floor(math.log10(scaled))))


def _cost(cost: Cost, unit: Unit, least: float | None) -> Cell:
    if cost.median is None:
        return Cell(f"&gt; {_amount(cost.beyond, unit)}", "")
    return Cell(_amount(cost.median, unit), cost.median, "best" if cost.median == least else "")


def finding(facts: Facts) -> str:
    """In a sentence, in HTML, who reaches the goal with the fewest bytes."""
    drawn, target = lines(facts), goal(facts)
    if target is None:
        least = min((e for e, _ in drawn), key=lambda e: e.traffic)
        return f"{escape(least.name)} sends least: {byte_unit([least.traffic]).text(least.traffic)} per client."
    known = sorted((c, e.name) for e, _ in drawn if (c := _bytes(facts, e, target).median) is not None)
    text = facts.scale.text(target)
    if not known:
        return f"Less than half of any method&rsquo;s runs reached {text}."
    (fewest, first), (most, last) = known[0], known[-1]
    told = f"{escape(first)} reaches {text} with the fewest bytes, {byte_unit([fewest]).text(fewest)} per client"
    if len(known) > 1:
        told += f"; {escape(last)} takes the most of those that do, {byte_unit([most]).text(most)}"
    never = len(drawn) - len(known)
    return told + (f"; {plural(never, 'method')} did not in most runs." if never else ".")


def _note(facts: Facts, target: float | None) -> str:
    text = (
        "Bytes are those of the encoded messages, mean over clients and seeds; where there is no server, every message "
    )
    text += "to a neighbour counts as one up and one down. "
    if target is not None:
        which = "the target" if facts.compare.get("target") is not None else f"{100 * NEAR:.0f} % of the best method"
        text += f"To {facts.scale.text(target)} ({which}): up and down, until the first judged round that reaches it, "
        text += "median over seeds; &ldquo;&gt;&rdquo;: most runs ended before. Bold: least."
    return text


def chart(facts: Facts, drawn: Sequence[tuple[Entry, Sequence[Point]]]) -> str:
    """The chart as SVG; it needs no script."""
    frame = _frame(facts, drawn)
    parts = [*_grid(facts, frame)]
    for entry, points in reversed(drawn):  # the best on top
        path = "L".join(f"{frame.x(p.bytes):.1f} {frame.y(p.mean):.1f}" for p in points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour(entry)}" stroke-width="1.8"/>')
    for entry, points in reversed(drawn):
        x, y = frame.x(points[-1].bytes), frame.y(points[-1].mean)
        shape = SHAPES[entry.slot % SLOTS].format(f'fill="{colour(entry)}" stroke="var(--bg)"')
        told = f"{entry.name}: {facts.scale.text(points[-1].mean)}, {frame.unit.text(points[-1].bytes)} per client"
        parts.append(f'<g transform="translate({x - 7:.1f} {y - 7:.1f})"><title>{escape(told)}</title>{shape}</g>')
    ends = "; ".join(
        f"{e.name} {facts.scale.text(points[-1].mean)} after {frame.unit.text(points[-1].bytes)}" for e, points in drawn
    )
    return (
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" width="100%" role="img" '
        f'style="min-width:520px;max-width:{WIDTH:.0f}px;margin-bottom:12px" '
        f'aria-label="{facts.scale.noun.capitalize()} against bytes per client: {escape(ends)}.">'
        f"{''.join(parts)}</svg>"
    )


def _frame(facts: Facts, drawn: Sequence[tuple[Entry, Sequence[Point]]]) -> Frame:
    unit, factor = facts.traffic_unit, facts.scale.factor
    amounts = [math.log10(p.bytes / unit.factor) for _, points in drawn for p in points]
    scores = [p.mean * factor for _, points in drawn for p in points]
    left, right = min(amounts), max(amounts)
    pad = max(0.03 * (right - left), 0.05)
    low, high = min(scores), max(scores)
    room = max(0.05 * (high - low), 0.01 * factor)
    return Frame(unit, factor, left - pad, right + pad, low - room, high + room)


def _grid(facts: Facts, frame: Frame) -> list[str]:
    """Lines, numbers and titles of both axes."""
    bottom, parts = HEIGHT - BOTTOM, []
    for k in range(math.floor(frame.left), math.ceil(frame.right) + 1):
        for step in (1, 2, 5) if frame.right - frame.left < 2.5 else (1,):
            amount = step * 10.0**k
            if frame.left <= math.log10(amount) <= frame.right:
                x = frame.x(amount * frame.unit.factor)
                parts.append(f'<path d="M{x:.1f} {TOP:.0f}V{bottom:.0f}" class="gridl"/>')
                parts.append(f'<text x="{x:.1f}" y="{bottom + 17:.0f}" text-anchor="middle">{amount:,g}</text>')
    for value in _ticks(frame.low, frame.high):
        y = frame.y(value / frame.factor)
        parts.append(f'<path d="M{LEFT:.0f} {y:.1f}H{WIDTH - RIGHT:.0f}" class="gridl"/>')
        parts.append(f'<text x="{LEFT - 8:.0f}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    title = f"Traffic so far, {frame.unit.name} per client"
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6:.0f}" text-anchor="middle">{title}</text>')
    name = f"{facts.scale.noun.capitalize()}{f', {facts.scale.unit}' if facts.scale.unit else ''}"
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text x="12" y="{middle:.0f}" text-anchor="middle" transform="rotate(-90 12 {middle:.0f})">{name}</text>'
    )
    return parts


def _ticks(low: float, high: float) -> list[float]:
    """Round values, four to nine."""
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = max(s * power for s in (1, 2, 5) if s * power <= (high - low) / 4 * 1.0001)
    return [round(k * step, 10) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]

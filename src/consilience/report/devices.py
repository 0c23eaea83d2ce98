"""Section "Devices and time": a timeline of clients, staleness, who is heard, and energy."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from statistics import fmean
from typing import Any

from consilience.report.facts import Entry, Facts
from consilience.report.markup import Cell, Column, colour, details, named, note, section, table
from consilience.report.timeline import PARTS, Timeline, timelines
from consilience.report.words import NBSP, NONE, fixed, plural, time_unit

WIDE = 900
"""Pictures are drawn so wide, and scaled."""
INK = {"wait": "none", "download": "var(--r2)", "compute": "var(--r5)", "upload": "var(--r3)"}
KEY = (
    ("download", 'fill="var(--r2)"'),
    ("computing", 'fill="var(--r5)"'),
    ("upload", 'fill="var(--r3)"'),
    ("idle", 'fill="var(--bg)" stroke="var(--rule)"'),
    ("offline", 'fill="url(#off)"'),
    ("cancelled or unfinished", 'fill="none" stroke="var(--ink2)"'),
)


def devices_section(facts: Facts, number: int) -> str:
    """Section "Devices and time"; empty if no run has a timeline."""
    found = timelines(facts)
    if not found:
        return ""
    pictures = [_pictures(entry, line) for entry, line in found]
    more = "".join(
        details(f"The same for {entry.name}", picture)
        for (entry, _), picture in zip(found[1:], pictures[1:], strict=True)
    )
    inner = f'{_table(found)}<div class="gap">{pictures[0]}</div>{more}'
    seeds = f" Pictures and table are of seed {found[0][1].run.seed}." if len(facts.seeds) > 1 else ""
    graphs = dict.fromkeys(text for entry, line in found if (text := _graph(entry, line)))
    inner += "".join(note(text) for text in graphs)
    inner += note(f"Virtual time is simulated on the clients&rsquo; devices and links.{seeds}")
    return section("devices", number, "Devices and time", _finding(found[0]), inner)


def _graph(entry: Entry, line: Timeline) -> str:
    """A method's topology in numbers, if it has one."""
    about = line.run.fleet.get("topology")
    if not about:
        return ""
    least, most = about["least_degree"], about["most_degree"]
    degree = f"{least}" if least == most else f"{least} to {most}"
    parts = f", in {about['parts']} parts that cannot reach each other" if about["parts"] > 1 else ""
    rounds = about.get("rounds")
    edges = f"{about['edges']} edges" + (f" in {rounds} rounds" if rounds else "")
    return (
        f"{named(entry)}: topology {escape(str(about['topology']))}, {edges}, {degree} neighbours each"
        f"{' in one' if rounds else ''}, spectral gap {about['spectral_gap']:.3g}{parts}."
    )


def _finding(best: tuple[Entry, Timeline]) -> str:
    entry, line = best
    never, clients = line.never, len(line.trained)
    if not never:
        heard = line.heard()
        low, high = min(heard.values()), max(heard.values())
        return f"{named(entry)} heard every client, {low if low == high else f'{low} to {high}'} times."
    lost = line.unheard_class()
    text = f"{named(entry)} never heard {len(never)} of {plural(clients, 'client')}"
    if lost is not None:
        text += f"; they hold {fixed(100 * lost[1], 0)}{NBSP}% of class {escape(lost[0])}"
    return text + "."


def _table(found: list[tuple[Entry, Timeline]]) -> str:
    unit = time_unit([line.ends for _, line in found])
    columns = [
        Column("Method"), Column("Virtual time", unit.name, True), Column("Combined", "jobs"),
        Column("Lost", "jobs", True), Column("Cancelled", "jobs", True), Column("Staleness", "mean", True),
        Column("Most", "staleness", True), Column("Never heard", "clients", True), Column("Energy", "kJ", True),
    ]  # fmt: skip
    rows = []
    for entry, line in found:
        states, stale, joules = line.states(), line.staleness(), line.joules()
        total = sum(stale.values())
        mean = sum(k * n for k, n in stale.items()) / total if total else 0.0
        numbers: list[tuple[str, float]] = [
            (unit.number(line.ends), line.ends),
            *((f"{states[state]:,}", states[state]) for state in ("combined", "lost", "cancelled")),
            (fixed(mean, 2), mean), (str(max(stale, default=0)), max(stale, default=0)),
            (str(len(line.never)), len(line.never)),
        ]  # fmt: skip
        cells = [Cell(text, value) for text, value in numbers]
        cells.append(Cell(NONE, "") if joules is None else Cell(fixed(joules / 1000, 2), joules))
        rows.append((named(entry), cells))
    return table("What became of the jobs of every method.", "Jobs of every method", columns, rows)


def _pictures(entry: Entry, line: Timeline) -> str:
    clients, until = line.shown()
    unit = time_unit([line.ends])
    whole = "" if until >= line.ends else f" until {unit.text(until)}, of {unit.text(line.ends)}"
    sample = "" if len(clients) == len(line.trained) else f", {len(clients)} of {len(line.trained)} clients"
    gantt = (
        f"<figure><figcaption><b>Timeline of {named(entry)}</b>One row per client, slowest first{sample}{whole}. "
        f"A cross: dropped out.</figcaption>{_key()}"
        '<div class="scroll" role="region" aria-label="Timeline" tabindex="0"><div class="wide-only">'
        f"{_gantt(line, clients, until)}</div></div></figure>"
    )
    pair = (
        f"<figure><figcaption><b>Staleness</b>Server updates between a client&rsquo;s download and its reply&rsquo;s "
        f"use.</figcaption>{_histogram(entry, line)}</figure>"
    )
    if line.sizes:
        pair += (
            "<figure><figcaption><b>Who is heard</b>A client&rsquo;s share of combined replies against its share of "
            f"the training data. On the line both are equal.</figcaption>{_heard(entry, line)}</figure>"
        )
    return gantt + f'<div class="cols2 gap">{pair}</div>'


def _svg(width: float, height: float, inner: str, label: str) -> str:
    box = f'viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg {box} width="100%" role="img" aria-label="{escape(label)}">{inner}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _key() -> str:
    marks = "".join(
        f'<span><svg class="sw" width="14" height="14" aria-hidden="true"><rect x="1" y="2" width="12" height="10" '
        f"{look}/></svg>{name}</span> "
        for name, look in KEY
    )
    return f'<div class="legend">{marks}</div>'


def _ticks(top: float, count: int = 6) -> list[float]:
    """Round numbers from 0 to ``top``."""
    if top <= 0:
        return [0.0]
    power = 10.0 ** math.floor(math.log10(top / count))
    step = next(power * k for k in (1, 2, 5, 10) if top / (power * k) <= count)
    return [i * step for i in range(int(top / step + 1e-9) + 1)]


def _gantt(line: Timeline, clients: list[int], until: float) -> str:
    row = 15 if len(clients) <= 20 else 11
    left, top = 34, 6
    bottom = top + row * len(clients)
    unit = time_unit([until])

    def x(time: float) -> float:
        return left + (WIDE - left - 4) * min(time, until) / until

    hatch = (
        '<defs><pattern id="off" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="5" height="5" fill="var(--bg2)"/><rect width="1.5" height="5" fill="var(--axis)"/></pattern>'
        "</defs>"
    )
    parts = [hatch]
    for tick in _ticks(until / unit.factor, 8):
        at = x(tick * unit.factor)
        parts.append(
            f'<path class="gridl" d="M{at:.1f} {top}V{bottom}"/>' + _text(at, bottom + 16, f"{tick:g}", "middle")
        )
    parts.append(_text(WIDE / 2, bottom + 32, f"Virtual time, {unit.name}", "middle"))
    place = {client: top + row * i for i, client in enumerate(clients)}
    for client, y in place.items():
        parts.append(f'<path class="gridl" d="M{left} {y + row - 0.5:.1f}H{WIDE - 4}"/>')
        parts.append(_text(left - 6, y + row - 3.5, str(client), "end"))
        for begin, end in line.offline(client):
            if begin < until and end > begin:
                width = max(0.5, x(end) - x(begin))
                parts.append(
                    f'<rect x="{x(begin):.1f}" y="{y + 1}" width="{width:.1f}" height="{row - 3}" fill="url(#off)"/>'
                )
    for job in line.jobs:
        if job["client"] in place and job["start"] < until:
            parts.append(_bar(job, place[job["client"]] + 1.5, row - 4, x))
    return _svg(WIDE, bottom + 38, "".join(parts), f"Timeline of {len(clients)} clients over {unit.text(until)}")


def _bar(job: dict[str, Any], y: float, height: float, x: Callable[[float], float]) -> str:
    """A job: its parts one after another, cut where it ended."""
    now, end, state = job["start"], job["end"], job["state"]
    title = f"<title>client {job['client']}, {state}: {now:.4g} to {end:.4g} s, {job['steps']} steps</title>"
    if state in ("cancelled", "unfinished"):
        width = max(0.5, x(end) - x(now))
        return (
            f'<rect x="{x(now):.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" fill="none" '
            f'stroke="var(--ink2)">{title}</rect>'
        )
    pieces = []
    for part in PARTS:
        then = min(end, now + job[part])
        if then > now and INK[part] != "none":
            width = max(0.4, x(then) - x(now))
            pieces.append(
                f'<rect x="{x(now):.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" fill="{INK[part]}"/>'
            )
        now = then
    if state == "lost":
        cx, cy = x(end), y + height / 2
        pieces.append(
            f'<path d="M{cx - 4:.1f} {cy - 4:.1f}l8 8m0 -8l-8 8" stroke="var(--ink)" stroke-width="2" fill="none"/>'
        )
    return f"<g>{title}{''.join(pieces)}</g>"


def _histogram(entry: Entry, line: Timeline) -> str:
    found = line.staleness()
    most = max(found, default=0)
    each = most // 20 + 1
    bins = [sum(found[k] for k in range(b, b + each)) for b in range(0, most + 1, each)]
    total, wide, high, left, top = max(1, sum(bins)), 430, 190, 38, 8
    tall = max(bins, default=1) / total
    step = (wide - left) / max(len(bins), 4)
    parts = []
    for tick in _ticks(100 * tall, 4):
        y = top + high * (1 - tick / 100 / tall)
        parts.append(f'<path class="gridl" d="M{left} {y:.1f}H{wide}"/>' + _text(left - 6, y + 4, f"{tick:g} %", "end"))
    for i, count in enumerate(bins):
        h = high * count / total / tall
        label = str(i * each) if each == 1 else f"{i * each}-{(i + 1) * each - 1}"
        parts.append(
            f'<rect x="{left + i * step + 1:.1f}" y="{top + high - h:.1f}" width="{max(1, step - 2):.1f}" '
            f'height="{h:.1f}" fill="{colour(entry)}"><title>staleness {label}: {count} replies</title></rect>'
        )
        if i % (len(bins) // 10 + 1) == 0:
            parts.append(_text(left + (i + 0.5) * step, top + high + 16, label, "middle"))
    parts.append(_text((left + wide) / 2, top + high + 34, "Staleness, server updates", "middle"))
    return _svg(wide, top + high + 40, "".join(parts), f"Histogram of staleness from 0 to {most}")


def _heard(entry: Entry, line: Timeline) -> str:
    heard, sizes, clients = line.heard(), line.sizes, line.trained
    rows, replies = max(1, sum(sizes[c] for c in clients)), max(1, sum(heard.values()))
    dots = [(100 * sizes[c] / rows, 100 * heard[c] / replies, c) for c in clients]
    wide, high, left, top = 430, 190, 38, 8
    right, tall = max(d[0] for d in dots) * 1.05, max(max(d[1] for d in dots), fmean(d[0] for d in dots)) * 1.08

    def px(v: float) -> float:
        return left + (wide - left) * v / right

    def py(v: float) -> float:
        return top + high * (1 - v / tall)

    end = min(right, tall)
    parts = [
        f'<path d="M{px(0):.1f} {py(0):.1f}L{px(end):.1f} {py(end):.1f}" stroke="var(--axis)" stroke-dasharray="4 3"/>'
    ]
    for tick in _ticks(tall, 4):
        parts.append(
            f'<path class="gridl" d="M{left} {py(tick):.1f}H{wide}"/>'
            + _text(left - 6, py(tick) + 4, f"{tick:g} %", "end")
        )
    for tick in _ticks(right, 5):
        parts.append(_text(px(tick), top + high + 16, f"{tick:g} %", "middle"))
    for a, b, client in dots:
        look = (
            f'fill="{colour(entry)}" fill-opacity=".75"'
            if b
            else 'fill="var(--bg)" stroke="var(--ink)" stroke-width="1.4"'
        )
        parts.append(
            f'<circle cx="{px(a):.1f}" cy="{py(b):.1f}" r="3.4" {look}><title>client {client}: {a:.2g} % of the data, '
            f"{heard[client]} replies</title></circle>"
        )
    parts.append(_text((left + wide) / 2, top + high + 34, "Share of the training data (open: never heard)", "middle"))
    return _svg(wide, top + high + 40, "".join(parts), "Share of replies against share of data, one dot per client")

"""Who pays and who gains where clients have different models: scores and costs of each architecture."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from statistics import fmean
from typing import NamedTuple

from consilience.measure.statistics import last_clients
from consilience.report.facts import Entry, Facts
from consilience.report.markup import Cell, Column, named, note, section, table
from consilience.report.words import NONE, Unit, byte_unit, flop_unit, listed


class Group(NamedTuple):
    """The clients of one architecture under one method, over all seeds; gain: None without Local."""

    clients: float
    score: float
    gain: float | None
    winners: float | None
    traffic: float
    flops: float


def architectures(facts: Facts) -> list[str]:
    """Names of the clients' architectures, where they are recorded."""
    lines = [line for run in facts.runs[:1] for line in last_clients(run).values()]
    return sorted({str(line["model"]) for line in lines if "model" in line})


def group(facts: Facts, entry: Entry, model: str) -> Group | None:
    """What the clients of an architecture got and paid; None if none was judged."""
    key = "loss" if facts.lower else "accuracy"
    gains = {(dot.seed, dot.client): dot.value for dot in entry.gains}
    lines = [
        (run.seed, client, line)
        for run in entry.runs
        for client, line in last_clients(run).items()
        if line.get("model") == model and line.get(key) is not None
    ]
    if not lines:
        return None
    known = [gains[seed, client] for seed, client, _ in lines if (seed, client) in gains]
    return Group(
        len(lines) / len(entry.runs),
        fmean(float(line[key]) for *_, line in lines),
        fmean(known) if known else None,
        sum(gain > 0 for gain in known) / len(entry.runs) if known else None,
        fmean(line.get("bytes_up", 0) + line.get("bytes_down", 0) for *_, line in lines),
        fmean(line.get("flops", 0.0) for *_, line in lines),
    )


def architectures_section(facts: Facts, number: int) -> str:
    """Section "Architectures": a table for each of them."""
    names = architectures(facts)
    found = {(e.label, m): g for e in facts.entries for m in names if (g := group(facts, e, m)) is not None}
    traffic = byte_unit(g.traffic for g in found.values())
    work = flop_unit(g.flops for g in found.values())
    inner = "".join(_table(facts, model, found, traffic, work) for model in names)
    inner += note(
        "After the last round, each client counting once; mean over clients and seeds. Bytes are up and down, as "
        "encoded; FLOP are forward and backward passes of every network that was trained, and forward passes of those "
        "that were only asked. Both are of an average client of the architecture over the whole run."
        + (" Gains are over training alone, on the same partition." if facts.local is not None else "")
    )
    return section("architectures", number, "Architectures", _finding(facts, names, found), inner)


def _table(facts: Facts, model: str, found: dict[tuple[str, str], Group], traffic: Unit, work: Unit) -> str:
    scale, local = facts.scale, facts.local is not None
    columns = [Column("Method"), Column("Mean", scale.unit)]
    columns += [Column("Gain", scale.points), Column("Gain", "clients")] if local else []
    columns += [Column("Traffic", f"{traffic.name} a client", True), Column("Work", f"{work.name} a client", True)]
    rows = []
    for entry in facts.entries:
        g = found.get((entry.label, model))
        if g is None:
            continue
        cells = [Cell(scale.number(g.score), g.score)]
        if local:
            lost = g.gain is not None and g.gain < 0
            cells.append(
                Cell(NONE, "") if g.gain is None else Cell(scale.signed(g.gain), g.gain, "neg" if lost else "")
            )
            told = NONE if g.winners is None else f"{g.winners:.3g} of {g.clients:.3g}"
            cells.append(Cell(told, "" if g.winners is None else g.winners))
        cells.append(Cell(traffic.number(g.traffic) if g.traffic else NONE, g.traffic))
        cells.append(Cell(work.number(g.flops), g.flops))
        rows.append((named(entry), cells))
    title = f"Scores and costs of the clients with {model}"
    return f"<h3 class=part>{escape(model)}</h3>" + table(f"{title}.", title, columns, rows)


def _finding(facts: Facts, names: Sequence[str], found: dict[tuple[str, str], Group]) -> str:
    """Which method each architecture does best with."""
    best: dict[str, list[str]] = {}
    for model in names:
        of = [(g.score, e) for e in facts.ranked if (g := found.get((e.label, model))) is not None]
        if of:
            chosen = (min if facts.lower else max)(of, key=lambda pair: pair[0])[1]
            best.setdefault(chosen.name, []).append(model)
    if not best:
        return "No client of these architectures was judged."
    told = [f"<b>{escape(name)}</b> for {escape(listed(models))}" for name, models in best.items()]
    one = len(best) == 1 and len(next(iter(best.values()))) == len(names)
    return f"Best for every architecture: {told[0].split(' for ')[0]}." if one else f"Best on average: {listed(told)}."

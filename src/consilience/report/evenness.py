"""How evenly a method's quality is spread over clients, as a table."""

from __future__ import annotations

from statistics import fmean

from consilience.report.facts import Entry, Facts
from consilience.report.markup import Cell, Column, named, note, table
from consilience.report.words import NONE, fixed


def evenness_table(facts: Facts) -> str:
    """Worst tenth, spread, Jain, entropy and, with Local, gains; nothing where clients were not judged."""
    entries = [e for e in facts.entries if e.last("clients", "mean") is not None]
    if not entries:
        return ""
    scale, gains = facts.scale, any(e.gains for e in entries)
    columns = [Column("Method"), Column("Mean", scale.unit), Column("Worst 10 %", scale.unit, facts.lower)]
    columns += [Column("SD", scale.points, True), Column("Variance", f"{scale.points}²" if scale.points else "", True)]
    columns += [Column("Jain", "1: all equal"), Column("Entropy", "1: all equal")]
    if gains:
        columns += [Column("Mean gain", scale.points), Column("Worst gain", scale.points), Column("Lose", "", True)]
    rows = [(named(e), _cells(facts, e, gains)) for e in entries]
    head = "<h3 class=part>Evenness between clients</h3>"
    shown = head + table("How even each method is between clients.", "Evenness between clients", columns, rows)
    text = "After the last round, each client counting once; mean over seeds."
    return shown + note(text + (" Gains are over training alone, on the same partition." if gains else ""))


def _cells(facts: Facts, entry: Entry, gains: bool) -> list[Cell]:
    scale = facts.scale
    mean, worst = entry.last("clients", "mean"), entry.last("clients", "worst10")
    std = [s for run in entry.runs if (s := _std(run.history)) is not None]
    cells = [Cell(scale.number(mean), mean), Cell(scale.number(worst), worst)]
    spread, variance = (fmean(std), fmean(s * s for s in std)) if std else (None, None)
    cells.append(Cell(scale.number(spread), spread))
    cells.append(Cell(NONE if variance is None else fixed(variance * scale.factor**2, scale.digits), variance))
    for key in ("jain", "entropy"):
        value = entry.last("clients", key)
        cells.append(Cell(NONE if value is None else fixed(value, 3), value))
    if gains:
        values = [dot.value for dot in entry.gains]
        cells.append(Cell(scale.signed(fmean(values)), fmean(values)) if values else Cell(NONE, ""))
        cells.append(Cell(scale.signed(min(values)), min(values)) if values else Cell(NONE, ""))
        told = f"{len(entry.losers)} of {len(values)}"
        cells.append(Cell(told, len(entry.losers)) if values else Cell(NONE, ""))
    return cells


def _std(history: list[dict[str, object]]) -> float | None:
    for line in reversed(history):
        clients = line.get("clients")
        if isinstance(clients, dict) and clients.get("std") is not None:
            return float(clients["std"])
    return None

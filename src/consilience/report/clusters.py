"""Personal models and clusters: who shares a model, whether those are the true groups, and what newcomers get."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any

from consilience.measure.statistics import last_of
from consilience.report.facts import Entry, Facts
from consilience.report.load import RunFolder
from consilience.report.markup import Cell, Column, details, named, note, section, table
from consilience.report.words import NONE, fixed, listed, plural

SHOWN = 20
"""So many clusters of a method have a line of their own."""


def clustered(run: RunFolder) -> bool:
    """Whether the run's method found clusters."""
    return last_of(run, "clusters", "count") is not None


def personal(facts: Facts) -> bool:
    """Whether clients have models of their own to speak of: clusters, newcomers, or no global model."""
    return any(
        clustered(run) or last_of(run, "unseen", "mean") is not None or (not entry.reference and not _global(run))
        for entry in facts.entries
        for run in entry.runs
    )


def _global(run: RunFolder) -> bool:
    return any("global" in line for line in run.history)


def clusters_section(facts: Facts, number: int) -> str:
    """Section "Personal models and clusters"."""
    parts = "".join(_of_method(facts, e) for e in facts.entries if any(clustered(run) for run in e.runs))
    inner = _overview(facts) + parts
    inner += note(
        "After the last round, each client counting once; mean over seeds. Seen clients train; unseen ones never do, "
        "and join in the method&rsquo;s own way. Trained once more: seen clients after one more local training. "
        "Adjusted Rand: 1 where clusters are the groups that the partition made, about 0 where they are unrelated."
    )
    return section("clusters", number, "Personal models and clusters", _finding(facts), inner)


def _overview(facts: Facts) -> str:
    scale = facts.scale
    keys: list[tuple[Column, tuple[str, ...]]] = [
        (Column("Seen clients", scale.unit, facts.lower), ("clients", "mean")),
        (Column("Trained once more", scale.unit, facts.lower), ("clients", "after", "mean")),
        (Column("Unseen clients", scale.unit, facts.lower), ("unseen", "mean")),
    ]
    index: list[tuple[Column, tuple[str, ...], int]] = [
        (Column("Clusters"), ("clusters", "count"), 1),
        (Column("Adjusted Rand", "seen"), ("clusters", "rand"), 3),
        (Column("Adjusted Rand", "unseen"), ("clusters", "rand_unseen"), 3),
    ]
    scores = [pair for pair in keys if any(e.last(*pair[1]) is not None for e in facts.entries)]
    found = [triple for triple in index if any(e.last(*triple[1]) is not None for e in facts.entries)]
    columns = [Column("Method"), *(column for column, _ in scores), *(column for column, *_ in found)]
    rows = []
    for entry in facts.entries:
        cells = [_score(facts, entry.last(*key)) for _, key in scores]
        for _, key, digits in found:
            value = entry.last(*key)
            cells.append(Cell(NONE, "") if value is None else Cell(fixed(value, digits), value))
        rows.append((named(entry), cells))
    return table("Seen and unseen clients, and clusters, of every method.", "Personal models", columns, rows)


def _score(facts: Facts, value: float | None) -> Cell:
    return Cell(facts.scale.number(value), "" if value is None else value)


def _of_method(facts: Facts, entry: Entry) -> str:
    """A method's clusters in its first seed: how they do, and which true groups their clients are of."""
    run = entry.runs[0]
    lines = {int(line["client"]): line for line in run.clients if line.get("cluster") is not None and line["n"]}
    of = clusters_of(run)
    if not lines or not of:
        return ""
    groups = run.federation.get("groups")
    true = sorted(set(groups)) if groups else []
    members: dict[str, Counter[int]] = {str(k): Counter() for k in of}
    for client, line in lines.items():
        if groups:
            members[str(line["cluster"])][groups[client]] += 1
    gains = {dot.client: dot.value for dot in entry.gains if dot.seed == run.seed}
    columns = [
        Column("Cluster", up=True),
        Column("Clients", "seen and unseen"),
        Column("Mean", facts.scale.unit, facts.lower),
    ]
    columns += [Column("Worst 10 %", facts.scale.unit, facts.lower)]
    columns += [Column("Gain", facts.scale.points)] if gains else []
    columns += [Column(f"Group {g}", "clients") for g in true]
    rows = []
    for k, summary in list(of.items())[:SHOWN]:
        own = [gains[c] for c, line in lines.items() if str(line["cluster"]) == k and c in gains]
        cells = [Cell(str(summary["clients"]), summary["clients"])]
        cells += [_score(facts, summary.get("mean")), _score(facts, summary.get("worst10"))]
        if gains:
            cells.append(_gain(facts, own))
        cells += [Cell(str(members[k][g]) if members[k][g] else NONE, members[k][g]) for g in true]
        rows.append((k, cells))
    seed = f", seed {run.seed}" if len(facts.seeds) > 1 else ""
    more = f", the first {SHOWN} of {len(of)}" if len(of) > SHOWN else ""
    title = f"Clusters of {entry.name}{seed}{more}"
    if len(true) > 1:
        title += ", against the true groups"
    return details(title, table(f"{title}.", title, columns, rows))


def _gain(facts: Facts, own: Sequence[float]) -> Cell:
    if not own:
        return Cell(NONE, "")
    mean = fmean(own)
    return Cell(facts.scale.signed(mean), mean, "neg" if mean < 0 else "")


def clusters_of(run: RunFolder) -> Mapping[str, Any]:
    """The last line's summary of each cluster, by its number."""
    for line in reversed(run.history):
        if "clusters" in line:
            found: Mapping[str, Any] = line["clusters"]["of"]
            return found
    return {}


def _finding(facts: Facts) -> str:
    known = [(value, e) for e in facts.entries if (value := e.last("clusters", "rand")) is not None]
    if known:
        value, entry = max(known, key=lambda pair: pair[0])
        exact = value > 1 - 1e-9
        how = "exactly" if exact else f"best, with an adjusted Rand index of {fixed(value, 2)}"
        first = f"<b>{escape(entry.name)}</b> recovers the true groups {how}."
    else:
        counts = [(e.last("clusters", "count"), e) for e in facts.entries]
        told = [f"{escape(e.name)} {plural(round(n), 'cluster')}" for n, e in counts if n is not None]
        first = f"Found: {listed(told)}." if told else ""
    new = [(value, e) for e in facts.entries if (value := e.last("unseen", "mean")) is not None]
    if not new:
        return first or "Clients have models of their own."
    pick = min if facts.lower else max
    value, entry = pick(new, key=lambda pair: pair[0])
    return f"{first} Newcomers do best with <b>{escape(entry.name)}</b>, {facts.scale.text(value)}.".strip()

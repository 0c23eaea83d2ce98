"""Fairness between groups of people: differences, where they come from, and the accuracy that fairness would allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from consilience.measure.board import group_means, group_tables
from consilience.measure.fairness import accuracy, gaps, global_disparity, local_disparity, per_group, stacked
from consilience.measure.fairness_bound import Frontier, points
from consilience.report.facts import Entry, Facts
from consilience.report.load import RunFolder
from consilience.report.markup import Cell, Column, details, empty, named, note, radios, section, table
from consilience.report.words import NONE, fixed, plural

CELLS = 1500
"""Clients x groups x classes up to which the bound is computed; 9 points of it up to a sixth of that, else 5."""
ROWS = 200
FINE = 2e-4
"""Accuracy to which the curves are computed: less than a line's width."""


def attributes(facts: Facts) -> list[str]:
    """Sensitive attributes that some run has counts of."""
    return list(dict.fromkeys(name for run in facts.runs for name in group_tables(run)))


def groups_section(facts: Facts, number: int) -> str:
    """Section "Fairness between groups"."""
    title, names = "Fairness between groups", attributes(facts)
    if not names:
        inner = empty(
            "No sensitive attribute: add --sensitive COLUMN, a column with up to 20 different values, to see whether "
            "groups of people are treated alike."
            if not facts.lower
            else "Group fairness is measured on classes; this task predicts numbers."
        )
        return section("groups", number, title, "Nothing is known about groups of people in this data.", inner)
    means = {e.label: group_means(e.runs) for e in facts.entries}
    inner = _plane(facts, names) + "".join(_attribute(facts, name, means) for name in names)
    inner += note(
        "Counts are of the models that clients would deploy, on their own test rows. Parity: the largest difference "
        "between two groups in how often a class is predicted. Opportunity: in how often it is found where it is right "
        "(class 1 of two). Odds: in any rate of predictions given the true class. Worst: the client where it is "
        "largest; with few rows that is mostly chance. Thousandths of a bit (mbit): what a prediction tells about the "
        "group, over everybody "
        "(global) and within clients (local); global = unique + redundant, local = unique + masked (Hamman and Dutta, "
        "ICLR 2024). Chance: about what predictions that tell nothing would read with so few rows."
    )
    return section("groups", number, title, _finding(facts, names[0], means), inner)


def _plane(facts: Facts, names: Sequence[str]) -> str:
    switch = radios("attr", "Groups by", [(name, name) for name in names])
    seed = f" Seed {facts.seeds[0]}: every seed has its own partition." if len(facts.seeds) > 1 else ""
    best = escape(facts.best.name)
    caption = (
        "<b>Accuracy against what predictions tell about the group</b>Solid: no method can be above it, even one that "
        f"knew site, group and label (AGLFOP). Dashed: any relabelling of {best}&rsquo;s predictions by site and "
        f"group.{seed}"
    )
    return (
        f"{f'<div class=bar>{switch}</div>' if switch else ''}<figure><figcaption>{caption}</figcaption>"
        '<div class="plot" id="plane"></div></figure>'
    )


def _attribute(facts: Facts, name: str, means: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> str:
    pairs = [("Parity", "demographic_parity"), ("Opportunity", "equal_opportunity"), ("Odds", "equalised_odds")]
    columns = [Column("Method")]
    for title, _ in pairs:
        columns += [Column(title, "points", True), Column("worst", "client", True)]
    bits = [("Global", "global_bits"), ("Local", "local_bits"), ("Unique", "unique"), ("Redundant", "redundant")]
    bits += [("Masked", "masked"), ("Chance", "chance_local")]
    columns += [Column(title, "mbit" if title != "Chance" else "mbit, local", True) for title, _ in bits]
    rows = []
    for entry in facts.entries:
        found = means[entry.label].get(name)
        if found is None:
            continue
        cells = []
        for _, key in pairs:
            cells += [_cell(found[key], 100), _cell(found[f"worst_{key}"], 100)]
        rows.append((named(entry), cells + [_cell(found[key], 1000) for _, key in bits]))
    words = facts.federation.get("sensitive", {}).get(name, [])
    caption = f"Differences between groups by {name}, mean over {plural(len(facts.seeds), 'seed')}."
    head = f"<h3 class=part>By {escape(name)}{': ' + escape(', '.join(map(str, words))) if words else ''}</h3>"
    return (
        head
        + table(caption, f"Differences by {name}", columns, rows)
        + details(
            f"{facts.best.name}: every group and client, by {name}", _of_best(facts, name, [str(w) for w in words])
        )
    )


def _cell(value: float | None, factor: float) -> Cell:
    return Cell(NONE, "") if value is None else Cell(fixed(value * factor, 1), value)


def _of_best(facts: Facts, name: str, words: Sequence[str]) -> str:
    """The best method's groups, and its differences at every client, in the first seed."""
    run = _first(facts, facts.best)
    tables = group_tables(run).get(name, {})
    if not tables:
        return empty("Clients were not judged.")
    counts, classes = stacked(list(tables.values())), [str(c) for c in facts.federation.get("classes") or ()]
    columns = [Column("Group"), Column("Rows"), Column("Accuracy", "%")]
    shown = range(1, 2) if len(classes) == 2 else range(min(len(classes), 10))
    columns += [Column(f"says {classes[c]}", "% of rows") for c in shown]
    columns += [Column(f"finds {classes[c]}", "% of those") for c in shown]
    rows = []
    for of in per_group(counts.sum(axis=0), words):
        cells = [Cell(f"{of['rows']:,}", of["rows"]), _share(of["accuracy"])]
        cells += [_share(of["predicted"][c]) for c in shown] + [_share(of["recognised"][c]) for c in shown]
        rows.append((escape(of["group"]), cells))
    first = table(f"Groups by {name}.", f"Groups by {name}", columns, rows)
    heads = ("Parity", "Opportunity", "Odds")
    columns = [Column("Client", up=True), Column("Test rows"), *(Column(head, "points", True) for head in heads)]
    rows = []
    for client, own in list(zip(tables, counts, strict=True))[:ROWS]:
        found = gaps(own)
        cells = [Cell(f"{int(own.sum()):,}", own.sum()), *(_share(v) for v in found.values())]
        rows.append((str(client), cells))
    return first + table(f"Differences by {name} at every client.", f"Clients by {name}", columns, rows)


def _share(value: float) -> Cell:
    return Cell(NONE, "") if value != value else Cell(fixed(100 * value, 1), value)


def _first(facts: Facts, entry: Entry) -> RunFolder:
    """The entry's run on the first seed, or its first."""
    return next((run for run in entry.runs if run.seed == facts.seeds[0]), entry.runs[0])


def _finding(facts: Facts, name: str, means: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> str:
    found = means[facts.best.label].get(name)
    if found is None or found["demographic_parity"] is None:
        return f"Only one group by {escape(name)} has test rows."
    parts = {k: found[k] or 0.0 for k in ("unique", "redundant", "masked")}
    most = max(parts, key=lambda k: parts[k])
    where = {
        "unique": "mostly in the predictions themselves (unique), whichever the client",
        "redundant": "mostly through which client people are at (redundant)",
        "masked": "mostly within clients, where it cancels over all of them (masked)",
    }[most]
    few = (found["local_bits"] or 0) + (found["global_bits"] or 0) < 2 * (
        (found["chance_local"] or 0) + (found["chance_global"] or 0)
    )
    told = "little more than chance with so few rows" if few else where
    opportunity = found["equal_opportunity"]
    rightly = f" and {fixed(100 * opportunity)} points in how often it is found" if opportunity is not None else ""
    parity = fixed(100 * found["demographic_parity"])
    return (
        f"With {escape(facts.best.name)}, groups by {escape(name)} differ by {parity} points in how often a class is "
        f"predicted{rightly}: {told}."
    )


def plane_blob(facts: Facts) -> dict[str, Any]:
    """By attribute, for the first seed: curves of the bound and where the methods lie, in bits and percent."""
    found = {}
    for name in attributes(facts):
        dots, laws = {}, {}
        for entry in facts.entries:
            run = _first(facts, entry)
            tables = group_tables(run).get(name)
            if run.seed == facts.seeds[0] and tables:
                counts = stacked(list(tables.values()))
                laws[entry.label] = counts
                dots[entry.label] = [
                    _digits(1000 * global_disparity(counts)),
                    _digits(1000 * local_disparity(counts)),
                    _digits(100 * accuracy(counts)),
                ]
        found[name] = {"dots": dots, "curves": _curves(facts, laws)}
    return found


def _curves(facts: Facts, laws: Mapping[str, Any]) -> dict[str, Any]:
    lead = next((e.label for e in facts.entries if e.label in laws), None)
    if lead is None or laws[lead].shape[0] * laws[lead].shape[1] * laws[lead].shape[2] > CELLS:
        return {}
    counts = laws[lead]
    many = 9 if counts.size / counts.shape[-1] <= CELLS / 6 else 5
    bounds = {of: Frontier(counts, of, tolerance=FINE) for of in ("oracle", "model")}
    return {
        along: {
            of: [[_digits(1000 * x), _digits(100 * y)] for x, y in points(frontier.curve(along, many), along)]
            for of, frontier in bounds.items()
        }
        for along in ("global", "local")
    }


def _digits(value: float) -> float:
    return float(f"{value:.5g}")

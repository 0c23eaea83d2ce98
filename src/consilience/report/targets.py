"""What reaching a target costs, where some runs never get there."""

from __future__ import annotations

from html import escape
from statistics import median

from consilience.measure.board import costs_to_target
from consilience.measure.target import Cost, reach
from consilience.report.facts import Entry, Facts
from consilience.report.markup import Cell, Column, named, note, section, table
from consilience.report.words import NONE, Unit, byte_unit, count_unit, plural, time_unit


def target_section(facts: Facts, number: int) -> str:
    """Section "Cost to reach the target"."""
    target = float(facts.compare["target"])
    goal = facts.scale.text(target)
    costs = {e.label: costs_to_target(e.runs, facts.metric, target, lower=facts.lower) for e in facts.entries}
    units = _units(facts, costs)
    columns = [Column("Method"), Column("Reached", "of seeds")]
    columns += [Column(title, unit.name, True) for _, title, unit in units]
    rows = []
    for entry in facts.entries:
        hits = _hits(facts, entry, target)
        cells = [Cell(f"{sum(hits)} of {len(hits)}", sum(hits))]
        cells += [_cell(costs[entry.label][key], unit, _shared(facts, entry, key)) for key, _, unit in units]
        rows.append((named(entry), cells))
    caption = f"Cost to reach {goal}: median over seeds, from the cheapest seed to the dearest."
    text = (
        "Median of the Kaplan&ndash;Meier curve over seeds, with the cheapest and the dearest seed. A run that never "
        "reached the target counts as longer than it lasted, not as missing: &ldquo;&gt;&rdquo; says that the median "
        f"lies beyond what was run. A run reaches it at the first judged round that does ({_every(facts)})."
        " Bytes are per client."
    )
    inner = table(caption, "Cost to reach the target", columns, rows) + note(text)
    return section("target", number, f"Cost to reach {goal}", _finding(facts, target, goal), inner)


def _units(facts: Facts, costs: dict[str, dict[str, Cost]]) -> list[tuple[str, str, Unit]]:
    def largest(key: str) -> list[float]:
        return [of[key].beyond / _shared(facts, e, key) for e in facts.entries if (of := costs[e.label])]

    units = [("rounds", "Rounds", Unit("", 1, 0)), ("bytes", "Traffic", byte_unit(largest("bytes")))]
    units += [
        ("samples", "Samples", count_unit(largest("samples"))),
        ("wall_s", "Wall time", time_unit(largest("wall_s"))),
    ]
    if facts.virtual:
        units.append(("virtual_s", "Virtual time", time_unit(largest("virtual_s"))))
    return units


def _shared(facts: Facts, entry: Entry, key: str) -> float:
    """Bytes are shown per client."""
    return float(entry.clients) if key == "bytes" else 1.0


def _cell(cost: Cost, unit: Unit, shared: float) -> Cell:
    if cost.median is None:
        return Cell(f"&gt; {unit.number(cost.beyond / shared)}", "")
    if not cost.beyond:
        return Cell(NONE, "")
    most = unit.number(cost.most / shared) if cost.most is not None else "never"
    least = unit.number((cost.least or 0.0) / shared)
    spread = f' <span class="ci">{least} to {most}</span>' if least != most else ""
    return Cell(unit.number(cost.median / shared) + spread, cost.median / shared)


def _hits(facts: Facts, entry: Entry, target: float) -> list[bool]:
    keys = ("global", facts.scale.noun) if facts.metric == "global" else ("clients", "mean")
    found = [reach(run, keys, target, lower=facts.lower) for run in entry.runs]
    return [r.reached for r in found if r is not None]


def _every(facts: Facts) -> str:
    key = "eval_every" if facts.metric == "global" else "eval_clients_every"
    every = facts.runs[0].config.get(key)
    return f"one in every {every}" if isinstance(every, int) and every > 1 else "every round is judged"


def _finding(facts: Facts, target: float, goal: str) -> str:
    known = []
    for entry in facts.ranked:
        cost = costs_to_target(entry.runs, facts.metric, target, lower=facts.lower).get("rounds")
        if cost is not None and cost.median is not None:
            known.append((cost.median, entry))
    if not known:
        return f"Less than half of any method&rsquo;s runs reached {goal} in {plural(facts.rounds, 'round')}."
    when, first = min(known, key=lambda pair: pair[0])
    told = f"{escape(first.name)} reaches {goal} first, after {plural(round(when), 'round')} (median over seeds)"
    rest = [w for w, e in known if e is not first]
    never = len(facts.ranked) - len(known)
    if rest:
        told += (
            f"; the others that do take {median(rest):,.0f}"
            if len(rest) == 1
            else f"; the others take {min(rest):,.0f} to {max(rest):,.0f}"
        )
    return told + (f"; {plural(never, 'method')} did not in most runs." if never else ".")

"""How sure the ranking is: differences from the reference, and tests of all pairs."""

from __future__ import annotations

import math
from html import escape

from consilience.measure.contrasts import Difference, differences, smallest_p
from consilience.report.answer import p_value
from consilience.report.facts import Facts
from consilience.report.markup import Cell, Column, details, empty, named, note, section, table
from consilience.report.words import NONE, listed, plural

ALPHA = 0.05


def reference_of(facts: Facts) -> str | None:
    """The reference that was asked for, if it has scores."""
    asked = facts.compare.get("reference")
    return asked if any(e.label == asked for e in facts.entries) else None


def certainty_section(facts: Facts, number: int) -> str:
    """Section "How sure"."""
    title, reference = "How sure", reference_of(facts)
    if not facts.comparison.tested and not (reference and len(facts.seeds) > 1):
        inner = empty("With one seed nothing can be tested. Add --seeds 5 for intervals and tests.")
        return section("certainty", number, title, "One seed cannot tell a difference from chance.", inner)
    if reference is None:
        inner = _pairs(facts) + note(
            "Name a method with --reference to see every other method's difference from it, with its interval."
        )
        return section("certainty", number, title, _pairs_finding(facts), inner)
    held = differences({e.label: e.scores for e in facts.entries}, reference)
    inner = _differences(facts, held) + _notes(facts, held)
    inner += details("Tests of all pairs of ranked methods", _pairs(facts)) if len(facts.ranked) > 2 else ""
    return section("certainty", number, title, differences_finding(facts, held), inner)


def differences_finding(facts: Facts, held: dict[str, Difference]) -> str:
    """In words, which methods differ from the reference and for which none was found."""
    names = {e.label: escape(e.name) for e in facts.entries}
    base = next(iter(held.values())).reference if held else ""
    told, unclear = [], []
    for entry in facts.entries:
        d = held.get(entry.label)
        if d is None:
            continue
        if d.p_holm < ALPHA:
            ahead = facts.ahead(d.mean, 0.0) > 0
            told.append(f"{names[entry.label]} is {facts.scale.gap(d.mean)} {'better' if ahead else 'worse'}")
        else:
            unclear.append(names[entry.label])
    parts = [listed(told)] if told else []
    if unclear:
        parts.append(f"no difference was found for {listed(unclear)}")
    return f"Against {names.get(base, escape(base))}: {'; '.join(parts)}." if parts else "There is nothing to compare."


def _differences(facts: Facts, held: dict[str, Difference]) -> str:
    scale = facts.scale
    columns = [
        Column("Method"),
        Column("Difference", scale.points),
        Column("95 % interval", scale.points),
        Column("p", "paired t"),
        Column("p, Holm", "paired t", True),
        Column("p, Holm", "sign flips", True),
        Column("Least", "that sign flips can give", True),
        Column("Pairs", "seeds"),
    ]
    rows = []
    for entry in facts.entries:
        d = held.get(entry.label)
        if d is None:
            continue
        interval = NONE if d.interval is None else f"{scale.signed(d.interval[0])} to {scale.signed(d.interval[1])}"
        cells = [Cell(scale.signed(d.mean) if d.pairs else NONE, d.mean if d.pairs else ""), Cell(interval, "")]
        cells += [_p(p) for p in (d.p, d.p_holm, d.p_exact_holm)]
        cells.append(_p(d.p_smallest)._replace(css=""))  # what can be, not what was found
        rows.append((named(entry), [*cells, Cell(str(d.pairs))]))
    caption = "Differences from the reference, paired by seed."
    return table(caption, "Differences from the reference", columns, rows)


def _p(p: float) -> Cell:
    if math.isnan(p):
        return Cell(NONE, "")
    return Cell("&lt; 0.001" if p < 0.001 else f"{p:.3f}", p, "best" if p < ALPHA else "")


def _notes(facts: Facts, held: dict[str, Difference]) -> str:
    tests = [d for d in held.values() if not math.isnan(d.p)]
    if not tests:
        return note("No other method shares two seeds with the reference, so nothing was tested.")
    pairs = min(d.pairs for d in tests)
    least, one = smallest_p(pairs, len(tests)), smallest_p(pairs)
    text = (
        "A seed sets partition, first weights and sampling together, so methods are paired by seed. The t-test holds "
        "where differences are close to normal; sign flips only assume that either sign is as likely, and with "
        f"{plural(pairs, 'seed')} they cannot give less than {p_value(one)}"
        + (f", or {p_value(least)} after Holm&rsquo;s correction over {len(tests)} methods" if len(tests) > 1 else "")
        + ". "
    )
    if least >= ALPHA:
        text += "So they could not have confirmed any difference here: what is said rests on the t-test. "
    return note(text + "Bold: below 0.05.")


def _pairs(facts: Facts) -> str:
    compared, ranked = facts.comparison, facts.ranked
    if len(ranked) < 2:
        return ""
    columns = [Column("Method"), *(Column(e.name) for e in ranked)]
    rows = []
    for a in ranked:
        cells = [Cell(NONE, "") if a is b else _p(compared.p[a.label, b.label]) for b in ranked]
        rows.append((named(a), cells))
    return table("p of paired t-tests, Holm-corrected over all pairs.", "Tests of all pairs", columns, rows)


def _pairs_finding(facts: Facts) -> str:
    p = {pair: v for pair, v in facts.comparison.p.items() if not math.isnan(v)}
    count, real = len(p) // 2, sum(v < ALPHA for v in p.values()) // 2
    if not real:
        return f"No difference was found in {plural(count, 'pair')} of methods; that does not make them equal."
    return f"{real} of {plural(count, 'pair')} of methods differ after Holm&rsquo;s correction."

"""Calibration: whether the global models are as often right as their probabilities say."""

from __future__ import annotations

from html import escape

from consilience.report.facts import Calibration, Entry, Facts
from consilience.report.markup import Cell, Column, named, note, section, table
from consilience.report.words import NONE, fixed


def calibration_section(facts: Facts, number: int) -> str:
    """Section "Calibration"."""
    least = min((e.calibration.error for e in facts.settled if e.calibration), default=None)
    columns = [
        Column("Method"),
        Column("Calibration error", "points", True),
        Column("95 % CI", "points", css="wide"),
        Column("Accuracy", "%"),
        Column("Loss", "", True),
    ]
    rows = [(named(e), _cells(e, least if len(facts.ranked) > 1 else None)) for e in facts.entries]
    text = (
        "After the last round, on the global test set, mean of seeds. The error is that of the top class: the mean "
        "distance between how sure a model is and how often it is right, over 15 bins of equal width (expected "
        "calibration error, Guo et al., ICML 2017). Bold: least."
    )
    inner = table("Calibration of every method.", "Calibration", columns, rows) + note(text)
    return section("calibration", number, "Calibration", finding(facts), inner)


def _cells(entry: Entry, least: float | None) -> list[Cell]:
    accuracy, loss = entry.last("global", "accuracy"), entry.last("global", "loss")
    told = [
        Cell(NONE, "") if accuracy is None else Cell(fixed(100 * accuracy), accuracy),
        Cell(NONE, "") if loss is None else Cell(fixed(loss, 3), loss),
    ]
    found = entry.calibration
    if found is None:
        return [Cell(NONE, ""), Cell(NONE, "", "wide"), *told]
    ends = NONE if found.interval is None else "…".join(fixed(100 * end) for end in found.interval)
    return [
        Cell(_points(found), found.error, "best" if found.error == least else ""),
        Cell(ends, found.interval[0] if found.interval else "", "wide"),
        *told,
    ]


def finding(facts: Facts) -> str:
    """In a sentence, in HTML, whose probabilities are to be trusted."""
    known = sorted(((c, e.name) for e in facts.settled if (c := e.calibration)), key=lambda pair: pair[0].error)
    if not known:
        return "No ranked method has a global model that gives probabilities."
    (least, best), (most, worst) = known[0], known[-1]
    text = f"{escape(best)}&rsquo;s probabilities are {_points(least)} points off on average"
    if len(known) == 1:
        return f"{text}."
    return f"{text}, {escape(worst)}&rsquo;s {_points(most)}."


def _points(found: Calibration) -> str:
    """``3.1``, in points."""
    return fixed(100 * found.error)

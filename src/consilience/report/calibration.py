"""Calibration: whether the global models are as often right as their probabilities say."""

from __future__ import annotations

from html import escape
from math import isfinite
from statistics import fmean
from typing import NamedTuple

from consilience.measure.statistics import last_of, mean_interval
from consilience.report.facts import Entry, Facts
from consilience.report.markup import Cell, Column, named, note, section, table
from consilience.report.words import NONE, fixed


class Error(NamedTuple):
    """A method's calibration error: mean over seeds, and its interval."""

    mean: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        """``3.1``, in points."""
        return fixed(100 * self.mean)


def errors(facts: Facts) -> dict[str, Error]:
    """Of each method by label, after the last round; none of methods without a global model that gives
    probabilities."""
    found = {}
    for entry in facts.entries:
        values = [e for run in entry.runs if (e := last_of(run, "global", "ece")) is not None and isfinite(e)]
        if values:
            found[entry.label] = Error(fmean(values), mean_interval(values, share=True))
    return found


def calibration_section(facts: Facts, number: int) -> str:
    """Section "Calibration"."""
    found = errors(facts)
    least = min((found[e.label].mean for e in facts.settled if e.label in found), default=None)
    columns = [
        Column("Method"),
        Column("Calibration error", "points", True),
        Column("95 % CI", "points", css="wide"),
        Column("Accuracy", "%"),
        Column("Loss", "", True),
    ]
    rows = [(named(e), _cells(e, found.get(e.label), least if len(facts.ranked) > 1 else None)) for e in facts.entries]
    text = (
        "After the last round, on the global test set, mean of seeds. The error is that of the top class: the mean "
        "distance between how sure a model is and how often it is right, over 15 bins of equal width (expected "
        "calibration error, Guo et al., ICML 2017). Bold: least."
    )
    inner = table("Calibration of every method.", "Calibration", columns, rows) + note(text)
    return section("calibration", number, "Calibration", finding(facts), inner)


def _cells(entry: Entry, error: Error | None, least: float | None) -> list[Cell]:
    accuracy, loss = entry.last("global", "accuracy"), entry.last("global", "loss")
    told = [
        Cell(NONE, "") if accuracy is None else Cell(fixed(100 * accuracy), accuracy),
        Cell(NONE, "") if loss is None else Cell(fixed(loss, 3), loss),
    ]
    if error is None:
        return [Cell(NONE, ""), Cell(NONE, "", "wide"), *told]
    ends = NONE if error.interval is None else "…".join(fixed(100 * end) for end in error.interval)
    return [
        Cell(str(error), error.mean, "best" if error.mean == least else ""),
        Cell(ends, error.interval[0] if error.interval else "", "wide"),
        *told,
    ]


def finding(facts: Facts) -> str:
    """In a sentence, in HTML, whose probabilities are to be trusted."""
    found = errors(facts)
    known = sorted((e for e in facts.settled if e.label in found), key=lambda e: found[e.label].mean)
    if not known:
        return "No ranked method has a global model that gives probabilities."
    best, worst = known[0], known[-1]
    text = f"{escape(best.name)}&rsquo;s probabilities are {found[best.label]} points off on average"
    if best is worst:
        return f"{text}."
    return f"{text}, {escape(worst.name)}&rsquo;s {found[worst.label]}."

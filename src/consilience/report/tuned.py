"""What each method was given: its search space, its trials, and the options that won."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from consilience.core.errors import DataError
from consilience.report.facts import Facts
from consilience.report.markup import Cell, Column, details, named, note, section, table
from consilience.report.words import NONE, listed, plural


def read_tuning(folder: Path) -> dict[str, Any] | None:
    """What tuning wrote, or None where there was none."""
    path = folder / "tuning.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict) or "methods" not in found:
        raise DataError(f"{path} is no record of tuning")
    return found


def tuning_section(facts: Facts, number: int) -> str:
    """Section "Tuning"."""
    record = read_tuning(facts.folder)
    assert record is not None
    scale, budget = facts.scale, int(record["budget"])
    columns = [Column("Method"), Column("Searched", css="l"), Column("Trials")]
    columns += [
        Column("As given", f"validation {scale.unit}".strip()),
        Column("Best", "validation"),
        Column("Options that won", css="l"),
    ]
    rows = []
    for entry in facts.entries:
        own = record["methods"].get(entry.label)
        if own is None:
            continue
        trials = own["trials"]
        searched = ", ".join(f"{k} ({v})" for k, v in own["space"].items()) or NONE
        best = trials[own["best"]]
        won = ", ".join(f"{k} {v:.3g}" for k, v in best["options"].items()) or NONE
        cells = [Cell(escape(searched), "", "l"), Cell(str(len(trials)), len(trials))]
        cells += [Cell(scale.number(trials[0]["value"])), Cell(scale.number(best["value"])), Cell(escape(won), "", "l")]
        rows.append((named(entry), cells))
    unsearched = [escape(e.name) for e in facts.entries if not record["methods"].get(e.label, {}).get("space", True)]
    counts = {len(own["trials"]) for own in record["methods"].values() if own["space"]}
    same = len(counts) == 1
    finding = (
        f"Every method had {plural(budget, 'trial')} on validation data"
        if same
        else "Methods did not have the same number of trials"
    ) + (f"; {listed(unsearched)} had nothing to search." if unsearched else ".")
    what = "the global model on all validation rows" if record["metric"] == "global" else "the mean over clients"
    text = (
        f"Trials ran on seed {record['seed']}, which no run shown here has, and were judged by {what}; test rows were "
        "not looked at. The first trial is the options as given; in the others all methods tried the same values of "
        "the options that all have, and Optuna&rsquo;s TPE proposed their own. The winners ran anew on the seeds here."
    )
    inner = table("What each method was given.", "Tuning", columns, rows) + note(text)
    return section("tuning", number, "Tuning", finding, inner + details("All trials", _trials(facts, record)))


def _trials(facts: Facts, record: dict[str, Any]) -> str:
    columns = [
        Column("Method"),
        Column("Trial", up=True),
        Column("Validation", facts.scale.unit),
        Column("Options", css="l"),
    ]
    rows = []
    for entry in facts.entries:
        for i, trial in enumerate(record["methods"].get(entry.label, {}).get("trials", ()), 1):
            options = ", ".join(f"{k} {v:.4g}" for k, v in trial["options"].items())
            value = trial["value"]
            rows.append(
                (named(entry), [Cell(str(i), i), Cell(scale_text(facts, value), value), Cell(escape(options), "", "l")])
            )
    return table("Every trial.", "All trials", columns, rows)


def scale_text(facts: Facts, value: float | None) -> str:
    """A validation score, or that the trial diverged."""
    return "diverged" if value is None else facts.scale.number(value)

"""Whom one has to trust: hostile clients and hostile inputs that a run was tried with, updates that it refused, and
its privacy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from statistics import fmean
from typing import Any

from consilience.measure.board import withstood
from consilience.measure.statistics import last_of
from consilience.report.facts import Entry, Facts, trained
from consilience.report.load import RunFolder
from consilience.report.markup import Cell, Column, details, named, note, section, table
from consilience.report.words import NONE, listed, plural
from consilience.wire.adversary import parse

REASONS = 20
"""So many reasons of refusals have a line of their own."""
PRIVATE = {
    "epsilon": Column("ε spent", "at most"),
    "delta": Column("δ"),
    "noise": Column("Noise", "of the clip"),
    "clip": Column("Clip", "norm"),
}


def conditions(runs: Sequence[RunFolder]) -> list[str]:
    """Under what these runs were made, in a few words each: hostile clients, privacy, secret sums."""
    secret = "secret sums" if _secret(runs) else ""
    return [words for words in (_hostile(runs), _private(runs), secret) if words]


def _secret(runs: Sequence[RunFolder]) -> bool:
    return any(run.config.get("secure") is not None for run in runs)


def _hostile(runs: Sequence[RunFolder]) -> str:
    attacks = [(parse(run.config.get("attack")), trained(run.federation)) for run in runs]
    found = sorted({(attack.count(clients), attack.name) for attack, clients in attacks if attack is not None})
    return listed([f"{count} of them hostile ({name})" for count, name in found]) if found else ""


def _private(runs: Sequence[RunFolder]) -> str:
    spent = [
        (epsilon, last_of(run, "privacy", "delta"))
        for run in runs
        if (epsilon := last_of(run, "privacy", "epsilon")) is not None
    ]
    if not spent:
        return ""
    epsilon, delta = max(spent)
    return f"ε {epsilon:.3g} at δ {delta:g}"


def guarded(facts: Facts) -> bool:
    """Whether there is anything to say of trust."""
    return bool(conditions(facts.runs)) or any(run.refused for run in facts.runs) or bool(_withstood(facts))


def _withstood(facts: Facts) -> list[tuple[Entry, dict[str, Any]]]:
    """Methods whose global models were judged on inputs that were changed, those that withstand most first."""
    found = [(entry, of) for entry in facts.entries if (of := withstood(entry.runs)) is not None]
    return sorted(found, key=lambda pair: -pair[1]["both"])


def trust_section(facts: Facts, number: int) -> str:
    """Section "Attack and privacy"."""
    refused, private = any(run.refused for run in facts.runs), bool(_private(facts.runs))
    columns = [Column("Method"), *([Column("Refused", "updates of a run")] if refused else [])]
    columns += list(PRIVATE.values()) if private else []
    rows = []
    for entry in facts.entries:
        count = fmean(len(run.refused) for run in entry.runs)
        cells = [Cell(f"{count:,.0f}", count)] if refused else []
        cells += [_cell(entry.last("privacy", key)) for key in PRIVATE] if private else []
        rows.append((named(entry), cells))
    inner = table("What every method refused and spent.", "Attack and privacy", columns, rows) if rows[0][1] else ""
    inner += _reasons(facts.entries) if refused else ""
    inner += _inputs(facts)
    return section("trust", number, "Attack and privacy", finding(facts), inner + note(" ".join(_notes(facts))))


INPUTS = (
    Column("Method"),
    Column("As they are", "%"),
    Column("PGD", "%"),
    Column("Square", "%"),
    Column("Both", "%"),
    Column("SD", "points, of seeds", True),
    Column("Lost", "points, to both", True),
)


def _inputs(facts: Facts) -> str:
    """How global models do on inputs that were changed; nothing where that was not asked."""
    known = _withstood(facts)
    if not known:
        return ""
    most, rows = max(of["both"] for _, of in known), []
    for entry, of in known:
        best = "best" if len(known) > 1 and of["both"] == most else ""
        cells = [Cell(facts.scale.number(of[key]), of[key]) for key in ("clean", "pgd", "square")]
        cells.append(Cell(facts.scale.number(of["both"]), of["both"], best))
        lost = of["clean"] - of["both"]
        spread = Cell(NONE, "") if of["std"] is None else Cell(facts.scale.number(of["std"]), of["std"])
        rows.append((named(entry), [*cells, spread, Cell(facts.scale.number(lost), lost)]))
    return table("Test rows that are right when inputs are changed.", "Changed inputs", INPUTS, rows)


def _cell(value: float | None) -> Cell:
    return Cell(NONE, "") if value is None else Cell(f"{value:.3g}", value)


def finding(facts: Facts) -> str:
    """In a sentence, in HTML, what these runs were under."""
    said = []
    if words := _hostile(facts.runs):
        said.append(f"Of {plural(facts.clients, 'client')}, {words.replace(' of them', ' are', 1)}")
    if words := _private(facts.runs):
        said.append(f"what the models tell of any one client is bounded by {words}")
    if _secret(facts.runs):
        said.append("the server saw sums of updates alone")
    if known := _withstood(facts):
        (best, of), (last, least) = known[0], known[-1]
        lead = (
            f"inputs moved by at most {of['eps']:g} leave {best.name} {facts.scale.text(of['both'])} of test rows right"
        )
        said.append(lead + (f", {last.name} {facts.scale.text(least['both'])}" if best is not last else ""))
    if not said:
        said.append("Some updates were not what they should be, and were left out")
    text = "; ".join(said)
    return escape(text[0].upper() + text[1:] + ".")


def _notes(facts: Facts) -> list[str]:
    found = []
    if _hostile(facts.runs):
        found.append("Hostile clients are not judged: no mean over clients, and no worst tenth, counts them.")
    if any(run.refused for run in facts.runs):
        found.append("A refused update changes nothing: the round is that of the others.")
    if _private(facts.runs):
        found.append(
            "Differential privacy of clients, in simulation: ε is what whoever gets all models of a run may learn of "
            "one client&rsquo;s taking part; methods without a value are not private. Noise is in multiples of the "
            "clip, to which every update is shortened."
        )
    if _withstood(facts):
        found.append(
            "Changed inputs: the share of test rows that the last global model gets right when each may be changed, "
            "every number of it by what is said above, to mislead it: by PGD, which sees the model (20 steps, 5 "
            "restarts), by Square, which only asks it (1,000 questions), and by the better of both; mean over seeds. "
            "Rows that are wrong as they are count as wrong."
        )
    return found


def _reasons(entries: Sequence[Entry]) -> str:
    """Why updates were refused, the most frequent reasons first."""
    found = Counter((e.name, str(line.get("field", "")), str(line["reason"])) for e in entries for r in e.runs
                    for line in r.refused)  # fmt: skip
    columns = [Column("Method"), Column("Field", css="l"), Column("Reason", css="l"), Column("Updates")]
    rows = [
        (escape(name), [Cell(escape(field), css="l"), Cell(escape(reason), css="l"), Cell(f"{count:,}", count)])
        for (name, field, reason), count in found.most_common(REASONS)
    ]
    summary = f"Why, {'the most frequent' if len(found) > REASONS else 'all'} of {plural(len(found), 'reason')}"
    return details(summary, table("Reasons of refusals.", "Reasons", columns, rows))

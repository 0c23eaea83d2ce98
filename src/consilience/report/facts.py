"""What the sections of the report are made of, computed once from the runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

from consilience.core.errors import DataError
from consilience.measure.best import best_clients
from consilience.measure.statistics import (
    Comparison,
    compare_scores,
    final_scores,
    last_clients,
    last_of,
    mean_interval,
)
from consilience.report.load import RunFolder, read_runs, read_yaml
from consilience.report.words import Scale, Unit, byte_unit, count_unit, display, time_unit

REFERENCES = ("local", "centralised")
SLOTS = 8
"""So many methods have a hue of their own."""


class Dot(NamedTuple):
    """One client of one seed (a seed changes the partition, so its client 3 is not another seed's)."""

    seed: int
    client: int
    value: float


class Calibration(NamedTuple):
    """A method's calibration error after the last round: mean over seeds, and its interval."""

    error: float
    interval: tuple[float, float] | None


@dataclass
class Entry:
    """One method over its seeds."""

    label: str
    name: str
    reference: str
    runs: list[RunFolder]
    scores: Mapping[int, float]
    clients: int
    share: bool = True
    """Whether scores are shares (accuracies) rather than losses."""
    slot: int = -1
    gains: list[Dot] = field(default_factory=list)
    best_gains: list[Dot] = field(default_factory=list)
    """The same, each at its run's round that is best on validation data."""

    @property
    def mean(self) -> float:
        return fmean(self.scores.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds."""
        return stdev(self.scores.values()) if len(self.scores) > 1 else None

    @property
    def finished(self) -> bool:
        return all(run.finished for run in self.runs)

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        return mean_interval([self.scores[s] for s in sorted(self.scores)], share=self.share)

    @cached_property
    def calibration(self) -> Calibration | None:
        """None without a global model that gives probabilities."""
        found = [e for run in self.runs if (e := last_of(run, "global", "ece")) is not None and math.isfinite(e)]
        return Calibration(fmean(found), mean_interval(found, share=True)) if found else None

    def last(self, *keys: str) -> float | None:
        """Mean over seeds of a run's last value."""
        found = [v for run in self.runs if (v := last_of(run, *keys)) is not None and math.isfinite(v)]
        return fmean(found) if found else None

    @property
    def traffic(self) -> float:
        """Bytes up and down, of the average client."""
        return ((self.last("bytes_up") or 0.0) + (self.last("bytes_down") or 0.0)) / self.clients

    @property
    def losers(self) -> list[Dot]:
        return [dot for dot in self.gains if dot.value < 0]

    @property
    def median_gain(self) -> float:
        return median(dot.value for dot in self.gains)

    def accuracies(self, lower: bool, *, best: bool = False) -> list[Dot]:
        """Every client's last score, for every seed. best: that of the round that is best on validation data."""
        key = "loss" if lower else "accuracy"
        return [
            Dot(run.seed, client, float(line[key]))
            for run in self.runs
            for client, line in (best_clients(run, lower=lower) if best else last_clients(run)).items()
            if line.get(key) is not None and math.isfinite(line[key])
        ]


@dataclass(frozen=True)
class Facts:
    """A comparison, or a run, ready to be written about."""

    folder: Path
    compare: Mapping[str, Any]
    runs: list[RunFolder]
    metric: str
    scale: Scale
    ranked: list[Entry]
    references: list[Entry]
    comparison: Comparison
    seeds: list[int]
    lost: list[RunFolder]

    @property
    def entries(self) -> list[Entry]:
        """Ranked methods, best first, then references."""
        return self.ranked + self.references

    @property
    def best(self) -> Entry:
        return self.ranked[0]

    @property
    def settled(self) -> list[Entry]:
        """Ranked methods whose cost is final: a run that has not ended would look cheap."""
        return [e for e in self.ranked if e.finished] or self.ranked

    @property
    def local(self) -> Entry | None:
        return next((e for e in self.references if e.reference == "local"), None)

    @property
    def federation(self) -> Mapping[str, Any]:
        return self.runs[0].federation

    @property
    def drawn(self) -> bool:
        """Whether it is told how much each client holds; among very many it is not."""
        return all("sizes" in run.federation for run in self.runs)

    @property
    def clients(self) -> int:
        return trained(self.federation)

    @property
    def rounds(self) -> int:
        return max(int(run.history[-1]["round"]) for run in self.runs)

    @property
    def lower(self) -> bool:
        return self.scale.lower

    def ahead(self, a: float, b: float) -> float:
        """By how much a is better than b."""
        return b - a if self.lower else a - b

    @property
    def virtual(self) -> bool:
        """Whether any run has a virtual clock that moved."""
        return any(run.history[-1]["virtual_s"] > 0 for run in self.runs)

    @property
    def traffic_unit(self) -> Unit:
        return byte_unit(e.traffic for e in self.entries)

    def clock(self, key: str) -> Unit:
        """The unit for ``wall_s`` or ``virtual_s``."""
        return time_unit(e.last(key) for e in self.entries)

    @property
    def sample_unit(self) -> Unit:
        return count_unit(e.last("samples") for e in self.entries)


def trained(federation: Mapping[str, Any]) -> int:
    """The number of clients that take part in training."""
    return max(1, int(federation["clients"]) - len(federation.get("unseen") or ()))


def gather(folder: Path) -> Facts:
    """Read a folder's runs and compute what its report says."""
    runs = read_runs(folder)
    compare = read_yaml(folder / "compare.yaml") if (folder / "compare.yaml").is_file() else {}
    scores = final_scores(runs)
    if not scores.values:
        raise DataError(f"no run in {folder} has a score: none was evaluated yet, or all diverged")
    entries: dict[str, Entry] = {}
    for run in runs:
        if run.seed not in scores.values.get(run.label, ()):
            continue
        if run.label not in entries:
            reference = run.method if run.method in REFERENCES else ""
            entries[run.label] = Entry(
                run.label,
                display(run.label, run.method),
                reference,
                [],
                scores.values[run.label],
                trained(run.federation),
                not scores.lower,
            )
        entries[run.label].runs.append(run)
    federated = {label: e.scores for label, e in entries.items() if not e.reference}
    # only references: there is nothing else to rank, so they are what the page is about
    comparison = compare_scores(federated or {label: e.scores for label, e in entries.items()}, lower=scores.lower)
    ranked = [entries[label] for label in comparison.order]
    for slot, entry in enumerate(ranked):
        entry.slot = slot
    references = [e for label, e in entries.items() if label not in comparison.rank]
    references.sort(key=lambda e: (REFERENCES.index(e.reference), e.label))
    facts = Facts(
        folder,
        compare,
        runs,
        scores.metric,
        Scale(scores.lower),
        ranked,
        references,
        comparison,
        sorted({run.seed for run in runs}),
        [run for run in runs if run.seed not in scores.values.get(run.label, ())],
    )
    if facts.local is not None:
        _gains(facts, facts.local)
    return facts


def _gains(facts: Facts, local: Entry) -> None:
    def over(entry: Entry, *, best: bool) -> list[Dot]:
        alone = {(dot.seed, dot.client): dot.value for dot in local.accuracies(facts.lower, best=best)}
        return [
            dot._replace(value=facts.ahead(dot.value, alone[dot.seed, dot.client]))
            for dot in entry.accuracies(facts.lower, best=best)
            if (dot.seed, dot.client) in alone
        ]

    for entry in facts.entries:
        if entry is not local:
            entry.gains, entry.best_gains = over(entry, best=False), over(entry, best=True)


def unfinished(facts: Facts) -> list[str]:
    """One sentence for every run without a score or an end, and for every method that lacks seeds."""
    notes = [
        f"{display(run.label, run.method)}, seed {run.seed}, has no score, or one that is not a number: it is left out."
        for run in facts.lost
    ]
    for entry in facts.entries:
        for run in entry.runs:
            if not run.finished:
                goal = run.config.get("rounds")
                of = f" of {goal}" if isinstance(goal, int) else ""
                notes.append(f"{entry.name}, seed {run.seed}, is not finished: round {run.history[-1]['round']}{of}.")
        missing = len(facts.seeds) - len(entry.scores)
        if missing > 0:
            notes.append(f"{entry.name} has {len(entry.scores)} of {len(facts.seeds)} seeds.")
    return notes


def held(counts: Sequence[Sequence[int]]) -> list[int]:
    """How many classes each client has at least one sample of."""
    return [sum(c > 0 for c in row) for row in counts]

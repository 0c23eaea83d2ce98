"""What the timelines of runs say: who worked when, how stale replies were, who was heard, and what it took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from consilience.report.facts import Entry, Facts
from consilience.report.load import RunFolder

PARTS = ("wait", "download", "compute", "upload")
"""What a job's time goes into, in this order."""
ROWS, BARS = 40, 200
"""A picture of a timeline has so many clients and so many jobs."""


@dataclass(frozen=True)
class Timeline:
    """The jobs of one run, and its fleet as it was written at the end (empty while a run goes on)."""

    run: RunFolder

    @property
    def jobs(self) -> list[dict[str, Any]]:
        """The lines of ``timeline.jsonl``."""
        return self.run.timeline

    @property
    def combined(self) -> list[dict[str, Any]]:
        """Jobs whose reply was combined, in a phase in which a client trains."""
        return [job for job in self.jobs if job["state"] == "combined" and (job["steps"] or not self._trains)]

    @cached_property
    def _trains(self) -> bool:
        return any(job["steps"] for job in self.jobs)

    @property
    def sizes(self) -> Sequence[int]:
        """Training rows by client."""
        return list(self.run.federation.get("sizes") or ())

    @property
    def ends(self) -> float:
        """Virtual time at the end."""
        return float(self.run.history[-1]["virtual_s"])

    def states(self) -> Counter[str]:
        """How many jobs came to which end."""
        return Counter(str(job["state"]) for job in self.jobs)

    def staleness(self) -> Counter[int]:
        """How many combined replies had which staleness."""
        return Counter(int(job["staleness"]) for job in self.combined)

    def heard(self) -> Counter[int]:
        """Combined replies by client."""
        return Counter(int(job["client"]) for job in self.combined)

    @cached_property
    def trained(self) -> list[int]:
        """The clients that may train."""
        unseen = {int(c) for c in self.run.federation.get("unseen") or ()}
        return [c for c in range(int(self.run.federation["clients"])) if c not in unseen]

    @cached_property
    def never(self) -> list[int]:
        """Clients that may train and were never heard."""
        heard = self.heard()
        return [client for client in self.trained if not heard[client]]

    def unheard_class(self) -> tuple[str, float] | None:
        """The class of which the largest share lies with clients never heard, and that share."""
        counts, classes = self.run.federation.get("counts"), self.run.federation.get("classes")
        never = self.never
        if not counts or not classes or not never:
            return None
        shares = []
        for k, name in enumerate(classes):
            whole = sum(counts[c][k] for c in self.trained)
            shares.append((sum(counts[c][k] for c in never) / whole if whole else 0.0, str(name)))
        share, name = max(shares)
        return (name, share) if share else None

    def joules(self) -> float | None:
        """Energy of all jobs: power times the time that devices worked; None if a power is unknown."""
        devices = self.run.fleet.get("devices") or []
        total = 0.0
        for job in self.jobs:
            client = int(job["client"])
            watts = devices[client].get("watts") if client < len(devices) else None
            if watts is None:
                return None
            total += watts * max(0.0, job["end"] - job["start"] - min(job["wait"], job["end"] - job["start"]))
        return total

    def offline(self, client: int) -> list[Sequence[float]]:
        """When a client could not be reached."""
        found: list[list[Sequence[float]]] = self.run.fleet.get("offline") or []
        return found[client] if client < len(found) else []

    def shown(self) -> tuple[list[int], float]:
        """Clients of a picture, slowest first and those never heard last, and the time at which it ends."""
        spans: dict[int, list[float]] = {}
        for job in self.jobs:
            if job["state"] == "combined":
                spans.setdefault(int(job["client"]), []).append(job["end"] - job["start"] - job["wait"])
        heard = sorted((c for c in self.trained if c in spans), key=lambda c: -fmean(spans[c]))
        clients = [*heard, *(c for c in self.trained if c not in spans)]
        if len(clients) > ROWS:
            clients = [clients[round(i * (len(clients) - 1) / (ROWS - 1))] for i in range(ROWS)]
        among = set(clients)
        starts = sorted(job["start"] for job in self.jobs if job["client"] in among)
        return clients, starts[BARS] if len(starts) > BARS else self.ends


def timelines(facts: Facts) -> list[tuple[Entry, Timeline]]:
    """The first seed's timeline of each method that has one."""
    found = []
    for entry in facts.entries:
        run = min(entry.runs, key=lambda run: run.seed)
        if run.timeline and run.history[-1]["virtual_s"] > 0:
            found.append((entry, Timeline(run)))
    return found

"""Rounds with a deadline: more clients are asked than needed, and a round ends without the slowest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from consilience.core.events import Decision, Event, Start, View
from consilience.core.tree import Tree, record
from consilience.schedule.interval import slowest


@record
class Open(NamedTuple):
    """A round under way: seconds that it may take, when it ends, how many replies are enough."""

    seconds: float
    ends: float
    enough: int


@dataclass(frozen=True)
class Deadline:
    """Asks ``over`` times the cohort and combines when as many replies as the cohort has are in, at the deadline at
    the latest; if none is in by then, with the first that comes. Whoever is later is cancelled.

    seconds: from the beginning of a round; or share: of the time of the slowest client's usual job, reckoned at the
    start. late: "discard" the work of those who would be late, or "partial": everybody does as many steps as its
    device can until the deadline, and that is combined (Li et al., 2020).
    """

    seconds: float | None = None
    share: float | None = None
    over: float = 1.0
    late: Literal["discard", "partial"] = "discard"

    def init(self) -> Tree:
        """No round is under way."""
        return None

    def on(self, events: Sequence[Event], view: View, state: Open | None) -> Decision:
        """Begin a round, or end it."""
        if not view.in_flight and not view.arrived:
            return self._begin(view, state)
        assert state is not None
        jobs = [reply.job.id for reply in view.arrived]
        over = not view.in_flight or len(jobs) >= state.enough or view.time >= state.ends
        if jobs and over:
            after = Open(state.seconds, math.inf, len(jobs))  # a method's later phases wait for everybody left
            return Decision(after, admit=[jobs], cancel=sorted(view.in_flight))
        return Decision(state)

    def _begin(self, view: View, state: Open | None) -> Decision:
        seconds = self.seconds if state is None else state.seconds
        if seconds is None:
            seconds = (self.share or 1.0) * slowest(view)
        within = seconds if self.late == "partial" else None
        asked = math.ceil(self.over * view.cohort - 1e-9)
        start = [Start(client, within=within) for client in view.draw(asked)]
        if not start:
            return Decision(Open(seconds, math.inf, 1), watch=True)
        ends = view.time + seconds
        return Decision(Open(seconds, ends, min(view.cohort, len(start))), start=start, timers=[ends])

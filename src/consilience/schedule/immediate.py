"""Plain asynchrony: every reply is combined as it comes, and its client's place goes to somebody else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from consilience.core.events import Decision, Event, Start, View
from consilience.core.tree import Tree


@dataclass(frozen=True)
class Immediate:
    """Keeps ``concurrency`` jobs in flight (None: as many as a cohort has) and combines each reply alone."""

    concurrency: int | None = None

    def init(self) -> Tree:
        """No state."""
        return None

    def on(self, events: Sequence[Event], view: View, state: Tree) -> Decision:
        """Combine what has come, one by one; then, when the server is ready, fill the free places."""
        if view.arrived:
            return Decision(state, admit=[[reply.job.id] for reply in view.arrived])
        return fill(view, state, self.concurrency or view.cohort)


def fill(view: View, state: Tree, places: int, timers: Sequence[float] = ()) -> Decision:
    """Start clients so that ``places`` jobs are in flight; ask again when some come online, if there are too few."""
    free = places - len(view.in_flight)
    start = [Start(client) for client in view.draw(free)] if free > 0 else []
    return Decision(state, start=start, timers=timers, watch=len(start) < free)

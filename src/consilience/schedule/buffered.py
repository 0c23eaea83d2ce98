"""Buffered asynchrony: combine whenever so many replies have come (Nguyen et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from consilience.core.events import Decision, Event, View
from consilience.core.tree import Tree
from consilience.schedule.immediate import fill


@dataclass(frozen=True)
class Buffered:
    """Combines every ``buffer`` replies, in the order in which they came; keeps ``concurrency`` jobs in flight.

    A client whose reply lies in the buffer is not asked again until the buffer is emptied. If nobody is left to ask
    and nothing is in flight, a buffer that is not full is combined.
    """

    buffer: int
    concurrency: int | None = None

    def init(self) -> Tree:
        """No state: the buffer is what has arrived and is not decided on."""
        return None

    def on(self, events: Sequence[Event], view: View, state: Tree) -> Decision:
        """Empty full buffers; else fill the free places."""
        jobs = [reply.job.id for reply in view.arrived]
        full = len(jobs) - len(jobs) % self.buffer
        if full:
            return Decision(state, admit=[jobs[i : i + self.buffer] for i in range(0, full, self.buffer)])
        found = fill(view, state, self.concurrency or view.cohort)
        if jobs and not view.in_flight and not found.start and len(view.busy) == len(view.clients):
            return Decision(state, admit=[jobs])
        return found

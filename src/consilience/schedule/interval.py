"""Fixed intervals: at every tick, combine whatever has come (Fraboni et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from consilience.core.events import Decision, Event, View
from consilience.core.tree import Tree, record
from consilience.schedule.immediate import fill


@record
class Ticking(NamedTuple):
    """The interval in virtual seconds, and the next tick."""

    every: float
    next: float


@dataclass(frozen=True)
class Interval:
    """Combines at ticks; contributors get the new model and start again, the others keep working.

    every: seconds; or share: of the time that the slowest client's usual job takes, reckoned at the start. With
    nobody's reply at a tick, nothing is combined. Clients that come online start at once.
    """

    every: float | None = None
    share: float | None = None
    concurrency: int | None = None

    def init(self) -> Tree:
        """Not ticking yet."""
        return None

    def on(self, events: Sequence[Event], view: View, state: Ticking | None) -> Decision:
        """Set the first tick; at a tick combine; keep everybody busy."""
        if state is None:
            every = self.every if self.every is not None else (self.share or 0.0) * slowest(view)
            state = Ticking(every, view.time + every)
            return fill(view, state, self._places(view), [state.next])
        timers = []
        due = view.time >= state.next
        if due and (view.arrived or state.every):
            state = state._replace(next=state.next + state.every)
            timers = [state.next]
        if due and view.arrived:
            jobs = [reply.job.id for reply in view.arrived]
            return Decision(state, admit=[jobs], timers=timers)
        return fill(view, state, self._places(view), timers)

    def _places(self, view: View) -> int:
        """Clients whose reply waits for the tick keep their place."""
        return (self.concurrency or view.cohort) - len(view.arrived)


def slowest(view: View) -> float:
    """The longest time that a client's usual job is expected to take."""
    return max(view.expect(int(client)) for client in view.clients)

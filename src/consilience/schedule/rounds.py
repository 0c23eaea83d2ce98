"""Rounds: a cohort is drawn, everybody is waited for, the server combines, and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from consilience.core.events import Decision, Event, Start, View
from consilience.core.tree import Tree


@dataclass(frozen=True)
class Rounds:
    """Synchronous rounds. Nothing to remember: a round is over when nothing is in flight.

    A cohort that is sampled may be empty, and its round is then made without anybody. Of any other only those are
    asked that are online; when nobody is, the round begins with whoever comes first.
    """

    def init(self) -> Tree:
        """No state."""
        return None

    def on(self, events: Sequence[Event], view: View, state: Tree) -> Decision:
        """Combine when the last reply is in; start the next cohort when the server is ready."""
        if view.in_flight:
            return Decision(state)
        if view.arrived:
            return Decision(state, admit=[[reply.job.id for reply in view.arrived]])
        start = [Start(client) for client in view.draw(view.cohort)]
        if view.sampled and not start:
            return Decision(state, admit=[[]])
        return Decision(state, start=start, watch=not start)

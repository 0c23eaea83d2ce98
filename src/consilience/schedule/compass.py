"""FedCompass's scheduler: faster clients get more steps, so that groups arrive together (Li et al., 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from consilience.core.events import Decision, Event, Start, View
from consilience.core.messages import Reply
from consilience.core.tree import record

MEMORY = 0.9
"""Weight of the past in a client's measured speed."""


@record
class Group(NamedTuple):
    """Clients that should arrive together. due: when they are expected. latest: when they are no longer waited for.
    members: clients not yet back. arrived: jobs that are back."""

    due: float
    latest: float
    members: tuple[int, ...]
    arrived: tuple[int, ...]


@record
class Plans(NamedTuple):
    """pace: measured seconds a step, by client. groups: by number. late: jobs that came after their group."""

    pace: dict[int, float]
    groups: dict[int, Group]
    next: int
    late: tuple[int, ...]


@dataclass(frozen=True)
class Compass:
    """Every client does between ``least`` and ``most`` steps.

    All begin with ``least``; each first reply is combined at once and shows the client's pace. From then on a client
    joins the group that leaves it the most steps before it is due, or makes a new one, which is timed to meet the
    fastest member of an existing group at that member's next job. A group is combined when all its members are back,
    or at ``slack`` times its duration; whoever comes later is given new work at once, and its reply is combined with
    the next group.
    """

    least: int = 20
    most: int = 100
    slack: float = 1.2

    def init(self) -> Plans:
        """Nothing is known."""
        return Plans({}, {}, 0, ())

    def on(self, events: Sequence[Event], view: View, state: Plans) -> Decision:
        """Sort in what has come, combine groups that are complete or over, and give everybody back new work."""
        desk = _Desk(self, view, state)
        for event in events:
            if event.kind == "arrival":
                desk.arrival(next(r for r in view.arrived if r.job.id == event.job))
            elif event.kind == "lost":
                desk.lost(event.client)
        desk.close()
        return desk.decide(first=not view.in_flight and not view.arrived and not state.pace)


class _Desk:
    """One decision of the scheduler under way."""

    def __init__(self, rule: Compass, view: View, state: Plans) -> None:
        self.rule, self.view = rule, view
        self.pace, self.groups, self.number = dict(state.pace), dict(state.groups), state.next
        self.late = list(state.late)
        self.admit: list[list[int]] = []
        self.free: list[int] = []
        """Clients that want new work."""
        self.timers: list[float] = []

    def _group(self, client: int) -> int | None:
        return next((number for number, group in self.groups.items() if client in group.members), None)

    def arrival(self, reply: Reply) -> None:
        """A reply: the client's first, one of a group, or a late one."""
        client, seconds = reply.job.client, reply.seconds / max(1, reply.steps)
        first = client not in self.pace
        self.pace[client] = seconds if first else MEMORY * self.pace[client] + (1 - MEMORY) * seconds
        number = self._group(client)
        if number is not None:
            group = self.groups[number]
            rest = tuple(member for member in group.members if member != client)
            self.groups[number] = group._replace(members=rest, arrived=(*group.arrived, reply.job.id))
            return
        if first:
            self.admit.append([reply.job.id])
        else:
            self.late.append(reply.job.id)
        self.free.append(client)

    def lost(self, client: int) -> None:
        """A client dropped out: nobody waits for it, and it gets new work when it is back."""
        number = self._group(client)
        if number is not None:
            group = self.groups[number]
            self.groups[number] = group._replace(members=tuple(m for m in group.members if m != client))
        self.free.append(client)

    def close(self) -> None:
        """Combine groups whose members are all back or whose time is over, oldest first."""
        client_of = {reply.job.id: reply.job.client for reply in self.view.arrived}
        for number, group in sorted(self.groups.items()):
            if group.members and self.view.time < group.latest:
                continue
            del self.groups[number]
            if group.arrived:
                self.admit.append([*self.late, *group.arrived])
                self.late = []
            self.free += [client_of[job] for job in group.arrived]

    def decide(self, first: bool) -> Decision:
        """New work, for the fastest first."""
        if first:
            start = [Start(client, self.rule.least) for client in self.view.draw(self.view.cohort)]
            return Decision(self._state(), start=start, watch=not start)
        start = []
        for client in sorted(self.free, key=lambda c: (self.pace.get(c, math.inf), c)):
            start.append(Start(client, self.assign(client) if client in self.pace else self.rule.least))
        if self.late and not self.groups:  # nobody is left whose group they could join
            self.admit.append(self.late)
            self.late = []
        return Decision(self._state(), admit=self.admit, start=start, timers=self.timers)

    def _state(self) -> Plans:
        return Plans(self.pace, self.groups, self.number, tuple(self.late))

    def assign(self, client: int) -> int:
        """Steps for a client: join a group that is due, or make one."""
        rule, now, pace = self.rule, self.view.time, max(self.pace[client], 1e-12)
        fits = [
            (steps, -number)
            for number, group in self.groups.items()
            if now < group.due and rule.least <= (steps := _floor((group.due - now) / pace)) <= rule.most
        ]
        if fits:
            steps, number = max(fits)
            group = self.groups[-number]
            self.groups[-number] = group._replace(members=(*group.members, client))
            return steps
        meets = [
            _floor((group.latest + self._fastest(group) * rule.most - now) / pace) for group in self.groups.values()
        ]
        steps = max([rule.least, *(m for m in meets if m <= rule.most)]) if any(m <= rule.most for m in meets) else 0
        steps = steps or rule.most
        due, latest = now + steps * pace, now + rule.slack * steps * pace
        self.groups[self.number] = Group(due, latest, (client,), ())
        self.number += 1
        self.timers.append(latest)
        return steps

    def _fastest(self, group: Group) -> float:
        client_of = {reply.job.id: reply.job.client for reply in self.view.arrived}
        everybody = [*group.members, *(client_of[job] for job in group.arrived)]
        return min((self.pace[client] for client in everybody), default=0.0)


def _floor(steps: float) -> int:
    """Whole steps; what lies a rounding error below a whole number is that number."""
    return math.floor(steps * (1 + 1e-12) + 1e-12)

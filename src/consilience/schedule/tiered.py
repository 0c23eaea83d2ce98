"""Tiers: clients of like speed make rounds among themselves, and tiers combine as they finish (Chai et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from consilience.core.events import Decision, Event, Start, View
from consilience.core.tree import Tree, record


@record
class Tiers(NamedTuple):
    """The clients of each tier, fastest first, and the tier of each job that is not yet combined."""

    members: tuple[tuple[int, ...], ...]
    jobs: dict[int, int]


@dataclass(frozen=True)
class Tiered:
    """Clients are cut by the expected time of their usual job into ``tiers`` of equal number. Each tier draws its
    share of the cohort from its own clients, waits for all of them, and is combined alone; tiers do not wait for
    each other."""

    tiers: int

    def init(self) -> Tree:
        """Tiers are made when the run begins."""
        return None

    def on(self, events: Sequence[Event], view: View, state: Tiers | None) -> Decision:
        """Combine tiers that are complete, then start those that have nothing under way."""
        if state is None:
            state = Tiers(self._cut(view), {})
        fresh = {event.job: event.client for event in events if event.kind == "start"}
        of = {client: tier for tier, members in enumerate(state.members) for client in members}
        jobs = {**state.jobs, **{job: of[client] for job, client in fresh.items()}}
        arrived = {reply.job.id for reply in view.arrived}
        jobs = {job: tier for job, tier in jobs.items() if job in arrived or job in view.in_flight}
        waiting = {tier for job, tier in jobs.items() if job in view.in_flight}
        done = sorted({jobs[job] for job in arrived} - waiting)
        if done:
            admit = [[r.job.id for r in view.arrived if jobs[r.job.id] == tier] for tier in done]
            left = {job: tier for job, tier in jobs.items() if tier not in done}
            return Decision(Tiers(state.members, left), admit=admit)
        idle = [tier for tier in range(len(state.members)) if tier not in jobs.values()]
        share = max(1, round(view.cohort / len(state.members)))
        drawn = [view.draw(share, among=state.members[tier]) for tier in idle]
        start = [Start(client) for clients in drawn for client in clients]
        return Decision(state._replace(jobs=jobs), start=start, watch=not all(drawn))

    def _cut(self, view: View) -> tuple[tuple[int, ...], ...]:
        ids = [int(client) for client in view.clients]
        order = sorted(ids, key=lambda client: (view.expect(client), client))
        n, k = len(order), min(self.tiers, len(order))
        return tuple(tuple(sorted(order[n * i // k : n * (i + 1) // k])) for i in range(k))

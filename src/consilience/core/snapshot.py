"""What a run has to remember to go on, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from consilience.core.events import Event
from consilience.core.exchange import Letter
from consilience.core.messages import Job, Reply, Trip
from consilience.core.tree import Tree, record


@record
class Totals(NamedTuple):
    """What has been spent: bytes as encoded; samples, steps and FLOP as computed (evaluation does not count)."""

    bytes_up: int = 0
    bytes_down: int = 0
    samples: int = 0
    steps: int = 0
    flops: float = 0.0

    def plus(self, more: Totals) -> Totals:
        """So much more."""
        up, down, samples, steps, flops = more
        return Totals(
            self.bytes_up + up, self.bytes_down + down, self.samples + samples, self.steps + steps, self.flops + flops
        )

    def until(self, leg: Trip) -> Totals:
        """What of this is spent on a way that may end too soon: whole steps and samples computed, bytes sent."""
        up, done = leg.uploaded, leg.computed
        return Totals(
            int(self.bytes_up * up), 0, int(self.samples * done), int(self.steps * done), float(self.flops * done)
        )


@record
class Flight(NamedTuple):
    """A job on its way. phases: of its chain, those still to come after this one. at: virtual time at which this
    phase was dispatched. arrives: of its arrival, or of its loss. reply: what it will bring. cost: what this phase
    spends if it comes to its end. leg: this phase's way."""

    job: Job
    phases: tuple[int, ...]
    at: float
    arrives: float
    order: int
    reply: Reply
    cost: Totals
    leg: Trip


@record
class Sent(NamedTuple):
    """A job that is out in real time, and what it was sent; the rest as in a :class:`Flight`. down: encoded bytes.
    rings: timers of the schedule that had rung. earlier: reply of an earlier phase."""

    job: Job
    phases: tuple[int, ...]
    at: float
    down: int
    rings: int
    earlier: Reply | None
    order: int
    message: Tree


@record
class Snapshot(NamedTuple):
    """Everything that a run needs to go on, bit for bit. Nothing is in computation when it is taken, but in real time
    jobs may be ``out``. spent: by client. states: see ``Executor.states``: those on file are read when asked for, and
    are the run's newest. mail: letters between nodes that are not read."""

    version: int
    time: float
    next_job: int
    order: int
    started: int
    ready: bool
    begun: bool
    chain: int
    server: Tree
    schedule: Tree
    numbers: dict[int, int]
    admitted: dict[int, int]
    totals: Totals
    spent: dict[int, Totals]
    arrived: tuple[Reply, ...]
    flights: tuple[Flight, ...]
    timers: tuple[float, ...]
    rings: int
    news: tuple[Event, ...]
    watch: bool
    states: Mapping[int, Tree]
    pending: dict[int, Tree]
    out: tuple[Sent, ...] = ()
    release: Tree = None
    mail: tuple[Letter, ...] = ()

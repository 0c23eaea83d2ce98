"""When things happen: the views and decisions of schedules, on a virtual clock.

A schedule sees what happened at one instant (arrivals, timers, the server being ready for more) and decides
which replies to combine and which clients to start. It holds no state of its own: what it must remember is a
tree that the loop keeps and writes into checkpoints.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from consilience.core.messages import Device, Job, Reply, Trip
from consilience.core.tree import Tree, record


@record
class Event(NamedTuple):
    """Something that happened now, or since the schedule was last asked.

    "ready": the server may dispatch. "start": ``job`` was dispatched. "arrival": it has replied. "lost": its
    client dropped out. "timer": a timer set for now rang. "online": ``client`` can be reached again.
    """

    kind: Literal["ready", "start", "arrival", "lost", "timer", "online"]
    job: int = -1
    client: int = -1


class Start(NamedTuple):
    """A job to dispatch: to whom, and with how many local steps (None: the method's own).

    within: the client does only as many of its steps as its device can in so many virtual seconds, transfers
    included (an upload is taken to be as large as the download), but at least one.
    """

    client: int
    steps: int | None = None
    slot: int = 0
    within: float | None = None


class Decision(NamedTuple):
    """What to do now. admit: groups of job ids, each combined into one server update, in turn. refuse: job ids
    whose replies are dropped. cancel: job ids in flight that nobody waits for any more. start: jobs to dispatch
    after that. timers: virtual times at which to be asked. watch: whether to be asked when clients come online."""

    state: Tree
    admit: Sequence[Sequence[int]] = ()
    refuse: Sequence[int] = ()
    start: Sequence[Start] = ()
    timers: Sequence[float] = ()
    cancel: Sequence[int] = ()
    watch: bool = False


class View(NamedTuple):
    """What a schedule may look at.

    time: virtual seconds. version: server updates made. clients: ids that may train. busy: clients with a job
    not yet arrived or not yet decided on. in_flight: job ids not yet arrived. arrived: replies not yet decided
    on, by arrival. cohort: how many clients a round asks for. draw: a number of clients that are online and not
    busy, as :func:`draw_cohort` does, of all or among those given. running: the jobs in flight by id.
    expect: virtual seconds that a job of a client would take with its usual steps, or with so many.
    sampled: the cohort is drawn by a rule by which it may be empty; that round is then made without anybody.
    """

    time: float
    version: int
    clients: np.ndarray
    busy: frozenset[int]
    in_flight: frozenset[int]
    arrived: Sequence[Reply]
    cohort: int
    draw: Callable[..., list[int]]
    running: Mapping[int, Job] = {}
    expect: Callable[..., float] = lambda client, steps=None: 0.0
    sampled: bool = False


class Schedule(Protocol):
    """When jobs start and when the server combines."""

    def init(self) -> Tree:
        """The first state."""
        ...

    def on(self, events: Sequence[Event], view: View, state: Tree) -> Decision:
        """What to do about everything that happened at this instant."""
        ...


class Clock(Protocol):
    """How long jobs take on clients' devices and links, and when clients can be reached, in virtual seconds.

    All answers are functions of the arguments alone, so that the same seed gives the same timeline.
    """

    def trip(
        self, job: Job, start: float, *, down: int, up: int, samples: int, steps: int, flops: float | None = None
    ) -> Trip:
        """A job's way when it is dispatched at ``start``, for bytes down and up and the work counted (flops: None
        where only samples are known). More bytes or work never make it shorter."""
        ...

    def online(self, clients: np.ndarray, time: float, version: int) -> np.ndarray:
        """Which of these clients can be asked now, as booleans."""
        ...

    def returns(self, client: int, time: float, version: int) -> float:
        """The next time, ``time`` at the earliest, at which a client can be asked; inf if never."""
        ...

    def device(self, client: int) -> Device | None:
        """A client's device, if it is simulated."""
        ...


class Instant:
    """Identical devices in the zero-delay limit: everything arrives at once, and everybody is there."""

    def trip(
        self, job: Job, start: float, *, down: int, up: int, samples: int, steps: int, flops: float | None = None
    ) -> Trip:
        """0."""
        return Trip()

    def online(self, clients: np.ndarray, time: float, version: int) -> np.ndarray:
        """All."""
        return np.ones(len(clients), dtype=bool)

    def returns(self, client: int, time: float, version: int) -> float:
        """Now."""
        return time

    def device(self, client: int) -> Device | None:
        """None."""
        return None


class RealTime(Instant, ABC):
    """A clock of real time: a job takes as long as it takes. What has come is told to it, and :meth:`trip` knows the
    jobs that have come. All times are multiples of :data:`TICK`, so that sums and differences of them are exact."""

    @abstractmethod
    def now(self) -> float:
        """Seconds since the beginning of the run."""

    @abstractmethod
    def came(self, job: Job, sent: float, time: float, compute: float | None) -> None:
        """A job that was sent out at ``sent`` has come back at ``time``, after so many seconds of work; None: its
        client will not answer."""


TICK = 2.0**-10
"""Seconds; the grain of real time."""


def draw_cohort(
    rng: np.random.Generator, clients: np.ndarray, size: int, busy: Collection[int] = frozenset()
) -> list[int]:
    """``size`` different ones of ``clients`` (ascending) that are not ``busy``, uniformly, in ascending order; all of
    them if there are no more.

    Costs O(size + busy), not O(clients), when few of many are drawn.
    """
    taken = np.searchsorted(clients, sorted(busy))  # where the busy ones stand
    idle = len(clients) - len(taken)
    ranks = np.arange(idle) if size >= idle else rng.choice(idle, size, replace=False, shuffle=False)
    # the r-th idle client stands behind as many busy ones as have at most r idle ones before them
    places = ranks + np.searchsorted(taken - np.arange(len(taken)), ranks, side="right")
    return sorted(clients[places].tolist())


def cohort_size(participation: float | int, clients: int) -> int:
    """How many clients a round asks for: a fraction if it is a float, else a count; at least 1."""
    if isinstance(participation, float):
        return max(1, round(participation * clients))
    return min(participation, clients)

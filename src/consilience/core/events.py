"""When things happen: the views and decisions of schedules, on a virtual clock.

A schedule sees what happened at one instant (arrivals, timers, the server being ready for more) and decides
which replies to combine and which clients to start. It holds no state of its own: what it must remember is a
tree that the loop keeps and writes into checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from consilience.core.messages import Reply
from consilience.core.tree import Tree


class Event(NamedTuple):
    """Something that happened now. "ready": the server may dispatch; "arrival": ``job`` has replied; "timer":
    a timer set for now rang; "online": ``client`` can be reached again."""

    kind: Literal["ready", "arrival", "timer", "online"]
    job: int = -1
    client: int = -1


class Start(NamedTuple):
    """A job to dispatch: to whom, and with how many local steps (None: the method's own)."""

    client: int
    steps: int | None = None
    slot: int = 0


class Decision(NamedTuple):
    """What to do now. admit: groups of job ids, each combined into one server update, in turn. refuse: job ids
    whose replies are dropped. start: jobs to dispatch after that. timers: virtual times at which to be asked."""

    state: Tree
    admit: Sequence[Sequence[int]] = ()
    refuse: Sequence[int] = ()
    start: Sequence[Start] = ()
    timers: Sequence[float] = ()


class View(NamedTuple):
    """What a schedule may look at.

    time: virtual seconds. version: server updates made. clients: ids that may train. busy: clients with a job
    not yet arrived or not yet decided on. in_flight: job ids not yet arrived. arrived: replies not yet decided
    on, by arrival. cohort: how many clients a round asks for. draw: see :func:`draw_cohort`.
    """

    time: float
    version: int
    clients: np.ndarray
    busy: frozenset[int]
    in_flight: frozenset[int]
    arrived: Sequence[Reply]
    cohort: int
    draw: Callable[[int], list[int]]


class Schedule(Protocol):
    """When jobs start and when the server combines."""

    def init(self) -> Tree:
        """The first state."""
        ...

    def on(self, events: Sequence[Event], view: View, state: Tree) -> Decision:
        """What to do about everything that happened at this instant."""
        ...


class Clock(Protocol):
    """How long a job takes on a client's device and links, in virtual seconds."""

    def seconds(self, client: int, *, down: int, up: int, samples: int, steps: int) -> float:
        """From dispatch to arrival, for bytes down and up and the work counted."""
        ...


class Instant:
    """Identical devices in the zero-delay limit: everything arrives at once."""

    def seconds(self, client: int, *, down: int, up: int, samples: int, steps: int) -> float:
        """0."""
        return 0.0


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

"""How long jobs are under way: as they were done, and as they may be expected to be."""

from __future__ import annotations

from consilience.core.events import Clock, Start
from consilience.core.federation import Federation
from consilience.core.messages import Job, Trip, Work
from consilience.core.method import Method, Phase
from consilience.core.outbox import Outbox
from consilience.core.tree import Tree


class Trips:
    """Ways of a run's jobs. phase, first: a round's first phase of training, and its index in the program."""

    def __init__(
        self, clock: Clock, outbox: Outbox, method: Method, federation: Federation, phase: Phase, first: int
    ) -> None:
        self._clock, self._outbox, self._method, self._federation = clock, outbox, method, federation
        self._phase, self._first = phase, first

    def of(self, job: Job, at: float, work: Work, down: int, up: int) -> Trip:
        """The way of a job dispatched at ``at``, for bytes down and up. What it computed behind its transfers takes the
        time by which it outlasts them."""

        def trip(part: float) -> Trip:
            samples, steps, flops = work.behind or (0, 0, 0.0)
            rest = 1 - part
            return self._clock.trip(
                job, at, down=down, up=up, samples=work.samples - round(rest * samples),
                steps=work.steps - round(rest * steps), flops=work.flops - rest * flops,
            )  # fmt: skip

        if work.behind is None:
            return trip(1.0)
        shortest, longest = trip(0.0), trip(1.0)
        hidden, room = longest.compute - shortest.compute, shortest.download + shortest.upload
        return trip(1 - room / hidden) if hidden > room else shortest

    def least(self, job: Job, phase: Phase, at: float, down: int) -> float:
        """Seconds that a job takes at least, whatever it will have done."""
        samples = self._method.least_samples(phase, self._federation.size(job.client), job.steps)
        return self._clock.trip(job, at, down=down, up=0, samples=samples, steps=0).seconds

    def expected(self, server: Tree, version: int, time: float, client: int, steps: int | None = None) -> float:
        """Virtual seconds that a job would take: an upload is taken to be as large as the download."""
        _, size = self._outbox.message(server, self._phase, client, 0)
        samples = self._method.one_fit(self._federation.size(client), steps)
        job = Job(-1, client, 0, 0, version, self._first, steps)
        trip = self._clock.trip(job, time, down=size, up=size, samples=samples, steps=0)
        return trip.download + trip.compute + trip.upload

    def steps_within(self, server: Tree, version: int, time: float, start: Start) -> int | None:
        """The most steps that a client's device can do in the time it has; None for all of its usual ones."""
        assert start.within is not None
        usual = self._method.steps_of(self._federation.size(start.client), start.steps)
        few, most = 1, usual
        while few < most:  # the most that fits, by bisection: more steps never take less time
            middle = (few + most + 1) // 2
            fits = self.expected(server, version, time, start.client, middle) <= start.within
            few, most = (middle, most) if fits else (few, middle - 1)
        return start.steps if few == usual else few

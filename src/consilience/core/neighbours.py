"""The phases of a run in which nodes send to each other: who gets what, what that costs, and which letters wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from consilience.core.errors import ConfigError
from consilience.core.events import TICK, Clock, RealTime
from consilience.core.exchange import Letter, inboxes, opened, posted, traffic
from consilience.core.executor import Executor
from consilience.core.messages import Job, Trip
from consilience.core.outbox import size_of
from consilience.core.snapshot import Totals
from consilience.core.tree import Tree


class Neighbours:
    """The exchange among a run's nodes. spend: told of the bytes of each client. letters: not read when the run that is
    gone on with was left."""

    def __init__(
        self, executor: Executor, clock: Clock, spend: Callable[[Totals, int], None], letters: Iterable[Letter] = ()
    ) -> None:
        self._executor, self._clock, self._spend = executor, clock, spend
        self._place = executor.worker.place
        self._mail: dict[int, list[Letter]] = {}
        for letter in letters:
            self._mail.setdefault(letter.to, []).append(letter)

    def letters(self) -> tuple[Letter, ...]:
        """All that are not read, by reader."""
        return tuple(letter for _, letters in sorted(self._mail.items()) for letter in letters)

    def together(self, jobs: Sequence[Job], version: int, time: float) -> list[Trip]:
        """Everybody sends, then everybody mixes what has come; the way of each job. Raises ConfigError."""
        weights = self._weights(version)
        sent = self._executor.exchange(jobs)
        boxes = inboxes([job.client for job in jobs], sent, weights)
        self._executor.mix(jobs, [boxes[job.client] for job in jobs])
        if isinstance(self._clock, RealTime):
            came = max(self._clock.now(), time + TICK)
            for job in jobs:
                self._clock.came(job, time, came, 0.0)
        paid = traffic(boxes, {client: size_of(message) for client, message in sent.items()})
        legs = []
        for job in jobs:
            given, got = paid[job.client]
            self._spend(Totals(given, got), job.client)
            legs.append(self._clock.trip(job, time, down=got, up=given, samples=0, steps=0)._replace(lost=None))
        return legs

    def apart(self, jobs: Sequence[Job], version: int, time: float) -> list[Trip]:
        """In gossip, for the nodes that have come to a phase now: each sends, as the topology says for the node's own
        count of rounds, to those who can be reached, and mixes what has come until now; the way of each job. Raises
        ConfigError."""
        weights = {job.id: self._weights(job.number - 1) for job in jobs}
        sent = self._executor.exchange(jobs)
        legs = [self._mailed(job, sent[job.client], weights[job.id], version, time) for job in jobs]
        boxes = []
        for job in jobs:
            node, letters = job.client, self._mail.get(job.client, [])
            box, self._mail[node] = opened(letters, node, job.phase, sent[node], weights[job.id][node], time)
            boxes.append(box)
        self._executor.mix(jobs, boxes)
        return legs

    def _weights(self, round: int) -> Mapping[int, Mapping[int, float]]:
        """Of each node, those it gives to itself and its neighbours."""
        if self._place.topology is None:
            raise ConfigError(f"{self._place.method.name} has a phase among neighbours: give a topology")
        return self._place.topology.at(round)

    def _mailed(
        self, job: Job, message: Tree, weights: Mapping[int, Mapping[int, float]], version: int, time: float
    ) -> Trip:
        """Send a node's message to those who give it a weight and can be reached; the way of that for the sender."""
        nodes = np.array([n for n, row in weights.items() if n != job.client and job.client in row], dtype=np.int64)
        takers = nodes[self._clock.online(nodes, time, version)].tolist() if len(nodes) else []
        size, trip = size_of(message), self._clock.trip
        self._spend(Totals(len(takers) * size), job.client)
        leg = trip(job, time, down=0, up=len(takers) * size, samples=0, steps=0)._replace(lost=None)
        for n in takers:
            self._spend(Totals(0, size), n)
            down = trip(job._replace(client=n), time, down=size, up=0, samples=0, steps=0).download
            letter = Letter(n, job.client, job.phase, weights[n][job.client], time + leg.seconds + down, message)
            self._mail[n] = posted(self._mail.get(n, []), letter, time)
        return leg

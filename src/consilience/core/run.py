"""The only server loop: a heap of events on a virtual clock, of which synchronous rounds are one case."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from consilience.core.errors import ConfigError, ConsilienceError
from consilience.core.evaluate import Judge, Line
from consilience.core.events import TICK, Decision, Event, Instant, RealTime, Start, View, draw_cohort
from consilience.core.exchange import Letter, inboxes, opened, posted, traffic
from consilience.core.executor import Executor
from consilience.core.failpoint import reach
from consilience.core.messages import Job, Release, Reply, Score, Summed, Trip, Work
from consilience.core.method import sums_suffice
from consilience.core.outbox import Outbox, size_of
from consilience.core.program import Program
from consilience.core.setup import Setup
from consilience.core.site import Host
from consilience.core.snapshot import Flight, Sent, Snapshot, Totals
from consilience.core.streams import philox
from consilience.core.tree import Tree
from consilience.core.worker import Call

PATIENCE = 1.0
"""Seconds between looks at who can be reached, where that is waited for."""
NOTHING = Work(None, 0, 0, math.nan)
"""What a client did that does not answer."""


class _Open(NamedTuple):
    """A job handed to the executor and not yet collected. bound: virtual time before which it cannot arrive."""

    job: Job
    rest: tuple[int, ...]
    at: float
    down: int
    rings: int
    earlier: Reply | None
    ticket: int
    order: int
    bound: float
    message: Tree


def run(executor: Executor, setup: Setup, resume: Snapshot | None = None) -> Snapshot:
    """Run to the end and return the last snapshot. The only server loop there is."""
    return Loop(executor, setup, resume).run()


class Loop:
    """The state of a run and the steps that move it."""

    def __init__(self, executor: Executor, setup: Setup, resume: Snapshot | None) -> None:
        self.executor, self.setup = executor, setup
        worker = executor.worker
        self.worker, self.method, self.federation = worker, worker.method, worker.federation
        self.place, self.program = worker.place, worker.program
        self.judge = Judge(setup.evaluation, setup.measures, self.federation, executor, setup.rounds, self.place.seed)
        self.clients = self.federation.seen
        self.when = Program(self.program, self.place.seed, setup.gossip)
        self.outbox = Outbox(self.place, self.federation, setup.clock)
        self.lines: list[Line] = []
        self.due = False
        self.began = time.perf_counter() - setup.elapsed
        self._open: list[_Open] = []
        self._asked_now: set[int] = set()
        self._laps: list[dict[str, Any]] = []
        self._timed = type(setup.clock) is not Instant
        self._real = setup.clock if isinstance(setup.clock, RealTime) else None
        self._judged: dict[int, tuple[Score, Score]] = {}
        plain = setup.release is None and all(stage is worker.check for stage in setup.stages)
        self._sum_there = plain and sums_suffice(self.method)
        self.release: Tree = None if setup.release is None else setup.release.init()
        self.mail: dict[int, list[Letter]] = {}
        if resume is None:
            self.version, self.time, self.next_job, self.order, self.started = 0, 0.0, 0, 0, 0
            self.ready, self.begun, self.chain = True, False, 0
            self.numbers: dict[int, int] = {}
            self.admitted: dict[int, int] = {}
            self.totals = Totals()
            self.spent: dict[int, Totals] = {}
            self.arrived: dict[int, Reply] = {}
            self.flights: dict[int, Flight] = {}
            self.timers: list[float] = []
            self.rings, self.watch = 0, False
            self.news: list[Event] = []
            self.server = self.method.init_server(self.host("init"))
            self.schedule = setup.schedule.init()
        else:
            self._restore(resume)

    # --- the loop ----------------------------------------------------------------------------------------------

    def run(self) -> Snapshot:
        """Move until the last round is made."""
        if not self.begun:
            self._barriers("start")
            self.begun = True
        while self.version < self.setup.rounds:
            if self.due:
                self._save()
            if self.ready:
                events, self.ready = [Event("ready")], False
            else:
                events = self._next_instant()
            events, self.news = self.news + events, []
            self._apply(self.setup.schedule.on(events, self._view(), self.schedule))
        self._leave()
        self._flush(over=True)
        last = self.snapshot()
        self.setup.recorder.checkpoint(last)
        return last

    def _next_instant(self) -> list[Event]:
        """Everything that happens at the next point in virtual time."""
        while True:
            back = self._returns()
            times = [f.arrives for f in self.flights.values()] + self.timers + [t for t, _ in back]
            if self._real is not None and self._await(min(times, default=math.inf)):
                continue
            bound = min((o.bound for o in self._open), default=math.inf)
            if self._real is None and self._open and bound <= min(times, default=math.inf):
                self._collect()  # one of these may come first; the others are computed beside it
                continue
            if min(times, default=math.inf) == math.inf:
                why = "no client comes online any more" if self.watch else "the schedule waits for nothing"
                raise ConsilienceError(
                    f"round {self.version + 1} of {self.setup.rounds} cannot be made: {why} after "
                    f"{self.time:.6g} virtual seconds"
                )
            self.time = min(times)
            events = self._land() + [Event("timer") for t in self.timers if t <= self.time]
            self.rings += sum(t <= self.time for t in self.timers)
            self.timers = [t for t in self.timers if t > self.time]
            events += [Event("online", client=client) for t, client in back if t <= self.time]
            if events:
                return events

    def _await(self, due: float) -> bool:
        """In real time: let what has come arrive now; if nothing is due until then, wait for it. Whether to look
        again at what happens next."""
        assert self._real is not None
        left = due - self._real.now()
        if left <= 0 or not (self._open or self.watch or left < math.inf):
            return False
        left = min(left, PATIENCE) if self.watch else left  # somebody may come online meanwhile
        came = set(self.executor.wait([o.ticket for o in self._open], left))
        some = [o for o in self._open if o.ticket in came]
        if some:
            reach("work")
        self._open = [o for o in self._open if o.ticket not in came]
        time = max(self._real.now(), self.time + TICK)  # another instant than the one before
        works = list(self.executor.collect([o.job for o in some], [o.ticket for o in some]))
        for o, work in zip(some, works, strict=True):
            self._real.came(o.job, o.at, time, None if work is None else work.seconds)
            self._take(o, work)
        return True

    def _land(self) -> list[Event]:
        """Let every flight that is due arrive, go on with its next phase, or be lost."""
        events: list[Event] = []
        meeting: list[Flight] = []
        for flight in sorted((f for f in self.flights.values() if f.arrives <= self.time), key=lambda f: f.order):
            job = flight.job
            del self.flights[job.id]
            self._spend(flight.cost.until(flight.leg), job.client)
            if flight.leg.lost is not None:
                self.executor.settle((), [job])
                self._lap(flight.reply, "lost")
                events.append(Event("lost", job.id, job.client))
            elif flight.phases and self.program[flight.phases[0]].over == "neighbours":
                meeting.append(flight)
            elif flight.phases:
                self._dispatch(job._replace(phase=flight.phases[0]), flight.phases[1:], resumes=flight)
            else:
                self.arrived[job.id] = flight.reply
                events.append(Event("arrival", job.id, job.client))
        for phase in sorted({flight.phases[0] for flight in meeting}):
            self._meet(phase, [flight for flight in meeting if flight.phases[0] == phase])
        return events

    def _returns(self) -> list[tuple[float, int]]:
        """When each idle client that is offline can be asked again, if the schedule wants to know."""
        if not self.watch:
            return []
        idle = self._idle(self._busy())
        away = idle[~self.setup.clock.online(idle, self.time, self.version)]
        return [(self.setup.clock.returns(int(c), self.time, self.version), int(c)) for c in away]

    def _apply(self, decision: Decision) -> None:
        """Carry out a schedule's decision: drop, combine, then start."""
        self.schedule, self.watch = decision.state, decision.watch
        self._cancel(decision.cancel)
        if decision.refuse:
            refused = [self.arrived.pop(job) for job in decision.refuse]
            self.executor.settle((), [reply.job for reply in refused])
            for reply in refused:
                self._lap(reply, "refused")
        for group in decision.admit:
            if self.version < self.setup.rounds:
                self._admit([self.arrived.pop(job) for job in group])
        if self.version >= self.setup.rounds:
            return
        if decision.start:
            self.chain = 0
            self._start(self.when.of_round(self.version)[0], decision.start)
        self.timers.extend(decision.timers)

    def _cancel(self, jobs: Sequence[int]) -> None:
        """Stop jobs in flight; what they did until now is spent."""
        if self._real is None and any(o.job.id in jobs for o in self._open):
            self._collect()
        for o in [o for o in self._open if o.job.id in jobs]:  # out in real time: nobody listens any more
            self._open.remove(o)
            self.executor.settle((), [o.job])
            self._lap(Reply(o.job, None, 0, 0, 0, 0, 0.0, math.nan, since=o.at), "cancelled", self.time)
        for job in [job for job in jobs if job in self.flights]:
            flight = self.flights.pop(job)
            leg = flight.leg._replace(lost=self.time - flight.at)
            self._spend(flight.cost.until(leg), flight.job.client)
            self.executor.settle((), [flight.job])
            self._lap(flight.reply, "cancelled", self.time)

    def _start(self, chain: tuple[int, ...], starts: Sequence[Start], again: bool = False) -> list[int]:
        """Dispatch a chain's first phase; returns job ids. again: a later chain of the same round, so the same job
        numbers."""
        jobs: list[Job] = []
        aside = not self.program[chain[0]].inner  # no round's training, so nothing before and after it
        for start in sorted(starts, key=lambda s: s.client):
            number = self.numbers.get(start.client, 0) + (0 if again else 1)
            self.numbers[start.client] = number
            jobs.append(
                Job(
                    self.next_job + len(jobs),
                    start.client,
                    number,
                    self.admitted.get(start.client, 0),
                    self.version,
                    chain[0],
                    start.steps if start.within is None else self._steps_within(start),
                    start.slot,
                    not aside and self.judge.wants_clients(self.version + 1),
                )
            )
        self.next_job += len(jobs)
        self._asked_now |= {job.client for job in jobs}
        self.started += 0 if again else len(jobs)
        if self.program[chain[0]].over == "neighbours":
            self._exchange(jobs)
        else:
            for job, ticket in zip(jobs, self._submit_all(jobs, chain), strict=True):
                self._dispatch(job, chain[1:], ticket)
        self.news += [Event("start", job.id, job.client) for job in jobs]
        return [job.id for job in jobs]

    def _submit_all(self, jobs: Sequence[Job], chain: tuple[int, ...]) -> Sequence[int | None]:
        """Hand over jobs that begin together, if their updates can be added up where they are made."""
        phase, none = self.program[chain[0]], [None] * len(jobs)
        if not jobs or len(chain) > 1 or not self._sum_there:
            return none
        messages = [self.outbox.message(self.server, phase, job.client, job.slot)[0] for job in jobs]
        weights = self.method.sums([self._asking(job) for job in jobs])
        if weights is None or any(message is not messages[0] for message in messages):
            return none
        return self.executor.submit_all(jobs, messages[0], weights)

    def _dispatch(
        self, job: Job, rest: tuple[int, ...], ticket: int | None = None, resumes: Flight | None = None
    ) -> None:
        """Send a job out; it is computed when its arrival could be the next thing to happen. ticket: if the executor
        has got it already."""
        phase = self.program[job.phase]
        message, down = self.outbox.message(self.server, phase, job.client, job.slot)
        if ticket is None:
            ticket = self.executor.submit(job, message, resumes=resumes is not None)
        self._spend(Totals(bytes_down=down), job.client)
        least = self.method.least_samples(phase, self.federation.size(job.client), job.steps)
        bound = 0.0
        if self._real is None:
            bound = self.setup.clock.trip(job, self.time, down=down, up=0, samples=least, steps=0).seconds
        self.order += 1
        self._open.append(
            _Open(
                job, rest, self.time, down, self.rings, None if resumes is None else resumes.reply, ticket, self.order,
                self.time + bound, message,
            )
        )  # fmt: skip

    def _collect(self) -> None:
        """Compute everything that was dispatched, together, and let it arrive at its time."""
        opened, self._open = self._open, []
        if not opened:
            return
        reach("work")
        works = self.executor.collect([o.job for o in opened], [o.ticket for o in opened])
        for o, work in zip(opened, works, strict=True):
            self._take(o, work)

    def _leg(self, o: _Open, work: Work, up: int) -> Trip:
        """A job's way. What it computed behind its transfers takes the time by which it outlasts them."""

        def trip(part: float) -> Trip:
            samples, steps, flops = work.behind or (0, 0, 0.0)
            rest = 1 - part
            return self.setup.clock.trip(
                o.job, o.at, down=o.down, up=up, samples=work.samples - round(rest * samples),
                steps=work.steps - round(rest * steps), flops=work.flops - rest * flops,
            )  # fmt: skip

        if work.behind is None:
            return trip(1.0)
        shortest, longest = trip(0.0), trip(1.0)
        hidden, room = longest.compute - shortest.compute, shortest.download + shortest.upload
        return trip(1 - room / hidden) if hidden > room else shortest

    def _take(self, o: _Open, work: Work | None) -> None:
        """Let what a job did arrive at its time. work: None if its client does not answer."""
        work = work or NOTHING
        job, up, samples, steps, before = o.job, self._size(work.update), work.samples, work.steps, work.before
        leg = self._leg(o, work, up)
        if o.at + leg.seconds < o.bound:
            raise ConsilienceError(
                f"{self.method.name}: client {job.client} computed {samples} samples, fewer than least_samples says"
            )
        cost, since, trip, rings = Totals(up, 0, samples, steps, work.flops), o.at, leg, o.rings
        if o.earlier is not None:
            since, rings, before = o.earlier.since, o.earlier.rings, o.earlier.before
            samples, steps, trip = samples + o.earlier.trained, steps + o.earlier.steps, o.earlier.trip + leg
        arrives = o.at + leg.seconds
        reply = Reply(
            job, work.update if leg.lost is None else None, self.federation.size(job.client), samples, steps, 0,
            arrives - since, work.loss, before, work.after, since, trip, rings,
        )  # fmt: skip
        self.flights[job.id] = Flight(job, o.rest, o.at, arrives, o.order, reply, cost, leg)

    def _admit(self, group: Sequence[Reply]) -> None:
        """Combine a group of replies into one server update, and finish the round if that was its last chain."""
        replies = sorted(
            (r._replace(staleness=self.version - r.job.version, rings=self.rings - r.rings) for r in group),
            key=lambda r: (r.job.client, r.job.id),
        )
        chains = self.when.of_round(self.version)
        good = self._combine(chains[self.chain], replies)
        if good and self.chain + 1 < len(chains):  # with nobody left, the round ends here
            self.chain += 1
            going = self.method.proceed(self.program[chains[self.chain - 1][-1]], self.server)
            starts = [
                Start(r.job.client, r.job.steps, r.job.slot) for r in good if going is None or r.job.client in going
            ]
            self._start(chains[self.chain], starts, again=True)
            return
        self.version += 1
        self.outbox.forget()
        self._asked_now = set()
        self.chain, self.started, self.ready = 0, 0, True
        if self.version == self.setup.rounds:
            self._barriers("end")
        self._round_done(replies)

    def _combine(self, chain: tuple[int, ...], replies: Sequence[Reply]) -> list[Reply]:
        """Stages, then aggregation, then commit or roll back. Returns the replies that were combined."""
        phase, good = self.program[chain[-1]], list(replies)
        reach("aggregate")
        if phase.over != "neighbours":
            summed = None if self.setup.release is not None else self._summed(good)
            if summed is None:
                good = self._passed([self._whole(reply) for reply in good])
            given = good if summed is None else [summed]
            cohort = [reply.job.client for reply in replies]
            if self.setup.release is not None:
                given, cohort = self._released(self.setup.release, chain[-1], good), []
            if given:
                call = Call("aggregate", (chain[-1], self.version, self.server, given, cohort))
                here = self.worker.run if not self.method.trains_on_server else self.executor.run
                self.server, *computed = here(call)
                self._spend(Totals(0, 0, *computed))
        kept_ids = {reply.job.id for reply in good}
        for reply in replies:
            self._lap(reply, "combined" if reply.job.id in kept_ids else "refused")
        for reply in good:
            self.admitted[reply.job.client] = reply.job.number
            if reply.before is not None and reply.after is not None:
                first = self._judged.get(reply.job.client, (reply.before, reply.after))[0]
                self._judged[reply.job.client] = (first, reply.after)
        self.executor.settle(
            [reply.job for reply in good], [reply.job for reply in replies if reply.job.id not in kept_ids]
        )
        return good

    def _passed(self, replies: list[Reply]) -> list[Reply]:
        """The replies that every stage lets through."""
        for stage in self.setup.stages:
            kept, refusals = stage(replies, self.server)
            replies = list(kept)
            if refusals:
                self.setup.recorder.refused(self.version + 1, refusals)
        return replies

    def _released(self, release: Release, phase: int, replies: Sequence[Reply]) -> list[Reply]:
        """One reply with what may be known of these, and nothing else of them."""
        update, self.release, traffic = release(replies, sorted(self._asked_now), self.version, self.release)
        for client, (up, down) in traffic.items():
            self._spend(Totals(up, down), client)
        nobody = Job(-1, -1, 0, 0, self.version, phase)
        return [] if update is None else [Reply(nobody, update, 1, 0, 0, 0, 0.0, math.nan)]

    def _size(self, update: Tree) -> int:
        """Bytes of an update as it is sent."""
        if self.setup.release is None or update is None:
            return size_of(update)
        return self.setup.release.size(update)

    def _summed(self, replies: Sequence[Reply]) -> Reply | None:
        """One reply that holds the sums of these, if they were added up where they were made."""
        sums = self.executor.sums([reply.job for reply in replies])
        made = self.method.sends(self.program[replies[0].job.phase]) if replies else None
        if sums is None or not isinstance(made, type):
            return None
        return replies[0]._replace(update=made(**sums), samples=sum(reply.samples for reply in replies))

    def _whole(self, reply: Reply) -> Reply:
        """A reply with its update, which is made once more if it was only added up."""
        if not isinstance(reply.update, Summed):
            return reply
        self._sum_there = False  # this run combines otherwise than it starts, or has clients that err
        return reply._replace(update=self.executor.redo(reply.job).update)

    def _exchange(self, jobs: Sequence[Job]) -> None:
        """A phase among neighbours: everybody sends, then everybody mixes what has come."""
        topology = self.place.topology
        if topology is None:
            raise ConfigError(f"{self.method.name} has a phase among neighbours: give a topology")
        sent = self.executor.exchange(jobs)
        boxes = inboxes([job.client for job in jobs], sent, topology.at(self.version))
        self.executor.mix(jobs, [boxes[job.client] for job in jobs])
        if self._real is not None:
            time = max(self._real.now(), self.time + TICK)
            for job in jobs:
                self._real.came(job, self.time, time, 0.0)
        paid = traffic(boxes, {client: size_of(message) for client, message in sent.items()})
        for job in jobs:
            given, got = paid[job.client]
            self._spend(Totals(given, got), job.client)
            leg = self.setup.clock.trip(job, self.time, down=got, up=given, samples=0, steps=0)._replace(lost=None)
            reply = Reply(
                job, None, self.federation.size(job.client), 0, 0, 0, leg.seconds, float("nan"),
                since=self.time, trip=leg, rings=self.rings,
            )  # fmt: skip
            self.order += 1
            self.flights[job.id] = Flight(job, (), self.time, self.time + leg.seconds, self.order, reply, Totals(), leg)

    def _meet(self, phase: int, flights: Sequence[Flight]) -> None:
        """A phase among neighbours in gossip, for nodes that have come to it now: each sends, as the topology says for
        the node's own count of rounds, to those who can be reached, and mixes what has come until now."""
        topology = self.place.topology
        if topology is None:
            raise ConfigError(f"{self.method.name} has a phase among neighbours: give a topology")
        jobs = [flight.job._replace(phase=phase) for flight in flights]
        sent = self.executor.exchange(jobs)
        legs = [self._mail(job, sent[job.client], topology.at(job.number - 1)) for job in jobs]
        boxes = []
        for job in jobs:
            row, letters = topology.at(job.number - 1)[job.client], self.mail.get(job.client, [])
            box, self.mail[job.client] = opened(letters, job.client, phase, sent[job.client], row, self.time)
            boxes.append(box)
        self.executor.mix(jobs, boxes)
        for job, flight, leg in zip(jobs, flights, legs, strict=True):
            before, arrives = flight.reply, self.time + leg.seconds
            reply = before._replace(job=job, update=None, seconds=arrives - before.since, trip=before.trip + leg)
            self.order += 1
            self.flights[job.id] = Flight(job, flight.phases[1:], self.time, arrives, self.order, reply, Totals(), leg)

    def _mail(self, job: Job, message: Tree, weights: Mapping[int, Mapping[int, float]]) -> Trip:
        """Send a node's message to those who give it a weight and can be reached; the way of that for the sender."""
        takers = [n for n, row in weights.items() if n != job.client and job.client in row]
        here = self._online(np.array(takers, dtype=np.int64)).tolist() if takers else []
        size, trip = size_of(message), self.setup.clock.trip
        self._spend(Totals(len(here) * size), job.client)
        leg = trip(job, self.time, down=0, up=len(here) * size, samples=0, steps=0)._replace(lost=None)
        for n in here:
            self._spend(Totals(0, size), n)
            down = trip(job._replace(client=n), self.time, down=size, up=0, samples=0, steps=0).download
            letter = Letter(n, job.client, job.phase, weights[n][job.client], self.time + leg.seconds + down, message)
            self.mail[n] = posted(self.mail.get(n, []), letter, self.time)
        return leg

    def _barriers(self, when: str) -> None:
        """The phases before the first round or after the last: everybody takes part, everybody is waited for."""
        for chain in self.when.at(when):
            if when == "end":
                self._leave()
            jobs = self._start(chain, [Start(int(client)) for client in self.clients], again=when == "end")
            while any(job in self.flights for job in jobs) or self._open:
                self._next_instant()
            replies = [self.arrived.pop(job) for job in jobs if job in self.arrived]
            self._combine(chain, sorted(replies, key=lambda r: r.job.client))

    def _leave(self) -> None:
        """The run is over: nobody waits for what is still in flight or not decided on."""
        for reply in self.arrived.values():
            self._lap(reply, "unfinished")
        under_way = [(o.job, o.at if o.earlier is None else o.earlier.since) for o in self._open]
        under_way += [(flight.job, flight.reply.since) for flight in self.flights.values()]
        for job, since in sorted(under_way):  # the same line whether or not it was computed already
            self._lap(Reply(job, None, 0, 0, 0, 0, 0.0, math.nan, since=since), "unfinished", self.time)
        self.executor.settle((), [reply.job for reply in self.arrived.values()])
        self.executor.settle((), [flight.job for flight in self.flights.values()])
        self._open, self.arrived, self.flights, self.news, self.timers = [], {}, {}, [], []

    def _lap(self, reply: Reply, state: str, end: float | None = None) -> None:
        """A line of the timeline: a job ended, now or at its arrival."""
        if not self._timed:
            return
        job, trip = reply.job, reply.trip
        arrived = reply.since + reply.seconds
        self._laps.append({
            "job": job.id, "client": job.client, "phase": self.program[job.phase].name, "state": state,
            "start": reply.since, "end": arrived if end is None else end,
            "wait": trip.wait, "download": trip.download, "compute": trip.compute, "upload": trip.upload,
            "steps": reply.steps, "staleness": reply.staleness, "round": self.version + 1,
        })  # fmt: skip

    # --- after a round -----------------------------------------------------------------------------------------

    def _round_done(self, replies: Sequence[Reply]) -> None:
        judged, self._judged = self._judged, {}
        if self.judge.wants(self.version):
            self._flush()
            wall = time.perf_counter() - self.began
            line = {"round": self.version, "wall_s": wall, "virtual_s": self.time, **self.totals._asdict()}
            losses = [reply.loss * reply.samples for reply in replies if reply.loss == reply.loss]
            weight = sum(reply.samples for reply in replies if reply.loss == reply.loss)
            if weight and self.setup.release is None:
                line["train_loss"] = sum(losses) / weight
            numbers = self.method.report(self.server)
            if numbers:
                line["method"] = dict(numbers)
            if self.setup.release is not None:
                line["privacy"] = dict(self.setup.release.report(self.version, self.release))
            self.lines.append(
                self.judge.begin(
                    line, self.server, partial(self.outbox.deployed, self.server), self._asked, judged, self.spent
                )
            )
        every = self.setup.checkpoint_every
        self.due |= every > 0 and self.version % every == 0  # several groups may be combined at one instant

    def _flush(self, over: bool = False) -> None:
        """Finish lines under way. The last one stays open while the next round is computed, so its seconds are those
        at which its round was made; when the run is over, they are those of the run, with its last judgement."""
        for line in self.lines:
            reach("evaluate")
            found, clients = self.judge.finish(line)
            if over:
                found["wall_s"] = time.perf_counter() - self.began
            self.setup.recorder.line(found, clients)
        self.lines = []
        if self._laps:
            self.setup.recorder.jobs(self._laps)
            self._laps = []

    def _save(self) -> None:
        if self._real is None:
            self._collect()
        self._flush()
        self.due = False
        self.setup.recorder.checkpoint(self.snapshot())

    def snapshot(self) -> Snapshot:
        """The state now."""
        self.arrived = {job: self._whole(reply) for job, reply in self.arrived.items()}
        self.flights = {job: f._replace(reply=self._whole(f.reply)) for job, f in self.flights.items()}
        return Snapshot(
            self.version, self.time, self.next_job, self.order, self.started, self.ready, self.begun, self.chain,
            self.server, self.schedule, dict(sorted(self.numbers.items())), dict(sorted(self.admitted.items())),
            self.totals, dict(sorted(self.spent.items())), tuple(self.arrived.values()), tuple(self.flights.values()),
            tuple(self.timers),
            self.rings, tuple(self.news), self.watch,
            self.executor.states(), dict(self.executor.pending()),
            tuple(Sent(o.job, o.rest, o.at, o.down, o.rings, o.earlier, o.order, o.message) for o in self._open),
            self.release, tuple(letter for _, letters in sorted(self.mail.items()) for letter in letters),
        )  # fmt: skip

    def _restore(self, s: Snapshot) -> None:
        self.version, self.time, self.next_job, self.order = s.version, s.time, s.next_job, s.order
        self.started, self.ready, self.begun, self.chain = s.started, s.ready, s.begun, s.chain
        self.server, self.schedule, self.totals, self.spent = s.server, s.schedule, s.totals, dict(s.spent)
        self.numbers, self.admitted, self.timers = dict(s.numbers), dict(s.admitted), list(s.timers)
        self.arrived = {reply.job.id: reply for reply in s.arrived}
        self.flights = {flight.job.id: flight for flight in s.flights}
        self.rings, self.news, self.watch, self.release = s.rings, list(s.news), s.watch, s.release
        for letter in s.mail:
            self.mail.setdefault(letter.to, []).append(letter)
        self.executor.restore(s.states, s.pending)
        for o in s.out:
            ticket = self.executor.submit(o.job, o.message, resumes=o.job.id in s.pending)
            self._open.append(_Open(*o[:6], ticket, o.order, o.at, o.message))

    # --- small helpers -----------------------------------------------------------------------------------------

    def host(self, phase: str) -> Host:
        """The server's site at this version."""
        return self.worker.host(self.version, phase)

    def _busy(self) -> frozenset[int]:
        """Clients with a job not yet arrived or not yet decided on."""
        jobs = [o.job for o in self._open] + [f.job for f in self.flights.values()]
        return frozenset(job.client for job in jobs) | {r.job.client for r in self.arrived.values()}

    def _idle(self, busy: frozenset[int]) -> np.ndarray:
        return self.clients if not busy else self.clients[~np.isin(self.clients, list(busy))]

    def _online(self, clients: np.ndarray) -> np.ndarray:
        here = self.setup.clock.online(clients, self.time, self.version)
        return clients if here.all() else clients[here]

    def _view(self) -> View:
        busy = self._busy()
        running = {o.job.id: o.job for o in self._open} | {f.job.id: f.job for f in self.flights.values()}
        view = View(
            self.time, self.version, self.clients, busy, frozenset(running), tuple(self.arrived.values()),
            self.setup.cohort, lambda size: [], running, self._expect,
        )  # fmt: skip
        drawn: list[int] = []
        sampled = None if self.setup.release is None else self.setup.release.draw(self.version, self.clients)

        def draw(size: int, among: Sequence[int] | None = None) -> list[int]:
            if sampled is not None:
                return list(sampled)
            chosen = self.method.select(self.server, view) if among is None else None
            if chosen is not None:
                wanted = np.array(sorted(int(c) for c in chosen if int(c) not in busy), dtype=np.int64)
                return [int(c) for c in self._online(wanted)]
            rng = philox(self.place.seed, "cohort", self.version, self.started, *drawn)
            drawn.append(size)  # another draw of the same decision is another stream
            if among is None and not self._timed:
                return draw_cohort(rng, self.clients, size, busy)  # costs what is drawn, not what there is
            idle = self._online(self._idle(busy))
            return draw_cohort(rng, idle if among is None else idle[np.isin(idle, list(among))], size)

        return view._replace(draw=draw, sampled=sampled is not None)

    def _expect(self, client: int, steps: int | None = None) -> float:
        """Virtual seconds that a job would take: an upload is taken to be as large as the download."""
        phase = self.program[self.when.first]
        _, size = self.outbox.message(self.server, phase, client, 0)
        samples = self.method.one_fit(self.federation.size(client), steps)
        job = Job(-1, client, 0, 0, self.version, self.when.first, steps)
        trip = self.setup.clock.trip(job, self.time, down=size, up=size, samples=samples, steps=0)
        return trip.download + trip.compute + trip.upload

    def _steps_within(self, start: Start) -> int | None:
        """The most steps that a client's device can do in the time it has; None for all of its usual ones."""
        assert start.within is not None
        rows = self.federation.size(start.client)
        usual = self.method.steps_of(rows, start.steps)
        few, most = 1, usual
        while few < most:  # the most that fits, by bisection: more steps never take less time
            middle = (few + most + 1) // 2
            fits = self._expect(start.client, middle) <= start.within
            few, most = (middle, most) if fits else (few, middle - 1)
        return start.steps if few == usual else few

    def _asking(self, job: Job) -> Reply:
        """What is known of a reply when its job begins."""
        nothing = (0, 0, 0, 0.0, math.nan)
        return Reply(job, None, self.federation.size(job.client), *nothing)

    def _asked(self, client: int) -> Job:
        """A job as if the client were asked now; for judging only."""
        number = self.numbers.get(client, 0) + 1
        phase = self.when.first
        return Job(-1, client, number, self.admitted.get(client, 0), self.version, phase)

    def _spend(self, more: Totals, client: int | None = None) -> None:
        """Count what the server has spent, or a client."""
        self.totals = self.totals.plus(more)
        if client is not None:
            self.spent[client] = self.spent.get(client, Totals()).plus(more)

"""The only server loop: a heap of events on a virtual clock, of which synchronous rounds are one case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from consilience.core.books import Books
from consilience.core.draw import Draw, idle_of
from consilience.core.errors import ConsilienceError
from consilience.core.evaluate import Judge
from consilience.core.events import TICK, Decision, Event, RealTime, Start, View
from consilience.core.executor import Executor
from consilience.core.failpoint import reach
from consilience.core.intake import Intake
from consilience.core.messages import Job, Reply, Trip, Work
from consilience.core.neighbours import Neighbours
from consilience.core.outbox import Outbox
from consilience.core.program import Program
from consilience.core.setup import Setup
from consilience.core.site import Host
from consilience.core.snapshot import Flight, Sent, Snapshot, Totals
from consilience.core.tree import Tree
from consilience.core.trips import Trips
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
        first = self.when.first
        self.trips = Trips(setup.clock, self.outbox, self.method, self.federation, self.program[first], first)
        self.books = Books(setup, self.judge, self.outbox, self.method, self.program)
        self.intake = Intake(executor, setup, self.books.spend)
        self.neighbours = Neighbours(executor, setup.clock, self.books.spend, () if resume is None else resume.mail)
        self.due = False
        self._open: list[_Open] = []
        self._asked_now: set[int] = set()
        self._real = setup.clock if isinstance(setup.clock, RealTime) else None
        if resume is None:
            self.version, self.time, self.next_job, self.order, self.started = 0, 0.0, 0, 0, 0
            self.ready, self.begun, self.chain = True, False, 0
            self.numbers: dict[int, int] = {}
            self.admitted: dict[int, int] = {}
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
        self.books.flush(over=True)
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
            self.books.spend(flight.cost.until(flight.leg), job.client)
            if flight.leg.lost is not None:
                self.executor.settle((), [job])
                self.books.lap(flight.reply, "lost", self.version)
                events.append(Event("lost", job.id, job.client))
            elif flight.phases and self.program[flight.phases[0]].over == "neighbours":
                meeting.append(flight)
            elif flight.phases:
                self._dispatch(job._replace(phase=flight.phases[0]), flight.phases[1:], resumes=flight)
            else:
                self.arrived[job.id] = flight.reply
                events.append(Event("arrival", job.id, job.client))
        for phase in sorted({flight.phases[0] for flight in meeting}):
            flights = [flight for flight in meeting if flight.phases[0] == phase]
            jobs = [flight.job._replace(phase=phase) for flight in flights]
            legs = self.neighbours.apart(jobs, self.version, self.time)
            for job, flight, leg in zip(jobs, flights, legs, strict=True):
                before = flight.reply
                seconds = self.time + leg.seconds - before.since
                reply = before._replace(job=job, update=None, seconds=seconds, trip=before.trip + leg)
                self._fly(reply, flight.phases[1:], leg)
        return events

    def _returns(self) -> list[tuple[float, int]]:
        """When each idle client that is offline can be asked again, if the schedule wants to know."""
        if not self.watch:
            return []
        idle = idle_of(self.clients, self._busy())
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
                self.books.lap(reply, "refused", self.version)
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
            self.books.lap(
                Reply(o.job, None, 0, 0, 0, 0, 0.0, math.nan, since=o.at), "cancelled", self.version, self.time
            )
        for job in [job for job in jobs if job in self.flights]:
            flight = self.flights.pop(job)
            leg = flight.leg._replace(lost=self.time - flight.at)
            self.books.spend(flight.cost.until(leg), flight.job.client)
            self.executor.settle((), [flight.job])
            self.books.lap(flight.reply, "cancelled", self.version, self.time)

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
                    start.steps
                    if start.within is None
                    else self.trips.steps_within(self.server, self.version, self.time, start),
                    start.slot,
                    not aside and self.judge.wants_clients(self.version + 1),
                )
            )
        self.next_job += len(jobs)
        self._asked_now |= {job.client for job in jobs}
        self.started += 0 if again else len(jobs)
        if self.program[chain[0]].over == "neighbours":
            for job, leg in zip(jobs, self.neighbours.together(jobs, self.version, self.time), strict=True):
                size, seconds = self.federation.size(job.client), leg.seconds
                reply = Reply(
                    job, None, size, 0, 0, 0, seconds, math.nan, since=self.time, trip=leg, rings=self.rings
                )  # fmt: skip
                self._fly(reply, (), leg)
        else:
            for job, ticket in zip(jobs, self._submit_all(jobs, chain), strict=True):
                self._dispatch(job, chain[1:], ticket)
        self.news += [Event("start", job.id, job.client) for job in jobs]
        return [job.id for job in jobs]

    def _submit_all(self, jobs: Sequence[Job], chain: tuple[int, ...]) -> Sequence[int | None]:
        """Hand over jobs that begin together, if their updates can be added up where they are made."""
        phase, none = self.program[chain[0]], [None] * len(jobs)
        if not jobs or len(chain) > 1 or not self.intake.sums:
            return none
        messages = [self.outbox.message(self.server, phase, job.client, job.slot)[0] for job in jobs]
        weights = self.intake.weights(jobs)
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
        self.books.spend(Totals(bytes_down=down), job.client)
        bound = 0.0 if self._real is not None else self.trips.least(job, phase, self.time, down)
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

    def _take(self, o: _Open, work: Work | None) -> None:
        """Let what a job did arrive at its time. work: None if its client does not answer."""
        work = work or NOTHING
        job, up, samples, steps, before = o.job, self.intake.size(work.update), work.samples, work.steps, work.before
        leg = self.trips.of(job, o.at, work, o.down, up)
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

    def _fly(self, reply: Reply, phases: tuple[int, ...], leg: Trip) -> None:
        """Let what nodes did with each other now arrive when the messages have; its bytes are counted already."""
        self.order += 1
        arrives = self.time + leg.seconds
        self.flights[reply.job.id] = Flight(reply.job, phases, self.time, arrives, self.order, reply, Totals(), leg)

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
        self.books.round(self.version, self.time, self.server, replies, self._asked, self.intake.report)
        every = self.setup.checkpoint_every
        self.due |= every > 0 and self.version % every == 0  # several groups may be combined at one instant

    def _combine(self, chain: tuple[int, ...], replies: Sequence[Reply]) -> list[Reply]:
        """Stages, then aggregation, then commit or roll back. Returns the replies that were combined."""
        phase, good = self.program[chain[-1]], list(replies)
        reach("aggregate")
        if phase.over != "neighbours":
            good, given, cohort = self.intake.take(replies, chain[-1], self.version, self.server, self._asked_now)
            if given:
                call = Call("aggregate", (chain[-1], self.version, self.server, given, cohort))
                here = self.worker.run if not self.method.trains_on_server else self.executor.run
                self.server, *computed = here(call)
                self.books.spend(Totals(0, 0, *computed))
        kept_ids = {reply.job.id for reply in good}
        for reply in replies:
            self.books.lap(reply, "combined" if reply.job.id in kept_ids else "refused", self.version)
        for reply in good:
            self.admitted[reply.job.client] = reply.job.number
            self.books.judged(reply)
        self.executor.settle(
            [reply.job for reply in good], [reply.job for reply in replies if reply.job.id not in kept_ids]
        )
        return good

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
            self.books.lap(reply, "unfinished", self.version)
        under_way = [(o.job, o.at if o.earlier is None else o.earlier.since) for o in self._open]
        under_way += [(flight.job, flight.reply.since) for flight in self.flights.values()]
        for job, since in sorted(under_way):  # the same line whether or not it was computed already
            self.books.lap(
                Reply(job, None, 0, 0, 0, 0, 0.0, math.nan, since=since), "unfinished", self.version, self.time
            )
        self.executor.settle((), [reply.job for reply in self.arrived.values()])
        self.executor.settle((), [flight.job for flight in self.flights.values()])
        self._open, self.arrived, self.flights, self.news, self.timers = [], {}, {}, [], []

    # --- what is remembered ------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self._real is None:
            self._collect()
        self.books.flush()
        self.due = False
        self.setup.recorder.checkpoint(self.snapshot())

    def snapshot(self) -> Snapshot:
        """The state now."""
        self.arrived = {job: self.intake.whole(reply) for job, reply in self.arrived.items()}
        self.flights = {job: f._replace(reply=self.intake.whole(f.reply)) for job, f in self.flights.items()}
        return Snapshot(
            self.version, self.time, self.next_job, self.order, self.started, self.ready, self.begun, self.chain,
            self.server, self.schedule, dict(sorted(self.numbers.items())), dict(sorted(self.admitted.items())),
            self.books.totals, dict(sorted(self.books.spent.items())), tuple(self.arrived.values()),
            tuple(self.flights.values()), tuple(self.timers), self.rings, tuple(self.news), self.watch,
            self.executor.states(), dict(self.executor.pending()),
            tuple(Sent(o.job, o.rest, o.at, o.down, o.rings, o.earlier, o.order, o.message) for o in self._open),
            self.intake.state, self.neighbours.letters(),
        )  # fmt: skip

    def _restore(self, s: Snapshot) -> None:
        self.version, self.time, self.next_job, self.order = s.version, s.time, s.next_job, s.order
        self.started, self.ready, self.begun, self.chain = s.started, s.ready, s.begun, s.chain
        self.server, self.schedule, self.intake.state = s.server, s.schedule, s.release
        self.books.totals, self.books.spent = s.totals, dict(s.spent)
        self.numbers, self.admitted, self.timers = dict(s.numbers), dict(s.admitted), list(s.timers)
        self.arrived = {reply.job.id: reply for reply in s.arrived}
        self.flights = {flight.job.id: flight for flight in s.flights}
        self.rings, self.news, self.watch = s.rings, list(s.news), s.watch
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

    def _view(self) -> View:
        running = {o.job.id: o.job for o in self._open} | {f.job.id: f.job for f in self.flights.values()}
        view = View(
            self.time, self.version, self.clients, self._busy(), frozenset(running), tuple(self.arrived.values()),
            self.setup.cohort, lambda size: [], running,
            partial(self.trips.expected, self.server, self.version, self.time),
        )  # fmt: skip
        draw = Draw(self.setup, self.method, self.server, view, self.place.seed, self.started)
        return view._replace(draw=draw, sampled=draw.sampled is not None)

    def _asked(self, client: int) -> Job:
        """A job as if the client were asked now; for judging only."""
        number = self.numbers.get(client, 0) + 1
        phase = self.when.first
        return Job(-1, client, number, self.admitted.get(client, 0), self.version, phase)

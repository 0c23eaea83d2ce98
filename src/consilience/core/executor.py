"""Where client work runs. An executor never changes a result: it runs pure calls and owns client state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from consilience.core.messages import Job, Work
from consilience.core.reduce import BLOCK, sum_blocks
from consilience.core.states import States, Stored
from consilience.core.tree import Tree
from consilience.core.worker import Block, Call, Worker


class Executor(ABC):
    """Runs calls on a worker, here or elsewhere, and keeps client state.

    New client state is pending until its job is admitted: :meth:`settle` commits or rolls back. A committed state may
    be on file: a call that needs it has a ``Stored`` among its arguments, until :func:`ready` reads it.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._states = States()
        self._pending: dict[int, Tree] = {}
        """New state by job id."""
        self._cohorts: dict[int, _Cohort] = {}
        """Of jobs whose updates are added up where they run, by job id."""

    pays_from = 0
    """How many jobs at once are worth giving out in blocks, so that updates stay where they were made; 0: never."""

    def keep(self, states: States) -> None:
        """Keep client states there from now on; before anything runs."""
        self._states = states

    @abstractmethod
    def begin(self, call: Call) -> int:
        """Queue a call; returns its ticket. It is made :func:`ready` as late as possible."""

    @abstractmethod
    def finish(self, tickets: Sequence[int]) -> list[Tree]:
        """The results of these calls, in this order; waits for them."""

    def wait(self, tickets: Sequence[int], seconds: float) -> Sequence[int]:
        """In real time: which of these can be finished without waiting; waits for one at most so long."""
        return tickets

    def close(self) -> None:  # noqa: B027 (an executor in this process has nothing to close)
        """Let go of everything."""

    def run(self, call: Call) -> Tree:
        """The result of one call."""
        return self.finish([self.begin(call)])[0]

    def submit(self, job: Job, message: Tree, *, resumes: bool = False) -> int:
        """Queue a client's work. resumes: it goes on with the pending state of an earlier phase of this job."""
        state = self._pending[job.id] if resumes else self._states.pin(job.client)
        cost = 3.0 * self.worker.federation.size(job.client)  # a backward pass costs about two forward passes
        return self.begin(Call("train", (job, state), message, cost))

    def submit_all(
        self, jobs: Sequence[Job], message: Tree, weights: Mapping[str, Sequence[float]] | None
    ) -> list[int]:
        """Queue the work of jobs that begin together, sorted by client. weights: of each field of their updates, if
        all that is wanted of them are the sums: :meth:`sums` has them then, and the works bring none."""
        if weights is None or not self.pays_from or len(jobs) < self.pays_from:
            return [self.submit(job, message) for job in jobs]
        cohort = _Cohort(list(jobs), message, [])
        for start in range(0, len(jobs), BLOCK):
            some = jobs[start : start + BLOCK]
            states = tuple(self._states.pin(job.client) for job in some)
            mine = {name: list(of[start : start + BLOCK]) for name, of in weights.items()}
            cost = 3.0 * sum(self.worker.federation.size(job.client) for job in some)
            cohort.tickets.append(self.begin(Call("block", (tuple(some), states, mine), message, cost)))
        self._cohorts.update((job.id, cohort) for job in jobs)
        return [cohort.tickets[i // BLOCK] for i in range(len(jobs))]

    def sums(self, jobs: Sequence[Job]) -> dict[str, Tree] | None:
        """The weighted sums of each field of the updates of these jobs, if exactly they were submitted together in
        blocks and every update is right. To be asked once."""
        cohort = self._cohorts.get(jobs[0].id) if jobs else None
        if cohort is None or [job.id for job in cohort.jobs] != [job.id for job in jobs]:
            return None
        parts = [cohort.blocks[ticket].sums for ticket in cohort.tickets]
        if any(part is None for part in parts):
            return None
        return {name: sum_blocks([part[name] for part in parts if part is not None]) for name in parts[0] or ()}

    def redo(self, job: Job) -> Work:
        """The work of a job that was done in a block, once more, with its update."""
        cohort = self._cohorts[job.id]
        work = next(self.collect([job], [self.submit(job, cohort.message)], again=True))
        assert work is not None
        return work

    def collect(self, jobs: Sequence[Job], tickets: Sequence[int], again: bool = False) -> Iterator[Work | None]:
        """What these jobs did, one by one: what is asked for waits, the others go on. Their new states are pending
        from then on. None: its client did not answer. again: by themselves, though they had been done in a block."""
        for job, ticket in zip(jobs, tickets, strict=True):
            cohort = None if again else self._cohorts.get(job.id)
            done = self.finish([ticket])[0] if cohort is None else cohort.take(job, ticket, self)
            if done is None:  # a client far away that did not answer
                yield None
                continue
            work, self._pending[job.id] = done
            yield work

    def exchange(self, jobs: Sequence[Job]) -> dict[int, Tree]:
        """What the nodes of these jobs send to their neighbours, by client id."""
        tickets = [self.begin(Call("send", (job, self._state(job)))) for job in jobs]
        return {job.client: sent for job, sent in zip(jobs, self.finish(tickets), strict=True)}

    def mix(self, jobs: Sequence[Job], inboxes: Sequence[Tree]) -> None:
        """Let nodes combine what they have got; their new states are pending from now on."""
        calls = [Call("mix", (job, inbox, self._state(job))) for job, inbox in zip(jobs, inboxes, strict=True)]
        for job, state in zip(jobs, self.finish([self.begin(call) for call in calls]), strict=True):
            self._pending[job.id] = state

    def _state(self, job: Job) -> Tree:
        """A node's state: what an earlier phase of this job has made of it, or the committed one."""
        made = self._pending.get(job.id)
        return self._states.pin(job.client) if made is None else made

    def judge(self, job: Job, message: Tree, *, train: bool) -> int:
        """Queue the evaluation of a client's deployed model; returns its ticket."""
        return self.begin(Call("judge", (job, self._states.pin(job.client), train), message))

    def settle(self, admitted: Sequence[Job], refused: Sequence[Job] = ()) -> None:
        """Commit the pending state of admitted jobs, forget that of refused ones."""
        for job in admitted:
            state = self._pending.pop(job.id, None)
            if state is not None:
                self._states.put(job.client, state)
        for job in refused:
            self._pending.pop(job.id, None)
        for job in (*admitted, *refused):
            self._cohorts.pop(job.id, None)

    def states(self) -> Mapping[int, Tree]:
        """Committed client states by client id; clients that have none are absent. Once some are on file, this is
        where they are kept, and goes on changing."""
        return self._states.whole()

    def pending(self) -> Mapping[int, Tree]:
        """Pending client states by job id."""
        return dict(sorted(self._pending.items()))

    def restore(self, states: Mapping[int, Tree], pending: Mapping[int, Tree]) -> None:
        """Go on from what a checkpoint held."""
        self._pending = dict(pending)
        if states is not self._states:
            for client, state in states.items():
                self._states.put(client, state)


@dataclass
class _Cohort:
    """Jobs that were submitted together in blocks, what was sent to them, and what has come back, by ticket."""

    jobs: list[Job]
    message: Tree
    tickets: list[int]
    blocks: dict[int, Block] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._place = {job.id: i % BLOCK for i, job in enumerate(self.jobs)}

    def take(self, job: Job, ticket: int, executor: Executor) -> tuple[Work, Tree]:
        """What a job did."""
        if ticket not in self.blocks:
            self.blocks[ticket] = executor.finish([ticket])[0]
        done = self.blocks[ticket].done[self._place[job.id]]
        return done[0], done[1]


def ready(call: Call) -> Call:
    """The call with the states that are on file read into its arguments. Raises CheckpointError."""
    return call._replace(args=tuple(_read(arg) for arg in call.args))


def _read(arg: Tree) -> Tree:
    """A state, or the states of several clients, in memory."""
    if isinstance(arg, Stored):
        return arg.tree()
    if type(arg) is tuple and any(isinstance(state, Stored) for state in arg):
        return tuple(_read(state) for state in arg)
    return arg

"""Where client work runs. An executor never changes a result: it runs pure calls and owns client state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

from consilience.core.messages import Job, Work
from consilience.core.tree import Tree
from consilience.core.worker import Call, Worker


class Executor(ABC):
    """Runs calls on a worker, here or elsewhere, and keeps client state.

    New client state is pending until its job is admitted: :meth:`settle` commits or rolls back.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._states: dict[int, Tree] = {}
        self._pending: dict[int, Tree] = {}
        """New state by job id."""

    @abstractmethod
    def begin(self, call: Call) -> int:
        """Queue a call; returns its ticket."""

    @abstractmethod
    def finish(self, tickets: Sequence[int]) -> list[Tree]:
        """The results of these calls, in this order; waits for them."""

    def close(self) -> None:  # noqa: B027 (an executor in this process has nothing to close)
        """Let go of everything."""

    def run(self, call: Call) -> Tree:
        """The result of one call."""
        return self.finish([self.begin(call)])[0]

    def submit(self, job: Job, message: Tree, *, resumes: bool = False) -> int:
        """Queue a client's work. resumes: it goes on with the pending state of an earlier phase of this job."""
        state = self._pending[job.id] if resumes else self._states.get(job.client)
        cost = 3.0 * self.worker.federation.size(job.client)  # a backward pass costs about two forward passes
        return self.begin(Call("train", (job, state), message, cost))

    def collect(self, jobs: Sequence[Job], tickets: Sequence[int]) -> Iterator[Work]:
        """What these jobs did, one by one: what is asked for waits, the others go on. Their new states are pending
        from then on."""
        for job, ticket in zip(jobs, tickets, strict=True):
            work, self._pending[job.id] = self.finish([ticket])[0]
            yield work

    def exchange(self, jobs: Sequence[Job]) -> dict[int, Tree]:
        """What the nodes of these jobs send to their neighbours, by client id."""
        tickets = [self.begin(Call("send", (job, self._states.get(job.client)))) for job in jobs]
        return {job.client: sent for job, sent in zip(jobs, self.finish(tickets), strict=True)}

    def mix(self, jobs: Sequence[Job], inboxes: Sequence[Tree]) -> None:
        """Let nodes combine what they have got; their new states are pending from now on."""
        calls = [
            Call("mix", (job, inbox, self._states.get(job.client))) for job, inbox in zip(jobs, inboxes, strict=True)
        ]
        for job, state in zip(jobs, self.finish([self.begin(call) for call in calls]), strict=True):
            self._pending[job.id] = state

    def judge(self, job: Job, message: Tree, *, train: bool) -> int:
        """Queue the evaluation of a client's deployed model; returns its ticket."""
        return self.begin(Call("judge", (job, self._states.get(job.client), train), message))

    def settle(self, admitted: Sequence[Job], refused: Sequence[Job] = ()) -> None:
        """Commit the pending state of admitted jobs, forget that of refused ones."""
        for job in admitted:
            state = self._pending.pop(job.id, None)
            if state is not None:
                self._states[job.client] = state
        for job in refused:
            self._pending.pop(job.id, None)

    def states(self) -> Mapping[int, Tree]:
        """Committed client states by client id; clients that have none are absent."""
        return {client: self._states[client] for client in sorted(self._states)}

    def pending(self) -> Mapping[int, Tree]:
        """Pending client states by job id."""
        return dict(sorted(self._pending.items()))

    def restore(self, states: Mapping[int, Tree], pending: Mapping[int, Tree]) -> None:
        """Go on from what a checkpoint held."""
        self._states, self._pending = dict(states), dict(pending)

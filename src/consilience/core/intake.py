"""What stands between collecting replies and combining them: sums made where clients run, stages, and a release."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from consilience.core.executor import Executor
from consilience.core.messages import Job, Refusal, Reply, Summed
from consilience.core.method import sums_suffice
from consilience.core.outbox import size_of
from consilience.core.setup import Setup
from consilience.core.snapshot import Totals
from consilience.core.tree import Tree


class Intake:
    """Makes of a cohort's replies what ``aggregate`` is given. spend: told of what a release costs each client.
    state: of the release, kept in checkpoints."""

    def __init__(self, executor: Executor, setup: Setup, spend: Callable[[Totals, int], None]) -> None:
        worker = executor.worker
        self._executor, self._setup, self._spend = executor, setup, spend
        self._method, self._program, self._federation = worker.method, worker.program, worker.federation
        plain = setup.release is None and all(stage is worker.check for stage in setup.stages)
        self._sum_there = plain and sums_suffice(self._method)
        self.state: Tree = None if setup.release is None else setup.release.init()

    @property
    def sums(self) -> bool:
        """Whether updates may be added up where they are made."""
        return self._sum_there

    def weights(self, jobs: Sequence[Job]) -> Mapping[str, Sequence[float]] | None:
        """Of each field of the updates of these jobs, for adding them up where they are made; None: it cannot be."""
        nothing = (0, 0, 0, 0.0, math.nan)
        return self._method.sums([Reply(job, None, self._federation.size(job.client), *nothing) for job in jobs])

    def size(self, update: Tree) -> int:
        """Bytes of an update as it is sent."""
        if self._setup.release is None or update is None:
            return size_of(update)
        return self._setup.release.size(update)

    def take(
        self, replies: Sequence[Reply], phase: int, version: int, server: Tree, asked: Collection[int]
    ) -> tuple[list[Reply], list[Reply], list[int]]:
        """The replies that are combined; what stands for them; and the cohort that may be told of. phase: index in the
        program. asked: the clients asked for this version."""
        if self._setup.release is not None:
            good = self._passed(replies, version, server)
            released, good = self._released(good, phase, version, asked)
            return good, released, []
        cohort, summed = [reply.job.client for reply in replies], self._summed(replies)
        if summed is not None:
            return list(replies), [summed], cohort
        good = self._passed(replies, version, server)
        return good, good, cohort

    def whole(self, reply: Reply) -> Reply:
        """A reply with its update, which is made once more if it was only added up."""
        if not isinstance(reply.update, Summed):
            return reply
        self._sum_there = False  # this run combines otherwise than it starts, or has clients that err
        return reply._replace(update=self._executor.redo(reply.job).update)

    def report(self, version: int) -> dict[str, Any] | None:
        """What a line of history says of the release, if there is one."""
        release = self._setup.release
        return None if release is None else dict(release.report(version, self.state))

    def _passed(self, replies: Sequence[Reply], version: int, server: Tree) -> list[Reply]:
        """The replies that every stage lets through."""
        replies = [self.whole(reply) for reply in replies]
        for stage in self._setup.stages:
            kept, refusals = stage(replies, server)
            replies = list(kept)
            if refusals:
                self._setup.recorder.refused(version + 1, refusals)
        return replies

    def _released(
        self, replies: Sequence[Reply], phase: int, version: int, asked: Collection[int]
    ) -> tuple[list[Reply], list[Reply]]:
        """One reply with what may be known of these, and nothing else of them; and those that are in it."""
        assert self._setup.release is not None
        update, self.state, traffic, left = self._setup.release(replies, sorted(asked), version, self.state)
        for client, (up, down) in traffic.items():
            self._spend(Totals(up, down), client)
        nobody = Job(-1, -1, 0, 0, version, phase)
        lost = [reply.job.client for reply in replies if left is not None and reply.job.client not in left]
        if lost:
            refusals = [Refusal(client, "update", "was lost before the sum was made") for client in lost]
            self._setup.recorder.refused(version + 1, refusals)
        given = [] if update is None else [Reply(nobody, update, 1, 0, 0, 0, 0.0, math.nan)]
        return given, [reply for reply in replies if reply.job.client not in lost]

    def _summed(self, replies: Sequence[Reply]) -> Reply | None:
        """One reply that holds the sums of these, if they were added up where they were made."""
        sums = self._executor.sums([reply.job for reply in replies])
        made = self._method.sends(self._program[replies[0].job.phase]) if replies else None
        if sums is None or not isinstance(made, type):
            return None
        return replies[0]._replace(update=made(**sums), samples=sum(reply.samples for reply in replies))

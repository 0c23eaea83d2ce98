"""The first stage between collecting and combining: compressed updates become what they stand for."""

from __future__ import annotations

from collections.abc import Sequence

from consilience.core.messages import Refusal, Reply, Stage
from consilience.core.tree import Tree
from consilience.core.worker import Worker
from consilience.parts.compressed import Compressed
from consilience.parts.compressors import MalformedError


class Decoding:
    """Decompresses updates, and refuses those that cannot be; what they hold is for validation to judge."""

    def __init__(self, worker: Worker, method: Compressed) -> None:
        self._place, self._program, self._method = worker.place, worker.program, method

    def __call__(self, replies: Sequence[Reply], server: Tree) -> tuple[list[Reply], list[Refusal]]:
        """The replies with their updates as the method reads them, and those that were malformed."""
        good: list[Reply] = []
        bad: list[Refusal] = []
        for reply in replies:
            try:
                update = self._method.received(self._place, reply, self._program[reply.job.phase], server)
                good.append(reply._replace(update=update))
            except MalformedError as error:
                field, _, reason = str(error).partition(": ")
                bad.append(Refusal(reply.job.client, field, reason))
        return good, bad


def stages(worker: Worker, adversary: Sequence[Stage] = ()) -> tuple[Stage, ...]:
    """What every update passes before it is combined: decompression, what an adversary does to it, validation."""
    first = (Decoding(worker, worker.method),) if isinstance(worker.method, Compressed) else ()
    return (*first, *adversary, *(() if worker.check is None else (worker.check,)))

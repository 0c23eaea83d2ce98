"""One process, one call after another."""

from __future__ import annotations

from collections.abc import Sequence

from consilience.core.executor import Executor, ready
from consilience.core.tree import Tree
from consilience.core.worker import Call, Worker


class Serial(Executor):
    """Runs every call in this process, when it is waited for."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self._queue: dict[int, Call] = {}
        self._next = 0

    def begin(self, call: Call) -> int:
        """Queue a call."""
        self._next += 1
        self._queue[self._next] = call
        return self._next

    def finish(self, tickets: Sequence[int]) -> list[Tree]:
        """Run them now."""
        return [self.worker.run(ready(self._queue.pop(ticket))) for ticket in tickets]

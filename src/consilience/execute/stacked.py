"""Clients run in step, several at a time as one batch of models, in worker processes.

The fast path for many small clients, and for accelerators. Numbers are those of the other executors but for the last
bits (a batched matrix product adds in another order), so a run has its own digest, the same for any worker count
since who shares a batch of models, which may decide a last bit, does not depend on it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

from consilience.core.stack import check_greenlet
from consilience.core.tree import Tree
from consilience.core.worker import Call, Worker
from consilience.execute.processes import Processes

MOST = 25
"""Clients in one stack, at most."""
STACKS = 4
"""Stacks that clients are dealt into at least, so that several workers have something to do. Who shares a stack may
decide a last bit, so it depends on the clients alone, not on the number of workers."""


class Stacked(Processes):
    """Runs training calls in stacks, and all others as :class:`Processes` does."""

    def __init__(self, worker: Worker, workers: int) -> None:
        check_greenlet()
        importlib.import_module("torch._dynamo")  # vmap wants it, and it is slow: once here, not in every worker
        super().__init__(worker, workers)
        self.pays_from = 0  # these are other blocks
        self._held: dict[int, Call] = {}
        self._member: dict[int, tuple[int, int]] = {}
        """(ticket of its stack, place in it) by ticket."""
        self._results: dict[int, list[Any]] = {}
        self._left: dict[int, int] = {}

    def begin(self, call: Call) -> int:
        """Queue a call; training waits for company."""
        if call.name != "train":
            return super().begin(call)
        self._next += 1
        self._held[self._next] = call
        return self._next

    def finish(self, tickets: Sequence[int]) -> list[Tree]:
        """Wait for these calls; others go on."""
        if any(ticket in self._held for ticket in tickets):
            self._stack_up()
        stacks = sorted({self._member[ticket][0] for ticket in tickets if ticket in self._member})
        stacks = [stack for stack in stacks if stack not in self._results]
        plain = [ticket for ticket in tickets if ticket not in self._member]
        found = dict(zip([*stacks, *plain], super().finish([*stacks, *plain]), strict=True))
        self._results.update((stack, found[stack]) for stack in stacks)
        return [self._take(ticket) if ticket in self._member else found[ticket] for ticket in tickets]

    def _take(self, ticket: int) -> Tree:
        stack, place = self._member.pop(ticket)
        result = self._results[stack][place]
        self._left[stack] -= 1
        if not self._left[stack]:
            del self._results[stack], self._left[stack]
        return result

    def _stack_up(self) -> None:
        """Put what waits into stacks: of one message and phase, and of about the same length."""
        groups: dict[Any, list[int]] = {}
        for ticket, call in self._held.items():
            groups.setdefault((id(call.shared), call.args[0].phase), []).append(ticket)
        for members in groups.values():
            members.sort(key=lambda ticket: (-self._held[ticket].cost, ticket))
            size = min(MOST, math.ceil(len(members) / STACKS))
            for start in range(0, len(members), size):
                some = members[start : start + size]
                calls = [self._held.pop(ticket) for ticket in some]
                jobs, states = (tuple(call.args[k] for call in calls) for k in (0, 1))
                cost = sum(call.cost for call in calls)
                stack = super().begin(Call("stack", (jobs, states), calls[0].shared, cost))
                self._left[stack] = len(some)
                self._member.update((ticket, (stack, place)) for place, ticket in enumerate(some))

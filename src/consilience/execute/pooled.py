"""What executors whose workers are elsewhere have in common.

Calls are queued and handed out longest first. What several calls share is placed once. A worker that is lost is
replaced and its calls are done again: they are pure, so no bit changes.
"""

from __future__ import annotations

import heapq
import traceback
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from consilience.core.encode import Encoder, decode
from consilience.core.errors import ClientError, WorkerError
from consilience.core.executor import Executor, ready
from consilience.core.reduce import BLOCK
from consilience.core.tree import Tree, clone
from consilience.core.worker import Call, Worker

AHEAD = 2
"""Calls given to a worker at a time: one to work on, one to go on with."""
EACH = 3
"""Blocks of clients that a worker should get at least, or some would wait for others."""
DEATHS = 3
"""Workers that one call may cost."""


def attempt(do: Callable[[], Any]) -> tuple[str, Any]:
    """What a worker elsewhere answers: ("done", what ``do`` gave), ("client", [message, its traceback]) where a
    client's own code failed, or ("failed", [message, traceback])."""
    try:
        return "done", do()
    except ClientError as error:
        return "client", [str(error), error.trace]
    except Exception as error:
        return "failed", [f"{type(error).__name__}: {error}", traceback.format_exc()]


class Desk:
    """The far side: a worker, and the shared tree that it has read last."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._shared: tuple[int | None, Tree] = (None, None)

    def answer(self, function: str, args: Any, number: int | None, shared: Any) -> tuple[bool, list[Encoder]]:
        """The result of a call, as it travels: whether it is a tuple, and its parts, which are apart so that the
        memory of a large one is free as soon as nobody looks at it (a client's new state, say, long before its update).

        args: the encoded arguments. number, shared: of the shared tree, and the encoded tree itself.
        """
        if number != self._shared[0]:
            self._shared = number, None if number is None else decode(shared, copy=False)
        result = self._worker.run(Call(function, decode(args, copy=False), self._shared[1]))
        apart = type(result) is tuple
        return apart, [Encoder(part) for part in (result if apart else [result])]


def settled(function: str, result: Tree) -> Tree:
    """A result whose new states are copied: they live long, so they leave shared memory at once."""
    if function == "train":
        return result[0], clone(result[1])
    if function == "stack":
        return [settled("train", one) for one in result]
    if function == "block":
        return result._replace(done=tuple(settled("train", one) for one in result.done))
    return clone(result) if function == "mix" else result


@dataclass(eq=False)
class Hand:
    """A worker as its executor sees it. busy: tickets of the calls that it was given."""

    busy: list[int] = field(default_factory=list, kw_only=True)


@dataclass(eq=False)
class Shared:
    """A tree that several calls have in common: its number, where it is once a worker needed it (None: nowhere yet),
    and how many calls still need it."""

    tree: Tree
    number: int
    at: Any = None
    users: int = 0


@dataclass
class _Out:
    """A call handed out or waiting: what it needs to be done again, and what it occupies."""

    call: Call
    shared: Shared | None
    deaths: int = 0
    at: Any = None


H = TypeVar("H", bound=Hand)


class Pooled(Executor, Generic[H]):
    """Runs calls on workers elsewhere. A subclass fills ``_hands`` and says how things get there and back."""

    def __init__(self, worker: Worker, workers: int) -> None:
        super().__init__(worker)
        self._hands: list[H] = []
        self._out: dict[int, _Out] = {}
        self._queue: list[tuple[float, int]] = []
        self._done: dict[int, Tree] = {}
        self._failed: dict[int, ClientError] = {}
        """Raised when the call is asked for, so that of several the same one is seen whoever comes first."""
        self._shared: dict[int, Shared] = {}
        self._next, self._numbers = 0, 0
        self.pays_from = EACH * BLOCK * workers

    @abstractmethod
    def _give(self, hand: H, ticket: int, call: Call, shared: Shared | None) -> Any:
        """Send a call to a worker; what it occupies until it is done."""

    @abstractmethod
    def _wait(self) -> None:
        """Take in what workers have to say, waiting for one at least: :meth:`_came` or :meth:`_lose`."""

    @abstractmethod
    def _place(self, tree: Tree) -> Any:
        """Put a tree where every worker can read it."""

    @abstractmethod
    def _free(self, at: Any) -> None:
        """What was placed, or a call occupied, is not needed any more."""

    def begin(self, call: Call) -> int:
        """Queue a call."""
        self._next += 1
        shared = None
        if call.shared is not None:
            shared = self._shared.get(id(call.shared))
            if shared is None:
                self._numbers += 1
                shared = self._shared[id(call.shared)] = Shared(call.shared, self._numbers)
            shared.users += 1
        self._out[self._next] = _Out(call, shared)
        heapq.heappush(self._queue, (-call.cost, self._next))
        return self._next

    def finish(self, tickets: Sequence[int]) -> list[Tree]:
        """Wait for these calls; others go on."""
        for ticket in tickets:
            while ticket not in self._done and ticket not in self._failed:
                self._hand_out()
                self._wait()
            if ticket in self._failed:
                raise self._failed[ticket]
        self._hand_out()
        return [self._done.pop(ticket) for ticket in tickets]

    def _hand_out(self) -> None:
        """Give waiting calls to workers that have room, the longest first."""
        while self._queue and self._hands:
            hand = min(self._hands, key=lambda h: len(h.busy))
            if len(hand.busy) >= AHEAD:
                return
            _, ticket = heapq.heappop(self._queue)
            out = self._out[ticket]
            if out.shared is not None and out.shared.at is None:
                out.shared.at = self._place(out.shared.tree)
            hand.busy.append(ticket)
            out.at = self._give(hand, ticket, ready(out.call), out.shared)

    def _came(self, hand: H, ticket: int) -> Call:
        """A call is answered: nothing that it occupied is needed any more; the call."""
        hand.busy.remove(ticket)
        out = self._out.pop(ticket)
        self._let_go(out)
        if out.shared is not None:
            out.shared.users -= 1
            if not out.shared.users:
                del self._shared[id(out.shared.tree)]
                self._free(out.shared.at)
        return out.call

    def _note(self, ticket: int, call: Call, kind: str, what: Any) -> None:
        """Keep an answer, as :func:`attempt` gives it, its result unpacked."""
        if kind == "client":
            self._failed[ticket] = ClientError(*what)
        elif kind == "failed":
            raise WorkerError(f"a worker failed in '{call.name}': {what[0]}\n{what[1]}")
        else:
            self._done[ticket] = settled(call.name, what)

    def _lose(self, hand: H, why: str) -> None:
        """A worker is gone: queue its calls again. Raises WorkerError where one has cost too many."""
        self._hands.remove(hand)
        for ticket in hand.busy:
            out = self._out[ticket]
            self._let_go(out)
            out.deaths += 1
            if out.deaths >= DEATHS:
                raise WorkerError(
                    f"{DEATHS} worker processes died ({why}) while doing '{out.call.name}' for the same client; is "
                    "there enough memory? Try fewer --workers or --executor serial"
                )
            heapq.heappush(self._queue, (-out.call.cost, ticket))

    def _let_go(self, out: _Out) -> None:
        if out.at is not None:
            self._free(out.at)
            out.at = None

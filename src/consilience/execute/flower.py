"""Clients that are real sites: their calls go out as sealed messages; their states stay there.

Where other executors have a client's state, this one has its name and hash (:class:`~consilience.core.tree.Elsewhere`).
The server's own work is done here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from consilience.core.encode import DecodeError, decode, encode
from consilience.core.errors import ConsilienceError
from consilience.core.executor import Executor, ready
from consilience.core.messages import Job, Score, Work
from consilience.core.tree import Elsewhere, Tree
from consilience.core.worker import Call, Worker

if TYPE_CHECKING:
    from consilience.deploy.post import Answer, Post

REMOTE = ("train", "judge", "send", "mix")
"""A worker's functions that need a client's rows or state."""
MOST = 2**53
"""Counts that a site may tell: whole numbers up to here are floating-point numbers too."""


class Flower(Executor):
    """Runs clients' calls at the sites that ``post`` reaches, the server's own in this process."""

    def __init__(self, worker: Worker, post: Post, names: Sequence[str], limit: int) -> None:
        super().__init__(worker)
        self._post, self._names, self._limit = post, names, limit
        self._here: dict[int, Call] = {}
        self._there: dict[int, tuple[int | None, Call]] = {}
        self._next = 0
        self._encoded: tuple[Tree, bytearray] | None = None
        self._safe: list[dict[int, str]] = [{}, {}]

    def begin(self, call: Call) -> int:
        """Send a call to its site, or queue it here."""
        self._next += 1
        call = ready(call)
        if call.name not in REMOTE:
            self._here[self._next] = call
        else:
            self._there[self._next] = (self._send(call), call)
        return self._next

    def _send(self, call: Call) -> int | None:
        job: Job = call.args[0]
        name, judging = self._names[job.client], call.name == "judge"
        if judging and name not in self._post.there():
            return None  # nothing depends on it
        if self._encoded is None or self._encoded[0] is not call.shared:
            self._encoded = (call.shared, encode(call.shared))
        own = self._states.pin(job.client)
        kept = {keys[job.client] for keys in self._safe if job.client in keys}
        if isinstance(own, Elsewhere):
            kept.add(own.key)
        head = {"call": call.name, "keep": sorted(kept)}
        blobs = [self._encoded[1], encode(call.args)]
        return self._post.send(name, "call", job.round, head, blobs, again=not judging)

    def wait(self, tickets: Sequence[int], seconds: float) -> Sequence[int]:
        """Those that are answered, or given up; waits for one at most so long."""
        until = time.monotonic() + seconds
        while True:
            self._post.look()
            come = [t for t in tickets if self._there[t][0] is None or self._post.answered(self._there[t][0] or 0)]
            if come or time.monotonic() >= until:
                return come
            time.sleep(min(self._post.pause, max(0.0, until - time.monotonic())))

    def finish(self, tickets: Sequence[int]) -> list[Tree]:
        """The results of these calls; None where a site does not answer."""
        return [self._result(ticket) for ticket in tickets]

    def _result(self, ticket: int) -> Tree:
        if ticket in self._here:
            return self.worker.run(self._here.pop(ticket))
        sent, call = self._there.pop(ticket)
        answer = None if sent is None else self._post.answer(sent)
        name = self._names[call.args[0].client]
        try:
            if answer is not None and answer.blobs is not None:
                return _read(call.name, answer, self._limit)
        except (DecodeError, ValueError, TypeError, IndexError) as error:
            self._post.tell(name, f"its answer is malformed: {error}")
        if call.name in ("train", "judge"):
            return None
        raise ConsilienceError(f"site {name} is not there for an exchange among neighbours; start again with `resume`")

    def settle(self, admitted: Sequence[Job], refused: Sequence[Job] = ()) -> None:
        """Commit or roll back; nobody waits for an answer of a job that is settled."""
        super().settle(admitted, refused)
        over = {job.id for job in (*admitted, *refused)}
        for ticket, (sent, call) in list(self._there.items()):
            if call.name == "train" and call.args[0].id in over:
                del self._there[ticket]
                if sent is not None:
                    self._post.drop(sent)

    def states(self) -> Mapping[int, Tree]:
        """Names and hashes of the committed states. Sites keep those of the last two times, since a server that died
        goes on from one of them."""
        found = super().states()
        self._safe = [self._safe[1], {client: state.key for client, state in found.items()}]
        return found

    def restore(self, states: Mapping[int, Tree], pending: Mapping[int, Tree]) -> None:
        """Go on from a checkpoint."""
        super().restore(states, pending)
        self._safe = [{}, {client: state.key for client, state in states.items()}]


def _read(call: str, answer: Answer, limit: int) -> Tree:
    """What a site's blobs hold, of the types that they must have. Raises DecodeError, ValueError or TypeError."""
    assert answer.blobs is not None
    parts = [decode(blob, limit=limit) for blob in answer.blobs]
    if call == "train":
        update, (work, state) = parts
        if not isinstance(work, Work) or not _spent(work.samples, work.steps, work.flops):
            raise ValueError("no work")
        if not (work.behind is None or (type(work.behind) is tuple and len(work.behind) == 3 and _spent(*work.behind))):
            raise ValueError("no work behind")
        if type(work.loss) is not float:
            raise ValueError("no loss")
        if isinstance(update, Elsewhere):
            _kept(update)
        return work._replace(update=update, before=_score(work.before), after=_score(work.after)), _kept(state)
    if call == "judge":
        before, after, valid = map(_score, parts[0])
        return before or Score(0, 0.0, None), after, valid
    return _kept(parts[0]) if call == "mix" else parts[0]


def _kept(state: Any) -> Elsewhere | None:
    if state is not None and not (isinstance(state, Elsewhere) and all(type(part) is str for part in state)):
        raise ValueError("no name of a state")
    return state


def _counts(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value <= MOST for value in values)


def _spent(samples: Any, steps: Any, flops: Any) -> bool:
    """Whether these can be samples, steps and FLOP, which are added up and multiplied."""
    return _counts(samples, steps) and (_counts(flops) or (type(flops) is float and 0 <= flops < math.inf))


def _score(score: Any) -> Score | None:
    if score is None:
        return None
    good = isinstance(score, Score) and _counts(score.n) and type(score.loss) is float
    good = good and (score.accuracy is None or 0 <= score.accuracy <= 1)
    if not good or not (score.groups is None or all(isinstance(group, Tensor) for group in score.groups)):
        raise ValueError("no score")
    return score  # type: ignore[no-any-return]

"""The client side of a run: pure functions from trees to trees, run wherever an executor likes.

A worker holds the data and the modules; it keeps nothing between calls that could change a result.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from consilience.core import order
from consilience.core import tree as tr
from consilience.core.encode import encoded_size
from consilience.core.errors import ClientError, ConsilienceError
from consilience.core.failpoint import reach
from consilience.core.federation import Federation, Split
from consilience.core.fit import Together
from consilience.core.messages import (
    ClientInfo,
    DeltaUpdate,
    Inbox,
    Job,
    Kind,
    Reply,
    Score,
    Stage,
    Summed,
    Work,
    kinds,
)
from consilience.core.method import Method, Phase
from consilience.core.model import Pool, Weights
from consilience.core.predict import Predictor
from consilience.core.reduce import add_term
from consilience.core.site import Host, Place, Site
from consilience.core.tree import Tree, record

if TYPE_CHECKING:
    from consilience.core.stack import Stack


class Call(NamedTuple):
    """One piece of work for a worker: the name of one of its functions and its arguments, which are trees.

    shared: a tree that several calls have in common (a broadcast), sent once. cost: a guess of its length, so
    that the longest begins first.
    """

    name: str
    args: tuple[Tree, ...]
    shared: Tree = None
    cost: float = 0.0


@record
class Kept(NamedTuple):
    """A client's state where more than the method's own is kept: that, its buffers where they stay local, and the model
    that its last training ended with where rows are ordered by it."""

    state: Tree
    buffers: Tree
    trained: Tree = None


@record
class Chunk(NamedTuple):
    """What a predictor did on one chunk of the global test set: sum of losses, scores ``(n, outputs)``."""

    loss: float
    scores: Tensor


@record
class Block(NamedTuple):
    """What a block of clients did: work and new state of each, and the sum of each field of their updates, or None
    where one was not right."""

    done: tuple[tuple[Work, Tree], ...]
    sums: dict[str, Tree] | None


class Check(Stage, Protocol):
    """A stage that looks at each update alone."""

    def wrong(self, job: Job, update: Tree) -> tuple[str, str] | None:
        """What is wrong with it as (field, reason), or None if nothing is."""
        ...


@dataclass
class Worker:
    """Runs the client half of a method on a federation. check: of updates that are added up here."""

    place: Place
    federation: Federation
    program: Sequence[Phase]
    check: Check | None = None

    def __post_init__(self) -> None:
        self._pool = Pool()
        self._stack: Stack | None = None

    @property
    def method(self) -> Method:
        """The method that is run."""
        return self.place.method

    def run(self, call: Call) -> Tree:
        """The result of a call. Raises ClientError with the client's own traceback, or where something that was
        given has been changed in place: here others would see the change, in another process they would not."""
        function = getattr(self, f"do_{call.name}")
        given = tr.tensors((call.shared, call.args))
        before = _versions(given)
        try:
            result: Tree = function(call.shared, *call.args)
        finally:
            self.release()
        if before != _versions(given):
            raise ClientError(_changed(call))
        return result

    def release(self) -> None:
        """Take back every module that was lent."""
        self._pool.release()

    def do_train(self, message: Tree, job: Job, state: Tree) -> tuple[Work, Tree]:
        """A client's work in one phase: (what it did, its new state)."""
        return self._train(message, job, state, self._pool, None)

    def do_stack(self, message: Tree, jobs: Sequence[Job], states: Sequence[Tree]) -> list[tuple[Work, Tree]]:
        """The work of several clients in one phase, in step."""
        from consilience.core.stack import Stack

        if self._stack is None or self._stack.size < len(jobs):
            self._stack = Stack(len(jobs))
        clients = [partial(self._train, message, job, state) for job, state in zip(jobs, states, strict=True)]
        return self._stack.run(clients)

    def do_block(
        self, message: Tree, jobs: Sequence[Job], states: Sequence[Tree], weights: Mapping[str, Sequence[float]]
    ) -> Block:
        """The work of one block of the canonical reduction. Its updates are checked, added up field by field, and let
        go; after the first that is not right nothing is added up."""
        done: list[tuple[Work, Tree]] = []
        sums: dict[str, Tree] | None = dict.fromkeys(weights)
        for i, (job, state) in enumerate(zip(jobs, states, strict=True)):
            work, kept = self._train(message, job, state, self._pool, None)
            self.release()
            if self.check is None or self.check.wrong(job, work.update) is not None:
                sums = None
            if sums is not None:
                sums = {f: add_term(s, getattr(work.update, f), weights[f][i]) for f, s in sums.items()}
            done.append((work._replace(update=Summed(encoded_size(work.update))), kept))
        return Block(tuple(done), sums)

    def _train(self, message: Tree, job: Job, state: Tree, pool: Pool, together: Together | None) -> tuple[Work, Tree]:
        site, phase = self.site(job, pool, together)
        reach("client-before")
        with _blame(site, phase, "init_client") as at:
            message, own = self._open(site, message, state)
            at.stage = "personal_model"
            before = self._judge(site, message, own) if job.judge else None
            at.stage = "client_update"
            update, own = self.method.client_update(phase, site, message, own)
            at.stage = "trained_model"
            after = None
            if job.judge:
                with site.uncounted():
                    after = site.evaluate(self.method.trained_model(site, message, update, own))
            at.stage = "outgoing"
            update, kept = self._close(phase, site, update, own)
        reach("client-after")
        done, behind = site.computed, site.behind
        work = Work(update, done.samples, done.steps, site.last_loss, before, after, done.flops)
        if behind.samples:
            work = work._replace(behind=(behind.samples, behind.steps, behind.flops))
        return work, kept

    def do_mix(self, shared: Tree, job: Job, inbox: Inbox, state: Tree) -> Tree:
        """A node's state after an exchange with its neighbours."""
        site, phase = self.site(job)
        with _blame(site, phase, "mix"):
            if not self._keeps:
                return self.method.mix(phase, site, self._own(site, state), inbox)
            kept = Kept(None, None) if state is None else state
            return kept._replace(state=self.method.mix(phase, site, self._own(site, kept.state), inbox))

    def do_send(self, shared: Tree, job: Job, state: Tree) -> Tree:
        """What a node sends to its neighbours."""
        site, phase = self.site(job)
        with _blame(site, phase, "send"):
            return self.method.send(phase, self._own(site, state.state if isinstance(state, Kept) else state))

    def do_judge(self, message: Tree, job: Job, state: Tree, train: bool) -> tuple[Score, Score | None, Score | None]:
        """A client's deployed model on its own test rows; the same after a round of local training that leaves no trace
        (if ``train``); and on its validation rows (if it has any)."""
        site, phase = self.site(job)
        with _blame(site, phase, "init_client") as at:
            message, own = self._open(site, message, state)
            at.stage = "personal_model"
            deployed = self.method.personal_model(site, message, own)
            before = site.evaluate(deployed)._replace(cluster=self.method.cluster(site, message, own))
            valid = site.evaluate(deployed, site.valid) if len(site.valid) else None
            after = None
            if train and before.n and len(site.train):  # without test rows there is nothing to learn from it
                at.stage = "client_update"
                update, own = self.method.client_update(phase, site, message, own)
                at.stage = "trained_model"
                after = site.evaluate(self.method.trained_model(site, message, update, own))
        return before, after, valid

    def do_newcomer(self, predictor: Predictor, job: Job) -> tuple[Score, None, Score | None]:
        """As :meth:`do_judge`, of a client that takes no part and is given a predictor."""
        site, phase = self.site(job)
        with _blame(site, phase, "judging"):
            return site.evaluate(predictor), None, site.evaluate(predictor, site.valid) if len(site.valid) else None

    def do_aggregate(
        self, shared: Tree, phase: int, version: int, server: Tree, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> tuple[Tree, int, int, float]:
        """The server's new state, and the samples, steps and FLOP that it computed for it."""
        host = self.host(version, self.program[phase].name)
        new = self.method.aggregate(self.program[phase], host, server, replies, cohort)
        return new, host.computed.samples, host.computed.steps, host.computed.flops

    def deployed(self, server: Tree, client: int, state: Tree) -> Predictor | None:
        """What a client would deploy, from the server's and its own state."""
        model = self.place.model_of(client)
        info = ClientInfo(client, self.federation.size(client), model, self.place.architectures)
        return self.personal(self.method.deploy(server, info), client, state)

    def personal(self, message: Tree, client: int, state: Tree) -> Predictor | None:
        """What a client would deploy, from the message that it would get and its own state."""
        first = next(i for i, phase in enumerate(self.program) if phase.inner)
        site, _ = self.site(Job(-1, client, 0, 0, 0, first))
        message, own = self._open(site, message, state)
        return self.method.personal_model(site, message, own)

    def do_chunk(self, predictor: Predictor, start: int, stop: int, triggered: bool = False) -> Chunk:
        """The global model on rows ``start`` to ``stop`` of the global test set, or of those with a trigger."""
        test = self.federation.triggered if triggered else self.federation.test
        assert test is not None
        host = self.host(0, "evaluate")
        rows = host.cast(test.rows(slice(start, stop)))
        scores = host.scores(predictor, rows.x)
        return Chunk(float(host.task.losses(scores, rows.y).double().sum()), scores)

    def site(self, job: Job, pool: Pool | None = None, together: Together | None = None) -> tuple[Site, Phase]:
        """The site of a job, and its phase. pool, together: of its place in a stack."""
        phase = self.program[job.phase]
        data = self.federation.data(job.client)
        return Site(self.place, pool or self._pool, job, data, phase.name, together), phase

    def host(self, version: int, phase: str) -> Host:
        """The server as its own code sees it."""
        return Host(self.place, self._pool, version, phase)

    def _judge(self, site: Site, message: Tree, own: Tree) -> Score:
        with site.uncounted():
            return site.evaluate(self.method.personal_model(site, message, own))

    @property
    def _ordered(self) -> bool:
        return order.parse(self.method.row_order).remembers

    @property
    def _keeps(self) -> bool:
        """Whether a client keeps more than the method's own state."""
        return self.method.buffers == "local" or self._ordered

    def _own(self, site: Site, state: Tree) -> Tree:
        return self.method.init_client(site) if state is None else state

    def _open(self, site: Site, message: Tree, state: Tree) -> tuple[Tree, Tree]:
        """The message as the client reads it, and the method's own client state: with local buffers, models
        arrive with the buffers that this client kept."""
        if not self._keeps:
            return message, self._own(site, state)
        kept = Kept(self.method.init_client(site), None) if state is None else state
        site.before, site.buffers = kept.trained, kept.buffers
        if kept.buffers is not None and tr.is_record(message):
            models = [name for name, kind in kinds(type(message)).items() if kind is Kind.MODEL]
            message = message._replace(**{n: Weights(getattr(message, n).params, kept.buffers) for n in models})
        return message, kept.state

    def _close(self, phase: Phase, site: Site, update: Tree, own: Tree) -> tuple[Tree, Tree]:
        """The update as it is sent, and the state as it is kept: local buffers stay here."""
        buffers, trained = None, None
        if self.method.buffers == "local":
            update, buffers = _without_buffers(update, site.buffers)
        update, own = self.method.outgoing(phase, site, update, own)
        if not self._keeps:
            return update, own
        if self._ordered:
            trained = site.before if site.trained is None else site.trained
        return update, Kept(own, buffers, trained)


def _without_buffers(update: Tree, before: Tree) -> tuple[Tree, Tree]:
    """An update without buffers, and these; those of ``before`` if it has none."""
    if isinstance(update, DeltaUpdate):
        return update._replace(buffers={}), update.buffers
    buffers = before
    for name, kind in kinds(type(update)).items() if tr.is_record(update) else ():
        if kind is Kind.BUFFERS:
            buffers = getattr(update, name)
            update = update._replace(**{name: {}})
        if kind is Kind.MODEL:
            buffers = getattr(update, name).buffers
            update = update._replace(**{name: Weights(getattr(update, name).params, {})})
    return update, buffers


class _blame:
    """Turns an exception of a client's code into one ClientError that names client, round and stage."""

    def __init__(self, site: Site, phase: Phase, stage: str) -> None:
        self.where = f"client {site.id}, round {site.job.round}, phase {phase.name}"
        self.stage = stage

    def __enter__(self) -> _blame:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, ConsilienceError):
            text = "".join(traceback.format_exception(error)).rstrip()
            raise ClientError(f"{self.where}, in {self.stage}: {type(error).__name__}: {error}", text) from error


def _versions(given: Sequence[Tensor]) -> list[int]:
    """How often each tensor was changed in place, as torch counts it (not for tensors of inference mode)."""
    return [0 if t.is_inference() else t._version for t in given]


def _changed(call: Call) -> str:
    """What to say where a call has changed its arguments."""
    jobs = call.args[0] if call.name in ("stack", "block") else [arg for arg in call.args if isinstance(arg, Job)]
    who = f"client {', '.join(str(job.client) for job in jobs)}, round {jobs[0].round}" if jobs else "the server"
    return f"{who}: '{call.name}' changed in place a tensor that it was given; clone it first (core.tree.clone)"


def pooled(federation: Federation) -> Split:
    """All training rows of the clients that may train, in client order."""
    parts = [federation.data(int(client)).train for client in federation.seen]
    return Split(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))


def row_ranges(federation: Federation, size: int, *, triggered: bool = False) -> list[tuple[int, int]]:
    """Row ranges of the global test set, or of the rows with a trigger, ``size`` rows each."""
    rows = federation.triggered if triggered else federation.test
    n = 0 if rows is None else len(rows)
    return [(start, min(start + size, n)) for start in range(0, n, size)]

"""A client's view of itself, and the server's: data views, random streams, and the means to train and judge."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from consilience.core.federation import ClientData, Split, Task
from consilience.core.fit import Batch, Fit, Loss, Plan, Step, Together, training
from consilience.core.messages import Job, Score
from consilience.core.model import Architecture, Instance, Pool, Weights
from consilience.core.predict import Net, Predictor, Scorer
from consilience.core.streams import SERVER, Streams, torch_fork

if TYPE_CHECKING:
    from consilience.core.method import Method

__all__ = ["Batch", "Fit", "Host", "Loss", "Place", "Plan", "Site", "Step"]


class Topology(Protocol):
    """Who exchanges with whom where there is no server."""

    @property
    def static(self) -> bool:
        """Whether all rounds have the same weights."""
        ...

    @property
    def balanced(self) -> bool:
        """Whether columns of weights sum to 1 in all rounds, as rows do, so that mixing keeps the mean."""
        ...

    @property
    def symmetric(self) -> bool:
        """Whether two nodes weigh each other alike in all rounds. Then columns sum to 1 whoever is absent, too."""
        ...

    def at(self, round: int) -> Mapping[int, Mapping[int, float]]:
        """The mixing weights of a round, counted from 0, by client and neighbour, itself included. Rows sum to 1."""
        ...


@dataclass(frozen=True)
class Place:
    """What all sites of a run share.

    architectures: by name, the server's first. models: architecture name of each client, or None if all have the
    server's. networks: the method's own, by name. seed: of the run. initial: weights to start from instead of drawn
    ones. chunk: rows in one chunk of an evaluation; results may depend on it in their last bits, so it is an option.
    public: inputs that everybody may see. n_clients: how many may train. topology: mixing weights of each
    round. pooled: everybody's training rows, only for the centralised reference. rows: how many training rows those
    who may train have together, for methods that count them. noise: seed of what nobody must guess, where the site has
    a secret of its own; by default the run's seed.
    """

    task: Task
    method: Method
    architectures: Mapping[str, Architecture]
    models: tuple[str, ...] | None
    seed: int
    initial: Weights | None
    chunk: int
    public: Tensor | None
    n_clients: int
    topology: Topology | None = None
    pooled: Split | None = None
    rows: int = 0
    noise: int | None = None
    networks: Mapping[str, Architecture] = field(default_factory=dict)

    @property
    def server_model(self) -> str:
        """Name of the server's architecture."""
        return next(iter(self.architectures))

    def model_of(self, client: int) -> str:
        """Name of a client's architecture."""
        return self.models[client] if self.models is not None else self.server_model

    def network(self, name: str) -> Architecture:
        """The architecture of a model or of one of the method's networks."""
        return self.architectures[name] if name in self.architectures else self.networks[name]


@dataclass
class Computed:
    """Samples and steps of training, and FLOP of training and of models asked beside it."""

    samples: int = 0
    steps: int = 0
    flops: float = 0.0

    def add(self, samples: int, steps: int, flops: float) -> None:
        """A training."""
        self.samples += samples
        self.steps += steps
        self.flops += flops

    def more(self, flops: float) -> None:
        """Rows that passed a model."""
        self.flops += flops


class Site:
    """A client as its own code sees it. Nothing here reaches another client or the server.

    ``id``, ``job``, ``method``, ``task``, ``model`` (its architecture's name), ``train`` / ``valid`` / ``test``.
    """

    def __init__(
        self, place: Place, pool: Pool, job: Job, data: ClientData, phase: str, together: Together | None = None
    ) -> None:
        self.place, self.method, self.task = place, place.method, place.task
        self.id, self.job = job.client, job
        self.model = place.model_of(job.client) if job.client != SERVER else place.server_model
        self.train, self.valid, self.test = data.train, data.valid, data.test
        self.streams = Streams(place.seed, job.client, job.number, phase)
        self.computed = Computed()
        """What has been computed so far."""
        self.behind = Computed()
        """The part of it that is done while messages travel."""
        self.last_loss = float("nan")
        """Mean training loss of the first fit, which is the training; later ones are a method's own business."""
        self.before: Weights | None = None
        """The model that the client's last training ended with, where it is kept."""
        self.buffers: Any = None
        """The buffers that the client kept, where they stay local."""
        self.trained: Weights | None = None
        """The one that this job's training ended with."""
        self.together = together
        """Whom to ask for gradients, where clients run in step."""
        self._pool = pool

    @property
    def public(self) -> Split:
        """The public inputs, with zeros for labels (nobody has any)."""
        if self.place.public is None:
            raise ValueError("this federation has no public data")
        return Split(self.place.public, torch.zeros(len(self.place.public), dtype=torch.int64))

    def rng(self, purpose: str, *more: int | str) -> np.random.Generator:
        """A fresh generator of this site, job and phase for ``purpose``."""
        return self.streams.rng(purpose, *more)

    def shared_rng(self, purpose: str, *more: int | str) -> np.random.Generator:
        """A generator that every site and the server draw alike (common randomness)."""
        return Streams(self.place.seed).rng("shared", purpose, *more)

    def architecture(self, model: str = "") -> Architecture:
        """The architecture named (a model's or a network's of the method), or the site's own."""
        return self.place.network(model or self.model)

    def initial(self, model: str = "", component: int = 0) -> Weights:
        """Initial weights: the same at every site and on the server for one architecture and component."""
        name = model or self.model
        if self.place.initial is not None and name == self.place.server_model and not component:
            return self.place.initial
        return self.place.network(name).initial(self.place.seed, component)

    def borrow(self, model: str = "") -> Instance:
        """A module instance of an architecture, returned when the job ends."""
        return self._pool.borrow(self.architecture(model))

    def bind(self, weights: Weights, model: str = "") -> nn.Module:
        """A module holding ``weights``, in evaluation mode; its parameters take no gradient."""
        return self.borrow(model).fill(weights, train=False, tally=self.computed.more)

    def cast(self, data: Split) -> Split:
        """Data in the dtype of the site's architecture."""
        dtype = self.architecture().dtype
        if data.x.dtype == dtype or not data.x.is_floating_point():
            return data
        y = data.y.to(dtype) if data.y.is_floating_point() else data.y
        return Split(data.x.to(dtype), y, data.sensitive)

    def fit(self, weights: Any, plan: Plan | None = None, **fields: Any) -> Fit:
        """Train ``weights`` (one model's, or a dict of several) and return a :class:`Fit`.

        Give a :class:`Plan`, or its fields as keywords. Borrowed modules go back; no global stream moves.
        """
        plan = plan or Plan(**fields)
        with self._scope(), torch_fork(0):
            steps = training(self, weights, plan)
            while True:
                try:
                    next(steps)
                except StopIteration as done:
                    fit: Fit = done.value
                    break
        self.computed.add(fit.samples, fit.steps, fit.flops)
        if math.isnan(self.last_loss):
            self.last_loss = fit.loss
        if plan.purpose == Plan.purpose and isinstance(fit.weights, Weights):
            self.trained = fit.weights
        return fit

    def map(self, f: Callable[..., Any], model: Weights, data: Split | None = None, name: str = "") -> list[Any]:
        """``f(module, rows)`` for every chunk of ``data`` (the training rows), in order, in evaluation mode and
        without gradients. Nothing moves: no stream, buffer or mode."""
        rows = self.cast(self.train if data is None else data)
        with self._scope(), torch_fork(0), torch.no_grad():
            module = self.bind(model, name)
            return [f(module, chunk) for chunk in chunks(rows, self.place.chunk)]

    def scores(self, predictor: Predictor, x: Tensor) -> Tensor:
        """A predictor's scores for ``x``, chunk by chunk, without side effects."""
        rows = self.cast(Split(x, torch.zeros(len(x), dtype=torch.int64)))
        with self._scope(), torch_fork(0), torch.no_grad():
            scorer = predictor.scorer(self)
            return torch.cat([scorer(chunk.x) for chunk in chunks(rows, self.place.chunk)])

    @contextmanager
    def lent(self, predictor: Predictor) -> Iterator[Scorer]:
        """A predictor's function from a batch to scores, through which gradients of inputs can be taken. Parameters
        take none; nothing is counted and no global stream moves."""
        with self._scope(), torch_fork(0), self.uncounted():
            yield predictor.scorer(self)

    def evaluate(self, predictor: Predictor | Weights | None, data: Split | None = None) -> Score:
        """Rows, mean loss and accuracy on ``data`` (the test rows), without side effects. No predictor: no rows."""
        found = Net(predictor) if isinstance(predictor, Weights) else predictor
        rows = self.test if data is None else data
        if found is None or not len(rows):
            return Score(0, 0.0, None)
        with self.uncounted():
            scores = self.scores(found, rows.x)
        return score(self.task, scores, self.cast(rows).y, rows.sensitive)

    @contextmanager
    def meanwhile(self) -> Iterator[None]:
        """What is computed here is done while the update and the next broadcast travel: it counts as work, but takes
        virtual time only as far as it lasts longer than the transfers do."""
        before = Computed(self.computed.samples, self.computed.steps, self.computed.flops)
        try:
            yield
        finally:
            now = self.computed
            self.behind.add(now.samples - before.samples, now.steps - before.steps, now.flops - before.flops)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Judging a client is not its work: what is computed meanwhile, as a predictor that takes training, counts
        neither as samples nor as time."""
        kept = self.computed, self.behind, self.last_loss
        self.computed, self.behind = Computed(), Computed()
        try:
            yield
        finally:
            self.computed, self.behind, self.last_loss = kept

    @contextmanager
    def _scope(self) -> Iterator[None]:
        mark = self._pool.mark()
        try:
            yield
        finally:
            self._pool.release(mark)


class Host(Site):
    """The server as its own code sees it: a site without private data, with every architecture.

    ``clients``: how many may train. ``rows``: training rows that they have together, for methods that
    count them. ``version``: server updates made so far.
    """

    def __init__(self, place: Place, pool: Pool, version: int, phase: str) -> None:
        empty = Split(torch.empty(0), torch.empty(0))
        job = Job(id=-1, client=SERVER, number=version, admitted=0, version=version, phase=0)
        super().__init__(place, pool, job, ClientData(empty, empty, empty), phase)
        self.clients = place.n_clients
        self.rows = place.rows
        self.pooled = place.pooled
        self.version = version


def chunks(rows: Split, size: int) -> Iterator[Split]:
    """Consecutive chunks of ``size`` rows; the last may be smaller."""
    for start in range(0, len(rows), size):
        yield rows.rows(slice(start, start + size))


def score(task: Task, scores: Tensor, y: Tensor, sensitive: Tensor | None = None) -> Score:
    """Mean loss (summed in float64) and accuracy of scores; counts by group where rows have sensitive attributes."""
    if task.kind == "operator":
        return Score(len(y), 0.0, None)
    loss = float(task.losses(scores, y).double().sum()) / len(y)
    if task.kind != "classification":
        return Score(len(y), loss, None)
    predicted = scores.argmax(1)
    groups = None if sensitive is None else group_counts(sensitive, y, predicted, task.outputs)
    return Score(len(y), loss, float((predicted == y).double().mean()), groups)


def group_counts(sensitive: Tensor, y: Tensor, predicted: Tensor, classes: int) -> tuple[Tensor, ...]:
    """For each sensitive attribute ``(n, attributes)`` of codes: rows ``(group, label, prediction)``, int64."""
    found = []
    for codes in sensitive.unbind(1):
        groups = int(codes.max()) + 1
        cells = (codes * classes + y) * classes + predicted
        counts = torch.bincount(cells, minlength=groups * classes * classes)
        found.append(counts.reshape(groups, classes, classes))
    return tuple(found)

"""SGC: exact full gradients despite stragglers, by coding over workers and rounds (Krishnan et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Ge
from torch import Tensor

from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.federation import Split
from consilience.core.fit import Batch, Grad
from consilience.core.messages import ClientInfo, Reply, Stat
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Params, Weights
from consilience.core.predict import Ensemble, Net, Predictor
from consilience.core.reduce import weighted_sum
from consilience.core.shapes import Expected, Wrong, compare
from consilience.core.site import Host, Place, Site
from consilience.core.training import option
from consilience.core.tree import Tree, record
from consilience.parts import coding
from consilience.parts.coding import Key, Scheme, Task


@record
class Rows(NamedTuple):
    """A client's training rows."""

    x: Stat
    y: Stat


@record
class Held(NamedTuple):
    """The rows that a worker holds, and where among them each of its chunks begins and ends."""

    x: Stat
    y: Stat
    spans: Stat


@record
class Orders(NamedTuple):
    """A worker's tasks of a round, as (job, group, number, ((chunk, coefficient), ...)); the models of their jobs; how
    many rows there are in all."""

    tasks: Stat
    models: Stat
    rows: Stat


@record
class Results(NamedTuple):
    """The vector of each task by its name."""

    vectors: Stat


@record
class Common(NamedTuple):
    """What is deployed: all networks."""

    networks: tuple[Weights, ...]


@record
class Desk(NamedTuple):
    """The server: the networks; the workers, by client id; all rows by client until they are placed, and how many; the
    number of the round; what has come back of each job that is not due yet; jobs that could not be decoded."""

    networks: tuple[Weights, ...]
    workers: tuple[int, ...]
    pool: dict[int, Rows]
    rows: int
    round: int
    results: dict[int, dict[str, Params]]
    missed: int


@dataclass(frozen=True)
class SGC(Method):
    """Data-parallel gradient descent of several networks in turn, whose gradients are whole although workers straggle.

        job t:  g_t = (1 / n) sum over all rows of grad of their loss, at network t mod M;  due when round t + T ends
        from what has come by then:  g_t = sum_k a_k (result k);    network t mod M  <-  network - lr g_t

    Rows are cut in chunks that several workers hold, and a result is a combination of chunk gradients: which, and the
    three schemes gc, sr and m, is in parts/coding.py. A result is all or nothing: who is not back when the round is
    combined (offline, lost, or cut off by a ``deadline`` schedule) returns nothing of it. Any pattern of stragglers
    that the scheme bears gives the exact gradient, to rounding; where it cannot, the job is lost and counted
    (``method.missed``). M = ``networks_in_turn``, at least T + 1, so that no job waits for another; what is deployed is
    their ensemble. Schedules with rounds only, and every client in each (``--participation 1.0``).

    **All training rows go through the server to the workers, before the first round**: this is for machines of one
    owner, and no row is private. gc with stragglers=0 is full-batch gradient descent.

    The model must be one whose gradient is a sum over rows: no BatchNorm (refused) and no dropout. batch_size, epochs,
    weights and form have no meaning here.

    Source: Krishnan, Ebrahimi, Khisti, "Sequential Gradient Coding for Straggler Mitigation", ICLR 2023. Deviations: a
    job that cannot be decoded in time is lost, where theirs waits for the workers it needs; who straggles is for the
    schedule and the clock to say.
    """

    name = "sgc"
    family = "coded computation"
    source = "Krishnan et al., ICLR"
    year = 2023
    needs = Needs(classification=True)
    asks_all = True
    own_batches = "passes all rows of its chunks"
    unstacked = "each worker has other rows and models"

    scheme: Literal["gc", "sr", "m"] = option("m", "gradient coding, selective repetition, or multiplexing")
    stragglers: Annotated[int, Ge(0)] = option(1, "gc: s in a round; sr and m: lambda, in a window of rounds")
    burst: Annotated[int, Ge(1)] = option(1, "sr and m: B, rounds in a row within which a worker's delays fall")
    window: Annotated[int, Ge(2)] = option(3, "sr and m: W, rounds of a window")
    networks_in_turn: Annotated[int, Ge(1)] | None = option(None, "M, networks trained in turn (none: T + 1)")

    def check(self) -> None:
        """Steps are those of plain SGD."""
        if self.optimizer != "sgd" or self.momentum or self.weight_decay or self.clip is not None:
            raise ConfigError(
                "sgc takes plain gradient steps; use optimizer=sgd without momentum, weight_decay and clip"
            )

    def program(self) -> tuple[Phase, ...]:
        """Rows are gathered and placed once; then rounds."""
        return (
            Phase("gather", when="start", asks=True),
            Phase("place", when="start", asks=True),
            Phase("work"),
        )

    def _code(self, workers: int) -> Scheme:
        return coding.make(self.scheme, workers, self.stragglers, self.burst, self.window)

    # --- the server's half -------------------------------------------------------------------------------------

    def init_server(self, host: Host) -> Desk:
        """M networks, nothing placed. Raises ConfigError for a code or a model that cannot be."""
        least = self._code(host.clients).delay + 1
        count = least if self.networks_in_turn is None else self.networks_in_turn
        if count < least:
            raise ConfigError(f"sgc: networks_in_turn={count} are too few for this scheme; take {least} or more")
        made = tuple(host.initial(component=k) for k in range(count))
        if made[0].buffers:
            raise ConfigError("sgc needs a model whose gradient is a sum over rows; take one without BatchNorm")
        return Desk(made, (), {}, 0, 0, {}, 0)

    def broadcast(self, phase: Phase, server: Desk, client: ClientInfo) -> Tree:
        """Nothing; the chunks that a worker holds; or its tasks."""
        if phase.name == "gather":
            return None
        worker = server.workers.index(client.id) if client.id in server.workers else -1
        code = self._code(len(server.workers))
        if phase.name == "place":
            return None if worker < 0 else self._share(server, code, worker)
        tasks = [] if worker < 0 else code.tasks(server.round, _done(server.results))[worker]
        jobs = sorted({task.job for task in tasks})
        models = {str(job): server.networks[job % len(server.networks)] for job in jobs}
        return Orders(tuple((task.job, *task.slot, task.terms) for task in tasks), models, server.rows)

    def deploy(self, server: Desk, client: ClientInfo) -> Common:
        """All networks."""
        return Common(server.networks)

    def _share(self, server: Desk, code: Scheme, worker: int) -> Held:
        """The rows of a worker's chunks. All rows stand in the order of clients, and chunks are cut from them."""
        x, y = (torch.cat([getattr(rows, field) for rows in server.pool.values()]) for field in ("x", "y"))
        ends, whole = [0], 0.0
        for size in code.sizes:
            whole += size
            ends.append(round(whole * len(x)))
        chunks = sorted(code.held(worker))
        starts, spans = 0, {}
        for chunk in chunks:
            length = ends[chunk + 1] - ends[chunk]
            spans[chunk] = (starts, starts + length)
            starts += length
        index = torch.cat([torch.arange(ends[chunk], ends[chunk + 1]) for chunk in chunks])
        return Held(x[index], y[index], spans)

    def aggregate(
        self, phase: Phase, host: Host, server: Desk, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Desk:
        """Note rows; let go of them; or note results and make the step that is due."""
        if phase.name == "gather":
            pool = {reply.job.client: reply.update for reply in replies}
            return server._replace(pool=pool, workers=tuple(pool), rows=sum(len(rows.y) for rows in pool.values()))
        if phase.name == "place":
            return server._replace(pool={})
        code, t = self._code(len(server.workers)), server.round
        tasks = code.tasks(t, _done(server.results))
        results = {job: dict(found) for job, found in server.results.items()}
        for reply in replies:
            worker = server.workers.index(reply.job.client) if reply.job.client in server.workers else -1
            for task in tasks[worker] if worker >= 0 else ():
                vector = reply.update.vectors.get(_name(task))
                if vector is not None:
                    results.setdefault(task.job, {})[_key(worker, task)] = vector
        return self._step(
            server._replace(round=t + 1, results=dict(sorted(results.items()))), code, t - code.delay, host
        )

    def _step(self, server: Desk, code: Scheme, due: int, host: Host) -> Desk:
        """The step of the job that is due, if it can be decoded."""
        if due < 0:
            return server
        results = dict(server.results)
        found = results.pop(due, {})
        weights = code.weights(_done({due: found})[due])
        if weights is None:
            return server._replace(results=results, missed=server.missed + 1)
        keys = sorted(weights)
        gradient = weighted_sum([found[_written(key)] for key in keys], [weights[key] for key in keys])
        k = due % len(server.networks)
        moved = Weights(tr.axpy(-self.rate(host.version), gradient, server.networks[k].params), {})
        networks = (*server.networks[:k], moved, *server.networks[k + 1 :])
        return server._replace(networks=networks, results=results)

    def report(self, server: Desk) -> Mapping[str, float]:
        """Jobs that could not be decoded."""
        return {"missed": server.missed}

    # --- a worker's half ---------------------------------------------------------------------------------------

    def sends(self, phase: Phase) -> type:
        """Rows, nothing, results."""
        made: dict[str, type] = {"gather": Rows, "place": NoneType, "work": Results}
        return made[phase.name]

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """Gradients of the model, by name; as many labels as rows."""
        spec = place.network(model).spec.params

        def vectors(found: Any) -> Wrong | None:
            if not isinstance(found, dict):
                return "", "is not gradients by task"
            return next((w for w in (compare(vector, spec) for vector in found.values()) if w is not None), None)

        def tensor(found: Any) -> Wrong | None:
            return None if isinstance(found, Tensor) else ("", "is not a tensor")

        return {"vectors": vectors, "x": tensor, "y": tensor}

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Tree) -> tuple[Tree, Tree]:
        """Hand over the rows, keep the chunks, or do the tasks."""
        if phase.name == "gather":
            rows = site.cast(site.train)
            return Rows(rows.x, rows.y), state
        if phase.name == "place":
            return None, message
        if state is None or isinstance(message, Common):  # no chunks, or asked only what training would change
            return Results({}), state
        tasks = [(Task(job, (group, number), terms)) for job, group, number, terms in message.tasks]
        return Results(
            {_name(t): self._gradient(site, message.models[str(t.job)], state, t, message.rows) for t in tasks}
        ), state

    def _gradient(self, site: Site, model: Weights, held: Held, task: Task, rows: int) -> Params:
        """The sum of a task's chunk gradients, times their coefficients, over the number of all rows."""
        spans = [(held.spans[chunk], coefficient) for chunk, coefficient in task.terms]
        index = torch.cat([torch.arange(*span) for span, _ in spans])
        if not len(index):
            zeros: Params = tr.zeros_like(model.params)
            return zeros
        dtype = site.architecture().dtype
        parts = [torch.full((span[1] - span[0],), coefficient, dtype=dtype) for span, coefficient in spans]
        scaled = torch.cat(parts) * (len(index) / rows)
        chunk = Split(held.x[index], held.y[index])
        once = [torch.arange(len(index))]
        fit = site.fit(model, data=chunk, sample_weight=scaled, batches=once, step=_kept, purpose=_name(task))
        found: Params = fit.carry
        return {name: found.get(name, torch.zeros_like(p)) for name, p in model.params.items()}  # frozen ones: 0

    # --- what would be deployed --------------------------------------------------------------------------------

    def global_model(self, server: Desk) -> Predictor:
        """The ensemble of the networks."""
        return _ensemble(server.networks)

    def personal_model(self, site: Site, message: Common | Orders, state: Tree) -> Predictor | None:
        """The same; of a round's orders, of the networks that they brought."""
        networks = message.networks if isinstance(message, Common) else tuple(message.models.values())
        return _ensemble(networks) if networks else None


def _ensemble(networks: Sequence[Weights]) -> Predictor:
    if len(networks) == 1:
        return Net(networks[0])
    return Ensemble(tuple(map(Net, networks)), (1 / len(networks),) * len(networks))


def _kept(params: Params, grad: Grad, batch: Batch, carry: Tree) -> tuple[Params, Params]:
    """A step that keeps its gradient."""
    direction = grad()
    return direction, tr.clone(direction)


def _name(task: Task) -> str:
    return f"{task.job}/{task.slot[0]}/{task.slot[1]}"


def _written(key: Key) -> str:
    return f"{key[0]}/{key[1][0]}/{key[1][1]}"


def _key(worker: int, task: Task) -> str:
    return _written((worker, task.slot))


def _done(results: Mapping[int, Mapping[str, Params]]) -> dict[int, set[Key]]:
    """Which results of each job have come."""
    found: dict[int, set[Key]] = {}
    for job, vectors in results.items():
        split = [tuple(map(int, key.split("/"))) for key in vectors]
        found[job] = {(worker, (group, number)) for worker, group, number in split}
    return found

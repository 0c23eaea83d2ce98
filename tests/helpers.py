"""Small federations, models and methods that misbehave, for tests. Importable in worker processes too."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from consilience import simulate
from consilience.core import tree as tr
from consilience.core.evaluate import Evaluation
from consilience.core.events import Instant
from consilience.core.executor import Executor
from consilience.core.federation import ClientData, Federation, Split, Task
from consilience.core.fit import Batch, Plan
from consilience.core.messages import Job, ModelUpdate, Refusal, Reply
from consilience.core.method import Method, Phase
from consilience.core.model import Architecture, Weights
from consilience.core.predict import Net
from consilience.core.reduce import weighted_sum
from consilience.core.run import run as run_loop
from consilience.core.setup import Setup
from consilience.core.site import Site
from consilience.core.snapshot import Snapshot
from consilience.core.training import option
from consilience.core.tree import Tree
from consilience.core.worker import Worker
from consilience.execute.serial import Serial
from consilience.measure.metrics import Standard
from consilience.methods.fedavg import FedAvg
from consilience.methods.fedopt import FedAdam
from consilience.methods.scaffold import Scaffold
from consilience.models.small import Linear, SplitModel
from consilience.schedule.rounds import Rounds
from consilience.simulate import prepare

SIZES = (7, 12, 20, 6, 10)
FEATURES, CLASSES = 5, 3


@dataclass(kw_only=True, eq=False)
class Parts(Federation):
    """A federation of given clients."""

    parts: Sequence[ClientData] = field(default=())

    def data(self, client: int) -> ClientData:
        return self.parts[client]

    def size(self, client: int) -> int:
        return len(self.parts[client].train)


def split(n: int, rng: np.random.Generator, *, regression: bool = False, dtype: torch.dtype = torch.float32) -> Split:
    """``n`` rows that can be learned."""
    x = rng.standard_normal((n, FEATURES)) + rng.standard_normal(FEATURES)
    y = x @ np.arange(1.0, 1 + FEATURES) + rng.standard_normal(n)
    if regression:
        return Split(torch.from_numpy(x).to(dtype), torch.from_numpy(y).to(dtype))
    return Split(torch.from_numpy(x).to(dtype), torch.from_numpy(np.digitize(y, (-4.0, 4.0))))


def federation(sizes: Sequence[int] = SIZES, *, regression: bool = False, dtype: Any = torch.float32) -> Parts:
    """Clients of these sizes, each with rows of its own distribution, and a global test set of 31 rows."""
    rng = np.random.default_rng(0)
    kind: dict[str, Any] = {"regression": regression, "dtype": dtype}
    task = Task("regression", 1) if regression else Task("classification", CLASSES)
    made = [ClientData(split(n, rng, **kind), split(0, rng, **kind), split(6, rng, **kind)) for n in sizes]
    test = split(31, rng, **kind)
    return Parts(name="parts", task=task, n_clients=len(sizes), input_shape=(FEATURES,), test=test, parts=made)


class Noisy(SplitModel):
    """A model with dropout and BatchNorm."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int) -> None:
        layers = [nn.Linear(input_shape[0], 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5)]
        super().__init__(nn.Sequential(*layers), nn.Linear(6, outputs), 6)


class Normed(SplitModel):
    """A model with BatchNorm and no dropout."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int) -> None:
        super().__init__(nn.Sequential(nn.Linear(input_shape[0], 6), nn.BatchNorm1d(6)), nn.Linear(6, outputs), 6)


class Twins(nn.Module):
    """Two parameters whose gradients autograd hands out as one tensor."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(outputs, *input_shape))
        self.q = nn.Parameter(torch.randn(outputs, *input_shape))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.p + self.q).T


class Frozen(SplitModel):
    """A model whose features its maker froze."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int) -> None:
        super().__init__(nn.Linear(input_shape[0], 6).requires_grad_(False), nn.Linear(6, outputs), 6)


class Counting(Linear):
    """A model with a buffer that is not part of its state and changes what it computes."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int) -> None:
        super().__init__(input_shape, outputs)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) / self.calls


class Breaking(Linear):
    """Fails while it trains."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise ValueError("boom")
        return super().forward(x)


def architecture(factory: Any = Linear, outputs: int = CLASSES, dtype: torch.dtype = torch.float32) -> Architecture:
    """A factory's architecture for the federations made here."""
    return Architecture(factory.__name__.lower(), factory, (FEATURES,), outputs, dtype)


LINEAR = architecture()
LINEAR64 = architecture(dtype=torch.float64)
SCALAR64 = architecture(outputs=1, dtype=torch.float64)
NOISY = architecture(Noisy)
NORMED = architecture(Normed)


def worker(method: Method, fed: Federation | None = None, model: Architecture = LINEAR, seed: int = 0) -> Worker:
    """A worker for ``method``."""
    return prepare(method, fed or federation(), model=model, seed=seed)


def site(at: Worker, client: int = 0, number: int = 1, version: int = 0) -> Site:
    """A client's site for its ``number``-th job."""
    return at.site(Job(0, client, number, 0, version, 0))[0]


def reply(client: int, update: Tree, samples: int = 1) -> Reply:
    """A reply as the server gets it."""
    return Reply(Job(client, client, 1, 0, 0, 0), update, samples, samples, 1, 0, 0.0, 0.0)


class Memory:
    """A recorder that keeps everything."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.clients: list[dict[str, Any]] = []
        self.dropped: list[tuple[int, Refusal]] = []
        self.snapshots: dict[int, Snapshot] = {}
        self.timeline: list[dict[str, Any]] = []

    def line(self, record: dict[str, Any], clients: Sequence[dict[str, Any]]) -> None:
        self.lines.append({key: value for key, value in record.items() if key != "wall_s"})
        self.clients.extend(clients)

    def refused(self, version: int, refusals: Sequence[Refusal]) -> None:
        self.dropped.extend((version, refusal) for refusal in refusals)

    def jobs(self, records: Sequence[dict[str, Any]]) -> None:
        self.timeline.extend(records)

    def checkpoint(self, snapshot: Snapshot) -> None:
        self.snapshots[snapshot.version] = snapshot


def loop(
    at: Worker | Executor,
    rounds: int,
    *,
    cohort: int = 99,
    resume: Snapshot | None = None,
    evaluation: Evaluation | None = None,
    **more: Any,
) -> Memory:
    """The server loop with a snapshot after every round."""
    executor = Serial(at) if isinstance(at, Worker) else at
    memory = Memory()
    clients = len(executor.worker.federation.seen)
    setup = Setup(
        rounds=rounds,
        cohort=min(cohort, clients),
        schedule=Rounds(),
        clock=Instant(),
        measures=Standard(),
        recorder=memory,
        stages=() if executor.worker.check is None else (executor.worker.check,),
        evaluation=evaluation or Evaluation(),
        checkpoint_every=1,
        **more,
    )
    run_loop(executor, setup, resume)
    return memory


def vector(tree: Tree) -> Tensor:
    """All floating numbers of a tree in one float64 vector."""
    return torch.cat([t.double().flatten() for t in tr.tensors(tree) if t.is_floating_point()])


# --- runs that die ---------------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[Method, Architecture]] = {
    "stateless": (FedAvg(batch_size=4), LINEAR),
    "server": (FedAdam(batch_size=4), LINEAR),
    "clients": (Scaffold(batch_size=4), LINEAR),
    "buffers": (FedAvg(batch_size=4, buffers="local"), NORMED),
    "all": (Scaffold(batch_size=4, buffers="local"), NORMED),
}
"""A method, and a model, for each shape of state."""


def shaped(shape: str, out: Path | None, failpoint: str = "", executor: str = "serial", **more: Any) -> None:
    """Run, or resume where there is something to resume; in a process of its own, it may be told to die."""
    if failpoint:
        os.environ["CONSILIENCE_FAILPOINT"] = failpoint
    method, model = SHAPES[shape]
    begun = out is not None and (out / "config.yaml").exists()
    usual: dict[str, Any] = {"rounds": 5, "participation": 3, "eval_clients_every": 2, "checkpoint_every": 1}
    simulate.run(
        method, federation(), model=model, executor=executor, workers=2, client_state_memory=0, out=out, resume=begun,
        **{**usual, **more},
    )  # fmt: skip


# --- methods that misbehave ------------------------------------------------------------------------------------


def _spoiled(weights: Weights) -> Weights:
    first = next(iter(weights.params))
    return weights._replace(params={**weights.params, first: torch.full_like(weights.params[first], float("nan"))})


@dataclass(frozen=True)
class Spoiler(FedAvg):
    """Client ``bad`` sends nan in the rounds up to ``until``."""

    bad: int = option(1, "who")
    until: int = option(99, "last round")

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Tree) -> tuple[Tree, Tree]:
        update, state = super().client_update(phase, site, message, state)
        if site.id == self.bad and site.job.round <= self.until:
            update = ModelUpdate(_spoiled(update.model))
        return update, state


@dataclass(frozen=True)
class SpoiledTwice(Spoiler):
    """A round of two chains; the second fails for whoever was refused in the first."""

    def program(self) -> tuple[Phase, ...]:
        return (Phase("one"), Phase("two"))

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Tree) -> tuple[Tree, Tree]:
        if phase.name == "two":
            assert site.id != self.bad, "refused, and asked again"
            return FedAvg.client_update(self, phase, site, message, state)
        return super().client_update(phase, site, message, state)


@dataclass(frozen=True)
class Careless(FedAvg):
    """Client 1 changes in round 2 what it was given: the message, or its own state."""

    what: str = option("message", "message, state or server")

    def init_client(self, site: Site) -> Tree:
        return {"seen": torch.zeros(2)}

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Tree) -> tuple[Tree, Tree]:
        if site.id == 1 and site.job.round == 2:
            if self.what == "message":
                message.model.params["head.bias"].view(-1)[0] += 1
            if self.what == "state":
                state["seen"].mul_(2)
        update, _ = super().client_update(phase, site, message, state)
        return update, {"seen": state["seen"] + 1}

    def aggregate(self, phase: Phase, host: Any, server: Tree, replies: Any, cohort: Any) -> Tree:
        if self.what == "server":
            server.model.params["head.bias"].zero_()
        return super().aggregate(phase, host, server, replies, cohort)


@dataclass(frozen=True)
class BreaksWhenJudged(FedAvg):
    """Fails in a stage of judging."""

    stage: str = option("trained_model", "where")

    def _fail(self, stage: str) -> None:
        if stage == self.stage:
            raise ValueError("boom")

    def init_client(self, site: Site) -> Tree:
        self._fail("init_client")
        return None

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Tree) -> tuple[Tree, Tree]:
        self._fail("client_update")
        return super().client_update(phase, site, message, state)

    def personal_model(self, site: Site, message: Tree, state: Tree) -> Any:
        self._fail("personal_model")
        return super().personal_model(site, message, state)

    def trained_model(self, site: Site, message: Tree, update: Tree, state: Tree) -> Any:
        self._fail("trained_model")
        return super().trained_model(site, message, update, state)


@dataclass(frozen=True)
class SpoiledScaffold(Scaffold):
    """Client 1 sends a nan control in every other round."""

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Tree) -> tuple[Tree, Tree]:
        update, state = super().client_update(phase, site, message, state)
        if site.id == 1 and site.job.round % 2:
            update = update._replace(control=_spoiled(Weights(update.control, {})).params)
        return update, state


@dataclass(frozen=True)
class Chosen(FedAvg):
    """Asks the same clients every round. numpy: names them by numpy integers."""

    who: tuple[int, ...] = option((0, 2), "the clients")
    numpy: bool = option(False, "as an array")

    def select(self, server: Tree, view: Any) -> Any:
        return np.array(self.who) if self.numpy else list(self.who)


@dataclass(frozen=True)
class Breaks(FedAvg):
    """Client 1's loss fails in round 2."""

    def plan(self, site: Site, message: Tree, state: Tree) -> Plan:
        def broken_loss(model: nn.Module, batch: Batch) -> Tensor:
            raise ValueError("boom")

        return Plan(loss=broken_loss) if site.id == 1 and site.job.round == 2 else Plan()


@dataclass(frozen=True)
class Dies(FedAvg):
    """Client 2's process kills itself in round 2, once (or always, without a marker file)."""

    marker: str = option("", "file that says it has happened")

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Tree) -> tuple[Tree, Tree]:
        if site.id == 2 and site.job.round == 2 and not (self.marker and Path(self.marker).exists()):
            if self.marker:
                Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().client_update(phase, site, message, state)


@dataclass(frozen=True)
class Remembers(FedAvg):
    """A client's state counts its updates."""

    def init_client(self, site: Site) -> Tree:
        return {"count": 0}

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Tree) -> tuple[Tree, Tree]:
        update, _ = super().client_update(phase, site, message, state)
        return update, {"count": state["count"] + 1}


@dataclass(frozen=True)
class Gossip(Method):
    """Local steps, then the mean of parameters with neighbours; buffers stay at home."""

    name = "gossip"

    def program(self) -> tuple[Phase, ...]:
        return (Phase("train"), Phase("mix", over="neighbours"))

    def init_server(self, host: Any) -> Tree:
        return None

    def broadcast(self, phase: Phase, server: Tree, client: Any) -> Tree:
        return None

    def init_client(self, site: Site) -> Weights:
        return site.initial()

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Weights) -> tuple[Tree, Tree]:
        return None, site.fit(state).weights

    def aggregate(self, phase: Phase, host: Any, server: Tree, replies: Any, cohort: Any) -> Tree:
        return server

    def send(self, phase: Phase, state: Weights) -> Tree:
        return state.params

    def mix(self, phase: Phase, site: Site, state: Weights, inbox: Any) -> Weights:
        mean = weighted_sum(list(inbox.messages.values()), list(inbox.weights.values()))
        return Weights(mean, state.buffers)

    def global_model(self, server: Tree) -> None:
        return

    def personal_model(self, site: Site, message: Tree, state: Weights) -> Net:
        return Net(state, site.model)


def spots(node: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON value, as (container, key)."""
    found = []
    if isinstance(node, (dict, list)):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            found += [(node, key), *spots(node[key])]
    return found

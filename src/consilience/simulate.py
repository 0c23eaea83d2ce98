"""Run one method on one federation in simulation: the Python way in."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from consilience.architectures import Model, assign, resolve
from consilience.core.errors import CheckpointError, ConfigError, NeedsError, nearest
from consilience.core.evaluate import Evaluation
from consilience.core.events import Clock, RealTime, Schedule, cohort_size
from consilience.core.executor import Executor
from consilience.core.federation import Federation, Split
from consilience.core.messages import Device, Refusal
from consilience.core.method import Method
from consilience.core.model import Architecture, Weights
from consilience.core.predict import Predictor
from consilience.core.run import Loop
from consilience.core.setup import Setup
from consilience.core.site import Place
from consilience.core.site import Topology as Graphs
from consilience.core.snapshot import Snapshot
from consilience.core.states import States
from consilience.core.units import parse_bytes
from consilience.core.worker import Worker, pooled
from consilience.execute.memory import keep_freed_memory
from consilience.execute.processes import Processes, cores
from consilience.execute.serial import Serial
from consilience.execute.shared import Temporary
from consilience.execute.stacked import Stacked
from consilience.fleet.clock import Fleet, make_devices, make_fleet
from consilience.fleet.summary import describe
from consilience.fleet.varying import Topology
from consilience.fleet.varying import summary as topology_summary
from consilience.folder import RunFolder, digest_text
from consilience.measure import adversarial
from consilience.measure.metrics import Standard
from consilience.parts.compose import composed
from consilience.parts.compressed import Compressed
from consilience.parts.split import head_of
from consilience.privacy.options import NONE, Privacy
from consilience.schedule import names as schedules
from consilience.schedule.buffered import Buffered
from consilience.schedule.deadline import Deadline
from consilience.schedule.gossip import Gossip
from consilience.schedule.rounds import Rounds
from consilience.wire.adversary import Adversary, attacked
from consilience.wire.adversary import parse as parse_attack
from consilience.wire.decode import stages
from consilience.wire.validate import Validation

if TYPE_CHECKING:
    import pandas as pd

MIXES = {
    "same": "one architecture for all clients",
    "widths": "nested widths of one model (--models NAME@RATE,...)",
    "family": "models of one family (--models resnet8,resnet14,..., or nested widths)",
    "any": "",
}
"""What a method needs of architectures, in words."""
EXECUTORS = ("auto", "serial", "processes", "stacked", "ray")


class History(list[dict[str, Any]]):
    """Lines of history, one per evaluated round."""

    def to_pandas(self) -> pd.DataFrame:
        """A table with a row per line; nested keys are joined with dots, as in ``global.accuracy``."""
        import pandas as pd

        return pd.json_normalize(list(self))


@dataclass
class Result:
    """What a run gave. history: see the files of a run. clients: a row per judged client and judged round.
    snapshot: the final state. refused: updates that were dropped. folder: where it was written, if it was.
    timeline: a row per job: who, when, what the time went into and what became of it."""

    method: Method
    history: History
    clients: list[dict[str, Any]]
    snapshot: Snapshot
    worker: Worker
    refused: list[tuple[int, Refusal]] = field(default_factory=list)
    folder: Path | None = None
    timeline: list[dict[str, Any]] = field(default_factory=list)

    @property
    def server(self) -> Any:
        """The server's final state."""
        return self.snapshot.server

    @property
    def states(self) -> Mapping[int, Any]:
        """Final state of each client that has one."""
        return self.snapshot.states

    @property
    def global_model(self) -> Predictor | None:
        """What the server would deploy."""
        return self.method.global_model(self.server)

    def predict(self, x: Tensor) -> Tensor:
        """The global model's scores for inputs ``x``, ``(n, *shape)``."""
        predictor = self.global_model
        if predictor is None:
            raise ConfigError(f"{self.method.name} has no global model")
        return self.worker.host(self.snapshot.version, "predict").scores(predictor, x)

    @property
    def digest(self) -> str:
        """Three lines: SHA-256 of server state, client states, and history without wall times."""
        return digest_text(self.snapshot, self.history)


def run(
    method: Method,
    federation: Federation,
    *,
    model: Model = "mlp",
    models: str | Sequence[Model] | None = None,
    feature_dim: int | None = None,
    rounds: int = 50,
    participation: float = 1.0,
    fleet: str | Sequence[Device] = "uniform",
    fleet_correlation: str = "0",
    availability: str = "always",
    drops: float = 0.0,
    schedule: str | Schedule | None = None,
    concurrency: int | None = None,
    over_selection: float = 1.0,
    late: Literal["discard", "partial"] = "discard",
    topology: str = "complete",
    mixing: str = "metropolis",
    eval_every: int = 1,
    eval_clients_every: int = 10,
    eval_clients: int | None = None,
    checkpoint_every: int = 10,
    executor: str = "auto",
    workers: int | None = None,
    address: str | None = None,
    client_state_memory: int | str | None = "1GB",
    init: Weights | None = None,
    clock: Clock | None = None,
    attack: str | None = None,
    robustness: str | None = None,
    privacy: Privacy = NONE,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    config: Mapping[str, Any] | None = None,
    on_line: Callable[[dict[str, Any]], None] | None = None,
) -> Result:
    """Train ``method`` on ``federation`` and return a :class:`Result`.

    model: the server's, by name, factory or Architecture; models: of the clients, as
    :func:`consilience.architectures.assign` takes them, if not all have the server's. feature_dim: features that every
    model's head is given. participation: a fraction (float, at most 1) or a count (int) of the
    clients per round. client_state_memory: bytes of clients' states to keep in memory, as a number or as in "500MB"
    (None: all); those used least lately go to files, in ``out`` or among temporary files. fleet: of simulated
    devices: a name, a csv file, a function, or a Device for each client. clock: how long jobs take in virtual time,
    instead of a fleet. attack: what hostile clients do, as ``--attack`` takes it; they are not
    judged. robustness: how far inputs may be changed on which the last global model is judged, as ``--robustness``
    takes it. privacy: what is to be private. address: of the Ray cluster, with executor "ray". out: a folder to write;
    resume: go on from the folder's newest checkpoint. config: what config.yaml shall say. on_line: called with each
    line of history. The rest as in the command line.

    Raises ConfigError, DataError or NeedsError before any work, ClientError if a client's own code fails.
    """
    method, harm = composed(privacy.method(method)), parse_attack(attack)
    nearby = adversarial.parse(robustness)
    worker = prepare(
        method, federation, model=model, models=models, feature_dim=feature_dim, topology=topology, mixing=mixing,
        init=init, seed=seed, fleet=fleet, fleet_correlation=fleet_correlation, attack=attack,
    )  # fmt: skip
    _check_counts(rounds, participation, eval_every, eval_clients_every)
    final = {} if nearby is None else {"robustness": partial(adversarial.at_end, worker, nearby)}
    if final:
        adversarial.check(worker)
    when = {
        "fleet": fleet, "fleet_correlation": fleet_correlation, "availability": availability, "drops": drops,
        "schedule": schedule, "concurrency": concurrency, "over_selection": over_selection, "late": late,
    }  # fmt: skip
    found, rule = timing(worker, participation=participation, clock=clock, **when)  # type: ignore[arg-type]
    cohort = cohort_size(participation, federation.n_seen)
    _check_presence(worker, rule, cohort == federation.n_seen, availability == "always" and not drops)
    path = None if out is None else Path(out)
    release = partial(privacy.release, worker, rule, rounds=rounds, cohort=cohort, available=availability == "always")
    release()  # refused before anything is written
    # what a checkpoint may be resumed with: everything that decides the bits, beside the data's fingerprint
    named = (
        method.name,
        method,
        seed,
        participation,
        list(worker.place.architectures),
        worker.place.models,
        feature_dim,
        _topology(topology),
        mixing,
        executor == "stacked",
    )
    devices = fleet if clock is None else getattr(clock, "name", type(clock).__qualname__)
    combines = rule if schedule is None or isinstance(schedule, str) else type(rule).__qualname__
    more = (*([harm] if harm else []), *([privacy, rounds] if privacy != NONE else []))
    identity = repr((*named, devices, availability, drops, fleet_correlation, combines, *more))
    adversary = [] if harm is None else [Adversary(harm, worker, found, seed)]
    budget = None if client_state_memory is None else parse_bytes(client_state_memory)
    with cluster(executor, address, workers):
        recorder, snapshot, spent = _recorder(
            path, resume, {**(config or {}), "identity": identity}, federation, budget
        )
        states = recorder.states if recorder is not None else States(Temporary(), budget)
        keeper = _Keeper(recorder, states, on_line)
        setup = Setup(
            rounds=rounds,
            cohort=cohort,
            schedule=rule,
            clock=found,
            measures=Standard(),
            recorder=keeper,
            stages=stages(worker, adversary),
            release=release(folder=path),
            evaluation=Evaluation(eval_every, eval_clients_every, eval_clients, worker.place.chunk, final),
            checkpoint_every=checkpoint_every,
            elapsed=spent,
            gossip=isinstance(rule, Gossip),
        )
        keep_freed_memory()
        with single_thread():
            place = make_executor(executor, worker, workers)
            place.keep(states)
            try:
                last = _begun(place, setup, snapshot, None if resume else recorder).run()
            finally:
                place.close()
    if recorder is not None:
        about = describe(found, federation, last.time) if isinstance(found, Fleet) else {}
        if worker.place.topology is not None:
            about["topology"] = topology_summary(topology, federation.n_seen, mixing, seed)
        recorder.finish(last, about)
    return Result(method, History(keeper.lines), keeper.clients, last, worker, keeper.dropped, path, keeper.timeline)


def prepare(
    method: Method,
    federation: Federation,
    *,
    model: Model = "mlp",
    models: str | Sequence[Model] | None = None,
    feature_dim: int | None = None,
    topology: str = "complete",
    mixing: str = "metropolis",
    init: Weights | None = None,
    seed: int = 0,
    chunk: int = 500,
    fleet: str | Sequence[Device] = "uniform",
    fleet_correlation: str = "0",
    attack: str | None = None,
) -> Worker:
    """Everything that client work needs, checked: architectures, initial weights, topology, the method's needs. fleet:
    for architectures by the memory of devices."""
    method, harm = composed(method), parse_attack(attack)
    if harm is not None:
        if any(phase.over == "neighbours" for phase in method.program()):
            raise ConfigError(f"{method.name} has no server; --attack is on what is sent to one")
        federation = attacked(federation, harm, seed)
    own = resolve(model, federation, feature_dim)
    assigned = None
    if models is not None:
        devices = partial(make_devices, fleet, federation, seed, fleet_correlation)
        assigned = assign(models, federation, seed, feature_dim, devices)
    architectures = {own.name: own} | {a.name: a for a in assigned or ()}
    Offer(federation, architectures).check(method)
    _check_operator(own, federation)
    if init is not None:
        _check_init(own, init)
    weights_of = None
    if any(phase.over == "neighbours" for phase in method.program()):
        weights_of = Topology(topology, tuple(int(client) for client in federation.seen), mixing, seed)
    place = Place(
        task=federation.task,
        method=method,
        architectures=architectures,
        models=None if assigned is None else tuple(a.name for a in assigned),
        seed=seed,
        initial=init,
        chunk=chunk,
        public=federation.public,
        n_clients=federation.n_seen,
        rows=sum(federation.size(int(client)) for client in federation.seen) if method.counts_rows else 0,
        topology=weights_of,
        pooled=pooled(federation) if method.needs.pooled_data else None,
        networks=method.networks(architectures),
    )
    worker = Worker(place, federation, method.program(), Validation(place))
    if isinstance(method, Compressed):
        method.check_down(worker.host(0, "init"))
    return worker


@dataclass(frozen=True)
class Offer:
    """What a federation offers to methods. architectures: by name, the server's first."""

    federation: Federation
    architectures: Mapping[str, Architecture]

    def missing(self, method: type[Method] | Method) -> list[str]:
        """What ``method`` needs and is not there, in words."""
        needs, task = method.needs, self.federation.task
        widths = {a.width for a in self.architectures.values()}
        heads = {tuple((name, p.shape) for name, p in head_of(a.spec).items()) for a in self.architectures.values()}
        lacks = [
            (not self._mixes(needs.architectures), MIXES[needs.architectures]),
            (needs.split_model and None in widths, "split models (features and head)"),
            (needs.same_features and len(widths) > 1, "one feature width for all models (--feature-dim N)"),
            (needs.same_features and len(widths) == 1 and len(heads) > 1, "heads of one shape"),
            (needs.public_data and self.federation.public is None, "public data (--public N)"),
            (needs.classification and task.kind != "classification", "a classification task"),
            (needs.loss and not task.minimises, "a task with a loss"),
        ]
        return [words for lacking, words in lacks if lacking]

    def _mixes(self, needed: str) -> bool:
        """Whether the architectures are no more different than a method can take."""
        models = list(self.architectures.values())
        if needed == "any" or len(models) == 1:
            return True
        if needed == "widths":
            return len({a.whole or a.name for a in models}) == 1
        return needed == "family" and len({a.family or a.name for a in models}) == 1

    def check(self, method: Method) -> None:
        """Raise NeedsError, naming the methods that would fit."""
        from consilience import methods

        lacks = self.missing(method)
        if lacks:
            fit = [name for name, cls in methods.every().items() if not self.missing(cls)]
            raise NeedsError(
                f"{method.name} needs {' and '.join(lacks)}, which this federation does not offer\n"
                f"methods that fit it: {', '.join(fit) or 'none'}"
            )


def _check_operator(architecture: Architecture, federation: Federation) -> None:
    """Raise ConfigError or DataError if the task has an operator that is of other parameters than this model's."""
    operator = federation.task.operator
    if operator is None or not federation.n_seen:
        return
    rows = federation.data(int(federation.seen[0])).train.rows(slice(0, 1))
    module = architecture.build()
    found = operator(module, Split(rows.x.to(architecture.dtype), rows.y))
    missing = [name for name, p in module.named_parameters() if p.requires_grad and name not in found]
    if missing:
        raise ConfigError(
            f"the task's operator says nothing of parameter '{missing[0]}' of model '{architecture.name}'"
        )


def _check_init(architecture: Architecture, init: Weights) -> None:
    own = architecture.initial(0)
    for given, wanted in ((init.params, own.params), (init.buffers, own.buffers)):
        if {k: v.shape for k, v in given.items()} != {k: v.shape for k, v in wanted.items()}:
            raise ConfigError(f"--init: these weights are not of model '{architecture.name}' for this federation")


def _check_counts(rounds: int, participation: float, eval_every: int, eval_clients_every: int) -> None:
    if rounds < 1:
        raise ConfigError(f"rounds={rounds}: at least 1")
    if isinstance(participation, float) and not 0 < participation <= 1:
        raise ConfigError(f"participation={participation}: a fraction is above 0 and at most 1 (a count has no point)")
    if participation < 1 and isinstance(participation, int):
        raise ConfigError(f"participation={participation}: a count is at least 1")
    if eval_every < 1 or eval_clients_every < 0:
        raise ConfigError("eval_every is at least 1 round, eval_clients_every at least 0 (0: only at the end)")


def _check_presence(worker: Worker, rule: Schedule, asked: bool, reliable: bool) -> None:
    """Raise ConfigError if clients that a method needs in its rounds can be missing. asked: whether each round asks
    everybody; reliable: whether who is asked comes."""
    method, topology = worker.method, worker.place.topology
    if method.asks_all and not (asked and isinstance(rule, (Rounds, Deadline))):
        raise ConfigError(
            f"{method.name} asks every client in every round: use participation=1.0 and schedule=rounds or deadline"
        )
    present = asked and reliable and isinstance(rule, Rounds)
    if method.everybody:
        _check_everybody(method, present, topology)
    if method.keeps_mean and topology is not None:
        _check_mean(method, present, topology)


def _check_everybody(method: Method, present: bool, topology: Graphs | None) -> None:
    """Raise ConfigError if anybody can miss a round of a method that has to have everybody in it, or a message."""
    if topology is not None and not topology.static:
        raise ConfigError(f"{method.name} with these options goes by one graph: use a topology that stays the same")
    if not present:
        raise ConfigError(
            f"{method.name} with these options takes every client in every round: use participation=1.0, "
            "availability=always, drops=0 and schedule=rounds"
        )


def _check_mean(method: Method, present: bool, topology: Graphs) -> None:
    """Raise ConfigError if mixing can move a mean that the method goes by."""
    if not topology.balanced:
        raise ConfigError(
            f"{method.name} needs weights whose columns sum to 1, and those of 'pull' do not; use another"
        )
    if not present and not topology.symmetric:
        raise ConfigError(
            f"{method.name} over a topology whose weights are not symmetric takes every client in every round: use "
            "participation=1.0, availability=always, drops=0 and schedule=rounds, or another topology"
        )


def timing(
    worker: Worker,
    *,
    participation: float,
    clock: Clock | None = None,
    fleet: str | Sequence[Device] = "uniform",
    fleet_correlation: str = "0",
    availability: str = "always",
    drops: float = 0.0,
    schedule: str | Schedule | None = None,
    **options: Any,
) -> tuple[Clock, Schedule]:
    """The clock and the schedule of a run, checked. options: of :func:`consilience.schedule.names.make`."""
    method, clients = worker.method, worker.federation.n_seen
    if clock is None:
        clock = make_fleet(
            worker.place, worker.federation, fleet=fleet, availability=availability, correlation=fleet_correlation,
            drops=drops,
        )  # fmt: skip
    if schedule is not None and not isinstance(schedule, str):
        return clock, schedule
    name = schedule or method.default_schedule()
    if schedule is None and name.partition(":")[0] not in ("buffered", "interval", "async"):
        options["concurrency"] = None  # a shared setting for those methods that it concerns
    if schedule is None and name.partition(":")[0] != "deadline":
        options.update(over_selection=1.0, late="discard")
    made = schedules.make(name, **options)
    linked = ("client", "neighbours") if isinstance(made, Gossip) else ("client",)
    if isinstance(made, Gossip):
        _check_gossip(method, clock)
    chains = [p for p in method.program() if p.over not in linked and p.when not in ("start", "end")]
    if len(chains) > 1 and name.partition(":")[0] not in schedules.SYNCHRONOUS:
        raise ConfigError(
            f"{method.name} has {len(chains)} phases that wait for each other; it runs with --schedule "
            f"{' or '.join(schedules.SYNCHRONOUS)}, not {name}"
        )
    if isinstance(made, Buffered) and made.buffer > clients:
        raise ConfigError(f"--schedule {name}: a buffer of {made.buffer} never fills with {clients} clients that train")
    return clock, made


def _check_gossip(method: Method, clock: Clock) -> None:
    """Raise ConfigError where nodes cannot gossip."""
    if not method.gossips:
        from consilience import methods

        fit = [name for name, cls in methods.every().items() if cls.gossips]
        raise ConfigError(
            f"{method.name} has no messages that neighbours can mix at any time; --schedule gossip is for "
            f"{', '.join(fit)}"
        )
    if isinstance(clock, RealTime):
        raise ConfigError("--schedule gossip is for simulated devices; use rounds")


def make_executor(name: str, worker: Worker, workers: int | None) -> Executor:
    """An executor by name; "auto" is one process per core, or none beside this on a single core. "ray" only inside
    :func:`consilience.execute.ray.connected`."""
    if name not in EXECUTORS:
        raise ConfigError(f"unknown executor '{name}'{nearest(name, EXECUTORS)}")
    count = cores() if workers is None else workers
    if count < 1:
        raise ConfigError(f"workers={count}: at least 1")
    if name == "ray":
        from consilience.execute.ray import Ray

        return Ray(worker, workers)
    if name == "serial" or (name == "auto" and count == 1):
        return Serial(worker)
    return (Stacked if name == "stacked" else Processes)(worker, count)


def cluster(executor: str, address: str | None, workers: int | None) -> contextlib.AbstractContextManager[None]:
    """Inside, what an executor runs on is there. Raises ConfigError."""
    if executor == "ray":
        from consilience.execute.ray import connected

        return connected(address, workers)
    if address is not None:
        raise ConfigError("--address goes with --executor ray")
    return contextlib.nullcontext()


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """One torch thread inside: results must not depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Keeper:
    """Keeps lines in memory, and passes them to a folder and a listener if there are any."""

    def __init__(
        self, folder: RunFolder | None, states: States, on_line: Callable[[dict[str, Any]], None] | None
    ) -> None:
        self._folder, self._states, self._on_line = folder, states, on_line
        self.lines = folder.lines if folder is not None else []
        self.clients = folder.clients if folder is not None else []
        self.timeline = folder.timeline if folder is not None else []
        self.dropped: list[tuple[int, Refusal]] = [
            (line["round"], Refusal(line["client"], line["field"], line["reason"]))
            for line in (folder.refused_lines if folder is not None else [])
        ]

    def line(self, record: dict[str, Any], clients: Sequence[dict[str, Any]]) -> None:
        """A round was evaluated."""
        if self._folder is not None:
            self._folder.line(record, clients)
        else:
            self.lines.append(record)
            self.clients.extend(clients)
        if self._on_line is not None:
            self._on_line(record)

    def refused(self, version: int, refusals: Sequence[Refusal]) -> None:
        """Updates were dropped."""
        self.dropped.extend((version, refusal) for refusal in refusals)
        if self._folder is not None:
            self._folder.refused(version, refusals)

    def jobs(self, records: Sequence[dict[str, Any]]) -> None:
        """Jobs ended."""
        if self._folder is not None:
            self._folder.jobs(records)
        else:
            self.timeline.extend(records)

    def checkpoint(self, snapshot: Snapshot) -> None:
        """A good moment to save."""
        if self._folder is not None:
            self._folder.checkpoint(snapshot)
        else:
            self._states.shrink()


def _begun(place: Executor, setup: Setup, snapshot: Snapshot | None, fresh: RunFolder | None) -> Loop:
    """The loop. Where the method refuses what it is to start from, nothing is left of a ``fresh`` folder."""
    try:
        return Loop(place, setup, snapshot)
    except ConfigError:
        if fresh is not None:
            fresh.discard()
        raise


def _topology(name: str) -> str:
    """A topology as a resumed run has to have it: a file is what stands in it."""
    path = Path(name)
    return f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}" if path.is_file() else name


def _recorder(
    path: Path | None, resume: bool, config: Mapping[str, Any], federation: Federation, budget: int | None
) -> tuple[RunFolder | None, Snapshot | None, float]:
    """Where to write, what to go on from, and the wall seconds already spent."""
    if path is None:
        return None, None, 0.0
    stamp = {"fingerprint": federation.fingerprint()}
    if not resume:
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file; --out wants a folder")
        if any((path / name).exists() for name in ("config.yaml", "compare.yaml")):
            raise ConfigError(f"{path} already holds a run; give another --out, or resume it")
        return RunFolder.create(path, {**config, **stamp}, federation, budget), None, 0.0
    import yaml

    try:
        written = yaml.safe_load((path / "config.yaml").read_text())
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: no run to resume ({error})") from error
    if written.get("fingerprint") != stamp["fingerprint"]:
        raise CheckpointError(f"{path}: this run began on other data or another partition; resume it on the same")
    if written.get("identity") != config["identity"]:
        raise CheckpointError(f"{path}: this run began with another method, model, seed or options; give the same")
    return RunFolder.resume(path, budget)

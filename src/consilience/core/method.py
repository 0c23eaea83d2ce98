"""Methods: what is sent, what a client does, and how replies combine. The defaults are FedAvg.

A method is a frozen dataclass whose fields are its hyper-parameters; they are the options of the command line
and the schema of configuration files. ``self`` never changes during a run: what must be remembered lives in the
server's tree or in a client's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from consilience.core import optim, order
from consilience.core import tree as tr
from consilience.core.errors import ConfigError, nearest
from consilience.core.fit import Fit, Guard, Plan, fit_samples, n_steps
from consilience.core.messages import Broadcast, ClientInfo, DeltaUpdate, Inbox, ModelUpdate, Reply, kinds
from consilience.core.model import Architecture, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.reduce import sample_weights, uniform_weights, weighted_sum
from consilience.core.training import Training
from consilience.core.tree import Tree, record

if TYPE_CHECKING:
    from consilience.core.events import View
    from consilience.core.shapes import Expected
    from consilience.core.site import Host, Place, Site


@dataclass(frozen=True)
class Coin:
    """A phase that happens with probability ``p`` each round, by a coin that everybody shares."""

    p: float


@dataclass(frozen=True)
class At:
    """A phase of one round, counted from 1."""

    round: int


@dataclass(frozen=True)
class Phase:
    """One broadcast, one client function, one combination.

    over: "cohort": all clients of the round, then the server combines. "client": goes on from the phase before
    for that client alone, with a broadcast built at the virtual instant at which its job asks for it.
    "neighbours": an exchange along the topology without a server. when: "round" (every round), "start" (before
    the first), "end" (after the last), At one round, or a Coin. asks: clients only answer the server, and do not train.
    """

    name: str
    over: Literal["cohort", "client", "neighbours"] = "cohort"
    when: Literal["round", "start", "end"] | Coin | At = "round"
    asks: bool = False

    @property
    def inner(self) -> bool:
        """Whether it is part of rounds, and not only a question."""
        return self.when not in ("start", "end") and not self.asks


@dataclass(frozen=True)
class Needs:
    """What a method needs of a federation; a federation that does not offer it gets one clear error.

    architectures: which may be mixed. "same": none, all clients have the server's; "widths": the server's and its
    nested widths (``NAME@RATE``); "family": models of one family, whose parts have common names; "any".
    same_features: all models give features of one width (``--feature-dim``).
    """

    architectures: Literal["same", "widths", "family", "any"] = "same"
    same_features: bool = False
    split_model: bool = False
    public_data: bool = False
    classification: bool = False
    loss: bool = False
    topology: bool = False
    pooled_data: bool = False


@record
class ServerState(NamedTuple):
    """FedAvg's server: the global model."""

    model: Weights


@functools.cache
def _validators(cls: type) -> dict[str, TypeAdapter[Any]]:
    hints = get_type_hints(cls, include_extras=True)
    strict = ConfigDict(allow_inf_nan=False)
    return {f.name: TypeAdapter(hints[f.name], config=strict) for f in dataclasses.fields(cls)}


@dataclass(frozen=True)
class Method(Training):
    """Federated averaging, and the base of every method.

    Server state: x. Each round: clients get x, train locally to y_i and send it; the server sets
    x <- sum_i p_i y_i  (form "model") or  x <- x + sum_i p_i (y_i - x)  (form "delta").
    """

    name: ClassVar[str] = ""
    family: ClassVar[str] = ""
    source: ClassVar[str] = ""
    year: ClassVar[int] = 0
    confidence: ClassVar[Literal["high", "medium", "low"]] = "high"
    needs: ClassVar[Needs] = Needs()
    schedule: ClassVar[str] = "rounds"
    trains_on_server: ClassVar[bool] = False
    """Whether ``aggregate`` trains, so that it should run where client work runs."""
    counts_rows: ClassVar[bool] = False
    """Whether ``host.rows`` is wanted: all clients' training rows together, which takes asking each of them."""
    takes_rules: ClassVar[bool] = False
    """Whether ``aggregate`` weighs by :meth:`shares`, so that a rule may give the weights."""
    takes_momentum: ClassVar[bool] = True
    """Whether clients that send differences may send momenta of them: not where they rely on what they sent."""
    takes_aggregator: ClassVar[bool] = False
    """Whether ``aggregate`` may be given one update in the place of several, though it wants more than their sums."""
    asks_all: ClassVar[bool] = False
    """Whether each round asks every client, one round after another; not all of them need to come."""
    gossips: ClassVar[bool] = False
    """Whether a node may mix what neighbours sent in rounds of their own, whenever it has come."""
    keeps_mean: ClassVar[bool] = False
    """Whether the mean over nodes must survive mixing in every round: weights' columns have to sum to 1."""
    own_batches: ClassVar[str] = ""
    """Why rows cannot be ordered, if they cannot: what the method does instead."""
    unstacked: ClassVar[str] = ""
    """Why clients that run in step cannot have their gradients computed together, if they cannot."""
    compresses: ClassVar[Literal["", "down", "both"]] = ""
    """Which options for compression are the method's own business: ``compress_down`` or ``compress`` too."""

    def __post_init__(self) -> None:
        for key, adapter in _validators(type(self)).items():  # type: ignore[arg-type]
            try:
                value = adapter.validate_python(getattr(self, key))
            except ValidationError as error:
                why = error.errors()[0]["msg"]
                raise ConfigError(f"{self.name or 'method'}: {key}={getattr(self, key)!r}: {why}") from None
            object.__setattr__(self, key, value)
        optim.check(self.optimizer, self.momentum, self.weight_decay)
        if not order.parse(self.row_order).plain and self.own_batches:
            raise ConfigError(f"{self.name} {self.own_batches}; use row_order=random")
        self.check()

    def check(self) -> None:
        """Refuse combinations of hyper-parameters that make no sense, with a ConfigError."""

    @classmethod
    def options(cls) -> dict[str, dataclasses.Field[Any]]:
        """The hyper-parameters by name."""
        return {f.name: f for f in dataclasses.fields(cls)}

    @classmethod
    def make(cls, values: dict[str, Any]) -> Method:
        """A method from option values (strings allowed); unknown keys are refused with the nearest right one."""
        for key in values:
            if key not in cls.options():
                raise ConfigError(f"{cls.name} has no option '{key}'{nearest(key, cls.options())}")
        return cls(**values)

    @classmethod
    def over(cls, values: Mapping[str, Any]) -> type[Method]:
        """The class that these option values ask for: a method that wraps another is one of several."""
        return cls

    def rate(self, version: int) -> float:
        """Local step size after ``version`` server updates."""
        return self.lr * self.lr_decay**version

    def networks(self, models: Mapping[str, Architecture]) -> Mapping[str, Architecture]:
        """Networks that the method needs beside the clients' models (generators, projections), by names that sites and
        the server know them by. models: the architectures of the run, the server's first."""
        return {}

    def program(self) -> tuple[Phase, ...]:
        """The phases of a round."""
        return (Phase("train"),)

    @property
    def everybody(self) -> bool:
        """Whether every client has to take part in every round, since nobody may miss a message."""
        return False

    def default_schedule(self) -> str:
        """The schedule to run with if none is asked for, as ``--schedule`` takes it."""
        return self.schedule

    def steps_of(self, rows: int, steps: int | None = None) -> int:
        """Local steps of one training with this method's settings on ``rows`` rows; ``steps``: a job's own."""
        return n_steps(rows, self.batch_size, self.local_epochs, self.local_steps if steps is None else steps)

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """Samples that a client with ``rows`` training rows certainly computes in this phase; 0 promises nothing.

        Asynchronous runs use it to know how long no reply can come, so that they compute many jobs at once. A
        method with its own ``client_update`` that trains once at least may return :meth:`one_fit`.
        """
        if type(self).client_update is not Method.client_update or phase.over == "neighbours":
            return 0
        return self.one_fit(rows, steps)

    def one_fit(self, rows: int, steps: int | None) -> int:
        """Samples of one training with this method's settings."""
        return fit_samples(rows, self.batch_size, self.steps_of(rows, steps))

    # --- the server's half -------------------------------------------------------------------------------------

    def init_server(self, host: Host) -> Tree:
        """The server's first state."""
        return ServerState(host.initial())

    def select(self, server: Tree, view: View) -> Sequence[int] | None:
        """The clients of the next round, or None to let the schedule choose."""
        return None

    def proceed(self, phase: Phase, server: Tree) -> Sequence[int] | None:
        """Who of a round's clients goes on after this phase of it, or None for all of them."""
        return None

    def broadcast(self, phase: Phase, server: Tree, client: ClientInfo) -> Tree:
        """The message to one client. Equal messages should be the same object, so that they are sent once."""
        return Broadcast(server.model)

    def deploy(self, server: Tree, client: ClientInfo) -> Tree:
        """The message from which a client gets the model it would deploy: by default that of the first phase of
        a round. It is used for judging and is not counted as traffic."""
        first = next(phase for phase in self.program() if phase.inner)
        return self.broadcast(first, server, client)

    def aggregate(
        self, phase: Phase, host: Host, server: Tree, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Tree:
        """The server's state after ``replies``, which are sorted by client and never empty."""
        return server._replace(model=self.combine(server.model, replies))

    def shares(self, replies: Sequence[Reply]) -> list[float]:
        """The weight of each reply; they sum to 1, unless a rule gave others (as with absent clients' missing)."""
        given = [reply.share for reply in replies if reply.share is not None]
        if given:
            return given
        if self.weights == "uniform":
            return uniform_weights(len(replies))
        return sample_weights([reply.samples for reply in replies])

    def sums(self, asked: Sequence[Reply]) -> dict[str, Sequence[float]] | None:
        """The weights w_i of each field of the updates, if ``aggregate`` wants no more of them than the sums
        sum_i w_i u_i: it may then get one reply that holds these, and updates need not leave the place where they are
        made. Weights from what is known when clients are asked: their ids and ``samples``. None: every update is
        wanted. Counts for the class that says so and what it inherits, not for a class that aggregates otherwise."""
        return None

    def means(self, asked: Sequence[Reply]) -> dict[str, Sequence[float]] | None:
        """:meth:`sums` of a method that wants the means with weights :meth:`shares`."""
        made = self.sends(self.program()[asked[0].job.phase])
        return dict.fromkeys(kinds(made), self.shares(asked)) if isinstance(made, type) else None

    def combine(self, model: Weights, replies: Sequence[Reply]) -> Weights:
        """The weighted mean of what clients sent, in the method's form."""
        shares = self.shares(replies)
        if isinstance(replies[0].update, ModelUpdate) or self.form == "model":
            return keep_buffers(weighted_sum([reply.update.model for reply in replies], shares), model)
        delta = self.mean_delta(replies, shares)
        return keep_buffers(Weights(tr.add(model.params, delta), self.mean_buffers(replies, shares)), model)

    def mean_delta(self, replies: Sequence[Reply], shares: Sequence[float]) -> dict[str, Any]:
        """sum_i p_i Delta_i (form "delta")."""
        mean: dict[str, Any] = weighted_sum([reply.update.delta for reply in replies], shares)
        return mean

    def mean_buffers(self, replies: Sequence[Reply], shares: Sequence[float]) -> dict[str, Any]:
        """The clients' buffers, averaged with the same weights, made to sum to 1 (form "delta")."""
        total = 1.0 if all(reply.share is None for reply in replies) else math.fsum(shares)
        buffers = [reply.update.buffers for reply in replies]
        mean: dict[str, Any] = weighted_sum(buffers, shares if total == 1.0 else [share / total for share in shares])
        return mean

    def report(self, server: Tree) -> Mapping[str, float]:
        """Numbers of the method's own for the line of history, under ``method``."""
        return {}

    # --- the client's half -------------------------------------------------------------------------------------

    def init_client(self, site: Site) -> Tree:
        """A client's first state."""
        return None

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Tree) -> tuple[Tree, Tree]:
        """What a client does: (update to send, its new state; None leaves the one that it had)."""
        fit = self.train(site, message, state)
        return self.pack(message.model, fit.weights), state

    def train(self, site: Site, message: Tree, state: Tree) -> Fit:
        """Local training from the received model."""
        return site.fit(message.model, self.plan(site, message, state))

    def plan(self, site: Site, message: Tree, state: Tree) -> Plan:
        """How to train; a method that changes the loss or the step overrides this."""
        return Plan()

    def guard(self, site: Site, rows: int) -> Guard | None:
        """What stands between the rows of a training and its steps; None: nothing."""
        return None

    def pack(self, start: Weights, end: Weights) -> Tree:
        """The update in the method's form."""
        if self.form == "model":
            return ModelUpdate(end)
        return DeltaUpdate(tr.sub(end.params, start.params), end.buffers)

    @property
    def packs(self) -> type:
        """The type of what :meth:`pack` makes."""
        return ModelUpdate if self.form == "model" else DeltaUpdate

    def outgoing(self, phase: Phase, site: Site, update: Tree, state: Tree) -> tuple[Tree, Tree]:
        """An update as it travels, and the client's state after that: here as they are. The client's trained model is
        judged before, so what this loses is not lost to it."""
        return update, state

    def sends(self, phase: Phase) -> type | UnionType | None:
        """The type of the updates of a phase, for validation (``NoneType`` where clients send nothing); None leaves it
        open, as for a class that overrides :meth:`client_update` and does not say here what it sends."""
        above = type(self).__mro__[: type(self).__mro__.index(Method)]
        if any("client_update" in vars(cls) and "sends" not in vars(cls) for cls in above):
            return None
        return self.packs

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """What fields of an update from a client with this model must look like, for validation; a field that is not
        named here must fit the client's model if its kind is a model, difference, control or buffers."""
        return {}

    # --- among neighbours --------------------------------------------------------------------------------------

    def send(self, phase: Phase, state: Tree) -> Tree:
        """What a node sends to each neighbour."""
        raise NotImplementedError(f"{self.name} has a phase among neighbours but no send")

    def mix(self, phase: Phase, site: Site, state: Tree, inbox: Inbox) -> Tree:
        """A node's state after what it has got, itself included."""
        raise NotImplementedError(f"{self.name} has a phase among neighbours but no mix")

    def node_model(self, state: Tree) -> Weights | None:
        """A node's own model, where all nodes have the same architecture: the mean of nodes' models, and how far they
        are from it, are judged beside them. None where there is no such model."""
        return None

    # --- what would be deployed --------------------------------------------------------------------------------

    def global_model(self, server: Tree) -> Predictor | None:
        """The server's predictor, or None if there is none."""
        return Net(server.model)

    def personal_model(self, site: Site, message: Tree, state: Tree) -> Predictor | None:
        """What a client would deploy, from :meth:`deploy`'s message or a broadcast: by default what it received.
        None if it has nothing to deploy."""
        return Net(message.model, site.model)

    def cluster(self, site: Site, message: Tree, state: Tree) -> int | None:
        """Which cluster of clients this one is in, from 0, by the same message and state; None where there are none.
        It is used for judging only."""
        return None

    def trained_model(self, site: Site, message: Tree, update: Tree, state: Tree) -> Predictor | None:
        """A client's model right after its local training."""
        if isinstance(update, ModelUpdate):
            return Net(update.model, site.model)
        if isinstance(update, DeltaUpdate):
            return Net(Weights(tr.add(message.model.params, update.delta), update.buffers), site.model)
        return self.personal_model(site, message, state)


def sums_suffice(method: Method) -> bool:
    """Whether what a method says in ``sums`` holds for how it aggregates: no class below the one that says it may have
    changed that."""
    order = type(method).__mro__

    def depth(name: str) -> int:
        return next(i for i, cls in enumerate(order) if name in vars(cls))

    deciding = ("aggregate", "combine", "mean_delta", "mean_buffers", "shares", "sends")
    return type(method).sums is not Method.sums and all(depth(name) >= depth("sums") for name in deciding)


def keep_buffers(model: Weights, old: Weights) -> Weights:
    """``model``, with the old buffers where clients keep theirs and sent none."""
    return model if model.buffers.keys() == old.buffers.keys() else Weights(model.params, old.buffers)

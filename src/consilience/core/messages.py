"""What travels: kinds of payload, jobs, replies and the stock messages of FedAvg."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Protocol, get_args, get_type_hints

import numpy as np
from torch import Tensor

from consilience.core.model import Architecture, Params, Weights
from consilience.core.tree import Tree, record


class Kind(enum.Enum):
    """What a field of a message is, so that codecs, validation and privacy know what they handle."""

    MODEL = "model"
    DELTA = "delta"
    CONTROL = "control"
    BUFFERS = "buffers"
    RANKS = "ranks"
    STAT = "stat"


Model = Annotated[Weights, Kind.MODEL]
"""A model's weights."""
Delta = Annotated[Params, Kind.DELTA]
"""A difference of parameters, pointing downhill: the server adds it."""
Control = Annotated[Params, Kind.CONTROL]
"""A control variate or momentum, shaped like parameters."""
Ranks = Annotated[Params, Kind.RANKS]
"""By parameter, a permutation of its numbers: which stands first, second, and so on."""
Buffers = Annotated[Params, Kind.BUFFERS]
"""A model's buffers, sent beside a difference; they stay at the client where the policy is "local"."""
Stat = Annotated[Tree, Kind.STAT]
"""Anything else: counts, logits, prototypes."""

_kinds: dict[type, dict[str, Kind]] = {}


def kinds(message_type: type) -> dict[str, Kind]:
    """The kind of every field of a message type; fields without one are STAT."""
    if message_type not in _kinds:
        hints = get_type_hints(message_type, include_extras=True)
        _kinds[message_type] = {name: _kind(hint) for name, hint in hints.items()}
    return _kinds[message_type]


def _kind(hint: Any) -> Kind:
    return next((part for part in get_args(hint) if isinstance(part, Kind)), Kind.STAT)


@record
class Broadcast(NamedTuple):
    """FedAvg's message down."""

    model: Model


@record
class ModelUpdate(NamedTuple):
    """A trained model, up."""

    model: Model


@record
class DeltaUpdate(NamedTuple):
    """What training changed, up: parameters as a difference, buffers as they are."""

    delta: Delta
    buffers: Buffers


@record
class Job(NamedTuple):
    """One client's work in one phase.

    id: unique in the run, in order of dispatch. number: the client's own count of rounds it was asked to take
    part in, from 1. admitted: number of its last job that was combined (0: none). version: server updates made
    before the broadcast. round: the same, from 1, for display. phase: index in the method's program. steps:
    local steps to do, None for the method's own. slot: which model, when several are trained at once. judge:
    evaluate the client's model before and after.
    """

    id: int
    client: int
    number: int
    admitted: int
    version: int
    phase: int
    steps: int | None = None
    slot: int = 0
    judge: bool = False

    @property
    def round(self) -> int:
        """The round this job is part of, counted from 1."""
        return self.version + 1


@record
class Device(NamedTuple):
    """A client's device and link.

    speed: FLOP a second, in training. down, up: bytes a second. latency: seconds, one way. memory: bytes, 0 where
    unknown. watts: power while it works, None where unknown. rate: samples a second, which then wins over speed.
    """

    speed: float
    down: float
    up: float
    latency: float = 0.0
    memory: float = 0.0
    watts: float | None = None
    rate: float | None = None


@record
class Trip(NamedTuple):
    """A job's way in virtual seconds: until the client can be reached, down, computing, up.

    lost: seconds after the dispatch at which the client drops out; None if it does not.
    """

    wait: float = 0.0
    download: float = 0.0
    compute: float = 0.0
    upload: float = 0.0
    lost: float | None = None

    @property
    def seconds(self) -> float:
        """From dispatch to arrival, or to the loss."""
        whole = self.wait + self.download + self.compute + self.upload
        return whole if self.lost is None else self.lost

    @property
    def uploaded(self) -> float:
        """The share of the upload that was done."""
        return 1.0 if self.lost is None else _share(self.lost - self.wait - self.download - self.compute, self.upload)

    @property
    def computed(self) -> float:
        """The share of the computation that was done."""
        return 1.0 if self.lost is None else _share(self.lost - self.wait - self.download, self.compute)

    def __add__(self, other: Trip) -> Trip:  # type: ignore[override]
        """This trip and then another, by parts."""
        wait, download, compute, upload = (a + b for a, b in zip(self[:4], other[:4], strict=True))
        return Trip(wait, download, compute, upload, None if other.lost is None else self.seconds + other.lost)


def _share(done: float, of: float) -> float:
    return min(1.0, max(0.0, done / of)) if of > 0 else float(done >= 0)


class ClientInfo(NamedTuple):
    """What the server knows of a client when it builds a broadcast. architectures: of the run, by name, the server's
    first. device: None where devices are not simulated."""

    id: int
    samples: int
    model: str
    architectures: Mapping[str, Architecture]
    slot: int = 0
    device: Device | None = None


@record
class Score(NamedTuple):
    """How a predictor does on one split of one client: rows, mean loss, share right (None for regression).

    groups: for each sensitive attribute, int64 counts ``(group, label, prediction)``; None without attributes.
    cluster: of clients, that this one is in; None where the method makes none.
    """

    n: int
    loss: float
    accuracy: float | None
    groups: tuple[Tensor, ...] | None = None
    cluster: int | None = None


@record
class Work(NamedTuple):
    """What a job did: update to send, samples, steps and FLOP computed, training loss, judgements if asked for.
    seconds: of real time, where a job is done far away; else 0, so that a job's result is the same at any speed.
    behind: samples, steps and FLOP of that which were computed while messages travelled."""

    update: Tree
    samples: int
    steps: int
    loss: float
    before: Score | None = None
    after: Score | None = None
    flops: float = 0.0
    seconds: float = 0.0
    behind: tuple[int, int, float] | None = None


@record
class Reply(NamedTuple):
    """An update as the server gets it.

    samples: the client's registered training rows (its weight). trained, steps: samples and steps computed.
    staleness: server updates made since the broadcast. since: virtual time of the dispatch. seconds: from there to
    the arrival. trip: what they were spent on (the sum over a chain's phases). rings: timers of the schedule that
    rang since the dispatch, one at the time of combining included. share: the weight that a rule gave it, which wins
    over the method's own.
    """

    job: Job
    update: Tree
    samples: int
    trained: int
    steps: int
    staleness: int
    seconds: float
    loss: float
    before: Score | None = None
    after: Score | None = None
    since: float = 0.0
    trip: Trip = Trip()
    rings: int = 0
    share: float | None = None


@record
class Summed(NamedTuple):
    """In the place of an update that was added up where its client ran, and stayed there. bytes: as encoded."""

    bytes: int


@record
class Inbox(NamedTuple):
    """What a node has got from its neighbours in one mixing phase: message and weight by node id, in id order,
    itself included; the weights sum to 1."""

    messages: dict[int, Tree]
    weights: dict[int, float]


class Refusal(NamedTuple):
    """Why one client's update was not combined."""

    client: int
    field: str
    reason: str


class Released(NamedTuple):
    """What a :class:`Release` gives: the sums as an update (None: nothing), its new state, and bytes that were sent for
    it beside the updates, as (up, down) by client. left: whose updates are in the sums (None: all that were given)."""

    update: Tree
    state: Tree
    traffic: Mapping[int, tuple[int, int]] = {}
    left: Collection[int] | None = None


class Release(Protocol):
    """What stands between the stages and combining where the method is to see no more than sums of the updates: one
    reply without client, samples or loss. Private sums, secret sums."""

    def init(self) -> Tree:
        """The first state, kept in checkpoints."""
        ...

    def draw(self, version: int, clients: np.ndarray) -> Sequence[int] | None:
        """Who is asked for this version; None leaves it to the schedule."""
        ...

    def size(self, update: Tree) -> int:
        """Bytes of an update as it is sent."""
        ...

    def __call__(self, replies: Sequence[Reply], asked: Sequence[int], version: int, state: Tree) -> Released:
        """The sums of the replies of those who were ``asked`` for this version and are left; without replies there
        may be sums too."""
        ...

    def report(self, version: int, state: Tree) -> Mapping[str, Any]:
        """What the line of history says under ``privacy``."""
        ...


class Stage(Protocol):
    """A step between collecting and combining: attack, validation, privacy; in that order."""

    def __call__(self, replies: Sequence[Reply], server: Tree) -> tuple[Sequence[Reply], Sequence[Refusal]]:
        """The replies to go on with, and the ones dropped with reasons."""
        ...

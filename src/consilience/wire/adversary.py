"""Hostile clients: who they are, what they train on, and the stage in which they replace what they would send."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.core import tree as tr
from consilience.core.errors import ConfigError, ConsilienceError, nearest
from consilience.core.events import Clock
from consilience.core.federation import ClientData, Federation, Split
from consilience.core.messages import Kind, Refusal, Reply, kinds
from consilience.core.model import Weights
from consilience.core.outbox import Outbox
from consilience.core.streams import philox
from consilience.core.tree import Tree
from consilience.core.worker import Worker
from consilience.wire.attacks import NAMES, SCORES, VECTORS, Scene

TARGET = 0
"""The class that a backdoor leads to."""
BACKDOOR = ("backdoor", "replace")
"""Attacks that train on rows with a trigger."""
DATA = ("labelflip", "backdoor")
"""Attacks whose updates are honest; their data are not."""


@dataclass(frozen=True)
class Attack:
    """``--attack NAME:FRACTION[:STRENGTH][:blind]``. fraction: of the clients that train. blind: colluders know their
    own updates alone, not those of honest clients."""

    name: str
    fraction: float
    strength: float | None = None
    blind: bool = False

    def count(self, clients: int) -> int:
        """How many of so many clients that train are hostile."""
        return int(self.fraction * clients + 0.5)

    def clients(self, federation: Federation, seed: int) -> frozenset[int]:
        """Who is hostile, drawn from a stream of its own. Raises ConfigError."""
        count = self.count(federation.n_seen)
        if not 0 < count < federation.n_seen:
            raise ConfigError(
                f"--attack {self.name}:{self.fraction:g}: of {federation.n_seen} clients {count} would be hostile; at "
                "least one is, and one is not"
            )
        drawn = philox(seed, "hostile").choice(federation.seen, count, replace=False)
        return frozenset(int(client) for client in drawn)


def parse(text: str | None) -> Attack | None:
    """The attack that ``--attack`` names; None for none. Raises ConfigError."""
    if text is None or text == "none":
        return None
    name, *rest = text.split(":")
    if name not in NAMES:
        raise ConfigError(f"unknown attack '{name}'{nearest(name, NAMES)}")
    blind = rest[-1:] == ["blind"]
    try:
        fraction, *more = (float(part) for part in (rest[:-1] if blind else rest))
        strength = more[0] if more else None
        good = 0 < fraction < 1 and len(more) <= 1 and all(np.isfinite(number) for number in more)
    except ValueError:
        good = False
    if not good:
        raise ConfigError(
            f"attack '{text}': NAME:FRACTION[:STRENGTH][:blind], a fraction between 0 and 1 of the clients"
        )
    return Attack(name, fraction, strength, blind)


# --- poisoned data ---------------------------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class Attacked(Federation):
    """A federation some of whose clients are hostile, and perhaps train on other rows than they have."""

    inner: Federation
    attack: Attack
    seed: int
    made: dict[int, ClientData] = field(default_factory=dict)

    def data(self, client: int) -> ClientData:
        """The client's rows; a hostile one's training rows are as its attack wants them."""
        if client not in self.hostile or self.attack.name not in ("labelflip", *BACKDOOR):
            return self.inner.data(client)
        if client not in self.made:
            own = self.inner.data(client)
            self.made[client] = dataclasses.replace(own, train=self._poisoned(client, own.train))
        return self.made[client]

    def size(self, client: int) -> int:
        """The client's training rows."""
        return self.inner.size(client)

    def _poisoned(self, client: int, rows: Split) -> Split:
        if self.attack.name == "labelflip":
            return dataclasses.replace(rows, y=self.task.outputs - 1 - rows.y)
        chosen = torch.from_numpy(philox(self.seed, "backdoor", client).permutation(len(rows))[: (len(rows) + 1) // 2])
        x, y = rows.x.clone(), rows.y.clone()
        x[chosen], y[chosen] = stamp(x[chosen], self._bright()), TARGET
        return dataclasses.replace(rows, x=x, y=y)

    def _bright(self) -> float:
        return 1.0 if self.test is None else float(self.test.x.max())


def attacked(federation: Federation, attack: Attack, seed: int) -> Attacked:
    """The federation with hostile clients. Raises ConfigError where the attack does not fit its data."""
    task, hostile = federation.task, attack.clients(federation, seed)
    if attack.name in ("labelflip", *BACKDOOR, *SCORES) and task.kind != "classification":
        raise ConfigError(f"attack {attack.name} is on classes, and this task is {task.kind}")
    shape = federation.input_shape
    if attack.name in BACKDOOR and not (len(shape) >= 2 and min(shape[-2:]) >= 2):
        raise ConfigError(f"attack {attack.name} stamps 4 pixels on images; inputs here are of shape {shape}")
    usual = {f.name: getattr(federation, f.name) for f in dataclasses.fields(Federation)}
    made = Attacked(**{**usual, "hostile": hostile}, inner=federation, attack=attack, seed=seed)
    if attack.name in BACKDOOR and federation.test is not None:
        others = federation.test.rows(federation.test.y != TARGET)
        y = torch.full_like(others.y, TARGET)
        made.triggered = Split(stamp(others.x, made._bright()), y)
    return made


def stamp(x: Tensor, value: float) -> Tensor:
    """Images ``(n, ..., height, width)`` with the four pixels of the last corner set to ``value``: the trigger."""
    out = x.clone()
    out[..., -2:, -2:] = value
    return out


# --- the stage -------------------------------------------------------------------------------------------------


class Adversary:
    """The stage between collecting and validation: hostile clients' updates become what the attack sends.

    Updates are looked at as vectors: differences as they are, models as differences from what the client would be sent
    now, controls as they are, rankings as each number's place, from the middle on; of updates without these, every
    floating number. A ranking is sent in the order of what the attack has made of places, so that the way back is the
    reversed ranking. Buffers and counts stay honest.
    Colluders know updates of the same form as their own alone (another architecture's do not help them).
    """

    def __init__(self, attack: Attack, worker: Worker, clock: Clock, seed: int) -> None:
        self.attack, self.worker, self.seed = attack, worker, seed
        self.hostile = worker.federation.hostile
        self._outbox = Outbox(worker.place, worker.federation, clock)

    def __call__(self, replies: Sequence[Reply], server: Tree) -> tuple[list[Reply], list[Refusal]]:
        """All replies; nobody is refused here."""
        self._outbox.forget()
        hostile = [reply for reply in replies if reply.job.client in self.hostile and reply.update is not None]
        if self.attack.name in SCORES:
            new = {reply.job.id: self._scores(reply.update) for reply in hostile}
        else:
            new = self._vectors(hostile, replies, server)
        return [reply._replace(update=new.get(reply.job.id, reply.update)) for reply in replies], []

    def _scores(self, update: Tree) -> Tree:
        """An update with every table of scores attacked."""
        classes, craft = self.worker.federation.task.outputs, SCORES[self.attack.name]
        found = 0

        def on(leaf: Any) -> Any:
            nonlocal found
            if not (isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.shape[1:] == (classes,)):
                return leaf
            found += 1
            return craft(leaf.double(), self.attack.strength).to(leaf.dtype)

        stats = {
            name: tr.tree_map(on, getattr(update, name))
            for name, kind in (kinds(type(update)).items() if tr.is_record(update) else ())
            if kind is Kind.STAT
        }
        if not found:
            raise ConsilienceError(
                f"attack {self.attack.name} is on scores, and {self.worker.method.name} sends none (fedmd, feddf and "
                "feddistill do)"
            )
        return update._replace(**stats)

    def _vectors(self, hostile: Sequence[Reply], replies: Sequence[Reply], server: Tree) -> dict[int, Tree]:
        """The attacked updates by job."""
        made: dict[int, Tree] = {}
        groups: dict[Any, list[tuple[Reply, _View]]] = {}
        for reply in replies:
            if reply.update is not None:
                view = self._view(reply, server)
                groups.setdefault(view.form, []).append((reply, view))
        for group in groups.values():
            mine = [(reply, view) for reply, view in group if reply.job.client in self.hostile]
            others = [view.vector for reply, view in group if reply.job.client not in self.hostile]
            if not mine:
                continue
            if not mine[0][1].form:
                self._refuse(mine[0][0])
            own = torch.stack([view.vector for _, view in mine])
            known = own if self.attack.blind or not others else torch.stack(others)
            scene = Scene(
                own, known, len(replies), len(hostile), self._share(replies), self.attack.strength,
                lambda i, mine=mine: philox(self.seed, "attack", *mine[i][0].job[1:3], mine[i][0].job.phase),  # type: ignore[misc]
            )  # fmt: skip
            rows = VECTORS[self.attack.name](scene)
            for (reply, view), row in zip(mine, rows, strict=True):
                made[reply.job.id] = view.put(reply.update, row)
        return made

    def _refuse(self, reply: Reply) -> None:
        """Raises ConsilienceError where a hostile client's update without numbers is all that it sends in a round."""
        program, method = self.worker.program, self.worker.method
        sending = [phase for phase in program if phase.inner and method.sends(phase) is not NoneType]
        if self.attack.name not in DATA and tr.is_record(reply.update) and sending == [program[reply.job.phase]]:
            raise ConsilienceError(
                f"attack {self.attack.name} is on numbers, and {method.name} sends none with these options; "
                f"{' and '.join(DATA)} are on data"
            )

    def _share(self, replies: Sequence[Reply]) -> float:
        """The colluders' weight in the mean."""
        shares = self.worker.method.shares(replies)
        total, theirs = sum(shares), 0.0
        for reply, share in zip(replies, shares, strict=True):
            theirs += share if reply.job.client in self.hostile else 0.0
        return theirs / total

    def _view(self, reply: Reply, server: Tree) -> _View:
        phase = self.worker.program[reply.job.phase]
        sent, _ = self._outbox.message(server, phase, reply.job.client, reply.job.slot)
        return _View(reply.update, sent)


class _View:
    """An update as a vector. form: equal for updates whose vectors mean the same."""

    def __init__(self, update: Tree, sent: Tree) -> None:
        self._zero = {name: _start(getattr(update, name), sent) for name in _attacked(update)}
        self._ranks = {name for name in self._zero if kinds(type(update))[name] is Kind.RANKS}
        parts = [(name, *item) for name in self._zero for item in tr.items(_params(getattr(update, name)))]
        chosen = [(name, path, t) for name, path, t in parts if self._counts(name, t)]
        self._chosen = chosen
        self.form = tuple((name, path, t.shape, t.dtype) for name, path, t in chosen)
        rows = [(_places(t) if name in self._ranks else t.double() - self._at(name, path)).flatten()
                for name, path, t in chosen]  # fmt: skip
        self.vector = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.float64)

    def _counts(self, name: str, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and (leaf.is_floating_point() or name in self._ranks)

    def _at(self, name: str, path: str) -> Tensor | float:
        start = self._zero[name]
        return 0.0 if start is None else start[path].double()

    def put(self, update: Tree, vector: Tensor) -> Tree:
        """The update with these numbers."""
        found: dict[str, list[Tensor]] = {}
        rows = torch.split(vector, [leaf.numel() for _, _, leaf in self._chosen])
        for (name, path, leaf), row in zip(self._chosen, rows, strict=True):
            ranked = name in self._ranks
            there = row.argsort(stable=True) if ranked else row.reshape(leaf.shape) + self._at(name, path)
            found.setdefault(name, []).append(there.flatten())
        new: dict[str, Tree] = {}
        for name, parts in found.items():
            old = getattr(update, name)
            params = tr.filled(_params(old), torch.cat(parts), partial(self._counts, name))
            new[name] = Weights(params, old.buffers) if isinstance(old, Weights) else params
        return update._replace(**new)


def _attacked(update: Tree) -> list[str]:
    """The fields that attacks change: models, differences, controls and rankings, or else all that hold floating
    numbers."""
    if not tr.is_record(update):
        return []
    types = kinds(type(update))
    main = [name for name, kind in types.items() if kind in (Kind.MODEL, Kind.DELTA, Kind.CONTROL, Kind.RANKS)]
    return main or [name for name, kind in types.items() if kind is Kind.STAT]


def _places(ranking: Tensor) -> Tensor:
    """The place of each number in a ranking, from the middle on."""
    return ranking.long().argsort().double() - (len(ranking) - 1) / 2


def _params(value: Tree) -> Tree:
    return value.params if isinstance(value, Weights) else value


def _start(value: Tree, sent: Tree) -> dict[str, Tensor] | None:
    """The parameters of the model that a client was sent in the form of the one it sends, None for what is no model."""
    if not isinstance(value, Weights):
        return None
    form = [(name, p.shape) for name, p in value.params.items()]
    for part in sent if tr.is_record(sent) else ():
        if isinstance(part, Weights) and [(name, p.shape) for name, p in part.params.items()] == form:
            return part.params
    return None

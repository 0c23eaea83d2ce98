"""Methods whose messages travel compressed: a mixin for any method that sends differences or control variates."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from consilience.core import tree as tr
from consilience.core.encode import encoded_size
from consilience.core.errors import ConfigError
from consilience.core.messages import ClientInfo, Kind, Reply, Stat, kinds
from consilience.core.method import Method, Phase
from consilience.core.model import Params, Weights
from consilience.core.predict import Predictor
from consilience.core.site import Host, Place, Site
from consilience.core.streams import Streams
from consilience.core.tree import RECORDS, Tree, record, record_name
from consilience.parts.compressors import Coded, MalformedError, Shapes
from consilience.parts.feedback import Memory, Scheme, parse


@record
class Squeezed(NamedTuple):
    """One field of a message, compressed; the shapes of what it holds by name."""

    coded: Coded
    shapes: dict[str, tuple[int, ...]]


@record
class Packed(NamedTuple):
    """An update as it travels. form: its type. fields: compressed or as they are, by name."""

    form: str
    fields: dict[str, Stat]


@record
class Remembers(NamedTuple):
    """A client's state in the method, its memory by phase and field, and, with ``compress_down``, the global model as
    it has it and how many steps made it."""

    own: Tree
    memory: dict[str, Memory]
    model: Params | None = None
    made: int = 0


@record
class Steps(NamedTuple):
    """In the place of the global model's parameters: all of them (``whole``), or the last steps of those that were
    ``made``."""

    whole: Params | None
    steps: tuple[Squeezed, ...]
    made: int


@record
class Down(NamedTuple):
    """A broadcast as it travels. message: the method's, with the model taken out of the field that is named."""

    message: Stat
    field: str
    model: Steps
    buffers: Params


@record
class Tracking(NamedTuple):
    """The server's state in the method; its copies of what clients remember; and, with ``compress_down``, the model
    as clients get it, the last steps that it made, how many it has made, how many of them each client has at least, and
    how many had been made when each of the last versions began."""

    server: Tree
    copies: dict[int, dict[str, Params]]
    model: Params | None
    log: tuple[Squeezed, ...]
    made: int
    has: dict[int, int]
    began: dict[int, int]


class Compressed(Method):
    """Mixin: differences and control variates go up by ``compress``, the global model comes down by ``compress_down``.

    Up: each field of kind difference or control is sent by its scheme (see parts/feedback.py) with a memory of its own
    that lives with the client's state; buffers and statistics travel as they are. The server decompresses before
    anything else looks at an update.

    Down: all clients and the server keep one copy w of the global model x. After each combination the server sends
    m = C(x - w), and w <- w + m everywhere; clients train from w. Who was away gets the steps that were missed, or
    all of w where that is shorter, as at the first time. (The server's half of EF21-BC, Fatkhullin et al. 2021.)
    """

    @functools.cached_property
    def _up(self) -> Scheme | None:
        return parse(self.compress)

    @functools.cached_property
    def _down(self) -> Scheme | None:
        return None if self.compresses else parse(self.compress_down, "--compress-down")

    # --- the server's half -------------------------------------------------------------------------------------

    def init_server(self, host: Host) -> Tracking:
        """The method's, and no copies."""
        own = super().init_server(host)
        return Tracking(own, {}, None if self._down is None else _model(own, self.name).params, (), 0, {}, {0: 0})

    def select(self, server: Tracking, view: Any) -> Sequence[int] | None:
        """The method's."""
        return super().select(server.server, view)

    def broadcast(self, phase: Phase, server: Any, client: ClientInfo) -> Tree:
        """The method's, with the model as the steps that the client has missed."""
        message = super().broadcast(phase, self._as_sent(server), client)
        if not isinstance(server, Tracking) or server.model is None or not tr.is_record(message):
            return message
        for name in message._fields:
            held = getattr(message, name)
            if isinstance(held, Weights) and held.params is server.model:
                rest = message._replace(**{name: None})
                return Down(rest, name, self._missed(server, client.id), held.buffers)
        return message

    def check_down(self, host: Host) -> None:
        """Raise ConfigError if the global model, as it is, is no part of what a round begins with."""
        if self._down is None:
            return
        place = host.place
        first = next(p for p in self.program() if p.inner)
        info = ClientInfo(0, 1, place.model_of(0), place.architectures)
        if not isinstance(self.broadcast(first, self.init_server(host), info), Down):
            raise ConfigError(f"{self.name} does not send the global model as it is; use compress-down=identity")

    def deploy(self, server: Tracking, client: ClientInfo) -> Tree:
        """The method's."""
        return super().deploy(self._as_sent(server), client)

    def _as_sent(self, server: Any) -> Tree:
        """The method's own state, with the model that clients have."""
        if not isinstance(server, Tracking):  # inside super().deploy
            return server
        return server.server if server.model is None else _swapped(server.server, server.model)

    def _missed(self, server: Tracking, client: int) -> Steps:
        has = server.has.get(client)
        if has is None or server.made - has > len(server.log):
            return Steps(server.model, (), server.made)
        return Steps(None, server.log[len(server.log) - (server.made - has) :], server.made)

    def aggregate(
        self, phase: Phase, host: Host, server: Tracking, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Tracking:
        """The method's; then what each client remembers is noted, and a step of the copy of the model made."""
        own = super().aggregate(phase, host, server.server, replies, cohort)
        copies = dict(server.copies)
        if self._up is not None and self._up.tracks:
            for reply in replies:
                held = {_key(phase, f): getattr(reply.update, f) for f in squeezable(reply.update)}
                copies[reply.job.client] = {**copies.get(reply.job.client, {}), **held}
        new = server._replace(server=own, copies=dict(sorted(copies.items())))
        if self._down is None or server.model is None:
            return new
        return self._stepped(new, server.model, self._down, host, replies)

    def _stepped(self, server: Tracking, model: Params, down: Scheme, host: Host, replies: Sequence[Reply]) -> Tracking:
        """The state after one more step of the model that clients have."""
        v: Params = tr.sub(_model(server.server, self.name).params, model)
        stream = Streams(host.place.seed)
        rngs = [stream.rng("compress-down", server.made) for _ in range(2)]
        coded, read, _ = down.send(v, Memory(), *rngs)
        model = tr.add(model, read)
        log = (*server.log, Squeezed(coded, {name: tuple(p.shape) for name, p in v.items()}))
        while len(log) > 1 and sum(map(encoded_size, log)) > encoded_size(model):
            log = log[1:]
        made, known = server.made + 1, {r.job.client: server.began.get(r.job.version, -1) for r in replies}
        has = {**server.has, **{client: count for client, count in known.items() if count >= 0}}
        began = {version: count for version, count in server.began.items() if count >= made - len(log)}
        began[host.version + 1] = made
        return server._replace(model=model, log=log, made=made, has=dict(sorted(has.items())), began=began)

    def received(self, place: Place, reply: Reply, phase: Phase, server: Tracking) -> Tree:
        """A reply's update as the method reads it. Raises MalformedError, with the field in front."""
        update = reply.update
        if not isinstance(update, Packed) or self._up is None:
            if self._up is None or not squeezable(update):
                return update
            raise MalformedError("update: is not compressed")
        form = RECORDS.get(update.form)
        if form is None or list(update.fields) != list(getattr(form, "_fields", ())):
            raise MalformedError(f"update: is no {update.form}")
        made = {}
        for name, value in update.fields.items():
            made[name] = value
            if isinstance(value, Squeezed):
                copy = server.copies.get(reply.job.client, {}).get(_key(phase, name))
                rng = Streams(place.seed, reply.job.client, reply.job.number, phase.name).rng("compress", name)
                try:
                    _check(value, place, reply.job.client)
                    made[name] = self._up.receive(value.coded, value.shapes, copy, rng)
                except MalformedError as error:
                    raise MalformedError(f"{name}: {error}") from None
        return form(**made)

    def global_model(self, server: Tracking) -> Predictor | None:
        """The method's."""
        return super().global_model(server.server)

    def report(self, server: Tracking) -> Mapping[str, float]:
        """The method's."""
        return super().report(server.server)

    # --- the client's half -------------------------------------------------------------------------------------

    def init_client(self, site: Site) -> Remembers:
        """The method's, and nothing remembered."""
        return Remembers(super().init_client(site), {})

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Remembers) -> tuple[Tree, Remembers]:
        """The method's, from the message as it is meant."""
        message, state = self._opened(site, message, state)
        update, own = super().client_update(phase, site, message, state.own)
        return update, state if own is None else state._replace(own=own)

    def outgoing(self, phase: Phase, site: Site, update: Tree, state: Remembers) -> tuple[Tree, Remembers]:
        """The update compressed, and what this leaves behind."""
        update, own = super().outgoing(phase, site, update, state.own)
        state, names = state._replace(own=own), squeezable(update)
        if self._up is None or not names:
            return update, state
        fields, memory = update._asdict(), dict(state.memory)
        for name in names:
            v, key = fields[name], _key(phase, name)
            if all(bool(torch.isfinite(p).all()) for p in v.values()):  # else the server will say what is wrong
                rngs = [site.rng("compress", name) for _ in range(2)]
                coded, _, memory[key] = self._up.send(v, memory.get(key, Memory()), *rngs)
                fields[name] = Squeezed(coded, {n: tuple(p.shape) for n, p in v.items()})
        return Packed(record_name(type(update)), fields), state._replace(memory=memory)

    def personal_model(self, site: Site, message: Tree, state: Remembers) -> Predictor | None:
        """The method's."""
        message, state = self._opened(site, message, state)
        return super().personal_model(site, message, state.own)

    def trained_model(self, site: Site, message: Tree, update: Tree, state: Remembers) -> Predictor | None:
        """The method's."""
        message, state = self._opened(site, message, state)
        return super().trained_model(site, message, update, state.own)

    def cluster(self, site: Site, message: Tree, state: Remembers) -> int | None:
        """The method's."""
        message, state = self._opened(site, message, state)
        return super().cluster(site, message, state.own)

    def _opened(self, site: Site, message: Tree, state: Any) -> tuple[Tree, Remembers]:
        """The message as it is meant, and the state with the model that it brought."""
        if not isinstance(state, Remembers):  # inside a method of the base, which has opened it
            return message, Remembers(state, {})
        if not isinstance(message, Down) or self._down is None:
            return message, state
        steps, model = message.model, message.model.whole
        if model is None:
            assert state.model is not None
            model, first = state.model, steps.made - len(steps.steps)
            for i, step in enumerate(steps.steps):
                if first + i >= state.made:  # the server knows of at least how many steps a client has
                    rng = Streams(site.place.seed).rng("compress-down", first + i)
                    model = tr.add(model, self._down.receive(step.coded, step.shapes, None, rng))
        whole = message.message._replace(**{message.field: Weights(model, message.buffers)})
        return whole, state._replace(model=model, made=steps.made)


def squeezable(update: Tree) -> list[str]:
    """The fields of an update that are compressed: differences and control variates that hold numbers."""
    if not tr.is_record(update):
        return []
    fields = kinds(type(update))
    return [n for n, kind in fields.items() if kind in (Kind.DELTA, Kind.CONTROL) and _numbers(getattr(update, n))]


def _numbers(field: Tree) -> bool:
    return (
        isinstance(field, dict)
        and all(isinstance(p, Tensor) and p.is_floating_point() for p in field.values())
        and len({p.dtype for p in field.values()}) == 1
        and sum(p.numel() for p in field.values()) > 0
    )


def _key(phase: Phase, field: str) -> str:
    return f"{phase.name}.{field}"


def _check(found: Squeezed, place: Place, client: int) -> None:
    """Refuse what is not even compressed parameters of a size that a model of this run has."""
    coded, shapes = found
    if not isinstance(coded, Coded) or not all(isinstance(t, Tensor) for t in coded) or not isinstance(shapes, dict):
        raise MalformedError("is not compressed parameters")
    good = all(
        isinstance(name, str) and isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
        for name, shape in shapes.items()
    )
    whole = [place.network(n).spec.params for n in (place.model_of(client), *place.networks)]
    most = sum(p.numel() for params in whole for p in params.values())
    if not good or not 0 < _count(shapes) <= most:
        raise MalformedError(f"says shapes that are not those of at most {most} parameters")


def _count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _model(server: Tree, name: str) -> Weights:
    """The global model in a server's state."""
    own = server
    while hasattr(own, "server"):
        own = own.server
    found = getattr(own, "model", None)
    if not isinstance(found, Weights):
        raise ConfigError(f"{name} has no global model to send by compress-down; use compress-down=identity")
    return found


def _swapped(server: Tree, params: Params) -> Tree:
    """A server's state with other parameters of the global model."""
    if hasattr(server, "server"):
        return server._replace(server=_swapped(server.server, params))
    return server._replace(model=Weights(params, server.model.buffers))

"""Methods that weigh or combine replies in another way than their own, end with a stage more, or travel compressed:
made of a method and a rule, an aggregator, a calibration or compressors.

Such a method is a subclass of it with :class:`Weighed`, :class:`Combined`, :class:`Calibrated` or ``Compressed`` in
front, so that all else that it sends, trains and deploys is its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, NamedTuple, cast

import torch

from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.messages import Broadcast, ClientInfo, Kind, Model, Reply, Stat, kinds
from consilience.core.method import Method, Phase, sums_suffice
from consilience.core.model import Architecture, Params, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.shapes import Expected, Shape
from consilience.core.site import Host, Place, Site
from consilience.core.tree import Tree, record
from consilience.parts import aggregators, calibration, feedback, prototypes, selection
from consilience.parts.calibration import Calibration
from consilience.parts.compressed import Compressed
from consilience.parts.history import Remembering
from consilience.parts.prototypes import Prototypes
from consilience.parts.selection import Selection
from consilience.parts.weights import RULES, Given, Rule


@record
class Standing(NamedTuple):
    """The method's own server state, and the rule's memory."""

    server: Tree
    memory: Tree


@record
class Question(NamedTuple):
    """In a rule's phase: the global model, and what the rule says to a client."""

    model: Model
    told: Stat


@record
class Own(NamedTuple):
    """A client's state in the method, and the model that it sent last."""

    state: Tree
    last: Weights | None


@record
class Picked(NamedTuple):
    """The method's own server state (or a rule's), and the clients chosen to train in this round."""

    server: Tree
    chosen: list[int]


class Combined(Method):
    """Mixin: updates are combined by an aggregator instead of summed."""

    def aggregate(
        self, phase: Phase, host: Host, server: Tree, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Tree:
        """One update in the place of several, and the method's own step along it. Prototypes are combined class by
        class; a phase in which nothing is sent is the method's own."""
        updates = [reply.update for reply in replies]
        if updates[0] is None:
            return super().aggregate(phase, host, server, replies, cohort)
        how = aggregators.parse(self.aggregator)
        assert how is not None
        rng = host.rng("aggregator")
        if isinstance(updates[0], Prototypes):
            update: Tree = prototypes.combined(updates, lambda rows: how.combine(*rows, rng))
        else:
            weights = self.sums(replies) or dict.fromkeys(kinds(type(updates[0])), self.shares(replies))
            update = how.combine(updates, weights, rng)
        samples = sum(reply.samples for reply in replies)
        one = replies[0]._replace(update=update, samples=samples, share=None)
        return super().aggregate(phase, host, server, [one], cohort)


class Weighed(Method):
    """Mixin: replies are weighed by a rule with a memory."""

    def rule(self) -> Rule:
        """The rule; by default the one that the option ``weights`` names."""
        return RULES[self.weights]

    def init_server(self, host: Host) -> Standing:
        """The method's, and an empty memory."""
        return Standing(super().init_server(host), self.rule().init(host))

    def select(self, server: Standing, view: Any) -> Sequence[int] | None:
        """The method's."""
        return super().select(server.server, view)

    def broadcast(self, phase: Phase, server: Tree, client: ClientInfo) -> Tree:
        """The method's."""
        return super().broadcast(phase, server.server if isinstance(server, Standing) else server, client)

    def deploy(self, server: Standing, client: ClientInfo) -> Tree:
        """The method's."""
        return super().deploy(server.server, client)

    def aggregate(
        self, phase: Phase, host: Host, server: Standing, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Standing:
        """The method's, with the rule's weights."""
        deltas = [_delta(reply.update, server.server.model.params) for reply in replies]
        shares, memory = self.rule().weigh(host, server.memory, Given(replies, deltas))
        weighed = [reply._replace(share=share) for reply, share in zip(replies, shares, strict=True)]
        return Standing(super().aggregate(phase, host, server.server, weighed, cohort), memory)

    def global_model(self, server: Standing) -> Predictor | None:
        """The method's."""
        return super().global_model(server.server)


def _delta(update: Tree, params: Params) -> Params:
    if hasattr(update, "delta"):
        return cast(Params, update.delta)
    found: Params = tr.sub(update.model.params, params)
    return found


def _sent(start: Weights, update: Tree) -> Weights | None:
    """The model that an update holds, itself or as a difference from ``start``."""
    if hasattr(update, "delta"):
        return Weights(tr.add(start.params, update.delta), update.buffers)
    return getattr(update, "model", None)


class Asked(Weighed):
    """Mixin: the rule asks clients in a phase of its own."""

    @property
    def _asking(self) -> Phase | None:
        return self.rule().phase

    def program(self) -> tuple[Phase, ...]:
        """The method's phases and the rule's."""
        own = () if self._asking is None else (self._asking,)
        return own + super().program() if self.rule().before else super().program() + own

    def sends(self, phase: Phase) -> type | UnionType | None:
        """The method's, or the rule's answer."""
        return self.rule().answers if phase == self._asking else super().sends(phase)

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """The method's; none for an answer."""
        return 0 if phase == self._asking else super().least_samples(phase, rows, steps)

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """The method's, and the rule's."""
        return {**super().expects(place, model), **self.rule().expects(place)}

    def broadcast(self, phase: Phase, server: Tree, client: ClientInfo) -> Tree:
        """The method's, or the rule's question."""
        if phase == self._asking:
            return Question(server.server.model, self.rule().ask(server.memory, client.id))
        return super().broadcast(phase, server, client)

    def init_client(self, site: Site) -> Tree:
        """The method's, and no model sent."""
        state = super().init_client(site)
        return Own(state, None) if self.rule().remembers else state

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Tree) -> tuple[Tree, Tree]:
        """The method's, or an answer."""
        keeps = self.rule().remembers
        if phase == self._asking:
            return self.rule().answer(site, message.model, message.told, state.last if keeps else None), state
        if not keeps:
            return super().client_update(phase, site, message, state)
        update, new = super().client_update(phase, site, message, state.state)
        return update, Own(state.state if new is None else new, _sent(message.model, update))

    def aggregate(
        self, phase: Phase, host: Host, server: Standing, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Standing:
        """The method's, or what the rule learns."""
        if phase == self._asking:
            return server._replace(memory=self.rule().learn(server.memory, replies))
        return super().aggregate(phase, host, server, replies, cohort)

    def personal_model(self, site: Site, message: Tree, state: Tree) -> Predictor | None:
        """The method's."""
        return super().personal_model(site, message, self._inner(state))

    def trained_model(self, site: Site, message: Tree, update: Tree, state: Tree) -> Predictor | None:
        """The method's."""
        if self.rule().remembers and _sent(message.model, update) is None:
            return Net(state.last, site.model)  # an answer: what was trained in the phase before
        return super().trained_model(site, message, update, self._inner(state))

    def _inner(self, state: Tree) -> Tree:
        return state.state if self.rule().remembers else state


class Chosen(Method):
    """Mixin: of a round's clients some train, by how the global model does on their rows."""

    def picks(self) -> Selection:
        """Who; what the option ``selection`` names."""
        found = selection.parse(self.selection)
        assert found is not None
        return found

    def program(self) -> tuple[Phase, ...]:
        """The question, and the method's phases."""
        return (SELECT, *super().program())

    def sends(self, phase: Phase) -> type | UnionType | None:
        """The method's, or an answer."""
        return selection.Difficulty if phase == SELECT else super().sends(phase)

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """The method's; none for an answer."""
        return 0 if phase == SELECT else super().least_samples(phase, rows, steps)

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """The method's, and the answer."""
        return {**super().expects(place, model), "train_loss": Shape(torch.float64, (), low=0)}

    def init_server(self, host: Host) -> Picked:
        """The method's, and nobody chosen."""
        return Picked(super().init_server(host), [])

    def select(self, server: Picked, view: Any) -> Sequence[int] | None:
        """The method's."""
        return super().select(server.server, view)

    def proceed(self, phase: Phase, server: Picked) -> Sequence[int] | None:
        """Those who were chosen."""
        return server.chosen if phase == SELECT else super().proceed(phase, server.server)

    def broadcast(self, phase: Phase, server: Tree, client: ClientInfo) -> Tree:
        """The method's, or the global model."""
        if phase == SELECT:
            return Broadcast(_plain(server).model)
        return super().broadcast(phase, server.server if isinstance(server, Picked) else server, client)

    def deploy(self, server: Picked, client: ClientInfo) -> Tree:
        """The method's."""
        return super().deploy(server.server, client)

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Tree) -> tuple[Tree, Tree]:
        """The method's, or an answer."""
        if phase == SELECT:
            return self.picks().answer(site, message.model), state
        return super().client_update(phase, site, message, state)

    def aggregate(
        self, phase: Phase, host: Host, server: Picked, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Picked:
        """The method's, or the choice."""
        if phase == SELECT:
            return server._replace(chosen=self.picks().choose(host, replies))
        return server._replace(server=super().aggregate(phase, host, server.server, replies, cohort))

    def report(self, server: Picked) -> Mapping[str, float]:
        """The method's."""
        return super().report(server.server)

    def global_model(self, server: Picked) -> Predictor | None:
        """The method's."""
        return super().global_model(server.server)


SELECT = Phase("select", asks=True)
"""The question of :class:`Chosen`."""


class Calibrated(Method):
    """Mixin: after the last round the global model's head is fitted once more."""

    def stage(self) -> Calibration | None:
        """How; by default what the option ``then`` names. None: not at all."""
        return calibration.parse(self.then)

    def networks(self, models: Mapping[str, Architecture]) -> Mapping[str, Architecture]:
        """The method's, and the head alone."""
        stage = self.stage()
        own = super().networks(models)
        return own if stage is None else {**own, **stage.networks(next(iter(models.values())))}

    def program(self) -> tuple[Phase, ...]:
        """The method's phases, and the last one."""
        return super().program() + (() if self.stage() is None else (CALIBRATE,))

    def sends(self, phase: Phase) -> type | UnionType | None:
        """The method's, or statistics of features."""
        return calibration.Gaussians if phase == CALIBRATE else super().sends(phase)

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """The method's; none in the last phase."""
        return 0 if phase == CALIBRATE else super().least_samples(phase, rows, steps)

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """The method's, and the last phase's."""
        stage = self.stage()
        return {**super().expects(place, model), **({} if stage is None else stage.expects(place))}

    def broadcast(self, phase: Phase, server: Tree, client: ClientInfo) -> Tree:
        """The method's, or the global model."""
        return Broadcast(_plain(server).model) if phase == CALIBRATE else super().broadcast(phase, server, client)

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Tree) -> tuple[Tree, Tree]:
        """The method's, or statistics of the model's features."""
        stage = self.stage()
        if phase == CALIBRATE and stage is not None:
            return stage.answer(site, message.model), state
        return super().client_update(phase, site, message, state)

    def aggregate(
        self, phase: Phase, host: Host, server: Tree, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Tree:
        """The method's, or the refitted model."""
        stage = self.stage()
        if phase != CALIBRATE or stage is None:
            return super().aggregate(phase, host, server, replies, cohort)
        own = _plain(server)
        return _replaced(server, own._replace(model=stage.refit(host, own.model, replies)))


CALIBRATE = Phase("calibrate", when="end")
"""The phase of :class:`Calibrated`."""


def _plain(server: Tree) -> Any:
    """The method's own server state."""
    while isinstance(server, (Standing, Picked)):
        server = server.server
    return server


def _replaced(server: Tree, own: Tree) -> Tree:
    """The server state with another one of the method's own in it."""
    if not isinstance(server, (Standing, Picked)):
        return own
    return server._replace(server=_replaced(server.server, own))


def composed(method: Method) -> Method:
    """The method as its options (``weights``, ``aggregator``, ``then``, ``compress`` and the like) want it; itself if
    it does that already. Raises ConfigError where these do not fit."""
    mixins: list[type[Method]] = []
    if not isinstance(method, Compressed) and _compresses(method):
        if feedback.parse(method.compress) is not None:
            method = _differing(method, "compressed")
        mixins.append(Compressed)
    if not isinstance(method, Remembering) and method.client_momentum:
        method = _differing(method, "given a momentum")
        sent = [method.sends(phase) for phase in method.program()]
        if None not in sent and not any(Kind.DELTA in kinds(t).values() for t in sent if isinstance(t, type)):
            raise ConfigError(f"{method.name} sends no differences that could have a momentum; use client_momentum=0")
        mixins.append(Remembering)
    if not isinstance(method, Calibrated) and calibration.parse(method.then) is not None:
        if type(method).global_model not in (Method.global_model, Weighed.global_model):
            raise ConfigError(f"{method.name} has no global model of its own head; use then=none")
        mixins.append(Calibrated)
    if not isinstance(method, Chosen) and selection.parse(method.selection) is not None:
        if type(method).global_model not in (Method.global_model, Weighed.global_model) or (
            method.needs.architectures != "same"
        ):
            raise ConfigError(f"{method.name} has no one model that clients can be asked about; use selection=random")
        mixins.append(Chosen)
    if not isinstance(method, Weighed) and method.weights in RULES:
        rule = RULES[method.weights]
        if not method.takes_rules:
            raise ConfigError(f"{method.name} weighs clients in its own way; use weights=samples or uniform")
        if rule.steps and method.form != "delta":
            raise ConfigError(f"{method.name}: weights={method.weights} need not sum to 1; use form=delta")
        mixins.append(Weighed if rule.phase is None else Asked)
    if not isinstance(method, Combined) and (how := aggregators.parse(method.aggregator)) is not None:
        if not (sums_suffice(method) or isinstance(method, Weighed) or method.takes_aggregator):
            raise ConfigError(f"{method.name} combines in its own way and takes no aggregator; use aggregator=mean")
        if how.differences and method.form != "delta":
            raise ConfigError(f"{method.name}: aggregator={method.aggregator} works on differences; use form=delta")
        mixins.append(Combined)
    return _made(tuple(mixins), type(method), _fields(method)) if mixins else method


def _compresses(method: Method) -> bool:
    """Whether anything of the method's messages is to be compressed. Raises ConfigError where it cannot be."""
    up, down = feedback.parse(method.compress), feedback.parse(method.compress_down, "--compress-down")
    if up is None and down is None:
        return False
    if any(phase.over == "neighbours" for phase in method.program()):
        raise ConfigError(f"{method.name} has no server; compress and compress-down are for messages from and to one")
    sent = [method.sends(phase) for phase in method.program()]
    fields = {kind for made in sent if isinstance(made, type) for kind in kinds(made).values()}
    if up is not None and None not in sent and not fields & {Kind.MODEL, Kind.DELTA, Kind.CONTROL}:
        raise ConfigError(f"{method.name} sends neither differences nor controls; use compress=identity")
    if down is not None and down.rule != "plain":
        raise ConfigError("compress-down feeds its errors back in its own way; give a compressor alone, as topk:0.01")
    if down is not None and method.buffers == "local":
        raise ConfigError("compress-down sends the global model's buffers; use buffers=average")
    return True


def _differing(method: Method, why: str) -> Method:
    """The method with clients that send differences. why: what only these can be."""
    if method.form == "delta":
        return method
    try:
        return dataclasses.replace(method, form="delta")
    except ConfigError:
        raise ConfigError(f"{method.name} sends whole models, and only differences are {why}") from None


def _fields(method: Method) -> dict[str, Any]:
    return {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}


_known: dict[Any, type[Method]] = {}


def _made(mixins: tuple[type[Method], ...], base: type[Method], fields: dict[str, Any]) -> Method:
    """``base`` with mixins in front; pickled as the call that made it, since the class has no name to be found by."""
    if (mixins, base) not in _known:
        name = "".join(m.__name__ for m in mixins) + base.__name__
        space: dict[str, Any] = {"__reduce__": lambda self: (_made, (mixins, base, _fields(self)))}
        space["__module__"] = base.__module__
        outside = (Compressed, Remembering, Calibrated, Chosen)
        first = tuple(m for m in mixins if m in outside)
        needs = dataclasses.replace(base.needs, loss=True) if Chosen in first else base.needs
        if Calibrated in first:
            needs = dataclasses.replace(needs, split_model=True, classification=True)
        space["needs"] = needs
        if mixins == (Remembering,) and sums_suffice(base(**fields)):
            space["sums"] = base.sums  # a momentum in the place of a difference changes nothing of what is wanted
        rest = mixins[len(first) :]
        parents: tuple[type, ...]
        parents = (*first, base, *rest) if issubclass(base, Weighed) else (*mixins, base)  # weights, then combining
        _known[mixins, base] = cast(type[Method], type(name, parents, space))
    return _known[mixins, base](**fields)

"""Methods whose replies are weighed by a rule with a memory, which may ask clients in a phase of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import UnionType
from typing import NamedTuple, cast

from consilience.core import tree as tr
from consilience.core.messages import ClientInfo, Model, Reply, Stat
from consilience.core.method import Phase
from consilience.core.model import Params, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.shapes import Expected
from consilience.core.site import Host, Place, Site
from consilience.core.tree import Tree, record
from consilience.parts.standing import Remembering, Standing
from consilience.parts.weights import RULES, Given, Rule

RULE = "rule"
"""What a rule keeps among :class:`Standing`'s memories."""


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


class Weighed(Remembering):
    """Mixin: replies are weighed by a rule with a memory."""

    def rule(self) -> Rule:
        """The rule; by default the one that the option ``weights`` names."""
        return RULES[self.weights]

    def memories(self, host: Host) -> dict[str, Tree]:
        """The rule's too, empty."""
        return {**super().memories(host), RULE: self.rule().init(host)}

    def aggregate(
        self, phase: Phase, host: Host, server: Standing, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Standing:
        """The method's, with the rule's weights."""
        deltas = [_delta(reply.update, server.server.model.params) for reply in replies]
        shares, memory = self.rule().weigh(host, server.memory[RULE], Given(replies, deltas))
        weighed = [reply._replace(share=share) for reply, share in zip(replies, shares, strict=True)]
        return super().aggregate(phase, host, _keeping(server, memory), weighed, cohort)


def _keeping(server: Standing, memory: Tree) -> Standing:
    """With another memory of the rule."""
    return server._replace(memory={**server.memory, RULE: memory})


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
            return Question(server.server.model, self.rule().ask(server.memory[RULE], client.id))
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
            return _keeping(server, self.rule().learn(server.memory[RULE], replies))
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

"""Clients that send momenta, so that what one hostile client pretends in a round counts for little beside its past."""

from __future__ import annotations

from types import UnionType
from typing import Any, NamedTuple

from consilience.core import tree as tr
from consilience.core.messages import Kind, kinds
from consilience.core.method import Method, Phase
from consilience.core.model import Params
from consilience.core.predict import Predictor
from consilience.core.site import Site
from consilience.core.tree import Tree, record


@record
class Past(NamedTuple):
    """A client's state in the method, and the momentum of each of its differences, by phase and field."""

    own: Tree
    momentum: dict[str, Params]


class Momenta(Method):
    """Mixin: in the place of each difference Delta_i a client sends

        m_i <- beta m_i + (1 - beta) Delta_i,   m_i = Delta_i at first,   beta = ``client_momentum``

    Honest differences vary from round to round by their batches, and a robust aggregator must let pass what varies so
    little; momenta vary less, by a factor of about ((1 - beta) / (1 + beta))^(1/2), so a lie that is small enough to
    pass in every round adds up to less. Control variates, models, buffers and statistics travel as they are. m_i
    belongs to what the client keeps: it does not move where an update was refused or lost. With all clients in every
    round and equal weights, the mean of momenta is a momentum of means: FedAvg with a server's momentum.

    Source: Karimireddy, He, Jaggi, "Learning from History for Byzantine Robust Optimization", ICML 2021. Deviations:
    there a client sends the momentum of one gradient, here that of a round's difference (which is -eta times it where
    a round is one step); beta is constant; a client that was away goes on from its last m_i.
    """

    def sends(self, phase: Phase) -> type | UnionType | None:
        """The method's."""
        return super().sends(phase)

    def init_client(self, site: Site) -> Past:
        """The method's, and no past."""
        return Past(super().init_client(site), {})

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Any) -> tuple[Tree, Any]:
        """The method's."""
        if not isinstance(state, Past):  # inside a method of the base
            return super().client_update(phase, site, message, state)
        update, own = super().client_update(phase, site, message, state.own)
        return update, state if own is None else state._replace(own=own)

    def outgoing(self, phase: Phase, site: Site, update: Tree, state: Past) -> tuple[Tree, Past]:
        """The update with momenta in the place of differences."""
        update, own = super().outgoing(phase, site, update, state.own)
        momentum = dict(state.momentum)
        for name, kind in kinds(type(update)).items() if tr.is_record(update) else ():
            if kind is Kind.DELTA:
                key, new = f"{phase.name}.{name}", getattr(update, name)
                if key in momentum:
                    new = tr.axpy(self.client_momentum, momentum[key], tr.scale(new, 1 - self.client_momentum))
                momentum[key] = new
                update = update._replace(**{name: new})
        return update, Past(own, momentum)

    def personal_model(self, site: Site, message: Tree, state: Any) -> Predictor | None:
        """The method's."""
        return super().personal_model(site, message, _own(state))

    def trained_model(self, site: Site, message: Tree, update: Tree, state: Any) -> Predictor | None:
        """The method's."""
        return super().trained_model(site, message, update, _own(state))

    def cluster(self, site: Site, message: Tree, state: Any) -> int | None:
        """The method's."""
        return super().cluster(site, message, _own(state))


def _own(state: Any) -> Tree:
    return state.own if isinstance(state, Past) else state

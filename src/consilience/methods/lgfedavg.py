"""LG-FedAvg: own features, one head for all (Liang et al., 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from consilience.core.messages import ClientInfo, Reply, Stat
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Weights
from consilience.core.predict import Net, Predictor
from consilience.core.reduce import weighted_sum
from consilience.core.shapes import Expected
from consilience.core.site import Host, Place, Site
from consilience.core.tree import Tree, record
from consilience.parts.split import head_of, with_head


@record
class Head(NamedTuple):
    """The parameters of a head."""

    head: Stat


@dataclass(frozen=True)
class LGFedAvg(Method):
    """Each client has a body of its own, and all share the head, which is averaged as FedAvg averages models.

        (f_k, h_k) <- local training of both from (f_k, h);      h <- sum_k p_k h_k

    A client's state is its whole model. It deploys its body with the server's head. With a model that is nothing but a
    head (``logistic``), it is FedAvg bit for bit.

    Source: Liang, Liu, Liu, Hwang, Salakhutdinov, Morency, "Think Locally, Act Globally: Federated Learning with Local
    and Global Representations", 2020, algorithm 1. Deviation: the paper first trains everything with FedAvg for some
    rounds; here all rounds are of this kind, as in HtFLlib.
    """

    name = "lgfedavg"
    family = "different architectures"
    source = "Liang et al."
    year = 2020
    needs = Needs(architectures="any", same_features=True, split_model=True)
    sums = Method.means

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps)

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """A head like the client's."""
        return {"head": head_of(place.architectures[model].spec)}

    def sends(self, phase: Phase) -> type:
        """Heads."""
        return Head

    def init_server(self, host: Host) -> Tree:
        """The head of the server's initial model."""
        return Head(head_of(host.initial()))

    def broadcast(self, phase: Phase, server: Head, client: ClientInfo) -> Tree:
        """The head."""
        return server

    def init_client(self, site: Site) -> Tree:
        """The common initial model of its architecture."""
        return site.initial()

    def client_update(self, phase: Phase, site: Site, message: Head, state: Weights) -> tuple[Tree, Tree]:
        """Train body and head, send the head."""
        weights = site.fit(with_head(state, message.head)).weights
        return Head(head_of(weights)), weights

    def aggregate(
        self, phase: Phase, host: Host, server: Head, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Head:
        """The mean head."""
        return Head(weighted_sum([reply.update.head for reply in replies], self.shares(replies)))

    def global_model(self, server: Tree) -> Predictor | None:
        """There is none."""
        return None

    def personal_model(self, site: Site, message: Head, state: Weights) -> Predictor:
        """The own body with the common head."""
        return Net(with_head(state, message.head), site.model)

    def trained_model(self, site: Site, message: Tree, update: Head, state: Weights) -> Predictor:
        """The own body with the own head."""
        return Net(with_head(state, update.head), site.model)

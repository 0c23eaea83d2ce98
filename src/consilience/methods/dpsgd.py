"""D-PSGD: neighbours average their models, and there is no server (Lian et al., 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from consilience.core import tree as tr
from consilience.core.messages import Inbox
from consilience.core.method import Needs, Phase
from consilience.core.model import Params, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.reduce import weighted_sum
from consilience.core.site import Site
from consilience.core.training import option
from consilience.core.tree import Tree, record
from consilience.parts.serverless import Serverless


@record
class Node(NamedTuple):
    """A node's model, and in the order "cta" what its last training changed and is not yet part of the model."""

    model: Weights
    change: Params | None


@dataclass(frozen=True)
class DPSGD(Serverless):
    """Nodes of a topology train, and then average with their neighbours.

        order "atc":  x_i <- sum_j W_ij (x_j + Delta_j)          adapt, then combine
        order "cta":  x_i <- sum_j W_ij x_j + Delta_i            training at the model before mixing; it could go on
                                                                 while neighbours exchange
        Delta_i = y_i - x_i after the local steps from x_i (one step: - eta grad F_i(x_i))

    W is that of ``--topology`` and ``--mixing`` for the round; its rows sum to 1, and its columns but for "pull". More
    than one local step is local SGD among neighbours. Buffers of BatchNorm are mixed like weights, counters are not.
    The weight of neighbours that do not take part stays at home. start "own": nodes begin with models of their own.
    ``weights`` and ``form`` have no meaning here. A line of history has, under ``merged``, how good the mean of all
    nodes' models is, and their squared distances from it.

    On a complete graph with everybody taking part, order "atc" is FedAvg with uniform weights, bit for bit.

    Source: Lian, Zhang, Zhang, Hsieh, Zhang, Liu, "Can Decentralized Algorithms Outperform Centralized Algorithms? A
    Case Study for Decentralized Parallel Stochastic Gradient Descent", NeurIPS 2017, algorithm 1 (order "cta").
    Deviation: "atc" is the default, since it is no worse and usually better.
    """

    name = "dpsgd"
    family = "decentralised"
    source = "Lian et al., NeurIPS"
    year = 2017
    needs = Needs(topology=True)
    gossips = True

    order: Literal["atc", "cta"] = option("atc", "adapt then combine, or combine beside adapting")
    start: Literal["common", "own"] = option("common", "one initial model for all nodes, or each its own")

    def program(self) -> tuple[Phase, ...]:
        """Train, then mix."""
        return (Phase("train"), Phase("mix", over="neighbours"))

    def init_client(self, site: Site) -> Node:
        """The initial model."""
        return Node(site.initial(component=0 if self.start == "common" else 1 + site.id), None)

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps) if phase.name == "train" else 0

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Node) -> tuple[Tree, Node]:
        """Train from the own model."""
        end = site.fit(state.model).weights
        if self.order == "atc":
            return None, Node(end, None)
        return None, Node(Weights(state.model.params, end.buffers), tr.sub(end.params, state.model.params))

    def send(self, phase: Phase, state: Node) -> Weights:
        """The own model; without its buffers where they are local."""
        return state.model if self.buffers == "average" else Weights(state.model.params, {})

    def mix(self, phase: Phase, site: Site, state: Node, inbox: Inbox) -> Node:
        """The mean of what has come, plus the own change in the order "cta"."""
        mean = self.mean(site, inbox)
        shared = {name: b for name, b in mean.buffers.items() if b.is_floating_point()}
        params = mean.params if state.change is None else tr.add(mean.params, state.change)
        return Node(Weights(params, {**state.model.buffers, **shared}), None)

    def mean(self, site: Site, inbox: Inbox) -> Weights:
        """sum_j W_ij x_j."""
        mean: Weights = weighted_sum(list(inbox.messages.values()), list(inbox.weights.values()))
        return mean

    def node_model(self, state: Node) -> Weights:
        """The node's model, its last training included."""
        params = state.model.params if state.change is None else tr.add(state.model.params, state.change)
        return Weights(params, state.model.buffers)

    def personal_model(self, site: Site, message: Tree, state: Node) -> Predictor:
        """The node's model, its last training included."""
        return Net(self.node_model(state), site.model)

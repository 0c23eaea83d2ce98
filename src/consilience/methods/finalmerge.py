"""Single final merging: nodes exchange little, and in the end all their models become one (Zhu et al., 2026)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge

from consilience.core.messages import Broadcast, Buffers, ClientInfo, ModelUpdate, Reply
from consilience.core.method import At, Phase, keep_buffers
from consilience.core.model import Weights
from consilience.core.predict import Net, Predictor
from consilience.core.reduce import sample_weights, uniform_weights, weighted_sum
from consilience.core.site import Host, Site
from consilience.core.training import option
from consilience.core.tree import Tree, record
from consilience.methods.dpsgd import DPSGD, Node
from consilience.parts.norms import statistics


@record
class Merged(NamedTuple):
    """What all nodes were merged to; None before."""

    model: Weights | None


@record
class Statistics(NamedTuple):
    """BatchNorm's statistics of a node's rows under the merged model."""

    buffers: Buffers


@dataclass(frozen=True)
class FinalMerge(DPSGD):
    """D-PSGD with little communication, and one merging of all nodes at its end.

        rounds:        as D-PSGD, along --topology, which says how much is sent and when
        merging:       x_i <- x = (1/n) sum_j x_j for every node i, all parameters, once
        after it:      BatchNorm's statistics anew, each node's from a pass over its own rows; the global model has
                       their mean, weighted by rows

    Merging is an all-reduce: each node sends one model and gets one. It comes after the last round, or after round
    ``merge_after`` (of that round's nodes), and training then goes on from x; the global model stays x. Budgets over
    time are topologies: ``pull:0.2`` (the source's sparse gossip), ``none``, ``pull:0.2*45,complete*5`` (a window at
    the end). Where no model has come to merge (all lost, or not finite) nodes keep theirs. Nodes should begin with one
    model (start "common"): the mean of unrelated networks is worth nothing. How good merging would be after each round
    is told in history, under ``merged``, with the mean of the statistics.

    With a topology of "none" and one round, x is FedAvg's with uniform weights, bit for bit; with merge_after = r, node
    models are those of D-PSGD with complete mixing in round r only, bit for bit.

    Source: Zhu, Zhang, Wang, Zhou, Wang, "On the Surprising Effectiveness of a Single Global Merging in Decentralized
    Learning", ICLR 2026, and its official code. Deviations: the source merges at 0.997 of the steps or at the end, and
    takes the statistics from one short pass over data of all; its round is 100 local steps (``local_steps``).
    """

    name = "finalmerge"
    source = "Zhu et al., ICLR"
    year = 2026

    merge_after: Annotated[int, Ge(0)] = option(0, "round after which nodes merge; 0: after the last")
    calibrate: bool = option(True, "BatchNorm's statistics anew after merging")

    def program(self) -> tuple[Phase, ...]:
        """D-PSGD's rounds; merging, up and down."""
        when: At | Literal["end"] = At(self.merge_after) if self.merge_after else "end"
        return (*super().program(), Phase("merge", when=when, asks=True), Phase("take", when=when, asks=True))

    def init_server(self, host: Host) -> Merged:
        """Nothing is merged."""
        return Merged(None)

    def broadcast(self, phase: Phase, server: Merged, client: ClientInfo) -> Tree:
        """The merged model, if there is one to take: it may be that no node's has come, or that none was finite."""
        return None if phase.name != "take" or server.model is None else Broadcast(server.model)

    def sends(self, phase: Phase) -> type | UnionType:
        """A model to merge; statistics, if there are any."""
        return {"merge": ModelUpdate, "take": Statistics | None}.get(phase.name, NoneType)

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Node) -> tuple[Tree, Node]:
        """Train; or send the model; or take the merged one."""
        if phase.name == "merge":
            return ModelUpdate(self.node_model(state)), state
        if phase.name != "take":
            return super().client_update(phase, site, message, state)
        if message is None:
            return None, state
        shared = {name: b for name, b in message.model.buffers.items() if b.is_floating_point()}
        model = Weights(message.model.params, {**state.model.buffers, **shared})
        if not (self.calibrate and model.buffers and len(site.train)):
            return None, Node(model, None)
        model = statistics(site, model)
        return Statistics(model.buffers), Node(model, None)

    def aggregate(
        self, phase: Phase, host: Host, server: Merged, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Merged:
        """The mean of the models; the mean of their statistics."""
        if phase.name == "merge":
            mean = weighted_sum([reply.update.model for reply in replies], uniform_weights(len(replies)))
            return Merged(keep_buffers(mean, host.initial()))
        heard = [reply for reply in replies if phase.name == "take" and reply.update is not None]
        if not heard or server.model is None or self.buffers == "local":
            return server
        shares = sample_weights([reply.samples for reply in heard])
        buffers = weighted_sum([reply.update.buffers for reply in heard], shares)
        return Merged(Weights(server.model.params, buffers))

    def global_model(self, server: Merged) -> Predictor | None:
        """The merged one."""
        return None if server.model is None else Net(server.model)

"""Centralised: training on everybody's pooled data, the reference that no federation can expect to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from consilience.core.fit import n_steps
from consilience.core.messages import Broadcast, ClientInfo, Reply
from consilience.core.method import Method, Needs, Phase, ServerState
from consilience.core.predict import Net, Predictor
from consilience.core.site import Host, Site
from consilience.core.tree import Tree


@dataclass(frozen=True)
class Centralised(Method):
    """Plain training on the pooled training rows, with the same optimiser and budget as a federated round.

        x <- x - eta grad F(x; batch)   as many times as the cohort's rows make batches

    Each round a cohort is drawn as for every method, and the server trains on as many freshly shuffled pooled rows
    as that cohort would have used. Nothing is sent, so no byte is counted. The local optimiser's momentum starts
    anew each round, as on clients. Source: the usual reference; no paper.
    """

    name = "centralised"
    family = "baseline"
    source = "reference"
    year = 2017
    needs = Needs(pooled_data=True)
    trains_on_server = True

    def broadcast(self, phase: Phase, server: ServerState, client: ClientInfo) -> None:
        """Nothing."""
        return

    def deploy(self, server: ServerState, client: ClientInfo) -> Broadcast:
        """The one model."""
        return Broadcast(server.model)

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Tree) -> tuple[None, Tree]:
        """Nothing: the rows are at the server."""
        return None, state

    def aggregate(
        self, phase: Phase, host: Host, server: ServerState, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> ServerState:
        """Train on the pool."""
        rows = sum(reply.samples for reply in replies)
        given = None if self.local_steps is None else self.local_steps * len(replies)
        steps = n_steps(rows, self.batch_size, self.local_epochs, given)
        return ServerState(host.fit(server.model, data=host.pooled, steps=steps).weights)

    def personal_model(self, site: Site, message: Broadcast | None, state: Tree) -> Predictor | None:
        """The one model, where it is deployed."""
        return None if message is None else Net(message.model)

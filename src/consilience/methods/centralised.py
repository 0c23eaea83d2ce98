"""Centralised: training on everybody's pooled data, the reference that no federation can expect to beat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import NoneType

from torch import Tensor

from consilience.core.fit import shuffled
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
    own_batches = "draws rows of everybody's pool"
    trains_on_server = True

    def broadcast(self, phase: Phase, server: ServerState, client: ClientInfo) -> None:
        """Nothing."""
        return

    def deploy(self, server: ServerState, client: ClientInfo) -> Broadcast:
        """The one model."""
        return Broadcast(server.model)

    def sends(self, phase: Phase) -> type:
        """Nothing to the server."""
        return NoneType

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Tree) -> tuple[None, Tree]:
        """Nothing: the rows are at the server."""
        return None, state

    def aggregate(
        self, phase: Phase, host: Host, server: ServerState, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> ServerState:
        """Train on the pool."""
        if self.local_steps is not None:
            return ServerState(host.fit(server.model, data=host.pooled, steps=self.local_steps * len(replies)).weights)
        rows = sum(reply.samples for reply in replies) * self.local_epochs
        return ServerState(host.fit(server.model, data=host.pooled, batches=self._batches(host, rows)).weights)

    def _batches(self, host: Host, rows: int) -> Iterator[Tensor]:
        """Shuffled batches of the pool that hold ``rows`` rows together; the last may be cut."""
        assert host.pooled is not None
        for batch in shuffled(host.rng("batches"), len(host.pooled), self.batch_size):
            yield batch[:rows]
            rows -= len(batch)
            if rows <= 0:
                return

    def personal_model(self, site: Site, message: Broadcast | None, state: Tree) -> Predictor | None:
        """The one model, where it is deployed."""
        return None if message is None else Net(message.model)

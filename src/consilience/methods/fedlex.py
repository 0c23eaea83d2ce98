"""FedLEx: how far exploring clients move each parameter decides how much it may move later (Interno et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge

from consilience.core import tree as tr
from consilience.core.fit import Batch, Grad, Plan
from consilience.core.messages import ClientInfo, DeltaUpdate, Kind, Model, Reply
from consilience.core.method import Method, Phase
from consilience.core.model import Params, Weights
from consilience.core.reduce import uniform_weights, weighted_sum
from consilience.core.site import Host, Site
from consilience.core.training import option
from consilience.core.tree import Tree, record


@record
class Server(NamedTuple):
    """The global model, and the guidance G (None without exploration)."""

    model: Weights
    guidance: Params | None


@record
class Down(NamedTuple):
    """x and G."""

    model: Model
    guidance: Annotated[Params | None, Kind.CONTROL]


def guidance(spread: Params) -> Params:
    """(L - min) / (max - min) for each tensor; 1 where all of a tensor's L are equal."""
    found = {}
    for name, values in spread.items():
        low, high = values.min(), values.max()
        found[name] = (values - low) / (high - low) if high > low else torch.ones_like(values)
    return found


@dataclass(frozen=True)
class FedLEx(Method):
    """Before the first round clients explore; then each gradient is scaled by how far its parameter went.

        exploration:  theta_i from x by up to ``explore_epochs`` epochs, until the loss has not fallen for ``patience``
                      L = (1 / N) sum_i (theta_i - x)^2 elementwise;   G = (L - min L) / (max L - min L) in each tensor
        rounds:       y_i <- y_i - eta G grad F_i(y_i; batch);   x <- sum_i p_i y_i

    Parameters on which clients' paths part little hardly move after that; the one that moved least is frozen. With
    explore_epochs = 0 there is no exploration, G = 1, and this is FedAvg bit for bit.

    Use it with SGD: optimisers that divide by a gradient's size (Adam) undo a constant scale on it, almost entirely.

    Source: Interno, Olhofer, Jin, Hammer, "Federated Loss Exploration for Improved Convergence on Non-IID Data", IJCNN
    2024, and its official code, from a summary. The abstract speaks of the deviation of gradients; the code takes that
    of parameters, and so does this. Deviations: exploration starts from the initial model, not from one that one client
    has trained for an epoch; everybody explores; G travels in every round, so that clients that could not be reached at
    the start have it; gradients are clipped before they are scaled, not after; the default is 10 epochs where the code
    has 150.
    """

    name = "fedlex"
    family = "skewed data"
    source = "Interno et al., IJCNN"
    year = 2024
    confidence = "low"

    explore_epochs: Annotated[int, Ge(0)] = option(10, "longest exploration, in epochs; 0 for none")
    patience: Annotated[int, Ge(1)] = option(5, "epochs without a lower loss after which exploration ends")

    def program(self) -> tuple[Phase, ...]:
        """Exploration before the rounds."""
        start = (Phase("explore", when="start"),) if self.explore_epochs else ()
        return (*start, Phase("train"))

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training, or the first epoch of an exploration."""
        return rows if phase.name == "explore" else self.one_fit(rows, steps)

    def sends(self, phase: Phase) -> type:
        """Differences in exploration, then what FedAvg's clients send."""
        return DeltaUpdate if phase.name == "explore" else self.packs

    def init_server(self, host: Host) -> Server:
        """No guidance yet."""
        return Server(host.initial(), None)

    def broadcast(self, phase: Phase, server: Server, client: ClientInfo) -> Down:
        """x and G."""
        return Down(server.model, server.guidance)

    def client_update(self, phase: Phase, site: Site, message: Down, state: Tree) -> tuple[Tree, Tree]:
        """Explore, or train."""
        if phase.name == "explore":
            found = self._explore(site, message.model)
            return DeltaUpdate(tr.sub(found.params, message.model.params), found.buffers), state
        fit = self.train(site, message, state)
        return self.pack(message.model, fit.weights), state

    def _explore(self, site: Site, start: Weights) -> Weights:
        weights, best, waited = start, float("inf"), 0
        for epoch in range(self.explore_epochs):
            fit = site.fit(weights, epochs=1, purpose=f"explore-{epoch}")
            weights = fit.weights
            waited = 0 if fit.loss < best else waited + 1
            best = min(best, fit.loss)
            if waited == self.patience:
                break
        return weights

    def plan(self, site: Site, message: Down, state: Tree) -> Plan:
        """Scaled steps."""
        scale = message.guidance
        if scale is None:
            return Plan()

        def step(params: Params, grad: Grad, batch: Batch, carry: Tree) -> tuple[Params, Tree]:
            direction = grad()
            torch._foreach_mul_(list(direction.values()), [scale[name] for name in direction])
            return direction, carry

        return Plan(step=step)

    def aggregate(
        self, phase: Phase, host: Host, server: Server, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Server:
        """G of an exploration, or the next model."""
        if phase.name == "explore":
            squares = [{k: d.square() for k, d in reply.update.delta.items()} for reply in replies]
            return server._replace(guidance=guidance(weighted_sum(squares, uniform_weights(len(replies)))))
        return server._replace(model=self.combine(server.model, replies))

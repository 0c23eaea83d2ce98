"""FedAsync: every model that arrives is mixed in at once (Xie et al., 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from consilience.core.fit import Batch, Grad, Plan
from consilience.core.messages import Reply
from consilience.core.method import Method, Phase, ServerState
from consilience.core.model import Params
from consilience.core.site import Host, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree
from consilience.parts.losses import proximal
from consilience.parts.staleness import discount, mix


@dataclass(frozen=True)
class FedAsync(Method):
    """The server mixes each model in when it arrives, the less the older the model from which it was trained.

        y_i <- y_i - eta ( grad F_i(y_i; batch) + rho (y_i - x) )         from y_i = x, as received
        x <- (1 - alpha_t) x + alpha_t y_i,   alpha_t = alpha s(tau)
        s(tau) = 1,   (1 + tau)^-a,   or   1 if tau <= b, else 1 / (a (tau - b) + 1)

    tau is the number of server updates made since the client received x. A reply with tau above ``max_staleness`` is
    left out. A hinge wants its own a and b; the paper has a = 10, b = 4.

    alpha = 1 with constant staleness replaces the model: one client, trained on and on. Several replies combined at
    once (by a schedule other than ``async``) are mixed in one after another, in the order of clients.

    Source: Xie, Koyejo, Gupta, "Asynchronous Federated Optimization", 2019, algorithm 1. Deviation: staleness comes
    from the devices' times; the paper draws it.
    """

    name = "fedasync"
    family = "asynchronous"
    source = "Xie et al."
    year = 2019
    schedule = "async"

    alpha: Annotated[float, Gt(0), Le(1)] = option(0.6, "weight of a fresh model", Search(0.05, 1.0))
    staleness: Literal["constant", "polynomial", "hinge"] = option("polynomial", "s: constant, polynomial or hinge")
    a: Annotated[float, Ge(0)] = option(0.5, "exponent of the polynomial, or slope of the hinge")
    b: Annotated[int, Ge(0)] = option(4, "staleness at which the hinge begins to fall")
    rho: Annotated[float, Ge(0)] = option(0.005, "weight of the proximal term")
    max_staleness: Annotated[int, Ge(0)] | None = option(None, "replies that are older are left out")
    form: Literal["model"] = option("model", "clients send models")

    def plan(self, site: Site, message: Tree, state: Tree) -> Plan:
        """The proximal step."""
        if not self.rho:
            return Plan()
        anchor = message.model.params

        def step(params: Params, grad: Grad, batch: Batch, carry: Tree) -> tuple[Params, Tree]:
            gradient = grad()
            proximal(params, anchor, gradient, self.rho)
            return gradient, carry

        return Plan(step=step)

    def aggregate(
        self, phase: Phase, host: Host, server: ServerState, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> ServerState:
        """Mix in one model after another."""
        model = server.model
        for reply in replies:
            if self.max_staleness is None or reply.staleness <= self.max_staleness:
                alpha = self.alpha * discount(self.staleness, reply.staleness, self.a, self.b)
                model = mix(model, reply.update.model, alpha)
        return server._replace(model=model)

"""FedDyn: a regulariser that moves until local and global minima agree (Acar et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from annotated_types import Gt

from consilience.core import tree as tr
from consilience.core.fit import Batch, Grad, Plan
from consilience.core.messages import Broadcast, DeltaUpdate, Reply
from consilience.core.method import Method, Phase, keep_buffers
from consilience.core.model import Params, Weights
from consilience.core.reduce import weighted_sum
from consilience.core.site import Host, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record
from consilience.parts.losses import proximal


@record
class Server(NamedTuple):
    """The global model, and m: the mean over all clients of their moves so far."""

    model: Weights
    moves: Params


@dataclass(frozen=True)
class FedDyn(Method):
    """Each client's objective is tilted until its minimum, seen from the global optimum, is the global one.

        y_i ~ argmin F_i(y) - <g_i, y> + (alpha / 2) ||y - x||^2        by SGD from y = x
        g_i <- g_i - alpha (y_i - x);   h <- h - (alpha / N) sum_{i in S} (y_i - x)
        x   <- (1 / |S|) sum_{i in S} y_i - h / alpha

    N is the number of all clients; g_i and h start at 0. What is kept is not g_i and h but l_i = -g_i / alpha and
    m = -h / alpha, as in the official code: l_i sums client i's moves y_i - x, m is the mean of all l_i, and the
    gradient of the two terms is alpha (y - x + l_i). Invariant: m = (1 / N) sum_i l_i.

    alpha = 0 is no limit of this method, since h is divided by it; it is refused. A first round of one local step is
    x + (1 + |S| / N) mean_i Delta_i with FedAvg's Delta_i.

    Source: Acar, Zhao, Matas Navarro, Mattina, Whatmough, Saligrama, "Federated Learning Based on Dynamic
    Regularization", ICLR 2021, algorithm 1. Deviations: the code divides alpha by a client's relative size and clips at
    10; here alpha is everybody's, and ``clip`` is an option. Buffers take plain averages.
    """

    name = "feddyn"
    family = "skewed data"
    source = "Acar et al., ICLR"
    year = 2021
    takes_momentum = False

    alpha: Annotated[float, Gt(0)] = option(0.01, "weight of the regulariser", Search(1e-3, 1.0))
    weights: Literal["uniform"] = option("uniform", "a client's weight (uniform in the paper)")
    form: Literal["delta"] = option("delta", "clients send differences")

    def sends(self, phase: Phase) -> type:
        """Differences, as FedAvg."""
        return DeltaUpdate

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps)

    def init_server(self, host: Host) -> Server:
        """Nobody has moved."""
        model = host.initial()
        return Server(model, tr.zeros_like(model.params))

    def init_client(self, site: Site) -> Params:
        """l_i = 0."""
        zeros: Params = tr.zeros_like(site.initial().params)
        return zeros

    def plan(self, site: Site, message: Broadcast, state: Params) -> Plan:
        """Steps with the pull towards x - l_i."""
        anchor = tr.sub(message.model.params, state)

        def step(params: Params, grad: Grad, batch: Batch, carry: Tree) -> tuple[Params, Tree]:
            gradient = grad()
            proximal(params, anchor, gradient, self.alpha)
            return gradient, carry

        return Plan(step=step)

    def client_update(self, phase: Phase, site: Site, message: Broadcast, state: Params) -> tuple[Tree, Params]:
        """Train, and remember where it led."""
        fit = self.train(site, message, state)
        update = self.pack(message.model, fit.weights)
        return update, tr.add(state, update.delta)

    def aggregate(
        self, phase: Phase, host: Host, server: Server, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Server:
        """The cohort's mean, moved by m."""
        shares = self.shares(replies)
        total = weighted_sum([reply.update.delta for reply in replies], [1.0] * len(replies))
        moves = tr.axpy(1 / host.clients, total, server.moves)
        mean = tr.add(server.model.params, self.mean_delta(replies, shares))
        model = Weights(tr.add(mean, moves), self.mean_buffers(replies, shares))
        return Server(keep_buffers(model, server.model), moves)

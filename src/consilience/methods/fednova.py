"""FedNova: normalised averaging under unequal local work (Wang et al., 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge, Gt, Lt

from consilience.core import tree as tr
from consilience.core.fit import Batch, Grad, Plan
from consilience.core.messages import Reply
from consilience.core.method import Method, Phase, keep_buffers
from consilience.core.model import Params, Weights
from consilience.core.reduce import weighted_sum
from consilience.core.site import Host, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record
from consilience.parts.local_steps import plain_sgd, relative
from consilience.parts.losses import proximal


@record
class Server(NamedTuple):
    """The global model, and the velocity of the server's momentum."""

    model: Weights
    velocity: Params


@dataclass(frozen=True)
class FedNova(Method):
    """Clients that do more local steps point further, and count no more for it.

    A local update is a sum of gradients, y_i - x = -eta sum_k a_k g_k; ||a_i||_1 says how long client i's path is:
    K_i for plain SGD, more with momentum, less with a proximal term.

        d_i = (x - y_i) / (eta ||a_i||_1);   tau = sum_i p_i ||a_i||_1   (sum_i p_i K_i with a proximal term)
        v <- beta v - tau eta sum_i p_i d_i;   x <- x + v

    ||a_i||_1 is found by running the local solver on the constant gradient 1: s = v = 0, then K_i times
    v <- momentum v + 1 - eta mu s and s <- s + v. The server does that itself, from the steps of a reply and the step
    size of its version, so that clients send what FedAvg's send.

    With equal ||a_i||_1, as for plain SGD with equal K_i, and server_momentum = mu = 0, this is FedAvg in difference
    form bit for bit. One client is FedAvg, too (with mu: FedAvg with a step of K / ||a||_1).

    Source: Wang, Liu, Liang, Joshi, Poor, "Tackling the Objective Inconsistency Problem in Heterogeneous Federated
    Optimization", NeurIPS 2020, and its official code, whose tau with a proximal term is taken. Deviations: with a
    proximal term and momentum together ||a_i||_1 is that of the steps really made (the code adds two recursions).
    Weight decay is part of the gradient. Buffers take plain averages.
    """

    name = "fednova"
    family = "skewed data"
    source = "Wang et al., NeurIPS"
    year = 2020
    takes_rules = True

    mu: Annotated[float, Ge(0)] = option(0.0, "weight of a proximal term", Search(1e-3, 1.0))
    server_momentum: Annotated[float, Ge(0), Lt(1)] = option(0.0, "beta", Search(0.0, 0.99, log=False))
    server_lr: Annotated[float, Gt(0)] = option(1.0, "factor on the server's step", Search(0.1, 10.0))
    form: Literal["delta"] = option("delta", "clients send differences")

    def check(self) -> None:
        """The local solver must be SGD, whose path has a known length."""
        plain_sgd(self, momentum=True)

    def length(self, steps: int, lr: float) -> float:
        """||a||_1 of ``steps`` local steps of size ``lr``."""
        if not self.mu and not self.momentum:
            return float(steps)
        total = velocity = 0.0
        for _ in range(steps):
            velocity = self.momentum * velocity + 1 - lr * self.mu * total
            total += velocity
        return total

    def init_server(self, host: Host) -> Server:
        """No velocity."""
        model = host.initial()
        return Server(model, tr.zeros_like(model.params))

    def plan(self, site: Site, message: Tree, state: Tree) -> Plan:
        """The proximal step, if there is a term."""
        if not self.mu:
            return Plan()
        anchor = message.model.params

        def step(params: Params, grad: Grad, batch: Batch, carry: Tree) -> tuple[Params, Tree]:
            gradient = grad()
            proximal(params, anchor, gradient, self.mu)
            return gradient, carry

        return Plan(step=step)

    def aggregate(
        self, phase: Phase, host: Host, server: Server, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Server:
        """One server step along the normalised directions."""
        shares = self.shares(replies)
        paths = [self.length(reply.steps, self.rate(reply.job.version)) for reply in replies]
        steps = [float(reply.steps) for reply in replies] if self.mu else None
        even, _ = relative(shares, paths, steps)
        velocity = weighted_sum([reply.update.delta for reply in replies], even)
        if self.server_momentum:
            velocity = tr.axpy(self.server_momentum, server.velocity, velocity)
        params = tr.axpy(self.server_lr, velocity, server.model.params)
        model = keep_buffers(Weights(params, self.mean_buffers(replies, shares)), server.model)
        return Server(model, velocity)

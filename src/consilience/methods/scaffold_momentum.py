"""SCAFFOLD-M and SCAFFOLD-M-VR: control variates and the server's momentum (Cheng et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from annotated_types import Gt, Le

from consilience.core import tree as tr
from consilience.core.fit import Batch, Grad, Plan
from consilience.core.messages import ClientInfo, Control, Model, Reply, Stat
from consilience.core.method import Phase, keep_buffers
from consilience.core.model import Params, Weights
from consilience.core.reduce import weighted_sum
from consilience.core.site import Host, Site
from consilience.core.training import Search, option
from consilience.core.tree import record
from consilience.methods.scaffold import Scaffold
from consilience.parts.directions import added
from consilience.parts.local_steps import plain_sgd
from consilience.parts.momentum import mixed, moved


@record
class Server(NamedTuple):
    """The global model, the control c, the momentum g, and the step size gamma of the last step along it."""

    model: Weights
    control: Params
    momentum: Params
    gamma: float


@record
class Down(NamedTuple):
    """x, c, g and gamma."""

    model: Model
    control: Control
    momentum: Control
    gamma: Stat


@dataclass(frozen=True)
class ScaffoldMomentum(Scaffold):
    """SCAFFOLD whose corrected gradients are mixed with the global direction of the last round.

        u = beta ( grad F_i(y_i; batch) - c_i + c ) + (1 - beta) g;   y_i <- y_i - eta u        K_i times from y_i = x
        c_i+ = mean of the gradients along the path (they cannot be had from y_i, which g has moved, too)
        g <- sum_i p_i (x - y_i) / (eta K_i);   x <- x - gamma g,   gamma = eta_g eta sum_i p_i K_i
        c <- c + (1 / N) sum_{i in S} (c_i+ - c_i)

    g, c and every c_i start at 0. beta = 1 and equal K_i is SCAFFOLD with option 2, bit for bit. With one client it is
    fedavg-m, since c = c_i. Invariant: c is the mean of all c_i.

    Source: Cheng, Huang, Wu, Yuan, "Momentum Benefits Non-IID Federated Learning Simply and Provably", ICLR 2024,
    algorithm 3 (SCAFFOLD-M). Deviations: controls start at 0, not at a minibatch's gradient; gamma is given relative to
    plain averaging, as in fedavg-m; each difference is divided by its own client's K_i.
    """

    name = "scaffold-m"
    source = "Cheng et al., ICLR"
    year = 2024
    confidence = "medium"
    reduces: ClassVar[bool] = False
    """Whether steps are corrected by a gradient at the previous global model."""

    beta: Annotated[float, Gt(0), Le(1)] = option(0.1, "weight of the own, corrected gradient", Search(0.01, 1.0))
    server_lr: Annotated[float, Gt(0)] = option(1.0, "server step size eta_g, relative to averaging", Search(0.1, 10.0))
    control: Literal["2"] = option("2", "how c_i is renewed: as in option 2 of SCAFFOLD's paper")

    def check(self) -> None:
        """K_i steps must be K_i eta long."""
        plain_sgd(self)

    def init_server(self, host: Host) -> Server:  # type: ignore[override]
        """c = g = 0."""
        model = host.initial()
        zeros = tr.zeros_like(model.params)
        return Server(model, zeros, zeros, 0.0)

    def broadcast(self, phase: Phase, server: Server, client: ClientInfo) -> Down:  # type: ignore[override]
        """x, c, g and gamma."""
        return Down(server.model, server.control, server.momentum, server.gamma)

    def plan(self, site: Site, message: Down, state: Params) -> Plan:  # type: ignore[override]
        """Mixed steps, and the sum of the gradients along the path."""
        correction = tr.sub(message.control, state)
        beta, previous = self.beta, None
        if self.reduces:
            previous = tr.axpy(message.gamma, message.momentum, message.model.params)
            beta = beta if message.gamma else 1.0

        def step(params: Params, grad: Grad, batch: Batch, carry: Params | None) -> tuple[Params, Params]:
            gradient = grad()
            carry = added(carry, gradient)
            direction = mixed(gradient, message.momentum, beta, grad, previous)
            own = [correction[name] for name in direction]
            torch._foreach_add_(list(direction.values()), own, alpha=self.beta)
            return direction, carry

        return Plan(step=step)

    def aggregate(  # type: ignore[override]
        self, phase: Phase, host: Host, server: Server, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Server:
        """One step along the new momentum; c by the changes over N."""
        shares = self.shares(replies)
        made = moved(self, server.model.params, replies, shares, self.server_lr)
        change = weighted_sum([reply.update.control for reply in replies], [1.0] * len(replies))
        model = keep_buffers(Weights(made.params, self.mean_buffers(replies, shares)), server.model)
        return Server(model, tr.axpy(1 / host.clients, change, server.control), made.momentum, made.gamma)


@dataclass(frozen=True)
class ScaffoldMomentumVR(ScaffoldMomentum):
    """SCAFFOLD-M with steps of less variance: the momentum is corrected by what it would have been on this batch.

        u = grad F_i(y_i; batch) - beta (c_i - c) + (1 - beta) ( g - grad F_i(x'; batch) );   y_i <- y_i - eta u

    x' is the global model of the round before, found as x + gamma g. All else is as in scaffold-m; the gradients that
    make c_i+ are those at y_i. The samples computed are twice SCAFFOLD's.

    beta = 1 and equal K_i is SCAFFOLD with option 2, bit for bit. With one client it is fedavg-m-vr.

    Source: Cheng, Huang, Wu, Yuan, "Momentum Benefits Non-IID Federated Learning Simply and Provably", ICLR 2024,
    algorithm 4 (SCAFFOLD-M-VR), from a summary; whether c_i+ takes gradients along the path or at x is not certain.
    Deviations: as in scaffold-m; the first round makes plain steps, whose mean direction is the first g.
    """

    name = "scaffold-m-vr"
    reduces = True

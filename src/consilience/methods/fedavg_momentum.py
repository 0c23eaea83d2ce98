"""FedAvg-M and FedAvg-M-VR: the server's momentum in clients' steps (Cheng et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

from annotated_types import Gt, Le

from consilience.core import tree as tr
from consilience.core.fit import Batch, Grad, Plan
from consilience.core.messages import ClientInfo, Control, Model, Reply, Stat
from consilience.core.method import Method, Phase, keep_buffers
from consilience.core.model import Params, Weights
from consilience.core.site import Host, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record
from consilience.parts.local_steps import plain_sgd
from consilience.parts.momentum import mixed, moved


@record
class Server(NamedTuple):
    """The global model, the momentum g, and the step size gamma of the last step along it (0 before the first)."""

    model: Weights
    momentum: Params
    gamma: float


@record
class Down(NamedTuple):
    """x, g, and gamma, which tells clients where x was a round ago."""

    model: Model
    momentum: Control
    gamma: Stat


@dataclass(frozen=True)
class FedAvgMomentum(Method):
    """Local steps along a mix of the own gradient and the global direction of the last round.

        u = beta grad F_i(y_i; batch) + (1 - beta) g;   y_i <- y_i - eta u        K_i times from y_i = x
        g <- sum_i p_i (x - y_i) / (eta K_i);   x <- x - gamma g,   gamma = eta_g eta sum_i p_i K_i

    g starts at 0. The paper has equal K_i and a step size gamma of its own; here gamma is given by eta_g relative to
    plain averaging, which is gamma = eta K.

    beta = 1, eta_g = 1 and equal K_i is FedAvg with the same weights in difference form, bit for bit. One client with
    one local step is gradient descent with an averaged momentum.

    Source: Cheng, Huang, Wu, Yuan, "Momentum Benefits Non-IID Federated Learning Simply and Provably", ICLR 2024,
    algorithm 1. Deviation: each difference is divided by its own client's K_i. Weight decay is part of F_i; buffers
    take plain averages.
    """

    name = "fedavg-m"
    family = "skewed data"
    source = "Cheng et al., ICLR"
    year = 2024
    takes_rules = True
    reduces: ClassVar[bool] = False
    """Whether steps are corrected by a gradient at the previous global model."""

    beta: Annotated[float, Gt(0), Le(1)] = option(0.1, "weight of the own gradient", Search(0.01, 1.0))
    server_lr: Annotated[float, Gt(0)] = option(1.0, "server step size eta_g, relative to averaging", Search(0.1, 10.0))
    weights: Literal["samples", "uniform", "disco", "ida", "fedau", "fedce"] = option(
        "uniform", "a client's weight (uniform in the paper), or a rule"
    )
    form: Literal["delta"] = option("delta", "clients send differences")

    def check(self) -> None:
        """K_i steps must be K_i eta long."""
        plain_sgd(self)

    def init_server(self, host: Host) -> Server:
        """g = 0."""
        model = host.initial()
        return Server(model, tr.zeros_like(model.params), 0.0)

    def broadcast(self, phase: Phase, server: Server, client: ClientInfo) -> Down:
        """x, g and gamma."""
        return Down(server.model, server.momentum, server.gamma)

    def plan(self, site: Site, message: Down, state: Tree) -> Plan:
        """Mixed steps."""
        beta, previous = self.beta, None
        if self.reduces:
            previous = tr.axpy(message.gamma, message.momentum, message.model.params)
            beta = beta if message.gamma else 1.0

        def step(params: Params, grad: Grad, batch: Batch, carry: Tree) -> tuple[Params, Tree]:
            return mixed(grad(), message.momentum, beta, grad, previous), carry

        return Plan() if beta == 1 else Plan(step=step)

    def aggregate(
        self, phase: Phase, host: Host, server: Server, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Server:
        """One step along the new momentum."""
        shares = self.shares(replies)
        made = moved(self, server.model.params, replies, shares, self.server_lr)
        model = Weights(made.params, self.mean_buffers(replies, shares))
        return Server(keep_buffers(model, server.model), made.momentum, made.gamma)


@dataclass(frozen=True)
class FedAvgMomentumVR(FedAvgMomentum):
    """FedAvg-M with steps of less variance: the momentum is corrected by what it would have been on this batch.

        u = grad F_i(y_i; batch) + (1 - beta) ( g - grad F_i(x'; batch) );   y_i <- y_i - eta u

    x' is the global model of the round before, which clients find as x + gamma g; both gradients see the same batch.
    All else is as in fedavg-m. The samples computed are twice FedAvg's.

    beta = 1, eta_g = 1 and equal K_i is FedAvg with the same weights in difference form, bit for bit. With K = 1 and
    whole-data gradients the error of the momentum, g - grad F(x'), shrinks by 1 - beta a round, elementwise.

    Source: Cheng, Huang, Wu, Yuan, "Momentum Benefits Non-IID Federated Learning Simply and Provably", ICLR 2024,
    algorithm 2 (FedAvg-M-VR). Deviation: the paper begins with g = the mean of minibatch gradients at x; here the first
    round makes plain steps, whose mean direction is the first g, and no round is spent on it.
    """

    name = "fedavg-m-vr"
    confidence = "medium"
    reduces = True

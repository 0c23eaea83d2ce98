"""FedSWA and FedMoSWA: stochastic weight averaging across clients (Liu et al., 2025)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from consilience.core import tree as tr
from consilience.core.fit import Fit, Plan
from consilience.core.messages import Reply
from consilience.core.method import Method, Phase, ServerState, keep_buffers
from consilience.core.model import Params, Weights
from consilience.core.reduce import uniform_weights, weighted_sum
from consilience.core.site import Host, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree
from consilience.methods.scaffold import Down, Scaffold, Server
from consilience.parts.local_steps import falling, plain_sgd


def _rates(method: Method, site: Site, rho: float) -> Plan:
    """Step sizes that fall within the round; the usual ones at rho = 1."""
    if rho == 1:
        return Plan()
    steps = method.steps_of(len(site.train), site.job.steps)
    return Plan(lr=falling(method.rate(site.job.version), rho, steps))


@dataclass(frozen=True)
class FedSWA(Method):
    """Local step sizes that fall within each round, and a server that goes beyond the clients' mean.

        y_i <- y_i - eta_k grad F_i(y_i; batch),   eta_k = eta ((1 - k/K) + (k/K) rho),   k = 0 .. K - 1
        x   <- x + alpha sum_i p_i (y_i - x),   alpha = server_lr

    The step size starts at eta in every round and falls towards rho eta, so that clients end in the flat middle of what
    they have found. rho = 1 and alpha = 1 is FedAvg with the same weights in difference form, bit for bit.

    Source: Liu, Liu, Shang, Liu, Liu, Feng, "Improving Generalization in Federated Learning with Highly Heterogeneous
    Data via Momentum-Based Stochastic Controlled Weight Averaging", ICML 2025. The paper's rho and alpha are not
    certain; the official code has rho = 0, alpha = 1 and doubles eta, which is not done here. Deviation: between rounds
    the code lets eta fall by a cosine; here ``lr_decay`` does that.
    """

    name = "fedswa"
    family = "skewed data"
    source = "Liu et al., ICML"
    year = 2025
    takes_rules = True
    confidence = "medium"
    sums = Method.means

    rho: Annotated[float, Ge(0), Le(1)] = option(0.1, "what the step size falls to within a round", Search(0.01, 1.0))
    server_lr: Annotated[float, Gt(0)] = option(1.5, "alpha; above 1 it extrapolates", Search(0.5, 2.0))
    weights: Literal["samples", "uniform", "disco", "ida", "fedau", "fedce"] = option(
        "uniform", "a client's weight (uniform in the paper), or a rule"
    )
    form: Literal["delta"] = option("delta", "clients send differences")

    def plan(self, site: Site, message: Tree, state: Tree) -> Plan:
        """Falling step sizes."""
        return _rates(self, site, self.rho)

    def aggregate(
        self, phase: Phase, host: Host, server: ServerState, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> ServerState:
        """alpha times the mean step."""
        shares = self.shares(replies)
        params = tr.axpy(self.server_lr, self.mean_delta(replies, shares), server.model.params)
        return ServerState(keep_buffers(Weights(params, self.mean_buffers(replies, shares)), server.model))


@dataclass(frozen=True)
class FedMoSWA(Scaffold):
    """FedSWA with control variates, of which the server's is a moving average.

        y_i <- y_i - eta_k ( grad F_i(y_i; batch) - c_i + c ),   eta_k = eta ((1 - k/K) + (k/K) rho)
        c_i+ = c_i - c + (x - y_i) / sum_k eta_k;   client i sends y_i - x and c_i+ - c
        x <- x + alpha sum_i p_i (y_i - x);   c <- c + gamma (1 / |S|) sum_{i in S} (c_i+ - c)

    c follows the last cohorts, where SCAFFOLD's is the mean over all clients' controls, however old. All controls start
    at 0, so round 1 is FedSWA bit for bit. gamma = rho = alpha = 1 with everybody taking part is SCAFFOLD with option
    2, in exact arithmetic.

    Source: Liu, Liu, Shang, Liu, Liu, Feng, "Improving Generalization in Federated Learning with Highly Heterogeneous
    Data via Momentum-Based Stochastic Controlled Weight Averaging", ICML 2025. Of the code's two variants this is the
    one with falling step sizes, as in the paper; its gamma is 0.4. Gradients are clipped before they are corrected, as
    there. Deviation: see fedswa.
    """

    name = "fedmoswa"
    source = "Liu et al., ICML"
    year = 2025
    takes_rules = True
    confidence = "medium"

    rho: Annotated[float, Ge(0), Le(1)] = option(0.1, "what the step size falls to within a round", Search(0.01, 1.0))
    server_lr: Annotated[float, Gt(0)] = option(1.5, "alpha; above 1 it extrapolates", Search(0.5, 2.0))
    gamma: Annotated[float, Ge(0), Le(1)] = option(0.4, "how fast c follows", Search(0.1, 1.0))
    control: Literal["2"] = option("2", "how c_i is renewed: as in option 2 of SCAFFOLD's paper")

    def check(self) -> None:
        """y_i must be the sum of steps of known sizes."""
        plain_sgd(self)

    def sums(self, asked: Sequence[Reply]) -> dict[str, Sequence[float]]:
        """Means, the controls' without weights."""
        shares = self.shares(asked)
        return {"delta": shares, "control": uniform_weights(len(asked)), "buffers": shares}

    def plan(self, site: Site, message: Down, state: Params) -> Plan:
        """SCAFFOLD's steps, with falling sizes."""
        return dataclasses.replace(_rates(self, site, self.rho), step=super().plan(site, message, state).step)

    def renewed(self, site: Site, message: Down, state: Params, fit: Fit) -> Params:
        """c_i - c + (x - y_i) / sum_k eta_k."""
        mean = tr.scale(tr.sub(message.model.params, fit.weights.params), 1 / fit.lr_sum)
        trained = fit.carry  # what the model's maker froze has no control
        control: Params = tr.sub(mean, tr.sub(message.control, state))
        return {name: c for name, c in control.items() if name in trained}

    def told(self, message: Down, state: Params, control: Params) -> Params:
        """c_i+ - c."""
        change: Params = tr.sub(control, message.control)
        return change

    def aggregate(
        self, phase: Phase, host: Host, server: Server, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Server:
        """x as in FedSWA, c towards the cohort's controls."""
        shares = self.shares(replies)
        params = tr.axpy(self.server_lr, self.mean_delta(replies, shares), server.model.params)
        change = weighted_sum([reply.update.control for reply in replies], uniform_weights(len(replies)))
        model = keep_buffers(Weights(params, self.mean_buffers(replies, shares)), server.model)
        return Server(model, tr.axpy(self.gamma, change, server.control))

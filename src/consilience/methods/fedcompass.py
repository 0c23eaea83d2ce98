"""FedCompass: faster clients do more steps, so that groups arrive together (Li et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from consilience.core.errors import ConfigError
from consilience.core.messages import Reply
from consilience.core.method import Method, Phase, ServerState
from consilience.core.site import Host
from consilience.core.training import Search, option
from consilience.parts.staleness import discount, move


@dataclass(frozen=True)
class FedCompass(Method):
    """The schedule measures each client's seconds a step and gives it between ``least`` and ``most`` steps, so many
    that it arrives together with others; the server combines a group when all are there, or at ``slack`` times its
    duration, and late replies with the next group.

        x <- x + alpha sum_{i in group or late} s(tau_i) p_i (y_i - x_i),   s(tau) = (1 + tau)^-a,   p_i = n_i / n

    x_i is the model that client i received, n the rows of all clients that may train (weights=uniform: p_i = 1 / N).
    The cohort is fixed when the run begins. How steps are chosen stands at the schedule ``compass``.

    On equal devices there is one group, everybody does ``most`` steps, and each update is FedAvg with step alpha.

    Source: Li, Chen, Huang, Kim, Hong, Kim, Madduri, "FedCompass: Efficient Cross-Silo Federated Learning on
    Heterogeneous Client Devices Using a Computing Power-Aware Scheduler", ICLR 2024. Deviation: the exponent is -a,
    as in the paper; the published code has +a.
    """

    name = "fedcompass"
    family = "asynchronous"
    source = "Li et al., ICLR"
    year = 2024
    schedule = "compass"
    counts_rows = True

    least: Annotated[int, Ge(1)] = option(20, "fewest local steps, Q_min")
    most: Annotated[int, Ge(1)] = option(100, "most local steps, Q_max")
    slack: Annotated[float, Ge(1)] = option(1.2, "a group is waited for so many times its duration")
    alpha: Annotated[float, Gt(0), Le(1)] = option(0.9, "server step size", Search(0.1, 1.0))
    a: Annotated[float, Ge(0)] = option(0.5, "exponent of the staleness weight")
    form: Literal["delta"] = option("delta", "clients send differences")

    def check(self) -> None:
        """Q_min is at most Q_max."""
        if self.least > self.most:
            raise ConfigError(f"{self.name}: least={self.least} must be at most most={self.most}")

    def default_schedule(self) -> str:
        """Compass, with this method's steps."""
        return f"compass:{self.least}:{self.most}:{self.slack:g}"

    def aggregate(
        self, phase: Phase, host: Host, server: ServerState, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> ServerState:
        """One server step."""
        uniform = self.weights == "uniform"
        shares = [
            discount("polynomial", reply.staleness, self.a)
            * (1.0 / host.clients if uniform else reply.samples / host.rows)
            for reply in replies
        ]
        return server._replace(model=move(server.model, replies, shares, self.alpha))

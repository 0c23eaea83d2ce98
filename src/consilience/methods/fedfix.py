"""FedFix: aggregation at fixed intervals, with weights that do not favour the fast (Fraboni et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt

from consilience.core.messages import Reply
from consilience.core.method import Method, Phase, ServerState
from consilience.core.site import Host
from consilience.core.training import Search, option
from consilience.parts.staleness import move
from consilience.schedule.names import make


@dataclass(frozen=True)
class FedFix(Method):
    """At every tick the server combines what has come since the last; a client whose job spans r ticks comes r times
    more seldom, and counts r times as much.

        x <- x + eta_g sum_{i arrived} d_i (y_i - x_i),   d_i = r_i p_i,   r_i = ceil(T_i / interval),   p_i = n_i / n

    x_i is the model that client i received, T_i the time that its job took, n the rows of all clients that may train
    (with weights=uniform p_i = 1 / N), so that in the long run each client has the weight p_i. r_i is counted in
    ticks. All clients are meant to be in flight (``--participation 1.0``); with fewer, steps shrink by that share.

    An interval at least as long as the slowest job is FedAvg in difference form, bit for bit; so is any interval on
    equal devices.

    Source: Fraboni, Vidal, Kameni, Lorenzi, "A General Theory for Federated Optimization with Asynchronous and
    Heterogeneous Clients Updates", JMLR 2023, equations of FedFix. Deviations: none.
    """

    name = "fedfix"
    family = "asynchronous"
    source = "Fraboni et al., JMLR"
    year = 2023
    schedule = "interval"
    counts_rows = True

    interval: str = option("50%", "seconds, or P% of the time of the slowest client's usual job")
    server_lr: Annotated[float, Gt(0)] = option(1.0, "server step size eta_g", Search(0.1, 10.0))
    form: Literal["delta"] = option("delta", "clients send differences")

    def check(self) -> None:
        """The interval must be one."""
        make(self.default_schedule())

    def default_schedule(self) -> str:
        """Ticks of this method's interval."""
        return f"interval:{self.interval}"

    def aggregate(
        self, phase: Phase, host: Host, server: ServerState, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> ServerState:
        """One server step."""
        uniform = self.weights == "uniform"
        shares = [
            max(1, reply.rings) * (1.0 / host.clients if uniform else reply.samples / host.rows) for reply in replies
        ]
        return server._replace(model=move(server.model, replies, shares, self.server_lr))

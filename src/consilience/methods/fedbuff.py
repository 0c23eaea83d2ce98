"""FedBuff: asynchronous clients, and a server step whenever a buffer of replies is full (Nguyen et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from consilience.core.messages import Reply
from consilience.core.method import Method, Phase, ServerState
from consilience.core.site import Host
from consilience.core.training import Search, option
from consilience.parts.staleness import discount, move


@dataclass(frozen=True)
class FedBuff(Method):
    """Clients train at their own pace; the server moves when ``buffer`` replies have come.

        Delta_i = y_i - x, where x is what client i received
        x <- x + eta_g (1 / k) sum_i s(tau_i) Delta_i,   s(tau) = (1 + tau)^-a,  a = 1/2

    k is the number of replies combined, not the sum of s. The schedule keeps ``--concurrency`` jobs in flight (as
    many as a cohort has); a place that gets free goes to a client drawn uniformly, with the newest model.

    With weights=samples, n_i / sum n takes the place of 1 / k. With form=model clients send y_i, and Delta_i is its
    difference from the model that the server has now.

    On equal devices with as many jobs in flight as the buffer holds this is FedAvg with uniform weights in difference
    form, bit for bit.

    Source: Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba, "Federated Learning with Buffered Asynchronous
    Aggregation", AISTATS 2022, algorithm 1. Deviation: a client whose reply lies in the buffer is not asked again
    until the buffer is emptied. Secure aggregation is not part of this.
    """

    name = "fedbuff"
    family = "asynchronous"
    source = "Nguyen et al., AISTATS"
    year = 2022
    schedule = "buffered"

    buffer: Annotated[int, Ge(1)] = option(10, "replies that make a server step, k")
    server_lr: Annotated[float, Gt(0)] = option(1.0, "server step size eta_g", Search(0.1, 10.0))
    staleness: Literal["constant", "polynomial", "hinge"] = option("polynomial", "s: constant, polynomial or hinge")
    a: Annotated[float, Ge(0)] = option(0.5, "exponent of the polynomial, or slope of the hinge")
    b: Annotated[int, Ge(0)] = option(4, "staleness at which the hinge begins to fall")
    weights: Literal["samples", "uniform"] = option("uniform", "a client's weight (uniform in the paper)")
    form: Literal["model", "delta"] = option("delta", "clients send models or differences")

    def default_schedule(self) -> str:
        """Buffered, with this method's buffer."""
        return f"buffered:{self.buffer}"

    def aggregate(
        self, phase: Phase, host: Host, server: ServerState, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> ServerState:
        """One server step."""
        shares = [
            share * discount(self.staleness, reply.staleness, self.a, self.b)
            for share, reply in zip(self.shares(replies), replies, strict=True)
        ]
        return server._replace(model=move(server.model, replies, shares, self.server_lr))

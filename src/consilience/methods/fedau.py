"""FedAU: weights from what is seen of who takes part how often (Wang and Ji, 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge, Gt

from consilience.core.messages import Reply
from consilience.core.method import Method, Phase
from consilience.core.model import Weights
from consilience.core.site import Host
from consilience.core.training import Search, option
from consilience.core.tree import record
from consilience.parts.staleness import move
from consilience.parts.weights import Given, Participation, Presence, Seen


@record
class Server(NamedTuple):
    """The global model, server updates made, and what is known of each client that has taken part."""

    model: Weights
    updates: int
    seen: dict[int, Seen]


@dataclass(frozen=True)
class FedAU(Method):
    """A client that takes part every w-th round on average counts w times, without anybody knowing w beforehand.

        x <- x + eta_g (1 / N) sum_{i in S} w_i (y_i - x)

    N is the number of all clients that may train. w_i is the running mean of client i's intervals between
    participations, an interval being cut at ``cutoff`` rounds and begun anew; the weight used in a round is the one
    before that round's interval is recorded, and 1 before there is any. With weights=samples n_i / n takes the place
    of 1 / N.

    If everybody takes part always, this is FedAvg with uniform weights in difference form, bit for bit; cutoff = 1
    makes every w_i 1. The rule alone, for other methods, is ``--weights fedau``.

    Source: Wang, Ji, "A Lightweight Method for Tackling Unknown Participation Statistics in Federated Averaging",
    ICLR 2024, algorithm 2. Deviation: rounds in which nobody can be reached are no rounds here.
    """

    name = "fedau"
    family = "participation"
    source = "Wang and Ji, ICLR"
    year = 2024
    counts_rows = True

    server_lr: Annotated[float, Gt(0)] = option(1.0, "server step size eta_g", Search(0.1, 10.0))
    cutoff: Annotated[int, Ge(1)] | None = option(50, "longest interval that is recorded, K; none for no limit")
    weights: Literal["samples", "uniform"] = option("uniform", "a client's weight before w_i (uniform in the paper)")
    form: Literal["delta"] = option("delta", "clients send differences")

    def init_server(self, host: Host) -> Server:
        """Nobody has been seen."""
        return Server(host.initial(), 0, {})

    def aggregate(
        self, phase: Phase, host: Host, server: Server, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Server:
        """One server step, then the intervals that end with it."""
        rule = Participation(self.cutoff, by_size=self.weights == "samples")
        shares, known = rule.weigh(host, Presence(server.updates, server.seen), Given(replies, ()))
        return Server(move(server.model, replies, shares, self.server_lr), *known)

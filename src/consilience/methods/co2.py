"""CO2: the average of a round is under way while the next one is trained (Sun et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge, Gt, Lt

from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.fit import Fit
from consilience.core.messages import Broadcast, Reply
from consilience.core.method import Method, Phase, keep_buffers
from consilience.core.model import Params, Weights
from consilience.core.site import Host, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record


@record
class Flight(NamedTuple):
    """An average under way: the mean difference and buffers of one round."""

    delta: Params
    buffers: Params


@record
class Outer(NamedTuple):
    """Server state: the model that all train from, the outer momentum m, and the average under way."""

    model: Weights
    momentum: Params
    flight: Flight | None


@dataclass(frozen=True)
class CO2(Method):
    """Local SGD that never waits for the network: everybody trains round t while the average of round t - 1 is made.

        y_i = tau local steps from x_t;   Delta_t = sum_i p_i (y_i - x_t)
        m <- beta m + Delta_{t-1} / Lambda;   x_{t+1} = x_t + alpha clip(m, -phi, phi);   m = 0, Delta_{-1} = 0 at first

    tau: ``local_steps`` (or epochs). What round t changed enters the model one round later, through the average alone.
    On the virtual clock training takes time only as far as it lasts longer than the messages do. The work of the last
    round is still under way when a run ends. With delay=0 the average is waited for, Delta_t in the place of
    Delta_{t-1}: with server_momentum=0, server_lr=1, penalty=1 and no bound that is FedAvg in delta form bit for bit,
    and with server_momentum FedAvgM. Buffers take the plain averages of the same round as Delta.

    Source: Sun, Qin, Sun, Li, Li, Shen, Qiao, Zhong, "CO2: Efficient Distributed Training with Full
    Communication-Computation Overlap", ICLR 2024. Deviations: the staleness gap penalty Lambda is a constant, as in the
    official code, where the paper lets it grow with the gap; the clip takes effect, which the official code discards;
    the local optimiser starts anew each round; clients that are away in a round are absent from its average.
    """

    name = "co2"
    family = "server optimiser"
    source = "Sun et al., ICLR"
    year = 2024
    confidence = "medium"
    takes_rules = True
    sums = Method.means

    delay: Annotated[int, Ge(0), Lt(2)] = option(1, "rounds by which the average is late: 1, or 0 to wait for it")
    server_lr: Annotated[float, Gt(0)] = option(1.0, "outer step size alpha", Search(0.1, 2.0))
    server_momentum: Annotated[float, Ge(0), Lt(1)] = option(0.5, "beta", Search(0.0, 0.9, log=False))
    penalty: Annotated[float, Ge(1)] = option(1.0, "Lambda: stale averages are divided by it")
    bound: Annotated[float, Gt(0)] | None = option(
        1.0, "phi: largest size of a number of the outer step (none: no bound)"
    )
    form: Literal["model", "delta"] = option("delta", "clients send differences")

    def check(self) -> None:
        """The form must be delta."""
        if self.form != "delta":
            raise ConfigError("co2 averages differences; use form=delta")

    def init_server(self, host: Host) -> Outer:
        """The initial model, no momentum, nothing under way."""
        model = host.initial()
        return Outer(model, tr.zeros_like(model.params), None)

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """What lasts as long as the messages may take no time."""
        return 0 if self.delay else self.one_fit(rows, steps)

    def train(self, site: Site, message: Broadcast, state: Tree) -> Fit:
        """Local steps, behind the messages where the average is late."""
        if not self.delay:
            return site.fit(message.model)
        with site.meanwhile():
            return site.fit(message.model)

    def aggregate(
        self, phase: Phase, host: Host, server: Outer, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Outer:
        """Send this round's average on its way, and make an outer step with the one that has come."""
        shares = self.shares(replies)
        fresh = Flight(self.mean_delta(replies, shares), self.mean_buffers(replies, shares))
        come, under_way = (server.flight, fresh) if self.delay else (fresh, None)
        if come is None:
            return server._replace(flight=under_way)
        m = come.delta if self.penalty == 1.0 else tr.scale(come.delta, 1 / self.penalty)
        if self.server_momentum:
            m = tr.axpy(self.server_momentum, server.momentum, m)
        step = m if self.bound is None else {name: p.clamp(-self.bound, self.bound) for name, p in m.items()}
        params = tr.axpy(self.server_lr, step, server.model.params)
        return Outer(keep_buffers(Weights(params, come.buffers), server.model), m, under_way)

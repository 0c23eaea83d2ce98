"""SCAFFOLD: control variates against client drift (Karimireddy et al., 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Gt

from consilience.core import tree as tr
from consilience.core.fit import Batch, Fit, Grad, Plan
from consilience.core.messages import Buffers, ClientInfo, Control, Delta, Model, Reply
from consilience.core.method import Method, Phase, keep_buffers
from consilience.core.model import Params, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.reduce import weighted_sum
from consilience.core.site import Host, Site
from consilience.core.training import Search, option
from consilience.core.tree import record
from consilience.parts.directions import added


@record
class Server(NamedTuple):
    """The global model x and control c."""

    model: Weights
    control: Params


@record
class Down(NamedTuple):
    """x and c."""

    model: Model
    control: Control


@record
class Up(NamedTuple):
    """y_i - x, and the change of c_i."""

    delta: Delta
    control: Control
    buffers: Buffers


def _kept(params: Params, grad: Grad, batch: Batch, carry: None) -> tuple[Params, Params]:
    """A step along the gradient that keeps a copy of it."""
    direction = grad()
    return direction, added(None, direction)


@dataclass(frozen=True)
class Scaffold(Method):
    """Clients step along their gradient corrected by the difference of two controls.

        y_i <- y_i - eta ( grad F_i(y_i; batch) - c_i + c )              K_i times from y_i = x
        option 1:  c_i+ = grad F_i(x) over all local rows
        option 2:  c_i+ = c_i - c + (x - y_i) / (K_i eta)
        x <- x + eta_g sum_{i in S} p_i (y_i - x);   c <- c + (1 / N) sum_{i in S} (c_i+ - c_i)

    N is the number of clients, not of the cohort; c and every c_i start at 0; weights are uniform in the paper.
    Option 2 is computed as the mean of the gradients along the path, which is the same number and stays right when
    the step size changes within a round or the optimiser has momentum. With ``clip``, both options take the clipped
    gradients, since it is those that the controls correct. Invariant: c is the mean of all c_i.

    Round 1 is uniform FedAvg in delta form bit for bit, since all controls are 0.

    Source: Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, "SCAFFOLD: Stochastic Controlled Averaging for Federated
    Learning", ICML 2020, algorithm 1. Deviations: none. Weight decay is part of F_i; buffers have no control.
    """

    name = "scaffold"
    family = "skewed data"
    source = "Karimireddy et al., ICML"
    year = 2020
    takes_rules = True

    server_lr: Annotated[float, Gt(0)] = option(1.0, "server step size eta_g", Search(0.1, 2.0))
    control: Literal["1", "2"] = option("2", "how c_i is renewed: option 1 or 2 of the paper")
    weights: Literal["samples", "uniform", "disco", "ida", "fedau", "fedce"] = option(
        "uniform", "a client's weight (uniform in the paper), or a rule"
    )
    form: Literal["delta"] = option("delta", "clients send differences")

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps)

    def sends(self, phase: Phase) -> type:
        """See :class:`Up`."""
        return Up

    def sums(self, asked: Sequence[Reply]) -> dict[str, Sequence[float]]:
        """Means of differences and buffers, the plain sum of the controls' changes."""
        shares = self.shares(asked)
        return {"delta": shares, "control": [1.0] * len(asked), "buffers": shares}

    def init_server(self, host: Host) -> Server:
        """c = 0."""
        model = host.initial()
        return Server(model, tr.zeros_like(model.params))

    def init_client(self, site: Site) -> Params:
        """c_i = 0."""
        zeros: Params = tr.zeros_like(site.initial().params)
        return zeros

    def broadcast(self, phase: Phase, server: Server, client: ClientInfo) -> Down:
        """x and c."""
        return Down(server.model, server.control)

    def plan(self, site: Site, message: Down, state: Params) -> Plan:
        """Corrected steps, and the sum of the gradients along the path for option 2."""
        correction = tr.sub(message.control, state)

        def step(params: Params, grad: Grad, batch: Batch, carry: Params | None) -> tuple[Params, Params | None]:
            direction = grad()
            if self.control == "2":
                carry = added(carry, direction)
            torch._foreach_add_(list(direction.values()), [correction[name] for name in direction])
            return direction, carry

        return Plan(step=step)

    def client_update(self, phase: Phase, site: Site, message: Down, state: Params) -> tuple[Up, Params]:
        """Corrected steps, then a new control."""
        fit = self.train(site, message, state)
        renewed = self.renewed(site, message, state, fit)
        control = {name: renewed.get(name, old) for name, old in state.items()}  # what the model froze stays at 0
        end = fit.weights
        return Up(tr.sub(end.params, message.model.params), self.told(message, state, control), end.buffers), control

    def renewed(self, site: Site, message: Down, state: Params, fit: Fit) -> Params:
        """The new control c_i, of what was trained."""
        if self.control == "1":
            whole = Plan(steps=1, batch_size=len(site.train), step=_kept, optimizer="sgd", purpose="control")
            control: Params = site.fit(message.model, whole).carry
            return control
        mean: Params = tr.scale(fit.carry, 1 / fit.steps)
        return mean

    def told(self, message: Down, state: Params, control: Params) -> Params:
        """What the server hears of it: the change."""
        change: Params = tr.sub(control, state)
        return change

    def aggregate(
        self, phase: Phase, host: Host, server: Server, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Server:
        """Move x by the mean difference, c by the changes over N."""
        shares = self.shares(replies)
        params = tr.axpy(self.server_lr, self.mean_delta(replies, shares), server.model.params)
        change = weighted_sum([reply.update.control for reply in replies], [1.0] * len(replies))
        model = keep_buffers(Weights(params, self.mean_buffers(replies, shares)), server.model)
        return Server(model, tr.axpy(1 / host.clients, change, server.control))

    def trained_model(self, site: Site, message: Down, update: Up, state: Params) -> Predictor:
        """x + (y_i - x)."""
        return Net(Weights(tr.add(message.model.params, update.delta), update.buffers), site.model)

"""Gradient tracking: neighbours agree on the gradient too, so that skewed data leave no bias (DSGT; K-GT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.fit import Batch, Grad, Plan
from consilience.core.messages import Inbox
from consilience.core.method import Needs, Phase
from consilience.core.model import Params, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.reduce import weighted_sum
from consilience.core.site import Site
from consilience.core.training import option
from consilience.core.tree import Tree, record
from consilience.parts.directions import added, along, renewed
from consilience.parts.serverless import Serverless


@record
class Node(NamedTuple):
    """A node. model: x_i. control: c_i. In the middle of a round also ``end``: where its local steps have led;
    ``direction``: z_i, then y_i; ``length``: s_i."""

    model: Weights
    control: Params
    end: Weights | None = None
    direction: Params | None = None
    length: float = 0.0


@record
class Both(NamedTuple):
    """Model and direction in one message, to neighbours."""

    model: Weights
    direction: Params


@dataclass(frozen=True)
class Tracking(Serverless):
    """Nodes of a topology correct their steps by what the gradients of the others seem to be.

        local steps from x_i along g_i(x; batch) + c_i;  z_i: the mean of these directions;  s_i: the sum of step sizes
        y_i <- sum_j W_ij z_j;   c_i <- c_i + y_i - z_i
        order "atc":   x_i <- sum_j W_ij (x_j - s_j y_j)      two exchanges, one after the other
        order "semi":  x_i <- sum_j W_ij (x_j - s_j z_j)      one exchange of both

    W is that of ``--topology`` and ``--mixing``; its rows and columns have to sum to 1. c_i starts at 0.
    Invariants: sum_i c_i = 0, so the mean of z_i is that of the local gradients. At a fixed point all y_i are 0 and all
    x_i are the minimiser of (1/n) sum_i F_i, for any step size below the limit, where D-PSGD stays off it by about the
    step size times how much minimisers differ. Buffers of BatchNorm are mixed as in D-PSGD. The weight of neighbours
    that do not take part stays at home, which keeps columns' sums only where W is symmetric: with another all have to
    take part in every round. ``weights`` and ``form`` have no meaning here. Order "atc" steps along y_i and
    so is for plain SGD.

    With one local step (c_i = y_i - g_i) this is gradient tracking as it is usually written,
    y_i <- sum_j W_ij (y_j + g_j new - g_j old) for "atc" (y_i and g_i start at 0) and
    y_i <- sum_j W_ij y_j + g_i new - g_i old for "semi" (y_i starts at g_i). With several, "semi" is K-GT with server
    step 1. Round 1 of "semi" is that of D-PSGD bit for bit, since all c_i are 0.

    Sources: "semi": Pu, Nedic, "Distributed Stochastic Gradient Tracking Methods", Mathematical Programming, 2021;
    Liu, Lin, Koloskova, Stich, "Decentralized Gradient Tracking with Local Steps", Optimization Methods and Software,
    2024 (K-GT). "atc": Xu, Zhu, Soh, Xie, "Augmented Distributed Gradient Methods", CDC 2015. Deviations: K-GT may
    start c_i at the differences of the first gradients, here it is 0; several local steps with "atc" are K-GT's in
    that order.
    """

    name = "tracking"
    family = "decentralised"
    source = "Pu and Nedic, Math. Program."
    year = 2021
    needs = Needs(topology=True)
    keeps_mean = True

    order: Literal["atc", "semi"] = option(
        "atc", "mix what steps would lead to, or only gradients first and all at once"
    )

    def check(self) -> None:
        """A step along the tracker is one of plain SGD."""
        if self.order == "atc" and (self.optimizer != "sgd" or self.momentum):
            raise ConfigError(f"{self.name} steps along what is tracked: use optimizer=sgd and momentum=0")

    def program(self) -> tuple[Phase, ...]:
        """Train; agree on the direction; mix models."""
        track = (Phase("track", over="neighbours"),) if self.order == "atc" else ()
        return (Phase("train"), *track, Phase("mix", over="neighbours"))

    def init_client(self, site: Site) -> Any:
        """The common initial model, c_i = 0."""
        start = site.initial()
        return Node(start, tr.zeros_like(start.params))

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps) if phase.name == "train" else 0

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Any) -> tuple[Tree, Any]:
        """Corrected local steps."""

        def step(params: Params, grad: Grad, batch: Batch, carry: Params | None) -> tuple[Params, Params]:
            direction = grad()
            torch._foreach_add_(list(direction.values()), [state.control[name] for name in direction])
            return direction, added(carry, direction)

        fit = site.fit(state.model, Plan(step=step))
        return None, state._replace(end=fit.weights, direction=tr.scale(fit.carry, 1 / fit.steps), length=fit.lr_sum)

    def send(self, phase: Phase, state: Any) -> Tree:
        """z_i; or x_i - s_i y_i; or both."""
        if phase.name == "track":
            return state.direction
        end = Weights(state.end.params, self.shared(state))
        return end if self.order == "atc" else Both(end, state.direction)

    def shared(self, state: Any) -> Params:
        """The buffers that neighbours get; none where they are local."""
        own: Params = state.end.buffers
        return own if self.buffers == "average" else {}

    def mix(self, phase: Phase, site: Site, state: Any, inbox: Inbox) -> Any:
        """What neighbours have found, weighted."""
        mean = weighted_sum(list(inbox.messages.values()), list(inbox.weights.values()))
        if phase.name == "track":
            return self.tracked(site, state, mean)
        if self.order == "semi":
            control = renewed(state.control, tr.sub(mean.direction, state.direction))
            state, mean = state._replace(control=control), mean.model
        return settled(state, mean.params, mean.buffers)

    def tracked(self, site: Site, state: Any, y: Params) -> Any:
        """The node once it knows y_i."""
        control = renewed(state.control, tr.sub(y, state.direction))
        end = Weights(along(state.model.params, state.length, y), state.end.buffers)
        return state._replace(control=control, end=end, direction=y)

    def node_model(self, state: Any) -> Weights:
        """The node's model."""
        own: Weights = state.model
        return own

    def personal_model(self, site: Site, message: Tree, state: Any) -> Predictor:
        """The node's model."""
        return Net(state.model, site.model)

    def trained_model(self, site: Site, message: Tree, update: Tree, state: Any) -> Predictor:
        """Where its local steps have led."""
        return Net(state.end, site.model)


def settled(state: Any, params: Params, mixed: Params) -> Any:
    """A node at the end of its round. mixed: its neighbours' buffers, if they send them; counters stay its own."""
    buffers = {**state.end.buffers, **{name: b for name, b in mixed.items() if b.is_floating_point()}}
    return state._replace(model=Weights(params, buffers), end=None, direction=None, length=0.0)

"""Many local steps on games and variational inequalities: local GDA, and forms of it that find the solution itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt, Le

from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.fit import Batch, Grad, Plan, Step
from consilience.core.messages import Broadcast, ClientInfo, Control, Model, Reply
from consilience.core.method import Method, Phase, ServerState
from consilience.core.model import Params, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.reduce import weighted_sum
from consilience.core.site import Host, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record
from consilience.parts.directions import along, means


@record
class Guided(NamedTuple):
    """The server of variant "gt", and what it sends: x, and F(x) once clients have told theirs."""

    model: Model
    direction: Control


@record
class Direction(NamedTuple):
    """F_i(x), up."""

    control: Control


@record
class Anchor(NamedTuple):
    """w_i and F_i(w_i) over all rows."""

    point: Params
    direction: Params


@record
class Skips(NamedTuple):
    """A client of "proxskip" and "svrg": h_i of its last round, what it sent then, and its anchor."""

    control: Params
    sent: Params | None = None
    anchor: Anchor | None = None


USUAL = {"compress": "identity", "compress_down": "identity", "client_momentum": 0.0, "aggregator": "mean"}
"""What "proxskip" and "svrg" need of options on messages."""


@dataclass(frozen=True)
class LocalGDA(Method):
    """Clients step along their own operators F_i, and the server averages; sought is x with sum_i F_i(x) = 0.

    F_i is the operator of the task or, where there is a loss, its gradient, with the sign turned for players that
    maximise. With a plain loss this is minimisation.

        variant "gda":       x_i <- x_i - eta F_i(x_i);  x <- mean x_i           off the solution if clients differ
        variant "eg":        x_i <- x_i - eta F_i( x_i - eta F_i(x_i) )          on one batch; the same bias
        variant "gt":        x_i <- x_i - eta ( F_i(x_i) - F_i(x) + F(x) )       F_i(x) of all rows is gathered first
        variant "proxskip":  x_i <- x_i - eta ( F_i(x_i) - h_i ),  K times;          v_i = x_i - (eta / p) h_i;
                             x <- mean v_i;  h_i <- (p / eta) (x - v_i)
        variant "svrg":      proxskip with F_i(x_i) <- F_i(x_i; batch) - F_i(w_i; batch) + F_i(w_i);  w_i <- x_i with
                             probability q after each step

    K, common to all, is the number of tosses of a coin until one comes up with probability p (``p``): a round is what
    lies between two communications. It replaces ``local_steps`` and ``local_epochs``. h_i starts at 0; invariant:
    sum_i h_i = 0 (weighted as in the mean); at the solution h_i = F_i. With eta at most the smallest cocoercivity and
    p = sqrt(eta mu) the solution takes O(sqrt(kappa) log(1/eps)) rounds. In "proxskip" and "svrg" every client takes
    part in every round. The step size is constant in theory; h_i is kept as an operator so that it may change.

    "gda" is FedAvg with the same weights bit for bit. "proxskip" and "svrg" with p = 1 take one step of parallel GDA a
    round (to rounding). "proxskip" on a loss is ProxSkip (Scaffnew, Mishchenko et al., ICML 2022).

    Sources: Zhang, Beznosikov, Loizou, "Communication-Efficient Gradient Descent-Ascent Methods for Distributed
    Variational Inequalities: Unified Analysis and Local Updates", ICLR 2024 (proxskip, svrg); Deng and Mahdavi, "Local
    Stochastic Gradient Descent Ascent", AISTATS 2021 (gda); Beznosikov, Samokhin, Gasnikov, 2020 (eg); Sun and Wei, "A
    Communication-efficient Algorithm with Linear Convergence for Federated Minimax Learning", NeurIPS 2022 (gt).
    Deviations: rounds of K steps in place of a coin at each; no projection on sets; "gt" corrects each batch by the
    same batch at x (with whole batches the paper's).
    """

    name = "localgda"
    family = "minimax"
    source = "Zhang et al., ICLR"
    year = 2024

    variant: Literal["gda", "eg", "gt", "proxskip", "svrg"] = option("proxskip", "which of the forms")
    p: Annotated[float, Gt(0), Le(1)] = option(0.2, "probability that a step is a round's last", Search(0.05, 1.0))
    q: Annotated[float, Ge(0), Le(1)] = option(0.1, "probability that svrg renews its anchor after a step")
    weights: Literal["samples", "uniform"] = option("uniform", "a client's weight in the mean (uniform in the papers)")

    @property
    def skips(self) -> bool:
        """Whether there are controls."""
        return self.variant in ("proxskip", "svrg")

    @property
    def everybody(self) -> bool:
        """The controls sum to 0 over everybody."""
        return self.skips

    def check(self) -> None:
        """Controls go by what was sent, so that has to arrive as it was, and its mean to come back."""
        for key, usual in USUAL.items() if self.skips else ():
            if getattr(self, key) != usual:
                raise ConfigError(
                    f"localgda: {key}={getattr(self, key)} bends what variant={self.variant} goes by; use {key}={usual}"
                )

    def program(self) -> tuple[Phase, ...]:
        """Local steps; in "gt" after F_i(x) of everybody."""
        ask = (Phase("ask"),) if self.variant == "gt" else ()
        return (*ask, Phase("train"))

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training, where its length is not left to a coin."""
        return 0 if self.skips or phase.name == "ask" else self.one_fit(rows, steps)

    # --- the server's half -------------------------------------------------------------------------------------

    def init_server(self, host: Host) -> Tree:
        """x."""
        start = host.initial()
        return Guided(start, tr.zeros_like(start.params)) if self.variant == "gt" else ServerState(start)

    def broadcast(self, phase: Phase, server: Any, client: ClientInfo) -> Tree:
        """x, and F(x) where it is needed."""
        return server if self.variant == "gt" and phase.name == "train" else Broadcast(server.model)

    def aggregate(self, phase: Phase, host: Host, server: Any, replies: Sequence[Reply], cohort: Sequence[int]) -> Tree:
        """The mean of what was sent."""
        if phase.name == "ask":
            mean = weighted_sum([reply.update.control for reply in replies], self.shares(replies))
            return server._replace(direction=mean)
        return super().aggregate(phase, host, server, replies, cohort)

    # --- the client's half -------------------------------------------------------------------------------------

    def init_client(self, site: Site) -> Tree:
        """h_i = 0, where there is one."""
        return Skips(tr.zeros_like(site.initial().params)) if self.skips else None

    def sends(self, phase: Phase) -> type:
        """F_i(x), or a model."""
        return Direction if phase.name == "ask" else self.packs

    def plan(self, site: Site, message: Any, state: Tree) -> Plan:
        """Steps of "gda", "eg" and "gt"."""
        lr = self.rate(site.job.version)

        def ahead(params: Params, grad: Grad, batch: Batch, carry: Tree) -> tuple[Params, Tree]:
            return grad(along(params, lr, grad())), carry

        def guided(params: Params, grad: Grad, batch: Batch, carry: Tree) -> tuple[Params, Tree]:
            direction = grad()
            there = grad(message.model.params)
            return {n: d - there[n] + message.direction[n] for n, d in direction.items()}, carry

        return {"gda": Plan(), "eg": Plan(step=ahead), "gt": Plan(step=guided)}[self.variant]

    def client_update(self, phase: Phase, site: Site, message: Any, state: Any) -> tuple[Tree, Tree]:
        """F_i(x) over all rows, or local steps."""
        if phase.name == "ask":
            found = means(site, message.model, whole=True).at[0]
            return Direction({n: found.get(n, torch.zeros_like(p)) for n, p in message.model.params.items()}), state
        if not self.skips:
            return super().client_update(phase, site, message, state)
        control = self._control(message, state, site.job.version)
        steps = int(site.shared_rng("localgda", site.job.version).geometric(self.p))
        step = self._skipping(site, control)
        fit = site.fit(message.model, step=step, carry=state.anchor, steps=steps, optimizer="sgd", momentum=0.0)
        sent = along(fit.weights.params, self.rate(site.job.version) / self.p, control)
        return self.pack(message.model, Weights(sent, fit.weights.buffers)), Skips(control, sent, fit.carry)

    def _control(self, message: Any, state: Skips, version: int) -> Params:
        """h_i, now that the mean of the last round is known."""
        if state.sent is None:
            return state.control
        held: Params = tr.scale(tr.sub(message.model.params, state.sent), self.p / self.rate(version - 1))
        return held

    def _skipping(self, site: Site, control: Params) -> Step:
        """Steps of "proxskip" and "svrg"; the carry is the anchor."""
        rng, rows = site.rng("anchor"), site.cast(site.train)
        everything = Batch(rows.x, rows.y, torch.arange(len(rows)))

        def anchored(point: Params, grad: Grad) -> Anchor:
            here = tr.clone(point)
            return Anchor(here, grad(here, everything))

        def step(params: Params, grad: Grad, batch: Batch, anchor: Anchor | None) -> tuple[Params, Anchor | None]:
            direction = grad()
            if self.variant == "svrg":
                anchor = anchored(params, grad) if anchor is None else anchor
                there = grad(anchor.point)
                direction = {n: d - there[n] + anchor.direction[n] for n, d in direction.items()}
                if rng.random() < self.q:
                    anchor = anchored(params, grad)
            return {n: d - control[n] for n, d in direction.items()}, anchor

        return step

    def trained_model(self, site: Site, message: Any, update: Tree, state: Any) -> Predictor | None:
        """Where local steps have led."""
        if not isinstance(state, Skips) or state.sent is None:
            return super().trained_model(site, message, update, state)
        params = along(state.sent, -self.rate(site.job.version) / self.p, state.control)
        return Net(Weights(params, message.model.buffers), site.model)

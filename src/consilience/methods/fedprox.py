"""FedProx: a proximal term, and tolerance of partial work (Li et al., 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from consilience.core.fit import Batch, Grad, Plan, n_steps
from consilience.core.method import Method, Phase
from consilience.core.model import Params
from consilience.core.site import Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree
from consilience.parts.losses import proximal


@dataclass(frozen=True)
class FedProx(Method):
    """FedAvg whose clients minimise F_i(y) + (mu / 2) ||y - x||^2, inexactly and each as far as it gets.

        y_i <- y_i - eta ( grad F_i(y_i; batch) + mu (y_i - x) );   x <- sum_i p_i y_i

    A share ``stragglers`` of each cohort does less: a number of epochs drawn uniformly from 1 .. E - 1 (steps
    from 1 .. K - 1 when E = 1 or the work is given in steps), and what it did is averaged all the same.

    mu = 0 without stragglers is FedAvg bit for bit. The term is added to the gradient, not to the loss (the same
    for SGD; an optimiser that rescales gradients would otherwise see the same sum anyway). Explicit steps need
    eta mu < 1.

    Source: Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks", MLSys
    2020. Deviation: clients are drawn uniformly and weighted by p_i, as the official code does, where the paper
    draws them by n_i / n and averages uniformly.
    """

    name = "fedprox"
    family = "skewed data"
    source = "Li et al., MLSys"
    year = 2020
    takes_rules = True
    sums = Method.means

    mu: Annotated[float, Ge(0)] = option(0.01, "weight of the proximal term", Search(1e-3, 1.0))
    stragglers: Annotated[float, Ge(0), Le(1)] = option(0.0, "share of clients that do only part of the work")

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training, or a straggler's first step."""
        return min(rows, self.batch_size) if self.stragglers else self.one_fit(rows, steps)

    def plan(self, site: Site, message: Tree, state: Tree) -> Plan:
        """The proximal step, and less of it for stragglers."""
        plan = Plan()
        if self.mu:
            anchor = message.model.params

            def step(params: Params, grad: Grad, batch: Batch, carry: Tree) -> tuple[Params, Tree]:
                gradient = grad()
                proximal(params, anchor, gradient, self.mu)
                return gradient, carry

            plan.step = step
        if self.stragglers and site.rng("straggles").random() < self.stragglers:
            self._shorten(site, plan)
        return plan

    def _shorten(self, site: Site, plan: Plan) -> None:
        steps = self.local_steps if site.job.steps is None else site.job.steps
        rng = site.rng("partial-work")
        if steps is None and self.local_epochs > 1:
            plan.epochs = int(rng.integers(1, self.local_epochs))
        else:
            whole = n_steps(len(site.train), self.batch_size, self.local_epochs, steps)
            plan.steps = int(rng.integers(1, max(2, whole)))

"""FAL: federated adversarial training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from consilience.core.fit import Batch, Fit, Models, Plan
from consilience.core.method import Method, Needs
from consilience.core.site import Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree
from consilience.parts.adversarial import parse_bounds, worst


@dataclass(frozen=True)
class FAL(Method):
    """FedAvg on the worst inputs nearby, so that small changes of an input do not change what the model says of it.

        min_y sum_i p_i E max_{|e| <= eps} loss(y; x + e, label)
        each step:  u = x + U(-eps, eps);   A times  u <- P( u + a sign(grad_u loss(y; u)) )
                    y <- y - eta grad loss(y; u)

    P goes back to the box of size eps around x, and into the valid range of inputs (``bounds``). The worst inputs are
    looked for with the current local model in evaluation mode (no dropout, BatchNorm by its statistics), without
    gradients of parameters; the step on them is an ordinary one, so all options of training mean what they always do.
    Samples, FLOP and time are those of 1 + A gradients. Accuracy is that on clean inputs; how the model does on the
    worst ones, :func:`consilience.measure.adversarial.robustness` tells.

    eps = 0 or A = 0 is FedAvg with the same weights, bit for bit. For a linear model and two classes A = 1 with
    a >= 2 eps finds u = x - eps sign(w) exactly.

    Source: Li, Song, Yang, "Federated Adversarial Learning: A Framework with Convergence Analysis", ICML 2023; the
    inner loop: Madry et al., ICLR 2018. The paper lets the adversary be any map within the box and proves convergence
    for two layers; constants are the field's usual ones. Deviation: no step size of the server's (it is 1).
    """

    name = "fal"
    family = "hostile inputs"
    source = "Li et al., ICML"
    year = 2023
    confidence = "medium"
    needs = Needs(classification=True, loss=True)
    takes_rules = True
    sums = Method.means
    unstacked: ClassVar[str] = "inputs are changed by the model's own gradient"

    eps: Annotated[float, Ge(0)] = option(0.1, "how far an input may be changed, in each of its numbers")
    attack_steps: Annotated[int, Ge(0)] = option(7, "steps A of the inner loop")
    attack_size: Annotated[float, Gt(0)] = option(0.025, "their size a", Search(0.005, 0.1))
    bounds: str = option("none", "valid range of inputs: LOW:HIGH, or none")
    weights: Literal["samples", "uniform", "disco", "ida", "fedau", "fedce"] = option(
        "uniform", "a client's weight (uniform in the analysis), or a rule"
    )

    def check(self) -> None:
        """The bounds must be some."""
        parse_bounds(self.bounds)

    @property
    def _steps(self) -> int:
        return self.attack_steps if self.eps else 0

    def plan(self, site: Site, message: Tree, state: Tree) -> Plan:
        """The loss at the worst inputs."""
        if not self._steps:
            return Plan()
        rng, bounds = site.rng("adversary"), parse_bounds(self.bounds)

        def loss(model: Models, batch: Batch) -> Tensor:
            start = torch.from_numpy(rng.uniform(-self.eps, self.eps, batch.x.shape)).to(batch.x.dtype)
            model.eval()
            found = worst(
                lambda x: site.task.losses(model(x), batch.y), batch.x, start,
                eps=self.eps, size=self.attack_size, steps=self._steps, bounds=bounds,
            )  # fmt: skip
            model.train()
            return site.task.loss(model(found), batch.y)

        return Plan(loss=loss)

    def train(self, site: Site, message: Tree, state: Tree) -> Fit:
        """The method's, with the inner loop's gradients counted."""
        fit = super().train(site, message, state)
        site.computed.add(self._steps * fit.samples, 0, self._steps * fit.flops)
        return fit

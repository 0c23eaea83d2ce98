"""FedSAM and FedASAM: sharpness-aware local steps (Qu et al., 2022; Caldarola et al., 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from consilience.core import optim
from consilience.core.errors import ConfigError
from consilience.core.fit import Batch, Grad, Plan
from consilience.core.method import Method
from consilience.core.model import Params
from consilience.core.optimisers import worst_near
from consilience.core.site import Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree


@dataclass(frozen=True)
class FedSAM(Method):
    """FedAvg whose clients step along the gradient at the worst point nearby, so that they find flat minima.

        g = grad F_i(y; batch);   e = rho g / ||g||   (0 where g = 0)
        y <- y - eta grad F_i(y + e; batch)

    The norm is over all trained parameters together; both gradients see the same batch and the same dropout, and
    BatchNorm's statistics move at the first only. With ``adaptive`` (ASAM) e = rho y^2 g / || |y| g ||, elementwise, so
    that rescaling a layer changes nothing. The samples computed are twice FedAvg's.

    rho = 0 is FedAvg bit for bit, and FedAvg with ``optimizer=sam+sgd`` is this method bit for bit: in front of any
    optimiser, ``sam+`` does the same for other methods. On (a / 2) y^2 a step gives y - eta a (y + rho sign(y)).

    Source: Qu, Li, Duan, Liu, Tang, Lu, "Generalized Federated Learning via Sharpness Aware Minimization", ICML 2022;
    Caldarola, Caputo, Ciccone, "Improving Generalization in Federated Learning by Seeking Flat Minima", ECCV 2022 (with
    ASAM, Kwon et al., ICML 2021; its small constant beside |y| is 0 here). Deviations: none; weight decay is part of
    F_i. MoFedSAM is not part of this.
    """

    name = "fedsam"
    family = "skewed data"
    source = "Qu et al., ICML"
    year = 2022
    takes_rules = True
    sums = Method.means

    rho: Annotated[float, Ge(0)] = option(0.05, "how far the worst point is looked for", Search(0.01, 0.5))
    adaptive: bool = option(False, "measure that distance relative to each parameter (ASAM)")

    def check(self) -> None:
        """The optimiser must not do the same once more."""
        if optim.parse(self.optimizer).sharp is not None:
            raise ConfigError(f"{self.name} looks for the worst point nearby itself; use optimizer=sgd, or fedavg")

    def plan(self, site: Site, message: Tree, state: Tree) -> Plan:
        """Two gradients a step."""
        if not self.rho:
            return Plan()

        def step(params: Params, grad: Grad, batch: Batch, carry: Tree) -> tuple[Params, Tree]:
            gradient = grad()
            near = worst_near(params, gradient, self.rho, self.adaptive)
            return gradient if near is None else grad(near), carry

        return Plan(step=step)

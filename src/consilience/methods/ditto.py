"""Ditto: a personal model tied to the global one (Li et al., 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from consilience.core.fit import Batch, Grad, Plan
from consilience.core.messages import Broadcast
from consilience.core.method import Method, Phase
from consilience.core.model import Params, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.site import Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree
from consilience.parts.losses import proximal


@dataclass(frozen=True)
class Ditto(Method):
    """FedAvg, and beside it each client trains a model of its own, held near the global one.

        y_k <- local training from x;   x <- sum_k p_k y_k                               FedAvg
        v_k <- v_k - eta ( grad F_k(v_k; batch) + lam (v_k - x) )    K_k times, x as received

    Client state: v_k, which begins as the common initial model. Both trainings see the same batches and do not touch
    each other, so that the global model is FedAvg's bit for bit for every lam, and with lam = 0 the v_k are those of
    ``local``. A client deploys v_k, and before its first round x. Steps need eta lam < 2.

    Source: Li, Hu, Beirami, Smith, "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021,
    algorithm 1 and its official code. Deviations: clients are drawn uniformly and weighted by p_k; lam is one for all,
    where the code may choose it for each client on validation rows.
    """

    name = "ditto"
    family = "personal models"
    source = "Li et al., ICML"
    year = 2021
    sums = Method.means

    lam: Annotated[float, Ge(0)] = option(0.1, "pull of the personal model towards the global one", Search(0.01, 2.0))

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """Two trainings."""
        return 2 * self.one_fit(rows, steps)

    def sends(self, phase: Phase) -> type:
        """Models or differences, as FedAvg."""
        return self.packs

    def client_update(
        self, phase: Phase, site: Site, message: Broadcast, state: Weights | None
    ) -> tuple[Tree, Weights]:
        """FedAvg's training, then the personal one."""
        fit = self.train(site, message, None)
        own = site.fit(site.initial() if state is None else state, self._tied(message.model.params)).weights
        return self.pack(message.model, fit.weights), own

    def _tied(self, anchor: Params) -> Plan:
        if not self.lam:
            return Plan()

        def step(params: Params, grad: Grad, batch: Batch, carry: Tree) -> tuple[Params, Tree]:
            gradient = grad()
            proximal(params, anchor, gradient, self.lam)
            return gradient, carry

        return Plan(step=step)

    def personal_model(self, site: Site, message: Broadcast, state: Weights | None) -> Predictor:
        """The own model, or the global one where there is none yet."""
        return Net(message.model if state is None else state, site.model)

    def trained_model(self, site: Site, message: Broadcast, update: Tree, state: Weights) -> Predictor:
        """The own model."""
        return Net(state, site.model)

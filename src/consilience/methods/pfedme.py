"""pFedMe: personal models as proximal points (Dinh et al., 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt

from consilience.core import tree as tr
from consilience.core.fit import Batch, Grad
from consilience.core.messages import Broadcast, Reply
from consilience.core.method import Method, Phase
from consilience.core.model import Params, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.site import Host, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree
from consilience.parts.local_steps import plain_sgd
from consilience.parts.losses import proximal


@dataclass(frozen=True)
class PFedMe(Method):
    """Clients minimise F_k(theta) + (lam / 2) ||theta - w_k||^2 for a personal theta, and step w_k along the gradient
    of that minimum, the Moreau envelope of F_k.

        w_k <- x;  theta <- x;  then K_k times, each on one batch:
            theta <- theta - eta_p ( grad F_k(theta; batch) + lam (theta - w_k) )    ``inner_steps`` times
            w_k   <- w_k - eta lam (w_k - theta)
        x <- (1 - beta) x + beta sum_k p_k w_k

    Client state: the last theta, which is what a client deploys; before its first round that is x. eta is ``lr``; steps
    need eta lam <= 1. On F = (1/2) (theta - b)' A (theta - b) theta goes to (A + lam I)^-1 (A b + lam w), where
    lam (w - theta) = A (theta - b). With lam = 0 the w_k do not move. Each local step costs ``inner_steps`` gradients.

    Source: Dinh, Tran, Nguyen, "Personalized Federated Learning with Moreau Envelopes", NeurIPS 2020, algorithm 1, and
    its official code. Deviations: theta goes on from step to step, as in the code; only the cohort trains, where the
    paper lets everybody; theta itself is kept (the code overwrites it with w_k before it is judged); the code's extra
    weight decay is the option ``weight_decay``.
    """

    name = "pfedme"
    family = "personal models"
    source = "Dinh et al., NeurIPS"
    year = 2020
    sums = Method.means

    lam: Annotated[float, Ge(0)] = option(15.0, "pull between theta and w", Search(1.0, 30.0))
    inner_steps: Annotated[int, Ge(1)] = option(5, "steps of theta on a batch")
    inner_lr: Annotated[float, Gt(0)] = option(0.05, "step size of theta", Search(1e-3, 0.1))
    beta: Annotated[float, Gt(0)] = option(1.0, "how far the server goes to the mean", Search(0.5, 4.0))

    def check(self) -> None:
        """Both steps are plain."""
        plain_sgd(self)
        super().check()

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """Each batch is computed ``inner_steps`` times."""
        return self.inner_steps * self.one_fit(rows, steps)

    def sends(self, phase: Phase) -> type:
        """Models or differences, as FedAvg."""
        return self.packs

    def client_update(self, phase: Phase, site: Site, message: Broadcast, state: Tree) -> tuple[Tree, Weights]:
        """Train w along its envelope; keep theta."""
        fit = site.fit(message.model, step=self._step)
        theta = Weights({**fit.weights.params, **(fit.carry or {})}, fit.weights.buffers)
        return self.pack(message.model, fit.weights), theta

    def _step(self, w: Params, grad: Grad, batch: Batch, carry: Params | None) -> tuple[Params, Params]:
        theta = carry if carry is not None else tr.clone(w)
        for _ in range(self.inner_steps):
            direction = grad(theta)
            proximal(theta, w, direction, self.lam)
            moved = torch._foreach_add([theta[n] for n in w], [direction[n] for n in w], alpha=-self.inner_lr)
            theta = dict(zip(w, moved, strict=True))
        return {n: self.lam * (w[n] - theta[n]) for n in w}, theta

    def aggregate(
        self, phase: Phase, host: Host, server: Tree, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Tree:
        """Towards, or beyond, the mean."""
        old, mean = server.model, self.combine(server.model, replies)
        if self.beta == 1:
            return server._replace(model=mean)
        params = tr.axpy(self.beta, tr.sub(mean.params, old.params), old.params)
        return server._replace(model=mean._replace(params=params))

    def personal_model(self, site: Site, message: Broadcast, state: Weights | None) -> Predictor:
        """theta, or the global model where there is none yet."""
        return Net(message.model if state is None else state, site.model)

    def trained_model(self, site: Site, message: Broadcast, update: Tree, state: Weights) -> Predictor:
        """theta."""
        return Net(state, site.model)

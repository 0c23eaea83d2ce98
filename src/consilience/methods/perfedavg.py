"""Per-FedAvg: a global model that is good after a step on a client's own data (Fallah et al., 2020)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt

from consilience.core.errors import ConfigError
from consilience.core.fit import Batch, Grad, Plan, picked, shuffled
from consilience.core.messages import Broadcast
from consilience.core.method import Method, Phase
from consilience.core.model import Params, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.site import Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree


@dataclass(frozen=True)
class PerFedAvg(Method):
    """FedAvg on the loss after one step of gradient descent (MAML), so that every client soon has a good model.

        client:  w~ = w - a grad F_k(w; D),    h = grad F_k(w~; D')          D, D', D'': batches drawn apart
        fo:      w <- w - eta h
        hf:      w <- w - eta ( h - a ( grad F_k(w + d h; D'') - grad F_k(w - d h; D'') ) / (2 d) )
        server:  x <- sum_k p_k w_k

    fo leaves the second derivative out, hf takes its product with h from two gradients, which is exact where F_k is
    quadratic. a: ``inner_lr``, d: ``delta``, eta: ``lr``. What a client deploys is x after ``adapt_steps`` steps of
    size a on batches of its own training rows; so does a new client. BatchNorm statistics move in training as w sees D,
    and not in those steps. With a = 0 it is FedAvg bit for bit. A local step costs 2 gradients (fo) or 4 (hf).

    Source: Fallah, Mokhtari, Ozdaglar, "Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic
    Meta-Learning Approach", NeurIPS 2020, algorithm 1. Deviations: weights are n_k / sum n unless ``weights`` says
    uniform, as the paper does.
    """

    name = "perfedavg"
    family = "personal models"
    source = "Fallah et al., NeurIPS"
    year = 2020
    sums = Method.means

    variant: Literal["fo", "hf"] = option("fo", "first order, or free of the Hessian")
    inner_lr: Annotated[float, Ge(0)] = option(0.03, "size a of the step that is looked beyond", Search(1e-3, 0.3))
    delta: Annotated[float, Gt(0)] = option(1e-3, "distance of the two gradients of hf, relative to h")
    adapt_steps: Annotated[int, Ge(1)] = option(1, "steps of a client from the global model to its own")

    def check(self) -> None:
        """A difference of clipped gradients is not a derivative."""
        if self.variant == "hf" and self.clip is not None:
            raise ConfigError("perfedavg: variant=hf takes differences of gradients, which clip would spoil")
        super().check()

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training; the other batches are beside it."""
        return self.one_fit(rows, steps)

    def plan(self, site: Site, message: Tree, state: Tree) -> Plan:
        """Gradients beyond a step."""
        if not self.inner_lr:
            return Plan()
        first, third = (self._batches(site, purpose) for purpose in ("inner", "curvature"))
        hf = self.variant == "hf"

        def step(w: Params, grad: Grad, batch: Batch, carry: Tree) -> tuple[Params, Tree]:
            h = grad(_at(w, grad(batch=next(first)), -self.inner_lr), batch)
            if not hf:
                return h, carry
            beside = next(third)
            ahead, behind = (grad(_at(w, h, d), beside) for d in (self.delta, -self.delta))
            scale = self.inner_lr / (2 * self.delta)
            return {n: h[n] - scale * (ahead[n] - behind[n]) for n in h}, carry

        return Plan(step=step)

    def _batches(self, site: Site, purpose: str) -> Iterator[Batch]:
        rows = site.cast(site.train)
        return picked(rows, shuffled(site.rng(purpose), len(rows), self.batch_size), None, self.batch_size)

    def personal_model(self, site: Site, message: Broadcast, state: Tree) -> Predictor:
        """The global model after a step or so."""
        return self._adapted(site, message.model)

    def trained_model(self, site: Site, message: Broadcast, update: Tree, state: Tree) -> Predictor:
        """The client's model after a step or so."""
        found = super().trained_model(site, message, update, state)
        assert isinstance(found, Net)
        return self._adapted(site, found.weights)

    def _adapted(self, site: Site, start: Weights) -> Net:
        if not self.inner_lr or not len(site.train):
            return Net(start, site.model)
        fit = site.fit(start, steps=self.adapt_steps, lr=self.inner_lr, optimizer="sgd", purpose="adapt")
        return Net(Weights(fit.weights.params, start.buffers), site.model)


def _at(w: Params, direction: Params, size: float) -> Params:
    """w + size direction."""
    moved = torch._foreach_add([w[n] for n in w], [direction[n] for n in w], alpha=size)
    return dict(zip(w, moved, strict=True))

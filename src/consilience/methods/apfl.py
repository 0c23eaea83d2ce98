"""APFL: each client mixes a model of its own with the global one (Deng et al., 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Le
from torch import Tensor

from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.fit import Batch, Grad, Models
from consilience.core.messages import Broadcast
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Params, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.site import Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record
from consilience.parts.local_steps import plain_sgd


@record
class Own(NamedTuple):
    """A client's own model v, and the share alpha that it has in what the client deploys."""

    model: Weights
    alpha: float


@dataclass(frozen=True)
class APFL(Method):
    """Clients train a copy of the global model, and a model of their own through its mixture with that copy.

        w_k <- x;  on each batch, from the old pair:   m = alpha v_k + (1 - alpha) w_k,   h = grad F_k(m; batch)
            w_k <- w_k - eta grad F_k(w_k; batch)
            v_k <- v_k - eta alpha h
            adaptive, on the first batch of a round:   alpha <- clip( alpha - eta <v_k - w_k, h>, 0, 1 )
        x <- sum_k p_k w_k

    Client state: v_k, which begins as the common initial model, and alpha. A client deploys alpha v_k + (1 - alpha) x
    with v_k's BatchNorm statistics (those of m), and before its first round x. The global model is FedAvg's bit for bit
    for every alpha. With alpha = 0 fixed the v_k never move and clients deploy x; with alpha = 1 fixed the v_k are
    those of ``local`` bit for bit. Both forward passes see the same dropout. A local step costs two gradients.

    Source: Deng, Kamani, Mahdavi, "Adaptive Personalized Federated Learning", 2020, algorithm 1 and equation 8.
    Deviations: parameters are mixed, as in the paper, where the released code mixes scores; alpha's gradient is taken
    at the old pair, without the code's extra 0.02 alpha.
    """

    name = "apfl"
    family = "personal models"
    source = "Deng et al."
    year = 2020
    needs = Needs(loss=True)
    sums = Method.means
    unstacked = "two networks are trained at once"

    alpha: Annotated[float, Ge(0), Le(1)] = option(
        0.5, "share of the own model (at first, if adaptive)", Search(0, 1, False)
    )
    adaptive: bool = option(False, "let each client learn its alpha")

    def check(self) -> None:
        """Both models step as SGD does, and their gradients come together."""
        plain_sgd(self, momentum=True)
        if self.clip is not None:
            raise ConfigError("apfl: clip would bound the gradients of both models together; leave it out")
        super().check()

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps)

    def sends(self, phase: Phase) -> type:
        """Models or differences, as FedAvg."""
        return self.packs

    def client_update(self, phase: Phase, site: Site, message: Broadcast, state: Own | None) -> tuple[Tree, Own]:
        """Train both; send the copy of the global model."""
        own = Own(site.initial(), self.alpha) if state is None else state
        rate = self.rate(site.job.version)

        def loss(models: Models, batch: Batch) -> Tensor:
            masks = torch.get_rng_state()
            common = site.task.loss(models["common"](batch.x), batch.y)
            torch.set_rng_state(masks)
            return common + site.task.loss(models["own"](batch.x), batch.y)

        def step(params: Params, grad: Grad, batch: Batch, carry: tuple[float, bool]) -> tuple[Params, Tree]:
            alpha, first = carry
            w, v = ({n: p for n, p in params.items() if n.startswith(part)} for part in ("common/", "own/"))
            mixed = torch._foreach_lerp(list(w.values()), list(v.values()), alpha)
            direction = grad({**w, **dict(zip(v, mixed, strict=True))})
            h = {n: direction[n] for n in v}
            direction.update({n: alpha * g for n, g in h.items()})
            if self.adaptive and first:
                slope = tr.dot(tr.sub(list(v.values()), list(w.values())), list(h.values()))
                alpha = min(1.0, max(0.0, alpha - rate * slope))
            return direction, (alpha, False)

        both = {"common": message.model, "own": own.model}
        fit = site.fit(both, loss=loss, step=step, carry=(own.alpha, True))
        return self.pack(message.model, fit.weights["common"]), Own(fit.weights["own"], fit.carry[0])

    def personal_model(self, site: Site, message: Broadcast, state: Own | None) -> Predictor:
        """The mixture with the global model."""
        return Net(message.model if state is None else mixture(state, message.model), site.model)

    def trained_model(self, site: Site, message: Broadcast, update: Tree, state: Own) -> Predictor:
        """The mixture with the client's copy of it."""
        found = super().trained_model(site, message, update, state)
        assert isinstance(found, Net)
        return Net(mixture(state, found.weights), site.model)


def mixture(own: Own, common: Weights) -> Weights:
    """alpha v + (1 - alpha) w, with v's buffers."""
    params = tr.tree_map(lambda w, v: torch.lerp(w, v, own.alpha), common.params, own.model.params)
    return Weights(params, own.model.buffers)

"""MOON: model-contrastive learning (Li, He, Song, 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from consilience.core.fit import Batch, Models, Plan
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Weights
from consilience.core.site import Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree
from consilience.parts.losses import model_contrast


@dataclass(frozen=True)
class Moon(Method):
    """FedAvg whose clients pull their features towards the global model's and away from their own last model's.

        loss = CE + mu l,   l = -log( e^{cos(z, z_g)/T} / (e^{cos(z, z_g)/T} + e^{cos(z, z_p)/T}) )

    z: features of the model in training; z_g, z_p: of the received and of the client's previous local model, both
    frozen in evaluation mode. Client state: the previous local model; a first-time client uses the received one,
    so that l = log 2 without gradient. mu = 0 is FedAvg bit for bit.

    Source: Li, He, Song, "Model-Contrastive Federated Learning", CVPR 2021, and its official code, where the
    classifier stands on the projection's output; here z is what ``features`` of the split model gives, so a model
    with the paper's projection has it inside ``features``. Deviation: the built-in models have no extra projection.
    """

    name = "moon"
    family = "skewed data"
    source = "Li et al., CVPR"
    year = 2021
    takes_rules = True
    sums = Method.means
    needs = Needs(split_model=True, classification=True, loss=True)
    unstacked = "the loss looks at two more networks, which are each client's own"

    mu: Annotated[float, Ge(0)] = option(1.0, "weight of the contrastive term", Search(0.1, 10.0))
    temperature: Annotated[float, Gt(0)] = option(0.5, "T")

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Weights | None) -> tuple[Tree, Tree]:
        """Train with the contrast, remember the result."""
        fit = self.train(site, message, state)
        return self.pack(message.model, fit.weights), fit.weights

    def sends(self, phase: Phase) -> type:
        """Models or differences, as FedAvg."""
        return self.packs

    def plan(self, site: Site, message: Tree, state: Weights | None) -> Plan:
        """Cross-entropy plus contrast."""
        if not self.mu:
            return Plan()
        received = site.bind(message.model)
        previous = site.bind(state) if state is not None else received

        def loss(model: Models, batch: Batch) -> Tensor:
            z = model.features(batch.x)
            with torch.no_grad():
                positive, negative = received.features(batch.x), previous.features(batch.x)  # type: ignore[operator]
            contrast = model_contrast(z, positive, negative, self.temperature)
            return site.task.loss(model.head(z), batch.y) + self.mu * contrast

        return Plan(loss=loss)

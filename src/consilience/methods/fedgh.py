"""FedGH: the server trains a common head on the clients' class means (Yi et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge

from consilience.core.federation import Split
from consilience.core.messages import Reply
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Architecture, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.shapes import Expected
from consilience.core.site import Host, Place, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree
from consilience.methods.lgfedavg import Head, LGFedAvg
from consilience.parts import prototypes as proto
from consilience.parts.prototypes import Prototypes
from consilience.parts.split import alone, head_network, rejoined, with_head


@dataclass(frozen=True)
class FedGH(LGFedAvg):
    """Clients send the mean features of their classes, on which the server trains the head that all start from.

        client: (f_k, h_k) <- local training of both from (f_k, h);  p_k,c = mean of f_k(x) over its rows of class c
        server: h <- SGD on CE(h(p_k,c), c) over all pairs of the round, from its last h

    Means are taken after training, in evaluation mode. A client deploys its body with the server's head. With
    server_epochs = 0 every round begins from the same head.

    Source: Yi, Wang, Liu, Shi, Yu, "FedGH: Heterogeneous Federated Learning with Generalized Global Header", ACM MM
    2023, algorithm 1. Deviations: none known; batches of the server are those of HtFLlib.
    """

    name = "fedgh"
    source = "Yi et al., ACM MM"
    year = 2023
    needs = Needs(architectures="any", same_features=True, split_model=True, classification=True)
    sums = Method.sums  # every update is wanted
    trains_on_server = True

    server_epochs: Annotated[int, Ge(0)] = option(1, "passes of the server over the means")
    server_lr: Annotated[float, Ge(0)] = option(0.01, "the server's step size", Search(1e-3, 1.0))
    server_batch: Annotated[int, Ge(1)] = option(10, "means in one of the server's steps")

    def networks(self, models: Mapping[str, Architecture]) -> Mapping[str, Architecture]:
        """The head alone."""
        return {"head": head_network(next(iter(models.values())))}

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """Means of the width of the features."""
        own = place.architectures[model]
        return proto.shapes(own.outputs, own.width or 0, own.dtype)

    def sends(self, phase: Phase) -> type:
        """Prototypes."""
        return Prototypes

    def client_update(self, phase: Phase, site: Site, message: Head, state: Weights) -> tuple[Tree, Tree]:
        """Train body and head, send class means."""
        weights = site.fit(with_head(state, message.head)).weights
        return proto.of_site(site, weights), weights

    def aggregate(
        self, phase: Phase, host: Host, server: Head, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Head:
        """Train the head on all means of the round."""
        if not self.server_epochs or not self.server_lr:
            return server
        found = [reply.update for reply in replies]
        pairs = Split(torch.cat([p.means for p in found]), torch.cat([p.classes for p in found]))
        fit = host.fit(
            alone(server.head), data=pairs, model="head", epochs=self.server_epochs, lr=self.server_lr,
            batch_size=self.server_batch, optimizer="sgd", purpose="head",
        )  # fmt: skip
        return Head(rejoined(fit.weights))

    def trained_model(self, site: Site, message: Tree, update: Tree, state: Weights) -> Predictor:
        """The own model."""
        return Net(state, site.model)

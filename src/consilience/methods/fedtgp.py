"""FedTGP: prototypes that the server trains to stand apart (Zhang et al., 2024)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from consilience.core.federation import Split
from consilience.core.fit import Batch, Models
from consilience.core.messages import ClientInfo, Reply
from consilience.core.method import Phase
from consilience.core.model import Architecture, Weights
from consilience.core.site import Host, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record
from consilience.methods.fedproto import FedProto
from consilience.parts import prototypes as proto
from consilience.parts.prototypes import Prototypes


class Trainable(nn.Module):
    """A vector for each class, passed through two layers: ``(b,)`` class numbers -> ``(b, width)``."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Embedding(outputs, width)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, classes: Tensor) -> Tensor:
        out: Tensor = self.layers(self.vectors(classes))
        return out


@record
class Server(NamedTuple):
    """The trained prototypes' network, and what it gives for all classes (nothing before the first round)."""

    network: Weights
    prototypes: Prototypes


@dataclass(frozen=True)
class FedTGP(FedProto):
    """FedProto whose prototypes are trained by the server to be near the clients' means and far from other classes.

        client: loss = CE(h(z), y) + lam MSE(z, T_y);  up, after training: p_k,c = mean of f_k(x) over rows of class c
        server: margin = min( max_c min_{c' != c} ||Q_c - Q_c'||, tau ),   Q_c = mean_k p_k,c
                T = network(0 .. C-1), trained by SGD on  CE( -(d + margin onehot(c)), c ),  d_j = ||p_k,c - T_j||

    Q_c counts clients once (prototypes "uniform") or by their rows ("rows"); only the margin depends on it. All classes
    get a prototype, those that nobody has as well. A lone class has no gap, so that its margin is tau. A client
    deploys the nearest prototype. With lam = 0 the models are those of ``local``, bit for bit.

    Source: Zhang, Liu, Hua, Cao, "FedTGP: Trainable Global Prototypes with Adaptive-Margin-Enhanced Contrastive
    Learning for Data and Model Heterogeneity in Federated Learning", AAAI 2024, algorithm 1. Deviation: a small
    constant under the root, without which a distance of 0 has no gradient.
    """

    name = "fedtgp"
    source = "Zhang et al., AAAI"
    year = 2024
    trains_on_server = True

    lam: Annotated[float, Ge(0)] = option(10.0, "weight of the pull to prototypes", Search(0.1, 20.0))
    tau: Annotated[float, Gt(0)] = option(100.0, "largest margin")
    server_epochs: Annotated[int, Ge(0)] = option(100, "passes of the server over the means")
    server_lr: Annotated[float, Gt(0)] = option(0.01, "the server's step size", Search(1e-3, 0.1))
    server_batch: Annotated[int, Ge(1)] = option(10, "means in one of the server's steps")

    def networks(self, models: Mapping[str, Architecture]) -> Mapping[str, Architecture]:
        """The prototypes'."""
        model = next(iter(models.values()))
        factory = functools.partial(Trainable, width=model.width or 0)
        return {"prototypes": Architecture("prototypes", factory, (), model.outputs, model.dtype)}

    def init_server(self, host: Host) -> Server:
        """An untrained network, and no prototype yet."""
        return Server(host.initial("prototypes"), super().init_server(host))

    def broadcast(self, phase: Phase, server: Server, client: ClientInfo) -> Tree:
        """The prototypes."""
        return server.prototypes

    def client_update(self, phase: Phase, site: Site, message: Prototypes, state: Weights) -> tuple[Tree, Tree]:
        """Train with the pull; means of the trained model's features."""
        _, weights = super().client_update(phase, site, message, state)
        return proto.of_site(site, weights), weights

    def aggregate(
        self, phase: Phase, host: Host, server: Server, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Server:
        """Train the prototypes on all means of the round."""
        found = [reply.update for reply in replies]
        pairs = Split(torch.cat([p.means for p in found]), torch.cat([p.classes for p in found]))
        margin = self.margin(found, host.task.outputs)
        classes = torch.arange(host.task.outputs)

        def loss(network: Models, batch: Batch) -> Tensor:
            return proto.margin_contrast(batch.x, network(classes), batch.y, margin)

        weights = server.network
        if self.server_epochs:
            weights = host.fit(
                weights, loss=loss, data=pairs, model="prototypes", epochs=self.server_epochs, lr=self.server_lr,
                batch_size=self.server_batch, optimizer="sgd", purpose="prototypes",
            ).weights  # fmt: skip
        with torch.no_grad():
            means = host.bind(weights, "prototypes")(classes).clone()
        return Server(weights, Prototypes(classes, means, torch.ones_like(classes)))

    def margin(self, found: Sequence[Prototypes], classes: int) -> float:
        """The largest of the distances from a class's mean to the next class's, at most tau."""
        centres = proto.average(found, classes, by_rows=self.prototypes == "rows").means
        return min(float(proto.gaps(centres).max()), self.tau)

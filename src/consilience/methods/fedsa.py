"""FedSA: anchors that do not come from the clients' models guide features and heads (FedSA, 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn import functional as F

from consilience.core.fit import Batch, Models
from consilience.core.messages import ClientInfo, Reply, Stat
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Architecture, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.shapes import Expected
from consilience.core.site import Host, Place, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record
from consilience.parts import prototypes as proto
from consilience.parts.prototypes import Prototypes


class Projection(nn.Module):
    """(Linear, BatchNorm, ReLU) twice, on vectors of ``input_shape`` numbers."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before in (input_shape[0], outputs):
            layers += [nn.Linear(before, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


@record
class Anchors(NamedTuple):
    """anchors: ``(classes, width)``. gap: mean distance from an anchor to the nearest other one, None before the first
    combination."""

    anchors: Stat
    gap: Stat


@record
class Node(NamedTuple):
    """A client's model, and the class means that it sent last."""

    model: Weights
    sent: Prototypes


@dataclass(frozen=True)
class FedSA(Method):
    """Clients learn towards anchors of the classes, which begin at random and drift slowly to the clients' means.

        loss = CE(h(z), y) + lam MSE(z, A_y) + mu CE( -(D + gap onehot(y)), y ) + eta CE( h(A), (0 .. C-1) )
        D_c = ||z - A_c||;   gap = max(gap of the client's last means, gap of the anchors): the mean distance from a
        class to the nearest other one; 0 where there is neither
        up: p_k,c = mean of z over the rows of class c, as they passed in training
        A_c <- m A_c + (1 - m) mean_k p_k,c       a class that nobody has keeps its anchor

    The anchors begin as a random network of Gaussian noise. A client deploys the nearest anchor, or its own head
    (predict "head"). With lam = mu = eta = 0 the models are those of ``local``, bit for bit; with m = 1 anchors never
    move.

    Source: "FedSA: A Unified Representation Learning via Semantic Anchors for Prototype-based Federated Learning", AAAI
    2025, and its official code for the momentum and the gap. Deviations: plain BatchNorm in the network that makes the
    anchors; a small constant under the root of D.
    """

    name = "fedsa"
    family = "different architectures"
    source = "FedSA, AAAI"
    year = 2025
    needs = Needs(architectures="any", same_features=True, split_model=True, classification=True)
    unstacked = "the loss looks at features"

    lam: Annotated[float, Ge(0)] = option(1.0, "weight of the pull to the own anchor", Search(0.1, 10.0))
    mu: Annotated[float, Ge(0)] = option(1.0, "weight of the contrast of anchors with margin", Search(0.1, 10.0))
    eta: Annotated[float, Ge(0)] = option(1.0, "weight of the head's scores of the anchors", Search(0.1, 10.0))
    anchor_momentum: Annotated[float, Ge(0), Le(1)] = option(0.9999, "m, how much anchors stay")
    predict: Literal["anchors", "head"] = option("anchors", "what a client deploys")

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps)

    def networks(self, models: Mapping[str, Architecture]) -> Mapping[str, Architecture]:
        """The one that makes the first anchors."""
        model = next(iter(models.values()))
        width = model.width or 0
        return {"anchors": Architecture("anchors", Projection, (width,), width, model.dtype)}

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """Means of the width of the features."""
        own = place.architectures[model]
        return proto.shapes(own.outputs, own.width or 0, own.dtype)

    def sends(self, phase: Phase) -> type:
        """Class means."""
        return Prototypes

    def init_server(self, host: Host) -> Anchors:
        """Random anchors."""
        model = host.architecture()
        noise = host.rng("anchors").standard_normal((host.task.outputs, model.width or 0))
        network = host.borrow("anchors").fill(host.initial("anchors"), train=True)
        with torch.no_grad():
            return Anchors(network(torch.from_numpy(noise).to(model.dtype)).clone(), None)

    def broadcast(self, phase: Phase, server: Anchors, client: ClientInfo) -> Tree:
        """The anchors and their gap."""
        return server

    def init_client(self, site: Site) -> Node:
        """The common initial model of its architecture."""
        model = site.architecture()
        return Node(site.initial(), proto.none(model.width or 0, model.dtype))

    def client_update(self, phase: Phase, site: Site, message: Anchors, state: Node) -> tuple[Tree, Node]:
        """Train towards the anchors, and take the means of the features that passed."""
        own, anchors = site.architecture(), message.anchors
        passed = proto.Means(own.outputs, own.width or 0, own.dtype)
        known = [gap for gap in (message.gap, mean_gap(state.sent.means)) if gap is not None]
        gap, everywhere = max(known, default=0.0), torch.ones(own.outputs, dtype=torch.bool)
        classes = torch.arange(own.outputs)

        def loss(model: Models, batch: Batch) -> Tensor:
            z = model.features(batch.x)
            passed.add(z, batch.y)
            value = site.task.loss(model.head(z), batch.y)
            if self.lam:
                value = value + self.lam * proto.pull(z, anchors, everywhere, batch.y)
            if self.mu:
                value = value + self.mu * proto.margin_contrast(z, anchors, batch.y, gap)
            return value + self.eta * F.cross_entropy(model.head(anchors), classes) if self.eta else value

        weights = site.fit(state.model, loss=loss).weights
        return passed.found(), Node(weights, passed.found())

    def aggregate(
        self, phase: Phase, host: Host, server: Anchors, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Anchors:
        """Let the anchors drift."""
        found = proto.average([reply.update for reply in replies], host.task.outputs, by_rows=False)
        m, anchors = self.anchor_momentum, server.anchors.clone()
        anchors[found.classes] = m * anchors[found.classes] + (1 - m) * found.means
        return Anchors(anchors, mean_gap(anchors))

    def global_model(self, server: Tree) -> Predictor | None:
        """There is none."""
        return None

    def personal_model(self, site: Site, message: Anchors, state: Node) -> Predictor:
        """The nearest anchor, or the own head."""
        net = Net(state.model, site.model)
        if self.predict == "head":
            return net
        classes = torch.arange(site.task.outputs)
        return proto.Nearest(net, Prototypes(classes, message.anchors, torch.ones_like(classes)), site.task.outputs)


def mean_gap(means: Tensor) -> float | None:
    """Mean over classes of the distance to the nearest other one; None with fewer than two."""
    gap = float(proto.gaps(means).mean()) if len(means) > 1 else math.inf
    return gap if math.isfinite(gap) else None

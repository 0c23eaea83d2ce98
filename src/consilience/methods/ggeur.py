"""GGEUR: features are augmented along the common shape of each class; then a head is trained (Ma et al., 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from consilience.core.federation import Split
from consilience.core.messages import ClientInfo, Model, Reply, Stat
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Architecture, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.reduce import weighted_sum
from consilience.core.shapes import Expected, Shape
from consilience.core.site import Host, Place, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record
from consilience.methods.lgfedavg import Head
from consilience.parts.calibration import Gaussians, gaussians, pooled
from consilience.parts.split import alone, head_network, head_of, rejoined, with_head


@record
class Server(NamedTuple):
    """The global model, and of each class the axes of its features ``(classes, axes, width)``, each as long as the
    standard deviation along it; None before the clients have told."""

    model: Model
    axes: Stat


@record
class Axes(NamedTuple):
    """The axes, on their way to clients."""

    axes: Stat


@record
class Rows(NamedTuple):
    """A client's features ``(n, width)``, its own and the drawn ones, and their labels ``(n,)``."""

    z: Tensor
    y: Tensor


@dataclass(frozen=True)
class GGEUR(Method):
    """A head over frozen features; classes at each client are filled up by draws around its own rows.

        before round 1:  clients send n_ic, mean mu_ic and covariance S_ic of z = features(x) for each class;
            server: S_c of all rows together = sum_m lambda_m e_m e_m';  sends sqrt(lambda_m) e_m, ``axes`` largest
            client, for each class c of which it has 0 < n < target rows:  target - n draws
            z + sum_m xi_m sqrt(lambda_m) e_m,
            xi_m ~ N(0, 1), z its rows in turn (shuffled anew in each turn)
        rounds: FedAvg of the head alone on these features

    The encoder is ``features`` of the model as the run begins, in evaluation mode, and never changes: give a pretrained
    one by ``--init``. A client's state is its features; who could not be asked before round 1 trains on its own rows.
    All clients of the first phases send covariances, so classes of small clients show.

    target = 0 is FedAvg of the head on the features, bit for bit.

    Source: Ma, Dai, Huang, Chen, "Geometric Knowledge-Guided Localized Global Distribution Alignment for Federated
    Learning", CVPR 2025, and its official code, for clients of one domain (target 5,000 for CIFAR-10). Deviations: all
    holders of a class are pooled (the code: the largest that have 80 % of it, or the largest alone); rows take turns in
    shuffled order (the code draws as often around each and cuts off what is too much); the head learns from scores, of
    the client's own rows, and is synchronised each round (the code applies softmax twice, gives every client all rows,
    and one of its scripts does not send the mean back). Drawing around the prototypes of other domains is not part of
    this.
    """

    name = "ggeur"
    family = "skewed data"
    source = "Ma et al., CVPR"
    year = 2025
    confidence = "medium"
    needs = Needs(split_model=True, classification=True)
    unstacked = "it trains on features"

    target: Annotated[int, Ge(0)] = option(200, "rows of each class at a client, drawn ones with it", Search(50, 2000))
    axes: Annotated[int, Ge(0)] = option(0, "axes of each class that are sent, the longest; 0: all")
    weights: Literal["samples", "uniform"] = option("samples", "a client's weight, by its own rows")
    form: Literal["model"] = option("model", "clients send heads")

    def program(self) -> tuple[Phase, ...]:
        """Shapes are learned and told, then rounds."""
        if not self.target:
            return (Phase("train"),)
        return (Phase("shapes", when="start"), Phase("augment", when="start"), Phase("train"))

    def networks(self, models: Mapping[str, Architecture]) -> Mapping[str, Architecture]:
        """The head alone."""
        return {"head": head_network(next(iter(models.values())))}

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """A head, and Gaussians by class."""
        own = place.architectures[model]
        width = own.width or 0
        return {
            "head": head_of(own.spec),
            "feature_classes": Shape(torch.int64, ("m",), low=0, high=own.outputs - 1, distinct=True),
            "feature_counts": Shape(torch.int64, ("m",), low=1),
            "feature_means": Shape(own.dtype, ("m", width)),
            "feature_covariances": Shape(own.dtype, ("m", width * (width + 1) // 2)),
        }

    def init_server(self, host: Host) -> Server:
        """The initial model."""
        return Server(host.initial(), None)

    def broadcast(self, phase: Phase, server: Server, client: ClientInfo) -> Tree:
        """Nothing, axes, or the head: clients know how the encoder begins."""
        if phase.name == "shapes":
            return None
        return Axes(server.axes) if phase.name == "augment" else Head(head_of(server.model))

    def sends(self, phase: Phase) -> type:
        """Gaussians of features; heads."""
        sent: dict[str, type] = {"shapes": Gaussians, "augment": NoneType, "train": Head}
        return sent[phase.name]

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Rows | None) -> tuple[Tree, Tree]:
        """Tell shapes, draw features, or train the head."""
        if phase.name == "shapes":
            rows = features(site)
            return gaussians(rows.z, rows.y), state
        if phase.name == "augment":
            return None, augmented(features(site), message.axes, self.target, site.rng("draws"))
        rows = state or features(site)
        fit = site.fit(alone(message.head), data=Split(rows.z, rows.y), model="head")
        return Head(rejoined(fit.weights)), state

    def aggregate(
        self, phase: Phase, host: Host, server: Server, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Server:
        """Pool shapes, or average heads."""
        if phase.name == "augment":
            return server
        if phase.name == "shapes":
            own, found = host.architecture(), [reply.update for reply in replies]
            return server._replace(axes=axes_of(found, own.outputs, own.width or 0, self.axes, own.dtype))
        mean = weighted_sum([reply.update.head for reply in replies], self.shares(replies))
        return server._replace(model=with_head(server.model, mean))

    def personal_model(self, site: Site, message: Head, state: Tree) -> Predictor:
        """The encoder with the received head."""
        return Net(with_head(site.initial(), message.head), site.model)

    def trained_model(self, site: Site, message: Tree, update: Head, state: Tree) -> Predictor:
        """The encoder with the trained head."""
        return Net(with_head(site.initial(), update.head), site.model)


def features(site: Site) -> Rows:
    """Features of the site's training rows."""
    encoder: Weights = site.initial()
    return Rows(torch.cat(site.map(lambda module, rows: module.features(rows.x), encoder)), site.train.y)


def axes_of(found: Sequence[Gaussians], classes: int, width: int, count: int, dtype: torch.dtype) -> Tensor:
    """Axes ``(classes, count or width, width)``, longest first, of the biased covariance of everybody's rows of each
    class; zeros where there are none."""
    count = min(count, width) or width
    axes = torch.zeros(classes, count, width, dtype=torch.float64)
    for c in range(classes):
        known = pooled(found, c)
        if known is not None:
            n, _, unbiased = known
            values, vectors = torch.linalg.eigh(unbiased * (max(n - 1, 1) / n))
            axes[c] = (values.clamp_min(0).sqrt() * vectors).T.flip(0)[:count]
    return axes.to(dtype)


def augmented(own: Rows, axes: Tensor, target: int, rng: np.random.Generator) -> Rows:
    """The rows, and draws around them that fill each class that is there up to ``target``."""
    z, y = [own.z], [own.y]
    for c in torch.bincount(own.y).nonzero().flatten().tolist():
        rows = own.z[own.y == c]
        lacking = target - len(rows)
        if lacking > 0:
            turns = [rng.permutation(len(rows)) for _ in range(-(-lacking // len(rows)))]
            around = rows[torch.from_numpy(np.concatenate(turns)[:lacking])]
            xi = torch.from_numpy(rng.standard_normal((lacking, axes.shape[1]))).to(rows.dtype)
            z.append(around + xi @ axes[c])
            y.append(torch.full((lacking,), c))
    return Rows(torch.cat(z), torch.cat(y))

"""FedProto: class means of features instead of models (Tan et al., 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge
from torch import Tensor

from consilience.core.fit import Batch, Models
from consilience.core.messages import ClientInfo, Reply
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Weights
from consilience.core.predict import Net, Predictor
from consilience.core.shapes import Expected
from consilience.core.site import Host, Place, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree
from consilience.parts import prototypes as proto
from consilience.parts.prototypes import Prototypes


@dataclass(frozen=True)
class FedProto(Method):
    """Clients keep their models and share the mean features of each class (prototypes), which pull features together.

        loss = CE(h(z), y) + lam MSE(z, P_y)      z = f(x); rows of a class without P_y count as 0
        up: p_k,c = mean of z over the rows of class c, as they passed in training; only for classes that k has
        P_c <- mean over the clients that have c, each counting once (prototypes "uniform") or by its rows ("rows")

    A client deploys the nearest prototype, argmin_c ||f(x) - P_c||^2 over the classes that somebody has, or its own
    head (predict "head"); before the first combination, the head. A class that nobody sends keeps its prototype. With
    lam = 0 the models are those of ``local``, bit for bit.

    Source: Tan, Long, Liu, Zhou, Lu, Jiang, Zhang, "FedProto: Federated Prototype Learning across Heterogeneous
    Clients", AAAI 2022, algorithm 1. Deviations: prototypes count equally by default, as in HtFLlib (the paper weights
    them by rows), and the features that pass in training give the means, without another pass over the data.
    """

    name = "fedproto"
    family = "different architectures"
    source = "Tan et al., AAAI"
    year = 2022
    needs = Needs(architectures="any", same_features=True, split_model=True, classification=True)
    takes_aggregator = True
    unstacked = "the loss looks at features"

    lam: Annotated[float, Ge(0)] = option(1.0, "weight of the pull to prototypes", Search(0.1, 10.0))
    prototypes: Literal["uniform", "rows"] = option("uniform", "a client's weight in a class's prototype")
    predict: Literal["prototypes", "head"] = option("prototypes", "what a client deploys")

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps)

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """Means of the width of the features."""
        own = place.architectures[model]
        return proto.shapes(own.outputs, own.width or 0, own.dtype)

    def sends(self, phase: Phase) -> type:
        """Prototypes."""
        return Prototypes

    def init_server(self, host: Host) -> Tree:
        """No prototype yet."""
        return proto.none(host.architecture().width or 0, host.architecture().dtype)

    def broadcast(self, phase: Phase, server: Tree, client: ClientInfo) -> Tree:
        """The prototypes."""
        return server

    def init_client(self, site: Site) -> Tree:
        """The common initial model of its architecture."""
        return site.initial()

    def client_update(self, phase: Phase, site: Site, message: Prototypes, state: Weights) -> tuple[Tree, Tree]:
        """Train with the pull, and take the means of the features that passed."""
        own = site.architecture()
        means, there = proto.dense(message, own.outputs)
        passed = proto.Means(own.outputs, own.width or 0, own.dtype)
        pulls = self.lam > 0 and len(message.classes) > 0

        def loss(model: Models, batch: Batch) -> Tensor:
            z = model.features(batch.x)
            passed.add(z, batch.y)
            value = site.task.loss(model.head(z), batch.y)
            return value + self.lam * proto.pull(z, means, there, batch.y) if pulls else value

        weights = site.fit(state, loss=loss).weights
        return passed.found(), weights

    def aggregate(
        self, phase: Phase, host: Host, server: Tree, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Tree:
        """New prototypes; a class that nobody sent keeps its old one."""
        fresh = proto.average([r.update for r in replies], host.task.outputs, by_rows=self.prototypes == "rows")
        return proto.renewed(server, fresh)

    def global_model(self, server: Tree) -> Predictor | None:
        """There is none."""
        return None

    def personal_model(self, site: Site, message: Prototypes, state: Weights) -> Predictor | None:
        """The nearest prototype, or the own head."""
        net = Net(state, site.model)
        if self.predict == "head" or not len(message.classes):
            return net
        return proto.Nearest(net, message, site.task.outputs)

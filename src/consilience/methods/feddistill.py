"""FedDistill (FD): mean scores of each class instead of models (Jeong et al., 2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn import functional as F

from consilience.core.fit import Batch, Models
from consilience.core.messages import ClientInfo, Reply
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Weights
from consilience.core.predict import Net, Predictor
from consilience.core.shapes import Expected
from consilience.core.site import Host, Place, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record
from consilience.parts import prototypes as proto
from consilience.parts.prototypes import Prototypes


@record
class Node(NamedTuple):
    """A client's model, and the mean scores that it sent last."""

    model: Weights
    sent: Prototypes


@dataclass(frozen=True)
class FedDistill(Method):
    """Clients keep their models and learn from the mean scores that others give to each class.

        loss = CE(s, y) + lam mean_i CE(s_i, softmax(G_{y_i}))      s = scores; rows of a class without G_y count as 0
        up: mean of s by class, over the rows as they passed in training; only for classes that the client has
        G_c <- mean over the clients that sent c, each counting once; a class that nobody sent keeps its old mean

    With ``exclude_own`` a client's target leaves its own last means out: (n_c G_c - own_c) / (n_c - 1), and it has none
    for a class that only it sent. With lam = 0 the models are those of ``local``, bit for bit.

    Source: Jeong, Oh, Kim, Park, Bennis, Kim, "Communication-Efficient On-Device Machine Learning: Federated
    Distillation and Augmentation under Non-IID Private Data", NeurIPS workshop 2018. Deviations: targets include the
    client's own means by default, as in HtFLlib (the paper excludes them); the paper's augmentation by a generator is
    left out.
    """

    name = "feddistill"
    family = "different architectures"
    source = "Jeong et al., NeurIPS workshop"
    year = 2018
    needs = Needs(architectures="any", classification=True)
    unstacked = "the loss looks at the scores of others"

    lam: Annotated[float, Ge(0)] = option(1.0, "weight of the distillation", Search(0.1, 10.0))
    exclude_own: bool = option(False, "leave a client's own means out of its targets")

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps)

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """Scores of all classes."""
        own = place.architectures[model]
        return proto.shapes(own.outputs, own.outputs, own.dtype)

    def sends(self) -> type:
        """Mean scores."""
        return Prototypes

    def init_server(self, host: Host) -> Tree:
        """No means yet."""
        return proto.none(host.task.outputs, host.architecture().dtype)

    def broadcast(self, phase: Phase, server: Tree, client: ClientInfo) -> Tree:
        """The means."""
        return server

    def init_client(self, site: Site) -> Node:
        """The common initial model of its architecture."""
        return Node(site.initial(), proto.none(site.task.outputs, site.architecture().dtype))

    def client_update(self, phase: Phase, site: Site, message: Prototypes, state: Node) -> tuple[Tree, Node]:
        """Train towards the targets, and take the means of the scores that passed."""
        means, there = self._targets(message, state, site.task.outputs)
        soft = means.softmax(1)
        passed = proto.Means(site.task.outputs, site.task.outputs, site.architecture().dtype)

        def loss(model: Models, batch: Batch) -> Tensor:
            scores = model(batch.x)
            passed.add(scores, batch.y)
            value = site.task.loss(scores, batch.y)
            if not self.lam or not there.any():
                return value
            each = F.cross_entropy(scores, soft[batch.y], reduction="none") * there[batch.y]
            return value + self.lam * each.mean()

        weights = site.fit(state.model, loss=loss).weights
        return passed.found(), Node(weights, passed.found())

    def _targets(self, message: Prototypes, state: Node, classes: int) -> tuple[Tensor, Tensor]:
        """Mean scores by class, and which there are."""
        means, there = proto.dense(message, classes)
        if not self.exclude_own:
            return means, there
        senders = means.new_zeros(classes).index_copy_(0, message.classes, message.counts.to(means.dtype))
        own, sent = proto.dense(state.sent, classes)
        both = (there & sent)[:, None]
        others = (senders[:, None] * means - own) / (senders[:, None] - 1)
        alone = (senders <= 1)[:, None] & both
        return torch.where(both & ~alone, others, means), there & ~alone.flatten()

    def aggregate(
        self, phase: Phase, host: Host, server: Tree, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Tree:
        """New means."""
        return proto.renewed(server, proto.average([r.update for r in replies], host.task.outputs, by_rows=False))

    def global_model(self, server: Tree) -> Predictor | None:
        """There is none."""
        return None

    def personal_model(self, site: Site, message: Prototypes, state: Node) -> Predictor:
        """The own model."""
        return Net(state.model, site.model)

"""FedDistill (FD): mean scores of each class instead of models (Jeong et al., 2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from annotated_types import Ge
from torch import Tensor
from torch.nn import functional as F

from consilience.core.errors import ConfigError
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
class Server(NamedTuple):
    """means: of each class; counts: of how many clients. own: what a client gave to means as they are now, by its id;
    empty unless own means are excluded."""

    means: Prototypes
    own: dict[int, Prototypes]


@dataclass(frozen=True)
class FedDistill(Method):
    """Clients keep their models and learn from the mean scores that others give to each class.

        loss = CE(s, y) + lam mean_i CE(s_i, softmax(G_{y_i}))      s = scores; rows of a class without G_y count as 0
        up: mean of s by class, over the rows as they passed in training; only for classes that the client has
        G_c <- mean over the clients that sent c, each counting once; a class that nobody sent keeps its old mean

    With ``exclude_own`` the server leaves out of a client's targets what it gave to them itself: (n_c G_c - own_c) /
    (n_c - 1), where G_c was made with it; it gets none for a class that it alone sent. With lam = 0 the models are
    those of ``local``, bit for bit.

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
    takes_aggregator = True
    unstacked = "the loss looks at the scores of others"

    lam: Annotated[float, Ge(0)] = option(1.0, "weight of the distillation", Search(0.1, 10.0))
    exclude_own: bool = option(False, "leave a client's own means out of its targets")

    def check(self) -> None:
        """A client's own part can be taken out of a mean alone."""
        if self.exclude_own and self.aggregator != "mean":
            raise ConfigError("feddistill: exclude_own takes a client's part out of the mean; use aggregator=mean")

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps)

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """Scores of all classes."""
        own = place.architectures[model]
        return proto.shapes(own.outputs, own.outputs, own.dtype)

    def sends(self, phase: Phase) -> type:
        """Mean scores."""
        return Prototypes

    def init_server(self, host: Host) -> Server:
        """No means yet."""
        return Server(proto.none(host.task.outputs, host.architecture().dtype), {})

    def broadcast(self, phase: Phase, server: Server, client: ClientInfo) -> Tree:
        """The means; without the client's own share, if that is excluded."""
        own = server.own.get(client.id)
        return server.means if own is None else proto.without(server.means, own)

    def init_client(self, site: Site) -> Tree:
        """The common initial model of its architecture."""
        return site.initial()

    def client_update(self, phase: Phase, site: Site, message: Prototypes, state: Weights) -> tuple[Tree, Weights]:
        """Train towards the targets, and take the means of the scores that passed."""
        means, there = proto.dense(message, site.task.outputs)
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

        weights = site.fit(state, loss=loss).weights
        return passed.found(), weights

    def aggregate(
        self, phase: Phase, host: Host, server: Server, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Server:
        """New means, and who gave what to them."""
        classes = host.task.outputs
        fresh = proto.average([reply.update for reply in replies], classes, by_rows=False)
        means = proto.renewed(server.means, fresh)
        if not self.exclude_own:
            return Server(means, {})
        given: dict[int, list[Prototypes]] = {}
        for reply in replies:
            given.setdefault(reply.job.client, []).append(reply.update)
        own = {client: proto.outside(old, fresh.classes) for client, old in server.own.items()}
        for client, found in given.items():
            latest = proto.average(found, classes, by_rows=False)
            own[client] = proto.renewed(own[client], latest) if client in own else latest
        return Server(means, {client: own[client] for client in sorted(own) if len(own[client].classes)})

    def global_model(self, server: Tree) -> Predictor | None:
        """There is none."""
        return None

    def personal_model(self, site: Site, message: Prototypes, state: Weights) -> Predictor:
        """The own model."""
        return Net(state, site.model)

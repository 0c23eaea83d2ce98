"""FedIns: each input chooses how a frozen network is scaled and shifted for it (Feng et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge, Le
from torch import Tensor

from consilience.core.errors import ConfigError
from consilience.core.fit import Batch, Models, Plan
from consilience.core.messages import Broadcast
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Architecture, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.shapes import Expected
from consilience.core.site import Host, Place, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record
from consilience.models.pool import BASE, pool


@record
class Server(NamedTuple):
    """model: the pool. base: the frozen network, which never changes and everybody has."""

    model: Weights
    base: Weights


@dataclass(frozen=True)
class FedIns(Method):
    """The network is frozen. A pool of scales, shifts and heads is trained and averaged; each input uses the mean of
    the entries that are nearest to it.

        q(x) = plain features of x;   S(x) = the ``top`` entries l with the largest cos(q(x), key_l)
        every layer's output a becomes  a * scale + shift,  the head is (W, b):  all of them means over S(x)
        client: SGD on  (1 - om) CE + om (1 - sum_{l in S(x)} cos( q(x), key_l )),  mean over rows
        server: pool <- sum_k p_k pool_k

    pool: ``entries`` keys, scales (1 at first), shifts (0) and heads. om: ``key_weight``. The frozen network is the
    features of the initial model: those of ``frozen``, which are trained, or of an ``--init`` file; of other models
    they are random. Everybody has it, so only the pool travels. Layers are linear, convolutional and group-norm ones.
    Entries that nobody's rows choose stay as they are. The global model and what a client deploys are the same network
    with the server's pool, which each input uses in its own way. With key_weight = 0 it is FedAvg on the pool
    bit for bit.

    Source: Feng, Yu, Liu, Xu, Khan, Zuo, "Towards Instance-adaptive Inference for Federated Learning", ICCV 2023, and
    its official code. Deviations: a convolutional network in the place of a vision transformer; entries are averaged
    for each row by itself, where the code averages over a batch too; keys begin uniform in (0, 1).
    """

    name = "fedins"
    family = "personal models"
    source = "Feng et al., ICCV"
    year = 2023
    needs = Needs(split_model=True, classification=True, loss=True)
    unstacked = "the loss looks at keys"
    sums = Method.means

    entries: Annotated[int, Ge(1)] = option(25, "entries of the pool", Search(4, 32, False))
    top: Annotated[int, Ge(1)] = option(3, "entries that an input uses")
    key_weight: Annotated[float, Ge(0), Le(1)] = option(0.1, "weight of the pull between keys and inputs")
    weights: Literal["samples", "uniform"] = option("uniform", "a client's weight (uniform in the paper)")

    def check(self) -> None:
        """One cannot use more entries than there are."""
        if self.top > self.entries:
            raise ConfigError(f"fedins: top={self.top} is more than the entries={self.entries} that there are")
        super().check()

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps)

    def networks(self, models: Mapping[str, Architecture]) -> Mapping[str, Architecture]:
        """The pool over the model."""
        return {"pool": pool(next(iter(models.values())), self.entries, self.top)}

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """The pool, without what is frozen."""
        own = _own(place.networks["pool"].spec)
        return {"model": own, "delta": own.params, "buffers": own.buffers}

    def sends(self, phase: Phase) -> type:
        """Pools or their differences."""
        return self.packs

    def init_server(self, host: Host) -> Server:
        """A fresh pool."""
        return Server(_own(host.initial("pool")), host.initial())

    def client_update(self, phase: Phase, site: Site, message: Broadcast, state: Tree) -> tuple[Tree, Tree]:
        """Train the pool."""
        fit = site.fit(_whole(message.model, site.initial()), self.plan(site, message, state))
        return self.pack(message.model, _own(fit.weights)), state

    def plan(self, site: Site, message: Broadcast, state: Tree) -> Plan:
        """The task's loss, and the pull of keys."""
        if not self.key_weight:
            return Plan(model="pool")

        def loss(model: Models, batch: Batch) -> Tensor:
            scores, cosines = model.both(batch.x)
            apart = (1 - cosines.sum(1)).mean()
            value: Tensor = (1 - self.key_weight) * site.task.loss(scores, batch.y) + self.key_weight * apart
            return value

        return Plan(loss=loss, model="pool")

    def global_model(self, server: Server) -> Predictor:
        """The network with the server's pool."""
        return Net(_whole(server.model, server.base), "pool")

    def personal_model(self, site: Site, message: Broadcast, state: Tree) -> Predictor:
        """The same."""
        return Net(_whole(message.model, site.initial()), "pool")

    def trained_model(self, site: Site, message: Broadcast, update: Tree, state: Tree) -> Predictor:
        """The network with the client's pool."""
        found = super().trained_model(site, message, update, state)
        assert isinstance(found, Net)
        return Net(_whole(found.weights, site.initial()), "pool")


def _own(weights: Weights) -> Weights:
    """The pool without the frozen network."""
    return Weights(*({n: t for n, t in part.items() if not n.startswith(BASE)} for part in weights))


def _whole(own: Weights, base: Weights) -> Weights:
    """The pool with the frozen network."""
    return Weights(*({**a, **{f"{BASE}{n}": t for n, t in b.items()}} for a, b in zip(own, base, strict=True)))

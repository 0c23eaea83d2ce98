"""IFCA: clients train that of several models which fits them best (Ghosh et al., 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge

from consilience.core import tree as tr
from consilience.core.messages import Buffers, ClientInfo, Delta, DeltaUpdate, Model, ModelUpdate, Reply
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Weights
from consilience.core.predict import Net, Predictor
from consilience.core.shapes import Expected, Wrong
from consilience.core.site import Host, Place, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record
from consilience.parts import components
from consilience.parts.components import Components


@record
class ModelOf(NamedTuple):
    """A trained model, and the number of the one that it began as."""

    model: Model
    cluster: int


@record
class DeltaOf(NamedTuple):
    """What training changed in the model of this number."""

    delta: Delta
    buffers: Buffers
    cluster: int


@dataclass(frozen=True)
class IFCA(Method):
    """Each client picks the model with the least loss on its training rows and trains that one.

        m_i = argmin_m F_i(theta_m), ties to the least m;     y_i: local steps from theta_{m_i}
        theta_m <- sum_{i: m_i = m} p_i y_i,   or theta_m + sum p_i (y_i - theta_m) in form "delta"

    p_i are weights among the clients that chose m, uniform in the paper; a model that nobody chose stays. A client that
    never took part joins by the same choice. The models start apart, drawn with different seeds; a poor start can leave
    some of them unused for ever, so compare several seeds (the paper restarts). There is no global model unless there
    is one cluster. With ``clusters=1`` it is FedAvg with the same weights, bit for bit.

    Source: Ghosh, Chung, Yin, Ramchandran, "An Efficient Framework for Clustered Federated Learning", NeurIPS 2020,
    algorithm 1, model averaging. Deviations: none; the variants with gradients and with a shared body are left out.
    """

    name = "ifca"
    family = "clusters"
    source = "Ghosh et al., NeurIPS"
    year = 2020
    takes_momentum = False
    needs = Needs(loss=True)

    clusters: Annotated[int, Ge(1)] = option(4, "how many models", Search(2, 8))
    weights: Literal["samples", "uniform"] = option(
        "uniform", "a client's weight in its cluster (uniform in the paper)"
    )

    def check(self) -> None:
        """Buffers cannot stay local."""
        components.check_buffers(self)

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps)

    def sends(self, phase: Phase) -> type:
        """A model or a difference, and whose."""
        return ModelOf if self.form == "model" else DeltaOf

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """A number of a cluster."""
        return {"cluster": self._number}

    def _number(self, found: Any) -> Wrong | None:
        fits = type(found) is int and 0 <= found < self.clusters
        return None if fits else ("", f"is {found!r}, not a cluster from 0 to {self.clusters - 1}")

    def init_server(self, host: Host) -> Components:
        """Models that differ."""
        return Components(components.draw(host, self.clusters))

    def broadcast(self, phase: Phase, server: Components, client: ClientInfo) -> Components:
        """All models."""
        return server

    def choose(self, site: Site, models: Sequence[Weights]) -> int:
        """The model with the least mean loss on the training rows; the first where there are none."""
        if len(models) == 1 or not len(site.train):
            return 0
        return int(components.losses(site, models).double().mean(0).argmin())

    def client_update(self, phase: Phase, site: Site, message: Components, state: Tree) -> tuple[Tree, Tree]:
        """Choose, and train."""
        chosen = self.choose(site, message.models)
        start = message.models[chosen]
        update = self.pack(start, site.fit(start).weights)
        if isinstance(update, ModelUpdate):
            return ModelOf(update.model, chosen), state
        return DeltaOf(update.delta, update.buffers, chosen), state

    def aggregate(
        self, phase: Phase, host: Host, server: Components, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Components:
        """Each model from those who chose it."""
        models = list(server.models)
        for m in sorted({reply.update.cluster for reply in replies}):
            own = [reply._replace(update=_plain(reply.update)) for reply in replies if reply.update.cluster == m]
            models[m] = self.combine(models[m], own)
        return Components(tuple(models))

    def global_model(self, server: Components) -> Predictor | None:
        """There is one only if there is one cluster."""
        return Net(server.models[0]) if len(server.models) == 1 else None

    def personal_model(self, site: Site, message: Components, state: Tree) -> Predictor:
        """The model chosen now."""
        return Net(message.models[self.choose(site, message.models)], site.model)

    def cluster(self, site: Site, message: Components, state: Tree) -> int:
        """The number of that."""
        return self.choose(site, message.models)

    def trained_model(self, site: Site, message: Components, update: Tree, state: Tree) -> Predictor:
        """What was trained."""
        if isinstance(update, ModelOf):
            return Net(update.model, site.model)
        start = message.models[update.cluster]
        return Net(Weights(tr.add(start.params, update.delta), update.buffers), site.model)


def _plain(update: Tree) -> Tree:
    return ModelUpdate(update.model) if isinstance(update, ModelOf) else DeltaUpdate(update.delta, update.buffers)

"""Clusters that are divided again and again: a tree of them, one model for each leaf, and how clients find theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Ge

from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.messages import Buffers, ClientInfo, Delta, DeltaUpdate, Model, Reply, Stat
from consilience.core.method import Method, Phase
from consilience.core.model import Params, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.reduce import uniform_weights, weighted_sum
from consilience.core.shapes import Expected, Wrong
from consilience.core.site import Host, Place, Site
from consilience.core.training import option
from consilience.core.tree import Tree, record


@record
class Split(NamedTuple):
    """A cluster that was split: its model then, and the mean of its members' updates scaled to length 1, by child."""

    model: Weights
    directions: dict[int, Params]


@record
class Forest(NamedTuple):
    """Clusters by number, 0 being everybody: the models of those there are now, and what was split."""

    models: dict[int, Weights]
    splits: dict[int, Split]


@record
class Server(NamedTuple):
    """All clusters, and the one of each client that is known."""

    forest: Forest
    of: dict[int, int]


@record
class Down(NamedTuple):
    """A client's model, and the number of its cluster."""

    model: Model
    cluster: int


@record
class Walk(NamedTuple):
    """All clusters, for a client to find its own."""

    forest: Stat


@record
class Up(NamedTuple):
    """What training changed in the model of this cluster."""

    delta: Delta
    buffers: Buffers
    cluster: int


@dataclass(frozen=True)
class Divided(Method):
    """FedAvg in each cluster, in delta form; :meth:`divide` says which clusters are divided, and how. Clients not there
    when theirs is, and those that never train, walk down from the top: at each split they train from the model it had
    and go where their update's cosine with the members' mean direction is largest."""

    wait: Annotated[int, Ge(0)] = option(20, "rounds before the first split")
    form: Literal["delta"] = option("delta", "clients send differences")

    def check(self) -> None:
        """Buffers cannot stay local."""
        if self.buffers != "average":
            raise ConfigError(f"{self.name}: buffers=local has no meaning for several models; use buffers=average")

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps)

    def sends(self, phase: Phase) -> type:
        """See :class:`Up`."""
        return Up

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """A number."""
        return {"cluster": _number}

    # --- the server's half -------------------------------------------------------------------------------------

    def init_server(self, host: Host) -> Server:
        """One cluster."""
        return Server(Forest({0: host.initial()}, {}), {})

    def broadcast(self, phase: Phase, server: Server, client: ClientInfo) -> Tree:
        """The model of the client's cluster, or all if its cluster is not known."""
        if not server.forest.splits:
            return Down(server.forest.models[0], 0)
        if client.id in server.of:
            own = server.of[client.id]
            return Down(server.forest.models[own], own)
        return Walk(server.forest)

    def aggregate(
        self, phase: Phase, host: Host, server: Server, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Server:
        """Split what is to be split, then move every cluster."""
        forest, of = server.forest, dict(server.of)
        for c in sorted(server.forest.models):
            own = [reply for reply in replies if reply.update.cluster == c]
            if not own:
                continue
            labels = self.divide(host, server, [reply.update.delta for reply in own])
            numbers = [c] * len(own)
            if len(set(labels)) > 1:
                first = max([*forest.models, *forest.splits]) + 1
                numbers = [first + label for label in labels]
                forest = _divided(forest, c, own, numbers)
                of = {client: leaf for client, leaf in of.items() if leaf != c}  # who was not there walks
            of.update({reply.job.client: leaf for reply, leaf in zip(own, numbers, strict=True)})
            for leaf in sorted(set(numbers)):
                part = [reply for reply, number in zip(own, numbers, strict=True) if number == leaf]
                forest = forest._replace(models={**forest.models, leaf: self.moved(forest, leaf, part)})
        return Server(forest, dict(sorted(of.items())))

    def moved(self, forest: Forest, leaf: int, replies: Sequence[Reply]) -> Weights:
        """A cluster's new model."""
        plain = [reply._replace(update=DeltaUpdate(reply.update.delta, reply.update.buffers)) for reply in replies]
        return self.combine(forest.models[leaf], plain)

    def divide(self, host: Host, server: Server, deltas: Sequence[Params]) -> list[int]:
        """For each of a cluster's updates the number of its part, from 0; all 0 if it stays whole."""
        raise NotImplementedError

    def report(self, server: Server) -> Mapping[str, float]:
        """How many clusters there are."""
        return {"clusters": len(server.forest.models)}

    def global_model(self, server: Server) -> Predictor | None:
        """There is one until the first split."""
        return None if server.forest.splits else Net(server.forest.models[0])

    # --- the client's half -------------------------------------------------------------------------------------

    def locate(self, site: Site, message: Tree) -> Down:
        """The client's model and cluster, found by walking down where they are not given."""
        if isinstance(message, Down):
            return message
        forest, c = message.forest, 0
        while c in forest.splits:
            split = forest.splits[c]
            if len(site.train):
                delta = tr.sub(site.fit(split.model, purpose="walk").weights.params, split.model.params)
                c = max(split.directions, key=lambda child: (tr.dot(delta, split.directions[child]), -child))
            else:
                c = min(split.directions)
        return Down(forest.models[c], c)

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Tree) -> tuple[Tree, Tree]:
        """Train the model of the own cluster."""
        found = self.locate(site, message)
        end = site.fit(found.model).weights
        return Up(tr.sub(end.params, found.model.params), end.buffers, found.cluster), state

    def personal_model(self, site: Site, message: Tree, state: Tree) -> Predictor | None:
        """The model of the own cluster."""
        return Net(self.locate(site, message).model, site.model)

    def cluster(self, site: Site, message: Tree, state: Tree) -> int:
        """Its number."""
        return self.locate(site, message).cluster

    def trained_model(self, site: Site, message: Tree, update: Up, state: Tree) -> Predictor | None:
        """The model after training."""
        start = message.model if isinstance(message, Down) else message.forest.models[update.cluster]
        return Net(Weights(tr.add(start.params, update.delta), update.buffers), site.model)


def _number(found: Any) -> Wrong | None:
    return None if type(found) is int and found >= 0 else ("", f"is {found!r}, not a cluster")


def _divided(forest: Forest, c: int, replies: Sequence[Reply], numbers: Sequence[int]) -> Forest:
    """Cluster ``c`` split in these, each beginning with its model."""
    directions = {}
    for leaf in sorted(set(numbers)):
        deltas = [r.update.delta for r, number in zip(replies, numbers, strict=True) if number == leaf]
        mean = weighted_sum([tr.scale(d, 1 / (tr.norm(d) or 1.0)) for d in deltas], uniform_weights(len(deltas)))
        directions[leaf] = tr.scale(mean, 1 / (tr.norm(mean) or 1.0))
    model = forest.models[c]
    models = {k: v for k, v in forest.models.items() if k != c} | dict.fromkeys(directions, model)
    return Forest(models, {**forest.splits, c: Split(model, directions)})


def cosines(deltas: Sequence[Params]) -> np.ndarray:
    """Cosines of all pairs ``(n, n)``; 0 with an update of length 0."""
    rows = np.stack([np.concatenate([t.double().flatten().numpy() for t in tr.tensors(d)]) for d in deltas])
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    found: np.ndarray = np.clip(rows @ rows.T, -1, 1)
    return found


def agglomerate(distances: np.ndarray, linkage: str, *, count: int = 0, below: float = 0.0) -> list[int]:
    """Clusters from 0, in the order of their first members, by agglomerative clustering of distances ``(n, n)``: so
    many of them, or (``count`` 0) as many as are left when no two are nearer than ``below``."""
    from scipy.cluster import hierarchy  # type: ignore[import-untyped]
    from scipy.spatial.distance import squareform  # type: ignore[import-untyped]

    apart = (distances + distances.T) / 2
    np.fill_diagonal(apart, 0)
    merges = hierarchy.linkage(squareform(np.maximum(apart, 0), checks=False), linkage)
    how = {"t": count, "criterion": "maxclust"} if count else {"t": below, "criterion": "distance"}
    found = hierarchy.fcluster(merges, **how).tolist()
    order = list(dict.fromkeys(found))
    return [order.index(label) for label in found]

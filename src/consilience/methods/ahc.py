"""AHC: a tree of clusters, cut where updates say so, with meta-learning inside each (Yeganeh et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Le
from scipy.cluster import hierarchy  # type: ignore[import-untyped]
from scipy.spatial.distance import pdist, squareform  # type: ignore[import-untyped]

from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.messages import DeltaUpdate, Reply
from consilience.core.model import Params, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.site import Host, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree
from consilience.parts.forest import Divided, Forest, Server, Up, agglomerate, cosines


@dataclass(frozen=True)
class AHC(Divided):
    """FedAvg for all, then semi-global models of clusters, then a few steps of each client's own.

        D_i = y_i - theta_c, local steps from the model of the client's cluster c
        after ``wait`` rounds, and every ``every`` from then on, the D_i of each cluster are merged bottom up
        (``linkage`` on 1 - cos or Euclidean distances), and the merges above the cut are undone:
            cut given: those at a distance over ``cut``
            else: those above the largest ratio of one merge's distance to the last one's, if that is over ``jump`` and
            leaves clusters of two members on average
        theta_c <- theta_c + sum_i p_i D_i  before the first cut;   theta_c + meta_lr sum_i p_i D_i  after it (Reptile)
        a client deploys theta_c after ``adapt_steps`` local steps

    A cluster of ``least`` members or fewer stays. Clients not there at a cut, and those that never train, walk down as
    in ``cfl``. There is no global model after the first cut. A cut that is never reached, with adapt_steps = 0, is
    FedAvg in delta form, bit for bit; with meta_lr = 1 Reptile's step is that of FedAvg; cut = 0 leaves every client
    alone.

    Source: Yeganeh, Farshad, Boschmann, Gaus, Frantzen, Navab, "Adaptive Personalization in Federated Learning for
    Highly Non-i.i.d. Data", MICCAI workshop DeCaF 2022. Reconstructed: the abstract names adaptive hierarchical
    clustering into semi-global models and meta-learning inside clusters; features (updates), linkage, the rule of
    the cut, when it is applied and the meta-learner (Reptile) are choices made here, after Briggs et al. (2020).
    """

    name = "ahc"
    family = "clusters"
    source = "Yeganeh et al., MICCAI workshop"
    year = 2022
    confidence = "low"

    wait: Annotated[int, Ge(0)] = option(10, "rounds of FedAvg before the first cut")
    every: Annotated[int, Ge(1)] = option(10, "rounds from one look at clusters to the next")
    cut: Annotated[float, Ge(0)] | None = option(None, "distance over which merges are undone, if given")
    jump: Annotated[float, Gt(1)] = option(
        1.1, "ratio of two merges' distances that separates clusters, without cut", Search(1.02, 2.0)
    )
    linkage: Literal["average", "complete", "ward"] = option("average", "distance between two clusters")
    metric: Literal["cosine", "euclidean"] = option("cosine", "distance between two updates")
    least: Annotated[int, Ge(1)] = option(2, "members with which a cluster is not divided")
    meta_lr: Annotated[float, Gt(0), Le(1)] = option(0.5, "how far a cluster goes to its members' mean")
    adapt_steps: Annotated[int, Ge(0)] = option(5, "local steps from the cluster's model to the client's own")
    weights: Literal["samples", "uniform"] = option("samples", "a client's weight in its cluster")

    def check(self) -> None:
        """Ward's linkage is of Euclidean distances."""
        super().check()
        if self.linkage == "ward" and self.metric != "euclidean":
            raise ConfigError(f"{self.name}: linkage=ward needs metric=euclidean")

    # --- the server's half -------------------------------------------------------------------------------------

    def moved(self, forest: Forest, leaf: int, replies: Sequence[Reply]) -> Weights:
        """FedAvg's step, or Reptile's."""
        if not forest.splits or self.meta_lr == 1:
            return super().moved(forest, leaf, replies)
        near = [reply._replace(update=_shorter(reply.update, self.meta_lr)) for reply in replies]
        return self.combine(forest.models[leaf], near)

    def divide(self, host: Host, server: Server, deltas: Sequence[Params]) -> list[int]:
        """For each of a cluster's updates the number of its part, from 0."""
        together = [0] * len(deltas)
        if len(deltas) <= self.least or host.version < self.wait or (host.version - self.wait) % self.every:
            return together
        apart = self.distances(deltas)
        if self.cut is not None:
            return agglomerate(apart, self.linkage, below=self.cut)
        count = clusters_at_jump(apart, self.linkage, self.jump)
        return agglomerate(apart, self.linkage, count=count) if count > 1 else together

    def distances(self, deltas: Sequence[Params]) -> np.ndarray:
        """Of all pairs, ``(n, n)``."""
        if self.metric == "cosine":
            return 1 - cosines(deltas)
        rows = np.stack([np.concatenate([t.double().flatten().numpy() for t in tr.tensors(d)]) for d in deltas])
        found: np.ndarray = squareform(pdist(rows))
        return found

    # --- the client's half -------------------------------------------------------------------------------------

    def personal_model(self, site: Site, message: Tree, state: Tree) -> Predictor:
        """The model of the own cluster after a few steps."""
        return self._adapted(site, self.locate(site, message).model)

    def _adapted(self, site: Site, start: Weights) -> Net:
        if not self.adapt_steps or not len(site.train):
            return Net(start, site.model)
        fit = site.fit(start, steps=self.adapt_steps, purpose="adapt")
        return Net(Weights(fit.weights.params, start.buffers), site.model)


def _shorter(update: Up, share: float) -> DeltaUpdate:
    return DeltaUpdate(tr.scale(update.delta, share), update.buffers)


def clusters_at_jump(distances: np.ndarray, linkage: str, jump: float) -> int:
    """How many clusters stand before the largest relative step in the distances of merges ``(n, n)``, of those that
    leave at most n / 2; 1 if that step is not over ``jump``."""
    apart = (distances + distances.T) / 2
    np.fill_diagonal(apart, 0)
    heights = hierarchy.linkage(squareform(np.maximum(apart, 0), checks=False), linkage)[:, 2]
    n = len(distances)
    ratios = {
        n - 1 - i: heights[i + 1] / max(heights[i], 1e-12) for i in range(len(heights) - 1) if 2 * (n - 1 - i) <= n
    }
    best = max(ratios, key=lambda count: (ratios[count], -count), default=1)
    return best if ratios.get(best, 0) > jump else 1

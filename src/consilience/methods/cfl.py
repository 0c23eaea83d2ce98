"""CFL: clients whose updates point apart are split, again and again (Sattler et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Le

from consilience.core import tree as tr
from consilience.core.model import Params
from consilience.core.reduce import uniform_weights, weighted_sum
from consilience.core.site import Host
from consilience.core.training import Search, option
from consilience.parts.forest import Divided, Server, agglomerate, cosines


@dataclass(frozen=True)
class CFL(Divided):
    """FedAvg in each cluster; a cluster that stands still although its members do not is split in two.

        D_i = y_i - theta_c, local steps from the model of the client's cluster c
        split c if  || mean_i D_i || < eps1  and  max_i || D_i || > eps2,  with over 2 members, after round ``wait``
        in two by complete linkage on 1 - cos(D_i, D_j), which keeps the closest pair across as far apart as it can
        theta_c <- theta_c + sum_i p_i D_i, p_i weights in the (new) cluster, uniform in the paper

    gap: split only if max cos across < sqrt((1 - gamma) / 2) with gamma given (the paper's bound on how much members of
    one law differ); none by default, as in the authors' code. eps1 and eps2 are norms of updates: set them by the model
    and step size; where eps2 is too small, clusters of like clients go on splitting. Clients not there at a split, and
    those that never train, walk down from the top: at each split they train from the model it had and go where their
    update's cosine with the members' mean direction is largest.
    With eps1 = 0 nothing is split and it is uniform FedAvg in delta form, bit for bit.

    Source: Sattler, Mueller, Samek, "Clustered Federated Learning: Model-Agnostic Distributed Multitask Optimization
    under Privacy Constraints", TNNLS 2021, algorithms 1 to 3. Deviations: of the members' updates at a split their mean
    direction is kept, not each; with partial participation the cohort's part of a cluster decides.
    """

    name = "cfl"
    family = "clusters"
    source = "Sattler et al., TNNLS"
    year = 2021

    eps1: Annotated[float, Ge(0)] = option(
        0.4, "norm of the mean update below which a cluster stands still", Search(0.01, 2)
    )
    eps2: Annotated[float, Ge(0)] = option(1.6, "norm of an update above which a member does not", Search(0.05, 5))
    gap: Annotated[float, Gt(0), Le(1)] | None = option(None, "gamma of the bound that a split must pass")
    weights: Literal["samples", "uniform"] = option(
        "uniform", "a client's weight in its cluster (uniform in the paper)"
    )

    def divide(self, host: Host, server: Server, deltas: Sequence[Params]) -> list[int]:
        """For each of a cluster's updates the number of its part, from 0; all 0 if it stays whole."""
        together = [0] * len(deltas)
        if len(deltas) <= 2 or host.version < self.wait or not self.eps1:
            return together
        mean = weighted_sum(deltas, uniform_weights(len(deltas)))
        if tr.norm(mean) >= self.eps1 or max(map(tr.norm, deltas)) <= self.eps2:
            return together
        near = cosines(deltas)
        labels = agglomerate(1 - near, "complete", count=2)
        if self.gap is not None:
            one = np.array(labels) == 0
            if near[one][:, ~one].max() >= np.sqrt((1 - self.gap) / 2):
                return together
        return labels

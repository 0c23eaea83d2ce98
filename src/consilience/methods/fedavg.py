"""FedAvg: federated averaging (McMahan et al., 2017)."""

from __future__ import annotations

from dataclasses import dataclass

from consilience.core.method import Method


@dataclass(frozen=True)
class FedAvg(Method):
    """Local training, then the weighted mean of the models.

    Equations, with x the global model, S the cohort, K_i local steps of size eta:

        y_i <- x;   y_i <- y_i - eta grad F_i(y_i; batch)   K_i times
        x   <- sum_{i in S} p_i y_i            (form "model")
        x   <- x + sum_{i in S} p_i (y_i - x)  (form "delta"; equal in exact arithmetic, not in the last bits)

    p_i = n_i / sum_{j in S} n_j (weights "samples") or 1 / |S| ("uniform").

    Source: McMahan, Moore, Ramage, Hampson, Aguera y Arcas, "Communication-Efficient Learning of Deep Networks
    from Decentralized Data", AISTATS 2017. Deviations: none; weights are over the cohort, as in the paper.
    """

    name = "fedavg"
    family = "baseline"
    source = "McMahan et al., AISTATS"
    year = 2017
    takes_rules = True
    sums = Method.means

"""FedDisco: weights from sizes and label discrepancy (Ye et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from consilience.core.method import Needs
from consilience.core.training import Search, option
from consilience.parts.weighed import Asked
from consilience.parts.weights import Disco


@dataclass(frozen=True)
class FedDisco(Asked):
    """FedAvg that trusts clients less whose labels are further from the wanted distribution.

        w_i = [ p_i - a d_i + b ]_+ / sum_{j in S} [ p_j - a d_j + b ]_+;   x <- sum_{i in S} w_i y_i
        p_i = n_i / sum_j n_j;   d_i = KL(D_i || T) / sum_j KL(D_j || T)    ("l1", "l2", "cosine": not normalised)

    D_i: shares of the classes among client i's training rows, which clients tell once, before the first round. T: equal
    shares, or those of everybody together (target "global"). Where all brackets are 0, w = p. The rule alone, for other
    methods, is ``--weights disco``, with a = 0.5, b = 0.1 and KL to equal shares.

    a = b = 0 is FedAvg bit for bit. b > 0 alone already moves weights towards equality.

    Source: Ye, Xu, Wang, Xu, Chen, Wang, "FedDisco: Federated Learning with Discrepancy-Aware Collaboration", ICML
    2023, and its official code. Deviation: a client that could not tell its labels counts as the others' mean.
    """

    name = "feddisco"
    family = "weights"
    source = "Ye et al., ICML"
    year = 2023
    needs = Needs(classification=True)

    a: Annotated[float, Ge(0)] = option(0.5, "how much discrepancy counts", Search(0.01, 1.0))
    b: Annotated[float, Ge(0)] = option(0.1, "what every weight is raised by", Search(0.01, 1.0))
    distance: Literal["kl", "l1", "l2", "cosine"] = option("kl", "how far labels are from the target")
    target: Literal["uniform", "global"] = option("uniform", "T: equal shares, or those of everybody together")
    weights: Literal["samples"] = option("samples", "p_i, before the discrepancy")

    def rule(self) -> Disco:
        """See :class:`consilience.parts.weights.Disco`."""
        return Disco(self.a, self.b, self.distance, self.target)

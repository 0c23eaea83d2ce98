"""IDA: inverse distance aggregation (Yeganeh et al., 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from consilience.core.training import option
from consilience.parts import weights as rules
from consilience.parts.weighed import Weighed


@dataclass(frozen=True)
class IDA(Weighed):
    """FedAvg that trusts clients less whose models are further from the mean.

        a_i = 1 / (||(1 / |S|) sum_j y_j - y_i||_1 + eps);   w_i = a_i / sum_j a_j;   x <- sum_{i in S} w_i y_i

    With ``by_size`` a_i n_i takes the place of a_i. The distance is over all parameters. The rule alone, for other
    methods, is ``--weights ida``.

    Equal models get equal weights; so do any two clients. One client that is off, by any distance, among n - 1 that
    agree has weight 1 / ((n - 1)^2 + 1).

    Source: Yeganeh, Farshad, Navab, Albarqouni, "Inverse Distance Aggregation for Federated Learning with Non-IID
    Data", DCL workshop at MICCAI 2020; formula from a summary, no code was published. eps is 1e-8 of the mean distance.
    Deviation: the variant that also divides by training accuracy (INTRAC) is not part of this.
    """

    name = "ida"
    family = "weights"
    source = "Yeganeh et al., MICCAI-DCL"
    year = 2020
    confidence = "medium"

    by_size: bool = option(False, "whether weights are times n_i")
    weights: Literal["uniform"] = option("uniform", "weights of the mean that distances are taken to")

    def rule(self) -> rules.IDA:
        """See :class:`consilience.parts.weights.IDA`."""
        return rules.IDA(self.by_size)

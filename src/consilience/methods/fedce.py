"""FedCE: weights from what each client contributes, in gradients and in data (Jiang et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from consilience.core.training import option
from consilience.parts.weighed import Asked
from consilience.parts.weights import Contribution


@dataclass(frozen=True)
class FedCE(Asked):
    """FedAvg that gives more weight to clients whose update and whose data are unlike the others'.

        s_i = cos(Delta_i, sum_{j != i} w_j Delta_j);   S_i: mean of s_i over the rounds so far
        e_i = error of (x - w_i y_i') / (1 - w_i), the model without client i, on i's validation rows
        g_i = max(0, 1 - S_i) / sum_j ...;   h_i = e_i / sum_j e_j
        w_i <- g_i + h_i ("plus") or g_i h_i ("times"), normalised to sum 1;   x <- x + sum_i w_i Delta_i

    Delta_i = y_i - x; y_i' is what client i sent last; w_i begins at 1 / N. e_i is measured in a phase of its own after
    each round, with the new x, which is what a client would measure at the start of the next; the download of x for it
    is counted. Before a client has told, its e_i is the others' mean. Without validation rows e_i is on training rows;
    in a regression it is the loss. Normalised g_i, h_i and w_i are at least 1e-6. The rule alone, for other methods, is
    ``--weights fedce``.

    Identical clients keep equal weights, which is FedAvg with uniform weights. With two, s_1 = s_2.

    Source: Jiang, Roth, Li, Yang, Zhao, Nath, Xu, Dou, Xu, "Fair Federated Medical Image Segmentation via Client
    Contribution Estimation", CVPR 2023, and its code in NVFlare (weights used are the new ones). Deviations: the error
    is 1 - accuracy instead of 1 - Dice. Made for full participation; with a part, weights are over the cohort.
    """

    name = "fedce"
    family = "weights"
    source = "Jiang et al., CVPR"
    year = 2023

    combine_by: Literal["plus", "times"] = option("plus", "how the two contributions combine")
    weights: Literal["uniform"] = option("uniform", "what weights begin with")

    def rule(self) -> Contribution:
        """See :class:`consilience.parts.weights.Contribution`."""
        return Contribution(self.combine_by)

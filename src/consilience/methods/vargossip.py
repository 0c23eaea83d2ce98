"""Variance-corrected averaging in gossip learning (Tian et al., 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le
from torch import Tensor

from consilience.core.messages import Inbox
from consilience.core.model import Weights
from consilience.core.site import Site
from consilience.core.training import Search, option
from consilience.methods.dpsgd import DPSGD
from consilience.parts import norms


@dataclass(frozen=True)
class VarGossip(DPSGD):
    """D-PSGD whose means keep the variance that the models had.

        T = sum_j W_ij T_j                          for each tensor of parameters, T_j what node j sends
        T <- mean(T) + (T - mean(T)) sqrt( (s + e) / (var(T) + e) )
        s: follow "self": var(T_i);  "others": the mean of var(T_j), j != i;  "both": c var(T_i) + (1 - c) the others'
        var: over the entries of a tensor, unbiased

    Averaging n models that have nothing in common divides the variance of their weights by n, and with it the signal
    that passes layers; the correction restores it. Tensors of one entry, of layers that normalise and, without
    ``biases``, of one dimension are averaged only; so is a tensor without variance. Its nodes begin with models of
    their own (start "own"); of models that are alike it changes little, of equal ones nothing but roundings.

    Source: Tian, Al-Ars, Kitsak, Hofstee, "Vanishing Variance Problem in Fully Decentralized Neural-Network Systems",
    2024 (arXiv 2404.04616), and its official simulator. Deviations: e = 0 by default, not 1e-4, which restores only
    63 % of the variance of weights with standard deviation 0.05 and 16 nodes; means have the topology's weights.
    """

    name = "vargossip"
    source = "Tian et al., arXiv"
    year = 2024

    start: Literal["common", "own"] = option("own", "one initial model for all nodes, or each its own")
    follow: Literal["self", "others", "both"] = option("self", "whose variance a mean gets")
    own_share: Annotated[float, Ge(0), Le(1)] = option(0.5, "c: weight of the own variance", Search(0.0, 1.0, False))
    epsilon_var: Annotated[float, Ge(0)] = option(0.0, "e: added to both variances")
    biases: bool = option(True, "correct tensors of one dimension too")

    def mean(self, site: Site, inbox: Inbox) -> Weights:
        """The corrected mean."""
        plain, skipped = super().mean(site, inbox), norms.parameters(site.borrow().module)
        params = {}
        for name, tensor in plain.params.items():
            sent = {node: model.params[name] for node, model in inbox.messages.items()}
            fits = tensor.numel() > 1 and name not in skipped and (self.biases or tensor.ndim > 1)
            params[name] = self._corrected(tensor, sent, site.id) if fits else tensor
        return Weights(params, plain.buffers)

    def _corrected(self, mean: Tensor, sent: dict[int, Tensor], own: int) -> Tensor:
        variances = {node: float(tensor.double().var()) for node, tensor in sent.items()}
        others = [value for node, value in variances.items() if node != own]
        share = {"self": 1.0, "others": 0.0, "both": self.own_share}[self.follow] if others else 1.0
        target = share * variances[own] + (1 - share) * (math.fsum(others) / len(others) if others else 0.0)
        there = float(mean.double().var())
        if there + self.epsilon_var == 0 or there == target:
            return mean
        middle = mean.mean()
        return (mean - middle) * math.sqrt((target + self.epsilon_var) / (there + self.epsilon_var)) + middle

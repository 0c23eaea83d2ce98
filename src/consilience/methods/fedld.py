"""FedLD: margins held back at clients, and updates combined along their principal directions (Zeng et al., 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from consilience.core import tree as tr
from consilience.core.fit import Batch, Models, Plan
from consilience.core.messages import Reply
from consilience.core.method import Method, Needs, Phase, keep_buffers
from consilience.core.model import Weights
from consilience.core.site import Host, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree


@dataclass(frozen=True)
class FedLD(Method):
    """FedAvg with a penalty on sure predictions, whose server trusts the directions that most updates share.

        client: loss = CE + lam log(1 + ||P||^2),   P: class probabilities of a whole batch ("row": mean of rows)
        server, for each parameter of d numbers, G = (Delta_1 .. Delta_m) of shape (m, d):
            (1/m) G G' = U diag(s) U',  s descending;   w_j = G' u_j,  j = 1 .. k = max(1, floor(kappa m))
            x <- x + sum_i p_i sum_j (s_j / sum s) ||Delta_i|| dir_ij

    dir_ij is the unit vector of the projection of Delta_i on w_j ("project"; none where that is 0), or w_j / ||w_j||
    turned to where most clients point, the same for all of them ("align"; a tie goes to the sum of the updates).
    "span" is the plain projection, sum_j <Delta_i, w_j> w_j / ||w_j||^2, without new lengths. Round 1, parameters of
    one number, and a lone update are combined by the plain mean.

    lam = 0 with directions "mean" is FedAvg (form "delta") bit for bit; "span" with kappa = 1 is it in exact
    arithmetic.

    Source: Zeng, Guo, Wang, Wang, Zhou, Qu, "Tackling Data Heterogeneity in Federated Learning via Loss Decomposition",
    MICCAI 2024, and its official code. That turns w_j to the majority but then projects on it, which the sign does not
    change: "project" is what it does, "align" what the turn is for. Deviations: buffers are averaged; k is at least 1.
    """

    name = "fedld"
    family = "skewed data"
    source = "Zeng et al., MICCAI"
    year = 2024
    confidence = "medium"
    needs = Needs(classification=True, loss=True)
    unstacked = "the loss looks at a whole batch"

    lam: Annotated[float, Ge(0)] = option(0.1, "weight of the margin's penalty", Search(0.01, 1.0))
    kappa: Annotated[float, Gt(0), Le(1)] = option(0.8, "share of the directions that are kept")
    directions: Literal["project", "align", "span", "mean"] = option("project", "how updates follow the directions")
    norm: Literal["batch", "row"] = option("batch", "||P||^2 over the whole batch, or its mean over rows")
    weights: Literal["samples", "uniform"] = option("uniform", "p_i: n_i / sum n, or equal")
    form: Literal["delta"] = option("delta", "clients send differences")

    def plan(self, site: Site, message: Tree, state: Tree) -> Plan:
        """Cross-entropy and the penalty."""
        if not self.lam:
            return Plan()

        def loss(model: Models, batch: Batch) -> Tensor:
            scores = model(batch.x)
            return site.task.loss(scores, batch.y) + self.lam * margin(scores, by_row=self.norm == "row")

        return Plan(loss=loss)

    def aggregate(
        self, phase: Phase, host: Host, server: Tree, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Tree:
        """Combine along principal directions."""
        if self.directions == "mean" or len(replies) == 1 or not host.version:
            return super().aggregate(phase, host, server, replies, cohort)
        shares = self.shares(replies)
        delta = self.mean_delta(replies, shares)
        for name, plain in delta.items():
            if plain.numel() > 1:
                updates = torch.stack([reply.update.delta[name].flatten() for reply in replies])
                found = principal(updates.double(), shares, self.kappa, self.directions)
                delta[name] = found.reshape(plain.shape).to(plain.dtype)
        params = tr.add(server.model.params, delta)
        return server._replace(model=keep_buffers(Weights(params, self.mean_buffers(replies, shares)), server.model))


def margin(scores: Tensor, *, by_row: bool = False) -> Tensor:
    """log(1 + ||softmax(scores)||^2), over all of ``(b, classes)`` or the mean over rows."""
    square = scores.softmax(1).square().sum()
    return torch.log1p(square / len(scores) if by_row else square)


def principal(updates: Tensor, shares: Sequence[float], kappa: float, directions: str) -> Tensor:
    """The combined update ``(d,)`` of ``(m, d)``, see :class:`FedLD`; zeros if all of them are."""
    m = len(updates)
    values, vectors = torch.linalg.eigh(updates @ updates.T / m)
    k = max(1, math.floor(kappa * m + 1e-9))
    s, u = values.flip(0), vectors.flip(1)[:, :k]
    if not s[0]:
        return torch.zeros_like(updates[0])
    p = torch.tensor(shares, dtype=updates.dtype)
    w = u.T @ updates
    if directions == "span":  # <Delta_i, w_j> = m s_j u_ij, and ||w_j||^2 = m s_j
        plain: Tensor = (p @ torch.where(s[:k] > _least(s), u, 0.0)) @ w
        return plain
    lengths = w.norm(dim=1)
    unit = torch.where(s[:k, None] > _least(s), w / lengths.clamp_min(torch.finfo(w.dtype).tiny)[:, None], 0.0)
    sides = torch.where(u.abs() > 1e-12, u.sign(), 0.0)
    if directions == "align":
        votes = sides.sum(0)
        sides = torch.where(votes == 0, u.sum(0).sign(), votes.sign()).expand_as(u)
    found: Tensor = ((p * updates.norm(dim=1)) @ sides * (s[:k] / s.sum())) @ unit
    return found


def _least(s: Tensor) -> Tensor:
    """Below it an eigenvalue is rounding."""
    return s[0] * len(s) * torch.finfo(s.dtype).eps

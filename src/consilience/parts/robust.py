"""Aggregators against hostile clients that choose or clip whole updates, and what stands in front of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.core.reduce import weighted_sum
from consilience.parts.aggregating import Aggregator, Reweighed, vectors_of


def _order(vectors: Tensor) -> list[int]:
    """Rows in an order that depends on what they hold alone, so that ties do not depend on who came first."""
    keys = [row.numpy().tobytes() for row in vectors]
    return sorted(range(len(keys)), key=keys.__getitem__)


def squares(vectors: Tensor) -> Tensor:
    """||u_i - u_j||^2, ``(n, n)``: each from its two rows alone, so that an order of rows changes no bit."""
    found = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for i in range(len(vectors)):
        for j in range(i + 1, len(vectors)):
            found[i, j] = found[j, i] = (vectors[i] - vectors[j]).square().sum()
    return found


def hostile(share: float, n: int) -> int:
    """How many of ``n`` a share is: floor(F n)."""
    return math.floor(share * n + 1e-9)


@dataclass
class MultiKrum(Reweighed):
    """The weighted mean of the n - f updates with the least scores (``single``: Krum, the one with the least alone);

        score_i = sum of ||u_i - u_j||^2 over the n - f - 2 (at least one) other updates nearest to u_i,  f = floor(F n)

    Equal scores are ordered by the updates' own numbers. F = 0 takes all: the weighted mean, bit for bit.

    Source: Blanchard, El Mhamdi, Guerraoui, Stainer, "Machine Learning with Adversaries: Byzantine Tolerant Gradient
    Descent", NeurIPS 2017. The paper asks for n > 2 f + 2; with fewer there is no promise.
    """

    share: float
    single: bool = False

    def weights(self, vectors: Tensor, shares: Sequence[float]) -> list[float]:
        """The chosen ones' shares, normalised."""
        n, f = len(vectors), hostile(self.share, len(vectors))
        taken = 1 if self.single else n - f
        if taken == n:
            return list(shares)
        order = _order(vectors)
        near = squares(vectors).fill_diagonal_(math.inf).sort(dim=1).values[:, : max(1, n - f - 2)]
        score = near.sum(1).tolist()
        chosen = set(sorted(order, key=lambda i: score[i])[:taken])
        total = math.fsum(shares[i] for i in chosen)
        return [share / total if i in chosen else 0.0 for i, share in enumerate(shares)]


@dataclass
class CentredClipping(Reweighed):
    """A mean of updates that are clipped around a centre:

        v <- v + sum_i p_i min(1, tau / ||u_i - v||) (u_i - v)      three times

    from the update whose distances to all others have the least sum. tau: a norm; by default the median distance to the
    centre, anew in each step. tau = infinity is the mean.

    Source: Karimireddy, He, Jaggi, "Learning from History for Byzantine Robust Optimization", ICML 2021. Deviations:
    the paper begins at the last round's result, and has one tau for a run; here a round stands for itself.
    """

    radius: float | None = None

    def weights(self, vectors: Tensor, shares: Sequence[float]) -> list[float]:
        """v as a weighted mean of the updates."""
        order = _order(vectors)
        rows, given = vectors[order], torch.tensor([shares[i] for i in order], dtype=torch.float64)
        sums = squares(rows).sqrt().sort(dim=1).values.sum(1)
        beta = torch.zeros(len(rows), dtype=torch.float64)
        beta[int(sums.argmin())] = 1.0
        for _ in range(3):
            away = torch.linalg.vector_norm(rows - beta @ rows, dim=1)
            tau = float(away.median()) if self.radius is None else self.radius
            kept = given * torch.where(away > tau, tau / away.clamp(min=1e-300), torch.ones_like(away))
            beta = beta * (1 - kept.sum()) + kept
        found = [0.0] * len(shares)
        for i, b in zip(order, beta.tolist(), strict=True):
            found[i] = b
        return found


class Mean(Reweighed):
    """The weighted mean, behind what mixes updates first."""

    def weights(self, vectors: Tensor, shares: Sequence[float]) -> list[float]:
        """The shares."""
        return list(shares)


@dataclass
class Bucketing(Aggregator):
    """Updates are shuffled and put together by ``size``; each bucket's weighted mean counts with the sum of its
    weights. Updates that differ between honest clients are so made more alike, while one hostile update in a bucket
    spoils it whole: F must be taken ``size`` times as large behind it. size = 1 changes nothing but the order.

    Source: Karimireddy, He, Jaggi, "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", ICLR 2022.
    """

    inner: Aggregator
    size: int

    def combine(
        self, updates: Sequence[Any], weights: Mapping[str, Sequence[float]], rng: np.random.Generator | None = None
    ) -> Any:
        """The inner rule's result of the buckets, shuffled by ``rng`` (None: in the order given)."""
        order = np.arange(len(updates)) if rng is None else rng.permutation(len(updates))
        buckets = [sorted(map(int, order[i : i + self.size])) for i in range(0, len(order), self.size)]
        made = []
        for bucket in buckets:
            fields = {}
            for name in updates[0]._fields:
                own = [weights[name][i] for i in bucket]
                shares = [w / math.fsum(own) for w in own] if math.fsum(own) else [1 / len(own)] * len(own)
                fields[name] = weighted_sum([getattr(updates[i], name) for i in bucket], shares)
            made.append(type(updates[0])(**fields))
        sums = {name: [math.fsum(own[i] for i in bucket) for bucket in buckets] for name, own in weights.items()}
        return self.inner.combine(made, sums, rng)


@dataclass
class NearestMixing(Aggregator):
    """Each update is replaced by the mean of the n - f updates nearest to it, itself included, f = floor(F n); weights
    stay as they are. F = 0 makes all of them the mean.

    Source: Allouah, Farhadkhani, Guerraoui, Gupta, Pinot, Stephan, "Fixing by Mixing: A Recipe for Optimal Byzantine ML
    under Heterogeneity", AISTATS 2023.
    """

    inner: Aggregator
    share: float

    def combine(
        self, updates: Sequence[Any], weights: Mapping[str, Sequence[float]], rng: np.random.Generator | None = None
    ) -> Any:
        """The inner rule's result of the mixed updates."""
        vectors = vectors_of(updates)
        order, away = _order(vectors), squares(vectors).tolist()
        kept = len(updates) - hostile(self.share, len(updates))
        made = []
        for i in range(len(updates)):
            # itself first: an equal update at distance 0 must not take its place
            near = sorted(order, key=lambda j, row=away[i], own=i: (row[j], j != own))[:kept]  # type: ignore[misc]
            made.append(weighted_sum([updates[j] for j in sorted(near)], [1 / kept] * kept))
        return self.inner.combine(made, weights, rng)

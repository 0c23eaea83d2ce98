"""How updates combine, by name: weighted means, robust ones, and Jacobian descent, which takes clients as objectives.

An aggregator is given what several clients sent and a weight for each, and gives one of the same kind. There are two
kinds: those that find new weights for whole updates (``krum``, ``multikrum``, ``rfa``, ``cclip``, ``upgrad``,
``mgda``), and those that look at every coordinate by itself (``median``, ``trimmed``).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.core import tree as tr
from consilience.core.errors import ConfigError, nearest
from consilience.core.tree import Tree
from consilience.parts import jacobian, robust
from consilience.parts.aggregating import Aggregator, Reweighed

NAMES = ("mean", "median", "trimmed", "krum", "multikrum", "rfa", "cclip", "upgrad", "mgda", "torchjd")
"""Names of all aggregators; ``bucketing`` and ``nnm`` go in front."""
SHARE = "0.2"
"""F where none is given."""


def parse(text: str) -> Aggregator | None:
    """The aggregator that ``--aggregator`` names, as in ``bucketing:2+krum:0.2``, which ``bucketing+krum`` is too; None
    for the mean. Raises ConfigError."""
    *before, rule = text.split("+")
    found = _rule(rule, text)
    if found is None and before:
        found = robust.Mean()
    for part in reversed(before):
        name, _, rest = part.partition(":")
        assert found is not None
        if name == "bucketing":
            size = rest or "2"
            if not size.isdigit() or int(size) < 1:
                raise ConfigError(f"aggregator '{text}': bucketing:S puts S updates together, from 1 on")
            found = robust.Bucketing(found, int(size))
        elif name == "nnm":
            share = _share(rest or SHARE, text, "nnm:F leaves out the share F of updates farthest")
            found = robust.NearestMixing(found, share)
        else:
            raise ConfigError(
                f"aggregator '{text}': '{name}' does not go in front{nearest(name, ('bucketing', 'nnm'))}"
            )
    return found


def _rule(part: str, text: str) -> Aggregator | None:
    name, _, rest = part.partition(":")
    if name not in NAMES:
        raise ConfigError(f"unknown aggregator '{name}'{nearest(name, NAMES)}")
    if name == "trimmed":
        return Trimmed(_share(rest, text, "trimmed:F cuts a share F of clients at each end"))
    if name in ("krum", "multikrum"):
        share = _share(rest or SHARE, text, f"{name}:F expects a share F of hostile clients")
        return robust.MultiKrum(share, name == "krum")
    if name == "cclip":
        try:
            radius = float(rest) if rest else None
        except ValueError:
            radius = math.nan
        if radius is not None and not radius > 0:
            raise ConfigError(f"aggregator '{text}': cclip:TAU clips to a norm TAU, above 0")
        return robust.CentredClipping(radius)
    if name == "torchjd":
        return jacobian.parse(rest, text)
    if rest:
        raise ConfigError(f"aggregator '{text}': {name} takes no number")
    return {"mean": None, "median": Median(), "rfa": GeometricMedian(), "upgrad": UPGrad(), "mgda": MGDA()}[name]


def _share(rest: str, text: str, words: str) -> float:
    """A share F from 0 to below 0.5."""
    try:
        share = float(rest)
    except ValueError:
        share = math.nan
    if not 0 <= share < 0.5:
        raise ConfigError(f"aggregator '{text}': {words}, from 0 to below 0.5")
    return share


# --- coordinate by coordinate ----------------------------------------------------------------------------------


class _Coordinates(Aggregator):
    """Looks at every floating number by itself. Integers (step counters) are those of the first update."""

    def combine(
        self, updates: Sequence[Any], weights: Mapping[str, Sequence[float]], rng: np.random.Generator | None = None
    ) -> Any:
        """Each field, times the sum of its weights."""
        made = {}
        for field in updates[0]._fields:
            total = math.fsum(weights[field])
            shares = [w / total for w in weights[field]]
            columns = [getattr(update, field) for update in updates]
            made[field] = tr.tree_map(lambda *leaves, s=shares, t=total: self._leaf(leaves, s, t), *columns)
        return type(updates[0])(**made)

    def _leaf(self, leaves: Sequence[Tree], shares: Sequence[float], total: float) -> Tree:
        first = leaves[0]
        if not isinstance(first, Tensor) or not first.is_floating_point():
            return first
        middle = self.middle(torch.stack([leaf.flatten() for leaf in leaves]), shares).reshape(first.shape)
        return middle if abs(total - 1) < 1e-12 else middle * total

    @abstractmethod
    def middle(self, rows: Tensor, shares: Sequence[float]) -> Tensor:
        """``(d,)`` from ``(n, d)``; shares sum to 1."""


class Median(_Coordinates):
    """In each coordinate a weighted median: half of the weight is at or below it, half at or above. Where any point
    between two values is one, their midpoint is taken, so that equal weights give the usual median.

    Source: Yin, Chen, Ramchandran, Bartlett, "Byzantine-Robust Distributed Learning", ICML 2018 (equal weights).
    """

    def middle(self, rows: Tensor, shares: Sequence[float]) -> Tensor:
        """The weighted median of each column."""
        ordered, order = rows.sort(dim=0, stable=True)
        below = torch.tensor(shares, dtype=torch.float64)[order].cumsum(0)
        low = (below < 0.5 - 1e-9).sum(0, keepdim=True)
        high = (below <= 0.5 + 1e-9).sum(0, keepdim=True).clamp(max=len(rows) - 1)
        lower = ordered.gather(0, low)[0]
        return torch.where(low[0] == high[0], lower, (lower + ordered.gather(0, high)[0]) / 2)


@dataclass
class Trimmed(_Coordinates):
    """In each coordinate the weighted mean of what is left without the floor(F n) least and as many greatest values.

    F = 0 is the weighted mean, in exact arithmetic. Source: Yin et al., ICML 2018 (equal weights).
    """

    share: float

    def middle(self, rows: Tensor, shares: Sequence[float]) -> Tensor:
        """The trimmed mean of each column."""
        cut = math.floor(self.share * len(rows) + 1e-9)
        ordered, order = rows.sort(dim=0, stable=True)
        own = torch.tensor(shares, dtype=torch.float64)[order].to(rows.dtype)
        total, weight = torch.zeros_like(rows[0]), torch.zeros_like(rows[0])
        for value, share in zip(ordered[cut : len(rows) - cut], own[cut : len(rows) - cut], strict=True):
            total.addcmul_(value, share)
            weight.add_(share)
        return total / weight


# --- new weights for whole updates -----------------------------------------------------------------------------


class GeometricMedian(Reweighed):
    """RFA: the point whose weighted distances to the updates have the least sum, by smoothed Weiszfeld steps

        beta_i = p_i / max(nu, ||z - u_i||),   z <- sum_i beta_i u_i / sum_i beta_i

    from the mean, until no weight moves by more than 1e-10 and z by more than that times the distances' median (at
    most 500 steps): a weight of 1e-10 is still too much for an update of size 1e30.

    Source: Pillutla, Kakade, Harchaoui, "Robust Aggregation for Federated Learning", IEEE TSP 2022; nu = 1e-6, times
    the distances' median. Deviation: the paper stops after 3 steps, which need the clients' help there.
    """

    def weights(self, vectors: Tensor, shares: Sequence[float]) -> list[float]:
        """beta_i, normalised."""
        given = torch.tensor(shares, dtype=torch.float64)
        beta = given
        for _ in range(500):
            distances = torch.linalg.vector_norm(vectors - beta @ vectors, dim=1)
            least = 1e-6 * float(distances.median()) or 1e-12 * float(distances.max())
            if not least:
                break
            new = given / distances.clamp(min=least)
            new = new / new.sum()
            step, beta = new - beta, new
            moved = torch.linalg.vector_norm(step @ vectors)
            if step.abs().max() < 1e-10 and moved <= 1e-10 * distances.median():
                break
        return [float(b) for b in beta]


def _root(vectors: Tensor) -> np.ndarray:
    """A matrix L with L^T L = the Gramian of the vectors, scaled so that its mean diagonal is 1."""
    gram = (vectors @ vectors.T).numpy()
    size = float(np.trace(gram)) / len(gram)
    values, basis = np.linalg.eigh(gram / size if size else gram)
    root: np.ndarray = np.sqrt(values.clip(0))[:, None] * basis.T
    return root


def _least(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """argmin ||matrix v - wanted|| over v >= 0."""
    from scipy.optimize import nnls  # type: ignore[import-untyped]

    found: np.ndarray = nnls(matrix, wanted)[0]
    return found


class UPGrad(Reweighed):
    """Each update is projected on the cone of directions that no client objects to; the weighted sum of these:

        w_i = argmin v^T G v over v >= p_i e_i componentwise,   G = the Gramian;   sum_j (sum_i w_i)_j u_j

    The result has a nonnegative product with every update, and is the mean where no two updates conflict.

    Source: Quinton, Rey, "Jacobian Descent for Multi-Objective Optimization", 2024. Here the problems are solved as
    nonnegative least squares, exactly.
    """

    differences = True

    def weights(self, vectors: Tensor, shares: Sequence[float]) -> list[float]:
        """sum_i w_i."""
        root = _root(vectors)
        total = np.array(shares)
        for column, share in zip(root.T, shares, strict=True):
            total += _least(root, -share * column)
        return [float(w) for w in total]


class MGDA(Reweighed):
    """The shortest vector among all weighted means of the updates, whatever their weights were.

    Source: Desideri, "Multiple-gradient descent algorithm", C. R. Acad. Sci. Paris 2012. Solved exactly, as nonnegative
    least squares.
    """

    differences = True

    def weights(self, vectors: Tensor, shares: Sequence[float]) -> list[float]:
        """Weights on the simplex: v / sum v, v = argmin_{v >= 0} ||L v||^2 + (1 - sum v)^2, whose conditions for a
        minimum are those of the shortest mean."""
        root = np.vstack([_root(vectors), np.ones(len(vectors))])
        found = _least(root, np.eye(len(root))[-1])
        return [float(w) for w in found / found.sum()]

"""Methods over several federations: ranks, Friedman's test, and the critical difference (Demsar, JMLR 2006)."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

from consilience.core.errors import ConfigError

WORK = 2e7
"""The exact distribution is computed up to about so many additions."""


@dataclass(frozen=True)
class Ranks:
    """Mean ranks over federations, 1 best.

    order: methods by mean rank. ranks: federation, then method. statistic, p: Friedman's test; exact says whether p
    is its exact one or that of Iman and Davenport's F. smallest: the smallest p that so many federations and methods
    can give. critical: Nemenyi's critical difference of mean ranks at ``alpha``. cliques: maximal stretches of
    methods whose mean ranks lie within it.
    """

    order: list[str]
    mean: dict[str, float]
    ranks: dict[str, dict[str, float]]
    statistic: float
    p: float
    exact: bool
    smallest: float
    critical: float
    alpha: float
    cliques: list[list[str]]

    @property
    def could_find(self) -> bool:
        """Whether any two methods could lie further apart than the critical difference."""
        return self.critical < len(self.order) - 1


def rank_methods(scores: Mapping[str, Mapping[str, float]], *, lower: bool = False, alpha: float = 0.05) -> Ranks:
    """Ranks of ``scores[federation][method]`` (means over seeds), ties sharing the mean of their ranks.

    Federations count as independent, seeds within one do not: they are averaged before. Raises ConfigError below two
    federations or two methods, or where a federation lacks a method.
    """
    numpy, stats = importlib.import_module("numpy"), importlib.import_module("scipy.stats")
    federations = list(scores)
    methods = sorted({m for own in scores.values() for m in own})
    n, k = len(federations), len(methods)
    if n < 2 or k < 2:
        raise ConfigError(f"ranks over federations need two of them and two methods; there are {n} and {k}")
    for federation in federations:
        missing = [m for m in methods if m not in scores[federation]]
        if missing:
            raise ConfigError(f"federation '{federation}' has no score of '{missing[0]}'")
    sign = 1.0 if lower else -1.0
    table = numpy.array([stats.rankdata([sign * scores[f][m] for m in methods]) for f in federations])
    tied = any(len(set(row)) < k for row in table.tolist())
    statistic = friedman_statistic(table)
    smallest = float(math.factorial(k)) ** (1 - n)
    exact = not tied and _affordable(n, k)
    p = exact_p(statistic, n, k) if exact else max(smallest, _iman_davenport(statistic, n, k, stats))
    mean = {m: float(v) for m, v in zip(methods, table.mean(0), strict=True)}
    order = sorted(methods, key=lambda m: (mean[m], m))
    critical = critical_difference(k, n, alpha)
    return Ranks(
        order,
        mean,
        {f: dict(zip(methods, row, strict=True)) for f, row in zip(federations, table.tolist(), strict=True)},
        statistic,
        p,
        exact,
        smallest,
        critical,
        alpha,
        _cliques(order, mean, critical),
    )


def friedman_statistic(ranks: Any) -> float:
    """Friedman's chi-square of ranks ``(federations, methods)``, corrected for ties (Friedman, 1937)."""
    n, k = ranks.shape
    spread = float(((ranks.mean(0) - (k + 1) / 2) ** 2).sum())
    within = float(((ranks - (k + 1) / 2) ** 2).sum()) / (n * (k - 1))
    return n * spread / within if within else 0.0


def _iman_davenport(statistic: float, n: int, k: int, stats: Any) -> float:
    """p of the F that Iman and Davenport (1980) made of Friedman's statistic."""
    rest = n * (k - 1) - statistic
    return 0.0 if rest <= 1e-12 else float(stats.f.sf((n - 1) * statistic / rest, k - 1, (k - 1) * (n - 1)))


def _affordable(n: int, k: int) -> bool:
    return k <= 6 and ((k - 1) * n + 1.0) ** (k - 1) * math.factorial(k) * n <= WORK


def exact_p(statistic: float, n: int, k: int) -> float:
    """P(Friedman's statistic >= ``statistic``) when every order of k methods is as likely on each of n federations.

    The distribution of the rank sums of all methods but the last (which they decide), one federation after another.
    """
    numpy = importlib.import_module("numpy")
    size = (k - 1) * n + 1  # sums of ranks counted from 0
    weights = numpy.zeros((size,) * (k - 1))
    weights[(0,) * (k - 1)] = 1.0
    for _ in range(n):
        after = numpy.zeros_like(weights)
        for order in permutations(range(k)):
            moved = tuple(slice(r, None) for r in order[:-1])
            stayed = tuple(slice(None, size - r) for r in order[:-1])
            after[moved] += weights[stayed]
        weights = after / math.factorial(k)
    sums = numpy.indices(weights.shape).reshape(k - 1, -1).astype(float)
    sums = numpy.vstack([sums, n * k * (k - 1) / 2 - sums.sum(0)]) + n
    values = 12 / (n * k * (k + 1)) * (sums**2).sum(0) - 3 * n * (k + 1)
    return min(1.0, float(weights.ravel()[values >= statistic - 1e-9].sum()))


def critical_difference(methods: int, federations: int, alpha: float = 0.05) -> float:
    """Nemenyi's critical difference of mean ranks: q sqrt(k (k + 1) / (6 N)), q that of the studentised range over
    sqrt 2 (Demsar 2006, section 3.2.2)."""
    stats = importlib.import_module("scipy.stats")
    q = float(stats.studentized_range.ppf(1 - alpha, methods, math.inf)) / math.sqrt(2)
    return q * math.sqrt(methods * (methods + 1) / (6 * federations))


def _cliques(order: list[str], mean: Mapping[str, float], critical: float) -> list[list[str]]:
    found: list[list[str]] = []
    reached = 0
    for start, end in product(range(len(order)), reversed(range(len(order) + 1))):
        if end - start >= 2 and end > reached and mean[order[end - 1]] - mean[order[start]] <= critical:
            found.append(order[start:end])
            reached = end
    return found

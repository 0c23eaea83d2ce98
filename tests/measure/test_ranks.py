"""Ranks over federations against scipy, published critical values, and enumeration."""

from __future__ import annotations

import math
import random
from itertools import permutations, product

import numpy as np
import pytest
import scipy.stats

from consilience.core.errors import ConfigError
from consilience.measure.ranks import critical_difference, exact_p, friedman_statistic, rank_methods


def drawn(n: int, k: int, seed: int, ties: bool = False) -> dict[str, dict[str, float]]:
    rng = random.Random(seed)
    return {f"f{i}": {f"m{j}": round(rng.random() + 0.2 * j, 1 if ties else 9) for j in range(k)} for i in range(n)}


@pytest.mark.parametrize(("n", "k", "ties"), [(5, 3, False), (8, 4, True), (12, 5, False), (6, 6, True)])
def test_friedman_is_scipys(n: int, k: int, ties: bool) -> None:
    scores = drawn(n, k, n + k, ties)
    found = rank_methods(scores)
    columns = [[own[f"m{j}"] for own in scores.values()] for j in range(k)]
    assert found.statistic == pytest.approx(scipy.stats.friedmanchisquare(*columns).statistic)


# Demsar 2006, table 5 (a): critical values at 0.05 of the two-tailed Nemenyi test
@pytest.mark.parametrize(
    ("k", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850), (7, 2.949), (10, 3.164)]
)
def test_critical_values(k: int, q: float) -> None:
    assert critical_difference(k, 14) == pytest.approx(q * math.sqrt(k * (k + 1) / (6 * 14)), rel=5e-4)


@pytest.mark.parametrize(("n", "k"), [(3, 3), (4, 3), (2, 4), (5, 2)])
def test_exact_p_by_enumeration(n: int, k: int) -> None:
    orders = [np.array(o) + 1.0 for o in permutations(range(k))]
    values = np.array([friedman_statistic(np.array(rows)) for rows in product(orders, repeat=n)])
    for value in sorted(set(values.round(9))):
        assert exact_p(value, n, k) == pytest.approx((values >= value - 1e-9).mean())


def test_agreement_gives_the_smallest_p() -> None:
    scores = {f"f{i}": {"a": 0.9 + i / 100, "b": 0.8, "c": 0.7} for i in range(4)}
    found = rank_methods(scores)
    assert found.order == ["a", "b", "c"]
    assert found.exact
    assert found.p == pytest.approx(found.smallest) == pytest.approx(6.0**-3)
    assert rank_methods(scores, lower=True).order == ["c", "b", "a"]


def test_cliques_and_power() -> None:
    scores = {f"f{i}": {"a": 4, "b": 3, "c": 2, "d": 1} for i in range(12)}
    found = rank_methods(scores)  # type: ignore[arg-type]
    assert 1 < found.critical < 2
    assert found.cliques == [["a", "b"], ["b", "c"], ["c", "d"]]
    assert found.could_find
    few = rank_methods({k: scores[k] for k in ("f0", "f1")})  # type: ignore[arg-type]
    assert not few.could_find
    assert few.cliques == [["a", "b", "c", "d"]]


def test_what_cannot_be_ranked() -> None:
    with pytest.raises(ConfigError, match="two of them"):
        rank_methods({"f": {"a": 1, "b": 2}})
    with pytest.raises(ConfigError, match="'g' has no score of 'b'"):
        rank_methods({"f": {"a": 1, "b": 2}, "g": {"a": 1}})

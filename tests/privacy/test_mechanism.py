"""Epsilon against closed forms and numerical integration, and who is drawn."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.special import log_ndtr

from consilience.core.errors import ConfigError
from consilience.privacy.mechanism import Fixed, Mechanism, Poisson, Tree, make


def balle_wang(mu: float, epsilon: float) -> float:
    """Delta of a Gaussian mechanism with sensitivity / sigma = mu (Balle and Wang, 2018, theorem 8)."""
    first, second = -epsilon / mu + mu / 2, -epsilon / mu - mu / 2
    return float(math.exp(log_ndtr(first)) - math.exp(epsilon + log_ndtr(second)))


def test_epsilon_is_that_of_the_analytic_gaussian_mechanism_on_300_configurations() -> None:
    """Where it is exact: delta at the epsilon that is told is the delta that was asked for."""
    grid = list(itertools.product((0.6, 1.0, 2.0, 5.0, 20.0), (1, 3, 10, 50, 200), (1e-3, 1e-5, 1e-6, 1e-9)))
    seen = 0
    for noise, rounds, delta in grid:
        for mechanism, times, factor in (
            (Poisson(100, 100, rounds), rounds, 1.0),
            (Fixed(100, 100, rounds), rounds, 2.0),
            (Tree(100, 10, rounds), sum(n.bit_length() for n in [10] * (rounds // 10) + [rounds % 10]), 1.0),
        ):
            mu = factor * math.sqrt(times) / noise
            epsilon = mechanism.epsilon(noise, rounds, delta)
            if balle_wang(mu, 0.0) <= delta:
                assert epsilon == 0
            elif epsilon < 600:  # beyond, exp(epsilon) is no number
                assert balle_wang(mu, epsilon) == pytest.approx(delta, rel=1e-3), (mechanism, noise, delta)
            seen += 1
    assert seen == 300


def sampled_delta(q: float, noise: float, epsilon: float) -> float:
    """Delta of one Poisson-sampled Gaussian: both directions' hockey sticks by Gauss-Legendre quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(16)
    edges = np.linspace(-12 * noise, 12 * noise + 1, 4001)
    half = (edges[1] - edges[0]) / 2
    x = (edges[:-1, None] + half + half * nodes).ravel()
    without = np.exp(-0.5 * (x / noise) ** 2) / (noise * math.sqrt(2 * math.pi))
    having = (1 - q) * without + q * np.exp(-0.5 * ((x - 1) / noise) ** 2) / (noise * math.sqrt(2 * math.pi))
    both = [np.maximum(0, p - math.exp(epsilon) * r) for p, r in ((having, without), (without, having))]
    return max(float((f.reshape(-1, 16) @ weights).sum() * half) for f in both)


@pytest.mark.parametrize("q", [0.01, 0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("noise", [0.7, 1.0, 2.0, 4.0])
def test_one_sampled_round_is_what_integration_gives(q: float, noise: float) -> None:
    """20 configurations, independent of dp-accounting; what is told is never too little, and hardly too much."""
    delta = 1e-5
    told = Poisson(1000, round(1000 * q), 1).epsilon(noise, 1, delta)
    assert sampled_delta(q, noise, told) <= delta * (1 + 1e-6)
    assert told < 0.02 or sampled_delta(q, noise, told - 0.01) > delta


@pytest.mark.parametrize(("q", "noise", "rounds"), [(1, 1.0, 20), (5, 0.8, 100), (20, 2.0, 50), (50, 4.0, 30)])
def test_renyi_is_never_below(q: int, noise: float, rounds: int) -> None:
    mechanism = Poisson(100, q, rounds)
    for delta in (1e-4, 1e-6, 1e-8):
        assert mechanism.renyi(noise, rounds, delta) >= mechanism.epsilon(noise, rounds, delta) * (1 - 1e-6)


@pytest.mark.parametrize("name", ["poisson", "fixed", "tree"])
@pytest.mark.parametrize("epsilon", [0.5, 8.0])
def test_the_noise_is_just_enough(name: str, epsilon: float) -> None:
    mechanism = make(name, 200, 20, 30)
    noise = mechanism.solve(epsilon, 1e-5)
    assert mechanism.epsilon(noise, 30, 1e-5) <= epsilon
    assert mechanism.epsilon(noise * 0.99, 30, 1e-5) > epsilon


def test_more_releases_cost_more_and_a_second_one_of_a_round_is_not_amplified() -> None:
    for mechanism in (Poisson(100, 10, 5), Fixed(100, 10, 5), Tree(100, 10, 5)):
        costs = [mechanism.epsilon(1.0, n, 1e-5) for n in range(6)]
        assert costs[0] == 0
        assert all(a <= b for a, b in itertools.pairwise(costs))
        assert costs[5] > costs[1]
        assert mechanism.epsilon(1.0, 4, 1e-5, again=1) > mechanism.epsilon(1.0, 5, 1e-5)


def test_no_noise_promises_nothing() -> None:
    assert all(m.epsilon(0.0, 1, 1e-5) == math.inf for m in (Poisson(10, 5, 1), Fixed(10, 5, 1), Tree(10, 5, 1)))


def test_draws_are_those_that_are_accounted() -> None:
    ids = np.arange(3, 43)
    poisson = [len(Poisson(40, 8, 1, seed=7).draw(v, ids)) for v in range(2000)]
    assert np.mean(poisson) == pytest.approx(8, abs=4 * math.sqrt(6.4 / 2000))
    assert np.var(poisson) == pytest.approx(40 * 0.2 * 0.8, rel=0.15)  # binomial: a fixed size would have none
    assert {len(set(Fixed(40, 8, 1).draw(v, ids))) for v in range(50)} == {8}
    tree = Tree(40, 9, 1)
    for epoch in range(3):
        asked = [c for at in range(tree.epoch) for c in tree.draw(epoch * tree.epoch + at, ids)]
        assert len(asked) == len(set(asked)) == 36  # nobody twice
    assert Poisson(40, 8, 1).draw(3, ids) == Poisson(40, 8, 1).draw(3, ids)


def test_bad_values() -> None:
    with pytest.raises(ConfigError, match="did you mean 'poisson'"):
        make("poison", 10, 1, 1)
    with pytest.raises(ConfigError, match="no noise"):
        Tree(10, 10, 10**6).solve(1e-4, 1e-9)
    assert isinstance(make("tree", 10, 20, 1), Mechanism)

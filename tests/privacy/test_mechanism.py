"""Epsilon against closed forms, numerical integration, and planted canaries."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.special import log_ndtr
from scipy.stats import beta

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


def lower_bound(present: np.ndarray, absent: np.ndarray, delta: float) -> float:
    """Epsilon that the two samples of a canary's score prove, at 99.9 % (Clopper and Pearson), by thresholds chosen
    on one half and judged on the other."""
    half = len(present) // 2
    best, at = 0.0, 0.0
    for threshold in np.quantile(np.concatenate([present[:half], absent[:half]]), np.linspace(0.01, 0.99, 99)):
        tpr, fpr = np.mean(present[:half] > threshold), np.mean(absent[:half] > threshold)
        value = math.log(max(tpr - delta, 1e-9) / (fpr + 5 / half))
        if value > best:
            best, at = value, threshold
    hits, wrong, n = int((present[half:] > at).sum()), int((absent[half:] > at).sum()), len(present) - half
    low = beta.ppf(0.0005, hits, n - hits + 1) if hits else 0.0
    high = beta.ppf(0.9995, wrong + 1, n - wrong) if wrong < n else 1.0
    return math.log(max(low - delta, 1e-12) / high)


TRIALS = 20_000


def canary(noise: float, rounds: int, *, clip: float = 1.0, reused: bool = False, shuffled: int = 0) -> float:
    """Epsilon that a client along one direction proves, on a mechanism that may be broken. shuffled: rounds are
    batches of a shuffle of so many: the client is in exactly one."""
    rng = np.random.default_rng(1)
    drawn = rng.standard_normal((TRIALS, 2, 1 if reused else rounds)) * noise
    there = np.full((TRIALS, rounds), clip)
    if shuffled:
        there = np.zeros((TRIALS, rounds))
        there[np.arange(TRIALS), rng.integers(shuffled, size=TRIALS)] = clip
    seen = np.broadcast_to(drawn[:, 0], (TRIALS, rounds)) + there
    absent = np.broadcast_to(drawn[:, 1], (TRIALS, rounds))
    if reused:  # who knows a client's absence in one round takes the noise of another away
        seen = seen - np.concatenate([np.zeros((TRIALS, 1)), seen[:, 1:] - clip], 1)
        absent = absent - np.concatenate([np.zeros((TRIALS, 1)), absent[:, 1:]], 1)
    score = np.log(np.exp(seen / noise**2).mean(1)) if shuffled else seen.mean(1)
    other = np.log(np.exp(absent / noise**2).mean(1)) if shuffled else absent.mean(1)
    return lower_bound(score, other, 1e-5)


def test_canaries_never_prove_more_and_find_planted_bugs() -> None:
    told = Poisson(10, 10, 4).epsilon(2.0, 4, 1e-5)
    assert 0.5 < canary(2.0, 4) <= told
    assert canary(2.0, 4, clip=8.0) > told  # no clipping
    assert canary(0.5, 4) > told  # a quarter of the noise
    shuffled = Poisson(10, 1, 10).epsilon(0.25, 10, 1e-5)
    assert canary(0.25, 10, shuffled=10) < Poisson(10, 10, 1).epsilon(0.25, 1, 1e-5)
    assert shuffled > 0


def test_bad_values() -> None:
    with pytest.raises(ConfigError, match="did you mean 'poisson'"):
        make("poison", 10, 1, 1)
    with pytest.raises(ConfigError, match="no noise"):
        Tree(10, 10, 10**6).solve(1e-4, 1e-9)
    assert isinstance(make("tree", 10, 20, 1), Mechanism)

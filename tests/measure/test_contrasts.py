"""Differences from a reference: the sign-flip test against scipy's and by hand, corrections, and what they can give."""

from __future__ import annotations

import math
import random
from itertools import product
from statistics import fmean

import pytest
import scipy.stats

from consilience.measure.contrasts import differences, sign_flip_test, smallest_p
from consilience.measure.statistics import bca_interval, holm, paired_test, t_interval


def naive(gaps: list[float]) -> float:
    found = [abs(sum(s * g for s, g in zip(signs, gaps, strict=True))) for signs in product((1, -1), repeat=len(gaps))]
    return sum(f >= abs(sum(gaps)) - 1e-12 for f in found) / len(found)


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_sign_flips_are_all_tried(n: int) -> None:
    rng = random.Random(n)
    for _ in range(10):
        gaps = [rng.gauss(0.5, 1) for _ in range(n)]
        assert sign_flip_test(gaps) == pytest.approx(naive(gaps))


def test_sign_flips_are_scipys_permutation_test() -> None:
    rng = random.Random(1)
    a, b = [rng.gauss(0.3, 1) for _ in range(9)], [rng.gauss(0, 1) for _ in range(9)]
    expected = scipy.stats.permutation_test(
        (a, b), lambda x, y: fmean(x) - fmean(y), permutation_type="samples", n_resamples=10_000
    )
    assert sign_flip_test([x - y for x, y in zip(a, b, strict=True)]) == pytest.approx(expected.pvalue)


def test_the_smallest_p_is_reached_and_not_undercut() -> None:
    for n in range(2, 10):
        assert sign_flip_test([1.0 + i for i in range(n)]) == smallest_p(n) == 2.0 ** (1 - n)
    assert smallest_p(5, 4) == 0.25
    assert smallest_p(2, 9) == 1.0
    assert math.isnan(smallest_p(1))
    assert math.isnan(sign_flip_test([0.3]))
    assert sign_flip_test([0.0, 0.0, 0.0]) == 1.0


def test_many_pairs_are_drawn_and_repeat() -> None:
    rng = random.Random(3)
    gaps = [rng.gauss(0.4, 1) for _ in range(30)]
    assert sign_flip_test(gaps) == sign_flip_test(gaps)
    assert sign_flip_test(gaps) == pytest.approx(scipy.stats.ttest_1samp(gaps, 0).pvalue, abs=0.01)
    assert sign_flip_test([1.0] * 30) == smallest_p(30) == 1e-5


def test_differences_are_paired_by_seed() -> None:
    scores = {
        "base": {0: 0.70, 1: 0.60, 2: 0.80},
        "good": {0: 0.75, 1: 0.66, 2: 0.84, 7: 0.1},  # seed 7 has no partner
        "same": {0: 0.71, 1: 0.59, 2: 0.80},
        "lone": {5: 0.9},
    }
    found = differences(scores, "base")
    assert set(found) == {"good", "same", "lone"}
    good = found["good"]
    assert good.pairs == 3
    assert good.mean == pytest.approx(0.05)
    assert good.interval == pytest.approx(t_interval([0.05, 0.06, 0.04]))
    raw = [paired_test([0.75, 0.66, 0.84], [0.7, 0.6, 0.8]), paired_test([0.71, 0.59, 0.8], [0.7, 0.6, 0.8])]
    assert [good.p_holm, found["same"].p_holm] == pytest.approx(holm(raw))
    assert good.p_exact == 0.25
    assert good.p_exact_holm == good.p_smallest == 0.5
    assert math.isnan(found["lone"].p)
    assert found["lone"].interval is None
    assert differences(scores, "absent")["good"].pairs == 0


def covered(draw: object, interval: object, n: int, trials: int, mean: float) -> float:
    rng = random.Random(n)
    hits = 0
    for _ in range(trials):
        low, high = interval([draw(rng) for _ in range(n)])  # type: ignore[operator]
        hits += low <= mean <= high
    return hits / trials


@pytest.mark.slow
def test_coverage_of_intervals() -> None:
    """Why t below 20 values and BCa above: coverage of nominal 95 % intervals, of normal and of skewed scores."""

    def normal(rng: random.Random) -> float:
        return rng.gauss(0, 1)

    def skewed(rng: random.Random) -> float:
        return rng.expovariate(1.0)

    def bca(values: list[float]) -> tuple[float, float]:
        return bca_interval(values, resamples=999)

    for n in (3, 5, 10):
        assert covered(normal, t_interval, n, 2000, 0.0) == pytest.approx(0.95, abs=0.015)
    assert covered(normal, bca, 3, 800, 0.0) < 0.80
    assert covered(normal, bca, 5, 800, 0.0) < 0.90
    for n in (20, 40):
        assert covered(normal, bca, n, 800, 0.0) > 0.91
        assert covered(skewed, bca, n, 800, 1.0) > 0.88


@pytest.mark.slow
def test_tests_keep_their_level() -> None:
    """Under no difference, Holm's t-tests against a reference find one in at most about 5 of 100 comparisons, and
    sign flips in no more."""
    rng = random.Random(0)
    wrong = [0, 0]
    trials = 1500
    for _ in range(trials):
        scores = {m: {s: rng.gauss(0, 1) for s in range(8)} for m in "abcd"}
        found = differences(scores, "a").values()
        wrong[0] += any(d.p_holm < 0.05 for d in found)
        wrong[1] += any(d.p_exact_holm < 0.05 for d in found)
    assert wrong[0] / trials < 0.065
    assert wrong[1] / trials < 0.065

"""Distances against naive references and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from consilience.measure.distances import jensen_shannon, plane, sliced_wasserstein


@given(hnp.arrays(np.int64, (4, 3), elements=st.integers(0, 20)))
def test_jensen_shannon_is_a_bounded_symmetric_divergence(counts: np.ndarray) -> None:
    found = jensen_shannon(counts)
    assert (found == found.T).all()
    assert ((found >= 0) & (found <= 1)).all()
    assert (np.diag(found) == 0).all()
    if counts[0].sum() and counts[1].sum():
        p, q = counts[0] / counts[0].sum(), counts[1] / counts[1].sum()
        m = (p + q) / 2
        kl = [sum(a * math.log2(a / b) for a, b in zip(r, m, strict=True) if a > 0) for r in (p, q)]
        assert found[0, 1] == pytest.approx(sum(kl) / 2, abs=1e-9)


def test_jensen_shannon_of_strangers_is_one_bit() -> None:
    assert jensen_shannon(np.array([[3, 0], [0, 5]]))[0, 1] == pytest.approx(1.0)
    assert jensen_shannon(np.array([[1, 1], [0, 0]]))[0, 1] == 0.0  # nothing is known of the second


def test_a_shift_is_measured_exactly() -> None:
    """W2 of a shift by v is |v|, and sliced it is |v| / sqrt(d): the control variates leave no randomness."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 20))
    v = rng.standard_normal(20)
    both, group = np.concatenate([x, x + v]), np.repeat([0, 1], 400)
    for seed in range(3):
        found = sliced_wasserstein(both, group, 2, np.random.default_rng(seed))
        assert found[0, 1] == pytest.approx(np.linalg.norm(v) / math.sqrt(20), rel=1e-6)


def test_control_variates_make_it_less_random() -> None:
    """Against the plain mean over directions, over twenty draws of directions."""
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((300, 6)) * np.array([3, 2, 1, 1, 1, 0.2]), rng.exponential(1.0, (300, 6))
    x, group = np.concatenate([a, b]), np.repeat([0, 1], 300)
    levels = (np.arange(32) + 0.5) / 32

    def plain(seed: int, count: int) -> float:
        theta = np.random.default_rng(seed).standard_normal((count, 6))
        theta /= np.linalg.norm(theta, axis=1, keepdims=True)
        q = [np.quantile(part @ theta.T, levels, axis=0) for part in (a, b)]
        return math.sqrt(((q[0] - q[1]) ** 2).mean())

    truth = plain(99, 20_000)
    ours = [float(sliced_wasserstein(x, group, 2, np.random.default_rng(s))[0, 1]) for s in range(20)]
    naive = [plain(s, 64) for s in range(20)]

    def error(values: list[float]) -> float:
        return float(np.sqrt(np.mean((np.array(values) - truth) ** 2)))

    assert error(ours) < 0.5 * error(naive)
    assert error(ours) < 0.02 * truth


def test_one_dimension_needs_no_directions() -> None:
    x = np.array([[0.0], [1.0], [5.0], [6.0]])
    assert sliced_wasserstein(x, np.array([0, 0, 1, 1]), 3, np.random.default_rng(0))[0, 1] == pytest.approx(5.0)
    assert np.isnan(sliced_wasserstein(x, np.array([0, 0, 1, 1]), 3, np.random.default_rng(0))[0, 2])


def test_plane_keeps_distances_of_a_plane() -> None:
    points = np.random.default_rng(2).standard_normal((7, 2))
    distance = np.linalg.norm(points[:, None] - points, axis=2)
    found = plane(distance)
    assert np.linalg.norm(found[:, None] - found, axis=2) == pytest.approx(distance, abs=1e-9)
    assert (plane(np.zeros((3, 3))) == 0).all()

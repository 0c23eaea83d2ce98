"""The decomposition against the paper's canonical examples, a grid search, and identities that it must keep."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.core.errors import DataError
from consilience.measure.decomposition import Disparities, decompose, unique_information


def law(p: Callable[[int, int], dict[int, float]]) -> np.ndarray:
    """P[z, p, s] of binary variables, from the masses of each prediction for z and s."""
    out = np.zeros((2, 2, 2))
    for z in (0, 1):
        for s in (0, 1):
            for prediction, mass in p(z, s).items():
                out[z, prediction, s] += mass
    return out


def skewed(z: int, s: int) -> float:
    """P(z, s) where nine of ten of a group are with the client of its number."""
    return 0.45 if z == s else 0.05


def noisy(value: int, mass: float, flip: float) -> dict[int, float]:
    return {value: mass * (1 - flip), 1 - value: mass * flip}


H9 = 0.5310044064107188  # 1 - H(0.9)
QUARTER = 0.31127812445913283  # H(1/4) - 1/2

# (global, local, unique, redundant, masked): the canonical examples of the paper, then further exact ones
EXACT = {
    "unique": (law(lambda z, s: {z: 0.25}), (1, 1, 1, 0, 0)),
    "redundant": (law(lambda z, s: {z: 0.5 * (z == s)}), (1, 0, 0, 1, 0)),
    "masked": (law(lambda z, s: {z ^ s: 0.25}), (0, 1, 0, 0, 1)),
    "and": (law(lambda z, s: {z & s: 0.25}), (QUARTER, 0.5, QUARTER, 0, 0.5 - QUARTER)),
    "90/10": (law(lambda z, s: {s: skewed(z, s)}), (H9, 0, 0, H9, 0)),
    "sex itself, 90/10": (law(lambda z, s: {z: skewed(z, s)}), (1, 1 - H9, 1 - H9, H9, 0)),
    "noisy unique": (law(lambda z, s: noisy(z, 0.25, 0.1)), (H9, H9, H9, 0, 0)),
    "noisy masked": (law(lambda z, s: noisy(z ^ s, 0.25, 0.1)), (0, H9, 0, 0, H9)),
}


def values(d: Disparities) -> tuple[float, ...]:
    return d.global_, d.local, d.unique, d.redundant, d.masked


@pytest.mark.parametrize("name", EXACT)
def test_canonical_examples(name: str) -> None:
    p, expected = EXACT[name]
    found = decompose(p)
    assert values(found) == pytest.approx(expected, abs=1e-8)
    assert found.gap <= 1e-9
    assert values(decompose(1000 * p)) == pytest.approx(values(found), abs=1e-12)


def test_a_law_on_which_a_local_solver_goes_wrong() -> None:
    p = [0.158196, 0.067004, 0.010176, 0.004105, 0.201984, 0.226692, 0.150664, 0.181178]
    found = decompose(np.array(p).reshape(2, 2, 2))
    assert values(found) == pytest.approx((0.1009, 0.0962, 0.0699, 0.0310, 0.0263), abs=5.1e-5)


def naive_information(p: np.ndarray) -> float:
    """I(Z;P|S) by a loop over all cells."""
    total = 0.0
    for z, y, s in np.ndindex(p.shape):
        if p[z, y, s] > 0:
            ratio = p[z, y, s] * p[:, :, s].sum() / (p[z, :, s].sum() * p[:, y, s].sum())
            total += p[z, y, s] * np.log2(ratio)
    return total


def searched(p: np.ndarray) -> float:
    """The least I_Q(Z;P|S) of a binary law: one free number for each group, on finer and finer grids."""
    zp, zs = p.sum(axis=2), p.sum(axis=1)
    low = np.maximum(0, zp[:, 1] + zs[:, 1] - zp.sum(axis=1))
    high = np.minimum(zp[:, 1], zs[:, 1])
    best, centre, width = np.inf, (low + high) / 2, high - low
    for _ in range(9):
        axes = [
            np.clip(np.linspace(centre[z] - width[z] / 2, centre[z] + width[z] / 2, 21), low[z], high[z])
            for z in (0, 1)
        ]
        for a in axes[0]:
            for b in axes[1]:
                q = np.empty((2, 2, 2))
                q[:, 1, 1] = (a, b)
                q[:, 1, 0] = zp[:, 1] - q[:, 1, 1]
                q[:, 0, 1] = zs[:, 1] - q[:, 1, 1]
                q[:, 0, 0] = zp[:, 0] - q[:, 0, 1]
                value = naive_information(np.maximum(q, 0))
                if value < best:
                    best, point = value, (a, b)
        centre, width = np.array(point), width / 4
    return best


@pytest.mark.parametrize("seed", range(6))
def test_unique_is_what_a_grid_search_finds(seed: int) -> None:
    p = np.random.default_rng(seed).dirichlet(np.ones(8)).reshape(2, 2, 2)
    assert decompose(p).unique == pytest.approx(searched(p), abs=2e-7)


counts = st.tuples(st.integers(2, 4), st.integers(2, 3), st.integers(1, 6)).flatmap(
    lambda shape: st.lists(st.integers(0, 9), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))).map(
        lambda flat: np.array(flat, dtype=float).reshape(shape)
    )
)


@settings(max_examples=40, deadline=None)
@given(counts, st.randoms())
def test_identities(p: np.ndarray, random: object) -> None:
    if not p.sum():
        with pytest.raises(DataError):
            decompose(p)
        return
    found = decompose(p)
    assert found.gap <= 1e-6  # 1e-9 but for laws with many empty cells
    assert min(found.unique, found.redundant, found.masked) >= -1e-9
    assert found.unique <= min(found.global_, found.local) + 1e-12
    # redundant - masked is the co-information, which needs no optimisation
    q = p / p.sum()
    of_clients = naive_information(q.transpose(0, 2, 1).sum(axis=2)[:, :, None])
    given_prediction = naive_information(q.transpose(0, 2, 1))
    assert found.redundant - found.masked == pytest.approx(of_clients - given_prediction, abs=1e-9)
    assert found.local == pytest.approx(naive_information(q), abs=1e-12)
    order = np.random.default_rng(random.randint(0, 99)).permutation(p.shape[2])  # type: ignore[attr-defined]
    assert values(decompose(p[:, :, order])) == pytest.approx(values(found), abs=2e-6)


def test_a_law_of_few_cells_keeps_its_marginals() -> None:
    """Where rounding moved the law away from its marginals, the value fell below the least there is, 1 / 3."""
    p = np.zeros((3, 3, 3))
    for cell in ((1, 0, 2), (1, 1, 2), (2, 1, 0), (2, 2, 1)):
        p[cell] = 1
    p[2, 2, 2] = 2
    for order in ((0, 1, 2), (0, 2, 1), (2, 1, 0)):
        found = decompose(p[:, :, order])
        assert found.gap <= 1e-6
        assert found.unique == pytest.approx(1 / 3, abs=1e-6)


def test_one_client_has_nothing_redundant_or_masked() -> None:
    found = decompose(np.array([[5.0, 1.0], [2.0, 9.0]])[:, :, None])
    assert values(found)[3:] == pytest.approx((0, 0), abs=1e-8)


def test_many_clients() -> None:
    p = np.random.default_rng(0).integers(0, 20, (3, 2, 300)).astype(float)
    found = decompose(p)
    assert found.gap <= 1e-8
    assert 0 <= found.unique <= found.global_ < found.local


@pytest.mark.parametrize("seed", range(5))
def test_the_gap_is_honest(seed: int) -> None:
    """Stopped early, the value is above the least by no more than the gap that it comes with."""
    p = np.random.default_rng(seed).dirichlet(np.ones(24)).reshape(2, 3, 4)
    least, _ = unique_information(p)
    for tolerance in (1e-1, 1e-2, 1e-3):
        value, gap = unique_information(p, tolerance)
        assert gap <= tolerance
        assert -1e-9 <= value - least <= gap

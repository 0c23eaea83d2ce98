"""Information of tables against enumeration, and against what the tables were drawn from."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from consilience.measure.information import (
    bounded,
    chance,
    entropy,
    label_information,
    mutual_information,
    quantity_skew,
)

TABLES = hnp.arrays(np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.integers(0, 9))


def naive_information(p: np.ndarray) -> float:
    """By enumeration of all cells."""
    p = p / p.sum()
    total = 0.0
    for i in range(p.shape[0]):
        for j in range(p.shape[1]):
            if p[i, j] > 0:
                total += p[i, j] * math.log2(p[i, j] / (p[i].sum() * p[:, j].sum()))
    return total


@given(TABLES)
def test_plug_in_is_the_sum_over_cells(table: np.ndarray) -> None:
    if table.sum():
        assert mutual_information(table) == pytest.approx(max(naive_information(table), 0.0), abs=1e-9)
        stacked = mutual_information(np.stack([table, table.T[::-1].T]))
        assert stacked[0] == pytest.approx(stacked[1], abs=1e-9)


def test_known_values() -> None:
    assert mutual_information(np.eye(4)) == pytest.approx(2.0)
    assert mutual_information(np.ones((3, 5))) == pytest.approx(0.0, abs=1e-12)
    # the table of the sheet: 0.0566330 nats
    assert mutual_information(np.array([[2, 1], [1, 2]])) == pytest.approx(0.0566330 / math.log(2), abs=1e-6)
    assert entropy(np.array([1, 1, 2])) == pytest.approx(1.5)
    assert entropy(np.zeros(3)) == 0.0


@given(TABLES)
def test_estimates_are_possible(table: np.ndarray) -> None:
    found = label_information(table, np.random.default_rng(0), draws=20)
    assert 0 <= found.low <= found.high <= found.max
    assert 0 <= found.value <= found.max
    assert found.max <= math.log2(max(min(table.shape), 1)) + 1e-9


def test_chance_is_the_bias_of_independent_variables() -> None:
    rng = np.random.default_rng(3)
    table = rng.multinomial(50, np.full(10, 0.1), size=20)
    # Miller 1955, to first order: (rows - 1) (columns - 1) / (2 n ln 2)
    assert chance(table, rng, 50) == pytest.approx(19 * 9 / (2 * 1000 * math.log(2)), rel=0.1)


@pytest.mark.parametrize("rows", [50, 400])
@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_mixtures_of_labels(alpha: float, rows: int) -> None:
    """Clients with known label distributions: the bias is small, and intervals hold the truth."""
    rng = np.random.default_rng(11)
    errors, inside = [], 0
    for _ in range(20):
        law = rng.dirichlet(np.full(8, alpha), size=12)
        truth = naive_information(law)
        found = label_information(np.stack([rng.multinomial(rows, p) for p in law]), rng)
        errors.append(found.value - truth)
        inside += found.low <= truth <= found.high
    spread = float(np.std(errors))
    assert abs(np.mean(errors)) < 0.01 + 2 * spread / math.sqrt(20)
    assert inside >= 15  # 19 expected; fewer than 15 would be rarer than one in a thousand


def test_iid_reads_nothing() -> None:
    rng = np.random.default_rng(5)
    zero, values = 0, []
    for _ in range(40):
        found = label_information(rng.multinomial(40, np.full(10, 0.1), size=20), rng, draws=100)
        zero += found.low == 0.0
        values.append(found.value)
    assert zero >= 33  # 39 expected: only the upper tail leaves 0
    assert np.mean(values) < 0.02


def test_quantity() -> None:
    assert quantity_skew(np.array([7, 7, 7, 7])).value == 0.0
    found = quantity_skew(np.array([6, 2]))
    assert found.value == found.low == found.high == pytest.approx(1 - (0.75 * math.log2(4 / 3) + 0.25 * 2))
    assert found.max == 1.0
    assert bounded(3.0, -1.0, 9.0, 2.0) == (2.0, 0.0, 2.0, 2.0)

"""Mixing weights."""

from __future__ import annotations

import math

import pytest

from consilience.core.errors import ConfigError
from consilience.fleet.topology import NAMES, mixing, neighbours

SIZES = (1, 2, 3, 4, 7, 12, 16, 49)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", SIZES)
def test_rows_and_columns_sum_to_one(name: str, n: int) -> None:
    weights = mixing(name, n)
    assert list(weights) == list(range(n))
    for i, row in weights.items():
        assert list(row) == sorted(row)  # summed in node order
        assert i in row
        assert min(row.values()) > 0
        assert math.fsum(row.values()) == pytest.approx(1, abs=1e-15 * n)
        assert math.fsum(weights[j].get(i, 0.0) for j in weights) == pytest.approx(1, abs=1e-15 * n)
        assert all(weights[j][i] == pytest.approx(w, abs=1e-15) for j, w in row.items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", SIZES)
def test_everybody_is_reached(name: str, n: int) -> None:
    around = neighbours(name, n)
    assert all(i not in near for i, near in enumerate(around))
    reached, frontier = {0}, {0}
    while frontier:
        frontier = set().union(*(around[i] for i in frontier)) - reached
        reached |= frontier
    assert reached == set(range(n))


@pytest.mark.parametrize("n", SIZES)
def test_a_complete_graph_weighs_exactly_alike(n: int) -> None:
    assert mixing("complete", n) == {i: dict.fromkeys(range(n), 1 / n) for i in range(n)}


def test_shapes() -> None:
    assert [len(near) for near in neighbours("ring", 6)] == [2] * 6
    assert [len(near) for near in neighbours("star", 5)] == [4, 1, 1, 1, 1]
    assert [len(near) for near in neighbours("torus", 12)] == [4] * 12
    assert neighbours("exponential", 16)[0] == {1, 2, 4, 8, 12, 14, 15}
    assert mixing("ring", 5)[0] == pytest.approx({0: 1 / 3, 1: 1 / 3, 4: 1 / 3})
    assert mixing("star", 4)[1] == pytest.approx({0: 1 / 4, 1: 3 / 4})
    with pytest.raises(ConfigError, match="did you mean 'ring'"):
        mixing("rings", 4)

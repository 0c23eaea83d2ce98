"""Mixing weights."""

from __future__ import annotations

import math

import numpy as np
import pytest

from consilience.core.errors import ConfigError, DataError
from consilience.fleet.topology import NAMES, components, mixing, neighbours, spectral_gap, summary

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


DRAWN = ("regular:3", "er:0.5", "smallworld:4:0.3", "smallworld:2:0", "regular:9")


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("rule", ["metropolis", "uniform"])
def test_drawn_graphs_are_connected_and_mixed_fairly(name: str, rule: str) -> None:
    for seed in range(5):
        around = neighbours(name, 10, seed)
        assert components(around) == 1
        assert all(i in around[j] for i in range(10) for j in around[i])
        assert around == neighbours(name, 10, seed)
        weights = mixing(name, 10, rule, seed)
        for i, row in weights.items():
            assert math.fsum(row.values()) == pytest.approx(1, abs=1e-14)
            assert min(row.values()) > 0 or (rule == "uniform" and row[i] >= 0)
            assert all(weights[j][i] == w for j, w in row.items() if j != i)
    assert [neighbours("er:0.5", 10, s) for s in range(3)] != [neighbours("er:0.5", 10, s) for s in range(3, 6)]


def test_degrees() -> None:
    assert {len(near) for near in neighbours("regular:3", 20, 1)} == {3}
    assert neighbours("smallworld:2:0", 7, 0) == neighbours("ring", 7)
    assert sum(map(len, neighbours("smallworld:4:0.5", 20, 2))) == 80
    assert mixing("regular:9", 10) == mixing("complete", 10)
    assert mixing("star", 4, "uniform")[1] == pytest.approx({0: 1 / 4, 1: 3 / 4})
    assert mixing("ring", 5, "uniform") == mixing("ring", 5)


def test_spectral_gap() -> None:
    assert spectral_gap(mixing("complete", 6)) == pytest.approx(1)
    ring = [abs(1 / 3 + 2 / 3 * math.cos(2 * math.pi * k / 8)) for k in range(1, 8)]
    assert spectral_gap(mixing("ring", 8)) == pytest.approx(1 - max(ring))
    assert spectral_gap(mixing("ring", 1)) == 1
    found = summary("torus", 12)
    assert (found["nodes"], found["edges"], found["parts"]) == (12, 24, 1)


def test_one_mixing_shrinks_disagreement_by_the_gap() -> None:
    weights = mixing("regular:3", 12, "metropolis", 4)
    matrix = np.array([[weights[i].get(j, 0.0) for j in range(12)] for i in range(12)])
    rng = np.random.default_rng(0)
    for _ in range(20):
        x = rng.standard_normal(12)
        x -= x.mean()
        assert np.linalg.norm(matrix @ x) <= (1 - spectral_gap(weights)) * np.linalg.norm(x) * (1 + 1e-12)


def test_a_file_of_edges(tmp_path: object) -> None:
    path = tmp_path / "graph.txt"  # type: ignore[operator]
    path.write_text("# two pairs\n0 1\n2,3\n")
    assert neighbours(str(path), 4) == [{1}, {0}, {3}, {2}]
    assert spectral_gap(mixing(str(path), 4)) == 0
    assert summary(str(path), 4)["parts"] == 2
    for text, says in (
        ("0 4\n", "line 1: '0 4' is not two nodes of 0 to 3"),
        ("0 1\n\n1\n", "line 3"),
        ("2 2\n", "no neighbour of itself"),
        ("a b\n", "not two nodes"),
        ("# nothing\n", "no edges"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=says):
            neighbours(str(path), 4)


@pytest.mark.parametrize(
    "name",
    ["regular:3.5", "regular:12", "regular:3:1", "er:2", "er", "smallworld:3:0.1", "smallworld:4", "er:0.001",
     "regular:1", "nowhere.txt"],
)  # fmt: skip
def test_bad_topologies(name: str) -> None:
    with pytest.raises((ConfigError, DataError)) as found:
        neighbours(name, 11 if name == "regular:3.5" else 10)
    assert len(str(found.value).splitlines()) == 1

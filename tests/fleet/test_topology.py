"""Mixing weights."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest

from consilience.core.errors import ConfigError, DataError
from consilience.fleet.topology import NAMES, components, mixing, neighbours, spectral_gap
from consilience.fleet.varying import Topology, summary

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


def test_a_file_of_edges(tmp_path: Path) -> None:
    path = tmp_path / "graph.txt"
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


# --- weights that are given --------------------------------------------------------------------------------------


def test_weights_of_edges_and_of_a_matrix(tmp_path: Path) -> None:
    edges, matrix = tmp_path / "edges.txt", tmp_path / "matrix.csv"
    edges.write_text("# a path\n0 1 0.25\n2, 1, 0.5\n1 2 0.5\n")
    matrix.write_text("0.75,0.25,0,0\n0.25,0.25,0.5,0\n0,0.5,0.5,0\n0,0,0,1\n")
    wanted = {0: {0: 0.75, 1: 0.25}, 1: {0: 0.25, 1: 0.25, 2: 0.5}, 2: {1: 0.5, 2: 0.5}, 3: {3: 1.0}}
    for path in (edges, matrix):
        found = mixing(str(path), 4, "uniform")
        assert found == wanted
        assert [list(row) for row in found.values()] == [sorted(row) for row in found.values()]
        assert neighbours(str(path), 4) == [{1}, {0, 2}, {1}, set()]
        assert Topology(str(path), (0, 2, 4, 6)).at(3)[2] == {0: 0.25, 2: 0.25, 4: 0.5}
    matrix.write_text("0 1 0 0\n0 0 1 0\n0 0 0 1\n1 0 0 0\n")  # not symmetric, and all that D-PSGD needs
    assert mixing(str(matrix), 4)[3] == {0: 1.0, 3: 0.0}
    matrix.write_text("0.5 0.5\n0.5 0.5\n")
    assert mixing(str(matrix), 2) == mixing("complete", 2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0 1 -0.1\n", "line 1: '-0.1' is not a weight"),
        ("0 1 nan\n", "line 1: 'nan' is not a weight"),
        ("0 1 0.7\n\n1 2 0.4\n", "the weights at node 1 sum to 1.1; at most 1"),
        ("0 1 0.3\n1 0 0.2\n", "line 2: 0 and 1 have another weight above"),
        ("0 1 0.3\n1 2\n", "line 2: '1 2': give all edges a weight, or none"),
        ("0 1 0.3 4 5\n", "line 1: '0 1 0.3 4 5' is not two nodes of 0 to 3"),
        ("1 0 0 0\n0 1 0 0\n0 0 0.9 0\n0 0 0 1\n", "line 3: the weights sum to 0.9, not 1"),
        ("1 0 0 0\n1 0 0 0\n0 0 1 0\n0 0 0 1\n", "column 1 sums to 2, not 1"),
        ("1 0 0 0\n0 1 0 0\n0 -1 2 0\n0 0 0 1\n", "line 3: '-1' is not a weight"),
        ("1 0 0 0\n0 1 0 0\n0 0 1 0\n", "line 1: '1 0 0 0' is not two nodes"),
    ],
)
def test_bad_weights(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=says) as found:
        mixing(str(path), 4)
    assert len(str(found.value).splitlines()) == 1


# --- over time -----------------------------------------------------------------------------------------------------


def matrix(weights: object, n: int) -> np.ndarray:
    return np.array([[weights[i].get(j, 0.0) for j in range(n)] for i in range(n)])  # type: ignore[index]


CHANGES = ("onepeer", "matching", "matching:ring", "anew:er:0.2", "anew:regular:3", "ring*2,complete,none*3")


@pytest.mark.parametrize(
    ("name", "n"), [(name, n) for name in CHANGES for n in (1, 2, 6, 10) if n > 3 or "regular" not in name]
)
def test_every_round_is_doubly_stochastic_and_the_same_again(name: str, n: int) -> None:
    topology, again = Topology(name, tuple(range(n)), seed=3), Topology(name, tuple(range(n)), seed=3)
    rounds = [topology.at(t) for t in range(12)]
    for t, weights in enumerate(rounds):
        found = matrix(weights, n)
        assert found.min() >= 0
        np.testing.assert_allclose(found.sum(0), 1, atol=1e-15 * n)
        np.testing.assert_allclose(found.sum(1), 1, atol=1e-15 * n)
        assert all(list(row) == sorted(row) and i in row for i, row in weights.items())
        assert pickle.loads(pickle.dumps(again)).at(t) == weights
    if n == 10:
        assert len({str(weights) for weights in rounds}) > 1
    if n == 10 and name not in ("onepeer", "ring*2,complete,none*3"):
        assert [Topology(name, tuple(range(n)), seed=4).at(t) for t in range(12)] != rounds


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_one_peer_after_another_is_the_exact_mean(n: int) -> None:
    topology, x = Topology("onepeer", tuple(range(n))), np.eye(n)
    for t in range(2, 2 + int(math.log2(n))):  # from any round on
        x = matrix(topology.at(t), n) @ x
    assert (x == 1 / n).all()
    assert summary("onepeer", n)["spectral_gap"] == 1
    assert summary("onepeer", n)["most_degree"] == 1
    assert Topology("onepeer", tuple(range(6))).at(1)[5] == {1: 0.5, 5: 0.5}


def test_matchings_are_maximal_pairs_of_the_graph() -> None:
    around = neighbours("torus", 12)
    topology = Topology("matching:torus", tuple(range(12)), seed=1)
    met = set()
    for t in range(30):
        weights = topology.at(t)
        alone = [i for i, row in weights.items() if len(row) == 1]
        for i, row in weights.items():
            for j in set(row) - {i}:
                assert j in around[i]
                assert weights[j] == row == {min(i, j): 0.5, max(i, j): 0.5}
                met.add((i, j))
        assert not any(j in around[i] for i in alone for j in alone)
    assert met == {(i, j) for i in range(12) for j in around[i]}


def test_pulls_are_as_often_as_they_should_be() -> None:
    topology = Topology("pull:0.2", tuple(range(50)), seed=0)
    rows = [row for t in range(40) for row in topology.at(t).values()]
    assert np.mean([len(row) == 2 for row in rows]) == pytest.approx(0.2, abs=0.03)
    assert {math.fsum(row.values()) for row in rows} == {1.0}
    assert {j for row in rows for j in row} == set(range(50))
    assert Topology("pull:1", (4, 9)).at(0) == {4: {4: 0.5, 9: 0.5}, 9: {4: 0.5, 9: 0.5}}
    assert Topology("pull:0", (4, 9)).at(7) == {4: {4: 1.0}, 9: {9: 1.0}}


def test_a_plan_goes_from_one_topology_to_the_next() -> None:
    topology = Topology("none*2,ring,complete*3", tuple(range(7)))
    kinds = [len(topology.at(t)[0]) for t in range(13)]
    assert kinds == [1, 1, 3, 7, 7, 7, 1, 1, 3, 7, 7, 7, 1]
    assert topology.at(3) == mixing("complete", 7)
    assert not topology.static
    assert Topology("ring*5", tuple(range(7))).static
    about = summary("none*2,ring,complete*3", 7)
    assert (about["rounds"], about["edges"], about["least_degree"], about["most_degree"], about["parts"]) == (
        6, 21, 0, 6, 1
    )  # fmt: skip


def test_the_gap_of_graphs_that_change_is_that_of_their_product() -> None:
    one, two = mixing("ring", 8), mixing("torus", 8)
    product = matrix(one, 8) @ matrix(two, 8) - 1 / 8
    assert spectral_gap(one, two) == pytest.approx(1 - np.linalg.norm(product, 2) ** 0.5)
    assert spectral_gap(one, one, one) == pytest.approx(spectral_gap(one))
    assert summary("none", 5)["spectral_gap"] == 0
    assert "rounds" not in summary("none", 5)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("anew:ring", "a graph that is drawn"), ("anew:", "a graph that is drawn"), ("pull:2", "write pull:CHANCE"),
        ("pull", "write pull:CHANCE"), ("ring*0,none", "ROUNDS a whole number"), ("ring*x", "ROUNDS a whole number"),
        ("ring,rings", "did you mean 'ring'"), ("matching:rings", "did you mean 'ring'"),
        ("anew:regular:9", "10 nodes"), ("onepeers", "unknown topology"),
    ],
)  # fmt: skip
def test_bad_topologies_over_time(name: str, says: str) -> None:
    with pytest.raises(ConfigError) as found:
        Topology(name, tuple(range(10 if name != "anew:regular:9" else 9)))
    assert len(str(found.value).splitlines()) == 1
    if name != "anew:regular:9":
        assert says in str(found.value)

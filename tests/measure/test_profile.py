"""Profiles of federations: what each partitioner moves, which groups are found, and what is said of odd ones."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from helpers import federation as regression_parts

from consilience import methods
from consilience.core.errors import DataError
from consilience.core.federation import Task
from consilience.data.datasets import make_federation
from consilience.data.federation import from_arrays
from consilience.measure import nearest
from consilience.measure import profile as module
from consilience.measure.profile import profile

TERMS = ("label_skew", "feature_skew", "input_skew", "concept_shift", "total", "quantity_skew")


@cache
def digits(partition: str) -> dict[str, Any]:
    return profile(make_federation("digits", clients=10, partition=partition))


def bits(partition: str) -> dict[str, float]:
    return {name: row["value"] for name, row in digits(partition)["bits"].items()}


@pytest.mark.parametrize("partition", ["iid", "dirichlet:0.1", "rotate:4", "noise:0.5", "permute:4", "power:1"])
def test_numbers_are_possible_and_add_up(partition: str) -> None:
    found = digits(partition)
    assert tuple(found["bits"]) == TERMS
    for row in found["bits"].values():
        assert 0 <= row["low"] <= row["value"] <= row["high"] <= row["max"]
    assert all(row["holds"] for row in found["identities"])
    assert found["limits"]
    json.dumps(found, allow_nan=False)


def test_iid_moves_nothing() -> None:
    assert all(value < 0.02 for value in bits("iid").values())
    assert digits("iid")["clusters"]["count"] == 1


def test_label_skew_moves_labels_and_inputs_only_through_them() -> None:
    found = bits("dirichlet:0.1")
    assert found["label_skew"] > 1
    assert found["input_skew"] > 1  # digits tell their class
    assert found["feature_skew"] < 0.05
    assert found["concept_shift"] < 0.15  # digits hardly overlap


@pytest.mark.parametrize("partition", ["rotate:4", "noise:0.5"])
def test_changed_inputs_move_features(partition: str) -> None:
    found = bits(partition)
    assert found["feature_skew"] > 0.3
    assert found["input_skew"] == pytest.approx(found["feature_skew"], abs=0.1)
    assert found["label_skew"] < 0.02
    assert found["concept_shift"] < 0.1


def test_permuted_labels_move_concept_and_features_alike() -> None:
    found = bits("permute:4")
    assert found["concept_shift"] > 1.2
    assert found["concept_shift"] < 2  # groups of 3, 3, 2 and 2 clients: at most 1.97 bits
    assert found["feature_skew"] == pytest.approx(found["concept_shift"], abs=0.05)  # classes balance
    assert found["label_skew"] < 0.02
    assert found["input_skew"] < 0.02


def test_sizes_move_quantity_only() -> None:
    found = bits("power:1")
    assert found["quantity_skew"] > 0.2
    assert all(found[name] < 0.03 for name in TERMS if name != "quantity_skew")


@pytest.mark.parametrize("partition", ["permute:4", "rotate:4"])
def test_groups_are_found(partition: str) -> None:
    """The partitioner's own groups, which the profile is not told."""
    groups = make_federation("digits", clients=10, partition=partition).groups
    assert groups is not None
    truth = {frozenset(np.flatnonzero(np.array(groups) == g).tolist()) for g in set(groups)}
    assert {frozenset(members) for members in digits(partition)["clusters"]["members"]} == truth


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile draws few rows, where what it says of them does not matter."""
    monkeypatch.setattr(module, "ROWS", 300)


def test_the_same_seed_gives_the_same_numbers(few: None) -> None:
    federation = make_federation("digits", clients=4, partition="rotate:2")
    found = profile(federation, 3)
    assert found == profile(federation, 3)
    assert 250 <= found["federation"]["rows_used"] <= 350


def test_what_clients_hold() -> None:
    x, y = np.random.default_rng(0).standard_normal((60, 2)), np.repeat([0, 1, 2], 20)
    owner = np.where(y == 2, "b", np.where(np.arange(60) % 2, "a", "b"))
    made = from_arrays(x, y, partition="natural:site", columns={"site": owner}, classes="pqrs", test_fraction=0.0)
    found = profile(made)
    assert found["coverage"]["held_by_one"] == ["r"]
    assert found["coverage"]["missing"] == ["s"]
    assert found["coverage"]["clients_per_class"] == [2, 2, 1, 0]
    assert [row["name"] for row in found["clients"]] == ["a", "b"]
    assert [row["rows"] for row in found["clients"]] == [sum(row) for row in found["counts"]]
    assert "rows a client are few" in " ".join(found["limits"])


def test_unseen_clients_are_left_out() -> None:
    made = make_federation("digits", clients=5, unseen=2)
    found = profile(made)
    assert [row["client"] for row in found["clients"]] == made.seen.tolist()
    assert found["federation"]["clients"] == 3


def test_targets_are_binned() -> None:
    found = profile(make_federation("quadratic", clients=4))
    assert len(found["classes"]) == 10
    assert found["federation"]["labels"] == "bins of the target"
    assert any("bins" in text for text in found["limits"])
    assert profile(regression_parts(regression=True))["bits"]["label_skew"]["max"] > 0


def test_one_client_has_nobody_to_differ_from() -> None:
    found = profile(make_federation("digits", clients=1))
    assert all(row["value"] == row["max"] == 0 for row in found["bits"].values())
    assert found["limits"] == ["One client: there is nobody to differ from."]


def test_many_clients_are_sampled(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLIENTS", 6)
    monkeypatch.setattr(module, "MATRIX", 5)
    found = profile(make_federation("synthetic-ondemand", clients=1000))
    assert found["federation"]["clients"] == 1000
    assert found["federation"]["profiled"] == len(found["clients"]) == 6
    assert 250 <= found["federation"]["rows_used"] <= 350
    assert found["distances"]["label_js"]["matrix"] is None
    assert found["limits"][0] == "A random 6 of 1000 clients were looked at."


def test_a_task_without_labels_is_refused() -> None:
    made = regression_parts()
    made.task = Task("operator", 1)
    with pytest.raises(DataError, match="no labels or targets"):
        profile(made)


def test_the_benchmark_is_whole() -> None:
    made = nearest.benchmark()
    assert len(made["rows"]) >= 12
    assert len({row["id"] for row in made["rows"]}) == len(made["rows"])
    for row in made["rows"]:
        assert set(row["bits"]) == set(TERMS)
        assert set(row["accuracy"]) == set(row["interval"]) <= set(methods.NAMES)
        assert all(0 <= value <= 1 for value in row["accuracy"].values())


def test_suggestions_cite_the_nearest_rows() -> None:
    made = nearest.benchmark()
    for row in made["rows"]:
        asked = {"bits": row["bits"], "federation": {"profiled": row["clients"], "rows": row["rows"]}}
        found = nearest.suggest(asked)
        assert found["nearest"][0]["distance"] == 0
        near = [r for r in found["nearest"] if r["distance"] <= nearest.FAR]
        for advice in found["suggestions"]:
            behind = [max(r["accuracy"].values()) - r["accuracy"][advice["method"]] for r in near]
            assert advice["behind"] == pytest.approx(np.mean(behind), abs=1e-4)
            assert [cited["id"] for cited in advice["rows"]] == [r["id"] for r in near]
        order = [advice["behind"] for advice in found["suggestions"]]
        assert order == sorted(order)


def test_nothing_near_suggests_nothing() -> None:
    far = {name: {"value": 9.0, "max": 10.0} for name in TERMS}
    found = nearest.suggest({"bits": far, "federation": {"profiled": 10, "rows": 1000}})
    assert found["suggestions"] == []
    assert len(found["nearest"]) == nearest.NEAR

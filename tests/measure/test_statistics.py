"""Intervals and tests against scipy and naive references, and the leaderboard against hand-made runs."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import pytest
import scipy.stats

from consilience.measure.statistics import (
    bca_interval,
    compare_scores,
    final_scores,
    holm,
    last_clients,
    leaderboard,
    mean_interval,
    paired_test,
    t_interval,
)


@dataclass
class Run:
    label: str
    seed: int
    history: Sequence[Mapping[str, Any]]
    clients: Sequence[Mapping[str, Any]] = field(default_factory=list)


def line(score: float | None = None, mean: float | None = None, **more: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"round": 1, "wall_s": 2.0, "virtual_s": 0.0, "bytes_up": 10, "bytes_down": 30, "samples": 5}
    if score is not None:
        base["global"] = {"accuracy": score, "loss": 1 - score}
    if mean is not None:
        base["clients"] = {"mean": mean, "worst10": mean - 0.1, "std": 0.05, "jain": 0.9}
    return base | more


def test_t_interval_is_scipys() -> None:
    values = [0.71, 0.74, 0.69, 0.75, 0.73]
    expected = scipy.stats.t.interval(0.95, 4, fmean(values), scipy.stats.sem(values))
    assert t_interval(values) == pytest.approx(expected)
    assert t_interval(values, 0.5)[1] < t_interval(values)[1]
    with pytest.raises(ValueError, match="two values"):
        t_interval([0.5])


def test_bca_interval_is_near_scipys_and_repeats() -> None:
    rng = random.Random(1)
    values = [rng.expovariate(1.0) for _ in range(40)]
    low, high = bca_interval(values)
    expected = scipy.stats.bootstrap((values,), fmean, n_resamples=3000, method="BCa", vectorized=False)
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval), abs=0.05)
    assert bca_interval(values) == (low, high)
    assert bca_interval([0.5] * 25) == (0.5, 0.5)


def test_mean_interval_chooses_by_the_number_of_values() -> None:
    rng = random.Random(2)
    values = [rng.gauss(0, 1) for _ in range(20)]
    assert mean_interval(values[:19]) == t_interval(values[:19])
    assert mean_interval(values) == bca_interval(values)
    assert mean_interval(values[:1]) is None


def test_t_interval_covers_at_five_seeds() -> None:
    rng = random.Random(3)
    hits = 0
    for _ in range(400):
        low, high = t_interval([rng.gauss(0, 1) for _ in range(5)])
        hits += low <= 0 <= high
    assert 0.92 <= hits / 400 <= 0.98


def test_paired_test() -> None:
    a, b = [0.80, 0.83, 0.79, 0.85], [0.78, 0.80, 0.78, 0.81]
    assert paired_test(a, b) == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue)
    assert paired_test(a, b) == paired_test(b, a)
    assert paired_test(a, a) == 1.0
    assert math.isnan(paired_test([0.5], [0.4]))
    # the same difference in both seeds is no certainty
    assert paired_test([0.5, 0.6], [0.25, 0.35]) == 0.5
    with pytest.raises(ValueError, match="length"):
        paired_test([1.0], [1.0, 2.0])


def naive_holm(ps: list[float]) -> list[float]:
    out = []
    for p in ps:
        steps = [min(1.0, q * sum(r >= q for r in ps)) for q in ps if q <= p]
        out.append(max(steps))
    return out


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    rng = random.Random(4)
    for _ in range(50):
        ps = [rng.random() ** 3 for _ in range(6)]
        assert holm(ps) == pytest.approx(naive_holm(ps))
    adjusted = holm([0.02, math.nan, 0.03])
    assert adjusted[0] == pytest.approx(0.04)
    assert math.isnan(adjusted[1])


def test_compare_scores_ranks_and_cliques() -> None:
    rng = random.Random(5)
    noise = {s: rng.gauss(0, 0.02) for s in range(8)}
    scores = {
        name: {s: level + noise[s] + rng.gauss(0, 0.002) for s in noise}
        for name, level in (("low", 0.70), ("twin", 0.80), ("other", 0.8001), ("top", 0.90))
    }
    found = compare_scores(scores)
    assert found.order[0] == "top"
    assert found.order[-1] == "low"
    assert found.rank["top"] == 1
    assert found.rank["twin"] == found.rank["other"] == 2
    assert found.rank["low"] == 4
    assert [sorted(c) for c in found.cliques] == [["other", "twin"]]
    assert found.p["top", "low"] == found.p["low", "top"] < 0.001
    assert found.detectable is not None
    assert 0 < found.detectable < 0.02
    assert compare_scores(scores, lower=True).order == found.order[::-1]


def test_compare_scores_with_one_seed_tests_nothing() -> None:
    found = compare_scores({"a": {0: 0.9}, "b": {0: 0.8}})
    assert not found.tested
    assert found.rank == {"a": 1, "b": 1}
    assert found.cliques == []
    assert found.detectable is None
    assert not found.differs("a", "b")


def test_leaderboard_by_global_accuracy() -> None:
    runs = [Run("b", s, [line(0.5), line(0.7 + s / 100, mean=0.6)]) for s in range(3)]
    runs += [Run("a", s, [line(0.8 + s / 100, mean=0.4)]) for s in range(3)]
    rows = leaderboard(runs)
    assert [row["method"] for row in rows] == ["a", "b"]
    row = rows[1]
    assert row["metric"] == "global"
    assert row["accuracy"] == pytest.approx(0.71)
    assert row["accuracy_ci"] == pytest.approx(list(t_interval([0.70, 0.71, 0.72])))
    assert row["clients_mean"] == pytest.approx(0.6)
    assert row["worst10"] == pytest.approx(0.5)
    assert (row["bytes"], row["wall_s"], row["virtual_s"], row["seeds"]) == (40, 2.0, 0.0, 3)


def test_leaderboard_by_client_mean_when_one_method_has_no_global_model() -> None:
    runs = [Run("fedavg", 0, [line(0.9, mean=0.6)]), Run("local", 0, [line(mean=0.7)])]
    rows = leaderboard(runs)
    assert [(r["method"], r["metric"], r["accuracy"]) for r in rows] == [
        ("local", "clients.mean", 0.7),
        ("fedavg", "clients.mean", 0.6),
    ]
    assert rows[0]["accuracy_ci"] is None


def test_leaderboard_of_a_regression_ranks_by_loss() -> None:
    runs = [Run("a", 0, [line(**{"global": {"loss": 0.5}})]), Run("b", 0, [line(**{"global": {"loss": 0.2}})])]
    rows = leaderboard(runs)
    assert [(r["method"], r["accuracy"], r["loss"]) for r in rows] == [("b", None, 0.2), ("a", None, 0.5)]
    assert final_scores(runs).lower


def test_loss_without_a_global_model_is_the_mean_of_clients() -> None:
    clients = [{"round": 1, "client": 0, "seen": True, "n": 3, "loss": 2.0}]
    found = final_scores([Run("local", 0, [line(mean=2.0)], clients)])
    assert (found.lower, found.metric, found.values) == (True, "clients.mean", {"local": {0: 2.0}})


def test_last_clients() -> None:
    clients = [
        {"round": 1, "client": 0, "seen": True, "n": 4, "loss": 9.0},
        {"round": 2, "client": 0, "seen": True, "n": 4, "loss": 1.0},
        {"round": 2, "client": 1, "seen": True, "n": 0, "loss": 0.0},
        {"round": 2, "client": 2, "seen": False, "n": 4, "loss": 50.0},
    ]
    assert {k: v["loss"] for k, v in last_clients(Run("a", 0, [line()], clients)).items()} == {0: 1.0}


def test_a_run_that_diverged_has_no_score_and_comes_last() -> None:
    runs = [Run("a", 0, [line(**{"global": {"loss": math.nan}})]), Run("b", 0, [line(**{"global": {"loss": 0.2}})])]
    rows = leaderboard(runs)
    assert [(r["method"], r["loss"], r["seeds"]) for r in rows] == [("b", 0.2, 1), ("a", None, 0)]


def test_a_pair_that_could_not_be_tested_is_not_called_different() -> None:
    scores = {"a": {0: 0.9, 1: 0.8, 2: 0.85}, "b": {0: 0.88, 1: 0.81, 2: 0.84}, "c": {0: 0.7}}
    found = compare_scores(scores)
    assert math.isnan(found.p["a", "c"])
    assert not found.differs("a", "c")
    assert found.cliques == [["a", "b", "c"]]


def test_an_interval_of_shares_ends_where_shares_do() -> None:
    values = [0.99, 0.9, 1.0]
    low, high = t_interval(values)
    assert high > 1
    assert mean_interval(values) == (low, high)
    assert mean_interval(values, share=True) == (low, 1.0)
    assert mean_interval([0.0, 0.1], share=True) == (0.0, t_interval([0.0, 0.1])[1])
    assert mean_interval([0.4, 0.5], share=True)[0] == 0.0  # type: ignore[index]

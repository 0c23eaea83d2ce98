"""Cost to a target: censored runs against the definition of the Kaplan-Meier curve."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import pytest

from consilience.measure.board import board
from consilience.measure.target import Reach, cost_of, kaplan_meier_median, reach


@dataclass
class Run:
    label: str
    seed: int
    history: list[dict[str, Any]]
    clients: list[dict[str, Any]] = field(default_factory=list)


def run(label: str, seed: int, accuracies: list[float | None]) -> Run:
    history = []
    for r, accuracy in enumerate(accuracies, 1):
        line: dict[str, Any] = {"round": r, "wall_s": 2.0 * r, "virtual_s": 0.0, "bytes_up": r, "bytes_down": 3 * r}
        line["samples"] = 100 * r
        if accuracy is not None:
            line["global"] = {"accuracy": accuracy, "loss": 1 - accuracy}
        history.append(line)
    return Run(label, seed, history)


def naive_median(times: list[float], hits: list[bool]) -> float | None:
    """The first time t at which the product over event times up to t of (1 - events / at risk) is at most a half."""
    for t in sorted(times):
        survival = 1.0
        for u in sorted({x for x, h in zip(times, hits, strict=True) if h and x <= t}):
            risk = sum(x >= u for x in times)
            survival *= (risk - sum(h and x == u for x, h in zip(times, hits, strict=True))) / risk
        if survival <= 0.5 + 1e-12:
            return t
    return None


def test_kaplan_meier() -> None:
    assert kaplan_meier_median([1, 2, 3, 4, 5], [True] * 5) == 3
    assert kaplan_meier_median([9, 9, 9], [False] * 3) is None
    # the run censored at 2 may still have been the next: 1 of 4 reached, then 1 of 2 at risk
    assert kaplan_meier_median([1, 2, 3, 4], [True, False, True, True]) == 3
    rng = random.Random(0)
    for _ in range(300):
        n = rng.randint(1, 7)
        times = [float(rng.randint(1, 6)) for _ in range(n)]
        hits = [rng.random() < 0.6 for _ in range(n)]
        assert kaplan_meier_median(times, hits) == naive_median(times, hits)


def test_with_one_budget_it_is_the_median_with_never_as_infinity() -> None:
    rng = random.Random(1)
    for _ in range(100):
        times = [rng.choice([3.0, 5.0, 8.0, 20.0]) for _ in range(5)]
        expected = median([t if t < 20 else float("inf") for t in times])
        found = kaplan_meier_median(times, [t < 20 for t in times])
        assert found == (expected if expected < 20 else None)


def test_reach() -> None:
    found = reach(run("a", 0, [0.2, None, 0.5, 0.4, 0.9]), ("global", "accuracy"), 0.45)  # type: ignore[arg-type]
    assert found == Reach(True, {"rounds": 3, "bytes": 12, "samples": 300, "wall_s": 6.0, "virtual_s": 0.0})
    never = reach(run("a", 0, [0.2, 0.3]), ("global", "accuracy"), 0.45)  # type: ignore[arg-type]
    assert never is not None
    assert (never.reached, never.costs["rounds"]) == (False, 2)
    loss = reach(run("a", 0, [0.2, 0.6, 0.7]), ("global", "loss"), 0.4, lower=True)  # type: ignore[arg-type]
    assert loss is not None
    assert loss.costs["rounds"] == 2
    diverged = reach(run("a", 0, [float("nan")] * 2), ("global", "accuracy"), 0.1)  # type: ignore[arg-type]
    assert diverged is not None
    assert not diverged.reached


def test_cost_of() -> None:
    reaches = [Reach(True, {"rounds": 4}), Reach(True, {"rounds": 2}), Reach(False, {"rounds": 9})]
    found = cost_of(reaches, "rounds")
    assert (found.median, found.least, found.most, found.beyond) == (4, 2, None, 9)


def test_the_board_has_it() -> None:
    runs = [run("a", 0, [0.1, 0.6]), run("a", 1, [0.7, 0.8]), run("b", 0, [0.1, 0.2]), run("b", 1, [0.1, 0.2])]
    rows = {row["method"]: row for row in board(runs, target=0.5)}  # type: ignore[arg-type]
    assert (rows["a"]["reached"], rows["b"]["reached"]) == (2, 0)
    assert rows["a"]["to_target"]["rounds"] == {"median": 1, "least": 1, "most": 2, "beyond": 2}
    assert rows["b"]["to_target"]["rounds"]["median"] is None
    assert rows["b"]["to_target"]["samples"]["beyond"] == 200
    assert board(runs)[0]["to_target"] is None  # type: ignore[arg-type]


def client(number: int, accuracy: float, groups: Any = None) -> dict[str, Any]:
    line = {"round": 2, "client": number, "seen": True, "n": 5, "loss": 1.0, "accuracy": accuracy}
    return line | ({"groups": {"sex": groups}} if groups else {})


def test_the_board_says_who_pays() -> None:
    local, other = run("local", 0, [None, None]), run("fedavg", 0, [0.5, 0.5])
    for of, values in ((local, (0.5, 0.6, 0.7)), (other, (0.6, 0.5, 0.9))):
        of.clients = [client(i, v) for i, v in enumerate(values)]
        of.history[-1]["clients"] = {"mean": sum(values) / 3, "worst10": min(values), "std": 0.1, "jain": 0.9}
    rows = {row["method"]: row for row in board([local, other], reference="local")}  # type: ignore[list-item]
    gain = rows["fedavg"]["gain"]
    assert gain == {"mean": pytest.approx(0.2 / 3), "worst": pytest.approx(-0.1), "lose": 1, "of": 3}
    assert rows["local"]["gain"] is None
    assert rows["fedavg"]["variance"] == pytest.approx(0.01)
    assert rows["fedavg"]["entropy"] is None
    assert rows["fedavg"]["difference"] == pytest.approx(0.2 / 3)
    assert rows["fedavg"]["p"] is None  # one seed
    assert rows["local"]["difference"] is None


def test_the_board_has_groups() -> None:
    runs = []
    for seed in (0, 1):
        made = run("fedavg", seed, [0.5, 0.5])
        made.clients = [client(0, 0.5, [[[3, 1], [1, 3]], [[1, 3], [1, 3]]]), client(1, 0.5, [[[4, 0], [0, 4]]])]
        made.history[-1]["clients"] = {"mean": 0.5, "worst10": 0.5, "std": 0.0, "jain": 1.0}
        runs.append(made)
    groups = board(runs)[0]["groups"]["sex"]  # type: ignore[arg-type]
    assert groups["demographic_parity"] == pytest.approx(0.75 - 0.5)
    assert groups["unique"] + groups["redundant"] == pytest.approx(groups["global_bits"])
    assert groups["unique"] + groups["masked"] == pytest.approx(groups["local_bits"])

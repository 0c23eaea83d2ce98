"""Group differences against loops over rows, and against scikit-learn where it has them."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import mutual_info_score, recall_score

from consilience.core.federation import Federation
from consilience.data.federation import from_arrays
from consilience.measure.fairness import (
    accuracy,
    chance,
    demographic_parity,
    entropy,
    equal_opportunity,
    equalised_odds,
    global_disparity,
    local_disparity,
    mutual_information,
    per_group,
    stacked,
    summary,
)
from consilience.methods.fedavg import FedAvg
from consilience.simulate import run


def rows(seed: int, classes: int = 2, groups: int = 2, n: int = 300) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    z = rng.integers(0, groups, n)
    y = (rng.random(n) * classes * (0.6 + 0.4 * z / groups)).astype(int)
    p = np.where(rng.random(n) < 0.7 - 0.1 * z, y, rng.integers(0, classes, n))
    s = rng.integers(0, 4, n)
    return z, y, p, s


def counted(z: np.ndarray, y: np.ndarray, p: np.ndarray, groups: int, classes: int) -> np.ndarray:
    out = np.zeros((groups, classes, classes))
    for a, b, c in zip(z, y, p, strict=True):
        out[a, b, c] += 1
    return out


def share(hits: np.ndarray, of: np.ndarray) -> float | None:
    return float(hits[of].mean()) if of.any() else None


def widest(rates: list[list[float | None]]) -> float:
    """The largest difference between two groups in any of several rates."""
    pairs = [abs(a - b) for of in rates for a, b in combinations(of, 2) if a is not None and b is not None]
    return max(pairs)


@pytest.mark.parametrize(("classes", "groups"), [(2, 2), (2, 5), (3, 2), (4, 3)])
def test_differences_are_those_of_a_loop(classes: int, groups: int) -> None:
    z, y, p, _ = rows(classes * 10 + groups, classes, groups)
    counts = counted(z, y, p, groups, classes)
    of = [z == g for g in range(groups)]
    parity = [[share(p == c, m) for m in of] for c in range(classes)]
    odds = [[share(p == c, m & (y == d)) for m in of] for c in range(classes) for d in range(classes)]
    chances = [[share(p == c, m & (y == c)) for m in of] for c in ([1] if classes == 2 else range(classes))]
    assert demographic_parity(counts) == pytest.approx(widest(parity))
    assert equalised_odds(counts) == pytest.approx(widest(odds))
    assert equal_opportunity(counts) == pytest.approx(widest(chances))


def test_equal_opportunity_is_a_difference_of_recalls() -> None:
    z, y, p, _ = rows(7)
    recalls = [recall_score(y[z == g], p[z == g]) for g in (0, 1)]
    assert equal_opportunity(counted(z, y, p, 2, 2)) == pytest.approx(abs(recalls[0] - recalls[1]))


def test_by_hand() -> None:
    # group 0: 10 rows, 4 predicted 1; 5 labelled 1, of them 3 found. Group 1: 4 rows, 3 predicted 1; 2 of 2 found.
    counts = np.array([[[4, 1], [2, 3]], [[1, 1], [0, 2]]], dtype=float)
    assert demographic_parity(counts) == pytest.approx(0.75 - 0.4)
    assert equal_opportunity(counts) == pytest.approx(1.0 - 0.6)
    assert equalised_odds(counts) == pytest.approx(max(0.4, 0.5 - 0.2))
    assert accuracy(counts) == pytest.approx(10 / 14)
    groups = per_group(counts, ["a", "b"])
    assert [g["rows"] for g in groups] == [10, 4]
    assert groups[1]["predicted"] == [0.25, 0.75]


def test_groups_without_rows_are_left_out() -> None:
    counts = np.zeros((3, 2, 2))
    counts[0] = [[4, 1], [2, 3]]
    assert math.isnan(demographic_parity(counts))
    assert math.isnan(equalised_odds(counts))
    counts[2] = [[1, 1], [0, 0]]  # nobody of group 2 is labelled 1
    assert demographic_parity(counts) == pytest.approx(0.1)
    assert math.isnan(equal_opportunity(counts))
    assert equalised_odds(counts) == pytest.approx(0.3)


def test_disparities_are_mutual_information() -> None:
    z, y, p, s = rows(3, 3, 2)
    counts = np.stack([counted(z[s == c], y[s == c], p[s == c], 2, 3) for c in range(4)])
    assert global_disparity(counts) == pytest.approx(mutual_info_score(z, p) / math.log(2))
    within = sum((s == c).mean() * mutual_info_score(z[s == c], p[s == c]) for c in range(4)) / math.log(2)
    assert local_disparity(counts) == pytest.approx(within)
    assert mutual_information(np.zeros((2, 2))) == 0.0
    assert mutual_information([[0.5, 0], [0, 0.5]]) == 1.0


def test_chance_is_what_independent_predictions_read() -> None:
    rng = np.random.default_rng(0)
    clients, n, draws = 5, 400, 300
    found = np.zeros((draws, 2))
    for i in range(draws):
        counts = stacked([counted(*rng.integers(0, 2, (3, n)), 2, 2) for _ in range(clients)])
        found[i] = global_disparity(counts), local_disparity(counts)
    expected = chance(counts)
    assert found.mean(axis=0) == pytest.approx(expected, rel=0.2)


def test_clients_that_lack_a_group() -> None:
    tables = [[[[3, 1], [1, 3]]], [[[1, 1], [1, 1]], [[0, 2], [0, 2]]]]
    both = stacked(tables)
    assert both.shape == (2, 2, 2, 2)
    found = summary(tables)
    assert found["demographic_parity"] == pytest.approx(0.5)
    assert found["clients"]["demographic_parity"] == {"mean": 0.5, "worst": 0.5}  # only client 1 has two groups
    assert found["clients"]["equal_opportunity"]["worst"] == pytest.approx(0.5)
    assert summary(tables[:1])["clients"]["demographic_parity"] is None


def test_entropy() -> None:
    assert entropy(np.array([0.4, 0.4, 0.4])) == pytest.approx(1)
    assert entropy(np.array([1.0, 0.0])) == 0
    assert entropy(np.array([0.5, 0.25, 0.25])) == pytest.approx(1.5 / math.log2(3))
    assert entropy(np.array([0.7])) == entropy(np.zeros(3)) == 1.0


def test_a_run_records_counts_and_differences(tmp_path: Path) -> None:
    """Counts in the files are those of the deployed model's predictions, and so are the differences in the history."""
    federation = census()
    result = run(FedAvg(lr=0.1), federation, model="logistic", rounds=2, eval_clients_every=1, out=tmp_path / "r")
    last = [row for row in result.clients if row["round"] == 2]
    for row in last:
        data = federation.data(row["client"]).test
        p = result.predict(data.x).argmax(1).numpy()
        z = data.sensitive[:, 1].numpy()  # type: ignore[index]
        expected = counted(z, data.y.numpy(), p, int(z.max()) + 1, 2)
        assert np.array_equal(np.array(row["groups"]["site"]), expected)
        assert np.array(row["groups"]["sex"]).sum() == row["n"]
    clients = result.history[-1]["clients"]["groups"]["sex"]
    pooled = stacked([row["groups"]["sex"] for row in last if row["seen"]]).sum(axis=0)
    assert clients["demographic_parity"] == pytest.approx(demographic_parity(pooled))
    assert 0 <= clients["clients"]["equal_opportunity"]["mean"] <= clients["clients"]["equal_opportunity"]["worst"]
    assert federation.test is not None
    z, y = federation.test.sensitive[:, 0].numpy(), federation.test.y.numpy()  # type: ignore[index]
    of_global = counted(z, y, result.predict(federation.test.x).argmax(1).numpy(), 2, 2)
    found = result.history[-1]["global"]["groups"]["sex"]
    assert found["equalised_odds"] == pytest.approx(equalised_odds(of_global))
    written = json.loads((tmp_path / "r" / "federation.json").read_text())
    assert written["sensitive"] == {"sex": ["f", "m"], "site": ["0", "1", "2"]}


def test_counts_are_the_same_on_any_executor() -> None:
    results = [
        run(FedAvg(), census(), model="logistic", rounds=2, executor=executor, workers=2)
        for executor in ("serial", "processes")
    ]
    assert results[0].clients == results[1].clients
    assert results[0].digest == results[1].digest


def census() -> Federation:
    rng = np.random.default_rng(0)
    sex, site = rng.integers(0, 2, 400), rng.integers(0, 3, 400)
    x = rng.normal(size=(400, 3)).astype("f4") + sex[:, None]
    y = (x.sum(1) + rng.normal(size=400) > 1.5).astype(int)
    names = np.array(["f", "m"])
    return from_arrays(
        x, y, clients=4, unseen=1, split=(0.5, 0.1, 0.4), sensitive={"sex": names[sex], "site": site}, seed=1
    )

"""The best round is chosen on validation data alone."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest

import consilience
from consilience.core import failpoint
from consilience.core.messages import Job
from consilience.measure.best import Best, best_clients, best_line, best_scores, best_so_far
from consilience.methods import FedAvg


def line(number: int, valid: float | None, test: float) -> dict[str, Any]:
    clients: dict[str, Any] = {"mean": test}
    if valid is not None:
        clients["valid"] = {"mean": valid}
    return {"round": number, "clients": clients, "global": {"accuracy": test}}


HISTORY = [line(1, 0.2, 0.9), line(2, None, 0.95), line(3, 0.6, 0.5), line(4, 0.6, 0.99), line(5, 0.4, 0.8)]


def test_test_scores_have_no_say() -> None:
    found = best_line(HISTORY)
    assert found is not None
    assert found["round"] == 3  # not 4, whose test score is best, nor 2, whose validation was not taken
    swapped = [{**entry, "global": {"accuracy": -i}} for i, entry in enumerate(HISTORY)]
    assert best_line(swapped)["round"] == 3  # type: ignore[index]


def test_the_best_so_far() -> None:
    assert [(at["round"], best["round"]) for at, best in best_so_far(HISTORY)] == [(1, 1), (3, 3), (4, 3), (5, 3)]
    assert [best["round"] for _, best in best_so_far(HISTORY, lower=True)] == [1, 1, 1, 1]


def test_without_validation_rows_there_is_none() -> None:
    assert best_line([line(1, None, 0.9), line(2, float("nan"), 0.9)]) is None


def run(split: tuple[float, float, float] = (0.8, 0.1, 0.1), **options: Any) -> consilience.Result:
    federation = consilience.make_federation(
        "digits", clients=6, partition="dirichlet:0.5", unseen=2, seed=1, split=split
    )
    given = {"model": "mlp:16", "rounds": 3, "eval_clients_every": 1, "executor": "serial", **options}
    return consilience.run(FedAvg(), federation, **given)


def test_a_run_judges_validation_rows() -> None:
    result = run()
    for entry in result.history:
        rows = [row for row in result.clients if row["round"] == entry["round"]]
        seen = [row["valid"] for row in rows if row["seen"] and "valid" in row]
        assert len(seen) == 4
        assert entry["clients"]["valid"]["mean"] == pytest.approx(sum(seen) / len(seen))  # those who never train: no
    last = result.clients[-6]
    data = result.worker.federation.data(last["client"]).valid
    at = result.worker.site(Job(-1, last["client"], 9, 0, 3, 0))[0]
    assert last["valid"] == at.evaluate(result.server.model, data).accuracy


def test_without_validation_rows_nothing_is_said() -> None:
    result = run(split=(0.9, 0.0, 0.1))
    assert all("valid" not in row for row in result.clients)
    assert all("valid" not in entry["clients"] for entry in result.history)


def test_judging_validation_rows_changes_nothing_else() -> None:
    """Validation rows are judged when clients are; without that, the run is the same."""
    result = run()
    quiet = consilience.run(
        FedAvg(), result.worker.federation, model="mlp:16", rounds=3, eval_clients_every=0, executor="serial"
    )
    assert quiet.digest.splitlines()[:2] == result.digest.splitlines()[:2]


def test_scores_and_clients_of_the_best_round() -> None:
    clients = [
        {"round": r, "client": c, "seen": c != 2, "n": 0 if c == 3 else 9, "accuracy": r + c / 10}
        for r in (1, 3, 4)
        for c in range(4)
    ]
    runs: list[Any] = [
        SimpleNamespace(seed=0, history=HISTORY, clients=clients),
        SimpleNamespace(seed=1, history=[line(1, None, 0.9)], clients=[]),
        SimpleNamespace(seed=2, history=[line(1, 0.5, float("nan"))], clients=[]),
    ]
    assert best_scores(runs, "global") == best_scores(runs, "clients.mean") == {0: Best(3, 0.5)}
    assert {c: of["accuracy"] for c, of in best_clients(runs[0]).items()} == {0: 3.0, 1: 3.1}  # not 2 and 3
    assert best_clients(runs[1]) == {}


def test_clients_that_never_train_have_no_say() -> None:
    """They are judged on validation rows as well, but not for choosing a round."""
    rows = run().clients
    assert any("valid" in row for row in rows if not row["seen"])
    for entry in run().history:
        own = [row["valid"] for row in rows if row["round"] == entry["round"] and row["seen"]]
        everybody = [row["valid"] for row in rows if row["round"] == entry["round"]]
        assert entry["clients"]["valid"]["mean"] == pytest.approx(fmean(own))
        assert entry["clients"]["valid"]["mean"] != pytest.approx(fmean(everybody))


def test_processes_and_resuming_judge_validation_rows_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, beside = run(), run(executor="processes", workers=2)
    assert beside.digest == whole.digest
    assert beside.clients == whole.clients
    with monkeypatch.context() as patch:
        patch.setenv("CONSILIENCE_FAILPOINT", "aggregate:3:raise")
        with pytest.raises(failpoint.Died):
            run(out=tmp_path / "part", checkpoint_every=1)
    resumed = run(out=tmp_path / "part", checkpoint_every=1, resume=True)
    assert resumed.digest == whole.digest
    valid = [[entry["clients"]["valid"] for entry in result.history] for result in (resumed, whole)]
    assert valid[0] == valid[1]

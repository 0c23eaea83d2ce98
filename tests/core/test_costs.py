"""What a run and its clients have spent: bytes, samples, FLOP."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

import consilience
from consilience.core.method import Method, Phase
from consilience.core.predict import Net
from consilience.core.site import Site
from consilience.core.tree import Tree
from consilience.methods import FedAvg, Local, Moon, Scaffold
from consilience.models import architecture

DIGITS = (64,), 10


def run(method: Method, **options: object) -> consilience.Result:
    federation = consilience.make_federation("digits", clients=5, partition="dirichlet:0.5", seed=3)
    usual = {"model": "mlp:16", "rounds": 3, "participation": 3, "eval_clients_every": 1, "executor": "serial"}
    return consilience.run(method, federation, **{**usual, **options})  # type: ignore[arg-type]


def test_flops_are_rows_times_what_a_row_costs() -> None:
    result = run(FedAvg())
    cost = architecture("mlp:16", *DIGITS).flops.training
    for line in result.history:
        assert line["flops"] == line["samples"] * cost


def test_models_asked_beside_training_count() -> None:
    """MOON asks two more networks for every row; a first-time client's two are one and the same."""
    plain, moon = run(Moon(mu=0.0)), run(Moon())
    forward = architecture("mlp:16", *DIGITS).flops.forward
    beside = moon.history[-1]["flops"] - plain.history[-1]["flops"]
    assert beside == 2 * forward * moon.history[-1]["samples"]


@dataclass(frozen=True)
class Asks(FedAvg):
    """Looks at its own training rows once before it trains."""

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Tree) -> tuple[Tree, Tree]:
        site.scores(Net(message.model), site.train.x)
        site.evaluate(Net(message.model))
        return super().client_update(phase, site, message, state)


def test_evaluation_is_free_and_scores_are_not() -> None:
    plain, asks = run(FedAvg()), run(Asks())
    forward = architecture("mlp:16", *DIGITS).flops.forward
    assert asks.history[-1]["flops"] - plain.history[-1]["flops"] == forward * plain.history[-1]["samples"]


@pytest.mark.parametrize("options", [{}, {"fleet": "phones", "drops": 0.2}])
def test_clients_pay_what_the_run_costs(options: dict[str, object]) -> None:
    result = run(Scaffold(), **options)
    for line in result.history:
        rows = [row for row in result.clients if row["round"] == line["round"]]
        for key in ("bytes_up", "bytes_down", "samples", "steps"):
            assert sum(row[key] for row in rows) == line[key], key
        assert sum(row["flops"] for row in rows) == pytest.approx(line["flops"])


def test_accuracy_by_architecture() -> None:
    result = run(Local(), models="mlp:16*3,logistic*2")
    last = [row for row in result.clients if row["round"] == 3]
    found = result.history[-1]["clients"]["models"]
    assert sorted(found) == ["logistic", "mlp:16"]
    for name, summary in found.items():
        values = [row["accuracy"] for row in last if row["model"] == name]
        assert summary["mean"] == pytest.approx(sum(values) / len(values))
    assert "models" not in run(Local()).history[-1]["clients"]

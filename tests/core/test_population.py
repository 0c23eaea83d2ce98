"""A round looks at its participants, never at everybody."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilience import experiment
from consilience.config import settle
from consilience.core.events import draw_cohort
from consilience.core.streams import philox
from consilience.data.federation import OnDemandFederation
from consilience.data.synthetic import synthetic_on_demand
from consilience.fleet.profiles import draw
from consilience.methods.fedavg import FedAvg
from consilience.methods.scaffold import Scaffold
from consilience.simulate import run


class Watched(OnDemandFederation):
    """Counts how often all ids are listed, and how many clients are looked at."""

    listed, looked = 0, 0

    @property
    def seen(self) -> np.ndarray:
        type(self).listed += 1
        return super().seen

    def data(self, client: int) -> Any:
        type(self).looked += 1
        return super().data(client)

    def size(self, client: int) -> int:
        type(self).looked += 1
        return super().size(client)


def looked_at(method: Any, clients: int, rounds: int, out: Any) -> tuple[int, int]:
    """How often everybody was listed, and how many clients were looked at, in a run of five participants a round."""
    made = synthetic_on_demand("synthetic-ondemand", clients=clients, unseen=2)
    Watched.listed = Watched.looked = 0
    run(
        method, Watched(**{**made.__dict__, "keep": 16}), model="logistic", participation=5, rounds=rounds,
        eval_clients=5, eval_clients_every=2, checkpoint_every=2, executor="serial", out=out,
    )  # fmt: skip
    return Watched.listed, Watched.looked


@pytest.mark.parametrize("method", [FedAvg(local_steps=2), Scaffold(local_steps=2)], ids=lambda m: m.name)
def test_a_round_costs_what_its_participants_cost(method: Any, tmp_path: Any) -> None:
    """Set-up looks at a bounded sample, and each round at as many clients among a million as among ten thousand."""
    few = [looked_at(method, 10_000, rounds, tmp_path / f"few{rounds}") for rounds in (2, 8)]
    many = [looked_at(method, 1_000_000, rounds, tmp_path / f"many{rounds}") for rounds in (2, 8)]
    assert few == many
    (listed, looked), (later, more) = many
    assert listed == later <= 3, "in set-up only"
    assert looked < 1_200
    assert more - looked < 6 * 5 * 10


def test_equal_devices_are_one_object() -> None:
    assert len({id(device) for device in draw("uniform", 1000, 0)}) == 1
    assert len(set(draw("phones", 1000, 0))) > 900


def test_a_run_among_very_many_has_its_report(tmp_path: Any) -> None:
    settings = settle(
        {"data": "synthetic-ondemand", "clients": 20_000, "unseen": 0.1, "participation": 3, "eval_clients": 4,
         "rounds": 2, "model": "logistic", "executor": "serial"}
    )  # fmt: skip
    (spec,) = experiment.specs(settings, ["fedavg"])
    made = experiment.make_federation(spec.config)
    experiment.run_one(spec, tmp_path / "run", made, command="", on_line=lambda line: None)
    assert "18,000 clients" in (tmp_path / "run" / "report.html").read_text()


@given(
    n=st.integers(1, 40),
    gone=st.sets(st.integers(0, 39)),
    busy=st.sets(st.integers(0, 39)),
    size=st.integers(0, 45),
    seed=st.integers(0, 5),
)
def test_drawing_beside_busy_clients_is_drawing_among_the_others(
    n: int, gone: set[int], busy: set[int], size: int, seed: int
) -> None:
    clients = np.array([c for c in range(n) if c not in gone], dtype=np.int64)
    busy = busy & set(clients.tolist())
    idle = np.array([c for c in clients.tolist() if c not in busy], dtype=np.int64)
    found = draw_cohort(philox(seed), clients, size, frozenset(busy))
    assert found == draw_cohort(philox(seed), idle, size)
    assert len(set(found)) == min(size, len(idle))
    assert set(found) <= set(idle.tolist())
    assert found == sorted(found)


@given(n=st.integers(1, 50), unseen=st.sets(st.integers(0, 49)))
def test_seen_clients_are_the_others_in_order(n: int, unseen: set[int]) -> None:
    made = synthetic_on_demand("synthetic-ondemand", clients=1)
    made.n_clients, made.unseen = n, frozenset(c for c in unseen if c < n)
    assert made.seen.tolist() == [c for c in range(n) if c not in unseen]
    assert made.n_seen == len(made.seen)

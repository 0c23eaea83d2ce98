"""CO2: reductions, the recursion by hand, and that training hides the messages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import LINEAR64, NOISY, federation, loop, vector, worker

import consilience
from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.method import Method
from consilience.core.model import Architecture
from consilience.core.snapshot import Snapshot
from consilience.methods import CO2, FedAvg, FedAvgM

USUAL: dict[str, Any] = {"batch_size": 4, "lr": 0.1, "local_steps": 3}
PLAIN: dict[str, Any] = {"delay": 0, "server_momentum": 0.0, "bound": None, **USUAL}


def trained(method: Method, model: Architecture = NOISY, rounds: int = 4) -> dict[int, Snapshot]:
    return loop(worker(method, federation(dtype=model.dtype), model), rounds, cohort=3).snapshots


def test_without_delay_it_is_local_sgd_bit_for_bit_and_with_momentum_fedavgm() -> None:
    plain = tr.digest(trained(FedAvg(form="delta", **USUAL))[4].server.model)
    assert tr.digest(trained(CO2(**PLAIN))[4].server.model) == plain
    assert tr.digest(trained(CO2(**{**PLAIN, "bound": 1e6}))[4].server.model) == plain
    assert tr.digest(trained(CO2(**{**PLAIN, "delay": 1}))[4].server.model) != plain
    slow = CO2(**{**PLAIN, "server_momentum": 0.7, "server_lr": 0.6})
    heavy = FedAvgM(server_momentum=0.7, server_lr=0.6, **USUAL)
    assert tr.digest(trained(slow)[4].server.model) == tr.digest(trained(heavy)[4].server.model)


def test_late_averages_are_the_recursion() -> None:
    method = CO2(server_momentum=0.6, server_lr=0.8, penalty=1.5, bound=0.02, **USUAL)
    states = {t: shot.server for t, shot in trained(method, LINEAR64, 6).items()}
    start = vector(worker(method, federation(dtype=torch.float64), LINEAR64).host(0, "init").initial()).numpy()
    x, m, came, clipped = start, np.zeros(18), None, 0
    for t in range(1, 7):
        if came is not None:
            m = 0.6 * m + came / 1.5
            clipped += int((np.abs(m) > 0.02).sum())
            x = x + 0.8 * np.clip(m, -0.02, 0.02)
        np.testing.assert_allclose(vector(states[t].model).numpy(), x, rtol=1e-12, atol=1e-14)
        came = vector(states[t].flight.delta).numpy()
    assert 0 < clipped < 5 * 18


def test_the_first_average_is_that_of_the_first_round() -> None:
    """x_1 = x_0, and x_2 is what FedAvg has after one round."""
    late = trained(CO2(**{**PLAIN, "delay": 1}))
    assert tr.digest(late[1].server.model.params) == tr.digest(
        worker(FedAvg(), model=NOISY).host(0, "").initial().params
    )
    once = trained(FedAvg(form="delta", **USUAL), rounds=1)[1].server.model
    assert tr.digest(late[2].server.model) == tr.digest(once)


def test_training_hides_the_messages() -> None:
    """A round takes as long as the longer of the two."""
    fed = consilience.make_federation("digits", clients=4, seed=0)
    options: dict[str, Any] = {
        "model": "mlp", "fleet": "phones", "rounds": 2, "executor": "serial", "participation": 1.0
    }  # fmt: skip
    runs = [consilience.run(CO2(delay=delay), fed, **options) for delay in (0, 1)]
    waits, hides = ([line for line in run.timeline if line["round"] == 1] for run in runs)
    for one, two in zip(waits, hides, strict=True):
        messages = one["download"] + one["upload"]
        assert two["compute"] == pytest.approx(max(0.0, one["compute"] - messages), rel=1e-6, abs=1e-9)
    assert runs[1].history[-1]["virtual_s"] < runs[0].history[-1]["virtual_s"]


def test_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="form=delta"):
        CO2(form="model")

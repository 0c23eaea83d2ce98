"""SGC: whatever bursts of stragglers its code bears, each network makes the steps of full gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LINEAR, LINEAR64, NORMED, federation, reply, vector, worker

import consilience
from consilience import simulate
from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.events import Instant
from consilience.core.model import Weights
from consilience.core.worker import pooled
from consilience.methods import SGC
from consilience.methods.sgc import Results


@dataclass(frozen=True)
class Bursts(Instant):
    """Who is away in each round, again and again; after the phases before the first, which are round 0."""

    away: tuple[tuple[int, ...], ...]

    def online(self, clients: np.ndarray, time: float, version: int) -> np.ndarray:
        return ~np.isin(clients, self.away[version % len(self.away)])


def run(method: SGC, rounds: int, away: tuple[tuple[int, ...], ...] = ((),)) -> consilience.Result:
    fed = federation(dtype=torch.float64)
    options: dict[str, Any] = {"participation": 1.0, "eval_clients_every": 0, "eval_every": rounds}
    return consilience.run(
        method, fed, model=LINEAR64, rounds=rounds, executor="serial", clock=Bursts(away), **options
    )  # fmt: skip


def descent(at: Any, start: Weights, lr: float, steps: int) -> torch.Tensor:
    """Full gradient descent, plainly."""
    data = pooled(at.federation)
    module = at.place.network("linear").build()
    for name, p in module.named_parameters():
        p.data.copy_(start.params[name])
    for _ in range(steps):
        module.zero_grad()
        torch.nn.functional.cross_entropy(module(data.x), data.y).backward()
        for p in module.parameters():
            p.data -= lr * p.grad
    return vector(dict(module.named_parameters()))


CASES: dict[str, tuple[dict[str, Any], tuple[tuple[int, ...], ...]]] = {
    "plain": ({"scheme": "gc", "stragglers": 0}, ((),)),
    "gc": ({"scheme": "gc", "stragglers": 2}, ((0, 1), (3,), (), (2, 4))),
    "sr": (
        {"scheme": "sr", "stragglers": 2, "burst": 2, "window": 3},
        ((0, 1), (0, 1), (), (), (4,), (4, 2), (2,), (), ()),
    ),
    "sr-1": ({"scheme": "sr", "stragglers": 3, "burst": 1, "window": 3}, ((0, 1, 4), (), (), (3,), (2,), (), ())),
    "m": ({"scheme": "m", "stragglers": 2, "burst": 1, "window": 3}, ((0, 1), (), (), (2,), (3,), (), ())),
    "m-2": ({"scheme": "m", "stragglers": 1, "burst": 2, "window": 3}, ((3,), (3,), (), (), (0,), (0,), (), ())),
    "more networks": ({"scheme": "m", "window": 2, "networks_in_turn": 3}, ((4,), (), (1,), ())),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_networks_make_exact_steps(case: str) -> None:
    options, away = CASES[case]
    at = worker(SGC(lr=0.3, **options), federation(dtype=torch.float64), LINEAR64)
    rounds = 12
    server = run(at.method, rounds, away).server
    assert server.missed == 0
    due = rounds - at.method._code(5).delay
    for k, network in enumerate(server.networks):
        steps = len(range(k, due, len(server.networks)))
        assert steps > 0
        start = at.place.network("linear").initial(0, k)
        torch.testing.assert_close(vector(network), descent(at, start, 0.3, steps), rtol=1e-9, atol=1e-11)


def test_a_pattern_that_no_code_bears_loses_the_job_alone() -> None:
    at = worker(SGC(scheme="gc", stragglers=1, lr=0.3), federation(dtype=torch.float64), LINEAR64)
    result = run(at.method, 6, ((0, 1), (2,), ()))
    server = result.server
    assert server.missed == 2 == result.history[-1]["method"]["missed"]
    start = at.place.network("linear").initial(0)
    torch.testing.assert_close(vector(server.networks[0]), descent(at, start, 0.3, 4), rtol=1e-9, atol=1e-11)


def test_only_what_was_asked_for_is_read_and_no_row_stays_at_the_server() -> None:
    method = SGC(scheme="gc", stragglers=1)
    result = run(method, 2)
    assert not result.server.pool
    assert {len(state.spans) for state in result.states.values()} == {2}
    assert sum(len(state.y) for state in result.states.values()) == 2 * 55
    at = worker(method, federation(dtype=torch.float64), LINEAR64)
    more = reply(0, Results({"2/0/0": result.server.networks[0].params, "0/0/0": result.server.networks[0].params}))
    after = method.aggregate(at.program[2], at.host(2, "work"), result.server, [more], [0])
    assert after.missed == 1
    assert tr.digest(after.networks) == tr.digest(result.server.networks)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"scheme": "gc", "stragglers": 5}, "at most 4"), ({"scheme": "sr", "burst": 2, "window": 4}, "divide"),
        ({"networks_in_turn": 2}, "take 3 or more"),
    ],
)  # fmt: skip
def test_codes_that_cannot_be_are_refused(options: dict[str, Any], why: str) -> None:
    at = worker(SGC(**options))
    with pytest.raises(ConfigError, match=why):
        at.method.init_server(at.host(0, "init"))


def test_batchnorm_and_momentum_are_refused() -> None:
    at = worker(SGC(), model=NORMED)
    with pytest.raises(ConfigError, match="BatchNorm"):
        at.method.init_server(at.host(0, "init"))
    with pytest.raises(ConfigError, match="plain gradient"):
        SGC(momentum=0.5)


@pytest.mark.parametrize(
    "options", [{"schedule": "async"}, {"schedule": "buffered:2"}, {"participation": 0.5}, {"participation": 2}]
)
def test_rounds_that_do_not_ask_everybody_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="every client in every round"):
        simulate.run(SGC(), federation(), model=LINEAR, rounds=2, executor="serial", **options)


def test_a_code_that_cannot_be_leaves_no_folder(tmp_path: Path) -> None:
    for folder in (tmp_path / "new", tmp_path):
        with pytest.raises(ConfigError, match="at most 4"):
            simulate.run(
                SGC(scheme="gc", stragglers=9), federation(), model=LINEAR, rounds=2, executor="serial", out=folder
            )
        assert not list(tmp_path.iterdir())

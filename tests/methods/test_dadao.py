"""DADAO against a loop in NumPy that keeps every node at every tick, and against the rate that its theorem gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import expm

import consilience
from consilience.core.errors import ConfigError
from consilience.core.federation import ClientData, Split, Task
from consilience.core.streams import Streams
from consilience.methods import DADAO
from consilience.methods.dadao import Node, spread
from tests.helpers import SCALAR64, Parts, federation, vector

N, L, MU = 6, 5.0, 0.5
FULL: dict[str, Any] = {"batch_size": 99, "local_steps": 1}
RING = tuple(sorted((min(i, (i + 1) % N), max(i, (i + 1) % N)) for i in range(N)))


class Quadratics:
    """Least squares with a bias whose matrices have eigenvalues from mu to L, a client each."""

    def __init__(self, mu: float = MU) -> None:
        rng, parts = np.random.default_rng(0), []
        self.a, self.b = [], []
        for _ in range(N):
            q = np.linalg.qr(rng.standard_normal((5, 5)))[0]
            half = np.sqrt(5) * np.sqrt(np.linspace(mu, L, 5))[:, None] * q
            x, own = np.concatenate([half, -half]), rng.standard_normal(6)
            rows = Split(torch.from_numpy(x), torch.from_numpy(x @ own[:5] + own[5]))
            parts.append(ClientData(rows, rows.rows(slice(0)), rows.rows(slice(0))))
            design = np.concatenate([x, np.ones((10, 1))], axis=1)
            self.a.append(design.T @ design / 10)
            self.b.append(design.T @ rows.y.numpy() / 10)
        self.fed = Parts(name="q", task=Task("regression", 1), n_clients=N, input_shape=(5,), parts=parts)
        self.best = np.linalg.solve(sum(self.a), sum(self.b))

    def far(self, result: consilience.Result) -> float:
        states = result.states.values()
        return float(np.mean([np.square(vector(s.x).numpy() - self.best).sum() for s in states]))


@pytest.fixture(scope="module")
def q() -> Quadratics:
    return Quadratics()


def run(method: DADAO, fed: Any, rounds: int, **options: Any) -> consilience.Result:
    usual = {"model": SCALAR64, "topology": "ring", "executor": "serial", "eval_every": rounds, "eval_clients_every": 0}
    return consilience.run(method, fed, rounds=rounds, **{**usual, **options})


def test_the_spread_of_a_ring() -> None:
    chi1, chi2, rate = spread(tuple(range(N)), RING)
    assert (chi1, chi2) == (pytest.approx(6), pytest.approx(2.5))
    assert rate == pytest.approx(30**0.5)


def test_dadao_by_hand(q: Quadratics) -> None:
    """All nodes move at every tick here, so the exactness of moving each only when it is touched is tested too."""
    found = run(DADAO(smoothness=L, convexity=MU, **FULL), q.fed, 300)
    nu, rate = MU / 2, 30**0.5
    r = np.sqrt(nu / L)
    flow = np.array([
        [-r / 8, r / 8, 0, 0, 0, 0], [r / 8, -r / 8, 0, 0, 0, 0],
        [0, 0, -r / 4, r / 4, 0, 0], [0, -nu / (2 * r), -1 / (2 * r), 0, -1 / (2 * r), 0],
        [0, 0, 0, 0, -r / 4, r / 4], [0, 0, 0, 0, r / 8, -r / 8],
    ])  # fmt: skip
    s = np.zeros((6, N, 6))
    s[0] = s[1] = vector(SCALAR64.initial(0).params).numpy()
    last, time, gradients = {i: s[:, i].copy() for i in range(N)}, 0.0, 0
    for k in range(300):
        rng = Streams(0).rng("dadao", k)
        wait = rng.exponential(1 / (N + rate))
        time += wait
        s = np.einsum("ab,bnd->and", expm(flow * wait), s)
        if rng.random() * (N + rate) < N:
            i = int(rng.integers(N))
            g = q.a[i] @ s[0, i] - q.b[i] - nu * s[0, i] - s[3, i]
            s[0, i] -= g / (4 * L)
            s[1, i] -= g / (4 * np.sqrt(nu * L))
            s[3, i] += (r / 4 + 1) * g
            touched, gradients = [i], gradients + 1
        else:
            i, j = RING[int(rng.integers(N))]
            m = s[2, i] + s[4, i] - s[2, j] - s[4, j]
            for node, sign in ((i, 1), (j, -1)):
                s[4, node] -= sign * m / 2
                s[5, node] -= sign * 2 * 6 / rate / r * m
            touched = [i, j]
        np.testing.assert_allclose(s[4:].sum(1), 0, atol=1e-11)
        for node in touched:
            last[node] = s[:, node].copy()
    for i, state in found.states.items():
        got = np.stack([vector(part).numpy() for part in state[:6]])
        np.testing.assert_allclose(got, last[i], rtol=1e-8, atol=1e-9)
    told = found.history[-1]["method"]
    assert told["time"] == pytest.approx(time)
    assert (told["gradients"], told["exchanges"]) == (gradients, 300 - gradients)
    assert 80 < gradients < 220
    assert found.history[-1]["samples"] == 10 * gradients


def test_moving_twice_is_moving_once(q: Quadratics) -> None:
    method, rng = DADAO(smoothness=L, convexity=MU), np.random.default_rng(1)
    state = Node(*({"w": torch.from_numpy(rng.standard_normal(4))} for _ in range(6)), {})
    twice, once = method.moved(method.moved(state, 0.3), 1.1), method.moved(state, 1.4)
    torch.testing.assert_close(vector(twice), vector(once), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("mu", [0.5, 0.125])
def test_the_rate_is_that_of_the_theorem(mu: float) -> None:
    """At least exp(-eta t), eta = sqrt(mu / (2 L)) / 8 a unit of time (n gradients), so four times the condition number
    costs twice the gradients, where plain descent pays four times."""
    q = Quadratics(mu)
    ends = []
    for rounds in (1000, 2500):
        found = run(DADAO(smoothness=L, convexity=mu, **FULL), q.fed, rounds)
        ends.append((found.history[-1]["method"]["time"], np.log(q.far(found))))
    slope = (ends[0][1] - ends[1][1]) / (ends[1][0] - ends[0][0])
    assert slope > np.sqrt(mu / (2 * L)) / 8


def test_it_comes_near_the_minimiser(q: Quadratics) -> None:
    method = DADAO(smoothness=L, convexity=MU, **FULL)
    early, late = (q.far(run(method, q.fed, rounds)) for rounds in (300, 1500))
    assert late < 0.05 * early


def test_a_lone_node_takes_only_gradients() -> None:
    found = run(DADAO(), federation((11,), regression=True, dtype=torch.float64), 5, topology="complete")
    assert found.history[-1]["method"]["gradients"] == 5
    assert not vector(found.states[0].z).any()


def test_what_makes_no_sense_is_refused(q: Quadratics, tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="should be above convexity"):
        DADAO(smoothness=0.1, convexity=0.2)
    (tmp_path / "edges.txt").write_text("0 1\n1 2\n3 4\n4 5\n")
    with pytest.raises(ConfigError, match="in parts"):
        run(DADAO(), q.fed, 2, topology=str(tmp_path / "edges.txt"))
    cycle = np.eye(N) / 2 + np.roll(np.eye(N), 1, axis=1) / 2
    np.savetxt(tmp_path / "cycle.txt", cycle)
    with pytest.raises(ConfigError, match=r"node 0 hears node 1 and not the other way"):
        run(DADAO(), q.fed, 1, topology=str(tmp_path / "cycle.txt"))
    with pytest.raises(ConfigError, match="in parts"):
        run(DADAO(), q.fed, 1, topology="none")

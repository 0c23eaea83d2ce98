"""FedGMM: reductions, a step by hand, EM against scikit-learn, densities of what is new."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import LINEAR64, NOISY, Parts, federation, loop, reply, site, split, worker
from scipy.stats import multivariate_normal
from sklearn.mixture import GaussianMixture
from torch.nn import functional as F

import consilience
from consilience.core import tree as tr
from consilience.core.federation import ClientData, Split, Task
from consilience.core.messages import ClientInfo
from consilience.core.snapshot import Snapshot
from consilience.methods import FedAvg, FedEM, FedGMM
from consilience.methods.fedgmm import Server, Up
from consilience.parts import density

USUAL: dict[str, Any] = {"batch_size": 4, "lr": 0.1, "local_epochs": 2}


def trained(method: Any, rounds: int = 3, **more: Any) -> Snapshot:
    return loop(worker(method, model=NOISY), rounds, cohort=3, **more).snapshots[rounds]


def client(x: np.ndarray) -> ClientData:
    empty = split(0, np.random.default_rng(0), dtype=torch.float64)
    y = torch.arange(len(x)) % 3
    return ClientData(Split(torch.from_numpy(x), y), empty, empty)


def clients(*parts: np.ndarray) -> Parts:
    test = split(5, np.random.default_rng(1), dtype=torch.float64)
    return Parts(
        name="parts", task=Task("classification", 3), n_clients=len(parts), input_shape=(5,), test=test,
        parts=[client(x) for x in parts],
    )  # fmt: skip


def blobs(rows: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, 5)) @ rng.standard_normal((5, 5)) + 4 * rng.integers(0, 2, (rows, 1))


def begun(at: Any, count: int) -> Server:
    """The server before round 1."""
    method, phase, host = at.method, at.program[0], at.host(0, "moments")
    asked = [method.client_update(phase, site(at, i), None, None)[0] for i in range(count)]
    replies = [reply(i, update, at.federation.size(i)) for i, update in enumerate(asked)]
    found: Server = method.aggregate(phase, host, method.init_server(at.host(0, "init")), replies, range(count))
    return found


def mixture_of(server: Server, pi: np.ndarray, steps: int) -> GaussianMixture:
    """scikit-learn's EM from the same start."""
    precisions = np.linalg.inv(server.density.covariances.numpy())
    return GaussianMixture(
        len(pi), weights_init=pi, means_init=server.density.means.numpy(), precisions_init=precisions,
        reg_covar=1e-3, max_iter=steps, tol=0,
    )  # fmt: skip


# --- reductions ------------------------------------------------------------------------------------------------


def test_one_gaussian_is_fedem() -> None:
    mixed = trained(FedGMM(densities=1, share="clients", **USUAL))
    plain = trained(FedEM(**USUAL))
    assert tr.digest(mixed.server.models) == tr.digest(plain.server.models)
    assert mixed.states.keys() == plain.states.keys()
    assert all(torch.equal(mixed.states[c], plain.states[c]) for c in plain.states)


@pytest.mark.parametrize("share", ["rows", "clients"])
def test_one_of_each_is_fedavg(share: Any) -> None:
    one = trained(FedGMM(densities=1, components=1, share=share, **USUAL))
    assert tr.digest(one.server.models[0]) == tr.digest(trained(FedAvg(**USUAL)).server.model)


# --- by hand, float64 ------------------------------------------------------------------------------------------


def given(method: FedGMM, at: Any, seed: int = 5) -> tuple[Server, np.ndarray]:
    """A server with Gaussians, axes and an offset at random, and a client's Pi."""
    rng = np.random.default_rng(seed)
    server = method.init_server(at.host(0, "init"))
    a, k = server.density.means.shape
    roots = rng.standard_normal((a, k, k)) / 2
    found = density.Density(
        *(torch.from_numpy(rng.standard_normal(shape)) for shape in ((5,), (k, 5), (a, k))),
        torch.from_numpy(roots @ roots.transpose(0, 2, 1) + 0.5 * np.eye(k)),
    )
    return server._replace(density=found), rng.dirichlet(np.ones(method.cells)).reshape(a, -1)


def test_a_step_by_hand() -> None:
    method = FedGMM(densities=2, components=3, dim=4, lr=0.3, batch_size=99, local_steps=1)
    at = worker(method, federation(dtype=torch.float64), LINEAR64)
    server, pi = given(method, at)
    message = method.broadcast(at.program[1], server, ClientInfo(1, 12, "linear", at.place.architectures))
    update, state = method.client_update(at.program[1], site(at, 1), message, torch.from_numpy(pi).flatten())

    rows = at.federation.data(1).train
    x, y, (offset, axes, means, covariances) = rows.x.numpy(), rows.y.numpy(), map(np.asarray, server.density)
    z = (x - offset) @ axes.T
    logs = [
        F.linear(rows.x, m.params["head.weight"], m.params["head.bias"]).log_softmax(1).numpy() for m in server.models
    ]
    r = np.array([
        [[pi[a, m] * multivariate_normal(means[a], covariances[a]).pdf(z[j]) * np.exp(logs[m][j, y[j]])
          for m in range(3)] for a in range(2)] for j in range(len(y))
    ])  # fmt: skip
    r /= r.sum((1, 2), keepdims=True)
    np.testing.assert_allclose(update.pi, r.mean(0), rtol=1e-10)
    np.testing.assert_allclose(state, r.mean(0).ravel(), rtol=1e-10)
    for a in range(2):
        weights = r[:, a].sum(1)
        np.testing.assert_allclose(update.means[a], np.average(z, 0, weights), rtol=1e-9)
        np.testing.assert_allclose(update.covariances[a], np.cov(z.T, aweights=weights, ddof=0), rtol=1e-8, atol=1e-12)
    for m in range(3):
        grad = (np.exp(logs[m]) - np.eye(3)[y]) * r[:, :, m].sum(1)[:, None] / len(y)
        expected = server.models[m].params["head.weight"].numpy() - 0.3 * grad.T @ x
        np.testing.assert_allclose(update.models[m].params["head.weight"], expected, rtol=1e-10, atol=1e-13)

    # what the client deploys
    gate = np.array([
        [sum(state.numpy().reshape(2, 3)[a, m] * multivariate_normal(means[a], covariances[a]).pdf(row)
             for a in range(2)) for m in range(3)] for row in z
    ])  # fmt: skip
    gate /= gate.sum(1, keepdims=True)
    found = site(at, 1).scores(method.personal_model(site(at, 1), message, state), rows.x)
    expected = np.log(sum(gate[:, m : m + 1] * np.exp(logs[m]) for m in range(3)))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_components_are_weighted_by_the_rows_they_are_responsible_for() -> None:
    method = FedGMM(densities=2, components=2, dim=3)
    host = worker(method, federation(dtype=torch.float64), LINEAR64).host(0, "train")
    server, rng = method.init_server(host), np.random.default_rng(0)
    pis = rng.dirichlet(np.ones(4), 3).reshape(3, 2, 2)
    means, samples = rng.standard_normal((3, 2, 3)), (5, 9, 2)
    other = [LINEAR64.initial(7, m) for m in range(6)]
    replies = [
        reply(i, Up((other[i], other[i + 3]), *map(torch.from_numpy, (pis[i], means[i], np.zeros((2, 3, 3))))), n)
        for i, n in enumerate(samples)
    ]
    new = method.aggregate(method.program()[1], host, server, replies, range(3))
    n = np.array(samples)[:, None, None] * pis
    for m in range(2):
        weights = n[:, :, m].sum(1)
        stack = np.stack([other[i + 3 * m].params["head.weight"].numpy() for i in range(3)])
        np.testing.assert_allclose(
            new.models[m].params["head.weight"], np.average(stack, 0, weights), rtol=1e-12, atol=1e-15
        )
    np.testing.assert_allclose(new.pi, n.sum(0) / sum(samples), rtol=1e-12)
    for a in range(2):
        weights = n[:, a].sum(1)
        np.testing.assert_allclose(new.density.means[a], np.average(means[:, a], 0, weights), rtol=1e-12)
        expected = np.cov(means[:, a].T, aweights=weights, ddof=0) + 1e-3 * np.eye(3)
        np.testing.assert_allclose(new.density.covariances[a], expected, rtol=1e-10, atol=1e-14)
    narrow = FedGMM(densities=2, components=2, dim=3, between=False)
    alone = narrow.aggregate(method.program()[1], host, server, replies, range(3))
    np.testing.assert_allclose(alone.density.covariances[1], 1e-3 * np.eye(3), atol=1e-15)


# --- EM against scikit-learn -----------------------------------------------------------------------------------


def test_rounds_with_one_client_are_em() -> None:
    x = blobs(60, 1)
    method = FedGMM(densities=3, components=1, dim=5, lr=1e-6)
    at = worker(method, clients(x), LINEAR64)
    start, end = begun(at, 1), loop(at, 6).snapshots[6].server
    z = density.embed(start.density, torch.from_numpy(x)).numpy()
    with pytest.warns(UserWarning, match="converge"):
        found = mixture_of(start, np.full(3, 1 / 3), 6).fit(z)
    np.testing.assert_allclose(end.density.means, found.means_, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(end.density.covariances, found.covariances_, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(end.pi[:, 0], found.weights_, rtol=1e-8)
    np.testing.assert_allclose(method.log_density(end, torch.from_numpy(x)), found.score_samples(z), rtol=1e-8)


def test_a_round_of_several_clients_is_em_on_their_pooled_rows() -> None:
    parts = [blobs(n, seed) for seed, n in enumerate((20, 35, 11))]
    method = FedGMM(densities=3, components=1, dim=4, lr=1e-6)
    at = worker(method, clients(*parts), LINEAR64)
    start, end = begun(at, 3), loop(at, 1).snapshots[1].server
    pooled = np.concatenate(parts)
    z = density.embed(start.density, torch.from_numpy(pooled)).numpy()
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(np.cov(z.T, ddof=0), np.eye(4), atol=1e-9)
    with pytest.warns(UserWarning, match="converge"):
        found = mixture_of(start, np.full(3, 1 / 3), 1).fit(z)
    np.testing.assert_allclose(end.density.means, found.means_, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(end.density.covariances, found.covariances_, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(end.pi[:, 0], found.weights_, rtol=1e-10)


def test_inputs_that_never_vary_get_no_axis() -> None:
    x = blobs(30, 2)
    x[:, 3] = x[:, 0]
    start = begun(worker(FedGMM(densities=2, dim=5), clients(x, x + 1), LINEAR64), 2)
    assert torch.isfinite(start.density.axes).all()
    assert (start.density.axes.abs().sum(1) == 0).sum() == 1


# --- what it is for --------------------------------------------------------------------------------------------


def test_rotated_clients_are_told_apart_and_new_inputs_are_noticed() -> None:
    made = {"clients": 12, "partition": "rotate:2", "unseen": 0.25, "seed": 3, "split": (0.7, 0.0, 0.3)}
    fed = consilience.make_federation("digits", **made)
    method = FedGMM(densities=2, components=2, lr=0.3)
    found = consilience.run(method, fed, model="logistic", rounds=12, executor="serial")
    x = fed.data(min(fed.unseen)).test.x
    known, turned = (method.log_density(found.server, rows).mean() for rows in (x, x.flip(-1)))
    assert known > turned
    last = found.history[-1]
    assert last["clusters"]["count"] > 1
    assert last["unseen"]["mean"] > 0.5
    assert last["global"]["accuracy"] > 0.5

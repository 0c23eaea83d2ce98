"""Methods that cluster clients and mix components: reductions, references by hand, joining, recovered groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import LINEAR64, NOISY, federation, loop, reply, site, worker
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score
from torch.nn import functional as F

import consilience
from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.messages import ClientInfo
from consilience.core.method import Phase
from consilience.core.snapshot import Snapshot
from consilience.measure.metrics import adjusted_rand
from consilience.methods import CFL, IFCA, FedAvg, FedEM, FedRC
from consilience.methods.fedrc import Up as MassesUp
from consilience.parts import components
from consilience.parts.forest import Down, Server, Up, Walk, agglomerate, cosines

USUAL: dict[str, Any] = {"batch_size": 4, "lr": 0.1, "local_epochs": 2}


def trained(method: Any, rounds: int = 3, **more: Any) -> Snapshot:
    return loop(worker(method, model=NOISY), rounds, cohort=3, **more).snapshots[rounds]


def result(method: Any, partition: str = "permute:3", **options: Any) -> consilience.Result:
    made = {"clients": 12, "partition": partition, "unseen": 0.25, "seed": 3, "split": (0.7, 0.0, 0.3)}
    fed = consilience.make_federation("digits", **made)
    return consilience.run(method, fed, **{"model": "logistic", "rounds": 12, "executor": "serial", **options})


# --- reductions, bit for bit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["model", "delta"])
@pytest.mark.parametrize("weights", ["samples", "uniform"])
def test_one_cluster_is_fedavg(form: Any, weights: Any) -> None:
    same: dict[str, Any] = {"form": form, "weights": weights, **USUAL}
    plain, one = trained(FedAvg(**same)), trained(IFCA(clusters=1, **same))
    assert tr.digest(one.server.models[0]) == tr.digest(plain.server.model)
    assert one.totals[2:] == plain.totals[2:]


def test_ifca_is_uniform_unless_told() -> None:
    one = trained(IFCA(clusters=1, **USUAL))
    assert tr.digest(one.server.models[0]) == tr.digest(trained(FedAvg(weights="uniform", **USUAL)).server.model)


@pytest.mark.parametrize("method", [FedEM, FedRC])
def test_one_component_is_fedavg(method: Any) -> None:
    plain, one = trained(FedAvg(**USUAL)), trained(method(components=1, **USUAL))
    assert tr.digest(one.server.models[0]) == tr.digest(plain.server.model)


def test_round_one_of_fedrc_is_fedem_and_round_two_is_not() -> None:
    def models(method: Any, rounds: int) -> str:
        return tr.digest(trained(method(**USUAL), rounds).server.models)

    assert models(FedRC, 1) == models(FedEM, 1)
    assert models(FedRC, 2) != models(FedEM, 2)


@pytest.mark.parametrize("method", [IFCA, FedEM])
def test_several_models_keep_no_local_buffers(method: Any) -> None:
    with pytest.raises(ConfigError, match="buffers=local"):
        method(buffers="local")


# --- by hand, float64 ------------------------------------------------------------------------------------------


def by_hand(method: Any, pi: np.ndarray, labels: np.ndarray) -> tuple[Any, ...]:
    """One full-batch step of every component at client 1 in NumPy: responsibilities, new weights, new models."""
    fed = federation(dtype=torch.float64)
    rows = fed.data(1).train
    x, y = rows.x.numpy(), rows.y.numpy()
    models = [LINEAR64.initial(0, m) for m in range(len(pi))]
    logs = []
    for model in models:
        z = x @ model.params["head.weight"].numpy().T + model.params["head.bias"].numpy()
        z -= z.max(1, keepdims=True)
        logs.append(z - np.log(np.exp(z).sum(1, keepdims=True)))
    scores = np.stack([np.log(pi[m]) + p[range(len(y)), y] - np.log(labels[m, y]) for m, p in enumerate(logs)], 1)
    q = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    new = []
    for m, model in enumerate(models):
        g = (np.exp(logs[m]) - np.eye(3)[y]) * q[:, m : m + 1] / len(y)
        new.append(
            (model.params["head.weight"].numpy() - 0.3 * g.T @ x, model.params["head.bias"].numpy() - 0.3 * g.sum(0))
        )
    return q, q.mean(0), new


@pytest.mark.parametrize("method", [FedEM, FedRC])
def test_a_step_by_hand(method: Any) -> None:
    made = method(components=3, lr=0.3, batch_size=99, local_steps=1)
    at = worker(made, federation(dtype=torch.float64), LINEAR64)
    server = made.init_server(at.host(0, "init"))
    pi, labels = np.array([0.5, 0.2, 0.3]), np.full((3, 3), 1 / 3)
    if method is FedRC:
        labels = np.array([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.1, 0.5, 0.4]])
        server = server._replace(labels=torch.from_numpy(labels))
    phase = at.program[0]
    message = made.broadcast(phase, server, ClientInfo(1, 12, "linear", at.place.architectures))
    update, found = made.client_update(phase, site(at, 1), message, torch.from_numpy(pi))
    q, expected, new = by_hand(made, pi, labels)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    for model, (weight, bias) in zip(update.models, new, strict=True):
        np.testing.assert_allclose(model.params["head.weight"].numpy(), weight, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(model.params["head.bias"].numpy(), bias, rtol=1e-12, atol=1e-14)
    if method is FedRC:
        y = at.federation.data(1).train.y.numpy()
        np.testing.assert_allclose(update.masses.numpy(), q.T @ np.eye(3)[y], rtol=1e-12)


def test_fedrc_sums_the_last_masses_of_all() -> None:
    snapshot = loop(
        worker(FedRC(components=2, **USUAL), model=LINEAR64, fed=federation(dtype=torch.float64)), 3, cohort=2
    )
    server = snapshot.snapshots[3].server
    total = sum(server.masses.values())
    torch.testing.assert_close(server.labels, total / total.sum(1, keepdim=True), rtol=1e-12, atol=0)
    fed = federation()
    assert len(server.masses) > 2  # those of clients who were not asked this time, too
    for client, mass in server.masses.items():
        assert mass.sum().item() == pytest.approx(fed.size(client))


def test_a_label_that_nobody_has_keeps_a_share() -> None:
    method = FedRC(components=1, **USUAL)
    host = worker(method, federation(dtype=torch.float64), LINEAR64).host(0, "train")
    server = method.init_server(host)
    replies = [reply(0, MassesUp(server.models, torch.tensor([[3.0, 0.0, 1.0]], dtype=torch.float64)), 4)]
    new = method.aggregate(Phase("train"), host, server, replies, [0])
    torch.testing.assert_close(new.labels, torch.tensor([[3.0, 1e-8, 1.0]], dtype=torch.float64) / (4 + 1e-8))


def test_ifca_takes_the_model_with_the_least_loss() -> None:
    method = IFCA(clusters=4, **USUAL)
    at = worker(method, federation(dtype=torch.float64), LINEAR64)
    server = method.init_server(at.host(0, "init"))
    for client in range(5):
        rows = at.federation.data(client).train
        found = [
            F.cross_entropy(F.linear(rows.x, m.params["head.weight"], m.params["head.bias"]), rows.y).item()
            for m in server.models
        ]
        assert method.cluster(site(at, client), server, None) == int(np.argmin(found))


def test_equal_models_stay_unused() -> None:
    method = IFCA(clusters=3, **USUAL)
    at = worker(method)
    server = method.init_server(at.host(0, "init"))
    same = server._replace(models=(server.models[0],) * 3)
    assert [method.cluster(site(at, client), same, None) for client in range(5)] == [0] * 5


def test_an_unused_cluster_stays() -> None:
    method = IFCA(clusters=5, **USUAL)
    at = worker(method)
    start, end = method.init_server(at.host(0, "init")), loop(at, 1).snapshots[1].server
    chosen = {method.cluster(site(at, client), start, None) for client in range(5)}
    for m, (old, new) in enumerate(zip(start.models, end.models, strict=True)):
        assert (tr.digest(old) == tr.digest(new)) == (m not in chosen)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 30), st.integers(2, 4), st.integers(0, 999))
def test_em_on_weights_never_lowers_the_likelihood(rows: int, count: int, seed: int) -> None:
    scores = torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, count)) * 3)
    pi, last = torch.full((count,), 1 / count, dtype=torch.float64), -np.inf
    for _ in range(8):
        value = (pi.log() + scores).logsumexp(1).sum().item()
        assert value >= last - 1e-9
        q, pi = components.estimate(scores, pi, 1)
        torch.testing.assert_close(q.sum(1), torch.ones(rows, dtype=torch.float64))
        last = value


# --- joining, and recovered groups -----------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20))
def test_adjusted_rand_is_that_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    found, true = zip(*pairs, strict=True)
    assert adjusted_rand(found, true) == pytest.approx(adjusted_rand_score(true, found))


@pytest.mark.parametrize(
    ("method", "rand"),
    [(FedRC(components=3, lr=0.3), 1.0), (FedEM(components=3, lr=0.3), 0.6), (IFCA(clusters=4, lr=0.3), 1.0)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_groups_are_found_and_unseen_clients_join(method: Any, rand: float) -> None:
    found, plain = result(method), result(FedAvg(lr=0.3))
    last = found.history[-1]
    assert last["clusters"]["rand"] >= rand
    assert "rand_unseen" in last["clusters"]
    assert last["unseen"]["mean"] > plain.history[-1]["unseen"]["mean"] + 0.1
    assert "clusters" not in plain.history[-1]
    assert sum(of["clients"] for of in last["clusters"]["of"].values()) == 12
    assert all("cluster" in row for row in found.clients if row["round"] == 12)


def test_finding_clusters_in_judging_is_no_work() -> None:
    quiet, often = (result(FedEM(), rounds=3, eval_clients_every=k) for k in (0, 1))
    assert quiet.snapshot.totals == often.snapshot.totals


# --- CFL -------------------------------------------------------------------------------------------------------


def test_cfl_that_never_splits_is_uniform_fedavg() -> None:
    plain = trained(FedAvg(weights="uniform", form="delta", **USUAL))
    whole = trained(CFL(eps1=0.0, eps2=0.0, wait=0, **USUAL))
    assert tr.digest(whole.server.forest.models[0]) == tr.digest(plain.server.model)
    assert tr.digest(trained(CFL(eps1=9, eps2=0, wait=0, **USUAL)).server.forest) != tr.digest(whole.server.forest)


def opposite(signs: list[int], **options: Any) -> tuple[CFL, Server]:
    """A server after updates of two kinds, those of a kind alike and of length about 1."""
    method = CFL(**{"eps1": 0.4, "eps2": 0.5, "wait": 0, **options})
    host = worker(method, federation(dtype=torch.float64), LINEAR64).host(0, "train")
    server, rng = method.init_server(host)._replace(of={99: 0}), np.random.default_rng(0)
    model = server.forest.models[0]
    axis = {k: torch.from_numpy(rng.standard_normal(v.shape)) for k, v in model.params.items()}
    axis = tr.scale(axis, 1 / tr.norm(axis))

    def noisy(t: torch.Tensor) -> torch.Tensor:
        return t + torch.from_numpy(rng.standard_normal(t.shape)) * 0.05

    deltas = [tr.tree_map(noisy, tr.scale(axis, sign)) for sign in signs]
    replies = [reply(i, Up(delta, {}, 0)) for i, delta in enumerate(deltas)]
    return method, method.aggregate(Phase("train"), host, server, replies, range(len(signs)))


def test_opposite_updates_are_split_into_their_groups() -> None:
    signs = [1, -1, -1, 1, 1, -1]
    _, server = opposite(signs)
    groups = [server.of[i] for i in range(6)]
    assert adjusted_rand(groups, signs) == 1
    assert sorted(server.forest.models) == [1, 2]
    assert 99 not in server.of  # it was not there, so it will walk
    start = LINEAR64.initial(0).params["head.bias"]
    for leaf, split in server.forest.splits[0].directions.items():
        moved = server.forest.models[leaf].params["head.bias"] - start
        torch.testing.assert_close(
            moved / moved.norm(), split["head.bias"] / split["head.bias"].norm(), atol=0.05, rtol=0
        )


@pytest.mark.parametrize(
    ("signs", "options"),
    [([1, 1, 1, 1], {}), ([1, -1], {}), ([1, -1, 1, -1], {"wait": 1}), ([1, -1, 1, -1], {"eps2": 3.0})],
)
def test_what_is_alike_few_or_early_stays_whole(signs: list[int], options: dict[str, Any]) -> None:
    assert list(opposite(signs, **options)[1].forest.models) == [0]


def test_the_gap_of_the_paper() -> None:
    assert len(opposite([1, -1, 1, -1], gap=0.5)[1].forest.models) == 2
    method, near = (
        CFL(eps1=9, eps2=0, wait=0, gap=0.9),
        [{"w": torch.tensor(v)} for v in ([1.0, 0], [1, 0.1], [1, 0.9])],
    )
    host = worker(method).host(0, "train")
    server = method.init_server(host)
    assert method.divide(host, server, near) == [0, 0, 0]
    assert CFL(eps1=9, eps2=0, wait=0).divide(host, server, near) == [0, 0, 1]


def test_complete_linkage_of_cosines() -> None:
    near = cosines([{"w": torch.tensor(v)} for v in ([1.0, 0.0], [0.0, 0.0], [-2.0, 0.0], [3.0, 3.0])])
    np.testing.assert_allclose(near[0], [1, 0, -1, 0.5**0.5], atol=1e-12)
    assert agglomerate(1 - near, "complete", count=2)[0] != agglomerate(1 - near, "complete", count=2)[2]
    assert agglomerate(1 - near, "complete", below=5.0) == [0] * 4


def test_cfl_finds_groups_and_lets_others_walk_down() -> None:
    method = CFL(lr=0.3, eps1=0.3, eps2=0.5, wait=6)
    found = result(method, "permute:2", rounds=10)
    last, server = found.history[-1], found.server
    assert last["clusters"]["rand"] == 1.0
    assert last["clusters"]["rand_unseen"] == 1.0
    true = found.worker.federation.groups
    assert true is not None
    assert len({(true[row["client"]], row["cluster"]) for row in found.clients if row["round"] == 10}) == 2
    assert found.global_model is None
    assert last["method"]["clusters"] == len(server.forest.models)
    assert set(server.of.values()) == set(server.forest.models)
    at = found.worker
    seen, unseen = int(at.federation.seen[0]), min(at.federation.unseen)
    info = [ClientInfo(c, 1, "logistic", at.place.architectures) for c in (seen, unseen)]
    first, second = (method.broadcast(Phase("train"), server, i) for i in info)
    assert isinstance(first, Down)
    assert isinstance(second, Walk)


def test_clients_that_missed_a_split_walk() -> None:
    some = trained(CFL(eps1=9, eps2=0, wait=0, **USUAL), 1)
    assert len(some.server.forest.models) == 2
    assert len(some.server.of) == 3
    more = trained(CFL(eps1=9, eps2=0, wait=0, **USUAL), 5)
    assert set(more.server.of.values()) <= set(more.server.forest.models)

"""AHC: reductions, where clusters are cut, Reptile's step, and recovered groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import LINEAR64, NOISY, federation, loop, reply, site, vector, worker

import consilience
from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.method import Phase
from consilience.core.snapshot import Snapshot
from consilience.measure.metrics import adjusted_rand
from consilience.methods import AHC, FedAvg, Local
from consilience.methods.ahc import clusters_at_jump
from consilience.parts.forest import Server, Up

USUAL: dict[str, Any] = {"batch_size": 4, "lr": 0.1, "local_epochs": 2}


def trained(method: Any, rounds: int = 3, **more: Any) -> Snapshot:
    return loop(worker(method, **{"model": NOISY, **more}), rounds).snapshots[rounds]


def groups(signs: list[int], method: AHC, seed: int = 0) -> Server:
    """The server after updates along an axis for each sign, with a little noise."""
    host = worker(method, federation(dtype=torch.float64), LINEAR64).host(method.wait, "train")
    server, rng = method.init_server(host), np.random.default_rng(seed)
    shapes = {k: v.shape for k, v in server.forest.models[0].params.items()}
    axes = {s: {k: torch.from_numpy(rng.standard_normal(v)) for k, v in shapes.items()} for s in sorted(set(signs))}
    deltas = [
        {k: v + 0.2 * torch.from_numpy(rng.standard_normal(v.shape)) for k, v in axes[sign].items()} for sign in signs
    ]
    replies = [reply(i, Up(delta, {}, 0), 1 + i) for i, delta in enumerate(deltas)]
    return method.aggregate(Phase("train"), host, server, replies, range(len(signs)))


def test_a_cut_that_is_never_reached_is_fedavg() -> None:
    plain = trained(FedAvg(form="delta", **USUAL))
    whole = trained(AHC(cut=1e9, wait=0, every=1, adapt_steps=0, **USUAL))
    assert list(whole.server.forest.models) == [0]
    assert tr.digest(whole.server.forest.models[0]) == tr.digest(plain.server.model)


def test_a_cut_at_0_leaves_everybody_alone() -> None:
    exact: dict[str, Any] = {"fed": federation(dtype=torch.float64), "model": LINEAR64}
    apart = trained(AHC(cut=0.0, wait=0, meta_lr=1.0, **USUAL), **exact)
    alone = trained(Local(**USUAL), **exact)
    assert len(apart.server.forest.models) == 5
    for client, leaf in apart.server.of.items():
        own = apart.server.forest.models[leaf]
        torch.testing.assert_close(vector(own), vector(alone.states[client]), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "options", [{}, {"linkage": "complete"}, {"linkage": "ward", "metric": "euclidean"}, {"cut": 0.2}]
)
def test_groups_of_updates_are_separated(options: dict[str, Any]) -> None:
    signs = [0, 1, 2, 2, 1, 0, 0, 1, 2]
    server = groups(signs, AHC(wait=3, jump=1.5, **options))
    assert len(server.forest.models) == 3
    assert adjusted_rand([server.of[i] for i in range(9)], signs) == 1


def test_what_is_alike_few_or_not_due_stays_whole() -> None:
    assert list(groups([0] * 8, AHC(jump=1.5)).forest.models) == [0]
    assert list(groups([0, 1, 0, 1], AHC(jump=1.5, least=4)).forest.models) == [0]
    method = AHC(wait=2, every=3, jump=1.5)
    at = worker(method, federation(dtype=torch.float64), LINEAR64)
    deltas = [{"w": torch.tensor(v)} for v in ([1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0])]
    found = [max(method.divide(at.host(v, "train"), method.init_server(at.host(0, "init")), deltas)) for v in range(9)]
    assert found == [0, 0, 1, 0, 0, 1, 0, 0, 1]


def test_the_largest_jump_is_found_by_hand() -> None:
    points = np.array([0.0, 1.0, 10.0, 11.2, 31.0, 32.1])
    distances = np.abs(points[:, None] - points)
    assert clusters_at_jump(distances, "average", 2.0) == 3
    assert clusters_at_jump(distances, "average", 20.0) == 1
    assert clusters_at_jump(1 - np.eye(6), "average", 1.01) == 1
    assert clusters_at_jump(distances[:2, :2], "average", 1.01) == 1


def test_reptile_goes_part_of_the_way() -> None:
    signs = [0, 0, 1, 1]
    start = LINEAR64.initial(0)
    far, near = (groups(signs, AHC(jump=1.5, meta_lr=rate)) for rate in (1.0, 0.25))
    assert far.of == near.of
    assert len(far.forest.models) == 2
    for leaf, model in far.forest.models.items():
        moved, part = vector(model) - vector(start), vector(near.forest.models[leaf]) - vector(start)
        torch.testing.assert_close(part, 0.25 * moved, rtol=1e-12, atol=1e-15)
    # by hand: weights are rows, 1 and 2 of the first two
    split = far.forest.splits[0]
    assert set(split.directions) == set(far.forest.models)


def test_clients_deploy_after_steps_of_their_own() -> None:
    for steps in (0, 3):
        method = AHC(adapt_steps=steps, lr=0.1, batch_size=99)
        at = worker(method, federation(dtype=torch.float64), LINEAR64)
        message = method.broadcast(at.program[0], method.init_server(at.host(0, "init")), None)  # type: ignore[arg-type]
        rows, w = at.federation.data(1).train, message.model
        weight, bias = w.params["head.weight"].clone(), w.params["head.bias"].clone()
        for _ in range(steps):
            p = (rows.x @ weight.T + bias).softmax(1) - torch.nn.functional.one_hot(rows.y, 3)
            weight, bias = weight - 0.1 * p.T @ rows.x / len(p), bias - 0.1 * p.mean(0)
        found = method.personal_model(site(at, 1), message, None)
        torch.testing.assert_close(found.weights.params["head.weight"], weight, rtol=1e-10, atol=1e-12)


def test_wards_linkage_is_euclidean() -> None:
    with pytest.raises(ConfigError, match="metric=euclidean"):
        AHC(linkage="ward")


def test_it_finds_groups_and_lets_others_join() -> None:
    made = {"clients": 12, "partition": "permute:2", "unseen": 0.25, "seed": 3, "split": (0.7, 0.0, 0.3)}
    fed = consilience.make_federation("digits", **made)
    found, plain = (
        consilience.run(m, fed, model="logistic", rounds=12, executor="serial")
        for m in (AHC(lr=0.3, wait=4, every=4), FedAvg(lr=0.3))
    )
    last = found.history[-1]
    assert last["clusters"]["rand"] > 0.5
    assert last["clusters"]["rand_unseen"] > 0.5
    assert last["unseen"]["mean"] > plain.history[-1]["unseen"]["mean"] + 0.1
    assert found.global_model is None

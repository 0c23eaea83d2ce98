"""SCAFFOLD against a loop written out from algorithm 1 of the paper, under partial participation and skew."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import consilience
from consilience.core.events import draw_cohort
from consilience.core.streams import philox

ROUNDS, COHORT, LR, BATCH = 12, 3, 0.2, 8


@pytest.mark.parametrize("partition", ["dirichlet:0.1", "shards:2"])
def test_scaffold_is_algorithm_1(partition: str) -> None:
    """Own gradients by hand (softmax regression in float64) and the paper's own form of option II, c_i - c + (x - y)
    / (K eta); only the cohort and the order of batches are taken from the library's streams."""
    federation = consilience.make_federation("digits", clients=12, partition=partition, seed=3)
    result = consilience.run(
        consilience.methods.Scaffold(lr=LR, batch_size=BATCH),
        federation,
        model="logistic",
        rounds=ROUNDS,
        participation=COHORT,
        seed=3,
        executor="serial",
    )
    start = result.worker.place.architectures["logistic"].initial(3).params
    x = np.hstack([start["head.weight"].double().numpy(), start["head.bias"].double().numpy()[:, None]])
    c, own = np.zeros_like(x), {k: np.zeros_like(x) for k in range(12)}
    asked = dict.fromkeys(range(12), 0)
    for version in range(ROUNDS):
        cohort = draw_cohort(philox(3, "cohort", version, 0), federation.seen, COHORT)
        moves, changes = [], []
        for k in cohort:
            asked[k] += 1
            data = federation.data(k).train
            rows = np.hstack([data.x.flatten(1).double().numpy(), np.ones((len(data), 1))])
            labels = F.one_hot(data.y, 10).double().numpy()
            order = philox(3, "batches", k, asked[k], "train").permutation(len(data))
            y, steps = x.copy(), 0
            for at in range(0, len(data), BATCH):
                take = order[at : at + BATCH]
                p = torch.from_numpy(rows[take] @ y.T).softmax(1).numpy()
                y = y - LR * ((p - labels[take]).T @ rows[take] / len(take) - own[k] + c)
                steps += 1
            new = own[k] - c + (x - y) / (steps * LR)
            moves.append(y - x)
            changes.append(new - own[k])
            own[k] = new
        x = x + sum(moves) / COHORT
        c = c + sum(changes) / 12
    found = result.server.model.params
    assert np.allclose(found["head.weight"].double().numpy(), x[:, :-1], atol=2e-5)
    assert np.allclose(found["head.bias"].double().numpy(), x[:, -1], atol=2e-5)
    for k, state in result.states.items():
        assert np.allclose(state["head.weight"].double().numpy(), own[k][:, :-1], atol=2e-5), k

"""FRL against its definition: masks, votes, what one vote can do, and what is sent."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from helpers import NORMED, Linear, architecture, federation, loop, reply, worker

import consilience
from consilience.core.encode import encoded_size
from consilience.core.errors import ConfigError
from consilience.methods import FRL
from consilience.methods.frl import _Popped, narrow, top, vote
from consilience.wire.validate import Validation


def naive_vote(rankings: list[list[int]]) -> list[int]:
    n = len(rankings[0])
    sums = [sum(ranking.index(e) for ranking in rankings) for e in range(n)]
    return sorted(range(n), key=lambda e: (sums[e], e))


def test_the_vote_is_that_of_its_definition() -> None:
    rng = np.random.default_rng(0)
    for n, m in ((1, 1), (5, 1), (7, 4), (30, 9)):
        rankings = [torch.from_numpy(rng.permutation(n)).to(torch.int16) for _ in range(m)]
        found = vote(rankings)
        assert found.tolist() == naive_vote([r.tolist() for r in rankings])
        assert found.dtype == torch.int16
        assert torch.equal(found, vote(rankings[::-1]))


def test_votes_of_one_of_all_alike_and_of_opposites() -> None:
    one = torch.tensor([2, 0, 3, 1])
    assert vote([one]).tolist() == one.tolist()
    assert vote([one] * 5).tolist() == one.tolist()
    assert vote([one, one.flip(0)]).tolist() == [0, 1, 2, 3]
    assert vote([one, one.flip(0), one]).tolist() == one.tolist()


def test_one_vote_moves_a_sum_by_less_than_n() -> None:
    """Whatever one of five clients sends, an edge that the others put apart by more than that stays where it is."""
    others = [torch.arange(4)] * 4  # sums 0, 4, 8, 12
    for lie in permutations(range(4)):
        places = vote([*others, torch.tensor(lie)]).argsort()
        assert places[0] < places[2]
        assert places[1] < places[3]


def test_the_mask_is_the_greatest_scores_and_its_gradient_that_of_scores() -> None:
    scores = torch.tensor([[0.3, -0.1], [0.2, 0.3]], requires_grad=True)
    assert top(scores, 2).tolist() == [[1, 0], [0, 1]]
    assert top(scores, 1).tolist() == [[0, 0], [0, 1]]  # of equal ones the last
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    (_Popped.apply(scores, 2) * weights).sum().backward()
    assert torch.equal(scores.grad, weights)


@pytest.mark.parametrize("mask_on", ["score", "abs"])
def test_a_round_of_one_client_is_edge_popup(mask_on: Any) -> None:
    """In float64, by hand: a linear model with two edges in three used, two steps on all rows."""
    fed = federation([12], dtype=torch.float64)
    method = FRL(keep=0.6, mask_on=mask_on, lr=0.3, momentum=0.0, local_steps=2, batch_size=12)
    at = worker(method, fed, architecture(Linear, dtype=torch.float64))
    server = method.init_server(at.host(0, "init"))
    (name,) = server.ranks
    theta, ranking = server.model.params[name], server.ranks[name].long()
    s = torch.empty_like(server.ordered[name])
    s[ranking] = server.ordered[name]
    rows, n = at.host(0, "x").cast(fed.parts[0].train), theta.numel()
    keep = n - int(0.4 * n)
    for _ in range(2):
        key = s.abs() if mask_on == "abs" else s
        mask = torch.zeros(n, dtype=theta.dtype)
        mask[key.argsort(stable=True)[n - keep :]] = 1
        w = (theta.flatten() * mask).reshape(theta.shape).requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(rows.x @ w.T, rows.y)
        (slope,) = torch.autograd.grad(loss, w)
        change = (slope * theta).flatten()
        s = s - 0.3 * (change * s.sign() if mask_on == "abs" else change)
    done = loop(at, 1)
    assert done.snapshots[1].server.ranks[name].tolist() == s.argsort(stable=True).tolist()


def test_what_everybody_begins_with() -> None:
    at = worker(FRL(), model=NORMED)
    server = FRL().init_server(at.host(0, "init"))
    weight = server.model.params["features.0.weight"]
    assert set(weight.abs().flatten().tolist()) == {np.float32((2 / weight.shape[1]) ** 0.5)}
    assert not server.model.params["features.0.bias"].any()
    assert (server.model.params["features.1.weight"] == 1).all()
    assert server.ranks.keys() == {"features.0.weight", "head.weight"}
    assert all((o >= 0).all() for o in server.ordered.values())
    used = FRL().global_model(server).weights.params  # type: ignore[attr-defined]
    for name in server.ranks:
        assert int((used[name] != 0).sum()) == used[name].numel() - int(0.5 * used[name].numel())


def test_permutations_are_checked_before_the_vote() -> None:
    method = FRL()
    at = worker(method, model=NORMED)
    server = method.init_server(at.host(0, "init"))
    good = method.broadcast(at.program[0], server, None)  # type: ignore[arg-type]
    name = "head.weight"
    r = good.ranks[name]
    twice = r.clone()
    twice[0] = twice[1]
    for bad in (twice, r[:-1], r.long(), r.float(), r.reshape(3, -1), None, [0]):
        (refusal,) = Validation(at.place)([reply(1, good._replace(ranks={**good.ranks, name: bad}))], None)[1]
        assert (refusal.client, refusal.field) == (1, f"ranks.{name}")
    for bad in ({}, {name: r}, dict(reversed(good.ranks.items())), None, list(good.ranks.values())):
        assert Validation(at.place)([reply(1, good._replace(ranks=bad))], None)[1][0].field == "ranks"
    assert Validation(at.place)([reply(1, good)], None)[1] == []


def test_types_are_as_narrow_as_numbers_allow() -> None:
    assert [narrow(n) for n in (256, 257, 2**15, 2**15 + 1)] == [torch.uint8, torch.int16, torch.int16, torch.int32]
    fed = consilience.make_federation("digits", clients=3, seed=0)
    small = consilience.run(FRL(), fed, model="mlp:32", rounds=1, executor="serial")
    whole = consilience.run(consilience.methods.FedAvg(), fed, model="mlp:32", rounds=1, executor="serial")
    assert small.history[-1]["bytes_up"] < 0.6 * whole.history[-1]["bytes_up"]
    assert encoded_size(small.server) > 0


def test_it_learns_and_a_reversed_vote_of_a_fifth_does_not_stop_it() -> None:
    fed = consilience.make_federation("digits", clients=5, seed=0)
    usual: dict[str, Any] = {"model": "mlp:64", "rounds": 15, "executor": "serial", "eval_clients_every": 0}
    method = FRL(batch_size=16)
    plain = consilience.run(method, fed, **usual).history[-1]["global"]["accuracy"]
    lied = consilience.run(method, fed, attack="signflip:0.2", **usual).history[-1]["global"]["accuracy"]
    assert plain > 0.7
    assert lied > 0.6


def test_what_does_not_fit_is_refused() -> None:
    fed = federation()
    for bad in ({"aggregator": "median"}, {"compress": "topk:0.1"}, {"client_momentum": 0.5}, {"weights": "samples"}):
        with pytest.raises(ConfigError):
            consilience.run(FRL(**bad), fed, rounds=1, executor="serial")

"""Methods among neighbours over topologies of all kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import LINEAR64, federation, vector

import consilience
from consilience.core import tree as tr
from consilience.core.encode import encoded_size
from consilience.fleet.varying import Topology
from consilience.methods import DPSGD, MHD, FedAvg, Local, SCooL

USUAL: dict[str, Any] = {"batch_size": 4, "lr": 0.1}
N = 5


def run(method: Any, model: Any = LINEAR64, rounds: int = 3, **options: Any) -> consilience.Result:
    fed = federation(dtype=model.dtype)
    made = {"model": model, "rounds": rounds, "executor": "serial", "eval_clients_every": 0, **options}
    return consilience.run(method, fed, **made)


def digests(result: consilience.Result) -> list[str]:
    """Of nodes' parameters, in order."""
    return [tr.digest(state.model.params) for _, state in sorted(result.states.items())]


# --- D-PSGD over topologies that change ------------------------------------------------------------------------------


@pytest.fixture
def matrix_file(tmp_path: Path) -> str:
    """A matrix that is doubly stochastic and not symmetric."""
    path = tmp_path / "matrix.txt"
    rows = [[0.4 if j == i else 0.6 if j == (i + 2) % N else 0.0 for j in range(N)] for i in range(N)]
    path.write_text("\n".join(" ".join(map(str, row)) for row in rows))
    return str(path)


def unflat(flat: torch.Tensor, like: Any) -> Any:
    """Parameters like these from one vector."""
    parts = flat.split([p.numel() for p in like.values()])
    return {name: part.reshape(p.shape) for (name, p), part in zip(like.items(), parts, strict=True)}


@pytest.mark.parametrize("topology", ["onepeer", "matching", "anew:er:0.4", "pull:0.5", "none*2,ring", "FILE"])
@pytest.mark.parametrize("order", ["atc", "cta"])
def test_dpsgd_by_hand(topology: str, order: Any, matrix_file: str) -> None:
    """x_i <- sum_j W_t,ij (x_j + Delta_j), or sum_j W_t,ij x_j + Delta_i, with a matrix W_t for each round."""
    topology = matrix_file if topology == "FILE" else topology
    result = run(DPSGD(order=order, **USUAL), topology=topology, seed=2)
    at = helpers.worker(FedAvg(**USUAL), federation(dtype=torch.float64), LINEAR64, seed=2)
    start = helpers.site(at, 0).initial()
    x = torch.stack([vector(start)] * N)
    for t in range(3):
        w = torch.zeros(N, N, dtype=torch.float64)
        for i, row in Topology(topology, tuple(range(N)), seed=2).at(t).items():
            for j, weight in row.items():
                w[i, j] = weight
        models = [start._replace(params=unflat(row, start.params)) for row in x]
        ends = [vector(helpers.site(at, i, t + 1, t).fit(models[i]).weights) for i in range(N)]
        x = w @ torch.stack(ends) if order == "atc" else w @ x + torch.stack(ends) - x
    for i, state in result.states.items():
        torch.testing.assert_close(vector(state.model), x[i], rtol=1e-12, atol=1e-14)


def test_bytes_are_those_of_edges_used(matrix_file: str) -> None:
    size = encoded_size(LINEAR64.initial(0))
    for topology, rounds, edges in (("onepeer", 2, 10), ("none", 2, 0), ("ring*2,none", 3, 20), (matrix_file, 1, 5)):
        last = run(DPSGD(**USUAL), rounds=rounds, topology=topology).history[-1]
        assert last["bytes_up"] == last["bytes_down"] == edges * size, topology


def test_who_sends_pays_up_and_who_gets_pays_down() -> None:
    """Node 0 gives to one node and gets from two."""
    topology = "pull:0.7"
    rows = Topology(topology, tuple(range(N)), seed=0).at(0)
    size = encoded_size(LINEAR64.initial(0))
    spent = run(DPSGD(**USUAL), rounds=1, topology=topology).snapshot.spent
    gives = [sum(i in row for j, row in rows.items() if j != i) for i in range(N)]
    assert gives != [len(rows[i]) - 1 for i in range(N)]
    for i in range(N):
        assert (spent[i].bytes_up, spent[i].bytes_down) == (gives[i] * size, (len(rows[i]) - 1) * size)


def test_power_of_two_nodes_agree_after_one_peer_each() -> None:
    """Without training, log2 n rounds of one peer are the exact mean."""
    fed = federation((9, 8, 8, 9, 10, 12, 8, 9), dtype=torch.float64)
    made: dict[str, Any] = {"model": LINEAR64, "executor": "serial", "topology": "none,onepeer*3"}
    one, all_ = (consilience.run(DPSGD(**USUAL), fed, rounds=rounds, **made) for rounds in (1, 4))
    assert len(set(digests(one))) == 8
    spread = torch.stack([vector(s.model) for s in one.states.values()]).std(0).mean()
    later = torch.stack([vector(s.model) for s in all_.states.values()]).std(0).mean()
    assert later < 0.6 * spread  # they have trained in the last round, and exchanged with a few since


def test_everybody_with_everybody_every_other_round() -> None:
    """A round of none leaves each node its own model, bit for bit; one of complete makes all one, as FedAvg does."""
    alone = run(Local(**USUAL), rounds=1)
    apart = run(DPSGD(**USUAL), rounds=1, topology="none,complete")
    assert digests(apart) == [tr.digest(model.params) for _, model in sorted(alone.states.items())]
    assert len(set(digests(run(DPSGD(**USUAL), rounds=2, topology="none,complete")))) == 1
    whole = run(FedAvg(weights="uniform", **USUAL), rounds=2).server.model
    assert set(digests(run(DPSGD(**USUAL), rounds=2, topology="complete*2,none"))) == {tr.digest(whole.params)}


# --- MHD and SCooL over any topology ----------------------------------------------------------------------------------


def digits(**more: Any) -> Any:
    return consilience.make_federation("digits", clients=6, partition="dirichlet:0.5", seed=1, **more)


@pytest.mark.parametrize("topology", ["matching:ring", "ring*2,complete", "FILE"])
@pytest.mark.parametrize("method", [MHD(public_rows=40), SCooL(settle=2, keep=0.6)], ids=["mhd", "scool"])
def test_any_topology_will_do(method: Any, topology: str, tmp_path: Path) -> None:
    """They learn, whoever meets whom; what they heard last, or settled on, is of nodes that they met."""
    if topology == "FILE":
        path = tmp_path / "weights.txt"
        path.write_text("0 1 0.3\n1 2 0.4\n2 3 0.4\n3 4 0.2\n4 5 0.1\n")
        topology = str(path)
    fed = digits(public=60) if isinstance(method, MHD) else digits()
    options = {"model": "mlp:16", "topology": topology, "executor": "serial", "eval_clients_every": 1}
    result = consilience.run(method, fed, rounds=4, **options)
    assert result.history[-1]["clients"]["mean"] > result.history[0]["clients"]["mean"] + 0.05
    for i, state in result.states.items():
        if isinstance(method, MHD):
            assert state.heard.keys() == Topology(topology, tuple(range(6))).at(3)[i].keys() - {i}
        else:
            met = Topology(topology, tuple(range(6))).at(1)[i].keys()  # in the second round
            assert state.kept is not None
            assert set(state.kept) <= met
            assert len(state.kept) == max(1, int(0.6 * len(met)))


@pytest.mark.parametrize("topology", ["none", "onepeer", "anew:er:0.4"])
def test_attention_over_topologies_that_change(topology: str) -> None:
    """Of one that does not hear it, a node cannot know how good its model is there, and takes nothing."""
    found = run(SCooL(prior="attention", **USUAL), rounds=3, topology=topology)
    alone = run(Local(**USUAL), rounds=3)
    same = [torch.allclose(vector(found.states[i].model), vector(model)) for i, model in alone.states.items()]
    assert all(same) if topology in ("none", "onepeer") else not any(same)


def test_with_nobody_around_they_are_local_training() -> None:
    options = {"model": "mlp:16", "rounds": 3, "executor": "serial", "eval_clients_every": 0}
    alone = consilience.run(Local(), digits(public=60), **options)
    for method in (MHD(public_rows=40), DPSGD()):
        apart = consilience.run(method, digits(public=60), topology="none", **options)
        assert digests(apart) == [tr.digest(model.params) for _, model in sorted(alone.states.items())]

"""SCooL: reductions, weights and blocks by hand, attention against PyTorch's own, and whom nodes learn from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import LINEAR64, NORMED, federation, site, vector, worker
from scipy.special import digamma

import consilience
from consilience.core import tree as tr
from consilience.core.messages import Inbox
from consilience.methods import FedAvg, SCooL
from consilience.methods.scool import Adam, Node, Words
from consilience.parts import cooperation

USUAL: dict[str, Any] = {"batch_size": 4, "lr": 0.1, "local_epochs": 2}


def run(method: Any, model: Any = LINEAR64, rounds: int = 3, **options: Any) -> consilience.Result:
    fed = federation(dtype=torch.float64 if model is LINEAR64 else torch.float32)
    made = {"model": model, "rounds": rounds, "executor": "serial", "eval_clients_every": 0, **options}
    return consilience.run(method, fed, **made)


def test_dirac_on_a_complete_graph_is_fedavg() -> None:
    mixed = run(SCooL(prior="dirac", **USUAL), NORMED)
    plain = run(FedAvg(weights="uniform", form="delta", **USUAL), NORMED)
    for state in mixed.states.values():  # counters of batches are each node's own
        assert tr.digest(state.model.params) == tr.digest(plain.server.model.params)
        assert torch.equal(vector(state.model.buffers), vector(plain.server.model.buffers))


def test_without_belief_in_losses_everybody_counts_alike() -> None:
    plain = vector(run(FedAvg(weights="uniform", form="delta", **USUAL)).server.model)
    mixed = run(SCooL(scale=1e14, settle=99, **USUAL))
    for state in mixed.states.values():
        torch.testing.assert_close(vector(state.model), plain, rtol=1e-10, atol=1e-10)
        assert state.end is None


def test_a_node_alone_trains_alone() -> None:
    method = SCooL(prior="sbm", **USUAL)
    at = worker(method, federation(dtype=torch.float64), LINEAR64)
    state = method.init_client(site(at, 1))
    _, state = method.client_update(at.program[0], site(at, 1), None, state)
    end = state.end
    for phase in at.program[1:]:
        state = method.mix(phase, site(at, 1), state, Inbox({1: method.send(phase, state)}, {1: 1.0}))
    torch.testing.assert_close(vector(state.model), vector(end), rtol=1e-13, atol=1e-15)


def naive(phi: np.ndarray, gamma: np.ndarray, loss: np.ndarray, i: int, scale: float) -> tuple[Any, ...]:
    """Edges from node i and its block, with loops. phi: ``(n, k)``; loss: ``(n, n)``, models by rows."""
    n, k = phi.shape
    b = np.where(np.eye(k, dtype=bool), 0.8, 0.2)

    def edge(u: int, v: int) -> float:
        z = sum(phi[u, g] * phi[v, h] * np.log(b[g, h] / (1 - b[g, h])) for g in range(k) for h in range(k))
        return float(1 / (1 + np.exp(-(z - loss[u, v]) / scale)))

    logits = np.zeros(k)
    for g in range(k):
        for j in range(n):
            for h in range(k):
                if j != i:
                    to, fro = edge(i, j), edge(j, i)
                    logits[g] += phi[j, h] * (to * np.log(b[g, h]) + fro * np.log(b[h, g]))
                    logits[g] += phi[j, h] * ((1 - to) * np.log(1 - b[g, h]) + (1 - fro) * np.log(1 - b[h, g]))
        logits[g] += digamma(gamma[g]) - digamma(gamma.sum())
    new = np.exp(logits) / np.exp(logits).sum()
    return np.array([edge(i, j) for j in range(n)]), new


@pytest.mark.parametrize("k", [2, 3])
def test_blocks_and_edges_by_hand(k: int) -> None:
    rng, n = np.random.default_rng(k), 4
    phi, loss, gamma = rng.dirichlet(np.ones(k), n), rng.random((n, n)) * 3, rng.random(k) + 0.5
    method = SCooL(blocks=k, scale=1.7, sweeps=1)
    start = LINEAR64.initial(0)
    blank = Adam(*(torch.zeros(2, dtype=torch.float64) for _ in range(3)), 0)
    state = Node(start, start, torch.from_numpy(phi[2]), torch.from_numpy(gamma), blank, {}, {}, None)
    found, out = method._blocks(state, 2, *map(torch.from_numpy, (phi, loss[2], loss[:, 2])))
    edges, new = naive(phi, gamma, loss, 2, 1.7)
    np.testing.assert_allclose(out, edges, rtol=1e-12)
    np.testing.assert_allclose(found.phi, new, rtol=1e-12)
    np.testing.assert_allclose(found.gamma, 1 + new, rtol=1e-12)
    # a second sweep sees the first one's block
    again, second = SCooL(blocks=k, scale=1.7, sweeps=2)._blocks(
        state, 2, *map(torch.from_numpy, (phi, loss[2], loss[:, 2]))
    )
    phi[2] = new
    edges, new = naive(phi, 1 + new, loss, 2, 1.7)
    np.testing.assert_allclose(second, edges, rtol=1e-12)
    np.testing.assert_allclose(again.phi, new, rtol=1e-12)


def test_attention_takes_steps_of_adamw() -> None:
    method = SCooL(prior="attention", scale=1.3, attention_lr=0.2)
    rng = np.random.default_rng(0)
    likeness, losses = torch.from_numpy(rng.standard_normal((5, 3))), torch.from_numpy(rng.random(5))
    mix = torch.ones(3, dtype=torch.float64)
    blank = Adam(mix, torch.zeros_like(mix), torch.zeros_like(mix), 0)
    start = LINEAR64.initial(0)
    state = Node(start, start, mix, mix, blank, {}, {}, None)
    own = torch.nn.Parameter(mix.clone())
    optimiser = torch.optim.AdamW([own], lr=0.2, betas=(0.9, 0.99))
    target = (-losses / 1.3).softmax(0)
    for _ in range(3):
        a = (likeness @ own).softmax(0)
        state, weights = method._attend(state, state.attention.mix, likeness, losses)
        torch.testing.assert_close(weights / weights.sum(), (a * target / (a * target).sum()).detach())
        optimiser.zero_grad()
        (-(target * a.log()).sum()).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        torch.testing.assert_close(state.attention.mix, own.detach(), rtol=1e-9, atol=1e-11)


def exchange(method: SCooL, rounds: int = 1) -> tuple[Any, dict[int, Node], dict[int, Words]]:
    """Rounds among five nodes of a complete graph by hand; the last round's words."""
    at = worker(method, federation(dtype=torch.float64), LINEAR64)
    states = {i: method.init_client(site(at, i)) for i in range(5)}
    words: dict[int, Words] = {}
    for r in range(rounds):
        sites = {i: site(at, i, r + 1, r) for i in states}
        states = {i: method.client_update(at.program[0], sites[i], None, s)[1] for i, s in states.items()}
        for phase in at.program[1:]:
            words = {i: method.send(phase, s) for i, s in states.items()}
            inbox = Inbox(words, dict.fromkeys(words, 0.2))
            states = {i: method.mix(phase, sites[i], s, inbox) for i, s in states.items()}
    return at, states, words


@pytest.mark.parametrize("prior", ["sbm", "attention"])
def test_a_round_moves_by_weights_of_losses_on_the_others_rows(prior: Any) -> None:
    method = SCooL(prior=prior, settle=99, **USUAL)
    at, states, words = exchange(method)
    start = vector(LINEAR64.initial(0))
    ends = {i: start + vector(w.delta) for i, w in words.items()}
    assert all(tr.tensors(w.delta) for w in words.values())
    for j, w in words.items():  # the loss of every node's model on j's rows
        rows = at.federation.data(j).train
        for i, value in w.losses.items():
            params = words[i].delta
            first = LINEAR64.initial(0).params
            scores = (
                rows.x @ (first["head.weight"] + params["head.weight"]).T + first["head.bias"] + params["head.bias"]
            )
            assert value == pytest.approx(torch.nn.functional.cross_entropy(scores, rows.y).item(), rel=1e-9)
    for i, state in states.items():  # the new model is in the hull of starts and changes, with weights that sum to 1
        moved = vector(state.model) - start
        basis = torch.stack([end - start for end in ends.values()], 1)
        weights = torch.linalg.lstsq(basis, moved[:, None]).solution[:, 0]
        torch.testing.assert_close(basis @ weights, moved, rtol=1e-8, atol=1e-10)
        assert weights.sum().item() == pytest.approx(1, abs=1e-8)
        assert (weights > -1e-9).all()
        if prior == "sbm":
            others = {j: words[j].losses[i] for j in words if j != i}
            assert min(others.values()) < max(others.values())


def test_after_a_while_only_the_strongest_count() -> None:
    _, states, _ = exchange(SCooL(settle=2, keep=0.4, **USUAL), rounds=1)
    assert all(state.kept is None for state in states.values())
    _, states, _ = exchange(SCooL(settle=2, keep=0.4, **USUAL), rounds=2)
    assert all(len(state.kept or ()) == 2 for state in states.values())
    _, after, words = exchange(SCooL(settle=2, keep=0.4, **USUAL), rounds=3)
    start = {i: vector(s.model) for i, s in states.items()}
    for i, state in after.items():
        assert state.kept == states[i].kept
        basis = torch.stack([vector(words[j].delta) for j in state.kept or ()], 1)
        moved = vector(state.model) - start[i]
        weights = torch.linalg.lstsq(basis, moved[:, None]).solution[:, 0]
        torch.testing.assert_close(basis @ weights, moved, rtol=1e-8, atol=1e-10)
        assert weights.sum().item() == pytest.approx(1, abs=1e-8)


def test_the_strongest_are_taken_ties_to_the_first() -> None:
    assert cooperation.strongest(torch.tensor([0.1, 0.4, 0.4, 0.4, 0.2]), 2).tolist() == [
        False,
        True,
        True,
        False,
        False,
    ]


def test_nodes_learn_from_their_own_group() -> None:
    made = {"clients": 8, "partition": "permute:2", "seed": 3, "split": (0.7, 0.0, 0.3)}
    fed = consilience.make_federation("digits", **made)
    groups = fed.groups
    assert groups is not None
    options = {"model": "logistic", "rounds": 12, "executor": "serial"}
    found = consilience.run(SCooL(lr=0.3, settle=6, keep=0.4, scale=0.5), fed, **options)
    plain = consilience.run(SCooL(prior="dirac", lr=0.3), fed, **options)
    assert found.history[-1]["clients"]["mean"] > plain.history[-1]["clients"]["mean"] + 0.1
    kept = [groups[j] == groups[i] for i, state in found.states.items() for j in state.kept or ()]
    assert np.mean(kept) > 0.9

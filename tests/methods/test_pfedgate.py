"""pFedGate: blocks, the knapsack, what travels, and runs against a loop written out."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import consilience
from consilience.core import tree as tr
from consilience.core.encode import encoded_size
from consilience.core.errors import ConfigError
from consilience.core.events import draw_cohort
from consilience.core.fit import Plan
from consilience.core.messages import ClientInfo, Device, Job
from consilience.core.model import Weights
from consilience.core.streams import philox
from consilience.methods import FedAvg, PFedGate
from consilience.methods.pfedgate import Down, Part
from consilience.models import architecture
from consilience.parts.blocks import Blocks, blocks
from tests.helpers import LINEAR, NOISY, NORMED, loop, reply, site, worker

USUAL: dict[str, Any] = {"batch_size": 4, "lr": 0.1, "local_epochs": 2}
WIDE = architecture("mlp:12", (5,), 3)


def after(method: Any, rounds: int = 3, model: Any = NOISY, cohort: int = 3) -> Any:
    return loop(worker(method, model=model), rounds, cohort=cohort).snapshots[rounds]


# --- blocks ----------------------------------------------------------------------------------------------------


def test_blocks_are_runs_of_a_parameter() -> None:
    made = blocks(WIDE, 5)  # 60, 12, 36 and 3 numbers
    assert made.sizes.tolist() == [12] * 5 + [3] * 4 + [8] * 4 + [4] + [1] * 3
    assert made.first.nonzero().flatten().tolist() == [0, 5, 9, 14]
    params = WIDE.initial(0).params
    chosen = torch.tensor([i % 3 == 0 for i in range(17)])
    values = made.take(params, chosen)
    zeros = tr.zeros_like(params)
    found, mask = made.put(values, chosen, zeros), made.spread(chosen.float())
    assert all(torch.equal(found[n], params[n] * mask[n]) for n in params)
    assert len(values) == made.count(chosen) == sum(int(m.sum()) for m in mask.values())
    assert tr.digest(made.put(made.take(params, ~chosen), ~chosen, found)) == tr.digest(params)


def best(sizes: list[int], values: list[float], room: int) -> float:
    every = itertools.product((0, 1), repeat=len(sizes))
    fits = (pick for pick in every if sum(s * p for s, p in zip(sizes, pick, strict=True)) <= room)
    return max(sum(v * p for v, p in zip(values, pick, strict=True)) for pick in fits)


@settings(max_examples=30, deadline=None)
@given(
    data=st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 1), st.booleans()), min_size=3, max_size=10),
    share=st.floats(0.1, 1.0),
)
def test_the_knapsack_keeps_its_budget_and_half_of_the_optimum(data: Any, share: float) -> None:
    sizes, scores, linear = (list(part) for part in zip(*data, strict=True))
    first = [i == 0 for i in range(len(data))]
    made = Blocks({}, torch.tensor(sizes), torch.tensor(first), torch.tensor(linear))
    chosen = made.choose(torch.tensor(scores), share)
    assert chosen[0]
    for kind in (True, False):
        mine = [i for i in range(len(data)) if linear[i] is kind]
        kept = sum(sizes[i] for i in mine if first[i])
        room = share * sum(sizes[i] for i in mine) + 1e-9
        assert sum(sizes[i] for i in mine if chosen[i]) <= max(room, kept)
        rest = [i for i in mine if not first[i]]
        found = sum(scores[i] for i in rest if chosen[i])
        optimum = best([sizes[i] for i in rest], [scores[i] for i in rest], int(room - kept)) if room > kept else 0.0
        largest = max((scores[i] for i in rest if sizes[i] <= room - kept), default=0.0)
        assert found <= optimum + 1e-6
        assert found + largest >= optimum - 1e-6  # Dantzig's bound for the greedy solution


# --- reductions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["model", "delta"])
@pytest.mark.parametrize("weights", ["samples", "uniform"])
@pytest.mark.parametrize("extra", [{}, {"momentum": 0.5, "weight_decay": 0.01, "clip": 0.5}], ids=["plain", "more"])
def test_without_gates_and_budget_it_is_fedavg(form: Any, weights: Any, extra: dict[str, Any]) -> None:
    same: dict[str, Any] = {"form": form, "weights": weights, **USUAL, **extra}
    plain = after(FedAvg(**same)).server.model
    assert tr.digest(after(PFedGate(gate_lr=0, budget=1, **same)).server.model) == tr.digest(plain)
    for other in ({"gate_lr": 0.1, "budget": 1}, {"gate_lr": 0, "budget": 0.6}):
        assert tr.digest(after(PFedGate(**other, **same)).server.model) != tr.digest(plain)


# --- who moves what, and what travels --------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["model", "delta"])
@pytest.mark.parametrize("gate_lr", [0.0, 0.1])
def test_blocks_that_nobody_chose_stay_as_they_are(form: Any, gate_lr: float) -> None:
    method = PFedGate(budget=0.4, form=form, gate_lr=gate_lr, weight_decay=0.1, momentum=0.5, **USUAL)
    at = worker(method, model=WIDE)
    host = at.host(0, "train")
    server = method.init_server(host)._replace(model=Weights(tr.scale(WIDE.initial(0).params, 3.0), {}))
    made = blocks(WIDE, 5)
    message = Down(Part(torch.ones(17, dtype=torch.bool), made.take(server.model.params, torch.ones(17).bool())), {},
                   0.4, False)  # fmt: skip
    update, _ = method.client_update(at.program[0], site(at), message, None)
    assert made.count(update.part.chosen) <= 0.4 * 111
    found = method.aggregate(at.program[0], host, server, [reply(0, update)], [0]).model.params
    mask = made.spread(update.part.chosen.float())
    for name, p in found.items():
        assert torch.equal(p[mask[name] == 0], server.model.params[name][mask[name] == 0])
    moved = torch.cat([(p != server.model.params[n])[mask[n] == 1] for n, p in found.items()])
    assert moved.float().mean() > 0.4


@pytest.mark.parametrize("gate_lr", [0.0, 0.1])
def test_what_is_outside_the_blocks_counts_as_zero(gate_lr: float) -> None:
    """A client that got everything, and one that got no more than the blocks that it chooses, send the same."""
    method = PFedGate(budget=0.5, gate_lr=gate_lr, **USUAL)
    at = worker(method, model=WIDE)
    made, x, every = blocks(WIDE, 5), WIDE.initial(0).params, torch.ones(17, dtype=torch.bool)
    whole = Down(Part(every, made.take(x, every)), {}, 0.5, False)
    first, gate = method.client_update(at.program[0], site(at), whole, None)
    part = Down(Part(first.part.chosen, made.take(x, first.part.chosen)), {}, 0.5, True)
    again, same = method.client_update(at.program[0], site(at), part, None)
    assert tr.digest(first, gate) == tr.digest(again, same)
    mask = made.spread(first.part.chosen.float())
    start = Weights({n: p * mask[n] for n, p in x.items()}, {})
    inside = method._trained(site(at), start, site(at).initial("gate"), first.part.chosen, 0.5, Plan())[0].params
    assert all(not p[mask[n] == 0].any() for n, p in inside.items())
    assert torch.equal(made.take(inside, first.part.chosen), first.part.values)


def test_a_round_costs_what_is_sent() -> None:
    model = architecture("mlp:400", (5,), 3)
    size = sum(p.numel() for p in model.spec.params.values()) * 4
    memory = loop(worker(PFedGate(budget=0.5, **USUAL), model=model), 3)
    totals = [memory.snapshots[i].totals for i in (1, 2, 3)]
    up = [totals[0].bytes_up, totals[1].bytes_up - totals[0].bytes_up]
    down = [totals[0].bytes_down, totals[1].bytes_down - totals[0].bytes_down]
    assert all(5 * 0.4 * size < each < 5 * (0.5 * size + 1200) for each in (*up, down[1]))
    assert 5 * size < down[0] < 5 * (size + 1200)  # nobody has asked for less yet
    assert 0.4 < memory.lines[-1]["method"]["sent"] <= 0.5


def test_the_next_broadcast_is_what_the_client_asked_for_and_deploys() -> None:
    method = PFedGate(budget=0.5, **USUAL)
    at = worker(method, model=WIDE)
    snapshot = loop(at, 2).snapshots[2]
    made = blocks(WIDE, 5)
    info = ClientInfo(1, 12, WIDE.name, {WIDE.name: WIDE})
    wish = snapshot.server.wishes[1]
    scores = method.scores(site(at, 1), snapshot.states[1], 0.5)
    assert torch.equal(made.choose(scores, 0.5), wish)
    sent = method.broadcast(at.program[0], snapshot.server, info)
    assert torch.equal(sent.part.chosen, wish)
    message = Down(Part(wish, made.take(snapshot.server.model.params, wish)), {}, 0.5, True)
    found: Any = method.personal_model(site(at, 1), message, snapshot.states[1])
    scale = made.spread(scores * wish)
    assert all(torch.equal(found.weights.params[n], p * scale[n]) for n, p in snapshot.server.model.params.items())
    assert encoded_size(message) < encoded_size(Down(Part(wish, torch.zeros(111)), {}, 0.5, True))


def test_the_share_is_what_the_link_carries_in_time() -> None:
    method = PFedGate(budget=0.8, transfer_seconds=2.0)
    for down, up, latency in ((1e4, 1e3, 0.1), (1e6, 1e6, 0.0), (2e3, 1e3, 0.3)):
        share = method.share(Device(1e9, down, up, latency), 4000)
        seconds = 2 * latency + share * 4000 * (1 / down + 1 / up)
        assert share == 0.8 or seconds == pytest.approx(2.0)
        assert share <= 0.8
    assert method.share(Device(1e9, 1.0, 1.0, 5.0), 4000) == 0
    assert method.share(None, 4000) == PFedGate(budget=0.8).share(Device(1e9, 1.0, 1.0), 4000) == 0.8


def test_devices_set_the_budgets_of_a_run() -> None:
    data = consilience.make_federation("digits", clients=5, seed=1)
    usual: dict[str, Any] = {"rounds": 1, "model": "mlp:64", "executor": "serial", "fleet": "phones"}
    free = consilience.run(PFedGate(budget=0.9), data, **usual)
    tight = consilience.run(PFedGate(budget=0.9, transfer_seconds=0.15), data, **usual)
    made = blocks(architecture("mlp:64", data.input_shape, 10), 5)
    counts = [{k: made.count(wish) for k, wish in run.server.wishes.items()} for run in (free, tight)]
    assert min(counts[0].values()) > 0.8 * int(made.sizes.sum())  # four of five blocks
    assert all(counts[1][k] <= counts[0][k] for k in counts[0])
    assert len(set(counts[1].values())) > 1
    assert min(counts[1].values()) < 0.6 * int(made.sizes.sum())


def test_scores_have_a_least_value() -> None:
    method = PFedGate(budget=0.5, pieces=5)
    at = worker(method, model=WIDE)
    gate = site(at).initial("gate")
    low = Weights({**gate.params, "norm.bias": torch.full((17,), -9.0)}, gate.buffers)
    assert method.scores(site(at), low, 0.5).tolist() == pytest.approx([0.2] * 17)
    assert method.scores(site(at), low, 0.05).tolist() == pytest.approx([0.05] * 17)


def test_gates_stay_at_home_and_learn() -> None:
    snapshot = after(PFedGate(**USUAL), model=NORMED)
    assert set(snapshot.server.model.params) == set(NORMED.spec.params)
    at = worker(PFedGate(**USUAL), model=NORMED)
    fresh = site(at).initial("gate")
    trained = [state for state in snapshot.states.values() if state is not None]
    assert len({tr.digest(state) for state in trained}) == len(trained)
    assert all(not torch.equal(s.params["score.weight"], fresh.params["score.weight"]) for s in trained)


def test_a_new_client_learns_its_gate_alone() -> None:
    method = PFedGate(budget=1, **USUAL)
    at = worker(method, model=LINEAR)
    x = LINEAR.initial(0)
    made = blocks(LINEAR, 5)
    every = torch.ones_like(made.first)
    message = Down(Part(every, made.take(x.params, every)), {}, 1.0, False)
    joined: Any = method.personal_model(site(at), message, None)
    plain: Any = PFedGate(budget=1, join_epochs=0, **USUAL).personal_model(site(at), message, None)
    assert tr.digest(joined.weights) != tr.digest(plain.weights)
    ratio = made.take(joined.weights.params, every) / made.take(x.params, every)
    for i, part in enumerate(ratio.split(made.sizes.tolist())):
        assert part.max() - part.min() < 1e-5, i  # one score for a block, on the model as received


@pytest.mark.parametrize(
    "spoil",
    [
        lambda part: part._replace(values=part.values[:-1]), lambda part: part._replace(chosen=part.chosen[:-1]),
        lambda part: part._replace(chosen=~part.chosen), lambda part: part.values,
    ],
)  # fmt: skip
def test_a_wrong_message_costs_its_client(spoil: Any) -> None:
    method = PFedGate(**USUAL)
    at = worker(method, model=WIDE)
    made, every = blocks(WIDE, 5), torch.ones(17, dtype=torch.bool)
    message = Down(Part(every, made.take(WIDE.initial(0).params, every)), {}, 0.5, False)
    update, _ = method.client_update(at.program[0], site(at), message, None)
    check: Any = at.check
    assert check.wrong(Job(0, 0, 1, 0, 0, 0), update) is None
    assert check.wrong(Job(0, 0, 1, 0, 0, 0), update._replace(part=spoil(update.part))) is not None


def test_what_it_refuses() -> None:
    for options, words in (({"optimizer": "adam"}, "optimizer=sgd"), ({"buffers": "local"}, "buffers=local")):
        with pytest.raises(ConfigError, match=words):
            PFedGate(**options)  # type: ignore[arg-type]


# --- against a loop written out --------------------------------------------------------------------------------

SEED, CLIENTS, COHORT, ROUNDS, LR, GATE_LR, EPOCHS, BUDGET, PIECES = 5, 6, 3, 4, 0.3, 0.2, 3, 0.5, 3
P = dict[str, Tensor]


def gate(p: P, x: Tensor, stats: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    rows = x.flatten(1)
    rows = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    z = rows @ p["score.weight"].T + p["score.bias"]
    mean, var = (z.mean(0), z.var(0, unbiased=False)) if stats is None else stats
    out = torch.sigmoid((z - mean) / (var + 1e-5).sqrt() * p["norm.weight"] + p["norm.bias"])
    return out, (z.mean(0).detach(), z.var(0).detach())


def scaled(p: P, scores: Tensor, made: Blocks) -> P:
    found, at = {}, 0
    for name, t in p.items():
        factors = []
        size = -(-t.numel() // min(PIECES, t.numel()))
        for start in range(0, t.numel(), size):
            factors.append(scores[at].expand(min(size, t.numel() - start)))
            at += 1
        found[name] = t * torch.cat(factors).view(t.shape)
    return found


def network(p: P, x: Tensor) -> Tensor:
    hidden = (x.flatten(1) @ p["features.1.weight"].T + p["features.1.bias"]).relu()
    return hidden @ p["head.weight"].T + p["head.bias"]


def test_a_run_in_float64() -> None:
    made_of = PFedGate(lr=LR, gate_lr=GATE_LR, batch_size=10_000, local_epochs=EPOCHS, budget=BUDGET, pieces=PIECES)
    data = consilience.make_federation("digits", clients=CLIENTS, partition="shards:3", seed=SEED)
    result = consilience.run(
        made_of, data, rounds=ROUNDS, participation=COHORT, seed=SEED, executor="serial", model="mlp:16"
    )
    host = result.worker.host(0, "x")
    x = {n: p.double() for n, p in host.initial().params.items()}
    fresh = host.initial("gate")
    made = blocks(host.architecture(), PIECES)
    least = 1 / 3
    rows = [(data.data(k).train.x.double(), data.data(k).train.y) for k in range(CLIENTS)]
    own: dict[int, Any] = {}
    wishes: dict[int, Tensor] = {}
    for version in range(ROUNDS):
        cohort = sorted(int(k) for k in draw_cohort(philox(SEED, "cohort", version, 0), data.seen, COHORT))
        total, change = sum(len(rows[k][1]) for k in cohort), tr.zeros_like(x)
        for k in cohort:
            phi, mean, var = own.get(k) or ({n: p.double() for n, p in fresh.params.items()}, *[
                fresh.buffers[f"norm.running_{n}"].double() for n in ("mean", "var")])  # fmt: skip
            scores = gate(phi, rows[k][0], (mean, var))[0].mean(0).clamp(min=least)
            chosen = wishes.get(k, made.choose(scores, BUDGET))
            mask = chosen.double()
            theta = scaled(x, mask, made)
            for _ in range(EPOCHS):
                leaves = {n: t.clone().requires_grad_() for n, t in theta.items()}
                gates = {n: t.clone().requires_grad_() for n, t in phi.items()}
                scores, (new_mean, new_var) = gate(gates, rows[k][0], None)
                used = scaled(leaves, scores.mean(0).clamp(min=least) * mask, made)
                F.cross_entropy(network(used, rows[k][0]), rows[k][1]).backward()
                theta = {n: (t - LR * t.grad).detach() for n, t in leaves.items() if t.grad is not None}
                phi = {n: (t - GATE_LR * t.grad).detach() for n, t in gates.items() if t.grad is not None}
                mean, var = 0.9 * mean + 0.1 * new_mean, 0.9 * var + 0.1 * new_var
            own[k] = (phi, mean, var)
            share = len(rows[k][1]) / total
            kept = scaled(x, mask, made)
            change = {n: change[n] + share * (theta[n] - kept[n]) for n in x}
            wishes[k] = made.choose(gate(phi, rows[k][0], (mean, var))[0].mean(0).clamp(min=least), BUDGET)
        x = {n: x[n] + change[n] for n in x}
    tight: dict[str, Any] = {"rtol": 1e-3, "atol": 5e-5}
    torch.testing.assert_close({n: p.double() for n, p in result.server.model.params.items()}, x, **tight)
    for k, (phi, mean, _) in own.items():
        found = result.states[k]
        torch.testing.assert_close({n: p.double() for n, p in found.params.items()}, phi, **tight)
        torch.testing.assert_close(found.buffers["norm.running_mean"].double(), mean, **tight)
        assert torch.equal(result.server.wishes[k], wishes[k])
    assert np.isfinite(result.history[-1]["clients"]["mean"])

"""Methods among neighbours over topologies of all kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import LINEAR64, NORMED, architecture, federation, vector
from torch import nn

import consilience
from consilience.cli import main
from consilience.core import failpoint
from consilience.core import tree as tr
from consilience.core.encode import encoded_size
from consilience.core.errors import ConfigError
from consilience.core.events import Instant
from consilience.core.exchange import Letter, opened, posted
from consilience.core.messages import Device, Inbox, Job, Trip
from consilience.core.model import Weights
from consilience.exporting import read_run
from consilience.fleet.varying import Topology
from consilience.methods import DPSGD, MHD, DProxSGT, FedAvg, FinalMerge, Local, SCooL, VarGossip
from consilience.models.small import SplitModel

USUAL: dict[str, Any] = {"batch_size": 4, "lr": 0.1}
N = 5


def run(method: Any, model: Any = LINEAR64, rounds: int = 3, **options: Any) -> consilience.Result:
    fed = federation(dtype=model.dtype)
    made = {"model": model, "rounds": rounds, "executor": "serial", "eval_clients_every": 0, **options}
    return consilience.run(method, fed, **made)


def digests(result: consilience.Result) -> list[str]:
    """Of nodes' parameters, in order."""
    return [tr.digest(state.model.params) for _, state in sorted(result.states.items())]


# --- D-PSGD over topologies that change -----------------------------------------------------------------------


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


# --- clients that are no nodes --------------------------------------------------------------------------------


def newcomers(method: Any, **more: Any) -> tuple[consilience.Result, dict[int, dict[int, Any]]]:
    """A run, and by round and client what was found of the two that never take part."""
    fed = digits(unseen=2, **more)
    options: dict[str, Any] = {"model": "logistic", "executor": "serial", "eval_clients_every": 1}
    result = consilience.run(method, fed, rounds=2, topology="ring", **options)
    found: dict[int, dict[int, Any]] = {}
    for row in result.clients:
        if not row["seen"]:
            found.setdefault(row["round"], {})[row["client"]] = row
    return result, found


def losses(result: consilience.Result, model: Weights) -> dict[int, float]:
    """Of a model, on the test rows of those who never take part."""
    sites = {c: result.worker.site(Job(-1, c, 0, 0, 0, 0))[0] for c in result.worker.federation.unseen}
    return {c: site.evaluate(model).loss for c, site in sites.items()}


def test_somebody_new_gets_the_mean_of_nodes_models() -> None:
    result, found = newcomers(DPSGD(lr=0.1))
    states = [state.model.params for state in result.states.values()]
    mean = Weights({name: torch.stack([s[name] for s in states]).mean(0) for name in states[0]}, {})
    assert {c: row["loss"] for c, row in found[2].items()} == pytest.approx(losses(result, mean), rel=1e-5)
    assert result.history[-1]["unseen"]["mean"] > 0


def test_somebody_new_gets_the_merged_model() -> None:
    result, found = newcomers(FinalMerge(lr=0.1, merge_after=1))
    assert {c: row["loss"] for c, row in found[2].items()} == losses(result, result.server.model)
    before, _ = newcomers(FinalMerge(lr=0.1))
    assert before.history[0]["unseen"] == newcomers(DPSGD(lr=0.1))[0].history[0]["unseen"]  # not merged yet


def test_where_nodes_have_nothing_in_common_there_is_nothing_for_somebody_new() -> None:
    result, found = newcomers(MHD(public_rows=20), public=30)
    assert all("unseen" not in line and line["clients"]["mean"] > 0 for line in result.history)
    assert {row["n"] for row in found[2].values()} == {0}


def test_what_is_predicted_for_somebody_new_is_what_was_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--clients", "5", "--unseen", "2", "--model", "logistic", "--rounds", "1", "--executor", "serial"]
    for name, more in (("dpsgd", []), ("mhd", ["--public", "20"])):
        with pytest.raises(SystemExit) as left:
            main(["run", name, *small, *more, "--out", str(tmp_path / name)])
        assert not left.value.code
    assert "no model for somebody new" in capsys.readouterr().out
    made, none = (read_run(tmp_path / name) for name in ("dpsgd", "mhd"))
    client = min(made.federation.unseen)
    row = [json.loads(line) for line in (tmp_path / "dpsgd" / "clients.jsonl").read_text().splitlines()][client]
    site, _ = made.worker.site(Job(-1, client, 0, 0, 0, 0))
    assert site.evaluate(made.predictor(client)).loss == row["loss"]
    with pytest.raises(ConfigError, match="which takes no part"):
        none.predictor(min(none.federation.unseen))


# --- MHD and SCooL over any topology --------------------------------------------------------------------------


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


# --- one merging ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [LINEAR64, NORMED], ids=["linear", "normed"])
def test_merging_after_one_round_alone_is_fedavg(model: Any) -> None:
    merged = run(FinalMerge(calibrate=False, **USUAL), model, rounds=1, topology="none")
    whole = run(FedAvg(weights="uniform", **USUAL), model, rounds=1)
    assert tr.digest(merged.server.model) == tr.digest(whole.server.model)
    assert set(digests(merged)) == {tr.digest(whole.server.model.params)}
    assert merged.history[-1]["global"] == whole.history[-1]["global"]


def test_merging_in_mid_run_is_complete_mixing_in_that_round() -> None:
    merged = run(FinalMerge(merge_after=2, **USUAL), rounds=3, topology="none")
    mixed = run(DPSGD(**USUAL), rounds=3, topology="none,complete,none")
    assert digests(merged) == digests(mixed)
    assert [line.get("global") is not None for line in merged.history] == [False, True, True]
    assert merged.history[1]["global"]["loss"] == merged.history[2]["global"]["loss"]  # training goes on without it
    size = encoded_size(LINEAR64.initial(0))
    assert merged.history[0]["bytes_up"] == 0
    assert merged.history[-1]["bytes_up"] == pytest.approx(N * size, rel=0.3)  # one model up, one down, and names
    assert merged.history[-1]["bytes_down"] == merged.history[-1]["bytes_up"]


def test_until_the_end_it_is_dpsgd_and_judging_the_mean_changes_nothing() -> None:
    merged = run(FinalMerge(**USUAL), rounds=3, topology="ring")
    plain = run(DPSGD(**USUAL), rounds=3, topology="ring")
    rare = run(DPSGD(**USUAL), rounds=3, topology="ring", eval_every=3)
    assert digests(plain) == digests(rare)
    mean = torch.stack([vector(s.model) for s in plain.states.values()]).mean(0)
    torch.testing.assert_close(vector(merged.server.model), mean, rtol=1e-13, atol=1e-15)
    for a, b in zip(merged.history[:2], plain.history[:2], strict=True):
        assert a["merged"] == b["merged"]
    apart = sum((vector(s.model) - mean).square().sum().item() for s in plain.states.values())
    assert plain.history[-1]["merged"]["consensus"] == pytest.approx(apart, rel=1e-9)
    assert plain.history[-1]["merged"]["loss"] == pytest.approx(merged.history[-1]["global"]["loss"], rel=1e-9)
    assert merged.history[-1]["merged"]["consensus"] < 1e-25


def test_statistics_are_those_of_the_merged_model() -> None:
    """By hand: the mean and variance of what the first layer gives, batch by batch, weighted by rows at the server."""
    result = run(FinalMerge(batch_size=64, lr=0.1), NORMED, rounds=1, topology="none")
    first = {name: p.double() for name, p in result.server.model.params.items()}
    fed = federation()
    for i, state in result.states.items():
        z = fed.data(i).train.x.double() @ first["features.0.weight"].T + first["features.0.bias"]
        torch.testing.assert_close(
            state.model.buffers["features.1.running_mean"].double(), z.mean(0), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            state.model.buffers["features.1.running_var"].double(), z.var(0), atol=1e-5, rtol=1e-4
        )
    rows = torch.tensor([len(fed.data(i).train) for i in range(N)], dtype=torch.float32)
    means = torch.stack([result.states[i].model.buffers["features.1.running_mean"] for i in range(N)])
    server = result.server.model.buffers["features.1.running_mean"]
    torch.testing.assert_close(server, (rows[:, None] * means).sum(0) / rows.sum())


def test_where_nothing_can_be_merged_nodes_keep_their_models() -> None:
    """All have diverged, so none sends a model that is finite."""
    merged = run(FinalMerge(**{**USUAL, "lr": 1e308}), rounds=3, topology="ring")
    plain = run(DPSGD(**{**USUAL, "lr": 1e308}), rounds=3, topology="ring")
    assert len(merged.refused) > len(plain.refused)
    assert merged.server.model is None
    assert digests(merged) == digests(plain)


class DropoutFirst(SplitModel):
    """What BatchNorm sees depends on what dropout draws."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int) -> None:
        super().__init__(
            nn.Sequential(nn.Linear(input_shape[0], 6), nn.Dropout(0.5), nn.BatchNorm1d(6)), nn.Linear(6, outputs), 6
        )


def test_statistics_have_a_stream_of_their_own() -> None:
    found = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        merged = run(FinalMerge(**USUAL), architecture(DropoutFirst), rounds=1, topology="ring")
        found.add(tr.digest(merged.server))
        assert torch.equal(torch.random.get_rng_state(), before)
    assert len(found) == 1


# --- variance -------------------------------------------------------------------------------------------------


def inbox(tensors: dict[int, torch.Tensor]) -> Inbox:
    models = {i: Weights({"head.weight": t, "head.bias": t[0].clone()}, {}) for i, t in tensors.items()}
    return Inbox(models, dict.fromkeys(models, 1 / len(models)))


def corrected(method: VarGossip, tensors: dict[int, torch.Tensor], own: int = 0) -> dict[str, torch.Tensor]:
    at = helpers.worker(method, federation(dtype=torch.float64), LINEAR64)
    return method.mean(helpers.site(at, own), inbox(tensors)).params


@pytest.fixture
def gaussians() -> dict[int, torch.Tensor]:
    """Sixteen tensors with nothing in common, of different spread."""
    made = torch.Generator().manual_seed(0)
    draw = [torch.randn(40, 30, generator=made, dtype=torch.float64) for _ in range(16)]
    return {i: 0.05 * (1 + i / 16) * t + 0.01 * i for i, t in enumerate(draw)}


@pytest.mark.parametrize("follow", ["self", "others", "both"])
def test_means_get_the_variance_that_is_followed(follow: Any, gaussians: dict[int, torch.Tensor]) -> None:
    own = 3
    method = VarGossip(follow=follow, own_share=0.3)
    plain = torch.stack(list(gaussians.values())).mean(0)
    found = corrected(method, gaussians, own)["head.weight"]
    variances = {i: float(t.var()) for i, t in gaussians.items()}
    others = sum(v for i, v in variances.items() if i != own) / 15
    wanted = {"self": variances[own], "others": others, "both": 0.3 * variances[own] + 0.7 * others}[follow]
    assert float(plain.var()) < 0.1 * wanted
    assert float(found.var()) == pytest.approx(wanted, rel=1e-9)
    assert float(found.mean()) == pytest.approx(float(plain.mean()), rel=1e-9)
    scale = (found - found.mean()) / (plain - plain.mean())
    assert float(scale.min()) == pytest.approx(float(scale.max()), rel=1e-6)  # one factor for a tensor


def test_the_simulators_constant_restores_only_part_of_it(gaussians: dict[int, torch.Tensor]) -> None:
    alike = {i: t / t.std() * 0.05 for i, t in gaussians.items()}
    found = corrected(VarGossip(epsilon_var=1e-4), alike)["head.weight"]
    assert float(found.var()) / 0.05**2 == pytest.approx(0.63, abs=0.02)
    assert float(corrected(VarGossip(), alike)["head.weight"].var()) / 0.05**2 == pytest.approx(1, rel=1e-9)


def test_what_is_left_alone(gaussians: dict[int, torch.Tensor]) -> None:
    only = {0: gaussians[0]}
    assert torch.equal(corrected(VarGossip(follow="others"), only)["head.weight"], gaussians[0])
    plain = torch.stack([t[0] for t in gaussians.values()]).mean(0)
    torch.testing.assert_close(corrected(VarGossip(biases=False), gaussians)["head.bias"], plain)
    assert float(corrected(VarGossip(), gaussians)["head.bias"].var()) > 5 * float(plain.var())
    same = corrected(VarGossip(), dict.fromkeys(range(16), gaussians[0]))["head.weight"]
    torch.testing.assert_close(same, gaussians[0], rtol=1e-12, atol=1e-14)
    flat = torch.ones(4, 4, dtype=torch.float64)
    assert torch.equal(corrected(VarGossip(follow="others"), {0: flat, 1: 3 * flat})["head.weight"], 2 * flat)


def test_layers_that_normalise_are_averaged_only() -> None:
    at = helpers.worker(VarGossip(), federation(), NORMED)
    made = {i: NORMED.initial(0, i + 1) for i in range(4)}
    made = {
        i: m._replace(params={k: p + 0.1 * i + torch.rand_like(p) for k, p in m.params.items()})
        for i, m in made.items()
    }
    found = VarGossip().mean(helpers.site(at, 0), Inbox(made, dict.fromkeys(made, 0.25))).params
    for name, tensor in found.items():
        plain = torch.stack([m.params[name] for m in made.values()]).mean(0)
        assert torch.allclose(tensor, plain, atol=1e-5) == name.startswith("features.1"), name


def test_own_beginnings() -> None:
    """Each node its own model, and vargossip with common ones, alone, is dpsgd bit for bit."""
    starts = run(DPSGD(start="own", batch_size=64, lr=1e-12), rounds=1, topology="none")
    assert len(set(digests(starts))) == N
    apart, plain = (run(m, topology="none") for m in (VarGossip(start="common", **USUAL), DPSGD(**USUAL)))
    assert digests(apart) == digests(plain)


# --- gossip at everybody's own pace ---------------------------------------------------------------------------


class Paces(Instant):
    """Node i takes i + 1 seconds a step, and messages no time."""

    def trip(
        self, job: Job, start: float, *, down: int, up: int, samples: int, steps: int, flops: float | None = None
    ) -> Trip:
        return Trip(compute=(job.client + 1.0) * steps)


@pytest.mark.parametrize("topology", ["complete", "ring", "onepeer", "matching", "FILE"])
@pytest.mark.parametrize("method", [DPSGD(order="cta", **USUAL), VarGossip(**USUAL)], ids=lambda m: m.name)
def test_without_delays_gossip_is_rounds(method: Any, topology: str, matrix_file: str) -> None:
    topology = matrix_file if topology == "FILE" else topology
    apart = run(method, rounds=3 * N, topology=topology, schedule="gossip", clock=Instant())
    level = run(method, rounds=3, topology=topology, clock=Instant())
    assert apart.digest.splitlines()[1] == level.digest.splitlines()[1]
    assert apart.snapshot.totals == level.snapshot.totals


def reference(topology: str, until: int) -> tuple[list[torch.Tensor], int, int]:
    """Gossip with :class:`Paces` and two steps a round, by hand: models, rounds of all nodes, messages."""
    at = helpers.worker(FedAvg(local_steps=2, **USUAL), federation(dtype=torch.float64), LINEAR64)
    start = helpers.site(at, 0).initial()
    x = [vector(start)] * N
    mail: list[dict[int, tuple[float, torch.Tensor]]] = [{} for _ in range(N)]
    rounds = messages = 0
    for time in range(1, until + 1):
        due = [i for i in range(N) if time % (2 * (i + 1)) == 0]
        rows = {i: Topology(topology, tuple(range(N))).at(time // (2 * (i + 1)) - 1) for i in due}
        for i in due:
            site = helpers.site(at, i, time // (2 * (i + 1)))
            x[i] = vector(site.fit(start._replace(params=unflat(x[i], start.params))).weights)
            for j, row in rows[i].items():
                if j != i and i in row:
                    mail[j][i] = (row[i], x[i])
                    messages += 1
        for i in due:
            given = sum(w for w, _ in mail[i].values())
            own = max(1 - given, rows[i][i][i])
            x[i] = (own * x[i] + sum(w * t for w, t in mail[i].values())) / (own + given)
            mail[i] = {}
        rounds += len(due)
    return x, rounds, messages


@pytest.mark.parametrize("topology", ["ring", "onepeer"])
def test_gossip_by_hand(topology: str) -> None:
    """Fast nodes go on while slow ones train; letters wait; the newest of a sender counts; too many are scaled."""
    x, rounds, messages = reference(topology, 24)
    result = run(DPSGD(local_steps=2, **USUAL), rounds=rounds, topology=topology, schedule="gossip", clock=Paces())
    for i, state in result.states.items():
        torch.testing.assert_close(vector(state.model), x[i], rtol=1e-11, atol=1e-13)
    assert result.history[-1]["virtual_s"] == 24
    size = encoded_size(LINEAR64.initial(0))
    assert result.history[-1]["bytes_up"] == result.history[-1]["bytes_down"] == messages * size
    assert sorted(result.snapshot.numbers.values()) == [3, 3, 4, 6, 12]  # the slowest one's third is not done


@pytest.mark.parametrize("count", [5, 9, 14])
def test_letters_outlive_a_crash(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With letters unread when it dies, a run goes on to the same bits."""
    options: dict[str, Any] = {
        "rounds": 20, "topology": "ring", "schedule": "gossip", "clock": Paces(), "checkpoint_every": 1
    }  # fmt: skip
    straight = run(DPSGD(**USUAL), **options)
    with monkeypatch.context() as patch:
        patch.setenv("CONSILIENCE_FAILPOINT", f"aggregate:{count}:raise")
        with pytest.raises(failpoint.Died):
            run(DPSGD(**USUAL), out=tmp_path / "run", **options)
    again = run(DPSGD(**USUAL), out=tmp_path / "run", resume=True, **options)
    assert again.digest == straight.digest
    assert again.snapshot.mail
    assert tr.digest(again.snapshot.mail) == tr.digest(straight.snapshot.mail)


def test_letters_take_the_time_of_their_bytes() -> None:
    """Links of a byte a second: what is sent comes after the sender's upload and the reader's download."""
    size = encoded_size(LINEAR64.initial(0))
    fleet = [Device(1.0, size / 4, size / 4, rate=speed) for speed in (1.0, 1.0, 2.0, 2.0, 4.0)]
    options = {"topology": "onepeer", "schedule": "gossip", "fleet": fleet}
    result = run(DPSGD(local_steps=2, **USUAL), rounds=12, **options)
    for lap in result.timeline:
        if lap["state"] == "combined":
            assert lap["upload"] == pytest.approx(4)
            assert lap["phase"] == "mix"
            assert lap["end"] - lap["start"] == pytest.approx(lap["compute"] + 4)
    posts = [letter.arrives for letter in result.snapshot.mail]
    assert posts
    assert max(posts) <= result.snapshot.time + 8


def test_letters() -> None:
    """The newest that has come is read, what is under way is left, and weights sum to 1."""
    old, new, late = (Letter(0, 1, 1, 0.5, time, text) for time, text in ((1.0, "a"), (2.0, "b"), (9.0, "c")))
    other = Letter(0, 2, 1, 0.25, 3.0, "d")
    kept = posted(posted(posted([], old, 1.0), new, 2.0), late, 4.0)
    assert kept == [new, late]
    assert posted([new], late, 0.5) == [new, late]
    box, left = opened([*kept, other], 0, 1, "own", {0: 0.5, 3: 0.5}, 4.0)
    assert left == [late]
    assert box.messages == {0: "own", 1: "b", 2: "d"}
    assert box.weights == {0: 0.4, 1: 0.4, 2: 0.2}  # 0.5, 0.5, 0.25, scaled
    box, left = opened([other], 0, 1, "own", {0: 0.5, 3: 0.5}, 4.0)
    assert (box.weights, left) == ({0: 0.75, 2: 0.25}, [])
    assert opened([other], 0, 1, "own", {0: 1.0}, 2.0) == (Inbox({0: "own"}, {0: 1.0}), [other])
    assert opened([other], 0, 2, "own", {0: 1.0}, 4.0)[1] == [other]  # of another phase


def test_nodes_that_gossiped_may_merge() -> None:
    merged = run(FinalMerge(**USUAL), rounds=14, topology="ring", schedule="gossip", clock=Paces())
    plain = run(DPSGD(**USUAL), rounds=14, topology="ring", schedule="gossip", clock=Paces())
    mean = torch.stack([vector(s.model) for s in plain.states.values()]).mean(0)
    torch.testing.assert_close(vector(merged.server.model), mean, rtol=1e-13, atol=1e-15)


def test_who_cannot_gossip() -> None:
    with pytest.raises(ConfigError, match=r"scool has no messages that .* is for dpsgd, finalmerge, vargossip"):
        run(SCooL(), schedule="gossip", topology="ring")
    with pytest.raises(ConfigError, match="fedavg has no messages"):
        run(FedAvg(), schedule="gossip")
    with pytest.raises(ConfigError, match=r"dproxsgt with these options goes by one graph.* stays the same"):
        run(DProxSGT(compress="topk:0.5"), topology="onepeer")
    with pytest.raises(ConfigError, match="finalmerge has 3 phases that wait for each other"):
        run(FinalMerge(merge_after=2), schedule="gossip")

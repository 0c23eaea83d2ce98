"""What hostile clients do, to whom it is done, and that nothing else moves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import federation, worker

import consilience
from consilience.core import tree as tr
from consilience.core.errors import ConfigError, ConsilienceError
from consilience.core.events import Instant
from consilience.core.messages import Job, ModelUpdate, Reply
from consilience.core.model import Weights
from consilience.methods import DPSGD, FRL, FedAvg, FedDisco, FedMD, FedProto, OneByte, Scaffold
from consilience.privacy.options import Privacy
from consilience.wire import attacks
from consilience.wire.adversary import Adversary, Attack, attacked, parse, stamp
from consilience.wire.attacks import Scene

RNG = np.random.default_rng(3)
KNOWN = torch.from_numpy(RNG.standard_normal((7, 5)))
OWN = torch.from_numpy(RNG.standard_normal((2, 5)))


def scene(known: torch.Tensor = KNOWN, strength: float | None = None, share: float = 0.25) -> Scene:
    return Scene(OWN, known, 9, 2, share, strength, lambda i: np.random.default_rng(i))


def naive(name: str) -> list[float]:
    """Attacks as their papers write them, in plain Python."""
    rows = KNOWN.tolist()
    n, d = len(rows), len(rows[0])
    mu = [sum(row[j] for row in rows) / n for j in range(d)]
    sigma = [math.sqrt(sum((row[j] - mu[j]) ** 2 for row in rows) / n) for j in range(d)]
    if name == "ipm":
        return [-0.5 * m for m in mu]
    if name == "mimic":
        return rows[0]
    if name == "alie":  # 9 clients of whom 2 are hostile: s = 5 - 2 = 3 supporters among 7
        return [m - 0.18001236979270496 * s for m, s in zip(mu, sigma, strict=True)]

    def away(a: list[float], b: list[float]) -> float:
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))

    def fits(gamma: float) -> bool:
        row = [m - gamma * s for m, s in zip(mu, sigma, strict=True)]
        if name == "minmax":
            return max(away(row, u) for u in rows) <= max(away(u, v) for u in rows for v in rows)
        return sum(away(row, u) for u in rows) <= max(sum(away(u, v) for v in rows) for u in rows)

    low, high = 0.0, 100.0
    for _ in range(200):
        low, high = ((low + high) / 2, high) if fits((low + high) / 2) else (low, (low + high) / 2)
    return [m - low * s for m, s in zip(mu, sigma, strict=True)]


@pytest.mark.parametrize("name", ["ipm", "mimic", "alie", "minmax", "minsum"])
def test_attacks_are_those_of_their_papers(name: str) -> None:
    for row in attacks.VECTORS[name](scene()):
        np.testing.assert_allclose(row, naive(name), rtol=1e-9)


def test_simple_attacks() -> None:
    assert torch.equal(attacks.signflip(scene(strength=3.0)), -3 * OWN)
    assert torch.equal(attacks.replace(scene()), 4 * OWN)
    assert torch.equal(attacks.honest(scene()), OWN)
    noise = attacks.gaussian(scene(strength=2.0))
    assert torch.equal(noise[1], 2 * torch.from_numpy(np.random.default_rng(1).standard_normal(5)))
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("name", attacks.VECTORS)
def test_attacks_on_updates_that_are_all_the_same_hold_only_numbers(name: str) -> None:
    assert torch.isfinite(attacks.VECTORS[name](scene(torch.ones(3, 5, dtype=torch.float64)))).all()


def test_alie_s_z_is_that_of_its_paper() -> None:
    """Their example: 50 workers, 24 of them corrupted, s = 2 and z = Phi^-1(24 / 26) = 1.43."""
    assert attacks.z_max(50, 24) == pytest.approx(1.4261, abs=1e-3)
    assert attacks.z_max(10, 0) == 0.0


def test_attacks_on_scores() -> None:
    rows = torch.tensor([[3.0, 1.0, 2.0], [0.0, -4.0, 1.0]])
    assert attacks.fdla(rows, None).tolist() == [[1.0, 2.0, 3.0], [1.0, 0.0, -4.0]]
    assert attacks.pcfdla(rows, 2.0).tolist() == [[3.0, 1.0, 6.0], [8.0, -4.0, 1.0]]


@pytest.mark.parametrize(
    "text", ["alie", "alie:", "alie:0", "alie:1", "alie:x", "alie:0.2:nan", "alie:0.2:1:2", "ali:0.2"]
)
def test_attacks_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="attack"):
        parse(text)


def test_what_an_attack_is_called() -> None:
    assert parse("none") is None
    assert parse("alie:0.2") == Attack("alie", 0.2)
    assert parse("ipm:0.2:3:blind") == Attack("ipm", 0.2, 3.0, True)


def test_attacks_that_do_not_fit_are_refused() -> None:
    for name in ("backdoor", "replace"):
        with pytest.raises(ConfigError, match="images"):
            attacked(federation(), Attack(name, 0.4), 0)
    with pytest.raises(ConfigError, match="classes"):
        attacked(federation(regression=True), Attack("labelflip", 0.4), 0)
    with pytest.raises(ConfigError, match="hostile"):
        attacked(federation(), Attack("alie", 0.01), 0)


def test_hostile_clients_are_drawn_by_a_stream_of_their_own() -> None:
    fed = federation([4] * 20)
    drawn = Attack("alie", 0.2).clients(fed, 0)
    assert len(drawn) == 4
    assert drawn == Attack("signflip", 0.2, 3.0).clients(fed, 0)
    assert drawn != Attack("alie", 0.2).clients(fed, 1)


def staged(method: Any, name: str, replies: list[Reply], **more: Any) -> tuple[Adversary, list[Reply]]:
    fed = attacked(federation(), Attack(name, 0.4, **more), 0)
    at = worker(method, fed)
    server = method.init_server(at.host(0, "init"))
    stage = Adversary(Attack(name, 0.4, **more), at, Instant(), 0)
    return stage, stage(replies, server)[0]


def replies_of(updates: list[Any]) -> list[Reply]:
    return [Reply(Job(i, i, 1, 0, 0, 0), u, 1, 1, 1, 0, 0.0, 0.0) for i, u in enumerate(updates)]


def test_a_model_is_attacked_as_its_difference_from_what_was_sent_and_others_stay() -> None:
    start = worker(FedAvg()).host(0, "init").initial()
    moved = [ModelUpdate(Weights(tr.scale(start.params, 1 + 0.1 * i), {})) for i in range(5)]
    sent = replies_of(moved)
    stage, got = staged(FedAvg(), "signflip", sent)
    assert len(stage.hostile) == 2
    for before, after in zip(sent, got, strict=True):
        i = before.job.client
        if i not in stage.hostile:
            assert after.update is before.update
            continue
        for name, p in start.params.items():
            torch.testing.assert_close(after.update.model.params[name], (1 - 0.1 * i) * p)


def test_colluders_that_are_blind_know_no_honest_update() -> None:
    start = worker(FedAvg()).host(0, "init").initial()
    moved = [ModelUpdate(Weights(tr.scale(start.params, 1 + 0.1 * i), {})) for i in range(5)]
    stage, got = staged(FedAvg(), "ipm", replies_of(moved), blind=True)
    changed = list(moved)
    for i in set(range(5)) - stage.hostile:
        changed[i] = ModelUpdate(tr.scale(start, 7.0))
    again = staged(FedAvg(), "ipm", replies_of(changed), blind=True)[1]
    for i in stage.hostile:
        assert tr.digest(got[i].update) == tr.digest(again[i].update)


def test_labels_are_flipped_and_images_stamped_for_training_alone() -> None:
    fed = consilience.make_federation("digits", clients=5, seed=0)
    flipped = attacked(fed, Attack("labelflip", 0.4), 0)
    marked = attacked(fed, Attack("backdoor", 0.4), 0)
    for client in range(5):
        own = fed.data(client)
        for other in (flipped, marked):
            assert tr.digest(other.data(client).test.x) == tr.digest(own.test.x)
            if client not in flipped.hostile:
                assert other.data(client) is own or torch.equal(other.data(client).train.y, own.train.y)
        if client in flipped.hostile:
            assert torch.equal(flipped.data(client).train.y, 9 - own.train.y)
            new = marked.data(client).train
            stamped = (new.x != own.train.x).flatten(1).any(1)
            assert (new.y[stamped] == 0).all()
            assert (new.x != own.train.x).flatten(1).sum(1).max() <= 4
            assert int(stamped.sum()) == (len(own.train) + 1) // 2
    assert marked.triggered is not None
    assert fed.test is not None
    assert len(marked.triggered) == int((fed.test.y != 0).sum())
    assert torch.equal(stamp(marked.triggered.x, float(fed.test.x.max())), marked.triggered.x)


def test_an_attack_on_scores_needs_scores() -> None:
    fed = consilience.make_federation("digits", clients=5, public=20, seed=0)
    with pytest.raises(ConsilienceError, match="sends none"):
        consilience.run(FedAvg(), fed, attack="fdla:0.4", **USUAL)
    plain = consilience.run(FedMD(), fed, **USUAL)
    for name in ("fdla", "pcfdla"):
        found = consilience.run(FedMD(), fed, attack=f"{name}:0.4", **USUAL)
        assert found.refused == []
        assert not torch.equal(found.server.scores, plain.server.scores)


def test_an_attack_on_numbers_needs_numbers() -> None:
    fed = consilience.make_federation("digits", clients=5, seed=0)
    with pytest.raises(ConsilienceError, match=r"on numbers, and onebyte sends none .* labelflip and backdoor"):
        consilience.run(OneByte(local_steps=2), fed, attack="signflip:0.4", **USUAL)
    full = OneByte(local_steps=2, precision="full")
    for method, attack in ((OneByte(local_steps=2), "labelflip"), (full, "signflip")):
        plain = consilience.run(method, fed, **USUAL)
        found = consilience.run(method, fed, attack=f"{attack}:0.4", **USUAL)
        assert found.refused == []
        assert found.digest.splitlines()[0] != plain.digest.splitlines()[0]


def test_answers_without_numbers_that_come_beside_others_are_let_through() -> None:
    """Counts of labels, before the first round."""
    fed = consilience.make_federation("digits", clients=5, seed=0)
    found = consilience.run(FedDisco(), fed, attack="signflip:0.4", **USUAL)
    assert tr.digest(found.server) != tr.digest(consilience.run(FedDisco(), fed, **USUAL).server)


USUAL: dict[str, Any] = {"model": "mlp:8", "rounds": 3, "eval_clients_every": 2, "executor": "serial"}
RUNS = [
    ("gaussian:0.4", FedAvg()), ("alie:0.4", FedAvg(form="delta", aggregator="krum:0.4")), ("minmax:0.4", Scaffold()),
    ("backdoor:0.4", FedAvg(aggregator="bucketing:2+median")), ("signflip:0.4", FedProto(aggregator="rfa")),
]  # fmt: skip


@pytest.mark.parametrize(("attack", "method"), RUNS, ids=[name for name, _ in RUNS])
def test_attacked_runs_have_the_same_bits_anywhere(attack: str, method: Any, tmp_path: Any) -> None:
    fed = consilience.make_federation("digits", clients=5, partition="dirichlet:0.5", seed=0)
    whole = consilience.run(method, fed, attack=attack, **USUAL)
    assert whole.refused == []
    spread = {**USUAL, "executor": "processes", "workers": 2}
    assert consilience.run(method, fed, attack=attack, **spread).digest == whole.digest
    first = {**USUAL, "rounds": 2, "eval_clients_every": 2, "checkpoint_every": 1, "out": tmp_path / "run"}
    consilience.run(method, fed, attack=attack, **first)
    resumed = consilience.run(method, fed, attack=attack, **{**first, "rounds": 3}, resume=True)
    assert resumed.digest.splitlines()[:2] == whole.digest.splitlines()[:2]
    assert consilience.run(method, fed, **USUAL).digest != whole.digest


def test_only_honest_clients_are_judged() -> None:
    fed = consilience.make_federation("digits", clients=5, seed=0)
    found = consilience.run(FedAvg(), fed, attack="backdoor:0.4", **USUAL)
    last = [row for row in found.clients if row["round"] == 3]
    hostile = [row["client"] for row in last if row.get("hostile")]
    assert set(hostile) == parse("backdoor:0.4").clients(fed, 0)  # type: ignore[union-attr]
    honest = [row["accuracy"] for row in last if not row.get("hostile")]
    assert found.history[-1]["clients"]["mean"] == pytest.approx(float(np.mean(honest)), abs=1e-12)
    assert 0 <= found.history[-1]["attack"]["success"] <= 1


def test_methods_without_a_server_are_not_attacked() -> None:
    fed = consilience.make_federation("digits", clients=5, seed=0)
    with pytest.raises(ConfigError, match="dpsgd has no server"):
        consilience.run(DPSGD(), fed, attack="signflip:0.4", **USUAL)


def distance(a: Any, b: Any) -> float:
    """Of the parameters of two runs' global models."""
    moved = tr.sub(a.server.model.params, b.server.model.params)
    return math.sqrt(sum(float(p.double().square().sum()) for p in moved.values()))


@pytest.mark.parametrize("mechanism", ["poisson", "fixed"])
def test_clipping_comes_after_the_attack(mechanism: str) -> None:
    """However large a lie, two of five clients move the mean by no more than 2 C each way."""
    fed, one = consilience.make_federation("digits", clients=5, seed=0), {**USUAL, "rounds": 1, "eval_clients_every": 0}
    private = Privacy(noise=0.0, clip="0.05", mechanism=mechanism)
    plain = consilience.run(FedAvg(), fed, privacy=private, **one)
    small, large = (
        consilience.run(FedAvg(), fed, privacy=private, attack=f"signflip:0.4:{s}", **one) for s in (10.0, 1e6)
    )
    assert distance(plain, small) > 0
    assert 0 < distance(plain, large) <= 2 / 5 * 2 * 0.05 * (1 + 1e-5)
    assert distance(small, large) < 1e-6  # both lies are as long as they may be


def test_an_attacked_private_run_has_the_same_bits_anywhere_and_pays_the_same() -> None:
    fed = consilience.make_federation("digits", clients=5, seed=0)
    private = Privacy(epsilon=8.0, delta=1e-3, mechanism="fixed")
    kind: dict[str, Any] = {"privacy": private, "attack": "alie:0.4", "participation": 3}
    whole = consilience.run(FedAvg(), fed, **kind, **USUAL)
    assert (
        consilience.run(FedAvg(), fed, **kind, **{**USUAL, "executor": "processes", "workers": 2}).digest
        == whole.digest
    )
    honest = consilience.run(FedAvg(), fed, **{**kind, "attack": None}, **USUAL)
    assert whole.digest != honest.digest
    assert whole.history[-1]["privacy"] == honest.history[-1]["privacy"]


def test_secret_sums_hide_lies_and_do_not_undo_them() -> None:
    fed = consilience.make_federation("digits", clients=5, seed=0)
    kind: dict[str, Any] = {"attack": "signflip:0.4", **USUAL}
    plain = consilience.run(FedAvg(form="delta"), fed, **kind)
    secret = consilience.run(FedAvg(form="delta"), fed, privacy=Privacy(secure=0.7), **kind)
    assert distance(plain, secret) < 1e-4
    assert distance(secret, consilience.run(FedAvg(form="delta"), fed, privacy=Privacy(secure=0.7), **USUAL)) > 1e-2


def test_rankings_are_attacked_by_places() -> None:
    """The way back is the reversed ranking; an inner product below 0 is the reverse of the honest vote."""
    method = FRL()
    at = worker(method)
    server = method.init_server(at.host(0, "init"))
    honest = method.broadcast(at.program[0], server, None)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    sent = []
    for _ in range(5):
        ranks = {n: torch.from_numpy(rng.permutation(len(r))).to(r.dtype) for n, r in honest.ranks.items()}
        sent.append(honest._replace(ranks=ranks))
    stage, got = staged(method, "signflip", replies_of(sent))
    for before, after in zip(sent, got, strict=True):
        for name, r in before.ranks.items():
            mine = after.job.client in stage.hostile
            assert after.update.ranks[name].tolist() == (r.flip(0) if mine else r).tolist()
            assert after.update.ranks[name].dtype == r.dtype
    stage, got = staged(method, "ipm", replies_of(sent))
    liar = min(stage.hostile)
    for name in honest.ranks:
        places = sum(sent[i].ranks[name].long().argsort() for i in range(5) if i not in stage.hostile)
        assert torch.equal(places[got[liar].update.ranks[name].long()], places.sort(descending=True).values)

"""Methods whose messages travel compressed: what is sent, what is remembered at both ends, what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import consilience
from consilience import methods
from consilience.core import tree as tr
from consilience.core.encode import encoded_size
from consilience.core.errors import ConfigError
from consilience.core.messages import Job, Reply
from consilience.core.worker import Call
from consilience.methods import FedAvg, Scaffold
from consilience.parts.compose import composed
from consilience.parts.compressed import Packed
from consilience.parts.compressors import Coded
from consilience.parts.feedback import parse
from consilience.simulate import prepare
from consilience.wire.decode import stages


def federation() -> Any:
    return consilience.make_federation("digits", clients=6, partition="dirichlet:0.5", seed=1)


def run(method: Any, **options: Any) -> consilience.Result:
    base = {"model": "mlp:16", "rounds": 4, "participation": 3, "eval_clients_every": 0, "executor": "serial"}
    return consilience.run(method, federation(), **{**base, **options})


@pytest.mark.parametrize("method", [FedAvg, Scaffold])
def test_what_loses_nothing_changes_nothing(method: Any) -> None:
    plain = tr.digest(run(method(form="delta")).server)
    assert tr.digest(run(method(form="delta", compress="identity")).server) == plain
    for whole in ("topk:1.0", "randk:1.0", "ef:topk:1.0"):
        assert tr.digest(run(method(compress=whole)).server.server) == plain
    assert tr.digest(run(method(compress="topk:0.1")).server.server) != plain


def test_the_identity_is_no_compression_at_all() -> None:
    method = FedAvg(compress="identity", compress_down="identity")
    assert composed(method) is method


def one_update(method: Any) -> tuple[Any, Any, Packed]:
    worker = prepare(method, federation(), model="mlp:16")
    server = worker.method.init_server(worker.host(0, "init"))
    phase = worker.program[0]
    message = worker.method.broadcast(phase, server, None)
    work, _ = worker.run(Call("train", (Job(0, 2, 1, 0, 0, 0), None), message))
    return worker, server, work.update


@pytest.mark.parametrize("text", ["topk:0.05", "randk:0.05", "qsgd:4", "sign", "bits:8", "lowrank:1"])
def test_bytes_counted_are_bytes_sent(text: str) -> None:
    _, _, update = one_update(FedAvg(compress=text))
    d = 64 * 16 + 16 + 16 * 10 + 10
    k = round(0.05 * d)
    payload = {
        "topk:0.05": 4 * k + -(-k * 11 // 8), "randk:0.05": 4 * k, "qsgd:4": 4 + d // 2, "sign": 4 + -(-d // 8),
        "bits:8": 4 * 4 + d, "lowrank:1": 4 * (64 + 16 + 16 + 10 + 16 + 10),
    }  # fmt: skip
    coded = update.fields["delta"].coded
    assert tr.nbytes(coded) == payload[text]
    result = run(FedAvg(compress=text), rounds=2)
    assert result.history[-1]["bytes_up"] == 2 * 3 * encoded_size(update)
    assert encoded_size(update) < payload[text] + 1000


@pytest.mark.parametrize("text", ["ef21:topk:0.1", "econtrol:qsgd:3"])
def test_both_ends_remember_the_same(text: str) -> None:
    """Although clients are away, drop out, and lose jobs."""
    result = run(FedAvg(compress=text), rounds=8, fleet="phones", drops=0.2, availability="bernoulli:0.7")
    assert len(result.server.copies) > 3
    for client, held in result.server.copies.items():
        assert tr.digest(held["train.delta"]) == tr.digest(result.states[client].memory["train.delta"].copy)


def test_a_refused_update_leaves_no_memory() -> None:
    """What an unfit update would have changed is rolled back at both ends."""
    seen = run(FedAvg(compress="ef21:topk:0.1", lr=1e30), rounds=3)
    assert len(seen.refused) == 9
    assert not seen.server.copies


@pytest.mark.parametrize("down", ["topk:0.1", "qsgd:4", "lowrank:2", "sign"])
def test_everybody_has_the_same_model_after_the_same_steps(down: str) -> None:
    """A client of the last round has what the server had when the round began, though it was away before."""
    options: dict[str, Any] = {"fleet": "phones", "availability": "bernoulli:0.6"}
    before, after = (run(FedAvg(compress_down=down), rounds=rounds, **options) for rounds in (6, 7))
    fresh = [client for client, state in after.states.items() if state.made == 6]
    assert fresh
    assert {tr.digest(after.states[client].model) for client in fresh} == {tr.digest(before.server.model)}
    assert tr.digest(before.server.model) != tr.digest(before.server.server.model.params)


def test_steps_that_a_client_has_are_not_made_twice() -> None:
    """With two phases a round clients get steps in mid-round, of which the server's count is a lower bound."""
    server, states = (result := run(FedAvg(weights="fedce", compress_down="topk:0.05"), rounds=6)).server, result.states
    down = parse("topk:0.05")
    assert down is not None
    behind = {client: server.made - state.made for client, state in states.items()}
    assert len({*behind.values()}) > 1
    for client, missed in behind.items():
        model = states[client].model
        if missed <= len(server.log):
            for step in server.log[len(server.log) - missed :]:
                model = tr.add(model, down.receive(step.coded, step.shapes, None, np.random.default_rng()))
            assert tr.digest(model) == tr.digest(server.model)


def test_down_costs_less() -> None:
    plain, less = run(FedAvg(), rounds=8), run(FedAvg(compress_down="topk:0.05"), rounds=8)
    assert less.history[-1]["bytes_down"] < 0.7 * plain.history[-1]["bytes_down"]
    assert less.history[-1]["bytes_up"] > 0.9 * plain.history[-1]["bytes_up"]


def test_the_model_down_follows_the_model() -> None:
    """Each step takes a share of what is missing: with everything sent it is the model to rounding."""
    found = run(FedAvg(compress_down="topk:1.0"), rounds=4).server
    gap = tr.norm(tr.sub(found.model, found.server.model.params))
    assert gap <= 1e-6 * tr.norm(found.model)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fields": {}}, "update: is no"),
        ({"form": "os:system"}, "update: is no"),
        ({"fields": {"delta": Coded(torch.ones(3), torch.ones(3)), "buffers": {}}}, "delta"),
        ("cut", "delta: .*numbers"),
        ("index", "delta: .*ascending"),
        ("bomb", "delta: says shapes"),
        ("shape", "delta.features"),
        ("nan", "delta.* finite"),
        ("dense", "update: is not compressed"),
    ],
)
def test_malformed_messages_cost_their_client_alone(change: Any, reason: str) -> None:
    worker, server, update = one_update(FedAvg(compress="topk:0.05"))
    coded, shapes = update.fields["delta"]
    first = next(iter(shapes))
    if isinstance(change, dict):
        bad: Any = update._replace(**change)
    elif change == "dense":
        bad = worker.method.received(worker.place, reply(2, update), worker.program[0], server)
    else:
        squeezed = {
            "cut": (coded._replace(numbers=coded.numbers[1:]), shapes),
            "index": (coded._replace(packed=coded.packed.flip(0)), shapes),
            "bomb": (coded, {**shapes, first: (2**40, 2**20)}),
            "shape": (coded, {**shapes, first: (64, 16)}),
            "nan": (coded._replace(numbers=coded.numbers * float("nan")), shapes),
        }[change]
        bad = update._replace(fields={**update.fields, "delta": type(update.fields["delta"])(*squeezed)})
    replies, refused = [reply(1, bad), reply(2, update)], []
    for stage in stages(worker):
        replies, more = stage(replies, server)  # type: ignore[assignment]
        refused += more
    assert [r.job.client for r in replies] == [2]
    assert isinstance(replies[0].update.delta, dict)
    assert [r.client for r in refused] == [1]
    assert re.search(reason, f"{refused[0].field}: {refused[0].reason}")


def reply(client: int, update: Any) -> Reply:
    return Reply(Job(client, client, 1, 0, 0, 0), update, 10, 10, 1, 0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (FedAvg(compress="tpk:0.1"), "topk"),
        (methods.DPSGD(compress="topk:0.1"), "no server"),
        (methods.FedDF(compress="topk:0.1"), "whole models"),
        (FedAvg(compress_down="ef:topk:0.1"), "alone"),
        (FedAvg(compress_down="topk:0.1", buffers="local"), "buffers"),
        (methods.FedProto(compress="topk:0.1"), "neither differences nor controls"),
        (methods.FedProto(compress_down="topk:0.1"), "no global model"),
        (methods.HeteroFL(compress_down="topk:0.1"), "compress-down=identity"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(method: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why):
        run(method, rounds=1, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()

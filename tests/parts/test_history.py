"""Momenta of clients against their definition, and what they go together with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Linear, architecture, federation, loop, worker

import consilience
import consilience.privacy.options
from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.messages import Job
from consilience.methods import DPSGD, IFCA, FedAvg, FedDyn, FedMD, Masha1, Scaffold
from consilience.parts.compose import composed
from consilience.parts.history import Momenta, Past

BETA = 0.7
DOUBLE = architecture(Linear, dtype=torch.float64)
RUN: dict[str, Any] = {"model": "mlp:8", "rounds": 3, "executor": "serial", "eval_clients_every": 0}


def test_without_it_nothing_changes() -> None:
    plain = FedAvg(form="delta", client_momentum=0.0)
    assert composed(plain) is plain
    assert isinstance(composed(FedAvg(client_momentum=0.5)), Momenta)
    assert composed(FedAvg(client_momentum=0.5)).form == "delta"


def test_what_is_sent_is_the_momentum_of_differences() -> None:
    """A client asked three times, from models of its own choice: by the definition, in float64."""
    fed = federation(dtype=torch.float64)
    plain = worker(FedAvg(form="delta", local_steps=2), fed, DOUBLE)
    past = worker(composed(FedAvg(form="delta", local_steps=2, client_momentum=BETA)), fed, DOUBLE)
    server, state, expected = plain.method.init_server(plain.host(0, "init")), None, None
    for number in range(1, 4):
        start = server._replace(model=tr.scale(server.model, number))
        job = Job(number, 1, number, 0, 0, 0)
        message = plain.method.broadcast(plain.program[0], start, None)  # type: ignore[arg-type]
        delta = plain.do_train(message, job, None)[0].update.delta
        update, state = (lambda work, kept: (work.update, kept))(*past.do_train(message, job, state))
        if expected is None:
            expected = {name: d.clone() for name, d in delta.items()}
        else:
            expected = {name: BETA * expected[name] + (1 - BETA) * delta[name] for name in delta}
        for name in delta:
            torch.testing.assert_close(update.delta[name], expected[name], rtol=1e-12, atol=1e-14)
        assert isinstance(state, Past)


def test_with_everybody_the_mean_of_momenta_is_a_momentum_of_means() -> None:
    """FedAvg with a server's exponential mean of differences, by hand."""
    fed = federation(dtype=torch.float64)
    method = FedAvg(form="delta", weights="uniform", local_steps=2)
    at = worker(method, fed, DOUBLE)
    server, mean = method.init_server(at.host(0, "init")), None
    for version in range(3):
        message = method.broadcast(at.program[0], server, None)  # type: ignore[arg-type]
        jobs = [Job(i, i, version + 1, 0, version, 0) for i in range(5)]
        deltas = [at.do_train(message, job, None)[0].update.delta for job in jobs]
        new = {name: sum(d[name] for d in deltas) / 5 for name in deltas[0]}
        mean = new if mean is None else {n: BETA * mean[n] + (1 - BETA) * new[n] for n in new}
        server = server._replace(model=server.model._replace(params=tr.add(server.model.params, mean)))
    done = loop(
        worker(composed(FedAvg(form="delta", weights="uniform", local_steps=2, client_momentum=BETA)), fed, DOUBLE), 3
    )
    for name, p in done.snapshots[3].server.model.params.items():
        torch.testing.assert_close(p, server.model.params[name], rtol=1e-12, atol=1e-14)


def test_controls_travel_as_they_are() -> None:
    """Of what a client sends for its second job, the difference has a past and the control is plain."""
    fed = federation()
    plain, heavy = (worker(composed(Scaffold(client_momentum=beta, batch_size=4)), fed) for beta in (0.0, 0.9))
    message = plain.method.broadcast(plain.program[0], plain.method.init_server(plain.host(0, "init")), None)  # type: ignore[arg-type]
    sent: list[Any] = []
    for at in (plain, heavy):
        state = None
        for number in (1, 2):
            work, state = at.do_train(message, Job(number, 0, number, 0, 0, 0), state)
        sent.append(work.update)
    assert tr.digest(sent[0].control) == tr.digest(sent[1].control)
    assert tr.digest(sent[0].delta) != tr.digest(sent[1].delta)


def test_it_goes_with_aggregators_compression_privacy_and_attacks() -> None:
    fed = consilience.make_federation("digits", clients=5, seed=0)
    for extra, options in (
        ({"aggregator": "cclip"}, {"attack": "ipm:0.2"}),
        ({"compress": "ef21:topk:0.2"}, {}),
        ({}, {"privacy": consilience.privacy.options.Privacy(noise=0.5, mechanism="fixed"), "participation": 3}),
        ({}, {"privacy": consilience.privacy.options.Privacy(secure=0.6)}),
        ({"buffers": "local"}, {"participation": 3}),
    ):
        found = consilience.run(FedAvg(client_momentum=0.5, **extra), fed, **RUN, **options)
        assert found.refused == []


@pytest.mark.parametrize("method", [DPSGD(client_momentum=0.5), FedMD(client_momentum=0.5)])
def test_methods_that_send_no_differences_are_refused(method: Any) -> None:
    fed = consilience.make_federation("digits", clients=5, public=10, seed=0)
    with pytest.raises(ConfigError, match="client_momentum=0"):
        consilience.run(method, fed, **RUN)


@pytest.mark.parametrize("bad", [1.0, -0.1])
def test_shares_that_make_no_sense_are_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match="client_momentum"):
        FedAvg(client_momentum=bad)


@pytest.mark.parametrize("cls", [FedDyn, IFCA, Masha1])
def test_methods_that_rely_on_what_was_sent_are_refused(cls: Any) -> None:
    with pytest.raises(ConfigError, match="relies on what its clients have sent"):
        composed(cls(client_momentum=0.5))

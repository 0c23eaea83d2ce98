"""Just One Byte: the code, the steps by hand, and that replicas stay the same."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LINEAR64, Frozen, architecture, federation, reply, site, vector, worker
from hypothesis import given
from hypothesis import strategies as st

import consilience
from consilience.core import tree as tr
from consilience.core.encode import encoded_size
from consilience.core.errors import ConfigError
from consilience.core.messages import ClientInfo
from consilience.core.model import Weights
from consilience.core.streams import Streams
from consilience.methods import OneByte
from consilience.methods.onebyte import Scalars, decode, encode


def run(method: Any, model: Any = LINEAR64, rounds: int = 6, **options: Any) -> consilience.Result:
    fed = federation(dtype=torch.float64 if model is LINEAR64 else torch.float32)
    made = {"model": model, "rounds": rounds, "executor": "serial", "eval_clients_every": 0, **options}
    return consilience.run(method, fed, **made)


@given(st.floats(allow_nan=False, allow_infinity=False, width=32), st.integers(0, 255))
def test_a_byte_is_the_nearest_of_its_numbers(slope: float, byte: int) -> None:
    read = decode(encode(slope))
    assert 0 <= encode(slope) < 256
    assert encode(decode(byte)) == byte
    if 3.4e-4 < abs(slope) < 2600:
        assert abs(read / slope - 1) < math.exp(1 / 16) - 1 + 1e-6
    assert (read < 0) == (slope < 0)


def test_a_byte_for_what_is_no_usual_number() -> None:
    smallest, largest = decode(0), decode(127)
    assert decode(encode(0.0)) == decode(encode(math.nan)) == smallest == pytest.approx(math.exp(-8))
    assert decode(encode(math.inf)) == -decode(encode(-math.inf)) == largest == pytest.approx(math.exp(63 / 8))


def loss(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """Cross entropy of a linear model, naive. w: its weights and bias, flat."""
    scores = x @ w[:15].reshape(3, 5).T + w[15:]
    wide = scores - scores.max(1, keepdims=True)
    return float(np.mean(np.log(np.exp(wide).sum(1)) - wide[np.arange(len(y)), y]))


def naive(method: OneByte, rounds: int, clients: int) -> np.ndarray:
    """The model by the equations, with the batches and directions that the streams give."""
    at = worker(method, federation(dtype=torch.float64), LINEAR64)
    w = vector(site(at).initial()).numpy()
    for t in range(rounds):
        found = []
        for m in range(clients):
            data = at.federation.data(m).train
            order = Streams(0, m, t + 1, "train").rng("batches").permutation(len(data))
            for j in range(method.local_steps or 0):
                rows = order[j * method.batch_size : (j + 1) * method.batch_size]
                x, y = data.x[rows].numpy(), data.y[rows].numpy()
                rng = Streams(0).rng("shared", "direction", m, t + 1, j)
                z = np.concatenate([rng.standard_normal((3, 5)).ravel(), rng.standard_normal(3)])
                rho = (loss(w + method.eps * z, x, y) - loss(w - method.eps * z, x, y)) / (2 * method.eps)
                if method.precision == "byte":
                    q = min(63, max(-64, round(8 * math.log(abs(rho)))))
                    rho = math.copysign(float(np.float32(math.exp(q / 8))), rho)
                found.append((rho, z))
        size = method.rate(t) / (math.sqrt(len(found)) if method.scale == "sqrt" else len(found))
        for rho, z in found:
            w = w - size * rho * z
    return w


@pytest.mark.parametrize("scale", ["sqrt", "mean"])
def test_steps_are_the_equations(scale: Any) -> None:
    method = OneByte(local_steps=2, batch_size=3, lr=0.05, lr_decay=0.9, scale=scale)
    found = vector(run(method).server.model).numpy()
    np.testing.assert_allclose(found, naive(method, 6, 5), rtol=1e-9, atol=1e-11)


def test_one_client_and_one_batch_in_full_is_mezo() -> None:
    method = OneByte(local_steps=1, batch_size=4, lr=0.05, precision="full")
    fed = federation(sizes=(7,), dtype=torch.float64)
    made: dict[str, Any] = {"model": LINEAR64, "rounds": 5, "executor": "serial", "eval_clients_every": 0}
    found = vector(consilience.run(method, fed, **made).server.model).numpy()
    np.testing.assert_allclose(found, naive(method, 5, 1), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("history", [0, 2, 100])
def test_replicas_are_the_same_to_the_bit(history: int) -> None:
    """Whoever was asked last in round k has the model of round k, though clients come, go, and lose jobs."""
    method = OneByte(batch_size=4, history=history, check_every=1)
    result = run(method, rounds=12, participation=3, availability="bernoulli:0.6", fleet="phones", drops=0.2)
    whole = run(OneByte(batch_size=4, history=1000, check_every=1), rounds=12, participation=3,
                availability="bernoulli:0.6", fleet="phones", drops=0.2)  # fmt: skip
    assert tr.digest(whole.server.model) == tr.digest(result.server.model)  # how they caught up changes nothing
    digests = [update.before for update in whole.server.log]
    made = {client: state.made for client, state in result.states.items() if state.made < len(digests)}
    assert len({*made.values()}) > 1
    for client, k in made.items():
        assert tr.digest(result.states[client].model) == digests[k]
    assert not any(has < 0 for has in result.server.has.values())


def test_the_log_alone_makes_the_model() -> None:
    method = OneByte(batch_size=4)
    server = run(method, rounds=8, participation=3).server
    at = worker(method, federation(dtype=torch.float64), LINEAR64)
    here = site(at, 2)
    fresh = method.init_client(here)
    message = method.broadcast(at.program[0], server._replace(has={}), info(at, 2))
    assert message.whole is None
    assert tr.digest(method._caught_up(here, message, fresh).model) == tr.digest(server.model)


def info(at: Any, client: int) -> Any:
    return ClientInfo(client, at.federation.size(client), at.place.model_of(client), at.place.architectures)


def test_a_slope_is_the_gradient_along_the_direction() -> None:
    method = OneByte(batch_size=4, local_steps=1, eps=1e-5, precision="full")
    at = worker(method, federation(dtype=torch.float64), LINEAR64)
    here = site(at, 1)
    state = method.init_client(here)
    message = method.broadcast(at.program[0], method.init_server(at.host(0, "init")), info(at, 1))
    update, _ = method.client_update(at.program[0], here, message, state)
    rows = at.federation.data(1).train.rows(torch.from_numpy(here.rng("batches").permutation(12)[:4]))
    module = here.bind(state.model)
    leaves = [p.requires_grad_(True) for p in module.parameters()]
    grads = torch.autograd.grad(at.place.task.loss(module(rows.x), rows.y), leaves)
    z = method._direction(here, state.model.params, set(), 1, 1, 0)
    wanted = sum(float((g * d).sum()) for g, d in zip(grads, z.values(), strict=True))
    assert float(update.codes[0]) == pytest.approx(wanted, rel=1e-8)
    assert here.computed.samples == 2 * 4


def test_a_replica_that_differs_is_found_and_made_anew() -> None:
    method = OneByte(batch_size=4, check_every=1)
    at = worker(method, federation(dtype=torch.float64), LINEAR64)
    phase, host = at.program[0], at.host(0, "train")
    server = method.init_server(at.host(0, "init"))
    good = [reply(c, Scalars(torch.tensor([70], dtype=torch.uint8), 0, tr.digest(server.model))) for c in (0, 1)]
    bad = reply(2, Scalars(torch.tensor([200], dtype=torch.uint8), 0, "another"))
    with_it = method.aggregate(phase, host, server, [*good, bad], [0, 1, 2])
    assert tr.digest(with_it.model) == tr.digest(method.aggregate(phase, host, server, good, [0, 1]).model)
    assert with_it.has == {0: 0, 1: 0, 2: -1}
    assert method.broadcast(phase, with_it, info(at, 2)).whole is with_it.model
    assert method.broadcast(phase, with_it, info(at, 1)).whole is None
    alone = method.aggregate(phase, host, server, [bad], [2])
    assert tr.digest(alone.model) == tr.digest(server.model)
    assert alone.made == 0


def test_frozen_parameters_stay() -> None:
    server = run(OneByte(batch_size=4), architecture(Frozen), rounds=3).server
    at = worker(OneByte(), federation(), architecture(Frozen))
    before: Weights = site(at).initial()
    same = {name: torch.equal(p, server.model.params[name]) for name, p in before.params.items()}
    assert same == {name: name.startswith("features") for name in before.params}


def test_it_costs_a_byte_for_each_scalar() -> None:
    few, many = (run(OneByte(batch_size=4, local_steps=steps), rounds=2).history[-1] for steps in (4, 36))
    assert many["bytes_up"] - few["bytes_up"] == pytest.approx(2 * 5 * 32, abs=2 * 5 * 16)  # digits of lengths beside
    size = encoded_size(Scalars(torch.zeros(36, dtype=torch.uint8), 0, ""))
    assert many["bytes_up"] == 2 * 5 * size


def test_it_learns_on_digits() -> None:
    fed = consilience.make_federation("digits", clients=5, seed=0)
    made = consilience.run(OneByte(lr=0.02), fed, model="logistic", rounds=25, eval_clients_every=0, executor="serial")
    assert made.history[-1]["global"]["accuracy"] > 0.4  # guessing has 0.1


@pytest.mark.parametrize("options", [{"optimizer": "adam"}, {"momentum": 0.9}, {"clip": 1.0}, {"weight_decay": 0.1}])
def test_what_has_no_meaning_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="plain steps"):
        OneByte(**options)

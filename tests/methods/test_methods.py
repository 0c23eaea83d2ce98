"""Methods against the simpler method that they reduce to, against NumPy, and against closed forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    LINEAR,
    LINEAR64,
    NOISY,
    NORMED,
    SCALAR64,
    SIZES,
    Frozen,
    Parts,
    SpoiledScaffold,
    architecture,
    federation,
    loop,
    reply,
    site,
    vector,
    worker,
)
from torch.nn import functional as F

from consilience.core import tree as tr
from consilience.core.encode import encode
from consilience.core.errors import ConfigError
from consilience.core.federation import ClientData, Split
from consilience.core.messages import Broadcast, DeltaUpdate, ModelUpdate
from consilience.core.method import Method, ServerState
from consilience.core.model import Architecture, Weights
from consilience.core.reduce import weighted_sum
from consilience.core.snapshot import Snapshot
from consilience.core.streams import Streams
from consilience.core.worker import Worker
from consilience.methods.centralised import Centralised
from consilience.methods.fedavg import FedAvg
from consilience.methods.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi, Moments
from consilience.methods.fedprox import FedProx
from consilience.methods.local import Local
from consilience.methods.moon import Moon
from consilience.methods.scaffold import Down, Scaffold

USUAL: dict[str, Any] = {"batch_size": 4, "lr": 0.1, "local_epochs": 2}


def trained(method: Method, rounds: int = 3, model: Architecture = NOISY, cohort: int = 3, **more: Any) -> Snapshot:
    return loop(worker(method, model=model), rounds, cohort=cohort, **more).snapshots[rounds]


def after_one(method: Method, fed: Parts | None = None, model: Architecture = NOISY, **more: Any) -> Snapshot:
    return loop(worker(method, fed, model), 1, **more).snapshots[1]


def model_digest(snapshot: Snapshot) -> str:
    return tr.digest(snapshot.server.model)


def updates(at: Worker, message: Any, state: Any = None, clients: Sequence[int] = range(5)) -> list[Any]:
    phase = at.program[0]
    return [at.method.client_update(phase, site(at, client), message, state)[0] for client in clients]


# --- reductions, bit for bit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["model", "delta"])
@pytest.mark.parametrize("weights", ["samples", "uniform"])
@pytest.mark.parametrize("other", [FedProx, Moon])
def test_without_its_term_a_method_is_fedavg(other: Any, form: Any, weights: Any) -> None:
    same: dict[str, Any] = {"form": form, "weights": weights, **USUAL}
    plain, neutral = trained(FedAvg(**same)), trained(other(mu=0.0, **same))
    assert tr.digest(plain.server) == tr.digest(neutral.server)
    assert plain.totals == neutral.totals


@pytest.mark.parametrize("other", [FedProx, Moon])
def test_with_its_term_a_method_is_not_fedavg(other: Any) -> None:
    assert model_digest(trained(FedAvg(**USUAL))) != model_digest(trained(other(mu=0.5, **USUAL)))


def test_server_momentum_zero_is_fedavg_in_delta_form() -> None:
    plain = trained(FedAvg(form="delta", **USUAL))
    assert model_digest(trained(FedAvgM(server_momentum=0.0, server_lr=1.0, **USUAL))) == model_digest(plain)
    assert model_digest(trained(FedAvgM(server_momentum=0.9, **USUAL))) != model_digest(plain)


@pytest.mark.parametrize("control", ["1", "2"])
def test_round_one_of_scaffold_is_uniform_fedavg(control: Any) -> None:
    plain = after_one(FedAvg(form="delta", weights="uniform", **USUAL), cohort=3)
    assert model_digest(after_one(Scaffold(control=control, **USUAL), cohort=3)) == model_digest(plain)
    assert model_digest(trained(Scaffold(control=control, **USUAL), 2)) != model_digest(
        trained(FedAvg(form="delta", weights="uniform", **USUAL), 2)
    )


def test_forms_agree_to_rounding() -> None:
    model, delta = (trained(FedAvg(form=form, **USUAL), model=LINEAR64) for form in ("model", "delta"))
    torch.testing.assert_close(vector(model.server), vector(delta.server), rtol=1e-12, atol=1e-14)


# --- FedAvg ----------------------------------------------------------------------------------------------------


def test_one_client_is_plain_sgd() -> None:
    fed = federation((11,))
    module = LINEAR.build()
    start = LINEAR.initial(3)
    module.load_state_dict(start.params)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    rows = fed.data(0).train
    for number in (1, 2, 3):
        rng = Streams(3, 0, number, "train").rng("batches")
        for _ in range(2):
            for index in torch.from_numpy(rng.permutation(11)).split(4):
                optimizer.zero_grad()
                F.cross_entropy(module(rows.x[index]), rows.y[index]).backward()
                optimizer.step()
    found = loop(worker(FedAvg(**USUAL), fed, seed=3), 3).snapshots[3].server.model.params
    assert all(torch.equal(found[name], p) for name, p in module.named_parameters())


@pytest.mark.parametrize("form", ["model", "delta"])
def test_one_full_step_of_everybody_is_a_step_on_the_pooled_loss(form: Any) -> None:
    fed = federation(dtype=torch.float64)
    at = worker(FedAvg(lr=0.3, batch_size=99, local_steps=1, form=form), fed, LINEAR64)
    found = loop(at, 1).snapshots[1].server.model.params
    start = LINEAR64.initial(0).params
    leaves = {name: p.clone().requires_grad_() for name, p in start.items()}
    rows = [fed.data(client).train for client in range(5)]
    x, y = torch.cat([r.x for r in rows]), torch.cat([r.y for r in rows])
    F.cross_entropy(torch.func.functional_call(LINEAR64.build(), leaves, (x,)), y).backward()
    for name, p in leaves.items():
        assert p.grad is not None
        torch.testing.assert_close(found[name] - start[name], -0.3 * p.grad, rtol=1e-6, atol=1e-12)


def constant(value: float) -> Weights:
    return Weights({name: torch.full_like(p, value) for name, p in LINEAR64.initial(0).params.items()}, {})


@pytest.mark.parametrize(("weights", "mean"), [("samples", 3.5), ("uniform", 3.0)])
def test_weights_are_shares_of_the_cohort(weights: Any, mean: float) -> None:
    at = worker(FedAvg(weights=weights), federation(dtype=torch.float64), LINEAR64)
    host, phase = at.host(0, "train"), at.program[0]
    replies = [reply(0, ModelUpdate(constant(2.0)), 1), reply(4, ModelUpdate(constant(4.0)), 3)]
    new = at.method.aggregate(phase, host, ServerState(constant(10.0)), replies, [0, 4])
    assert set(vector(new).tolist()) == {mean}
    delta = FedAvg(weights=weights, form="delta")
    replies = [reply(0, DeltaUpdate(constant(2.0).params, {}), 1), reply(4, DeltaUpdate(constant(4.0).params, {}), 3)]
    new = delta.aggregate(phase, host, ServerState(constant(10.0)), replies, [0, 4])
    assert set(vector(new).tolist()) == {10 + mean}


def test_the_round_is_the_weighted_mean_of_the_clients_models() -> None:
    at = worker(FedAvg(**USUAL), model=NOISY)
    sent = updates(at, Broadcast(NOISY.initial(0)))
    wanted = weighted_sum([update.model for update in sent], [n / sum(SIZES) for n in SIZES])
    assert tr.digest(after_one(FedAvg(**USUAL)).server) == tr.digest(ServerState(wanted))


# --- FedProx ---------------------------------------------------------------------------------------------------


def test_the_first_proximal_step_does_not_know_mu() -> None:
    found = {model_digest(after_one(FedProx(mu=mu, batch_size=4, local_steps=1))) for mu in (0.0, 0.1, 10.0)}
    assert len(found) == 1


def test_proximal_minimum_has_a_closed_form() -> None:
    fed = federation((15,), regression=True, dtype=torch.float64)
    at = worker(FedProx(mu=0.7, lr=0.05, batch_size=99, local_steps=700), fed, SCALAR64)
    start = SCALAR64.initial(0)
    end = updates(at, Broadcast(start), clients=[0])[0].model
    rows = fed.data(0).train
    design = np.concatenate([rows.x.numpy(), np.ones((15, 1))], axis=1)
    a, b = design.T @ design / 15, design.T @ rows.y.numpy() / 15
    wanted = np.linalg.solve(a + 0.7 * np.eye(6), b + 0.7 * vector(start.params).numpy())
    np.testing.assert_allclose(vector(end.params), wanted, rtol=1e-8)


@pytest.mark.parametrize("work", [{"local_epochs": 5}, {"local_steps": 9}, {}])
def test_stragglers_do_less_and_are_averaged(work: dict[str, int]) -> None:
    fields: dict[str, Any] = {"mu": 0.1, "batch_size": 2, "lr": 0.1, **work}
    full, partial = FedProx(**fields), FedProx(stragglers=1.0, **fields)
    most, least = (loop(worker(method), 3).snapshots[3].totals for method in (full, partial))
    assert 3 * 5 <= least.steps < most.steps
    assert least.bytes_up == most.bytes_up
    at = worker(partial)
    sites = [site(at, client) for client in range(5)]
    for client, message in zip(sites, [Broadcast(LINEAR.initial(0))] * 5, strict=True):
        fit = at.method.train(client, message, None)
        if "local_epochs" in work:
            epoch = -(-SIZES[client.id] // 2)
            assert fit.steps in [epoch * e for e in range(1, 5)]
    sent = updates(at, Broadcast(LINEAR.initial(0)))
    wanted = weighted_sum([update.model for update in sent], [n / sum(SIZES) for n in SIZES])
    assert model_digest(after_one(partial, model=LINEAR)) == tr.digest(wanted)


def test_about_the_share_asked_for_straggles() -> None:
    at = worker(FedProx(stragglers=0.3, local_epochs=5))
    message = Broadcast(LINEAR.initial(0))
    short = [at.method.plan(site(at, 0, number), message, None).epochs is not None for number in range(400)]
    assert abs(sum(short) / 400 - 0.3) < 0.1


# --- MOON ------------------------------------------------------------------------------------------------------


def test_the_first_contrast_is_log_two_without_gradient() -> None:
    at = worker(Moon(mu=2.0, **USUAL), model=NORMED)
    here = site(at)
    start = here.initial()
    plan = at.method.plan(here, Broadcast(start), None)
    assert plan.loss is not None
    module = here.borrow().fill(start, train=True)
    module.eval()  # the frozen models are in evaluation mode
    rows = here.train
    batch = type("Rows", (), {"x": rows.x, "y": rows.y})
    plain = F.cross_entropy(module(rows.x), rows.y)
    value = plan.loss(module, batch)  # type: ignore[arg-type]
    assert float((value - plain).detach()) == pytest.approx(2 * np.log(2), rel=1e-5)
    names = list(module.parameters())
    for a, b in zip(torch.autograd.grad(value, names), torch.autograd.grad(plain, names), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_moon_contrasts_with_the_clients_own_last_model() -> None:
    last = trained(Moon(**USUAL), 2, cohort=5)
    at = worker(Moon(**USUAL), model=NOISY)
    assert set(last.states) == set(range(5))
    message = Broadcast(last.server.model)
    here, elsewhere = (updates(at, message, last.states[client], [0])[0] for client in (0, 1))
    assert tr.digest(here) != tr.digest(elsewhere)
    update, state = at.method.client_update(at.program[0], site(at), message, last.states[0])
    assert tr.digest(update.model) == tr.digest(state)


# --- SCAFFOLD --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", ["1", "2"])
@pytest.mark.parametrize("method", [Scaffold, SpoiledScaffold])
def test_the_control_is_the_mean_of_all_client_controls(method: Any, control: Any) -> None:
    at = worker(method(control=control, momentum=0.5, **USUAL), federation(dtype=torch.float64), LINEAR64)
    memory = loop(at, 6, cohort=2)
    assert bool(memory.dropped) == (method is SpoiledScaffold)
    for snapshot in memory.snapshots.values():
        mean = sum(vector(state) for state in snapshot.states.values()) / len(SIZES)
        torch.testing.assert_close(vector(snapshot.server.control), mean, rtol=1e-10, atol=1e-12)
    assert float(vector(memory.snapshots[6].server.control).norm()) > 0.01


def scaffold_update(**fields: Any) -> tuple[Any, Any, Any, Any, Any]:
    at = worker(Scaffold(**USUAL, **fields), federation(dtype=torch.float64), LINEAR64)
    rng = np.random.default_rng(0)
    like = LINEAR64.initial(0)
    c, own = ({k: torch.from_numpy(rng.normal(size=p.shape)) for k, p in like.params.items()} for _ in range(2))
    here = site(at)
    up, new = at.method.client_update(at.program[0], here, Down(like, c), own)
    return here, up, new, c, own


@pytest.mark.parametrize("fields", [{"weight_decay": 0.1}, {"weight_decay": 0.1, "clip": 0.2}])
def test_option_two_is_the_mean_gradient_that_was_stepped_along(fields: dict[str, float]) -> None:
    here, up, new, c, own = scaffold_update(**fields)
    steps = 2 * 2  # 2 epochs of 7 rows in batches of 4
    wanted = vector(own) - vector(c) - vector(up.delta) / (steps * 0.1)
    torch.testing.assert_close(vector(new), wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(vector(up.control), vector(new) - vector(own), rtol=1e-12, atol=1e-14)
    correction, raw = tr.sub(c, own), []

    def step(params: Any, grad: Any, batch: Any, carry: Any) -> Any:
        raw.append(tr.clone(grad()))
        return tr.add(raw[-1], correction), carry

    end = here.fit(here.initial(), step=step).weights
    torch.testing.assert_close(vector(end), vector(here.initial()) + vector(up.delta), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(vector(new), sum(map(vector, raw)) / steps, rtol=1e-10, atol=1e-12)


def test_option_one_is_the_whole_gradient_at_the_received_model() -> None:
    here, _, new, _, _ = scaffold_update(control="1")
    module = LINEAR64.build()
    module.load_state_dict(here.initial().params)
    rows = here.cast(here.train)
    F.cross_entropy(module(rows.x), rows.y).backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    torch.testing.assert_close(vector(new), vector(grads), rtol=1e-10, atol=1e-12)
    assert (here.computed.samples, here.computed.steps) == (7 * 3, 5)  # two epochs and one pass more


def test_scaffold_finds_the_optimum_where_fedavg_does_not() -> None:
    rng = np.random.default_rng(1)
    parts, design, target = [], [], []
    for scale in (0.4, 1.6):
        x = rng.normal(size=(12, 5)) * scale
        y = x @ rng.normal(size=5) * 2 + rng.normal()
        rows = Split(torch.from_numpy(x), torch.from_numpy(y))
        parts.append(ClientData(rows, rows.rows(slice(0)), rows.rows(slice(0))))
        design.append(np.concatenate([x, np.ones((12, 1))], axis=1))
        target.append(y)
    fed = federation((1, 1), regression=True)
    fed.parts = parts
    optimum = np.linalg.lstsq(np.concatenate(design), np.concatenate(target), rcond=None)[0]
    work: dict[str, Any] = {"lr": 0.08, "batch_size": 99, "local_steps": 8}
    found = {}
    for method in (Scaffold(**work), Scaffold(control="1", **work), FedAvg(**work)):
        last = loop(worker(method, fed, SCALAR64), 60).snapshots[60]
        found[f"{method.name}{getattr(method, 'control', '')}"] = np.abs(
            vector(last.server.model).numpy() - optimum
        ).max()
    assert found["scaffold2"] < 1e-4, found
    assert found["scaffold1"] < 1e-4, found
    assert found["fedavg"] > 0.02, found


# --- server optimisers -----------------------------------------------------------------------------------------


def fabricated(method: Any, deltas: Sequence[Sequence[float]], start: float = 0.0) -> list[tuple[float, float]]:
    """x and v after each round, when two equal clients send a delta each (all coordinates alike)."""
    at = worker(method, federation(dtype=torch.float64), LINEAR64)
    host, phase = at.host(0, "train"), at.program[0]
    server = at.method.init_server(host)._replace(model=constant(start))
    out = []
    for pair in deltas:
        sent = [reply(i, DeltaUpdate(constant(pair[i]).params, {}), (1, 3)[i]) for i in (0, 1)]
        server = at.method.aggregate(phase, host, server, sent, [0, 1])
        second = float(next(iter(server.second.values())).flatten()[0]) if isinstance(server, Moments) else 0.0
        assert len(set(vector(server.model).tolist())) == 1
        out.append((float(vector(server.model)[0]), second))
    return out


@pytest.mark.parametrize("kind", ["adagrad", "adam", "yogi"])
def test_three_rounds_of_an_adaptive_server_as_in_the_paper(kind: str) -> None:
    fields: dict[str, Any] = {"server_lr": 0.3, "beta_1": 0.8, "tau": 0.05}
    made = {
        "adagrad": FedAdagrad(**fields),
        "adam": FedAdam(beta_2=0.9, **fields),
        "yogi": FedYogi(beta_2=0.9, **fields),
    }
    deltas = [(0.5, 0.1), (-0.02, 0.01), (0.3, -0.7)]
    x, m, v = 2.0, 0.0, 0.05**2
    wanted = []
    for one, two in deltas:
        d = 0.25 * one + 0.75 * two
        m = 0.8 * m + 0.2 * d
        if kind == "adagrad":
            v = v + d**2
        elif kind == "adam":
            v = 0.9 * v + 0.1 * d**2
        else:
            v = v - 0.1 * d**2 * np.sign(v - d**2)
        x = x + 0.3 * m / (np.sqrt(v) + 0.05)
        wanted.append((x, v))
    np.testing.assert_allclose(fabricated(made[kind], deltas, 2.0), wanted, rtol=1e-12)


def test_one_step_formulas() -> None:
    tau, d = 0.1, 0.4
    x, _ = fabricated(FedAdagrad(server_lr=0.5, tau=tau), [(d, d)])[0]
    assert x == pytest.approx(0.5 * d / (np.hypot(tau, d) + tau), rel=1e-12)
    _, adam = fabricated(FedAdam(beta_2=0.9, tau=tau), [(d, d)])[0]
    _, yogi = fabricated(FedYogi(beta_2=0.9, tau=tau), [(d, d)])[0]
    assert adam == pytest.approx(0.9 * tau**2 + 0.1 * d**2, rel=1e-12)
    assert yogi == pytest.approx(tau**2 + 0.1 * d**2, rel=1e-12)


def test_server_momentum_accumulates() -> None:
    found = fabricated(FedAvgM(server_lr=0.5, server_momentum=0.9), [(1.0, 1.0), (2.0, 2.0), (0.0, 0.0)])
    velocity = [1.0, 2.9, 2.61]
    np.testing.assert_allclose([x for x, _ in found], 0.5 * np.cumsum(velocity), rtol=1e-12)


def test_server_optimisers_take_differences_only() -> None:
    for method in (FedAvgM, FedAdam, FedYogi, FedAdagrad):
        with pytest.raises(ConfigError, match="delta"):
            method(form="model")
    with pytest.raises(ConfigError, match="form"):
        Scaffold(form="model")  # type: ignore[arg-type]


# --- the references --------------------------------------------------------------------------------------------


def test_local_clients_exchange_nothing() -> None:
    at = worker(Local(**USUAL), model=NOISY)
    memory = loop(at, 2, cohort=2)
    last = memory.snapshots[2]
    assert (last.totals.bytes_up, last.totals.bytes_down, last.server) == (0, 0, None)
    absent = set(range(5)) - set(last.states)
    assert absent
    assert len(absent) < 5
    rows = {row["client"]: row for row in memory.clients if row["round"] == 2}
    for client in range(5):
        weights = NOISY.initial(0) if client in absent else last.states[client]
        assert rows[client]["loss"] == site(at, client).evaluate(weights).loss
    own = NOISY.initial(0)
    client = next(iter(last.states))
    for number in range(1, last.numbers[client] + 1):
        own = site(at, client, number).fit(own).weights
    assert tr.digest(last.states[client]) == tr.digest(own)


@pytest.mark.parametrize("work", [{"batch_size": 1}, {"batch_size": 4}, {"batch_size": 4, "local_epochs": 2}])
@pytest.mark.parametrize("cohort", [2, 5])
def test_centralised_uses_as_many_samples_as_the_cohort(work: dict[str, int], cohort: int) -> None:
    federated = loop(worker(FedAvg(**work)), 3, cohort=cohort).snapshots[3]
    pooled = loop(worker(Centralised(**work)), 3, cohort=cohort).snapshots[3]
    assert pooled.numbers == federated.numbers
    assert pooled.totals.samples == federated.totals.samples
    assert pooled.totals.bytes_up == pooled.totals.bytes_down == 0


def test_centralised_is_plain_sgd_on_the_pool() -> None:
    fed = federation()
    found = loop(worker(Centralised(batch_size=8, lr=0.1), fed), 1).snapshots[1].server.model.params
    rows = [fed.data(client).train for client in range(5)]
    x, y = torch.cat([r.x for r in rows]), torch.cat([r.y for r in rows])
    module = LINEAR.build()
    module.load_state_dict(LINEAR.initial(0).params)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    rng = Streams(0, -1, 0, "train").rng("batches")
    for index in torch.from_numpy(rng.permutation(len(x))).split(8):
        optimizer.zero_grad()
        F.cross_entropy(module(x[index]), y[index]).backward()
        optimizer.step()
    assert all(torch.equal(found[name], p) for name, p in module.named_parameters())


# --- buffers ---------------------------------------------------------------------------------------------------

AVERAGING = [
    FedAvg(**USUAL),
    FedAvg(form="delta", **USUAL),
    FedProx(**USUAL),
    Moon(**USUAL),
    FedAvgM(**USUAL),
    FedAdam(**USUAL),
    Scaffold(**USUAL),
]
names = pytest.mark.parametrize("method", AVERAGING, ids=lambda m: f"{m.name}-{m.form}")


@names
def test_buffers_are_averaged_like_weights(method: Method) -> None:
    at = worker(method, model=NORMED)
    start = NORMED.initial(0)
    message = Broadcast(start) if method.name != "scaffold" else Down(start, tr.zeros_like(start.params))
    state = tr.zeros_like(start.params) if method.name == "scaffold" else None
    sent = [u.model.buffers if isinstance(u, ModelUpdate) else u.buffers for u in updates(at, message, state)]
    shares = [0.2] * 5 if method.weights == "uniform" else [n / sum(SIZES) for n in SIZES]
    found = after_one(method, model=NORMED).server.model.buffers
    for name in ("features.1.running_mean", "features.1.running_var"):
        wanted = sum(share * buffers[name].double() for share, buffers in zip(shares, sent, strict=True))
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-6)
    count = "features.1.num_batches_tracked"
    assert int(found[count]) == int(sent[0][count]) == 4  # an integer: the first client's


@names
def test_local_buffers_stay_with_their_clients(method: Method) -> None:
    kept = type(method)(**{**vars(method), "buffers": "local"})
    at = worker(kept, model=NORMED)
    memory = loop(at, 2)
    start, last = NORMED.initial(0), memory.snapshots[2]
    assert tr.digest(last.server.model.buffers) == tr.digest(start.buffers)
    for client, size in enumerate(SIZES):
        buffers = last.states[client].buffers
        assert int(buffers["features.1.num_batches_tracked"]) == 2 * 2 * -(-size // 4)
    with_buffers = loop(worker(method, model=NORMED), 2).snapshots[2].totals.bytes_up
    assert last.totals.bytes_up < with_buffers
    if method.name == "fedavg" and method.form == "model":
        assert last.totals.bytes_up == 2 * 5 * len(encode(ModelUpdate(Weights(start.params, {}))))
        row = next(row for row in memory.clients if row["round"] == 2 and row["client"] == 3)
        deployed = Weights(last.server.model.params, last.states[3].buffers)
        assert row["loss"] == site(at, 3).evaluate(deployed).loss


@pytest.mark.parametrize("control", ["1", "2"])
def test_scaffold_leaves_what_the_model_froze(control: Any) -> None:
    """It has no gradient and no control, and the others' are those of a model without it."""
    method = Scaffold(**USUAL, control=control)
    first = method.init_server(worker(method, model=architecture(Frozen)).host(0, "init")).model.params
    after = trained(method, model=architecture(Frozen), cohort=5)
    for name, value in after.server.model.params.items():
        frozen = name.startswith("features")
        assert torch.equal(value, first[name]) == frozen
        controls = [state[name] for state in after.states.values()]
        assert all((control == 0).all() == frozen for control in [*controls, after.server.control[name]])
        torch.testing.assert_close(sum(controls) / 5, after.server.control[name], rtol=1e-5, atol=1e-6)

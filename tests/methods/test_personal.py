"""Personal models beside or around a global one: Ditto, pFedMe, APFL, Per-FedAvg."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import consilience
from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.events import draw_cohort
from consilience.core.messages import Broadcast
from consilience.core.model import Weights
from consilience.core.streams import philox
from consilience.methods import APFL, Ditto, FedAvg, Local, PerFedAvg, PFedMe
from tests.helpers import LINEAR, NOISY, NORMED, SCALAR64, federation, loop, site, vector, worker

USUAL: dict[str, Any] = {"batch_size": 4, "lr": 0.1, "local_epochs": 2}


def after(method: Any, rounds: int = 3, model: Any = NOISY, cohort: int = 3) -> Any:
    return loop(worker(method, model=model), rounds, cohort=cohort).snapshots[rounds]


def models(snapshot: Any) -> dict[int, str]:
    return {k: tr.digest(getattr(state, "model", state)) for k, state in snapshot.states.items()}


# --- reductions, bit for bit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["model", "delta"])
@pytest.mark.parametrize("weights", ["samples", "uniform"])
@pytest.mark.parametrize("extra", [{}, {"momentum": 0.5, "weight_decay": 0.01}], ids=["plain", "momentum"])
@pytest.mark.parametrize(
    "method",
    [
        lambda **k: Ditto(lam=0, **k), lambda **k: Ditto(lam=2, **k), lambda **k: APFL(alpha=0, **k),
        lambda **k: APFL(alpha=0.7, **k), lambda **k: APFL(adaptive=True, **k), lambda **k: PerFedAvg(inner_lr=0, **k),
        lambda **k: PerFedAvg(inner_lr=0, variant="hf", **k),
    ],
    ids=["ditto-0", "ditto-2", "apfl-0", "apfl-0.7", "apfl-adaptive", "fo", "hf"],
)  # fmt: skip
def test_the_global_model_is_that_of_fedavg(method: Any, weights: Any, form: Any, extra: dict[str, Any]) -> None:
    same: dict[str, Any] = {"form": form, "weights": weights, **USUAL, **extra}
    assert tr.digest(after(FedAvg(**same)).server) == tr.digest(after(method(**same)).server)


@pytest.mark.parametrize("extra", [{}, {"momentum": 0.5, "weight_decay": 0.01}], ids=["plain", "momentum"])
@pytest.mark.parametrize(
    "method", [lambda **k: Ditto(lam=0, **k), lambda **k: APFL(alpha=1, **k)], ids=["ditto", "apfl"]
)
def test_the_personal_model_is_that_of_local_training(method: Any, extra: dict[str, Any]) -> None:
    alone, found = after(Local(**USUAL, **extra)), after(method(**USUAL, **extra))
    assert models(found) == models(alone)


@pytest.mark.parametrize("method", [Ditto(lam=0.5, **USUAL), APFL(alpha=0.5, **USUAL)], ids=lambda m: m.name)
def test_with_its_term_it_is_not(method: Any) -> None:
    assert set(models(after(method)).values()).isdisjoint(models(after(Local(**USUAL))).values())


@pytest.mark.parametrize("method", [PFedMe(**USUAL), PerFedAvg(**USUAL), PerFedAvg(variant="hf", **USUAL)])
def test_these_move_the_global_model_otherwise(method: Any) -> None:
    assert tr.digest(after(method).server) != tr.digest(after(FedAvg(**USUAL)).server)


# --- Ditto -----------------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(lam=st.floats(0.5, 3.0))
def test_ditto_goes_to_the_closed_form(lam: float) -> None:
    fed = federation((15,), regression=True, dtype=torch.float64)
    method = Ditto(lam=lam, lr=0.05, batch_size=99, local_steps=900)
    at = worker(method, fed, SCALAR64)
    x = Weights(tr.scale(SCALAR64.initial(0).params, 3.0), {})
    own = method.client_update(at.program[0], site(at), Broadcast(x), None)[1]
    a, b = normal(fed.data(0).train)
    wanted = np.linalg.solve(a + lam * np.eye(6), b + lam * vector(x.params).numpy())
    np.testing.assert_allclose(vector(own.params), wanted, rtol=1e-5, atol=1e-6)


def normal(rows: Any) -> tuple[Any, Any]:
    """A and b of the quadratic (1/2) v' A v - b' v that least squares with a bias minimises."""
    design = np.concatenate([rows.x.numpy(), np.ones((len(rows), 1))], axis=1)
    return design.T @ design / len(rows), design.T @ rows.y.numpy() / len(rows)


def test_before_its_first_round_a_client_deploys_the_global_model() -> None:
    for method in (Ditto(), APFL(), PFedMe()):
        at = worker(method)
        message = Broadcast(Weights(tr.scale(LINEAR.initial(0).params, 2.0), {}))
        found = method.personal_model(site(at), message, None)
        assert tr.digest(found.weights) == tr.digest(message.model)  # type: ignore[union-attr]


# --- pFedMe ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.5, 2.0])
def test_pfedme_follows_the_envelope_of_a_quadratic(lam: float) -> None:
    fed = federation((15,), regression=True, dtype=torch.float64)
    usual: dict[str, Any] = {"lr": 0.2, "batch_size": 99, "inner_lr": 0.05, "inner_steps": 900}
    method = PFedMe(lam=lam, local_steps=3, **usual)
    at = worker(method, fed, SCALAR64)
    x = SCALAR64.initial(0)
    update, theta = method.client_update(at.program[0], site(at), Broadcast(x), None)
    a, b = normal(fed.data(0).train)
    w = vector(x.params).numpy()
    for _ in range(3):
        point = np.linalg.solve(a + lam * np.eye(6), b + lam * w)
        np.testing.assert_allclose(lam * (w - point), a @ point - b, rtol=1e-8, atol=1e-10)
        w = w - 0.2 * lam * (w - point)
    np.testing.assert_allclose(vector(update.model.params), w, rtol=1e-7)
    np.testing.assert_allclose(vector(theta.params), point, rtol=1e-7)


def test_pfedme_without_a_pull_stands_still_and_theta_trains() -> None:
    found = after(PFedMe(lam=0, inner_steps=1, inner_lr=0.1, form="delta", **USUAL), 2, LINEAR)
    assert tr.digest(found.server.model) == tr.digest(LINEAR.initial(0))
    fit = after(FedAvg(**USUAL), 1, LINEAR, 1).server.model  # theta alone takes plain steps from x
    once = after(PFedMe(lam=0, inner_steps=1, inner_lr=0.1, **USUAL), 1, LINEAR, 1)
    torch.testing.assert_close(vector(next(iter(once.states.values())).params), vector(fit.params))


def test_the_server_of_pfedme_goes_a_share_of_the_way() -> None:
    start = NORMED.initial(0).params
    whole, half, far = (after(PFedMe(beta=b, **USUAL), 1, NORMED).server.model for b in (1.0, 0.5, 2.0))
    for found, beta in ((half, 0.5), (far, 2.0)):
        wanted = {n: p + beta * (whole.params[n] - p) for n, p in start.items()}
        torch.testing.assert_close(found.params, wanted)
        assert tr.digest(found.buffers) == tr.digest(whole.buffers)


# --- APFL ------------------------------------------------------------------------------------------------------


def test_apfl_with_no_share_leaves_the_own_model_alone() -> None:
    found = after(APFL(alpha=0, **USUAL))
    initial = tr.digest(NOISY.initial(0).params)
    assert {tr.digest(state.model.params) for state in found.states.values()} == {initial}


def test_alpha_stays_while_both_models_are_equal_and_then_moves() -> None:
    first, later = (after(APFL(adaptive=True, **USUAL), n, LINEAR, 99) for n in (1, 4))
    assert {state.alpha for state in first.states.values()} == {0.5}
    alphas = {state.alpha for state in later.states.values()}
    assert len(alphas) == 5
    assert all(0 <= alpha <= 1 for alpha in alphas)


def test_apfl_refuses_what_would_mix_both_models() -> None:
    with pytest.raises(ConfigError, match="clip"):
        APFL(clip=1.0)
    with pytest.raises(ConfigError, match="optimizer=sgd"):
        APFL(optimizer="adam")


# --- Per-FedAvg ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [1e-3, 0.5])
def test_per_fedavg_on_a_quadratic(delta: float) -> None:
    """fo steps along A w~ - b, hf along (I - a A)(A w~ - b), for any delta."""
    fed = federation((15,), regression=True, dtype=torch.float64)
    a, b = normal(fed.data(0).train)
    x = SCALAR64.initial(0)
    w = vector(x.params).numpy()
    near = w - 0.1 * (a @ w - b)
    h = a @ near - b
    for variant, direction in (("fo", h), ("hf", h - 0.1 * a @ h)):
        method = PerFedAvg(variant=variant, inner_lr=0.1, delta=delta, lr=0.2, batch_size=99, local_steps=1)
        at = worker(method, fed, SCALAR64)
        update, _ = method.client_update(at.program[0], site(at), Broadcast(x), None)
        np.testing.assert_allclose(vector(update.model.params), w - 0.2 * direction, rtol=1e-8, atol=1e-9)
        deployed = method.personal_model(site(at), Broadcast(x), None)
        np.testing.assert_allclose(vector(deployed.weights.params), near, rtol=1e-10)  # type: ignore[union-attr]


def test_the_three_batches_are_drawn_apart() -> None:
    method = PerFedAvg(variant="hf", batch_size=4)
    here = site(worker(method))
    orders = [[batch.rows.tolist() for batch, _ in zip(method._batches(here, p), range(3), strict=False)]
              for p in ("inner", "curvature")]  # fmt: skip
    rng = here.rng("batches")
    orders.append([rows.tolist() for rows in torch.from_numpy(rng.permutation(7)).split(4)])
    assert len({str(order) for order in orders}) == 3


def test_the_step_to_a_personal_model_is_not_work() -> None:
    """A judged client computes no more than one that is not."""
    judged, quiet = (
        consilience.run(
            PerFedAvg(**USUAL), consilience.make_federation("digits", clients=4, seed=1), rounds=2, model="mlp:8",
            executor="serial", eval_clients_every=every,
        )
        for every in (1, 0)
    )  # fmt: skip
    assert [line["samples"] for line in judged.history] == [line["samples"] for line in quiet.history]
    assert [line["loss"] for line in judged.history if "loss" in line] == [
        line["loss"] for line in quiet.history if "loss" in line
    ]


def test_hf_refuses_clip() -> None:
    with pytest.raises(ConfigError, match="clip"):
        PerFedAvg(variant="hf", clip=1.0)


# --- against loops written out ---------------------------------------------------------------------------------

SEED, CLIENTS, COHORT, ROUNDS, LR, EPOCHS = 5, 6, 3, 4, 0.3, 2
P = dict[str, Tensor]


def gradient(p: P, x: Tensor, y: Tensor) -> P:
    leaves = {n: t.clone().requires_grad_() for n, t in p.items()}
    hidden = (x.flatten(1) @ leaves["features.1.weight"].T + leaves["features.1.bias"]).relu()
    scores = hidden @ leaves["head.weight"].T + leaves["head.bias"]
    (scores.logsumexp(1) - scores[range(len(y)), y]).mean().backward()
    return {n: t.grad for n, t in leaves.items() if t.grad is not None}


def plus(p: P, size: float, q: P) -> P:
    return {n: p[n] + size * q[n] for n in p}


def mix(alpha: float, v: P, w: P) -> P:
    return {n: alpha * v[n] + (1 - alpha) * w[n] for n in v}


def ditto(x: P, own: Any, first: P, rows: Any) -> tuple[P, Any]:
    w, v = x, first if own is None else own
    for _ in range(EPOCHS):
        w = plus(w, -LR, gradient(w, *rows))
        v = plus(v, -LR, plus(gradient(v, *rows), 0.7, plus(v, -1, x)))
    return w, v


def pfedme(x: P, own: Any, first: P, rows: Any) -> tuple[P, Any]:
    w, theta = x, x
    for _ in range(EPOCHS):
        for _ in range(3):
            theta = plus(theta, -0.05, plus(gradient(theta, *rows), 2.0, plus(theta, -1, w)))
        w = plus(w, -LR * 2.0, plus(w, -1, theta))
    return w, theta


def apfl(x: P, own: Any, first: P, rows: Any) -> tuple[P, Any]:
    w, (v, alpha) = x, (first, 0.4) if own is None else own
    for step in range(EPOCHS):
        h, g = gradient(mix(alpha, v, w), *rows), gradient(w, *rows)
        slope = sum(float(((v[n] - w[n]) * h[n]).sum()) for n in v)
        w, v = plus(w, -LR, g), plus(v, -LR * alpha, h)
        if not step:
            alpha = min(1.0, max(0.0, alpha - LR * slope))
    return w, (v, alpha)


def fo(x: P, own: Any, first: P, rows: Any) -> tuple[P, Any]:
    w = x
    for _ in range(EPOCHS):
        w = plus(w, -LR, gradient(plus(w, -0.1, gradient(w, *rows)), *rows))
    return w, None


def hf(x: P, own: Any, first: P, rows: Any) -> tuple[P, Any]:
    w = x
    for _ in range(EPOCHS):
        h = gradient(plus(w, -0.1, gradient(w, *rows)), *rows)
        ahead, behind = (gradient(plus(w, d, h), *rows) for d in (0.01, -0.01))
        w = plus(w, -LR, plus(h, -0.1 / 0.02, plus(ahead, -1, behind)))
    return w, None


BY_HAND: list[tuple[Any, Callable[..., tuple[P, Any]]]] = [
    (Ditto, ditto), (PFedMe, pfedme), (APFL, apfl), (PerFedAvg, fo), (PerFedAvg, hf)
]  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "ditto": {"lam": 0.7}, "pfedme": {"lam": 2.0, "inner_steps": 3, "inner_lr": 0.05},
    "apfl": {"alpha": 0.4, "adaptive": True}, "fo": {"inner_lr": 0.1},
    "hf": {"inner_lr": 0.1, "variant": "hf", "delta": 0.01},
}  # fmt: skip


@pytest.mark.parametrize(("method", "by_hand"), BY_HAND, ids=lambda f: f.__name__)
def test_runs_in_float64(method: Any, by_hand: Callable[..., tuple[P, Any]]) -> None:
    made = method(lr=LR, batch_size=10_000, local_epochs=EPOCHS, **OPTIONS[by_hand.__name__])
    data = consilience.make_federation("digits", clients=CLIENTS, partition="shards:3", seed=SEED)
    result = consilience.run(
        made, data, rounds=ROUNDS, participation=COHORT, seed=SEED, executor="serial", model="mlp:16"
    )
    first = {n: p.double() for n, p in result.worker.host(0, "x").initial().params.items()}
    rows = [(data.data(k).train.x.double(), data.data(k).train.y) for k in range(CLIENTS)]
    x, own = first, dict[int, Any]()
    for version in range(ROUNDS):
        cohort = [int(k) for k in draw_cohort(philox(SEED, "cohort", version, 0), data.seen, COHORT)]
        sent: dict[int, P] = {}
        for k in cohort:
            sent[k], own[k] = by_hand(x, own.get(k), first, rows[k])
        total = sum(len(rows[k][1]) for k in cohort)
        x = {n: torch.stack([len(rows[k][1]) / total * sent[k][n] for k in cohort]).sum(0) for n in x}
    tight: dict[str, Any] = {"rtol": 1e-3, "atol": 5e-5}
    torch.testing.assert_close({n: p.double() for n, p in result.server.model.params.items()}, x, **tight)
    for k, state in result.states.items():
        if own.get(k) is not None:
            wanted, alpha = own[k] if made.name == "apfl" else (own[k], None)
            found = getattr(state, "model", state)
            torch.testing.assert_close({n: p.double() for n, p in found.params.items()}, wanted, **tight)
            assert alpha is None or state.alpha == pytest.approx(alpha, abs=1e-4)

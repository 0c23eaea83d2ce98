"""Methods against client drift: reductions bit for bit, NumPy in float64, closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import LINEAR64, NOISY, SCALAR64, SIZES, Frozen, architecture, federation, loop, site, vector, worker
from torch.nn import functional as F

from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.events import draw_cohort
from consilience.core.messages import Broadcast
from consilience.core.method import Method
from consilience.core.model import Architecture
from consilience.core.predict import Net
from consilience.core.snapshot import Snapshot
from consilience.core.streams import philox
from consilience.methods import (
    FALD,
    FedAvg,
    FedAvgMomentum,
    FedAvgMomentumVR,
    FedDyn,
    FedLEx,
    FedMoSWA,
    FedNova,
    FedSAM,
    FedSWA,
    Scaffold,
    ScaffoldMomentum,
    ScaffoldMomentumVR,
)
from consilience.methods.fald import Down as Sampled
from consilience.methods.fedlex import guidance
from consilience.parts.local_steps import falling, relative

LR, BATCH, ROUNDS, COHORT = 0.1, 4, 4, 3
Options = dict[str, Any]
USUAL: Options = {"batch_size": BATCH, "lr": LR, "local_epochs": 2}
EQUAL: Options = {"batch_size": BATCH, "lr": LR, "local_steps": 5}


def trained(method: Method, rounds: int = 3, model: Architecture = NOISY, cohort: int = COHORT) -> Snapshot:
    fed = federation(dtype=model.dtype)
    return loop(worker(method, fed, model), rounds, cohort=cohort).snapshots[rounds]


def digest(method: Method, rounds: int = 3, **more: Any) -> str:
    return tr.digest(trained(method, rounds, **more).server.model)


# --- reductions, bit for bit -----------------------------------------------------------------------------------

AVERAGED: dict[str, tuple[type[Method], Options, Options]] = {
    "fednova": (FedNova, {}, {"weights": "samples"}),
    "fednova, uniform": (FedNova, {"weights": "uniform"}, {"weights": "uniform"}),
    "fedavg-m": (FedAvgMomentum, {"beta": 1.0}, {"weights": "uniform"}),
    "fedavg-m, by size": (FedAvgMomentum, {"beta": 1.0, "weights": "samples"}, {"weights": "samples"}),
    "fedavg-m-vr": (FedAvgMomentumVR, {"beta": 1.0}, {"weights": "uniform"}),
}


@pytest.mark.parametrize("case", AVERAGED)
def test_with_equal_steps_a_method_is_fedavg(case: str) -> None:
    cls, options, same = AVERAGED[case]
    plain = FedAvg(form="delta", **same, **EQUAL)
    assert digest(cls(**options, **EQUAL)) == digest(plain)
    unequal = digest(cls(**options, **USUAL)), digest(FedAvg(form="delta", **same, **USUAL))
    assert unequal[0] != unequal[1], "clients of different size do different numbers of steps"


@pytest.mark.parametrize("form", ["model", "delta"])
@pytest.mark.parametrize(
    ("method", "neutral", "other"),
    [
        (FedSAM, {"rho": 0.0}, {"rho": 0.1}),
        (FedSAM, {"rho": 0.0, "adaptive": True}, {"adaptive": True}),
        (FedLEx, {"explore_epochs": 0}, {"explore_epochs": 2}),
        (FALD, {"temperature": 0.0}, {"temperature": 0.1}),
    ],
)
def test_without_its_term_a_method_is_fedavg(method: Any, neutral: Options, other: Options, form: Any) -> None:
    plain = digest(FedAvg(form=form, **USUAL))
    assert digest(method(form=form, **neutral, **USUAL)) == plain
    assert digest(method(form=form, **other, **USUAL)) != plain


def test_swa_without_fall_and_extrapolation_is_fedavg() -> None:
    for weights in ("uniform", "samples"):
        same: Options = {"weights": weights, **USUAL}
        plain = digest(FedAvg(form="delta", **same))
        assert digest(FedSWA(rho=1.0, server_lr=1.0, **same)) == plain
        assert digest(FedSWA(rho=0.5, server_lr=1.0, **same)) != plain
        assert digest(FedSWA(rho=1.0, server_lr=1.1, **same)) != plain


@pytest.mark.parametrize("method", [ScaffoldMomentum, ScaffoldMomentumVR])
def test_scaffold_without_momentum(method: Any) -> None:
    with_controls, plain = trained(method(beta=1.0, **EQUAL), 4), trained(Scaffold(**EQUAL), 4)
    assert tr.digest(with_controls.server.model) == tr.digest(plain.server.model)
    assert tr.digest(with_controls.server.control) == tr.digest(plain.server.control)
    assert tr.digest(with_controls.states) == tr.digest(plain.states)
    assert digest(method(beta=0.9, **EQUAL)) != digest(Scaffold(**EQUAL))


def test_round_one_of_moswa_is_swa() -> None:
    swa, moswa = FedSWA(**USUAL), FedMoSWA(**USUAL)
    assert digest(moswa, 1) == digest(swa, 1)
    assert digest(moswa, 2) != digest(swa, 2)


def test_moswa_at_its_neutral_setting_is_scaffold_if_everybody_takes_part() -> None:
    everybody: Options = {"model": LINEAR64, "cohort": 5}
    moswa = trained(FedMoSWA(gamma=1.0, rho=1.0, server_lr=1.0, **USUAL), 5, **everybody)
    plain = trained(Scaffold(**USUAL), 5, **everybody)
    torch.testing.assert_close(vector(moswa.server), vector(plain.server), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(vector(moswa.states), vector(plain.states), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("own", "other"), [(ScaffoldMomentum, FedAvgMomentum), (ScaffoldMomentumVR, FedAvgMomentumVR)])
def test_controls_of_one_client_cancel(own: Any, other: Any) -> None:
    fed = federation((11,))
    found, plain = (loop(worker(cls(**USUAL), fed, LINEAR64), 4).snapshots[4].server for cls in (own, other))
    torch.testing.assert_close(vector(found.model), vector(plain.model), rtol=1e-10, atol=1e-12)


# --- NumPy, float64 --------------------------------------------------------------------------------------------


class Reference:
    """Softmax regression by hand; only the cohorts and the order of batches come from the library's streams."""

    def __init__(self) -> None:
        self.fed = federation(dtype=torch.float64)
        start = LINEAR64.initial(0).params
        self.x = np.hstack([start["head.weight"].numpy(), start["head.bias"].numpy()[:, None]])
        self.asked = dict.fromkeys(range(len(SIZES)), 0)

    def cohort(self, version: int, started: int = 0) -> list[int]:
        found = draw_cohort(philox(0, "cohort", version, started), self.fed.seen, COHORT)
        for k in found:
            self.asked[k] += 1
        return sorted(found)

    def batches(self, k: int, purpose: str = "batches", epochs: int = 2, phase: str = "train") -> Any:
        rng, n = philox(0, purpose, k, self.asked[k], phase), SIZES[k]
        for _ in range(epochs):
            order = rng.permutation(n)
            yield from (order[at : at + BATCH] for at in range(0, n, BATCH))

    def gradient(self, y: np.ndarray, k: int, take: Any) -> np.ndarray:
        data = self.fed.data(k).train
        rows = np.hstack([data.x.numpy(), np.ones((len(data), 1))])[take]
        labels = F.one_hot(data.y, 3).double().numpy()[take]
        p = np.exp(rows @ y.T)
        return (p / p.sum(1, keepdims=True) - labels).T @ rows / len(rows)

    def agrees(self, snapshot: Snapshot) -> None:
        found = snapshot.server.model.params
        flat = np.hstack([found["head.weight"].numpy(), found["head.bias"].numpy()[:, None]])
        np.testing.assert_allclose(flat, self.x, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("momentum", "mu", "beta"), [(0.0, 0.0, 0.0), (0.9, 0.0, 0.5), (0.0, 0.5, 0.0), (0.6, 0.5, 0.3)]
)
def test_fednova_by_hand(momentum: float, mu: float, beta: float) -> None:
    """The direction as a sum of gradients with coefficients that are worked out one by one."""
    at, v = Reference(), 0.0
    for version in range(ROUNDS):
        cohort, deltas, norms, taus = at.cohort(version), [], [], []
        for k in cohort:
            y, speed, shares = at.x.copy(), 0.0, np.zeros(0)
            inner = np.zeros(0)  # coefficients of the gradients so far in the velocity
            for take in at.batches(k):
                speed = momentum * speed + at.gradient(y, k, take) + mu * (y - at.x)
                inner = np.append(momentum * inner - LR * mu * shares, 1.0)
                shares = np.append(shares, 0.0) + inner
                y = y - LR * speed
            deltas.append((y - at.x) / LR)
            norms.append(shares.sum())
            taus.append(len(shares))
        p = np.array([SIZES[k] for k in cohort]) / sum(SIZES[k] for k in cohort)
        effective = p @ (taus if mu else norms)
        v = beta * v + LR * effective * sum(w * d / a for w, d, a in zip(p, deltas, norms, strict=True))
        at.x = at.x + v
    at.agrees(trained(FedNova(momentum=momentum, mu=mu, server_momentum=beta, **USUAL), ROUNDS, LINEAR64))


def test_feddyn_by_hand() -> None:
    """In the paper's form, with g_i and h."""
    at, alpha = Reference(), 0.3
    h, g = np.zeros_like(at.x), {k: np.zeros_like(at.x) for k in range(len(SIZES))}
    for version in range(ROUNDS):
        ends, cohort = [], at.cohort(version)
        for k in cohort:
            y = at.x.copy()
            for take in at.batches(k):
                y = y - LR * (at.gradient(y, k, take) - g[k] + alpha * (y - at.x))
            g[k] = g[k] - alpha * (y - at.x)
            ends.append(y)
        h = h - alpha / len(SIZES) * sum(y - at.x for y in ends)
        at.x = sum(ends) / len(ends) - h / alpha
    found = trained(FedDyn(alpha=alpha, **USUAL), ROUNDS, LINEAR64)
    at.agrees(found)
    np.testing.assert_allclose(h, sum(g.values()) / len(g), atol=1e-12)
    mean = sum(vector(state) for state in found.states.values()) / len(SIZES)
    torch.testing.assert_close(vector(found.server.moves), mean, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("adaptive", [False, True])
def test_fedsam_by_hand(adaptive: bool) -> None:
    at, rho = Reference(), 0.2
    for version in range(ROUNDS):
        cohort, ends = at.cohort(version), []
        for k in cohort:
            y = at.x.copy()
            for take in at.batches(k):
                g = at.gradient(y, k, take)
                e = rho * y**2 * g / np.linalg.norm(abs(y) * g) if adaptive else rho * g / np.linalg.norm(g)
                y = y - LR * at.gradient(y + e, k, take)
            ends.append(y)
        at.x = np.average(ends, axis=0, weights=[SIZES[k] for k in cohort])
    at.agrees(trained(FedSAM(rho=rho, adaptive=adaptive, **USUAL), ROUNDS, LINEAR64))


@pytest.mark.parametrize("controls", [False, True])
@pytest.mark.parametrize("reduces", [False, True])
def test_momentum_in_local_steps_by_hand(reduces: bool, controls: bool) -> None:
    at, beta = Reference(), 0.3
    g, c, before = np.zeros_like(at.x), np.zeros_like(at.x), at.x
    own = {k: np.zeros_like(at.x) for k in range(len(SIZES))}
    for version in range(ROUNDS):
        cohort, directions, changes, steps = at.cohort(version), [], [], []
        mix = 1.0 if reduces and version == 0 else beta
        for k in cohort:
            y, path = at.x.copy(), []
            for take in at.batches(k):
                raw = at.gradient(y, k, take)
                past = at.gradient(before, k, take)
                u = raw + (1 - mix) * (g - past) if reduces else mix * raw + (1 - mix) * g
                y = y - LR * (u + beta * (c - own[k]) * controls)
                path.append(raw)
            directions.append((at.x - y) / (LR * len(path)))
            changes.append(np.mean(path, axis=0) - own[k])
            own[k] = own[k] + changes[-1]
            steps.append(len(path))
        g = np.mean(directions, axis=0)
        c = c + sum(changes) / len(SIZES)
        before, at.x = at.x, at.x - 0.7 * LR * np.mean(steps) * g
    plain, controlled = (FedAvgMomentumVR, ScaffoldMomentumVR) if reduces else (FedAvgMomentum, ScaffoldMomentum)
    method: Any = controlled if controls else plain
    at.agrees(trained(method(beta=beta, server_lr=0.7, **USUAL), ROUNDS, LINEAR64))


@pytest.mark.parametrize("controls", [False, True])
def test_swa_by_hand(controls: bool) -> None:
    at, rho, alpha, gamma = Reference(), 0.2, 1.3, 0.6
    c, own = np.zeros_like(at.x), {k: np.zeros_like(at.x) for k in range(len(SIZES))}
    for version in range(ROUNDS):
        moves, messages = [], []
        for k in at.cohort(version):
            batches = list(at.batches(k))
            y, total = at.x.copy(), 0.0
            for number, take in enumerate(batches):
                eta = LR * (1 - number / len(batches) * (1 - rho))
                y = y - eta * (at.gradient(y, k, take) + (c - own[k]) * controls)
                total += eta
            new = own[k] - c + (at.x - y) / total
            moves.append(y - at.x)
            messages.append(new - c)
            own[k] = new
        at.x = at.x + alpha * np.mean(moves, axis=0)
        c = c + gamma * np.mean(messages, axis=0)
    options: Options = {"rho": rho, "server_lr": alpha, **USUAL}
    at.agrees(trained(FedMoSWA(gamma=gamma, **options) if controls else FedSWA(**options), ROUNDS, LINEAR64))


def test_fedlex_by_hand() -> None:
    at, epochs = Reference(), 2
    squares = []
    for k in range(len(SIZES)):
        at.asked[k] = 1
        y = at.x.copy()
        for epoch in range(epochs):
            for take in at.batches(k, f"explore-{epoch}", 1, "explore"):
                y = y - LR * at.gradient(y, k, take)
        squares.append((y - at.x) ** 2)
    spread = np.mean(squares, axis=0)
    scale = np.empty_like(spread)
    for part in (np.s_[:, :-1], np.s_[:, -1]):
        scale[part] = (spread[part] - spread[part].min()) / (spread[part].max() - spread[part].min())
    for version in range(ROUNDS):
        cohort, ends = at.cohort(version, started=0 if version else len(SIZES)), []
        for k in cohort:
            y = at.x.copy()
            for take in at.batches(k):
                y = y - LR * scale * at.gradient(y, k, take)
            ends.append(y)
        at.x = np.average(ends, axis=0, weights=[SIZES[k] for k in cohort])
    at.agrees(trained(FedLEx(explore_epochs=epochs, **USUAL), ROUNDS, LINEAR64))


# --- closed forms ----------------------------------------------------------------------------------------------


def test_relative_weights() -> None:
    shares = [0.1, 0.7, 0.2]
    assert relative(shares, [3.3, 3.3, 3.3]) == (shares, 3.3)
    weights, mean = relative([0.5, 0.5], [1.0, 3.0])
    assert mean == pytest.approx(2)
    assert weights == pytest.approx([1.0, 1 / 3])
    weights, mean = relative([0.5, 0.5], [1.0, 3.0], [10.0, 10.0])
    assert mean == pytest.approx(10)
    assert weights == pytest.approx([5.0, 5 / 3])


def test_lengths_of_paths() -> None:
    assert FedNova().length(7, 0.1) == 7.0
    rho, tau = 0.9, 12
    closed = (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho)
    assert FedNova(momentum=rho).length(tau, 0.1) == pytest.approx(closed)
    assert FedNova(mu=0.5).length(3, 0.1) == pytest.approx(0.95**2 + 0.95 + 1)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}])
def test_one_client_of_fednova_is_fedavg(options: Options) -> None:
    alone = federation((11,))
    found, plain = (
        loop(worker(method, alone, NOISY), 3).snapshots[3].server.model
        for method in (FedNova(**options, **USUAL), FedAvg(form="delta", **options, **USUAL))
    )
    assert tr.digest(found) == tr.digest(plain)


def test_fednova_does_not_favour_those_who_do_more() -> None:
    """One client does 1 step a round, the other 10: normalised, the fixed point is the pooled minimum almost."""
    fed = federation((4, 40), regression=True, dtype=torch.float64)
    base: Options = {"batch_size": 4, "lr": 4e-3, "weights": "uniform", "local_epochs": 1}
    rows = [fed.data(k).train for k in range(2)]
    designs = [np.hstack([r.x.numpy(), np.ones((len(r), 1))]) for r in rows]
    a = sum(d.T @ d / len(d) for d in designs)
    b = sum(d.T @ r.y.numpy() / len(d) for d, r in zip(designs, rows, strict=True))
    wanted = np.linalg.solve(a, b)
    distance = {}
    for method in (FedNova(**base), FedAvg(form="delta", **base)):
        end = vector(loop(worker(method, fed, SCALAR64), 600).snapshots[600].server.model).numpy()
        distance[method.name] = np.linalg.norm(np.linalg.cholesky(a).T @ (end - wanted))
    assert distance["fednova"] < distance["fedavg"] / 3, distance


def test_feddyn_finds_the_joint_minimum_with_few_clients_a_round() -> None:
    fed = federation((15, 15, 15), regression=True, dtype=torch.float64)
    rows = [fed.data(k).train for k in range(3)]
    x, y = torch.cat([r.x for r in rows]), torch.cat([r.y for r in rows])
    design = torch.cat([x, torch.ones(45, 1, dtype=torch.float64)], 1)
    wanted = torch.linalg.lstsq(design, y[:, None]).solution.flatten()
    work: Options = {"batch_size": 99, "local_steps": 30, "lr": 0.1}
    errors = {}
    for method in (FedDyn(alpha=0.5, **work), FedAvg(weights="uniform", **work)):
        found = loop(worker(method, fed, SCALAR64), 100, cohort=2).snapshots[100].server.model
        errors[method.name] = float((vector(found) - wanted).norm())
    assert errors["feddyn"] < 1e-3 < 1e-2 < errors["fedavg"]


def test_feddyn_leaves_alone_what_the_model_froze() -> None:
    model = architecture(Frozen)
    found = trained(FedDyn(**USUAL), 3, model)
    start = model.initial(0).params
    assert all(torch.equal(found.server.model.params[n], start[n]) for n in start if n.startswith("features"))
    controls = trained(FedMoSWA(**USUAL), 3, model).server.control
    assert not any(controls[n].any() for n in start if n.startswith("features"))


def test_steps_fall_as_told() -> None:
    rates = [falling(0.2, 0.1, 5)(k) for k in range(5)]
    assert rates[0] == 0.2
    assert sum(rates) == pytest.approx(0.2 * (5 - 0.9 * 2))
    assert sum(falling(1.0, 0.0, 8)(k) for k in range(8)) == pytest.approx(9 / 2)
    at = worker(FedSWA(rho=0.1, lr=0.2, batch_size=4))
    fit = at.method.train(site(at, 2), Broadcast(LINEAR64.initial(0)), None)
    assert fit.lr_sum == pytest.approx(0.2 * (5 - 0.9 * 2))


def test_sam_samples_are_counted_twice() -> None:
    sam, plain = trained(FedSAM(**USUAL)).totals, trained(FedAvg(**USUAL)).totals
    assert (sam.samples, sam.steps, sam.bytes_up) == (2 * plain.samples, plain.steps, plain.bytes_up)


def test_variance_reduced_momentum_shrinks_its_error() -> None:
    """g - grad F(x') shrinks by 1 - beta, elementwise, with whole-data gradients and one step."""
    fed, beta = federation((13,), dtype=torch.float64), 0.3
    method = FedAvgMomentumVR(beta=beta, lr=0.05, batch_size=99, local_steps=1)
    shots = loop(worker(method, fed, LINEAR64), 4).snapshots
    at = Reference()
    at.fed = fed

    def flat(params: Options) -> np.ndarray:
        return np.hstack([params["head.weight"].numpy(), params["head.bias"].numpy()[:, None]])

    at_start = LINEAR64.initial(0).params
    errors = []
    for version in (1, 2, 3, 4):
        where = at_start if version == 1 else shots[version - 1].server.model.params
        errors.append(flat(shots[version].server.momentum) - at.gradient(flat(where), 0, np.arange(13)))
    assert all(np.abs(e).max() < 1e-12 for e in errors), "the first momentum is exact, so all are"


def test_guidance_of_a_constant_is_one() -> None:
    found = guidance({"a": torch.tensor([1.0, 3.0, 2.0]), "b": torch.tensor([4.0, 4.0]), "c": torch.tensor(0.0)})
    assert found["a"].tolist() == [0.0, 1.0, 0.5]
    assert found["b"].tolist() == [1.0, 1.0]
    assert found["c"].item() == 1.0


# --- Langevin dynamics -----------------------------------------------------------------------------------------


def noises(rho: float, tau: float = 1.0, outputs: int = 3) -> list[torch.Tensor]:
    """What noise added to one whole-data step of each client, over sqrt(2 h tau)."""
    fed = federation(dtype=torch.float64)
    work: Options = {"lr": 0.1, "batch_size": 99, "local_steps": 1}
    model = architecture(outputs=outputs, dtype=torch.float64)
    start, n, found = model.initial(0), sum(SIZES), []
    quiet, loud = (worker(FALD(temperature=t, shared_noise=rho, **work), fed, model) for t in (0.0, tau))
    for k in range(len(SIZES)):
        message = Sampled(start, n)
        without = quiet.method.train(site(quiet, k), message, None).weights
        noisy = loud.method.train(site(loud, k), message, None).weights
        found.append((vector(noisy) - vector(without)) / np.sqrt(2 * 0.1 / n * tau))
    return found


def test_langevin_noise_is_shared_as_told() -> None:
    alike = noises(1.0)
    assert all(torch.allclose(alike[0], other, atol=1e-9) for other in alike)
    parts, n = noises(0.0), sum(SIZES)
    flat = torch.cat([e * np.sqrt(size / n) for e, size in zip(parts, SIZES, strict=True)])
    assert 0.7 < float(flat.square().mean()) < 1.4
    hotter = noises(0.6, 4.0)
    torch.testing.assert_close(hotter[0], noises(0.6)[0], rtol=1e-9, atol=1e-9)
    wanted = 0.6 * alike[1] + 0.8 * parts[1]
    torch.testing.assert_close(noises(0.6)[1], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rho", [0.0, 0.6, 1.0])
def test_averaged_noise_has_the_same_variance_for_every_split(rho: float) -> None:
    """sum_i p_i^2 (1 - rho^2) / p_i + rho^2 = 1."""
    parts = noises(rho, outputs=2000)
    mean = sum(e * size / sum(SIZES) for e, size in zip(parts, SIZES, strict=True))
    assert isinstance(mean, torch.Tensor)
    assert float(mean.square().mean()) == pytest.approx(1, rel=0.07)
    assert abs(float(mean.mean())) < 0.05


def test_samples_are_kept_and_averaged() -> None:
    at = worker(FALD(burn_in=2, thin=2, keep=2, **USUAL))
    shots = loop(at, 9).snapshots
    kept = [tr.digest(s) for s in shots[9].server.samples]
    assert kept == [tr.digest(shots[v].server.model) for v in (7, 9)]
    assert [len(shots[v].server.samples) for v in range(1, 6)] == [0, 0, 1, 1, 2]
    host, data = at.host(9, "train"), federation().test
    assert data is not None
    scores = host.scores(at.method.global_model(shots[9].server), data.x)
    members = [host.scores(Net(s), data.x).softmax(-1) for s in shots[9].server.samples]
    torch.testing.assert_close(scores.exp(), (members[0] + members[1]) / 2)


# --- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (FedNova, {"optimizer": "adam"}),
        (FedAvgMomentum, {"momentum": 0.5}),
        (ScaffoldMomentum, {"optimizer": "adam"}),
        (FedMoSWA, {"momentum": 0.5}),
        (FALD, {"momentum": 0.5}),
        (FedDyn, {"alpha": 0.0}),
        (FedAvgMomentum, {"beta": 0.0}),
    ],
)
def test_what_makes_no_sense_is_refused(method: Any, options: Options) -> None:
    with pytest.raises(ConfigError, match=method.name):
        method(**options)

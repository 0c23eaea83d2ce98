"""FedLD, FedImpro, GGEUR and FedCOG: reductions, and their equations against naive ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import CLASSES, LINEAR, LINEAR64, Parts, federation, loop, site, worker
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import consilience
from consilience.core import tree as tr
from consilience.core.errors import NeedsError
from consilience.core.federation import ClientData, Split
from consilience.core.messages import Broadcast
from consilience.core.model import Architecture, Weights
from consilience.methods import GGEUR, FedAvg, FedCOG, FedImpro, FedLD
from consilience.methods.fedcog import apportioned, divergence
from consilience.methods.fedimpro import Running, Server, Up, at_cut, parts
from consilience.methods.fedimpro import pooled as mixture
from consilience.methods.fedld import margin, principal
from consilience.methods.ggeur import Rows, augmented, axes_of, features
from consilience.models.small import MLP, Linear
from consilience.parts.calibration import gaussians


def run(method: Any, **options: Any) -> consilience.Result:
    federation = consilience.make_federation("digits", clients=5, partition="shards:3", seed=2)
    usual = {"rounds": 3, "participation": 3, "executor": "serial", "model": "mlp:16"}
    return consilience.run(method, federation, **{**usual, **options})


def server(method: Any, **options: Any) -> str:
    return tr.digest(run(method, **options).server.model)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


# --- FedLD -----------------------------------------------------------------------------------------------------


def test_fedld_at_its_neutral_setting_is_fedavg() -> None:
    for weights in ("uniform", "samples"):
        neutral = FedLD(lam=0.0, directions="mean", weights=weights)
        assert server(neutral) == server(FedAvg(form="delta", weights=weights))
    assert server(FedLD(lam=0.0), rounds=1) == server(FedAvg(form="delta", weights="uniform"), rounds=1)
    assert server(FedLD(lam=0.0), participation=1) == server(FedAvg(form="delta"), participation=1)


@pytest.mark.parametrize("options", [{}, {"lam": 0.0}, {"directions": "mean"}, {"norm": "row"}], ids=str)
def test_fedld_otherwise_is_not(options: dict[str, Any]) -> None:
    assert server(FedLD(**options)) != server(FedAvg(form="delta", weights="uniform"))


def test_margin_against_a_naive_one() -> None:
    scores = random(0, 5, 3)
    p = np.exp(scores.numpy()) / np.exp(scores.numpy()).sum(1, keepdims=True)
    assert margin(scores).item() == pytest.approx(np.log(1 + np.linalg.norm(p) ** 2))
    assert margin(scores, by_row=True).item() == pytest.approx(np.log(1 + (p**2).sum(1).mean()))


def naive_principal(g: np.ndarray, kappa: float, *, align: bool) -> np.ndarray:
    """Projections written out, with numpy's own SVD."""
    m = len(g)
    u, s, _ = np.linalg.svd(g @ g.T / m)
    total = np.zeros(g.shape[1])
    for i in range(m):
        for j in range(int(m * kappa + 1e-9)):  # a share that misses a whole number by rounding counts as it
            w = g.T @ u[:, j]
            if np.sum(g @ w >= 0) < np.sum(g @ w < 0):
                w = -w
            along = w if align else g[i] @ w / (w @ w) * w
            total += along / np.linalg.norm(along) * s[j] / s.sum() * np.linalg.norm(g[i]) / m
    return total


@given(st.sampled_from([3, 5]), st.integers(6, 20), st.floats(0.4, 1.0), st.integers(0, 99))
@settings(deadline=None)
def test_principal_directions_against_naive_ones(m: int, d: int, kappa: float, seed: int) -> None:
    g = random(seed, m, d)
    for how in ("project", "align"):
        naive = naive_principal(g.numpy(), max(kappa, 1 / m + 1e-6), align=how == "align")
        np.testing.assert_allclose(principal(g, [1 / m] * m, max(kappa, 1 / m + 1e-6), how).numpy(), naive, atol=1e-8)


@given(st.integers(2, 6), st.integers(1, 12), st.integers(0, 99))
@settings(deadline=None)
def test_the_span_of_all_directions_is_the_mean(m: int, d: int, seed: int) -> None:
    g, p = random(seed, m, d), torch.softmax(random(seed + 1, m), 0)
    torch.testing.assert_close(principal(g, p.tolist(), 1.0, "span"), p @ g, rtol=1e-6, atol=1e-6)


def test_principal_directions_of_special_updates() -> None:
    assert not principal(torch.zeros(3, 4).double(), [1 / 3] * 3, 0.8, "project").any()
    same = random(0, 1, 6).expand(4, 6)
    for how in ("project", "align", "span"):
        torch.testing.assert_close(principal(same, [0.25] * 4, 0.8, how), same[0])
    g = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]).double()  # one disagrees
    torch.testing.assert_close(principal(g, [1 / 3] * 3, 0.4, "project"), torch.tensor([1 / 3, 0.0]).double())
    torch.testing.assert_close(principal(g, [1 / 3] * 3, 0.4, "align"), torch.tensor([1.0, 0.0]).double())


# --- FedImpro --------------------------------------------------------------------------------------------------


def test_fedimpro_without_drawn_features_is_fedavg() -> None:
    for cut in (0, 2):
        assert server(FedImpro(weight=0.0, cut=cut)) == server(FedAvg())
        assert server(FedImpro(cut=cut), rounds=1) == server(FedAvg(), rounds=1)
        assert server(FedImpro(cut=cut)) != server(FedAvg())


def test_what_is_below_and_above_the_cut() -> None:
    model = Architecture("m", MLP, (5,), 3)
    module, x = model.build().eval(), torch.randn(4, 5)
    for cut, width in ((0, 200), (1, 200), (2, 5)):
        assert at_cut(model, cut) == (width,)
        low, high = parts(module, cut)
        assert torch.equal(high(low(x)), module(x))
    with pytest.raises(NeedsError, match="cut=3"):
        parts(module, 3)


def test_fedimpro_against_a_naive_client() -> None:
    """One client in its second round, on a linear model whose features are its inputs, in float64."""
    fed = federation([7], dtype=torch.float64)
    method = FedImpro(batch_size=4, lr=0.1, ramp=4, weight=2.0, local_epochs=2, s_max=0.9)
    here = site(worker(method, fed, LINEAR64), 0, number=2, version=1)
    start = here.initial()
    means, deviations = random(0, CLASSES, 5), random(1, CLASSES, 5).abs() / 20
    update, _ = method.client_update(method.program()[0], here, Server(start, means, deviations), None)
    w, b = (start.params[f"head.{name}"].clone().requires_grad_() for name in ("weight", "bias"))
    order, noise = here.rng("batches"), here.rng("features")
    mu, sigma = means.clone(), deviations.clone()
    n = np.bincount(here.train.y.numpy(), minlength=CLASSES)
    for _ in range(2):
        rows = order.permutation(7)
        for index in (rows[:4], rows[4:]):
            x, y = here.train.x[index], here.train.y[index]
            fakes = torch.tensor([0, 1, 2, 0, 1, 2] if len(index) == 4 else [0, 1, 2])
            eps = torch.from_numpy(noise.standard_normal((len(fakes), 5)))
            drawn = torch.stack([mu[c] + sigma[c] * e for c, e in zip(fakes, eps, strict=True)])
            value = F.cross_entropy(x @ w.T + b, y) + 2.0 * (1 / 4) * F.cross_entropy(drawn @ w.T + b, fakes)
            gw, gb = torch.autograd.grad(value, (w, b))
            with torch.no_grad():
                w -= 0.1 * gw
                b -= 0.1 * gb
            for c in range(CLASSES):
                own = x[y == c].numpy()
                if len(own):
                    a = len(own) / n[c]
                    mu[c] = (1 - a) * mu[c] + a * torch.from_numpy(own.mean(0))
                if len(own) > 1:
                    mixed = (1 - a) * sigma[c].numpy() + a * own.std(0, ddof=1)
                    sigma[c] = torch.from_numpy(np.minimum(mixed, method.s_max))
    torch.testing.assert_close(update.model.params["head.weight"], w.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(update.model.params["head.bias"], b.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(update.means, mu, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(update.deviations, sigma, rtol=1e-10, atol=1e-12)
    assert update.counts.tolist() == n.tolist()
    assert torch.equal(means, random(0, CLASSES, 5))  # what was received is left alone


def test_statistics_of_one_whole_batch_are_the_data_s() -> None:
    h, y = random(0, 6, 4), torch.tensor([0, 0, 0, 2, 2, 2])
    found = Running(torch.ones(3, 4).double(), torch.ones(3, 4).double(), torch.tensor([3, 0, 3]), 1e9)
    found.follow(h, y)
    torch.testing.assert_close(found.means[2], h[3:].mean(0))
    torch.testing.assert_close(found.deviations[0], h[:3].std(0))
    assert found.means[1].tolist() == [1.0] * 4
    Running(found.means, found.deviations, torch.tensor([3, 0, 3]), 0.1).follow(h, y)
    assert found.deviations[0].max() <= 0.1


def test_pooled_statistics_are_those_of_all_rows() -> None:
    groups = [random(s, n, 4) for s, n in ((0, 3), (1, 8), (2, 5))]
    none = Server(Weights({}, {}), torch.full((2, 4), 7.0).double(), torch.full((2, 4), 8.0).double())
    updates = [
        Up(
            none.model, torch.stack([g.mean(0), g[0]]), torch.stack([g.std(0, unbiased=False), g[0].abs()]),
            torch.tensor([len(g), 0]),
        )
        for g in groups
    ]  # fmt: skip
    means, deviations = mixture(none, updates)
    torch.testing.assert_close(means[0], torch.cat(groups).mean(0))
    torch.testing.assert_close(deviations[0], torch.cat(groups).std(0, unbiased=False))
    assert means[1].tolist() == [7.0] * 4
    assert deviations[1].tolist() == [8.0] * 4


def test_noise_and_ways_to_combine_change_what_is_drawn() -> None:
    plain = server(FedImpro())
    assert server(FedImpro(noise=0.1)) != plain
    assert server(FedImpro(statistics="pooled")) != plain
    assert server(FedImpro(noise=0.1), rounds=1) == server(FedAvg(), rounds=1)


# --- GGEUR -----------------------------------------------------------------------------------------------------

ENCODER = Architecture("mlp", MLP, (5,), CLASSES)


def test_ggeur_without_draws_is_fedavg_on_features() -> None:
    fed = federation()
    at = worker(GGEUR(target=0, batch_size=4), fed, ENCODER)
    ours = loop(at, 3).snapshots[3].server
    sites = [site(at, c) for c in range(5)]
    start = sites[0].initial()
    rows = [features(here) for here in sites]
    flat = Parts(
        name="features", task=fed.task, n_clients=5, input_shape=(200,), test=None,
        parts=[ClientData(Split(r.z, r.y), Split(r.z[:0], r.y[:0]), Split(r.z, r.y)) for r in rows],
    )  # fmt: skip
    head = {name: p for name, p in start.params.items() if name.startswith("head.")}
    plain = consilience.run(
        FedAvg(batch_size=4), flat, model=Architecture("linear", Linear, (200,), CLASSES), rounds=3,
        executor="serial", init=Weights(head, {}),
    ).server  # fmt: skip
    for name, p in plain.model.params.items():
        assert torch.equal(p, ours.model.params[name])
        assert not torch.equal(p, start.params[name])
    for name, p in start.params.items():
        assert name.startswith("head.") or torch.equal(p, ours.model.params[name])


@given(st.integers(2, 20), st.integers(0, 50))
@settings(deadline=None)
def test_axes_do_not_depend_on_who_has_which_row(rows: int, seed: int) -> None:
    z, y = random(seed, rows, 4), torch.zeros(rows, dtype=torch.int64)
    cut = rows // 2
    whole = axes_of([gaussians(z, y)], 2, 4, 0, torch.float64)
    apart = axes_of([gaussians(z[:cut], y[:cut]), gaussians(z[cut:], y[cut:])], 2, 4, 0, torch.float64)
    naive = np.cov(z.numpy().T, bias=True)
    for axes in (whole, apart):
        np.testing.assert_allclose((axes[0].T @ axes[0]).numpy(), naive, atol=1e-9)
    assert not whole[1].any()
    lengths = whole[0].norm(dim=1)
    assert (lengths[:-1] >= lengths[1:] - 1e-12).all()
    assert torch.equal(axes_of([gaussians(z, y)], 2, 4, 2, torch.float64), whole[:, :2])


def test_draws_fill_up_the_classes_that_are_there() -> None:
    own = Rows(random(0, 7, 3), torch.tensor([0, 0, 0, 2, 2, 2, 2]))
    still = augmented(own, torch.zeros(4, 3, 3).double(), 6, np.random.default_rng(0))
    assert torch.bincount(still.y, minlength=4).tolist() == [6, 0, 6, 0]
    assert torch.equal(still.z[:7], own.z)
    for row, c in zip(still.z, still.y, strict=True):  # without spread they are duplicates
        assert any(torch.equal(row, other) for other in own.z[own.y == c])
    assert len({tuple(r.tolist()) for r in still.z[7:10]}) == 3  # each row once before any twice
    assert len(augmented(own, torch.zeros(4, 3, 3).double(), 2, np.random.default_rng(0)).y) == 7


def test_draws_have_the_shape_of_the_class() -> None:
    shape = random(0, 2, 2)
    axes = shape[None]
    one = Rows(torch.tensor([[5.0, -5.0]]).double(), torch.tensor([0]))
    found = augmented(one, axes, 20001, np.random.default_rng(0)).z[1:] - one.z
    torch.testing.assert_close(torch.cov(found.T), shape.T @ shape, rtol=0.05, atol=0.05)
    assert found.mean(0).abs().max() < 0.05


def test_ggeur_draws_once_and_learns() -> None:
    short, long = (run(GGEUR(target=40), rounds=r, participation=1.0, eval_every=1) for r in (1, 4))
    assert {c: tr.digest(s) for c, s in short.states.items()} == {c: tr.digest(s) for c, s in long.states.items()}
    for state in long.states.values():
        counts = torch.bincount(state.y)
        assert counts[counts > 0].min() >= 40
    assert long.history[-1]["global"]["loss"] < short.history[0]["global"]["loss"]
    assert server(GGEUR(target=40)) != server(GGEUR(target=0))


# --- FedCOG ----------------------------------------------------------------------------------------------------

COG = {"images": 12, "generate_steps": 5}


def test_fedcog_before_it_starts_is_fedavg() -> None:
    assert server(FedCOG(start=3, **COG)) == server(FedAvg())
    assert server(FedCOG(start=2, **COG)) != server(FedAvg())


def test_a_balanced_client_generates_nothing() -> None:
    x, y = random(0, 12, 5).float(), torch.arange(12) % 3
    data = [ClientData(Split(x, y), Split(x[:0], y[:0]), Split(x, y))]
    fed = Parts(name="even", task=federation().task, n_clients=1, input_shape=(5,), test=None, parts=data)
    methods = (FedCOG(start=0, batch_size=4, **COG), FedAvg(batch_size=4))
    ours, plain = (loop(worker(m, fed, LINEAR), 3).snapshots[3].server for m in methods)
    assert tr.digest(ours.model) == tr.digest(plain.model)


@given(st.lists(st.integers(0, 20), min_size=2, max_size=6).filter(any), st.integers(1, 40))
@settings(deadline=None)
def test_labels_are_shared_out_to_the_last(shares: list[int], total: int) -> None:
    counts = torch.bincount(apportioned(np.array(shares), total), minlength=len(shares)).numpy()
    exact = np.array(shares) * total / sum(shares)
    assert counts.sum() == total
    assert (np.abs(counts - exact) < 1).all()


@given(st.integers(1, 5), st.integers(2, 5), st.integers(0, 50))
@settings(deadline=None)
def test_divergence_against_a_naive_one(rows: int, classes: int, seed: int) -> None:
    a, b = 3 * random(seed, rows, classes), 3 * random(seed + 1, rows, classes)
    p, q = (np.clip(np.exp(t) / np.exp(t).sum(1, keepdims=True), 0.01, 0.99) for t in (a.numpy(), b.numpy()))
    m = (p + q) / 2
    naive = np.mean((p * np.log(p / m)).sum(1) + (q * np.log(q / m)).sum(1)) / 2
    assert divergence(a, b).item() == pytest.approx(np.clip(naive, 0, 1), abs=1e-12)
    assert divergence(a, a).item() == 0


def test_generated_inputs_are_what_the_global_model_is_sure_of() -> None:
    method = FedCOG(start=0, images=10, generate_steps=60, generate_lr=0.1, disagree=0.0)
    here = site(worker(method, federation([20], dtype=torch.float64), LINEAR64))
    model, labels = here.initial(), torch.arange(10) % 3
    made = method.generated(here, model, None, labels)
    noise = torch.from_numpy(here.rng("inputs").standard_normal((10, 5)))
    w, b = model.params["head.weight"], model.params["head.bias"]
    before, after = (F.cross_entropy(x @ w.T + b, labels).item() for x in (noise, made.x))
    assert after < before / 2
    torch.testing.assert_close(made.scores, made.x @ w.T + b)
    u = noise.clone().requires_grad_()  # Adam written out by its own class
    adam = torch.optim.Adam([u], lr=0.1)
    losses = []
    for _ in range(60):
        value = F.cross_entropy(u @ w.T + b, labels)
        losses.append((value.item(), u.detach().clone()))
        adam.zero_grad()
        value.backward()
        adam.step()
    torch.testing.assert_close(made.x, min(losses, key=lambda pair: pair[0])[1], rtol=1e-9, atol=1e-9)


def test_disagreement_is_sought() -> None:
    found = []
    for disagree in (0.0, 5.0):
        method = FedCOG(start=0, images=10, generate_steps=60, generate_lr=0.1, disagree=disagree)
        here = site(worker(method, federation([20], dtype=torch.float64), LINEAR64))
        model, own = here.initial(), here.initial(component=1)
        made = method.generated(here, model, own, torch.arange(10) % 3)
        scores = made.x @ own.params["head.weight"].T + own.params["head.bias"]
        found.append(divergence(scores, made.scores).item())
    assert found[1] > found[0]


def test_fedcog_against_a_naive_client() -> None:
    """Given the generated inputs, the local steps written out in float64."""
    method = FedCOG(start=0, batch_size=8, lr=0.1, temperature=2.0, **COG)
    here = site(worker(method, federation([20], dtype=torch.float64), LINEAR64), version=1)
    start = here.initial()
    counts = np.bincount(here.train.y.numpy(), minlength=CLASSES)
    lacking = counts.max() - counts
    made = method.generated(here, start, None, apportioned(lacking, 12))
    update, state = method.client_update(method.program()[0], here, Broadcast(start), None)
    w, b = (start.params[f"head.{name}"].clone().requires_grad_() for name in ("weight", "bias"))
    real = 20 / (20 + lacking.sum())
    order, other = here.rng("batches").permutation(20), here.rng("generated-batches")
    fakes: list[Any] = []
    for index in (order[:8], order[8:16], order[16:]):
        if not fakes:
            turn = other.permutation(12)
            fakes = [turn[:8], turn[8:]]
        u = fakes.pop(0)
        p = (made.scores[u] / 2).softmax(1)
        logq = ((made.x[u] @ w.T + b) / 2).log_softmax(1)
        taught = 4 * (p * (p.log() - logq)).sum(1).mean()
        value = real * F.cross_entropy(here.train.x[index] @ w.T + b, here.train.y[index]) + (1 - real) * taught
        gw, gb = torch.autograd.grad(value, (w, b))
        with torch.no_grad():
            w -= 0.1 * gw
            b -= 0.1 * gb
    torch.testing.assert_close(update.model.params["head.weight"], w.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(update.model.params["head.bias"], b.detach(), rtol=1e-10, atol=1e-12)
    assert tr.digest(state) == tr.digest(update.model)

"""Spectral co-distillation: spectra, reductions, a run by hand, and the training that nobody waits for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import consilience
from consilience.core import tree as tr
from consilience.core.events import Instant, draw_cohort
from consilience.core.messages import Job, Trip
from consilience.core.streams import philox
from consilience.methods import FedAvg, Local, Spectral
from consilience.methods.spectral import divergence, magnitudes, pull, spectrum
from tests.helpers import NOISY, loop, worker
from tests.methods.test_personal import gradient, plus

USUAL: dict[str, Any] = {"batch_size": 4, "lr": 0.1, "local_epochs": 2}


def after(method: Any, rounds: int = 3, model: Any = NOISY, cohort: int = 3) -> Any:
    return loop(worker(method, model=model), rounds, cohort=cohort).snapshots[rounds]


def random_params(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv": (3, 2, 3, 3), "matrix": (4, 5), "vector": (6,), "number": ()}
    return {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}


# --- spectra ---------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_parseval(seed: int) -> None:
    params = random_params(seed)
    for p, s in zip(params.values(), magnitudes(params), strict=True):
        torch.testing.assert_close(s.square().sum(), p.numel() * p.square().sum())


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.1, 0.4, 1.0]))
def test_the_divergence_is_least_at_the_same_spectrum(seed: int, share: float) -> None:
    one, other = spectrum(random_params(seed), share), spectrum(random_params(seed + 1), share)
    assert float(one.sum()) == pytest.approx(1)
    assert float(divergence(one, one)) == 0
    assert float(divergence(one, other)) > 0
    assert max(float(g.abs().max()) for g in pull(random_params(seed), one, share).values()) < 1e-12


def test_the_pull_is_the_gradient() -> None:
    params, target = random_params(0), spectrum(random_params(1), 0.6)
    found = pull(params, target, 0.6)
    for name, at in (("conv", (1, 0, 2, 1)), ("matrix", (2, 3))):
        sides = []
        for d in (1e-6, -1e-6):
            moved = {**params, name: params[name].clone()}
            moved[name][at] += d
            sides.append(float(divergence(target, spectrum(moved, 0.6))))
        assert float(found[name][at]) == pytest.approx((sides[0] - sides[1]) / 2e-6, abs=1e-7)
    assert not found["vector"].any() or found["vector"].abs().max() > 0


# --- reductions, bit for bit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["model", "delta"])
def test_without_its_pull_the_generic_model_is_that_of_fedavg(form: Any) -> None:
    plain = after(FedAvg(form=form, **USUAL))
    assert tr.digest(after(Spectral(lam_g=0, form=form, **USUAL)).server) == tr.digest(plain.server)
    assert tr.digest(after(Spectral(lam_g=5, form=form, **USUAL)).server) != tr.digest(plain.server)


def test_without_its_pull_the_personal_model_is_that_of_local_training() -> None:
    alone = {k: tr.digest(s) for k, s in after(Local(**USUAL)).states.items()}
    assert {k: tr.digest(s) for k, s in after(Spectral(lam_p=0, **USUAL)).states.items()} == alone
    assert {k: tr.digest(s) for k, s in after(Spectral(lam_p=5, **USUAL)).states.items()} != alone


def test_pulls_on_some_steps_alone() -> None:
    found = {every: tr.digest(after(Spectral(every=every, **USUAL)).server) for every in (1, 2, 1000)}
    assert len(set(found.values())) == 3


# --- a run by hand ---------------------------------------------------------------------------------------------


def by_numpy(params: dict[str, torch.Tensor], share: float) -> Any:
    parts = [np.abs(np.fft.fftn(p.numpy().reshape(len(p), -1) if p.dim() > 1 else p.numpy())) for p in params.values()]
    every = np.concatenate([part.ravel() for part in parts])
    kept = every[: int(share * len(every))]
    return torch.from_numpy(kept / kept.sum())


def test_a_run_in_float64() -> None:
    seed, lr, lams, rho = 5, 0.3, (0.5, 0.7), 0.4
    data = consilience.make_federation("digits", clients=5, partition="shards:3", seed=seed)
    method = Spectral(lr=lr, batch_size=10_000, local_epochs=2, lam_g=lams[0], lam_p=lams[1], rho=rho)
    result = consilience.run(method, data, rounds=3, participation=3, seed=seed, executor="serial", model="mlp:8")
    x = first = {n: p.double() for n, p in result.worker.host(0, "x").initial().params.items()}
    rows = [(data.data(k).train.x.double(), data.data(k).train.y) for k in range(5)]
    own: dict[int, Any] = {}
    for version in range(3):
        sent = {}
        for k in [int(k) for k in draw_cohort(philox(seed, "cohort", version, 0), data.seen, 3)]:
            y, v = x, own.get(k, first)
            for _ in range(2):
                g = gradient(y, *rows[k])
                y = plus(y, -lr, plus(g, lams[0], pull(y, by_numpy(v, rho), rho)) if k in own else g)
            for _ in range(2):
                v = plus(v, -lr, plus(gradient(v, *rows[k]), lams[1], pull(v, by_numpy(y, 1.0), 1.0)))
            sent[k], own[k] = y, v
        total = sum(len(rows[k][1]) for k in sent)
        x = {n: torch.stack([len(rows[k][1]) / total * y[n] for k, y in sent.items()]).sum(0) for n in x}
    tight: dict[str, Any] = {"rtol": 1e-3, "atol": 5e-5}
    torch.testing.assert_close({n: p.double() for n, p in result.server.model.params.items()}, x, **tight)
    for k, state in result.states.items():
        torch.testing.assert_close({n: p.double() for n, p in state.params.items()}, own[k], **tight)


# --- the clock -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed(Instant):
    """Transfers of one second each; a sample takes ``pace``."""

    pace: float

    def trip(
        self, job: Job, start: float, *, down: int, up: int, samples: int, steps: int, flops: float | None = None
    ) -> Trip:
        return Trip(download=float(down > 0), compute=self.pace * samples, upload=float(up > 0))


@pytest.mark.parametrize("pace", [0.001, 0.01, 0.1])
def test_nobody_waits_for_a_personal_training_that_fits_into_the_transfers(pace: float) -> None:
    def run(method: Any) -> consilience.Result:
        data = consilience.make_federation("digits", clients=4, seed=1)
        return consilience.run(method, data, rounds=2, model="mlp:8", executor="serial", clock=Timed(pace))

    plain, found = run(FedAvg()), run(Spectral())
    for one, other in zip(plain.timeline, found.timeline, strict=True):
        alone = one["compute"]
        assert other["compute"] == pytest.approx(alone + max(0.0, alone - 2), abs=pace)
    assert found.history[-1]["samples"] == 2 * plain.history[-1]["samples"]

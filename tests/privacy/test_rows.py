"""Example-level privacy: gradients by row against a loop, noise, sampling, what is accounted and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import LINEAR, LINEAR64, NOISY, federation, loop, site, worker

import consilience
import consilience.privacy.options
import consilience.simulate
from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.gradient import Batch, Modules
from consilience.core.messages import Job
from consilience.methods import FAL, Ditto, FedAvg, FedProx, FedSAM, Scaffold
from consilience.parts.compose import composed
from consilience.privacy.mechanism import Poisson
from consilience.privacy.rows import RowGuard, RowNoise, clipped_sums, mechanism, parse, spent


def lent(at: Any) -> Modules:
    """A site's model, ready for gradients."""
    instance = at.borrow()
    instance.fill(at.initial(), train=True)
    models = Modules({"": instance}, True)
    models.choose(None)
    return models


@pytest.mark.parametrize("norm", [1e-3, 0.5, 1e6])
def test_gradients_are_clipped_row_by_row(norm: float) -> None:
    """Against autograd on one row at a time, in float64."""
    at = site(worker(composed(FedAvg(row_noise=f"0:{norm}", batch_size=10)), federation(), LINEAR64), 2)
    models, rows = lent(at), at.cast(at.train)
    batch = Batch(rows.x, rows.y, torch.arange(len(rows)))
    found = RowGuard(at, len(rows), RowNoise(0.0, norm)).release(models, batch)
    expected = [torch.zeros_like(p) for p in models.leaves]
    for x, y in zip(rows.x, rows.y, strict=True):
        loss = torch.nn.functional.cross_entropy(models.modules(x[None]), y[None])
        parts = torch.autograd.grad(loss, models.leaves)
        length = float(sum(p.square().sum() for p in parts)) ** 0.5
        for total, part in zip(expected, parts, strict=True):
            total += part * min(1.0, norm / length) / 10
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_convolutions_laid_out_with_channels_last_have_gradients_by_row() -> None:
    """Opacus 1.6 gives others for these (torch 2.13): by 0.05 for ``cnn``, by 1 for ``resnet8``."""
    fed = consilience.make_federation("digits", clients=4, seed=0)
    at = site(consilience.simulate.prepare(composed(FedAvg(row_noise="0:1e9", batch_size=5)), fed, model="resnet8"))
    models, rows = lent(at), at.train.rows(slice(0, 5))
    found = RowGuard(at, 5, RowNoise(0.0, 1e9)).release(models, Batch(rows.x, rows.y, torch.arange(5)))
    whole = torch.autograd.grad(torch.nn.functional.cross_entropy(models.modules(rows.x), rows.y), models.leaves)
    for a, b in zip(found, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_one_row_moves_the_sum_by_no_more_than_the_norm() -> None:
    rng = np.random.default_rng(0)
    each = {n: torch.from_numpy(rng.standard_normal((6, *shape)) * 50) for n, shape in (("a", (3,)), ("b", (2, 2)))}
    whole = clipped_sums(each, 0.7)
    for lost in range(6):
        rest = clipped_sums({n: torch.cat([g[:lost], g[lost + 1 :]]) for n, g in each.items()}, 0.7)
        moved = sum(float((whole[n] - rest[n]).square().sum()) for n in each) ** 0.5
        assert moved == pytest.approx(0.7)
    bad = {n: g.clone() for n, g in each.items()}
    bad["a"][2, 1], bad["b"][3, 0, 0] = float("nan"), float("inf")
    kept = clipped_sums({n: g[[0, 1, 4, 5]] for n, g in each.items()}, 0.7)
    for n, total in clipped_sums(bad, 0.7).items():
        torch.testing.assert_close(total, kept[n])


def test_noise_has_the_variance_that_is_accounted() -> None:
    at = site(worker(composed(FedAvg(row_noise="3:0.5", batch_size=8)), federation([40])))
    models, rows, guard = lent(at), at.cast(at.train), RowGuard(at, 40, RowNoise(3.0, 0.5))
    batch = Batch(rows.x, rows.y, torch.arange(len(rows)))
    plain = RowGuard(at, 40, RowNoise(0.0, 0.5)).release(models, batch)
    draws = []
    for _ in range(300):
        draws += [(a - b).flatten() for a, b in zip(guard.release(models, batch), plain, strict=True)]
    noise = torch.cat(draws)
    assert float(noise.std()) == pytest.approx(3 * 0.5 / 8, rel=0.05)  # of 5,400 numbers
    assert len(noise.unique()) > 0.99 * len(noise)
    none = Batch(rows.x[:0], rows.y[:0], torch.arange(0))
    assert all(g.any() for g in guard.release(models, none))  # nobody drawn: noise all the same


def test_rows_are_drawn_by_what_is_accounted() -> None:
    at = site(worker(composed(FedAvg(row_noise="1", batch_size=8)), federation([40])))
    guard = RowGuard(at, 40, RowNoise(1.0, 1.0))
    assert isinstance(guard.mechanism, Poisson)
    assert guard.mechanism.q == 0.2
    drawn = [batch for _, batch in zip(range(2000), guard.batches(), strict=False)]
    counts = np.bincount(torch.cat(drawn).numpy(), minlength=40)
    assert abs(counts / 2000 - 0.2).max() < 5 * (0.2 * 0.8 / 2000) ** 0.5
    sizes = np.array([len(batch) for batch in drawn])
    assert sizes.var() == pytest.approx(40 * 0.2 * 0.8, rel=0.2)
    other = RowGuard(site(worker(FedAvg(batch_size=8), federation([40])), 0, number=2), 40, RowNoise(1.0, 1.0))
    assert next(other.batches()).tolist() != drawn[0].tolist()  # the next job draws others


def test_training_takes_the_rows_that_were_drawn() -> None:
    at = worker(composed(FedAvg(row_noise="1", batch_size=8, local_epochs=3)), federation([40]))
    server = at.method.init_server(at.host(0, "init"))
    message = at.method.broadcast(at.program[0], server, None)  # type: ignore[arg-type]
    work, _ = at.do_train(message, Job(0, 0, 1, 0, 0, 0), None)
    drawn = RowGuard(site(at), 40, RowNoise(1.0, 1.0)).batches()
    assert work.steps == 15
    assert work.samples == sum(len(next(drawn)) for _ in range(15)) != 120


def test_without_noise_and_bound_and_with_whole_batches_it_is_fedavg() -> None:
    fed, whole = federation(dtype=torch.float64), {"batch_size": 99, "local_steps": 3}
    plain = loop(worker(FedAvg(**whole), fed, LINEAR64), 2).snapshots[2].server
    found = loop(worker(FedAvg(row_noise="0:1e9", **whole), fed, LINEAR64), 2).snapshots[2].server
    for name, p in plain.model.params.items():
        torch.testing.assert_close(found.model.params[name], p, rtol=1e-10, atol=1e-12)


def run(method: Any, **more: Any) -> consilience.Result:
    fed = consilience.make_federation("digits", clients=4, seed=0)
    return consilience.run(method, fed, **{"model": "mlp:16", "rounds": 2, "executor": "serial", **more})


def test_what_was_spent_is_that_of_the_steps_made() -> None:
    found = run(FedAvg(row_noise="1.5:0.5"), participation=2)
    each = spent(found, 1e-4)
    fed = found.worker.federation
    assert sorted(each) == [0, 1, 2, 3]
    for client, epsilon in each.items():
        n, jobs = fed.size(client), found.snapshot.numbers.get(client, 0) + 1
        steps = jobs * -(-n // 32)
        assert epsilon == Poisson(n, 32, 1).epsilon(1.5, steps, 1e-4)
    assert sum(found.snapshot.numbers.values()) == 4
    assert max(each.values()) > min(each.values()) or len(set(found.snapshot.numbers.values())) == 1
    assert mechanism(FedAvg(batch_size=64), 10).q == 1
    with pytest.raises(ConfigError, match="without row_noise"):
        spent(run(FedAvg()), 1e-4)


def test_losses_of_rows_are_not_told() -> None:
    line = run(FedAvg(row_noise="1")).history[-1]
    assert "train_loss" in run(FedAvg()).history[-1]
    assert "train_loss" not in line
    assert line["global"]["accuracy"] >= 0


def test_it_goes_with_what_only_handles_updates() -> None:
    private = consilience.privacy.options.Privacy(noise=0.5, mechanism="fixed")
    for method, options in (
        (FedProx(row_noise="0.5", aggregator="median"), {"attack": "ipm:0.25"}),
        (FedAvg(row_noise="0.5", client_momentum=0.5), {"privacy": private, "participation": 2}),
        (FedAvg(row_noise="0.5", compress="ef21:topk:0.1"), {}),
    ):
        once = run(method, **options)
        assert run(method, **options, executor="processes", workers=2).digest == once.digest
        assert once.refused == []


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (Scaffold(row_noise="1"), "way of its own"), (Ditto(row_noise="1"), "way of its own"),
        (FAL(row_noise="1"), "way of its own"), (FedSAM(row_noise="1"), "one gradient a step"),
        (FedAvg(row_noise="1", optimizer="sam+sgd"), "more than a gradient"),
        (FedAvg(row_noise="1", weights="fedce"), "weights=fedce"), (FedAvg(row_noise="1", then="ccvr"), "then=ccvr"),
        (FedAvg(row_noise="1", row_order="curriculum"), "row_order=curriculum"),
        (FedAvg(row_noise="x"), "row_noise"), (FedAvg(row_noise="1:0"), "row_noise"), (FedAvg(row_noise="-1"), "row_"),
        (FedAvg(row_noise="1:1:1"), "row_noise"), (FedAvg(row_noise="nan"), "row_noise"),
    ],
)  # fmt: skip
def test_what_noise_would_not_hide_is_refused(method: Any, why: str) -> None:
    with pytest.raises(Exception, match=why):
        run(method)


def test_statistics_of_batches_are_refused() -> None:
    with pytest.raises(ConfigError, match="BatchNorm"):
        worker(FedAvg(row_noise="1"), federation(), NOISY)
    assert parse("none") is None
    assert parse("1.5") == RowNoise(1.5, 1.0)
    assert tr.digest(worker(FedAvg(), federation(), LINEAR).host(0, "init").initial())

"""Local optimisers that ask more of a step's batch than a direction, against NumPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import CLASSES, FEATURES, LINEAR, LINEAR64, NOISY, NORMED, architecture, federation, loop, site, worker
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from consilience import simulate
from consilience.core import optim
from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.federation import Task
from consilience.core.method import Method
from consilience.core.model import Architecture
from consilience.core.optim import averaged
from consilience.core.optimisers import SGG, deviations, grouped, scales
from consilience.core.snapshot import Snapshot
from consilience.methods import FedAvg, FedProx, FedSAM
from consilience.models.small import Linear as SplitLinear
from consilience.simulate import prepare

LR, BATCH, STEPS = 0.1, 5, 7
Array = NDArray[np.float64]
USUAL: dict[str, Any] = {"lr": LR, "batch_size": BATCH, "local_steps": STEPS}


def trained(method: Method, rounds: int = 3, model: Architecture = NOISY, **more: Any) -> Snapshot:
    return loop(worker(method, federation(dtype=model.dtype), model), rounds, cohort=3, **more).snapshots[rounds]


def model_digest(snapshot: Snapshot) -> str:
    return tr.digest(snapshot.server.model)


class Softmax:
    """Softmax regression on client 2 by hand: gradient and Hessian in one vector, weights row by row, then biases."""

    def __init__(self) -> None:
        data = federation(dtype=torch.float64).data(2).train
        self.rows = np.hstack([data.x.numpy(), np.ones((len(data), 1))])
        self.labels = F.one_hot(data.y, CLASSES).double().numpy()
        start = LINEAR64.initial(0).params
        self.start = self.flat(start["head.weight"].numpy(), start["head.bias"].numpy())

    @staticmethod
    def flat(weight: Array, bias: Array) -> Array:
        return np.concatenate([weight.ravel(), bias])

    def spread(self, y: Array) -> Array:
        """(classes, features + 1)."""
        return np.hstack([y[: CLASSES * FEATURES].reshape(CLASSES, FEATURES), y[CLASSES * FEATURES :, None]])

    def gradient(self, y: Array, take: Any) -> Array:
        p = np.exp(self.rows[take] @ self.spread(y).T)
        g = (p / p.sum(1, keepdims=True) - self.labels[take]).T @ self.rows[take] / len(take)
        return self.flat(g[:, :-1], g[:, -1])

    def hessian(self, y: Array, take: Any) -> Array:
        """Column by column, from the gradient's own derivative worked out by hand."""
        p = np.exp(self.rows[take] @ self.spread(y).T)
        p = p / p.sum(1, keepdims=True)
        columns = []
        for unit in np.eye(len(y)):
            v = self.rows[take] @ self.spread(unit).T
            bent = p * (v - (p * v).sum(1, keepdims=True))
            h = bent.T @ self.rows[take] / len(take)
            columns.append(self.flat(h[:, :-1], h[:, -1]))
        return np.array(columns).T

    def batches(self, at: Any) -> Any:
        rng, made = at.rng("batches"), 0
        while True:
            order = rng.permutation(len(self.rows))
            for start in range(0, len(order), BATCH):
                yield order[start : start + BATCH]
                made += 1
                if made == STEPS:
                    return

    def signs(self, rng: np.random.Generator) -> Array:
        parts = [rng.integers(0, 2, shape) * 2.0 - 1 for shape in ((CLASSES, FEATURES), (CLASSES,))]
        return self.flat(*parts)


def agrees(by_hand: Array, weights: Any) -> None:
    found = Softmax.flat(weights.params["head.weight"].numpy(), weights.params["head.bias"].numpy())
    np.testing.assert_allclose(found, by_hand, rtol=1e-9, atol=1e-11)


def fitted(optimizer: str, **more: Any) -> tuple[Any, Any]:
    at = site(worker(FedAvg(**USUAL, optimizer=optimizer, **more), federation(dtype=torch.float64), LINEAR64), client=2)
    return at, at.fit(at.initial())


# --- curvature -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adahessian_in_the_training_loop_by_hand(decay: float) -> None:
    pytest.importorskip("pytorch_optimizer")
    at, fit = fitted("adahessian", weight_decay=decay)
    by, rng = Softmax(), at.rng("probes", "batches")
    y, m, v = by.start.copy(), np.zeros(18), np.zeros(18)
    for k, take in enumerate(by.batches(at), 1):
        z = by.signs(rng)
        g, d = by.gradient(y, take), z * (by.hessian(y, take) @ z)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * d**2
        step = m / (1 - 0.9**k) / (np.sqrt(v / (1 - 0.999**k)) + 1e-4)
        y = y - LR * (step + decay * y) if not decay else y * (1 - LR * decay) - LR * step
    agrees(y, fit.weights)
    assert fit.samples == 3 * sum(len(take) for take in by.batches(at))


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_oasis_in_the_training_loop_by_hand(decay: float) -> None:
    at, fit = fitted("oasis", weight_decay=decay)
    by, rng = Softmax(), at.rng("probes", "batches")

    def gradient(y: Array, take: Any) -> Array:
        return by.gradient(y, take) + decay * y

    def probe(y: Array, take: Any) -> Array:
        z = by.signs(rng)
        return z * (by.hessian(y, take) @ z + decay * z)

    y, before, diagonal, eta, theta, sizes = by.start.copy(), by.start, np.zeros(0), LR, np.inf, []
    for k, take in enumerate(by.batches(at)):
        if k:
            diagonal = 0.99 * diagonal + 0.01 * probe(y, take)
        else:
            diagonal = np.mean([probe(y, take) for _ in range(10)], axis=0)
        scale = np.maximum(abs(diagonal), 0.01)
        if k:
            moved, turned = y - before, gradient(y, take) - gradient(before, take)
            far, steep = np.sqrt(moved @ (scale * moved)), np.sqrt(turned @ (turned / scale))
            new = min(np.sqrt(1 + theta) * eta, far / (2 * steep))
            theta, eta = new / eta, new
        sizes.append(eta)
        before, y = y, y - eta * gradient(y, take) / scale
    agrees(y, fit.weights)
    assert len(set(sizes)) == STEPS
    rows = [len(take) for take in by.batches(at)]
    assert fit.samples == (1 + 20) * rows[0] + 4 * sum(rows[1:])


def test_curvature_sees_the_steps_own_dropout_and_moves_nothing() -> None:
    """Of the same step twice: the same product, and buffers as after the gradient alone."""
    at = site(worker(FedAvg(batch_size=5), federation((23, 8)), NOISY))
    asked: list[str] = []

    class Spy:
        def __init__(self, made: Any) -> None:
            self.made = made

        def apply(self, directions: Any, lr: float, around: Any = None) -> None:
            signs = [torch.ones_like(p) for p in around._grad.models.leaves]
            one, two = (tr.digest(around._grad.product(signs)) for _ in range(2))
            assert one == two
            asked.append(one)
            assert tr.digest(around.gradient()) == tr.digest(list(around._grad().values()))
            self.made.apply(directions, lr, around)

    plain = at.fit(at.initial(), steps=3).weights
    make, optim.make = optim.make, lambda *a: Spy(make("sgd", *a[1:]))  # type: ignore[assignment, return-value]
    try:
        spied = at.fit(at.initial(), steps=3, optimizer="oasis").weights
    finally:
        optim.make = make
    assert len(set(asked)) == 3
    assert tr.digest(spied) == tr.digest(plain)


def test_curvature_of_convolutions_is_averaged_over_each_kernel() -> None:
    d = torch.arange(24.0).reshape(2, 3, 2, 2) - 12
    found = averaged(d)
    assert found[1, 2].unique().tolist() == pytest.approx([(8 + 9 + 10 + 11) / 4])
    assert found[0, 0].unique().tolist() == pytest.approx([(12 + 11 + 10 + 9) / 4])
    assert averaged(d[0, 0]) is not found
    assert torch.equal(averaged(d[0, 0]), d[0, 0])


def test_adahessian_takes_kernels_together() -> None:
    pytest.importorskip("pytorch_optimizer")
    kernel = nn.Parameter(torch.zeros(1, 1, 2, 2, dtype=torch.float64))
    diagonal = torch.tensor([[[[1.0, -2.0], [3.0, 6.0]]]], dtype=torch.float64)

    class Given:
        def gradient(self, at: Any = None) -> Any:
            raise AssertionError

        def curvature(self) -> Any:
            return [diagonal]

    optim.make("adahessian", [kernel], 0.1, 0.0, 0.0).apply([torch.ones_like(kernel)], 0.1, Given())
    np.testing.assert_allclose(kernel.detach().numpy(), -0.1 / (3 + 1e-4))


def test_a_task_without_a_loss_has_no_curvature() -> None:
    def saddle(module: nn.Module, batch: Any) -> Any:
        return {name: p.detach() for name, p in module.named_parameters()}

    fed = federation()
    fed.task = Task("operator", 1, operator=saddle)
    at = site(prepare(FedAvg(optimizer="oasis"), fed, model=LINEAR))
    with pytest.raises(ConfigError, match="curvature of a loss"):
        at.fit(at.initial())


# --- sharpness -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"momentum": 0.9, "clip": 0.5, "weight_decay": 0.1}])
@pytest.mark.parametrize(("front", "adaptive"), [("sam:0.2", False), ("asam:0.2", True)])
def test_sam_in_front_of_sgd_is_fedsam_bit_for_bit(front: str, adaptive: bool, fields: dict[str, Any]) -> None:
    own = trained(FedSAM(rho=0.2, adaptive=adaptive, **USUAL, **fields))
    found = trained(FedAvg(optimizer=f"{front}+sgd", **USUAL, **fields))
    assert tr.digest(found.server) == tr.digest(own.server)
    assert found.totals == own.totals
    assert model_digest(found) != model_digest(trained(FedAvg(**USUAL, **fields)))


@pytest.mark.parametrize("front", ["sam:0", "asam:0", "grokfast:0.5:0"])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_neutral_fronts_change_nothing(front: str, name: str) -> None:
    plain = trained(FedAvg(optimizer=name, **USUAL))
    assert model_digest(trained(FedAvg(optimizer=f"{front}+{name}", **USUAL))) == model_digest(plain)


def test_sam_is_of_the_loss_and_leaves_a_methods_own_term_where_it_is() -> None:
    """FedProx: y <- y - lr (grad F(y + e) + mu (y - x))."""
    method = FedProx(mu=0.7, optimizer="sam:0.3+sgd", **USUAL)
    at = site(worker(method, federation(dtype=torch.float64), LINEAR64), client=2)
    fit = method.train(at, method.broadcast(at.place.method.program()[0], method.init_server(at), None), None)  # type: ignore[arg-type]
    by = Softmax()
    y = by.start.copy()
    for take in by.batches(at):
        g = by.gradient(y, take)
        y = y - LR * (by.gradient(y + 0.3 * g / np.linalg.norm(g), take) + 0.7 * (y - by.start))
    agrees(y, fit.weights)


def test_sam_in_front_of_adam_by_hand() -> None:
    at, fit = fitted("sam:0.3+adam")
    by = Softmax()
    y, m, v = by.start.copy(), np.zeros(18), np.zeros(18)
    for k, take in enumerate(by.batches(at), 1):
        g = by.gradient(y, take)
        g = by.gradient(y + 0.3 * g / np.linalg.norm(g), take)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        y = y - LR * m / (1 - 0.9**k) / (np.sqrt(v / (1 - 0.999**k)) + 1e-8)
    agrees(y, fit.weights)


def test_batchnorm_moves_once_a_step_under_sam() -> None:
    at = site(worker(FedAvg(**USUAL, optimizer="sam+adam"), federation((23, 8)), NORMED))
    buffers = at.fit(at.initial()).weights.buffers
    assert int(next(b for k, b in buffers.items() if k.endswith("num_batches_tracked"))) == STEPS


def test_fedsam_does_not_do_it_twice() -> None:
    with pytest.raises(ConfigError, match="itself"):
        FedSAM(optimizer="asam+sgd")


# --- SGG -------------------------------------------------------------------------------------------------------


def test_scales_of_the_known_example() -> None:
    m = torch.tensor([[0.1, 0.1, 0.2], [0.2, 1.0, 1.2]], dtype=torch.float64)
    groups = grouped(m)
    assert groups.tolist() == [[0, 0, 1], [1, 2, 2]]
    (found,) = deviations([m], [groups])
    assert found.tolist() == pytest.approx([0.366667, 0.266667, 0.633333], abs=1e-6)
    assert scales([found])[0].tolist() == pytest.approx([1.0, 1.375, 0.578947], abs=1e-6)


def test_groups_are_those_of_k_means() -> None:
    values = np.random.default_rng(0).standard_normal(40) ** 3
    centres, before = np.sort(values)[[6, 20, 33]], None
    while before is None or (centres != before).any():
        nearest = abs(values[:, None] - centres).argmin(1)
        before, centres = centres, np.array([values[nearest == k].mean() for k in range(3)])
    assert grouped(torch.from_numpy(values)).tolist() == nearest.tolist()
    assert len(set(np.searchsorted(np.sort(values)[[13, 26]], values)[nearest == 1])) > 1  # no mere thirds
    assert grouped(torch.ones(4)).unique().numel() == 1


def test_sgg_scales_the_steps_of_matrices_by_hand() -> None:
    rng = np.random.default_rng(1)
    start, directions = rng.standard_normal((3, 4)), rng.standard_normal((9, 3, 4)) ** 3
    w, b = nn.Parameter(torch.tensor(start)), nn.Parameter(torch.zeros(4, dtype=torch.float64))
    made = optim.make("sgg:4+sgd", [w, b], 0.1, 0.0, 0.0)
    y, m, s, groups = start.copy(), np.zeros((3, 4)), np.ones(3), np.zeros((3, 4), int)
    for k, g in enumerate(directions):
        made.apply([torch.tensor(g), torch.ones(4, dtype=torch.float64)], 0.1)
        m = 0.9 * m + 0.1 * g
        if k % 4 == 0:
            groups = grouped(torch.tensor(m)).numpy()
            d = np.array([np.median(abs(m - m.mean())[groups == c]) for c in range(3)])
            s = np.clip(0.99 * s + 0.01 * np.median(d) / (d + 1e-8), 0.1, 10)
        y = y - 0.1 * s[groups] * g
    np.testing.assert_allclose(w.detach().numpy(), y, rtol=1e-12)
    np.testing.assert_allclose(b.detach().numpy(), -0.9 * np.ones(4))
    assert len(set(s)) == 3


def test_sgg_with_nothing_to_group_is_the_optimiser() -> None:
    x, y = (nn.Parameter(torch.arange(5.0)) for _ in range(2))
    one, two = optim.make("sgg+adam", [x], 0.1, 0.0, 0.0), optim.make("adam", [y], 0.1, 0.0, 0.0)
    for k in range(4):
        for made in (one, two):
            made.apply([torch.arange(5.0) + k], 0.1)
    assert torch.equal(x, y)
    level = nn.Parameter(torch.ones(2, 2))
    made = SGG(optim.make("sgd", [level], 0.1, 0.0, 0.0), [level.data], 1)
    made.apply([torch.ones(2, 2)], 0.1)
    assert torch.isfinite(level).all()


# --- the same bits ---------------------------------------------------------------------------------------------

SLOW = ["sgg:3+sam+diffgrad", "sophiah", "asam+ademamix", "shampoo", "adahessian", "sgg:2+oasis"]
MANY = ["sam+grokfast+sgg:2+adam", "oasis", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def result(method: Method, executor: str, model: Architecture) -> simulate.Result:
    return simulate.run(
        method, federation(dtype=model.dtype), model=model, rounds=3, participation=3, executor=executor, workers=2
    )  # fmt: skip


@pytest.mark.parametrize("name", MANY)
def test_processes_and_stacks_agree_with_serial(name: str) -> None:
    pytest.importorskip("pytorch_optimizer")
    method = FedAvg(lr=0.01, batch_size=4, optimizer=name)
    assert result(method, "processes", NOISY).digest == result(method, "serial", NOISY).digest
    pytest.importorskip("greenlet")
    wide = architecture(SplitLinear, dtype=torch.float64)
    ends = [result(method, executor, wide).snapshot.server.model for executor in ("serial", "stacked")]
    far = max(float((a - b).abs().max()) for a, b in zip(tr.tensors(ends[0]), tr.tensors(ends[1]), strict=True))
    assert far < 1e-12

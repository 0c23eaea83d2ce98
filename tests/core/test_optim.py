"""Optimisers by name, on trajectories that are known."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LINEAR, site, vector, worker
from torch import nn

from consilience.core import optim
from consilience.core.errors import ConfigError
from consilience.methods import FedAvg


class Valley:
    """(x^2 + 10 y^2) / 2, and what an optimiser may ask about it."""

    bends = torch.tensor([1.0, 10.0], dtype=torch.float64)

    def __init__(self) -> None:
        self.x = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def gradient(self, at: Any = None) -> list[torch.Tensor]:
        return [(self.x.detach() if at is None else at[0]) * self.bends]

    def curvature(self) -> list[torch.Tensor]:
        return [self.bends.clone()]


def path(name: str, steps: int, lr: float = 0.1, **options: Any) -> list[list[float]]:
    """Steps down the valley from (1, 1)."""
    valley = Valley()
    x = valley.x
    made = optim.make(name, [x], lr, options.get("momentum", 0.0), options.get("weight_decay", 0.0))
    found = []
    for _ in range(steps):
        made.apply(valley.gradient(), lr, valley)
        found.append(x.tolist())
    return found


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("adam", [[0.9, 0.9], [0.800412, 0.800412], [0.701586, 0.701586]]),
        ("diffgrad", [[0.926894, 0.900005], [0.875207, 0.827201], [0.824229, 0.760410]]),
        ("ademamix", [[0.899950, 0.899950], [0.800263, 0.800263], [0.701289, 0.701289]]),
        ("adabelief", [[0.888889, 0.888889], [0.772729, 0.772729], [0.652305, 0.652305]]),
        ("adahessian", [[0.9, 0.9], [0.805263, 0.805263], [0.715770, 0.715770]]),
        ("oasis", [[0.9, 0.9], [0.45, 0.45], [0.225, 0.225]]),
        ("adamomentum", [[0.000500, 0.000005], [-0.497317, -0.497933], [-0.642089, -0.642385]]),
    ],
)
def test_known_trajectories(name: str, wanted: Any) -> None:
    if name not in ("adam", "adamomentum", "oasis"):
        pytest.importorskip("pytorch_optimizer")
    near = 1e-4 if name == "adahessian" else 2e-5  # its eps is the authors', not that of the known numbers
    for found, expected in zip(path(name, 3), wanted, strict=True):
        assert found == pytest.approx(expected, abs=near)


def test_shampoo_is_that_of_its_equations() -> None:
    """W <- W - lr L^(-1/4) G R^(-1/4), L = eps I + sum G G', R = eps I + sum G' G."""
    pytest.importorskip("pytorch_optimizer")

    def root(a: Any) -> Any:
        values, vectors = np.linalg.eigh(a)
        return vectors @ np.diag(values**-0.25) @ vectors.T

    rng = np.random.default_rng(0)
    y, gradients = rng.standard_normal((3, 2)), rng.standard_normal((4, 3, 2))
    w = nn.Parameter(torch.tensor(y))
    made = optim.make("shampoo", [w], 0.1, 0.0, 0.0)
    left, right = 1e-6 * np.eye(3), 1e-6 * np.eye(2)
    for g in gradients:
        made.apply([torch.tensor(g)], 0.1)
        left, right = left + g @ g.T, right + g.T @ g
        y = y - 0.1 * root(left) @ g @ root(right)
    np.testing.assert_allclose(w.detach().numpy(), y, rtol=1e-5)


def test_adamomentum_decays_weights_in_the_gradient() -> None:
    assert path("adamomentum", 1, weight_decay=0.5)[0] != path("adamomentum", 1)[0]
    assert path("adamomentum", 4, lr=0.01)[-1][0] < 1


def test_grokfast_filters_what_any_optimiser_gets() -> None:
    x, slow, expected = torch.ones(2, dtype=torch.float64), None, []
    for _ in range(5):
        g = x * torch.tensor([1.0, 10.0])
        slow = g if slow is None else 0.98 * slow + 0.02 * g
        x = x - 0.01 * (g + 2 * slow)
        expected.append(x.tolist())
    assert expected[0] == pytest.approx([0.97, 0.7])
    for found, wanted in zip(path("grokfast+sgd", 5, lr=0.01), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-12)
    assert path("grokfast+adam", 3) != path("adam", 3)


def test_weight_decay_is_part_of_the_gradient_that_is_filtered() -> None:
    ends = []
    for decay in (0.0, 0.1):
        at = worker(FedAvg(optimizer="grokfast+sgd", lr=0.1, batch_size=99, local_steps=1, weight_decay=decay))
        ends.append(vector(site(at).fit(LINEAR.initial(0)).weights))
    start = vector(LINEAR.initial(0))
    torch.testing.assert_close(ends[0] - ends[1], 0.1 * 3 * 0.1 * start, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("sam", "sam+NAME"),
        ("sam+asam+sgd", "only one of a kind"),
        ("asam:-1+sgd", "asam:RHO"),
        ("sam:x+sgd", "write sam:RHO"),
        ("grokfast:1:2+sgd", "ALPHA below 1"),
        ("sgg:1.5+sgd", "whole EVERY"),
        ("sgd+sam", "did you mean 'sgg'"),
        ("alig", "along a gradient alone"),
        ("nero", "licence"),
        ("lbfgs", "along a gradient alone"),
        ("sparseadam", "along a gradient alone"),
        ("adamomentun", "did you mean 'adamomentum'"),
        ("grokfast+adm", "did you mean 'adam'"),
    ],
)
def test_what_cannot_train_here_is_refused_before_the_run(name: str, why: str) -> None:
    pytest.importorskip("pytorch_optimizer")
    with pytest.raises(ConfigError, match=re.escape(why)):
        FedAvg(optimizer=name)


def test_muon_and_the_like_may_be_named() -> None:
    """They step along matrices; whether a model has others is seen when it trains."""
    assert optim.check("muon", 0.9, 0.0) == {"momentum": 0.9}

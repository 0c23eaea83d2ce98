"""Optimisers by name, on trajectories that are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import LINEAR, site, vector, worker
from torch import nn

from consilience.core import optim
from consilience.core.errors import ConfigError
from consilience.methods import FedAvg


def path(name: str, steps: int, lr: float = 0.1, **options: Any) -> list[list[float]]:
    """Steps on (x^2 + 10 y^2) / 2 from (1, 1)."""
    x = nn.Parameter(torch.ones(2, dtype=torch.float64))
    made = optim.make(name, [x], lr, options.get("momentum", 0.0), options.get("weight_decay", 0.0))
    found = []
    for _ in range(steps):
        made.apply([x.detach() * torch.tensor([1.0, 10.0])], lr)
        found.append(x.tolist())
    return found


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("adam", [[0.9, 0.9], [0.800412, 0.800412], [0.701586, 0.701586]]),
        ("diffgrad", [[0.926894, 0.900005], [0.875207, 0.827201], [0.824229, 0.760410]]),
        ("ademamix", [[0.899950, 0.899950], [0.800263, 0.800263], [0.701289, 0.701289]]),
        ("adabelief", [[0.888889, 0.888889], [0.772729, 0.772729], [0.652305, 0.652305]]),
        ("adamomentum", [[0.000500, 0.000005], [-0.497317, -0.497933], [-0.642089, -0.642385]]),
    ],
)
def test_known_trajectories(name: str, wanted: Any) -> None:
    if name not in ("adam", "adamomentum"):
        pytest.importorskip("pytorch_optimizer")
    for found, expected in zip(path(name, 3), wanted, strict=True):
        assert found == pytest.approx(expected, abs=2e-5)


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
        ("sam", "fedsam"),
        ("lbfgs", "along a gradient alone"),
        ("sparseadam", "along a gradient alone"),
        ("adahessian", "along a gradient alone"),
        ("adamomentun", "did you mean 'adamomentum'"),
        ("grokfast+adm", "did you mean 'adam'"),
    ],
)
def test_what_cannot_train_here_is_refused_before_the_run(name: str, why: str) -> None:
    pytest.importorskip("pytorch_optimizer")
    with pytest.raises(ConfigError, match=why):
        FedAvg(optimizer=name)


def test_muon_and_the_like_may_be_named() -> None:
    """They step along matrices; whether a model has others is seen when it trains."""
    assert optim.check("muon", 0.9, 0.0) == {"momentum": 0.9}

"""The accuracy bound against closed forms, a general solver, and predictors drawn at random."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.optimize import minimize

from consilience.core.errors import DataError
from consilience.measure.fairness import global_disparity, local_disparity
from consilience.measure.fairness_bound import TOLERANCE, Frontier


def law(h: float) -> np.ndarray:
    """Half of each group, P(y = 1 | z) = 0.3 and 0.7, P(s = z) = h; predictions are labels."""
    out = np.zeros((2, 2, 2, 2))
    for s, z in product((0, 1), (0, 1)):
        mass = 0.5 * (h if s == z else 1 - h)
        out[s, z, 1, 1] = mass * (0.3, 0.7)[z]
        out[s, z, 0, 0] = mass * (0.7, 0.3)[z]
    return out


@pytest.mark.parametrize(
    ("h", "of_global", "of_local", "accuracy", "disparities"),
    [
        (0.5, None, None, 1.0, (0.1187, 0.1187)),
        (0.5, 0.0, None, 0.8, (0.0, None)),
        (0.5, None, 0.0, 0.8, (None, 0.0)),
        (0.5, 0.0, 0.0, 0.8, (0.0, 0.0)),
        (0.5, 0.05, 0.05, 0.9309, (0.05, 0.05)),
        (0.9, 0.0, None, 0.8, (0.0, None)),
        (0.9, None, 0.0, 0.96, (0.0752, 0.0)),
        (0.9, 0.0, 0.0, 0.8, (0.0, 0.0)),
        (0.9, 0.05, None, 0.9309, (0.05, None)),
        (0.9, None, 0.05, 1.0, (0.1187, 0.0435)),
    ],
)
def test_known_optima(
    h: float,
    of_global: float | None,
    of_local: float | None,
    accuracy: float,
    disparities: tuple[float | None, float | None],
) -> None:
    found = Frontier(law(h)).at(of_global, of_local)
    assert found.accuracy == pytest.approx(accuracy, abs=5e-5)
    assert found.accuracy - found.attained <= TOLERANCE
    for value, expected in zip((found.global_, found.local), disparities, strict=True):
        if expected is not None:
            assert value == pytest.approx(expected, abs=1e-4)


def drawn(seed: int, clients: int = 3, groups: int = 2) -> np.ndarray:
    rng = np.random.default_rng(seed)
    table = rng.integers(1, 30, (clients, groups, 2, 2)).astype(float)
    table[:, :, [0, 1], [0, 1]] += rng.integers(5, 60, (clients, groups, 2))
    return table


def solved(table: np.ndarray, of_global: float, of_local: float, starts: int = 8) -> float:
    """The same optimum over the rates u[s, z] = P(1 | s, z), whose error is |u - P(y = 1 | s, z)|, by SLSQP."""
    p = table / table.sum()
    cells = p.sum(axis=(2, 3))
    base = p.sum(axis=3)[:, :, 1] / cells

    def joint(u: np.ndarray) -> np.ndarray:
        u = np.clip(u, 1e-9, 1 - 1e-9)
        return np.stack([cells * (1 - u), cells * u], axis=-1)[:, :, None, :]

    size = base.size

    def shape(x: np.ndarray) -> np.ndarray:
        return x[:size].reshape(base.shape)

    best = 1.0
    rng = np.random.default_rng(0)
    for _ in range(starts):
        start = rng.random(base.shape)
        constraints = [
            {"type": "ineq", "fun": lambda x: of_global - global_disparity(joint(shape(x)))},
            {"type": "ineq", "fun": lambda x: of_local - local_disparity(joint(shape(x)))},
            {"type": "ineq", "fun": lambda x: x[size:] - (shape(x) - base).ravel()},
            {"type": "ineq", "fun": lambda x: x[size:] + (shape(x) - base).ravel()},
        ]
        done = minimize(
            lambda x: cells.ravel() @ x[size:],
            np.concatenate([start.ravel(), np.abs(start - base).ravel()]),
            bounds=[(0, 1)] * (2 * size),
            constraints=constraints,
            method="SLSQP",
            options={"maxiter": 500, "ftol": 1e-10},
        )
        if done.success and global_disparity(joint(shape(done.x))) <= of_global + 1e-6:
            best = min(best, float(done.fun))
    return 1 - best


@pytest.mark.filterwarnings("ignore:Values in x were outside bounds")
@pytest.mark.parametrize("seed", range(3))
def test_a_general_solver_comes_to_the_same(seed: int) -> None:
    table = drawn(seed)
    free = Frontier(table).at(None, None)
    budgets = 0.3 * free.global_, 0.2 * free.local
    found = Frontier(table).at(*budgets)
    assert found.global_ <= budgets[0] + 1e-9
    assert found.local <= budgets[1] + 1e-9
    assert solved(table, *budgets) == pytest.approx(found.accuracy, abs=2e-4)


@pytest.mark.parametrize("groups", [2, 3])
def test_no_predictor_is_above_the_bound(groups: int) -> None:
    table = drawn(9, 4, groups)
    p = table.sum(axis=3) / table.sum()
    rng = np.random.default_rng(1)
    frontier = Frontier(table)
    for _ in range(40):
        k = rng.dirichlet(np.full(2, 0.5), (4, groups, 2))
        k = 0.5 * k + 0.5 * rng.dirichlet(np.ones(2), (4, 1, 1))  # some of them nearly fair
        joint = np.einsum("szy,szyc->szyc", p, k)
        bound = frontier.at(global_disparity(joint), local_disparity(joint))
        assert float(np.einsum("szyy->", joint)) <= bound.accuracy + 1e-9


def test_relabelling_a_model_against_a_grid() -> None:
    table = np.array([[[[40, 10], [8, 22]], [[15, 12], [5, 48]]]], dtype=float)
    p = table / table.sum()
    flips = np.linspace(0, 1, 16)
    best = 0.0
    budget = 0.02
    for a0, b0, a1, b1 in product(flips, flips, flips, flips):  # P(1 | said 0), P(1 | said 1) in each group
        says = np.array([[a0, b0], [a1, b1]])
        one = np.einsum("zya,za->zy", p[0], says)
        joint = np.stack([p[0].sum(axis=2) - one, one], axis=-1)[None]
        right = joint[0, :, 0, 0].sum() + joint[0, :, 1, 1].sum()
        if right > best and global_disparity(joint) <= budget:
            best = right
    found = Frontier(table, of="model").at(budget, None)
    assert best <= found.accuracy + 1e-9
    assert found.accuracy == pytest.approx(best, abs=1e-2)


def test_a_model_bound_lies_between_the_model_and_the_oracle() -> None:
    table = drawn(4)
    model, oracle = Frontier(table, of="model"), Frontier(table)
    joint = table / table.sum()
    own = float(np.einsum("szyy->", joint))
    budgets = global_disparity(joint), local_disparity(joint)
    assert own - 1e-9 <= model.at(*budgets).accuracy <= oracle.at(*budgets).accuracy + 1e-9


def test_a_curve_rises_and_is_concave() -> None:
    curve = Frontier(drawn(2)).curve("global", 7)
    budgets = np.array([b.budget_global for b in curve])
    accuracy = np.array([b.accuracy for b in curve])
    slopes = np.diff(accuracy) / np.diff(budgets)
    assert (slopes >= -1e-6).all()
    assert (np.diff(slopes) <= 1e-2).all()
    assert accuracy[-1] == pytest.approx(1.0)


def test_several_classes_and_empty_cells() -> None:
    rng = np.random.default_rng(3)
    table = rng.integers(0, 4, (5, 3, 4, 4)).astype(float)
    table[1, 2] = 0
    found = Frontier(table).at(0.01, 0.02)
    assert found.accuracy - found.attained <= TOLERANCE
    assert found.global_ <= 0.01 + 1e-9
    assert found.local <= 0.02 + 1e-9


def test_bad_input() -> None:
    with pytest.raises(DataError, match="client, group, label"):
        Frontier(np.zeros((2, 2, 2)))
    with pytest.raises(DataError, match="0 bits"):
        Frontier(law(0.5)).at(-0.1, None)

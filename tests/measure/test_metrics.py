"""Metrics against scikit-learn and naive loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score

from consilience.core.federation import Task
from consilience.measure.metrics import Standard, auroc, calibration_error, jain, macro_f1

CASES = [(400, 4, 0), (60, 10, 1), (9, 6, 2)]


def drawn(n: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    scores = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[y]
    return torch.from_numpy(scores.astype("f4")), torch.from_numpy(y)


@pytest.mark.parametrize("case", CASES)
def test_macro_f1(case: tuple[int, int, int]) -> None:
    scores, y = drawn(*case)
    predicted = scores.argmax(1)
    assert macro_f1(predicted, y, case[1]) == pytest.approx(f1_score(y, predicted, average="macro"), rel=1e-12)
    only = torch.zeros_like(y)
    assert macro_f1(only, only, case[1]) == 1.0


@pytest.mark.parametrize("case", CASES[:2])
def test_auroc(case: tuple[int, int, int]) -> None:
    scores, y = drawn(*case)
    p = scores.double().softmax(1).numpy()
    assert auroc(scores, y) == pytest.approx(roc_auc_score(y, p, multi_class="ovr", average="macro"), rel=1e-12)


def test_auroc_is_over_the_classes_that_occur() -> None:
    scores, y = drawn(200, 5, 3)
    y = y.clamp(max=3)  # nobody is of class 4
    p = scores.double().softmax(1).numpy()
    wanted = np.mean([roc_auc_score((y == c).numpy(), p[:, c]) for c in range(4)])
    assert auroc(scores, y) == pytest.approx(wanted, rel=1e-12)
    assert math.isnan(auroc(scores, torch.zeros_like(y)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_have_no_auroc(bad: float) -> None:
    scores, y = drawn(50, 3, 0)
    scores[7] = bad
    assert math.isnan(auroc(scores, y))
    found = Standard().of_global(Task("classification", 3), scores, y, bad, True)
    assert set(found) == {"accuracy", "loss", "macro_f1", "ece", "auroc"}


@pytest.mark.parametrize("case", CASES)
def test_calibration_error(case: tuple[int, int, int]) -> None:
    scores, y = drawn(*case)
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(scores.double().softmax(1), y, strict=True):
        confidence = float(row.max())
        bins.setdefault(min(math.ceil(confidence * 15), 15), []).append((confidence, int(row.argmax()) == int(label)))
    gaps = [len(b) / len(y) * abs(np.mean([c for c, _ in b]) - np.mean([r for _, r in b])) for b in bins.values()]
    assert calibration_error(scores, y) == pytest.approx(sum(gaps), rel=1e-9)


def test_calibration_at_its_ends() -> None:
    sure = 1e4 * torch.eye(3)
    assert calibration_error(sure, torch.tensor([0, 1, 2])) == 0.0
    assert calibration_error(sure, torch.tensor([1, 2, 0])) == 1.0


def test_jain() -> None:
    assert jain(np.full(7, 0.3)) == pytest.approx(1)
    assert jain(np.array([0.0, 5.0, 0.0, 0.0])) == pytest.approx(1 / 4)
    assert jain(np.array([1.0, 2.0, 3.0])) == pytest.approx(36 / (3 * 14))
    assert jain(np.zeros(3)) == 1.0


def test_a_summary_over_clients() -> None:
    values = [0.9, 0.1, 0.5, 0.7, 0.3, 0.8, 0.6, 0.4, 0.2, 1.0, 0.95]
    up = Standard().across(values, higher_is_better=True)
    down = Standard().across(values, higher_is_better=False)
    assert up["mean"] == pytest.approx(np.mean(values))
    assert up["std"] == pytest.approx(np.std(values))
    assert up["worst10"] == pytest.approx(0.15)  # a tenth of 11, rounded up: 2
    assert down["worst10"] == pytest.approx(0.975)


def test_regression_has_an_rmse() -> None:
    y, scores = torch.tensor([1.0, 2.0]), torch.tensor([[1.0], [4.0]])
    found = Standard().of_global(Task("regression", 1), scores, y, 1.0, True)
    assert found == {"loss": 1.0, "rmse": pytest.approx(math.sqrt(2))}

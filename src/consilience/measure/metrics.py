"""Numbers made of scores: how the global model does, and how its quality is spread over clients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.core.federation import Task
from consilience.core.site import group_counts
from consilience.measure.fairness import entropy, gaps, summary

BINS = 15
"""Bins of the calibration error."""


class Standard:
    """The measures every run reports."""

    def of_global(
        self, task: Task, scores: Tensor, y: Tensor, loss: float, full: bool, sensitive: Tensor | None = None
    ) -> dict[str, Any]:
        """Classification: accuracy, loss, macro-F1, calibration error, and (``full``) AUROC. Else loss and RMSE.

        ``groups``: by sensitive attribute, the differences of :func:`consilience.measure.fairness.gaps`.
        """
        if task.kind != "classification":
            rmse = float((scores.reshape(len(y), -1) - y.reshape(len(y), -1)).double().square().mean().sqrt())
            return {"loss": loss, "rmse": rmse}
        found: dict[str, Any] = {
            "accuracy": float((scores.argmax(1) == y).double().mean()),
            "loss": loss,
            "macro_f1": macro_f1(scores.argmax(1), y, task.outputs),
            "ece": calibration_error(scores, y),
        }
        if full:
            found["auroc"] = auroc(scores, y)
        if sensitive is not None:
            counts = group_counts(sensitive, y, scores.argmax(1), task.outputs)
            found["groups"] = {name: gaps(c.double().numpy()) for name, c in zip(task.sensitive, counts, strict=True)}
        return found

    def between_groups(self, task: Task, counts: Sequence[Sequence[Tensor]]) -> dict[str, Any]:
        """By sensitive attribute, :func:`consilience.measure.fairness.summary` over clients."""
        return {name: summary([own[i] for own in counts]) for i, name in enumerate(task.sensitive)}

    def agreement(self, found: Sequence[int], true: Sequence[int]) -> float:
        """The adjusted Rand index."""
        return adjusted_rand(found, true)

    def across(self, values: Sequence[float], *, higher_is_better: bool) -> dict[str, float]:
        """Mean, worst tenth, standard deviation, Jain index and entropy over clients, each client counting once."""
        a = np.asarray(values, dtype=np.float64)
        worst = np.sort(a if higher_is_better else -a)[: math.ceil(len(a) / 10)]
        return {
            "mean": float(a.mean()),
            "worst10": float(worst.mean() if higher_is_better else -worst.mean()),
            "std": float(a.std()),
            "jain": jain(a),
            "entropy": entropy(a),
        }


def macro_f1(predicted: Tensor, y: Tensor, classes: int) -> float:
    """Mean over the classes that occur (in labels or predictions) of 2 TP / (2 TP + FP + FN)."""
    pairs = torch.bincount(y * classes + predicted, minlength=classes * classes).reshape(classes, classes).double()
    right, sums = pairs.diagonal(), pairs.sum(0) + pairs.sum(1)
    return float((2 * right[sums > 0] / sums[sums > 0]).mean())


def calibration_error(scores: Tensor, y: Tensor) -> float:
    """Expected calibration error of the top class, 15 equal bins (Guo et al., ICML 2017, equation 3)."""
    confidence, predicted = scores.double().softmax(1).max(1)
    right = (predicted == y).double()
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    gap = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, right - confidence)
    return float(gap.abs().sum() / len(y))


def auroc(scores: Tensor, y: Tensor) -> float:
    """Mean over the classes that occur of the area under the one-against-rest ROC curve; nan if only one occurs,
    or if scores are no numbers (a model that diverged)."""
    if not bool(torch.isfinite(scores).all()):
        return math.nan
    probability = scores.double().softmax(1).numpy()
    labels = y.numpy()
    present = [c for c in range(scores.shape[1]) if 0 < int((labels == c).sum()) < len(labels)]
    areas = [_area(probability[:, c], labels == c) for c in present]
    return float(np.mean(areas)) if areas else math.nan


def _area(values: np.ndarray, positive: np.ndarray) -> float:
    """Share of (positive, negative) pairs in the right order, ties counting half (Mann and Whitney, 1947). Written
    out, since scikit-learn takes longer to import than a first round takes to train."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[group]
    n = int(positive.sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(values) - n)))


def adjusted_rand(found: Sequence[int], true: Sequence[int]) -> float:
    """The adjusted Rand index of two partitions (Hubert and Arabie, 1985): 1 for the same one, 0 on average for one at
    random. 1 where both put everybody together, or both everybody apart."""
    _, rows = np.unique(np.asarray(found), return_inverse=True)
    _, columns = np.unique(np.asarray(true), return_inverse=True)
    table = np.zeros((rows.max() + 1, columns.max() + 1), dtype=np.int64)
    np.add.at(table, (rows, columns), 1)

    def pairs(counts: np.ndarray) -> int:
        return int((counts * (counts - 1) // 2).sum())

    both, left, right, every = pairs(table), pairs(table.sum(1)), pairs(table.sum(0)), pairs(np.array([len(rows)]))
    expected = left * right / every if every else 0.0
    most = (left + right) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def jain(values: np.ndarray) -> float:
    """(sum x)^2 / (n sum x^2): 1 if all are equal, 1/n if one has everything (Jain et al., 1984)."""
    squares = float((values**2).sum())
    return float(values.sum() ** 2 / (len(values) * squares)) if squares else 1.0

"""The federations that rows are judged on. All are small, so that the table takes less than an hour of two cores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from consilience.data import load

SEEDS = (0, 1, 2)
TUNED_ON = 3
"""The seed of trials."""
ROUNDS, TRIALS, TRIAL_ROUNDS = 40, 4, 15
ROWS, TEST = 280, 2000
"""Rows of a client of Fashion-MNIST on average (200 to train on), and of the global test set."""
FASHION = {"data": "fashion", "split": [0.72, 0.2, 0.08], "model": "mlp:128x64", "batch_size": 50, "clip": 10.0}

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "labels": (
        "Fashion-MNIST, Dirichlet 0.1, equal sizes, 4 of 20 clients a round, 3 epochs, MLP 128-64",
        {**FASHION, "clients": 20, "partition": "dirichlet:0.1:equal", "participation": 4, "local_epochs": 3},
    ),
    "quantity": (
        "Fashion-MNIST, Dirichlet 0.1 with unequal sizes, all 16 clients, 2 epochs, MLP 128-64",
        {**FASHION, "clients": 16, "partition": "dirichlet:0.1", "local_epochs": 2},
    ),
    "dirichlet-0.5": (
        "Fashion-MNIST, Dirichlet 0.5, all 10 clients, 3 epochs, MLP 128-64",
        {**FASHION, "clients": 10, "partition": "dirichlet:0.5", "local_epochs": 3},
    ),
    "three-classes": (
        "Fashion-MNIST, three classes a client, all 10 clients, 1 epoch, MLP 128-64",
        {**FASHION, "clients": 10, "partition": "shards:3"},
    ),
    "two-classes": (
        "Fashion-MNIST, two classes a client, 2 of 10 clients a round, 5 epochs, MLP 200-200",
        {
            **FASHION, "clients": 10, "partition": "shards:2", "participation": 2, "local_epochs": 5,
            "model": "mlp:200x200",
        },
    ),
    "occupations": (
        "Adult, a client for each occupation (features, labels and sizes differ), all, 1 epoch, MLP 64",
        {
            "data": "adult", "partition": "natural:occupation", "split": [0.7, 0.2, 0.1], "model": "mlp:64",
            "batch_size": 256,
        },
    ),
    "long-tail": (
        "Fashion-MNIST, Dirichlet 0.5 with a long tail of 50, all 10 clients, 3 epochs, MLP 128-64",
        {**FASHION, "clients": 10, "partition": "dirichlet:0.5+longtail:50", "local_epochs": 3},
    ),
    "logistic": (
        "Fashion-MNIST, Dirichlet 0.1, all 10 clients, 1 epoch, logistic regression",
        {**FASHION, "clients": 10, "partition": "dirichlet:0.1", "model": "logistic"},
    ),
}  # fmt: skip
"""Images are 14 x 14, means of 2 x 2 pixels."""


def options(setting: str, seed: int, rounds: int, folder: Path) -> dict[str, Any]:
    """What a run is configured with. Of Fashion-MNIST every seed has other rows, in a file in ``folder``."""
    found = {**SETTINGS[setting][1], "seed": seed, "rounds": rounds, "executor": "serial", "eval_clients_every": 0}
    if found["data"] == "fashion":
        found["data"] = str(_fashion(found["clients"] * ROWS, seed, folder))
    return found


def _fashion(rows: int, seed: int, folder: Path) -> Path:
    path = folder / f"fashion-14-{rows}-{seed}.npz"
    if not path.exists():
        raw = load("fashion-mnist")
        assert isinstance(raw.x, np.ndarray)
        assert isinstance(raw.test_x, np.ndarray)
        assert raw.test_y is not None
        some = np.random.default_rng(seed).permutation(len(raw.y))[:rows]
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        np.savez(
            part, x=_halved(raw.x[some]), y=raw.y[some], x_test=_halved(raw.test_x[:TEST]), y_test=raw.test_y[:TEST]
        )
        part.replace(path)
    return path


def _halved(x: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels."""
    count, channels, height, width = x.shape
    mean: np.ndarray = x.reshape(count, channels, height // 2, 2, width // 2, 2).mean((3, 5)).astype(x.dtype)
    return mean

"""The workloads that speed is measured on, and their data as plain tensors, for the floor and for peers."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

CACHE = Path(__file__).parent / ".cache"
ARRAYS = ("x", "y", "test_x", "test_y")


@dataclass(frozen=True)
class Workload:
    """Fashion-MNIST among ``clients``, ``cohort`` of them a round, one local epoch of plain SGD.

    every: rounds between tests of the global model on the whole test set. samples: trained in one round.
    """

    model: str
    clients: int
    cohort: int
    batch: int
    lr: float
    partition: str
    every: int
    scaffold: bool = False

    @property
    def samples(self) -> int:
        """Rows trained on in a round."""
        return 60_000 // self.clients * self.cohort

    def options(self) -> list[str]:
        """The same as options of ``consilience run``."""
        return [
            *("--data", "fashion-mnist", "--model", self.model, "--clients", str(self.clients), "--split", "1,0,0"),
            *("--partition", self.partition, "--participation", str(self.cohort), "--eval-every", str(self.every)),
            *("--batch-size", str(self.batch), "--lr", str(self.lr), "--local-epochs", "1"),
        ]


WORKLOADS = {
    "w1": Workload("lenet", 100, 10, 32, 0.05, "dirichlet:0.3:equal", 1),
    "w2": Workload("mlp", 1000, 100, 20, 0.05, "dirichlet:0.3:equal", 5),
    "w3": Workload("lenet", 100, 10, 32, 0.05, "dirichlet:0.3:equal", 1, scaffold=True),
}


def folder(workload: Workload) -> Path:
    """Where the workload's arrays are."""
    return CACHE / f"{workload.partition.replace(':', '_')}-{workload.clients}"


def save(workload: Workload) -> None:
    """Write the workload's data for those who do not import Consilience."""
    from consilience.data.datasets import make_federation

    path = folder(workload)
    if path.exists():
        return
    federation = make_federation(
        "fashion-mnist", clients=workload.clients, partition=workload.partition, split=(1.0, 0.0, 0.0)
    )
    rows = [federation.data(client).train for client in range(workload.clients)]
    x, y = torch.stack([r.x for r in rows]).numpy(), torch.stack([r.y for r in rows]).numpy()
    path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as new:
        for name, array in zip(ARRAYS, (x, y, federation.test.x.numpy(), federation.test.y.numpy()), strict=True):
            np.save(Path(new) / f"{name}.npy", array)
        Path(new).rename(path)


def load(workload: Workload) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """(x, y) of each client, and of the test set, as :func:`save` wrote them: mapped, so that processes share them."""
    path = folder(workload)
    x, y, test_x, test_y = (torch.from_numpy(np.load(path / f"{name}.npy", mmap_mode="c")) for name in ARRAYS)
    return list(zip(x, y, strict=True)), (test_x, test_y)


def options(**choices: tuple[str, ...]) -> tuple:
    """What a peer's script is told: workload, rounds, and each of the named choices (by default the first)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--rounds", type=int, default=20)
    for name, values in choices.items():
        parser.add_argument(f"--{name}", choices=values, default=values[0])
    found = parser.parse_args()
    return (found.workload, found.rounds, *(getattr(found, name) for name in choices))


def lenet() -> nn.Module:
    """LeNet as a plain module."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def mlp() -> nn.Module:
    """A network with one hidden layer of 200."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10))

"""What learns: a task, and clients that each hold data of their own.

These are the types that the rest of the core knows. How they are made from arrays, files and partitioners is
in :mod:`consilience.data`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from consilience.core.errors import DataError

TaskKind = Literal["classification", "regression", "operator"]


@dataclass(frozen=True)
class Split:
    """Rows of data.

    x: ``(n, *shape)`` floating inputs. y: ``(n,)`` int64 labels, or ``(n,)`` / ``(n, k)`` floating targets.
    sensitive: ``(n, s)`` int64 codes of sensitive attributes, or None.
    """

    x: Tensor
    y: Tensor
    sensitive: Tensor | None = None

    def __len__(self) -> int:
        return int(self.x.shape[0])

    def rows(self, index: Any) -> Split:
        """The rows at ``index`` (a slice gives views, an index tensor copies)."""
        return Split(self.x[index], self.y[index], None if self.sensitive is None else self.sensitive[index])


@dataclass(frozen=True)
class ClientData:
    """A client's own rows; each may be empty but the training rows."""

    train: Split
    valid: Split
    test: Split


@dataclass(frozen=True)
class Task:
    """What is to be learned.

    classification: ``outputs`` classes, cross-entropy. regression: ``outputs`` targets, half the squared error.
    operator: no loss; ``operator(model, batch)`` gives a direction for every parameter by name (a game's or a
    variational inequality's field), which training follows as it would a gradient. A regression may have an operator
    too: then it is followed, and the loss only judges how far outputs are from targets that are the solution.
    """

    kind: TaskKind
    outputs: int
    classes: tuple[str, ...] = ()
    sensitive: tuple[str, ...] = ()
    operator: Callable[[torch.nn.Module, Split], dict[str, Tensor]] | None = None

    @property
    def minimises(self) -> bool:
        """Whether training is to make a loss small."""
        return self.kind != "operator" and self.operator is None

    def losses(self, output: Tensor, y: Tensor) -> Tensor:
        """Loss of each row, shape ``(n,)``."""
        if self.kind == "classification":
            return F.cross_entropy(output, y, reduction="none")
        if self.kind == "regression":
            return 0.5 * (output - y.reshape(output.shape)).square().flatten(1).sum(1)
        raise DataError("an operator task has no loss; methods that need one cannot run on it")

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Mean loss of the rows, a scalar."""
        if self.kind == "classification":
            return F.cross_entropy(output, y)
        return self.losses(output, y).mean()


@dataclass
class Federation(ABC):
    """Clients 0 .. n_clients - 1 with a task.

    n_clients: how many there are. input_shape: the shape of one input. test: rows of nobody, for judging the
    global model. public: unlabelled rows that everybody may see. unseen: clients that never train and only
    judge. groups: the true group of each client where the partitioner made groups. hostile: clients of an attacked run
    that are not judged. triggered: rows with a backdoor's trigger, and the class that it leads to. names: for
    display.
    """

    name: str
    task: Task
    n_clients: int
    input_shape: tuple[int, ...]
    test: Split | None = None
    public: Tensor | None = None
    unseen: frozenset[int] = frozenset()
    groups: tuple[int, ...] | None = None
    hostile: frozenset[int] = frozenset()
    triggered: Split | None = None
    names: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)

    @abstractmethod
    def data(self, client: int) -> ClientData:
        """The rows of ``client``. Cheap: views, or made from the client's id on demand."""

    @abstractmethod
    def size(self, client: int) -> int:
        """Training rows of ``client``, without making them."""

    @property
    def seen(self) -> np.ndarray:
        """Ids of the clients that may train, in order."""
        train = np.ones(self.n_clients, dtype=bool)
        train[np.fromiter(self.unseen, dtype=np.int64, count=len(self.unseen))] = False
        return np.flatnonzero(train)

    @property
    def n_seen(self) -> int:
        """How many clients may train."""
        return self.n_clients - len(self.unseen)

    def label(self, client: int) -> str:
        """A client's display name."""
        return self.names[client] if self.names else str(client)

    def fingerprint(self) -> str:
        """SHA-256 of what this federation is, so that a run is only resumed on the data it began with."""
        h = hashlib.sha256(repr((self.name, self.task.kind, self.task.outputs, self.n_clients)).encode())
        h.update(repr((self.input_shape, sorted(self.unseen))).encode())
        for client in range(min(self.n_clients, 1000)):
            h.update(self.size(client).to_bytes(8, "little"))
        for client in range(min(self.n_clients, 16)):  # a sample: clients may be made on demand
            h.update(self.data(client).train.x.contiguous().numpy().tobytes())
        if self.test is not None:
            h.update(self.test.x.contiguous().numpy().tobytes())
        return h.hexdigest()

"""Games whose solution is known, as data: each row is a game of its own, and a client plays the mean of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from consilience.core.errors import DataError
from consilience.core.federation import Split, Task
from consilience.core.streams import philox
from consilience.data.federation import ArrayFederation
from consilience.data.raw import RawData

SIDE, ROWS, TEST = 5, 100, 20
"""Unknowns of each player; rows of each client, and of each in the global test set."""


@dataclass(frozen=True)
class Field:
    """The operator of the game u' A v + a' u - b' v + (mu / 2) (|u|^2 - |v|^2), which u makes small and v large.

        F(u, v) = ( A v + a + mu u,  - A' u + b + mu v )

    A row is ``(k, k + 2)``: A, a and b. The model has parameters ``u`` and ``v`` of shape ``(k,)`` each.
    """

    mu: float

    def __call__(self, model: nn.Module, batch: Split) -> dict[str, Tensor]:
        """The mean of F over the rows, by parameter. Raises DataError for another model."""
        u, v = getattr(model, "u", None), getattr(model, "v", None)
        if not isinstance(u, Tensor) or not isinstance(v, Tensor):
            raise DataError("data 'bilinear' is a game of two players; use --model players")
        mean = batch.x.mean(0)
        a, left, right = mean[:, :-2], mean[:, -2], mean[:, -1]
        return {"u": a @ v + left + self.mu * u, "v": right - a.T @ u + self.mu * v}


def bilinear(name: str, *, clients: int, seed: int, mu: float, spread: float) -> RawData:
    """A bilinear game with a regulariser: 100 rows a client of two players with 5 unknowns each.

    Client c: A_c = A + spread D_c, a_c, b_c ~ N(0, spread^2 I) beside common ones; A has singular values from 1/2 to
    3/2, D_c have entries of variance 1/5 and mean 0 over clients; rows are A_c, a_c, b_c with noise of deviation 0.1.
    Targets are the solution (see :func:`solve`), so that the loss is half the squared distance of the unknowns to it.
    """
    rng = philox(seed, "data", "bilinear", "middle")
    turns = [np.linalg.qr(rng.standard_normal((SIDE, SIDE)))[0] for _ in range(2)]
    middle = np.concatenate(
        [turns[0] @ np.diag(np.linspace(0.5, 1.5, SIDE)) @ turns[1], rng.standard_normal((SIDE, 2))], 1
    )
    own = np.stack([philox(seed, "data", "bilinear", c).standard_normal((SIDE, SIDE + 2)) for c in range(clients)])
    own[:, :, :SIDE] = (own - own.mean(0))[:, :, :SIDE] / np.sqrt(SIDE)
    noise = [
        philox(seed, "data", "bilinear", "rows", c).standard_normal((ROWS + TEST, SIDE, SIDE + 2))
        for c in range(clients)
    ]
    rows = (middle + spread * own)[:, None] + 0.1 * np.stack(noise)
    x, outputs = rows.astype(np.float32), 2 * SIDE
    return RawData(
        name,
        x[:, :ROWS].reshape(-1, SIDE, SIDE + 2),
        np.zeros((clients * ROWS, outputs), np.float32),
        Task("regression", outputs, operator=Field(mu)),
        x[:, ROWS:].reshape(-1, SIDE, SIDE + 2),
        np.zeros((clients * TEST, outputs), np.float32),
        columns={"client": np.repeat(np.arange(clients), ROWS)},
        natural="client",
    )


def solve(federation: ArrayFederation) -> None:
    """Make every target the solution over the training clients' training rows, and note it in ``about["solution"]``.
    Raises DataError where there is none."""
    train = torch.cat([federation.data(int(client)).train.x for client in federation.seen]).double().numpy().mean(0)
    a, left, right = train[:, :-2], train[:, -2], train[:, -1]
    field: Any = federation.task.operator
    k = len(a)
    matrix = np.block([[field.mu * np.eye(k), a], [-a.T, field.mu * np.eye(k)]])
    try:
        found = np.linalg.solve(matrix, -np.concatenate([left, right]))
    except np.linalg.LinAlgError:
        raise DataError(f"data '{federation.name}' drew a game without a solution; give another seed") from None
    federation.rows.y[:] = torch.from_numpy(found).to(federation.rows.y.dtype)
    if federation.test is not None:
        federation.test.y[:] = torch.from_numpy(found).to(federation.test.y.dtype)
    federation.about["solution"] = found.tolist()

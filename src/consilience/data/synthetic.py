"""Federations that are drawn, not read: FedProx's synthetic(alpha, beta), and quadratics with a known optimum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from consilience.core.errors import ConfigError
from consilience.core.federation import ClientData, Split, Task
from consilience.core.streams import philox
from consilience.data import assign
from consilience.data.federation import ArrayFederation, OnDemandFederation
from consilience.data.partition import choose_unseen, fractions
from consilience.data.raw import RawData

FEATURES, CLASSES = 60, 10
MAX_ON_DEMAND = 5000
QUADRATIC_FEATURES, QUADRATIC_ROWS, QUADRATIC_TEST = 10, 100, 20

_TASK = Task("classification", CLASSES, tuple(map(str, range(CLASSES))))


@lru_cache(maxsize=1)
def _deviations() -> NDArray[np.float64]:
    """Square roots of Sigma_jj = j^-1.2."""
    return np.asarray(np.arange(1, FEATURES + 1) ** -0.6, dtype=np.float64)


@dataclass(frozen=True)
class SyntheticClients:
    """The clients of synthetic(alpha, beta) (Li et al. 2020, FedProx, and its published generator).

    Client k labels x by argmax(W_k x + b_k), with W_k, b_k ~ N(u_k, 1), u_k ~ N(0, alpha); its inputs are
    x ~ N(v_k, Sigma) with Sigma_jj = j^-1.2, v_k ~ N(B_k, 1), B_k ~ N(0, beta). As in the generator, alpha and
    beta are standard deviations. Sizes are 50 + floor(lognormal(4, 2)), at most ``cap`` where one is given.
    Everything comes from (seed, client), so a client does not depend on how many there are.
    """

    seed: int
    alpha: float
    beta: float
    cap: int | None = None

    def rows(self, client: int) -> int:
        """How many rows the client has."""
        size = 50 + int(philox(self.seed, "data", "synthetic", "size", client).lognormal(4.0, 2.0))
        return size if self.cap is None else min(size, self.cap)

    def draw(self, client: int, rows: int, purpose: str = "rows") -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """``rows`` inputs ``(rows, 60)`` of a client, and their labels."""
        rng = philox(self.seed, "data", "synthetic", "model", client)
        u, center = rng.normal(0.0, self.alpha), rng.normal(0.0, self.beta)
        v = rng.normal(center, 1.0, FEATURES)
        w, b = rng.normal(u, 1.0, (FEATURES, CLASSES)), rng.normal(u, 1.0, CLASSES)
        noise = philox(self.seed, "data", "synthetic", purpose, client).standard_normal((rows, FEATURES))
        x = v + noise * _deviations()
        return x.astype(np.float32), (x @ w + b).argmax(axis=1).astype(np.int64)


@dataclass(frozen=True)
class SyntheticMaker:
    """Makes a client's split data from its id, for :class:`OnDemandFederation`."""

    clients: SyntheticClients
    valid: float
    test: float

    def __call__(self, client: int) -> ClientData:
        x, y = self.clients.draw(client, self.clients.rows(client))
        rng = philox(self.clients.seed, "partition", "split", client)
        order, bounds = assign.split_rows(np.zeros_like(y), y, 1, self.valid, self.test, rng)
        rows = Split(torch.from_numpy(x[order]), torch.from_numpy(y[order]))
        a, b, c, d = bounds[0].tolist()
        return ClientData(rows.rows(slice(a, b)), rows.rows(slice(b, c)), rows.rows(slice(c, d)))

    def size(self, client: int) -> int:
        """Training rows of a client, without making them."""
        rows = np.array([self.clients.rows(client)])
        n_valid, n_test = assign.part_sizes(rows, self.valid, self.test)
        return int(rows[0] - n_valid[0] - n_test[0])


def synthetic(name: str, *, clients: int, seed: int, alpha: float, beta: float) -> RawData:
    """synthetic(alpha, beta) with its natural clients; the global test set is fresh rows, a tenth of each client's."""
    source = SyntheticClients(seed, alpha, beta)
    sizes = [source.rows(client) for client in range(clients)]
    own = [source.draw(client, size) for client, size in enumerate(sizes)]
    held = [source.draw(client, max(1, size // 10), "test") for client, size in enumerate(sizes)]
    return RawData(
        name,
        np.concatenate([x for x, _ in own]),
        np.concatenate([y for _, y in own]),
        _TASK,
        np.concatenate([x for x, _ in held]),
        np.concatenate([y for _, y in held]),
        columns={"client": np.repeat(np.arange(clients), sizes)},
        natural="client",
    )


def synthetic_on_demand(
    name: str,
    *,
    clients: int,
    seed: int = 0,
    alpha: float = 1.0,
    beta: float = 1.0,
    split: Sequence[float] = (0.8, 0.1, 0.1),
    public: int = 0,
    unseen: float = 0,
) -> OnDemandFederation:
    """synthetic(alpha, beta) whose clients are made when asked for, with at most 5000 rows each.

    The global test set is 20 fresh rows of each of the first 500 clients; public rows come from as many.
    """
    if clients < 1:
        raise ConfigError(f"clients {clients} should be at least 1")
    if public < 0:
        raise ConfigError(f"public {public} should be 0 or more")
    _, valid, test = fractions(split)
    source = SyntheticClients(seed, alpha, beta, MAX_ON_DEMAND)
    maker = SyntheticMaker(source, valid, test)
    some = min(clients, 500)
    held = [source.draw(client, 20, "test") for client in range(some)]
    shared = [source.draw(client, -(-public // some), "public")[0] for client in range(some)] if public else []
    return OnDemandFederation(
        name=name,
        task=_TASK,
        n_clients=clients,
        input_shape=(FEATURES,),
        test=Split(
            torch.from_numpy(np.concatenate([x for x, _ in held])),
            torch.from_numpy(np.concatenate([y for _, y in held])),
        ),
        public=torch.from_numpy(np.concatenate(shared)[:public]) if shared else None,
        unseen=frozenset(choose_unseen(unseen, clients, seed)),
        about={"data": name, "partition": "iid", "seed": seed},
        make=maker,
        sizes=maker.size,
    )


def quadratic(name: str, *, clients: int, seed: int, spread: float) -> RawData:
    """Least squares with a minimiser of its own for each client: 100 rows each of 10 inputs and one target.

    Client k: y = x w_k + b_k + 0.1 e with (w_k, b_k) ~ N(m, spread^2), m ~ N(0, 1) and x_j ~ N(0, 1/j), so the
    population's condition number is 10. The global test set is 20 fresh rows of each client.
    """
    scale = np.arange(1, QUADRATIC_FEATURES + 1) ** -0.5
    middle = philox(seed, "data", "quadratic", "middle").standard_normal(QUADRATIC_FEATURES + 1)
    rows = QUADRATIC_ROWS + QUADRATIC_TEST
    xs, ys = [], []
    for client in range(clients):
        rng = philox(seed, "data", "quadratic", client)
        own = middle + spread * rng.standard_normal(QUADRATIC_FEATURES + 1)
        x = (rng.standard_normal((rows, QUADRATIC_FEATURES)) * scale).astype(np.float32)
        xs.append(x)
        ys.append((x @ own[:-1] + own[-1] + 0.1 * rng.standard_normal(rows)).astype(np.float32))
    x, y = np.stack(xs), np.stack(ys)
    return RawData(
        name,
        x[:, :QUADRATIC_ROWS].reshape(-1, QUADRATIC_FEATURES),
        y[:, :QUADRATIC_ROWS].reshape(-1),
        Task("regression", 1),
        x[:, QUADRATIC_ROWS:].reshape(-1, QUADRATIC_FEATURES),
        y[:, QUADRATIC_ROWS:].reshape(-1),
        columns={"client": np.repeat(np.arange(clients), QUADRATIC_ROWS)},
        natural="client",
    )


def least_squares(federation: ArrayFederation) -> dict[str, Any]:
    """The linear model that minimises half the mean squared error over the training clients' training rows.

    weight: ``(1, features)`` and bias: ``(1,)`` as a linear layer has them, and the loss there; float64.
    """
    train = [federation.data(int(client)).train for client in federation.seen]
    x = torch.cat([split.x for split in train]).double().numpy()
    y = torch.cat([split.y for split in train]).double().numpy()
    design = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    solution = np.linalg.lstsq(design, y, rcond=None)[0]
    loss = 0.5 * float(np.square(design @ solution - y).mean())
    return {"weight": [solution[:-1].tolist()], "bias": [float(solution[-1])], "loss": loss}


def numbers(name: str, text: str, usage: str, default: tuple[float, ...]) -> tuple[float, ...]:
    """The non-negative numbers after a data set's name, ``default`` if there are none."""
    if not text:
        return default
    try:
        values = tuple(float(part) for part in text.split(":"))
    except ValueError:
        values = ()
    if len(values) != len(default) or any(not 0 <= value < np.inf for value in values):
        raise ConfigError(f"data '{name}:{text}' should be {usage}")
    return values

"""How a model does on the worst inputs nearby: under PGD with restarts, which sees it, and Square, which asks it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.core.errors import ConfigError
from consilience.core.federation import Split
from consilience.core.predict import Predictor
from consilience.core.site import Host
from consilience.core.streams import philox
from consilience.core.worker import Worker
from consilience.parts.adversarial import Bounds, parse_bounds, worst

Scores = Callable[[Tensor], Tensor]
STEPS, RESTARTS, QUERIES = 20, 5, 1000
MOST = 1000
"""So many rows of a global test set are attacked at the end of a run."""


@dataclass(frozen=True)
class Robustness:
    """Shares of rows that are still classified right: as they are, under PGD, under Square, and under both."""

    rows: int
    clean: float
    pgd: float
    square: float
    both: float


@dataclass(frozen=True)
class Nearby:
    """How far each number of an input may be changed, and the range that it has to stay in (``none`` or LOW:HIGH)."""

    eps: float
    bounds: str = "0:1"


def parse(text: str | None) -> Nearby | None:
    """EPS, EPS:LOW:HIGH or EPS:none, as ``--robustness`` takes it. Raises ConfigError."""
    if text is None:
        return None
    head, _, bounds = text.partition(":")
    try:
        eps, box = float(head), parse_bounds(bounds or "0:1")
    except (ValueError, ConfigError):
        eps, box = math.nan, Bounds()
    if not 0 < eps < math.inf or eps > box.high - box.low:
        raise ConfigError(
            f"--robustness {text}: EPS[:LOW:HIGH], how far each number of an input may be changed (above 0) and the "
            "range that it stays in (0:1; none: any), which is at least as wide"
        )
    return Nearby(eps, bounds or "0:1")


def check(worker: Worker) -> None:
    """Raise ConfigError where the model that a run ends with cannot be judged by its worst inputs."""
    federation, method = worker.federation, worker.method
    if federation.task.kind != "classification":
        raise ConfigError("--robustness is of models that classify, and this task is a regression")
    if federation.test is None or not len(federation.test):
        raise ConfigError("--robustness judges on the global test set, which this federation does not have")
    _check_images(federation.test.x)
    ends = any(phase.when == "end" for phase in worker.program)  # at which there may be a model that is not yet
    if not ends and method.global_model(method.init_server(worker.host(0, "init"))) is None:
        raise ConfigError(f"--robustness judges the global model, and {method.name} with these options has none")


def at_end(worker: Worker, nearby: Nearby, predictor: Predictor) -> dict[str, Any]:
    """What a run's last line says of its global model: :class:`Robustness` on the global test set (``MOST`` rows of a
    larger one, drawn from the seed), with ``eps``."""
    test, seed = worker.federation.test, worker.place.seed
    assert test is not None
    drawn = philox(seed, "robustness").choice(len(test), min(MOST, len(test)), replace=False)
    data = test.rows(torch.from_numpy(np.sort(drawn)))
    host = worker.host(0, "evaluate")
    box = parse_bounds(nearby.bounds)
    return {"eps": nearby.eps, **asdict(_withstood(host, predictor, host.cast(data), nearby.eps, box, seed))}


def robustness(
    result: Any,
    eps: float,
    *,
    rows: Split | None = None,
    bounds: str = "0:1",
    steps: int = STEPS,
    restarts: int = RESTARTS,
    queries: int = QUERIES,
    seed: int = 0,
) -> Robustness:
    """The global model of a run (a ``Result``) on rows (the global test set) whose numbers may each be changed by eps.

    A row counts under PGD if it withstands ``restarts`` attempts of ``steps`` steps of size 2.5 eps / steps, each from
    a random place in the box (Madry et al., ICLR 2018, with their 2.5); under Square if it withstands ``queries``
    questions. Rows that are wrong as they are count as wrong. Raises ConfigError where there is no global model, no
    rows, or no images.
    """
    worker, predictor = result.worker, result.global_model
    data, box = worker.federation.test if rows is None else rows, parse_bounds(bounds)
    if predictor is None or data is None or not len(data) or worker.federation.task.kind != "classification":
        raise ConfigError("robustness is that of a global model that classifies, on a global test set or given rows")
    if not 0 <= eps < math.inf or min(steps, restarts, queries) < 1:
        raise ConfigError(
            f"robustness: eps={eps:g} is 0 or more and finite; steps, restarts and queries are at least 1"
        )
    host = worker.host(0, "evaluate")
    data = host.cast(data)
    _check_images(data.x)
    return _withstood(host, predictor, data, eps, box, seed, steps, restarts, queries)


def _check_images(x: Tensor) -> None:
    if x.ndim != 4:
        raise ConfigError(
            "robustness: Square, one of the attacks, is on images (channels, height, width); inputs here are of shape "
            f"{tuple(x.shape[1:])}"
        )


def _withstood(
    host: Host, predictor: Predictor, data: Split, eps: float, box: Bounds, seed: int, steps: int = STEPS,
    restarts: int = RESTARTS, queries: int = QUERIES,
) -> Robustness:  # fmt: skip
    """Both attacks on a predictor."""
    with host.lent(predictor) as scores:
        clean = _right(scores, data.x, data.y)
        pgd, square = clean.clone(), clean.clone()
        for restart in range(restarts):
            rng = philox(seed, "pgd", restart)
            pgd &= _right(scores, pgd_inputs(host.task.losses, scores, data, eps, steps, box, rng), data.y)
        found = square_inputs(scores, data.x[clean], data.y[clean], eps, queries, box, philox(seed, "square"))
        square[clean] = _right(scores, found, data.y[clean])
    shares = (float(part.double().mean()) for part in (clean, pgd, square, pgd & square))
    return Robustness(len(data), *shares)


def _right(scores: Scores, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return scores(x).argmax(1) == y if len(x) else torch.zeros(0, dtype=torch.bool)


def pgd_inputs(
    losses: Callable[[Tensor, Tensor], Tensor], scores: Scores, data: Split, eps: float, steps: int, bounds: Bounds,
    rng: np.random.Generator,
) -> Tensor:  # fmt: skip
    """The inputs of one attempt of PGD, ``(n, ...)``."""
    start = torch.from_numpy(rng.uniform(-eps, eps, data.x.shape)).to(data.x.dtype)
    return worst(
        lambda x: losses(scores(x), data.y), data.x, start, eps=eps, size=2.5 * eps / steps, steps=steps, bounds=bounds
    )


SHRINK = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Of 10,000 questions, those at which squares become half as large."""


def share_of_square(question: int, questions: int, first: float = 0.8) -> float:
    """The share of an image that the square of a question covers (the paper's schedule, stretched)."""
    at = int(question / questions * 10_000)
    return float(first / 2 ** sum(at > bound for bound in SHRINK))


def square_inputs(
    scores: Scores, x: Tensor, y: Tensor, eps: float, queries: int, bounds: Bounds, rng: np.random.Generator
) -> Tensor:
    """Images ``(n, channels, height, width)`` after ``queries`` questions to ``scores``, which gives no gradients:

        at first vertical stripes of +-eps; then, in a square at a random place that gets smaller with time, each
        channel goes up or down to the end of its box; kept where the margin s_y - max_{c != y} s_c becomes less

    Source: Andriushchenko, Croce, Flammarion, Hein, "Square Attack: a query-efficient black-box adversarial attack via
    random search", ECCV 2020 (largest norm). Deviations: every image is asked about as often, also once it is
    misled; signs that change nothing are not drawn again, so some questions are wasted.
    """
    n, channels, height, width = x.shape
    low = (x - eps).clamp(min=bounds.low).minimum(x)
    high = (x + eps).clamp(max=bounds.high).maximum(x)

    def signs(*shape: int) -> Tensor:
        return torch.from_numpy(rng.integers(0, 2, shape) * 2.0 - 1).to(x.dtype)

    best = torch.clamp(x + eps * signs(n, channels, 1, width), low, high)
    least = _margins(scores, best, y)
    rows, columns = torch.arange(height)[None, :, None], torch.arange(width)[None, None, :]
    for question in range(1, queries):
        side = max(1, round(math.sqrt(share_of_square(question, queries) * height * width)))
        side = min(side, height, width)
        top, left = (torch.from_numpy(rng.integers(0, m - side + 1, (n, 1, 1))) for m in (height, width))
        inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
        new = torch.where(inside[:, None], torch.clamp(x + eps * signs(n, channels, 1, 1), low, high), best)
        margins = _margins(scores, new, y)
        better = margins < least
        best = torch.where(better[:, None, None, None], new, best)
        least = torch.where(better, margins, least)
    return best


def _margins(scores: Scores, x: Tensor, y: Tensor) -> Tensor:
    """How far the right class is in front, ``(n,)``."""
    if not len(x):
        return torch.zeros(0, dtype=x.dtype)
    with torch.no_grad():
        found = scores(x)
    right = found.gather(1, y[:, None])
    others = found.scatter(1, y[:, None], -torch.inf).amax(1)
    return right[:, 0] - others

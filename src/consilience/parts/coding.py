"""Gradient coding: who computes which piece of a gradient, in which round, so that it is whole despite stragglers.

n workers; job t is the sum of a gradient over all data, which is cut in chunks that several workers hold. A task is a
sum of chunk gradients with coefficients; its result is one vector. Which tasks a worker does in a round depends on what
has come back until then; a worker that straggles in a round returns nothing of it. Job t is due at the end of round
t + T. The schemes:

    gc    gradient coding: T = 0. Worker i holds the s + 1 chunks i .. i + s (mod n) of n and returns one combination of
          them; any n - s combinations give the sum. Load (s + 1) / n of the data.
    sr    SR-SGC, selective repetition: T = B, s = ceil(B lambda / (W - 1 + B)), B divides W - 1. If fewer than n - s
          returned job t - B, then of those that did not as many as are missing (in order) do it again in round t,
          in the place of job t.
    m     M-SGC, multiplexing: T = W - 2 + B. Each worker has W - 1 mini-chunks of its own (D1), and chunks of B groups,
          each coded with s = lambda (D2). Job t has W - 1 + B slots, slot m in round t + m: first D1 in turn, then for
          group l its combination if the worker's D1 is complete, else the oldest missing one of D1 again.

A pattern of stragglers is (B, W, lambda)-bursty if in each W rounds in a row at most lambda workers straggle, each of
them within B rounds in a row; sr and m decode every job by its deadline for every such pattern, gc for any s stragglers
a round.

Sources: Tandon, Lei, Dimakis, Karampatziakis, "Gradient Coding: Avoiding Stragglers in Distributed Learning", ICML 2017
(gc); Krishnan, Ebrahimi, Khisti, "Sequential Gradient Coding for Straggler Mitigation", ICLR 2023 (sr, m).
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from consilience.core.errors import ConfigError
from consilience.core.streams import philox

Slot = tuple[int, int]
"""Which of a job's tasks of a worker: (group, number); group -1 is D1."""
Key = tuple[int, Slot]
"""A result of a job: (worker, slot)."""


class Task(NamedTuple):
    """A task of a job. terms: chunks and their coefficients."""

    job: int
    slot: Slot
    terms: tuple[tuple[int, float], ...]


@functools.cache
def code(n: int, s: int) -> NDArray[np.float64]:
    """Coefficients ``(n, n)``: row i is what worker i does with the chunks; any n - s rows span the vector of ones.

    Where s + 1 divides n all are 0 or 1 (fractional repetition), so that whole numbers stay exact; else the support of
    row i is i .. i + s, from a drawn matrix with rows that sum to 0 (Tandon et al., algorithm 2).
    """
    if n % (s + 1) == 0:
        groups = np.arange(n) // (s + 1)
        return np.equal.outer(groups, groups).astype(np.float64)
    drawn = philox("gradient code", n, s).standard_normal((s, n))
    drawn[:, -1] = -drawn[:, :-1].sum(1)
    found = np.zeros((n, n))
    for i in range(n):
        own = [(i + k) % n for k in range(s + 1)]
        found[i, own[0]] = 1.0
        found[i, own[1:]] = np.linalg.solve(drawn[:, own[1:]], -drawn[:, own[0]])
    return found


def solve(n: int, s: int, workers: Sequence[int]) -> dict[int, float] | None:
    """Weights with which the results of these workers give the sum of all chunks, or None if there are none."""
    if len(workers) < n - s:
        return None
    rows = code(n, s)
    if n % (s + 1) == 0:
        first: dict[int, int] = {}
        for worker in workers:
            first.setdefault(worker // (s + 1), worker)
        return dict.fromkeys(first.values(), 1.0)
    weights, *_ = np.linalg.lstsq(rows[list(workers)].T, np.ones(n), rcond=None)
    return dict(zip(workers, map(float, weights), strict=True))


@dataclass(frozen=True)
class Scheme(ABC):
    """A way to code. n: workers."""

    n: int

    @property
    @abstractmethod
    def delay(self) -> int:
        """T: job t is due at the end of round t + T."""

    @property
    @abstractmethod
    def sizes(self) -> tuple[float, ...]:
        """The share of the data in each chunk; they sum to 1."""

    @abstractmethod
    def tasks(self, t: int, done: Mapping[int, Collection[Key]]) -> list[list[Task]]:
        """What each worker does in round t (from 0). done: which results of each job have come back."""

    @abstractmethod
    def weights(self, done: Collection[Key]) -> dict[Key, float] | None:
        """Weights with which a job's results give its gradient, or None if they do not."""

    @property
    @abstractmethod
    def load(self) -> float:
        """The most data, as a share of all, that a worker passes in a round."""

    @abstractmethod
    def held(self, worker: int) -> list[int]:
        """The chunks that a worker holds."""


def _coded(job: int, group: int, n: int, s: int, worker: int, first: int) -> Task:
    """A worker's combination of the n chunks from ``first`` on."""
    row = code(n, s)[worker]
    return Task(job, (group, 0), tuple((first + int(c), float(row[c])) for c in np.flatnonzero(row)))


@dataclass(frozen=True)
class Coded(Scheme):
    """gc. s: stragglers that it bears in a round."""

    s: int

    @property
    def delay(self) -> int:
        """None."""
        return 0

    @property
    def sizes(self) -> tuple[float, ...]:
        """n equal ones."""
        return (1 / self.n,) * self.n

    def tasks(self, t: int, done: Mapping[int, Collection[Key]]) -> list[list[Task]]:
        """Each its combination of job t."""
        return [[_coded(t, 0, self.n, self.s, i, 0)] for i in range(self.n)]

    def weights(self, done: Collection[Key]) -> dict[Key, float] | None:
        """Of n - s workers."""
        found = solve(self.n, self.s, sorted(worker for worker, _ in done))
        return None if found is None else {(worker, (0, 0)): w for worker, w in found.items()}

    @property
    def load(self) -> float:
        """(s + 1) / n."""
        return (self.s + 1) / self.n

    def held(self, worker: int) -> list[int]:
        """Those of its row."""
        return [int(chunk) for chunk in np.flatnonzero(code(self.n, self.s)[worker])]


@dataclass(frozen=True)
class Repeating(Coded):
    """sr. burst: B."""

    burst: int

    @property
    def delay(self) -> int:
        """B."""
        return self.burst

    def tasks(self, t: int, done: Mapping[int, Collection[Key]]) -> list[list[Task]]:
        """Job t, or job t - B again."""
        old = t - self.burst
        back = {worker for worker, _ in done.get(old, ())}
        missing = max(0, self.n - self.s - len(back)) if old >= 0 else 0
        again = [worker for worker in range(self.n) if worker not in back][:missing]
        return [[_coded(old if i in again else t, 0, self.n, self.s, i, 0)] for i in range(self.n)]


@dataclass(frozen=True)
class Multiplexed(Scheme):
    """m. burst: B; window: W; most: lambda."""

    burst: int
    window: int
    most: int

    @property
    def delay(self) -> int:
        """W - 2 + B."""
        return self.window - 2 + self.burst

    @property
    def _groups(self) -> int:
        return self.burst if self.most < self.n else 0  # nobody else could make good for all

    @property
    def _unit(self) -> float:
        own, most = self.n * (self.window - 1), self.most + 1
        return 1 / own if not self._groups else most / (self.n * ((self.window - 1) * most + self.burst))

    @property
    def sizes(self) -> tuple[float, ...]:
        """n (W - 1) mini-chunks, then n chunks in each of B groups."""
        own = (self._unit,) * (self.n * (self.window - 1))
        return own + (self._unit / (self.most + 1),) * (self.n * self._groups)

    def tasks(self, t: int, done: Mapping[int, Collection[Key]]) -> list[list[Task]]:
        """A slot of each of the last W - 1 + B jobs."""
        found: list[list[Task]] = []
        for worker in range(self.n):
            slots = [(t - m, m) for m in reversed(range(self.delay + 1)) if t - m >= 0]
            chosen = [self._task(job, m, worker, done.get(job, ())) for job, m in slots]
            found.append([task for task in chosen if task is not None])
        return found

    def _task(self, job: int, m: int, worker: int, done: Collection[Key]) -> Task | None:
        own = self.window - 1
        missing = [k for k in range(own) if (worker, (-1, k)) not in done]
        if m < own or missing:
            k = m if m < own else missing[0]
            return Task(job, (-1, k), ((worker * own + k, 1.0),))
        group = m - own
        if group >= self._groups:
            return None
        return _coded(job, group, self.n, self.most, worker, self.n * own + group * self.n)

    def weights(self, done: Collection[Key]) -> dict[Key, float] | None:
        """All of D1, and of each group enough."""
        found: dict[Key, float] = {(w, (-1, k)): 1.0 for w in range(self.n) for k in range(self.window - 1)}
        if any(key not in done for key in found):
            return None
        for group in range(self._groups):
            part = solve(self.n, self.most, sorted(worker for worker, slot in done if slot[0] == group))
            if part is None:
                return None
            found |= {(worker, (group, 0)): w for worker, w in part.items()}
        return found

    @property
    def load(self) -> float:
        """A slot of each live job."""
        return (self.delay + 1) * self._unit

    def held(self, worker: int) -> list[int]:
        """Its own, and those of its row in each group."""
        own, chunks = self.window - 1, []
        for group in range(self._groups):
            row = np.flatnonzero(code(self.n, self.most)[worker])
            chunks += [self.n * own + group * self.n + int(chunk) for chunk in row]
        return [worker * own + k for k in range(own)] + chunks


def make(kind: str, n: int, stragglers: int, burst: int, window: int) -> Scheme:
    """The scheme ``gc``, ``sr`` or ``m`` for n workers. Raises ConfigError if there is none."""
    if (kind != "m" and stragglers >= n) or stragglers > n:
        raise ConfigError(f"gradient coding for {n} workers cannot bear {stragglers} stragglers; take at most {n - 1}")
    if kind == "gc":
        return Coded(n, stragglers)
    if window < 2 or not 1 <= burst < window:
        raise ConfigError(f"gradient coding: burst={burst} must be from 1 and below window={window}")
    if kind == "m":
        return Multiplexed(n, burst, window, stragglers)
    if (window - 1) % burst:
        raise ConfigError(f"gradient coding 'sr': burst={burst} must divide window - 1 = {window - 1}")
    return Repeating(n, math.ceil(burst * stragglers / (window - 1 + burst)), burst)

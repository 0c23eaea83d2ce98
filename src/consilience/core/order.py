"""The order in which a client's rows are used: easy ones first, hard ones first, or at random, from a growing pool.

    order the rows by their losses;  the pool at local step s is the first g(s) of them;
    rows are drawn from the pool in shuffled passes, and the pool is cut anew after each pass

With n rows, I = b n and T = a K of K local steps: g(s) = I + (n - I) s / T (linear), I + (n - I) sqrt(s / T) (root), or
I until T (step); n from T on, and never fewer than 32 rows. The number of steps and the rows of each are those of
training without an order, so that both cost the same, but for the pass that finds the losses.

Source: Vahidian, Kadaveru, Baek, Wang, Kungurtsev, Chen, Shah, Lin, "When Do Curricula Work in Federated Learning?",
ICCV 2023. Deviations: K is the number of steps that training has anyway; a batch that a pass over the pool cannot fill
goes on with the next pass. The paper's order by an expert's losses is not offered.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from consilience.core.errors import ConfigError, nearest
from consilience.core.federation import Split
from consilience.core.model import Weights

if TYPE_CHECKING:
    from consilience.core.site import Site

KINDS = ("random", "curriculum", "anti")
SCORES = ("global", "local", "both")
PACINGS = ("linear", "root", "step")
LEAST = 32
"""Rows in a pool, if there are so many."""
USAGE = "write random, or KIND[:SCORE][:PACING][:A:B], as in curriculum:global:linear:0.8:0.2"


class Order(NamedTuple):
    """kind: "random", "curriculum" (small losses first) or "anti" (large ones first). score: whose loss: of the model
    that training begins from ("global"), of the one with which the client's last training ended ("local"), or the sum
    of both. pacing, reach, begin: how the pool grows, when it is whole (a), and where it begins (b)."""

    kind: str
    score: str
    pacing: str
    reach: float
    begin: float

    @property
    def plain(self) -> bool:
        """Whether all rows are in the pool from the beginning, so that their order is of no matter."""
        return self.begin >= 1

    @property
    def remembers(self) -> bool:
        """Whether a client must keep the model that its last training ended with."""
        return not self.plain and self.kind != "random" and self.score != "global"

    def pool(self, n: int, total: int, least: int = LEAST) -> Callable[[float], int]:
        """How many of ``n`` rows are in the pool at each of ``total`` steps."""
        first, whole = self.begin * n, self.reach * total

        def size(step: float) -> int:
            if step >= whole:
                return n
            share = {"linear": step / whole, "root": math.sqrt(step / whole), "step": 0.0}[self.pacing]
            return min(n, max(int(first + (n - first) * share), least))

        return size

    def sorted(self, losses: Tensor) -> Tensor:
        """Row numbers in order of their losses ``(n,)``; equal ones as they stand, from the other end in "anti"."""
        ranks = losses.argsort(stable=True)
        return ranks.flip(0) if self.kind == "anti" else ranks


def parse(text: str) -> Order:
    """The order that ``text`` names. Raises ConfigError."""
    kind, *parts = text.split(":")
    if kind not in KINDS:
        raise ConfigError(f"row_order={text}: unknown order '{kind}'{nearest(kind, KINDS)}; {USAGE}")
    if text == "random":
        return Order("random", "global", "linear", 1.0, 1.0)
    score = parts.pop(0) if parts and parts[0] in SCORES and kind != "random" else "global"
    pacing = parts.pop(0) if parts and parts[0] in PACINGS else "linear"
    try:
        reach, begin = (float(part) for part in parts or ("0.8", "0.2"))
    except ValueError:
        raise ConfigError(f"row_order={text}: {USAGE}") from None
    if not 0 < reach < math.inf or not 0 < begin <= 1:
        raise ConfigError(f"row_order={text}: A, the share of the steps, is above 0, and B, of the rows, in (0, 1]")
    return Order(kind, score, pacing, reach, begin)


def paced(rng: np.random.Generator, ranked: Tensor, pool: Callable[[int], int], batch_size: int) -> Iterator[Tensor]:
    """Row numbers of batches without end, of the sizes that whole epochs have. ``ranked``: row numbers in order. With
    a pool of all rows these are the batches of plain training, bit for bit."""
    n = len(ranked)
    sizes = [min(batch_size, n - start) for start in range(0, n, batch_size)]
    left = ranked[:0]
    for step in itertools.count():
        batch = left[: sizes[step % len(sizes)]]
        left = left[len(batch) :]
        while len(batch) < sizes[step % len(sizes)]:
            rows = ranked[: pool(step)].sort().values  # in the order in which they stand: shuffling does the rest
            left = rows[torch.from_numpy(rng.permutation(len(rows)))]
            more = sizes[step % len(sizes)] - len(batch)
            batch, left = torch.cat([batch, left[:more]]), left[more:]
        yield batch


def losses(site: Site, weights: Any, model: Any, score: str) -> Tensor:
    """Each training row's loss, ``(n,)`` float64: of what training begins from, of what the last one ended with (the
    former, where there was none), or both together."""
    if not isinstance(weights, Weights) or site.task.kind == "operator":
        raise ConfigError(
            f"{site.method.name}: rows cannot be ordered by a loss where several models, or none, are trained by one; "
            "use row_order=random"
        )
    last = weights if site.before is None else site.before
    judges = {"global": [weights], "local": [last], "both": [weights, last]}[score]

    def of(module: nn.Module, rows: Split) -> Tensor:
        return site.task.losses(module(rows.x), rows.y).double()

    return torch.stack([torch.cat(site.map(of, judge, name=model)) for judge in judges]).sum(0)

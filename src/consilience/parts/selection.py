"""Who of a round's clients train: those on whose rows the model does well already first, or badly first, from a growing
pool.

Everybody who was asked for the round gets the global model and answers with its mean loss on the client's own rows; the
server orders them by it, cuts the pool, and draws COUNT of the pool at random, who train. With m clients asked in round
r (from 0), the pool has g(r) of them: from b m at first to all from round ROUNDS on, as in
:mod:`consilience.core.order`, and never fewer than COUNT.

Source: the client curriculum of Vahidian, Kadaveru, Baek, Wang, Kungurtsev, Chen, Shah, Lin, "When Do Curricula Work in
Federated Learning?", ICCV 2023, whose answers and downloads are counted here. Deviations: losses are asked for in every
round, not only when a pool has been used up; who is asked is up to ``participation`` (1.0: everybody, as there).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from consilience.core import order
from consilience.core.errors import ConfigError, nearest
from consilience.core.messages import Reply, Stat
from consilience.core.model import Weights
from consilience.core.site import Host, Site
from consilience.core.tree import record

USAGE = "write random, or KIND:COUNT[:PACING][:ROUNDS:B], as in curriculum:10:linear:20:0.4"


@record
class Difficulty(NamedTuple):
    """The model's mean loss on a client's rows, ``()`` float64."""

    train_loss: Stat


@dataclass(frozen=True)
class Selection:
    """count: who train. how: the order and the pool. rounds: until everybody is in it."""

    count: int
    how: order.Order
    rounds: float

    def answer(self, site: Site, model: Weights) -> Difficulty:
        """What a client says."""
        return Difficulty(order.losses(site, model, "", "global").mean())

    def choose(self, host: Host, replies: Sequence[Reply]) -> list[int]:
        """The clients that train, ascending."""
        rng, n = host.rng("selection"), len(replies)
        if self.how.kind == "random":
            ranked = torch.from_numpy(rng.permutation(n))
        else:
            ranked = self.how.sorted(torch.stack([reply.update.train_loss for reply in replies]))
        pool = ranked[: self.how.pool(n, 1, self.count)(host.version / self.rounds)].tolist()
        drawn = pool if len(pool) <= self.count else rng.choice(pool, self.count, replace=False).tolist()
        return sorted(replies[i].job.client for i in drawn)


def parse(text: str) -> Selection | None:
    """The selection that ``text`` names; None for everybody who is asked. Raises ConfigError."""
    if text == "random":
        return None
    kind, *parts = text.split(":")
    if kind not in order.KINDS:
        raise ConfigError(f"selection={text}: unknown selection '{kind}'{nearest(kind, order.KINDS)}; {USAGE}")
    try:
        count = int(parts.pop(0))
        pacing = parts.pop(0) if parts and parts[0] in order.PACINGS else "linear"
        rounds, begin = (float(part) for part in parts or ("20", "0.4"))
    except (ValueError, IndexError):
        raise ConfigError(f"selection={text}: {USAGE}") from None
    if count < 1 or not 0 < rounds < float("inf") or not 0 < begin <= 1:
        raise ConfigError(f"selection={text}: COUNT is at least 1, ROUNDS above 0, and B in (0, 1]")
    return Selection(count, order.Order(kind, "global", pacing, 1.0, begin), rounds)

"""Who is drawn when a schedule wants to start clients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from consilience.core.events import Instant, View, draw_cohort
from consilience.core.method import Method
from consilience.core.setup import Setup
from consilience.core.streams import philox
from consilience.core.tree import Tree


class Draw:
    """A number of clients that are online and not busy, of all or among those given, for one decision of a schedule.
    started: jobs begun for this round. sampled: those that a release's rule draws, whatever their number; None where
    there is no such rule."""

    def __init__(self, setup: Setup, method: Method, server: Tree, view: View, seed: int, started: int) -> None:
        self._setup, self._method, self._server, self._view = setup, method, server, view
        self._seed, self._started = seed, started
        self._drawn: list[int] = []
        self.sampled = None if setup.release is None else setup.release.draw(view.version, view.clients)

    def __call__(self, size: int, among: Sequence[int] | None = None) -> list[int]:
        """Their ids, in ascending order."""
        if self.sampled is not None:
            return list(self.sampled)
        view = self._view
        chosen = self._method.select(self._server, view) if among is None else None
        if chosen is not None:
            wanted = np.array(sorted(int(c) for c in chosen if int(c) not in view.busy), dtype=np.int64)
            return [int(c) for c in self._online(wanted)]
        rng = philox(self._seed, "cohort", view.version, self._started, *self._drawn)
        self._drawn.append(size)  # another draw of the same decision is another stream
        if among is None and type(self._setup.clock) is Instant:
            return draw_cohort(rng, view.clients, size, view.busy)  # costs what is drawn, not what there is
        idle = self._online(idle_of(view.clients, view.busy))
        return draw_cohort(rng, idle if among is None else idle[np.isin(idle, list(among))], size)

    def _online(self, clients: np.ndarray) -> np.ndarray:
        here = self._setup.clock.online(clients, self._view.time, self._view.version)
        return clients if here.all() else clients[here]


def idle_of(clients: np.ndarray, busy: frozenset[int]) -> np.ndarray:
    """The clients that are not busy."""
    return clients if not busy else clients[~np.isin(clients, list(busy))]

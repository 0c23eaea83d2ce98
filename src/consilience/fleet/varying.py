"""Topologies over time: who exchanges with whom in each round."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from consilience.core.errors import ConfigError
from consilience.core.streams import philox
from consilience.fleet.topology import (
    TOLERANCE,
    Graph,
    Weights,
    components,
    drawn_anew,
    mixing,
    neighbours,
    spectral_gap,
    weigh,
)

CHANGING = ("onepeer", "matching", "matching:NAME", "anew:NAME", "pull:CHANCE")
"""Topologies that change from round to round."""
ROUNDS = 20
"""Rounds of a topology that is drawn which its summary looks at."""


class Part(Protocol):
    """Weights of rounds, by nodes 0 .. n - 1. period: rounds after which they begin anew; 0 if never."""

    @property
    def period(self) -> int: ...

    def weights(self, round: int) -> Weights:
        """Of a round, counted from 0."""
        ...


@dataclass(frozen=True)
class Static:
    """The same weights in every round."""

    same: Weights
    period: int = 1

    def weights(self, round: int) -> Weights:
        """These."""
        return self.same


@dataclass(frozen=True)
class OnePeer:
    """The one-peer exponential graph: in round t, node i averages itself with node i + 2^(t mod tau), of n in a circle,
    tau = ceil(log2 n). Where n is a power of 2, tau rounds together are the exact mean.

    Source: Ying, Yuan, Chen, Hu, Pan, Yin, "Exponential Graph is Provably Efficient for Decentralized Deep Training",
    NeurIPS 2021.
    """

    n: int

    @property
    def period(self) -> int:
        """tau."""
        return max(1, (self.n - 1).bit_length())

    def weights(self, round: int) -> Weights:
        """1/2 and 1/2."""
        hop = 2 ** (round % self.period)
        return {i: _half(i, (i + hop) % self.n) for i in range(self.n)}


@dataclass(frozen=True)
class Matching:
    """In each round the edges of a graph are gone through in random order, and two nodes that are both still free
    average their models, the others keep theirs: gossip between pairs, as many as find each other at once (Boyd, Ghosh,
    Prabhakar, Shah, "Randomized Gossip Algorithms", IEEE Transactions on Information Theory 2006)."""

    graph: Graph
    seed: int
    period: int = 0

    def weights(self, round: int) -> Weights:
        """1/2 and 1/2 in a pair."""
        edges = np.array([(i, j) for i, near in enumerate(self.graph) for j in sorted(near) if i < j])
        mate = {i: i for i in range(len(self.graph))}
        for a, b in philox(self.seed, "topology", "matching", round).permutation(edges).tolist():
            if mate[a] == a and mate[b] == b:
                mate[a], mate[b] = b, a
        return {i: _half(i, j) for i, j in mate.items()}


@dataclass(frozen=True)
class Anew:
    """A graph that is drawn anew in each round, and need not be connected in any."""

    name: str
    n: int
    rule: str
    seed: int
    period: int = 0

    def weights(self, round: int) -> Weights:
        """By the rule."""
        return weigh(drawn_anew(self.name, self.n, self.seed, round), self.rule)


@dataclass(frozen=True)
class Pull:
    """In each round every node averages itself, with chance ``chance``, with one other that it draws. Rows sum to 1 and
    columns need not, so the mean of all models moves (Zhu et al., ICLR 2026, "random")."""

    n: int
    chance: float
    seed: int
    period: int = 0

    def weights(self, round: int) -> Weights:
        """1/2 and 1/2, or itself alone."""
        rng = philox(self.seed, "topology", "pull", round)
        asks, peers = rng.random(self.n) < self.chance, rng.integers(max(1, self.n - 1), size=self.n)
        return {
            i: _half(i, int(j + (j >= i)) % self.n if yes else i)
            for i, (yes, j) in enumerate(zip(asks.tolist(), peers.tolist(), strict=True))
        }


def _symmetric(part: Part) -> bool:
    """Matchings and graphs that are drawn always are."""
    if isinstance(part, Static):
        same = part.same
        return all(abs(same[j].get(i, 0.0) - w) <= TOLERANCE for i, row in same.items() for j, w in row.items())
    return not isinstance(part, Pull) and not (isinstance(part, OnePeer) and part.n > 2)


def _half(i: int, j: int) -> dict[int, float]:
    return dict.fromkeys(sorted((i, j)), 0.5) if i != j else {i: 1.0}


@dataclass(frozen=True)
class Topology:
    """Mixing weights of each round among the clients ``ids``, as ``--topology`` says (see :func:`parts`).

    rule: for graphs without weights. seed: of graphs that are drawn. Raises ConfigError or DataError.
    """

    name: str
    ids: tuple[int, ...]
    rule: str = "metropolis"
    seed: int = 0
    plan: Sequence[tuple[int, Part]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        plan = []
        for rounds, part in parts(self.name, len(self.ids), self.rule, self.seed):
            part.weights(0)  # refused now, if it cannot be drawn
            plan.append((rounds, Static(self._named(part.weights(0))) if isinstance(part, Static) else part))
        object.__setattr__(self, "plan", plan)

    @property
    def static(self) -> bool:
        """Whether all rounds have the same weights."""
        return len(self.plan) == 1 and isinstance(self.plan[0][1], Static)

    @property
    def balanced(self) -> bool:
        """Whether columns of weights sum to 1 in all rounds, as rows do, so that mixing keeps the mean."""
        return not any(isinstance(part, Pull) for _, part in self.plan)

    @property
    def symmetric(self) -> bool:
        """Whether two nodes weigh each other alike in all rounds. Then columns sum to 1 whoever is absent, too."""
        return all(_symmetric(part) for _, part in self.plan)

    def at(self, round: int) -> Weights:
        """The weights of a round, counted from 0, by client and neighbour, itself included."""
        ends = list(itertools.accumulate(rounds for rounds, _ in self.plan))
        _, part = self.plan[bisect.bisect_right(ends, round % ends[-1])]
        found = part.weights(round)
        return found if isinstance(part, Static) else self._named(found)

    def _named(self, weights: Weights) -> dict[int, Mapping[int, float]]:
        return {self.ids[i]: {self.ids[j]: w for j, w in row.items()} for i, row in weights.items()}


def parts(text: str, n: int, rule: str, seed: int) -> list[tuple[int, Part]]:
    """What ``--topology`` names, as rounds and weights, of which the last is followed by the first: one topology, or
    several apart by commas, each for one round or, written ``NAME*ROUNDS``, for several."""
    if Path(text).exists():
        return [(1, _part(text, n, rule, seed))]
    found = []
    for piece in text.split(","):
        name, star, rounds = piece.partition("*")
        if star and not (rounds.isdigit() and int(rounds) > 0):
            raise ConfigError(f"--topology {text}: '{piece}': write NAME*ROUNDS, ROUNDS a whole number of at least 1")
        found.append((int(rounds) if star else 1, _part(name, n, rule, seed)))
    return found


def _part(name: str, n: int, rule: str, seed: int) -> Part:
    kind, colon, rest = name.partition(":")
    if name == "onepeer":
        return OnePeer(n)
    if kind == "matching":
        return Matching(neighbours(rest if colon else "complete", n, seed), seed)
    if kind == "anew":
        return Anew(rest, n, rule, seed)
    if kind == "pull":
        try:
            chance = float(rest)
        except ValueError:
            chance = math.nan
        if not 0 <= chance <= 1:
            raise ConfigError(f"--topology {name}: write pull:CHANCE, a chance from 0 to 1")
        return Pull(n, chance, seed)
    return Static(mixing(name, n, rule, seed))


def summary(name: str, n: int, rule: str = "metropolis", seed: int = 0) -> dict[str, object]:
    """A topology in numbers: ``topology``, ``nodes``, ``edges``, ``least_degree``, ``most_degree`` (neighbours in one
    round), ``parts`` and ``spectral_gap`` (for one round). Where it changes, also ``rounds``: how many of them, from
    the first, this is of; edges and parts are then of all of them together."""
    topology = Topology(name, tuple(range(n)), rule, seed)
    periods = [part.period for _, part in topology.plan]
    whole = sum(rounds for rounds, _ in topology.plan)
    rounds = ROUNDS if 0 in periods else min(math.lcm(whole, *periods), 10 * ROUNDS)
    weights = [topology.at(round) for round in range(rounds)]
    around: Graph = [set() for _ in range(n)]
    for each in weights:
        for i, row in each.items():
            for j in set(row) - {i}:
                around[i].add(j)
                around[j].add(i)
    degrees = [len(row) - (i in row) for each in weights for i, row in each.items()]
    return {
        "topology": name, "nodes": n, "edges": sum(map(len, around)) // 2, "least_degree": min(degrees),
        "most_degree": max(degrees), "parts": components(around), "spectral_gap": spectral_gap(*weights),
        **({} if topology.static else {"rounds": rounds}),
    }  # fmt: skip

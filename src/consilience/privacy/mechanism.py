"""Who takes part and what that costs: a sampler and its accountant in one object, so that they always match.

Noise is told as the noise multiplier z: to a sum of vectors of norm at most C, noise of standard deviation z C is
added. Every epsilon here is an upper bound. The unit of privacy is a client with all its rows; how many clients there
are (N) and how many a round asks for (m) are public.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from scipy.optimize import brentq  # type: ignore[import-untyped]

from consilience.core.errors import ConfigError, nearest
from consilience.core.streams import philox

GRAIN = 2e-3
"""Grain of privacy losses in the numerical accountant, which rounds them up."""
ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 384, 512, 1024)
"""Renyi orders that are tried."""
FEW = (*range(2, 33), 36, 40, 48, 56, 64, 80, 96, 128)
"""Those for sampling without replacement, whose terms grow with the square of the order."""
MOST = 1e4
"""The largest noise multiplier that is looked for."""


def accounting(module: str) -> Any:
    """A module of dp-accounting. Raises ConfigError where it is not installed."""
    try:
        found = importlib.import_module(f"dp_accounting{module}")
    except ImportError:
        raise ConfigError("differential privacy needs dp-accounting: pip install 'consilience[privacy]'") from None
    logging.getLogger("absl").setLevel(logging.ERROR)
    return found


@dataclass(frozen=True)
class Mechanism(ABC):
    """Draws the clients of each round and says what releases of noised sums cost.

    clients: N. cohort: m, clients of a round (expected, where their number is random). rounds: planned. seed: of draws.
    """

    clients: int
    cohort: int
    rounds: int
    seed: int = 0

    name: ClassVar[str] = ""
    about: ClassVar[str] = ""

    @abstractmethod
    def draw(self, version: int, clients: np.ndarray) -> list[int]:
        """The clients of a round, ascending. The same version always gives the same ones."""

    @abstractmethod
    def epsilon(self, noise: float, releases: int, delta: float, again: int = 0) -> float:
        """What ``releases`` rounds cost at this delta. again: releases beside, of rounds that had been released
        already with other numbers (as after a crash); their clients are the same, so nothing hides who they are."""

    def solve(self, epsilon: float, delta: float) -> float:
        """The least noise multiplier, to three digits and never too small, with which all planned rounds cost no more
        than ``epsilon``. Raises ConfigError if even the greatest is not enough."""

        def excess(log_noise: float) -> float:
            cost = self.epsilon(math.exp(log_noise), self.rounds, delta)
            return math.log(max(cost, 1e-12) / epsilon) if cost < math.inf else 100.0

        if excess(math.log(MOST)) > 0:
            raise ConfigError(f"--epsilon {epsilon:g}: no noise up to {MOST:g} is enough for {self.rounds} rounds")
        low = high = min(self._guess(epsilon, delta), MOST)
        while excess(math.log(high)) > 0:
            low, high = high, min(high * 1.5, MOST)
        while low == high or excess(math.log(low)) <= 0:
            low, high = low / 1.5, min(high, low)
            if low < 1e-3:
                return high
        root = math.exp(brentq(excess, math.log(low), math.log(high), xtol=5e-4))
        return next(noise for k in range(50) if excess(math.log(noise := root * 1.0005**k)) <= 0)

    def _guess(self, epsilon: float, delta: float) -> float:
        """Somewhere to begin looking: the composition of all rounds if each had a normal privacy loss."""
        sigma = _sigma(epsilon, delta)
        q = self.cohort / self.clients
        return max(sigma * math.sqrt(self.rounds) * q, 0.5)


@dataclass(frozen=True)
class Poisson(Mechanism):
    """Each client takes part in each round with probability q = m / N, independently; neighbours differ by a client.

    Nobody may take part; the round is then released all the same. Accounted with privacy loss distributions (Koskela et
    al., 2020; Doroshenko et al., 2022) by dp-accounting, with q = 1 in closed form (Balle and Wang, 2018).
    """

    name = "poisson"
    about = "each client is drawn by itself with probability cohort / clients; privacy loss distributions"

    @property
    def q(self) -> float:
        """The chance of each client in each round."""
        return self.cohort / self.clients

    def draw(self, version: int, clients: np.ndarray) -> list[int]:
        """A coin for each client."""
        coins = philox(self.seed, "privacy-poisson", version).random(len(clients))
        return [int(client) for client in clients[coins < self.q]]

    def epsilon(self, noise: float, releases: int, delta: float, again: int = 0) -> float:
        """By privacy loss distributions."""
        if self.q >= 1:
            return gaussian(noise, releases + again, delta)
        if not releases + again:
            return 0.0
        if noise == 0:
            return math.inf
        loss = _composed(self.q, noise, releases, again)
        return max(0.0, float(loss.get_epsilon_for_delta(delta)))

    def renyi(self, noise: float, releases: int, delta: float) -> float:
        """The looser bound by Renyi divergences (Mironov, Talwar, Zhang, 2019)."""
        dp = accounting("")
        event = dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(self.q, dp.GaussianDpEvent(noise)), releases)
        return float(accounting(".rdp").RdpAccountant(list(ORDERS)).compose(event).get_epsilon(delta))


@dataclass(frozen=True)
class Fixed(Mechanism):
    """Exactly m of N clients, uniformly without replacement; neighbours have one client replaced by another.

    A replaced client moves a sum by up to 2 C, so noise z is z / 2 of the sensitivity. Accounted by Renyi divergences
    (Wang, Balle, Kasiviswanathan, AISTATS 2019, theorem 27) by dp-accounting.
    """

    name = "fixed"
    about = "exactly the cohort is drawn, without replacement; Renyi divergences, one client replaced"

    def draw(self, version: int, clients: np.ndarray) -> list[int]:
        """A subset."""
        rng = philox(self.seed, "privacy-fixed", version)
        return [int(client) for client in np.sort(rng.choice(clients, min(self.cohort, len(clients)), replace=False))]

    def epsilon(self, noise: float, releases: int, delta: float, again: int = 0) -> float:
        """By Renyi divergences; the one in closed form where everybody takes part."""
        if self.cohort >= self.clients:
            return gaussian(noise / 2, releases + again, delta)
        if not releases + again:
            return 0.0
        if noise == 0:
            return math.inf
        sampled = _sampled_renyi(self.clients, self.cohort, noise / 2) * releases
        plain = np.array(FEW) / 2 / (noise / 2) ** 2 * again
        found, _ = accounting(".rdp").compute_epsilon(list(FEW), list(sampled + plain), delta)
        return float(found)

    def _guess(self, epsilon: float, delta: float) -> float:
        return 2 * super()._guess(epsilon, delta)


@dataclass(frozen=True)
class Tree(Mechanism):
    """No sampling is relied on: clients take part once in an epoch, in any order, and noise is that of a binary tree
    (DP-FTRL: Kairouz, McMahan, Song, Thakkar, Thakurta, Xu, ICML 2021; trees: Dwork et al., 2010; Chan et al., 2011).

    An epoch is floor(N / m) rounds, in which nobody is asked twice; its rounds are the leaves of a tree whose nodes are
    noised sums of the updates below them, and each round's sum is the difference of two prefix sums put together from
    nodes. A client is below at most floor(log2(rounds of the epoch)) + 1 nodes, and every epoch has a tree of its own,
    so all that is released is one Gaussian mechanism with squared sensitivity C^2 times that, summed over epochs: exact
    by Balle and Wang (2018). Neighbours: a client's updates are replaced by zeros. Prefix sums are estimated in the
    simple way, not in Honaker's.
    """

    name = "tree"
    about = "everybody once in an epoch, in a random order that need not be secret; tree aggregation, exact Gaussian"

    @property
    def epoch(self) -> int:
        """Rounds of an epoch."""
        return max(1, self.clients // self.cohort)

    def draw(self, version: int, clients: np.ndarray) -> list[int]:
        """The next ones of the epoch's order."""
        epoch, at = divmod(version, self.epoch)
        order = philox(self.seed, "privacy-order", epoch).permutation(clients)
        return sorted(int(client) for client in order[at * self.cohort : (at + 1) * self.cohort])

    def nodes(self, releases: int) -> int:
        """The most nodes that a client can be below, after so many rounds."""
        whole, rest = divmod(releases, self.epoch)
        return whole * self.epoch.bit_length() + rest.bit_length()

    def epsilon(self, noise: float, releases: int, delta: float, again: int = 0) -> float:
        """In closed form."""
        return gaussian(noise, self.nodes(releases) + again * self.epoch.bit_length(), delta)

    def _guess(self, epsilon: float, delta: float) -> float:
        sigma = _sigma(epsilon, delta)
        return max(sigma * math.sqrt(self.nodes(self.rounds)), 0.5)


MECHANISMS: dict[str, type[Mechanism]] = {cls.name: cls for cls in (Poisson, Fixed, Tree)}
"""Mechanisms by name."""


def make(name: str, clients: int, cohort: int, rounds: int, seed: int = 0) -> Mechanism:
    """A mechanism by name. Raises ConfigError."""
    if name not in MECHANISMS:
        raise ConfigError(f"--dp-mechanism '{name}': poisson, fixed or tree{nearest(name, MECHANISMS)}")
    return MECHANISMS[name](clients, min(cohort, clients), rounds, seed)


@functools.lru_cache(64)
def solved(mechanism: Mechanism, epsilon: float, delta: float) -> float:
    """:meth:`Mechanism.solve`, once."""
    return mechanism.solve(epsilon, delta)


def _sigma(epsilon: float, delta: float) -> float:
    """The noise multiplier of one Gaussian mechanism."""
    with np.errstate(divide="ignore"):
        return float(accounting("").get_sigma_gaussian(epsilon, delta))


@functools.lru_cache(1024)
def gaussian(noise: float, times: int, delta: float) -> float:
    """The exact epsilon of ``times`` Gaussian mechanisms of this noise multiplier, one after another: they are one of
    noise / sqrt(times) (Balle and Wang, ICML 2018)."""
    if not times:
        return 0.0
    if noise == 0:
        return math.inf
    with np.errstate(divide="ignore"):  # the logarithm of a delta of 0
        return float(accounting("").get_epsilon_gaussian(noise / math.sqrt(times), delta))


@functools.lru_cache(64)
def _loss(q: float, noise: float) -> Any:
    losses = accounting(".pld.privacy_loss_distribution")
    return losses.from_gaussian_mechanism(noise, sampling_prob=q, value_discretization_interval=GRAIN)


@functools.lru_cache(64)
def _composed(q: float, noise: float, releases: int, again: int) -> Any:
    whole = _loss(q, noise).self_compose(releases) if releases else None
    if again:
        more = _loss(1.0, noise).self_compose(again)
        whole = more if whole is None else whole.compose(more)
    return whole


@functools.lru_cache(64)
def _sampled_renyi(clients: int, cohort: int, noise: float) -> Any:
    dp = accounting("")
    event = dp.SampledWithoutReplacementDpEvent(clients, cohort, dp.GaussianDpEvent(noise))
    relation = dp.NeighboringRelation.REPLACE_ONE
    accountant = accounting(".rdp").RdpAccountant(list(FEW), relation).compose(event)
    return np.array(accountant._rdp)

"""An attacker who knows all but one client's presence: what it proves is never more than epsilon, and it shows bugs.

The canary plays against the release itself. Its scores are simple ones: another attacker may prove more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import beta

from consilience.core.messages import DeltaUpdate, Job, Reply
from consilience.core.streams import philox
from consilience.privacy import central
from consilience.privacy.central import Central, State
from consilience.privacy.clip import Clip
from consilience.privacy.ledger import Ledger
from consilience.privacy.mechanism import Poisson

DELTA = 1e-5
IDS = np.arange(10)


def lower_bound(present: np.ndarray, absent: np.ndarray, delta: float) -> float:
    """Epsilon that two samples of scores prove, at 99.9 % (Clopper and Pearson), by a threshold that is chosen on one
    half and judged on the other."""
    half = len(present) // 2
    best, at = -math.inf, 0.0
    for threshold in np.quantile(np.concatenate([present[:half], absent[:half]]), np.linspace(0.005, 0.995, 199)):
        tpr, fpr = np.mean(present[:half] > threshold), np.mean(absent[:half] > threshold)
        value = math.log(max(tpr - delta, 1e-9) / (fpr + 5 / half))
        if value > best:
            best, at = value, float(threshold)
    hits, wrong, n = int((present[half:] > at).sum()), int((absent[half:] > at).sum()), len(present) - half
    low = beta.ppf(0.0005, hits, n - hits + 1) if hits else 0.0
    high = beta.ppf(0.9995, wrong + 1, n - wrong) if wrong < n else 1.0
    return math.log(max(low - delta, 1e-12) / high)


def release(mechanism: Poisson, noise: float, kind: type[Central] = Central) -> Central:
    shape = {"delta": {"w": torch.zeros(1)}, "buffers": {}}
    weights = {"delta": 1 / mechanism.cohort, "buffers": 0.0}
    return kind(DeltaUpdate, mechanism, Clip(), noise, DELTA, weights, shape, Ledger(), "")


def reply(value: float) -> Reply:
    return Reply(Job(0, 0, 1, 0, 0, 0), DeltaUpdate({"w": torch.tensor([value])}, {}), 1, 0, 0, 0, 0.0, math.nan)


def play(
    made: Central, trials: int, score: Callable[[np.ndarray], float], sends: Callable[[int], float], present: bool
) -> np.ndarray:
    """Scores of runs in which client 0 takes part where it is drawn, if it is there. All others send 0."""
    scores = []
    for trial in range(trials):
        mechanism = dataclasses.replace(made.mechanism, seed=trial)
        one = dataclasses.replace(made, mechanism=mechanism, secret=f"{present} {trial}", ledger=Ledger())
        seen, state = [], State(1.0)
        for version in range(mechanism.rounds):
            there = present and 0 in mechanism.draw(version, IDS)
            update, state, *_ = one([reply(sends(version))] if there else [], [], version, state)
            seen.append(float(update.delta["w"]) * mechanism.cohort)
        scores.append(score(np.array(seen)))
    return np.array(scores)


def proved(made: Central, trials: int = 2000, size: float = 1.0) -> float:
    """By a client that sends ``size`` in every round."""
    both = [play(made, trials, np.sum, lambda version: size, present) for present in (True, False)]
    return lower_bound(both[0], both[1], DELTA)


ALL = Poisson(10, 10, 2)
TOLD = ALL.epsilon(2.0, 2, DELTA)


def test_what_is_proved_is_less_than_what_is_told() -> None:
    assert 0.4 < proved(release(ALL, 2.0), size=8.0) < TOLD


def test_missing_clipping_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(central, "clipped", lambda vector, clip, norm: (list(vector), True))
    assert proved(release(ALL, 2.0), size=16.0) > TOLD


class Half(Central):
    """Half the noise."""

    @property
    def multiplier(self) -> float:
        return self.noise / 2


def test_half_the_noise_is_found() -> None:
    """At a delta at which 500 runs can tell the two apart: told 0.9, and half the noise costs 4.6."""
    told = ALL.epsilon(1.0, 2, 0.3)
    for kind, found in ((Half, True), (Central, False)):
        both = [play(release(ALL, 1.0, kind), 1000, np.sum, lambda version: 1.0, there) for there in (True, False)]
        assert (lower_bound(both[0], both[1], 0.3) > told) == found


class Reused(Central):
    """The same noise in every round."""

    def _key(self, version: int, sums: central.Fields, short: float, state: State) -> str:
        return "always"


def test_reused_noise_is_found() -> None:
    """A client that sends in the first round only: the second tells the noise."""

    def difference(seen: np.ndarray) -> float:
        return float(seen[0] - seen[1])

    for kind, found in ((Reused, True), (Central, False)):
        made = release(ALL, 2.0, kind)
        both = [play(made, 1000, difference, lambda version: float(version == 0), there) for there in (True, False)]
        assert (lower_bound(both[0], both[1], DELTA) > TOLD) == found


class Shuffled(Poisson):
    """Batches of a shuffle, accounted as if they were Poisson's."""

    def draw(self, version: int, clients: np.ndarray) -> list[int]:
        order = philox(self.seed, "shuffle").permutation(clients)
        return [int(c) for c in order[version * self.cohort : (version + 1) * self.cohort]]


def test_shuffling_is_no_poisson_sampling() -> None:
    """With ten rounds of a tenth, Poisson misses a client with chance 0.35 and a shuffle never: at delta 0.7 the one
    costs nothing, however little the noise."""
    assert Poisson(10, 1, 10).epsilon(0.2, 10, 0.7) == 0
    for kind, found in ((Shuffled, True), (Poisson, False)):
        made = release(kind(10, 1, 10), 0.2)
        both = [play(made, 200, np.max, lambda version: 1.0, there) for there in (True, False)]
        assert (lower_bound(both[0], both[1], 0.7) > 0) == found

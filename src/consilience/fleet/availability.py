"""When clients can be reached: always, by coins, in periods of on and off, by time of day, or as a trace says."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from consilience.core.errors import ConfigError, DataError, nearest
from consilience.core.streams import philox
from consilience.fleet.device import client_id, number, read_rows

NAMES = ("always", "bernoulli:P", "markov:ON:OFF", "diurnal")
DAY = 86400.0
SLOT = 60.0
"""Seconds after which a client that could not be reached throws its coin again."""


class Availability(ABC):
    """When clients are online. Answers depend on the arguments alone."""

    @abstractmethod
    def online(self, clients: np.ndarray, time: float, version: int) -> np.ndarray:
        """Which of these clients are online, as booleans."""

    @abstractmethod
    def returns(self, client: int, time: float, version: int) -> float:
        """The first moment from ``time`` on at which the client is online; inf if never."""

    @abstractmethod
    def leaves(self, client: int, time: float) -> float:
        """When a client that is online at ``time`` goes offline, in the middle of a job if it has one."""

    def offline(self, client: int, until: float) -> list[tuple[float, float]]:
        """The periods before ``until`` in which the client is offline."""
        found: list[tuple[float, float]] = []
        now = 0.0
        while now < until and len(found) < 1000:
            back = self.returns(client, now, 0)
            if back > now:
                found.append((now, min(back, until)))
            now = self.leaves(client, back) if back < until else until
        return found


class Always(Availability):
    """Everybody, at any time."""

    def online(self, clients: np.ndarray, time: float, version: int) -> np.ndarray:
        """All."""
        return np.ones(len(clients), dtype=bool)

    def returns(self, client: int, time: float, version: int) -> float:
        """Now."""
        return time

    def leaves(self, client: int, time: float) -> float:
        """Never."""
        return math.inf


class Coins(Availability):
    """Every client throws a coin for each server update, and again each minute until the next.

    rates: ``(n,)`` chances of being online. A job that has begun is brought to its end.
    """

    def __init__(self, rates: np.ndarray, seed: int) -> None:
        self.rates, self.seed = rates, seed
        self._known: dict[tuple[int, int], np.ndarray] = {}

    def _thrown(self, version: int, slot: int) -> np.ndarray:
        if (version, slot) not in self._known:
            if len(self._known) >= 256:
                self._known.clear()
            thrown = philox(self.seed, "available", version, slot).random(len(self.rates)) < self.rates
            self._known[version, slot] = thrown
        return self._known[version, slot]

    def online(self, clients: np.ndarray, time: float, version: int) -> np.ndarray:
        """By this update's and minute's coins."""
        return np.asarray(self._thrown(version, int(time // SLOT))[clients])

    def returns(self, client: int, time: float, version: int) -> float:
        """The next minute whose coin is heads."""
        slot = int(time // SLOT)
        if self._thrown(version, slot)[client]:
            return time
        if self.rates[client] <= 0:
            return math.inf
        while not self._thrown(version, slot)[client]:
            slot += 1
        return slot * SLOT

    def leaves(self, client: int, time: float) -> float:
        """Not in the middle of a job."""
        return math.inf

    def offline(self, client: int, until: float) -> list[tuple[float, float]]:
        """Coins are no periods."""
        return []


class Periods(Availability):
    """Clients that come and go; one that goes in the middle of a job takes it along."""

    @abstractmethod
    def period(self, client: int, time: float) -> tuple[float, float]:
        """The period online, (from, to), that ends first after ``time``; (inf, inf) if there is none."""

    def online(self, clients: np.ndarray, time: float, version: int) -> np.ndarray:
        """Those whose period has begun."""
        return np.array([self.period(int(c), time)[0] <= time for c in clients], dtype=bool)

    def returns(self, client: int, time: float, version: int) -> float:
        """Now, or the beginning of the next period."""
        return max(time, self.period(client, time)[0])

    def leaves(self, client: int, time: float) -> float:
        """The end of the period; the next one may begin where it ends."""
        end = self.period(client, time)[1]
        for _ in range(100):
            begin, after = self.period(client, end)
            if begin > end:
                return end
            end = after
        return math.inf


class Markov(Periods):
    """On and off in turn, each for an exponential time. on, off: their means in seconds."""

    def __init__(self, on: float, off: float, seed: int) -> None:
        self.on, self.off, self.seed = on, off, seed
        self._drawn: dict[int, tuple[np.random.Generator, list[float]]] = {}

    def period(self, client: int, time: float) -> tuple[float, float]:
        """Drawn as far as needed; ``ends[0::2]`` are beginnings, ``ends[1::2]`` ends."""
        if client not in self._drawn:
            rng = philox(self.seed, "markov", client)
            begin = 0.0 if rng.random() < self.on / (self.on + self.off) else float(rng.exponential(self.off))
            self._drawn[client] = rng, [begin, begin + float(rng.exponential(self.on))]
        rng, ends = self._drawn[client]
        while ends[-1] <= time:
            ends.append(ends[-1] + float(rng.exponential(self.off)))
            ends.append(ends[-1] + float(rng.exponential(self.on)))
        at = np.searchsorted(ends[1::2], time, side="right")
        return ends[2 * at], ends[2 * at + 1]


class Diurnal(Periods):
    """Online at night, when a device is charged and idle: each day for ``hours`` from about 22:00 local time.

    zones: ``(n,)`` hours east of Greenwich; virtual time 0 is midnight there. The beginning varies by up to an hour
    from client to client and by up to half an hour from day to day.
    """

    def __init__(self, hours: float, zones: np.ndarray, seed: int) -> None:
        self.hours, self.zones, self.seed = hours, zones, seed
        self._begin = 22 * 3600 - 3600.0 * zones + 3600.0 * (2 * philox(seed, "habit").random(len(zones)) - 1)

    def period(self, client: int, time: float) -> tuple[float, float]:
        """The first window that ends after ``time``."""
        day = int((time - self._begin[client]) // DAY) - 2
        while True:
            begin = self._begin[client] + day * DAY + 1800 * philox(self.seed, "evening", client, day).uniform(-1, 1)
            if begin + self.hours * 3600 > time:
                return float(begin), float(begin + self.hours * 3600)
            day += 1


class Trace(Periods):
    """Periods from a file; after its latest end it begins anew."""

    def __init__(self, periods: Mapping[int, Sequence[tuple[float, float]]]) -> None:
        self.periods = periods
        self.length = max(end for found in periods.values() for _, end in found)

    def period(self, client: int, time: float) -> tuple[float, float]:
        """The first period that ends after ``time``, this time round or the next."""
        found = self.periods.get(client)
        if not found:
            return math.inf, math.inf
        turn = math.floor(time / self.length)
        while True:
            for begin, end in found:
                if end + turn * self.length > time:
                    return begin + turn * self.length, end + turn * self.length
            turn += 1


def read_trace(path: Path, n: int) -> Trace:
    """A trace from a csv file with the columns ``client``, ``on`` and ``off`` (seconds). Raises DataError."""
    rows = read_rows(path)
    if rows and set(rows[0][1]) != {"client", "on", "off"}:
        raise DataError(f"{path}: columns are {', '.join(rows[0][1])}; a trace has client, on, off")
    found: dict[int, list[tuple[float, float, int]]] = {}
    for line, row in rows:
        where = f"{path} line {line}"
        values = {name: number(text, f"{where}, {name}") for name, text in row.items()}
        client = client_id(values["client"], n, where)
        on, off = values["on"], values["off"]
        if not (0 <= on < off < math.inf):
            raise DataError(f"{where}: on {on:g} to off {off:g} is no period; it needs 0 <= on < off")
        found.setdefault(client, []).append((on, off, line))
    if not found:
        raise DataError(f"{path}: nobody is ever online in it")
    for client, periods in found.items():
        periods.sort()
        for (_, before, _), (on, _, line) in itertools.pairwise(periods):
            if on < before:
                raise DataError(
                    f"{path} line {line}: client {client} comes online at {on:g} but was so until {before:g}"
                )
    return Trace({client: [(on, off) for on, off, _ in periods] for client, periods in found.items()})


def parse(text: str, n: int, seed: int, labels: np.ndarray | None = None) -> Availability:
    """The availability that ``text`` names, for clients 0 .. n - 1. labels: ``(n, classes)`` rows of each class, for
    those correlated with labels. Raises ConfigError or DataError."""
    kind, *rest = text.split(":")
    by_label = "labels" in rest
    rest = [part for part in rest if part != "labels"]
    if by_label and (labels is None or kind not in ("bernoulli", "diurnal")):
        raise ConfigError(f"--availability {text}: only bernoulli and diurnal of a classification go by labels")
    if kind == "always" and not rest:
        return Always()
    if kind == "bernoulli":
        (p,) = _numbers(text, rest, 1, "bernoulli:P[:labels], P above 0 and at most 1")
        if not 0 < p <= 1:
            raise ConfigError(f"--availability {text}: P must be above 0 and at most 1")
        return Coins(np.full(n, p) if labels is None or not by_label else rates(p, labels, seed), seed)
    if kind == "markov":
        on, off = _numbers(text, rest, 2, "markov:ON:OFF, mean seconds on and off")
        if min(on, off) <= 0:
            raise ConfigError(f"--availability {text}: mean seconds on and off must be above 0")
        return Markov(on, off, seed)
    if kind == "diurnal":
        (hours,) = _numbers(text, rest or ["8"], 1, "diurnal[:HOURS][:labels]")
        if not 0 < hours <= 22:
            raise ConfigError(f"--availability {text}: HOURS must be above 0 and at most 22")
        if labels is not None and by_label:
            zones = 24.0 * labels.argmax(1) / labels.shape[1] - 12
        else:
            zones = philox(seed, "zones").integers(-11, 13, n).astype(float)
        return Diurnal(hours, zones, seed)
    if Path(text).suffix or Path(text).exists():
        return read_trace(Path(text), n)
    raise ConfigError(f"unknown availability '{text}'{nearest(text, NAMES)} (or a trace file: client, on, off)")


def rates(p: float, labels: np.ndarray, seed: int) -> np.ndarray:
    """Chances of being online that go with labels, ``(n,)``: classes, in an order drawn by the seed, have chances from
    0.2 p to 1.8 p in equal steps (at most 1), and a client the mean over its rows."""
    classes = labels.shape[1]
    of_class = np.minimum(1.0, p * np.linspace(0.2, 1.8, classes))
    of_class = of_class[philox(seed, "label-rates").permutation(classes)]
    shares = labels / np.maximum(1, labels.sum(1, keepdims=True))
    return np.asarray(shares @ of_class)


def _numbers(text: str, parts: Sequence[str], count: int, usage: str) -> list[float]:
    try:
        values = [float(part) for part in parts]
    except ValueError:
        values = []
    if len(values) != count or not all(math.isfinite(v) for v in values):
        raise ConfigError(f"--availability {text}: write {usage}")
    return values

"""Fleets by name: quantiles of speed, links, memory and power, and where they come from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from consilience.core.errors import ConfigError, nearest
from consilience.core.messages import Device
from consilience.core.streams import philox

KNOTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""The quantiles that a profile gives; between them values are interpolated on a logarithmic scale."""


@dataclass(frozen=True)
class Profile:
    """Five quantiles (least, quarter, median, three quarters, most) of each property.

    speed: FLOP a second in training. down, up: bytes a second. latency: seconds, one way. memory: bytes. watts.
    A fast device has a large memory and a high power (one quantile for the three); links are drawn apart from it.
    """

    speed: tuple[float, ...]
    down: tuple[float, ...]
    up: tuple[float, ...]
    latency: tuple[float, ...]
    memory: tuple[float, ...]
    watts: tuple[float, ...]
    source: str


def _same(value: float) -> tuple[float, ...]:
    return (value,) * len(KNOTS)


UNIFORM = Profile(
    _same(5e9), _same(5e6), _same(1.25e6), _same(0.05), _same(4e9), _same(4.0),
    "identical devices at the middle of a phone fleet; a choice, not a measurement",
)  # fmt: skip

PROFILES = {
    "uniform": UNIFORM,
    "phones": Profile(
        (2e9, 4e9, 6e9, 1e10, 2e10), (1e6, 3e6, 6e6, 1.2e7, 2.5e7), (2.5e5, 7.5e5, 1.5e6, 3e6, 6e6),
        (0.15, 0.08, 0.05, 0.03, 0.02), (2e9, 4e9, 6e9, 8e9, 1.2e10), (2.0, 3.0, 4.0, 5.0, 6.0),
        "tenfold spread of speed, as AI Benchmark (Ignatov et al., 2019) and the traces of FedScale (Lai et al., 2022) "
        "and FLASH (Yang et al., 2021) show between slow and fast phones; levels are round numbers of ours: links of "
        "8 to 200 Mbit/s down, a quarter of that up",
    ),
    "edge": Profile(
        (1e9, 4e9, 1e10, 5e10, 2e11), (5e5, 1e6, 2.5e6, 6e6, 1.2e7), (2.5e5, 5e5, 1.25e6, 3e6, 6e6),
        (0.08, 0.05, 0.03, 0.02, 0.01), (1e9, 2e9, 4e9, 8e9, 1.6e10), (3.0, 5.0, 7.0, 12.0, 20.0),
        "from a single-board computer to a board with a small GPU, on a shared access line; round numbers of ours, a "
        "200-fold spread of speed",
    ),
    "silos": Profile(
        (1e12, 2e12, 4e12, 7e12, 1e13), (1.25e7, 2.5e7, 5e7, 1e8, 1.25e8), (1.25e7, 2.5e7, 5e7, 1e8, 1.25e8),
        (0.03, 0.02, 0.015, 0.01, 0.005), (3.2e10, 6.4e10, 1.28e11, 2.56e11, 5.12e11),
        (200.0, 300.0, 400.0, 500.0, 600.0),
        "servers with one GPU on lines of 100 Mbit/s to 1 Gbit/s; round numbers of ours, tenfold spread of speed as "
        "between a few GPU generations",
    ),
}  # fmt: skip

NAMES = (*PROFILES, "lognormal:S")


def profile(name: str) -> Profile:
    """The profile called ``name``; ``lognormal:S`` spreads ``uniform`` by exp(S z), z standard normal, in speed and
    links. Raises ConfigError."""
    if name in PROFILES:
        return PROFILES[name]
    kind, _, spread = name.partition(":")
    if kind != "lognormal":
        raise ConfigError(f"unknown fleet '{name}'{nearest(name, NAMES)} (or a .csv file, or package.module:function)")
    try:
        s = float(spread)
    except ValueError:
        s = math.nan
    if not 0 <= s <= 5:
        raise ConfigError(f"fleet '{name}': write lognormal:S with S from 0 to 5, as in lognormal:0.5")
    u = UNIFORM
    z = (-2.5758, -0.6745, 0.0, 0.6745, 2.5758)  # the ends are the quantiles 0.005 and 0.995
    factors = [math.exp(s * v) for v in z]

    def spread_out(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(v * f for v, f in zip(values, factors, strict=True))

    return Profile(
        spread_out(u.speed), spread_out(u.down), spread_out(u.up), u.latency, u.memory, u.watts,
        f"lognormal around the uniform fleet, sigma {s:g}, cut at its quantiles 0.005 and 0.995",
    )  # fmt: skip


def draw(name: str, n: int, seed: int, quantiles: np.ndarray | None = None) -> list[Device]:
    """``n`` devices of a profile. quantiles: ``(n,)`` of their speeds, or None to draw them. Raises ConfigError."""
    kind = profile(name)
    rng = philox(seed, "fleet", name)
    drawn, links = rng.random(n), rng.random(n)
    speeds = drawn if quantiles is None else quantiles
    columns = [_at(values, speeds, name) for values in (kind.speed, kind.memory, kind.watts)]
    columns += [_at(values, links, name) for values in (kind.down, kind.up, kind.latency)]
    if n and all((column == column[0]).all() for column in columns):  # one device for all of a million clients
        columns = [column[:1] for column in columns]
    rows = zip(*(column.tolist() for column in columns), strict=True)
    made = [Device(s, d, u, latency, m, w) for s, m, w, d, u, latency in rows]
    return made * n if len(made) == 1 else made


def _at(values: tuple[float, ...], u: np.ndarray, name: str) -> np.ndarray:
    """The values at quantiles ``u``."""
    if len(set(values)) == 1:
        return np.full(len(u), values[0])
    if name.startswith("lognormal"):  # exact, not by pieces
        middle, top = math.log(values[2]), math.log(values[-1])
        z = np.clip([NormalDist().inv_cdf(v) for v in u], -2.5758, 2.5758)
        return np.asarray(np.exp(middle + (top - middle) / 2.5758 * z))
    return np.asarray(np.exp(np.interp(u, KNOTS, np.log(values))))

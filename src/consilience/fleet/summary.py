"""A fleet in numbers, for tables and files."""

from __future__ import annotations

from typing import Any

import numpy as np

from consilience.core.federation import Federation
from consilience.fleet.availability import Coins
from consilience.fleet.clock import Fleet

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
DRAWN = 60
"""Clients whose offline periods are written for the picture."""


def summarise(fleet: Fleet, federation: Federation) -> list[dict[str, Any]]:
    """Rows for a table: ``name``, ``unit``, and ``least``, ``quarter``, ``median``, ``three_quarters``, ``most``.

    Speeds in GFLOP/s, links in MB/s, latency in ms, memory in GB, power in W, milliseconds of one pass over a client's
    own rows, and the share of a week of virtual time that a client is online.
    """
    clients = [int(c) for c in federation.seen]
    devices = [fleet.devices[c] for c in clients]
    passes = []
    for c, d in zip(clients, devices, strict=True):
        row = 1 / d.rate if d.rate is not None else fleet.work[c] / d.speed
        passes.append(federation.size(c) * row)
    columns: list[tuple[str, str, list[float]]] = [
        ("speed", "GFLOP/s", [d.speed / 1e9 for d in devices if d.rate is None]),
        ("rate", "samples/s", [d.rate for d in devices if d.rate is not None]),
        ("download", "MB/s", [d.down / 1e6 for d in devices]),
        ("upload", "MB/s", [d.up / 1e6 for d in devices]),
        ("latency", "ms", [1e3 * d.latency for d in devices]),
        ("memory", "GB", [d.memory / 1e9 for d in devices if d.memory]),
        ("power", "W", [d.watts for d in devices if d.watts is not None]),
        ("pass over own rows", "ms", [1e3 * seconds for seconds in passes]),
        ("online", "share", [share_online(fleet, c) for c in clients[:200]]),
    ]
    return [_row(name, unit, values) for name, unit, values in columns if values]


def _row(name: str, unit: str, values: list[float]) -> dict[str, Any]:
    keys = ("least", "quarter", "median", "three_quarters", "most")
    return {"name": name, "unit": unit, **dict(zip(keys, map(float, np.quantile(values, LEVELS)), strict=True))}


def share_online(fleet: Fleet, client: int, over: float = 7 * 86400.0) -> float:
    """The share of the first ``over`` virtual seconds in which a client can be reached."""
    if isinstance(fleet.availability, Coins):
        return float(fleet.availability.rates[client])
    return 1.0 - sum(end - begin for begin, end in fleet.availability.offline(client, over)) / over


def describe(fleet: Fleet, federation: Federation, until: float) -> dict[str, Any]:
    """What the report needs: devices, and when the first clients were offline before ``until``."""
    n = min(federation.n_clients, 2000)
    return {
        "devices": [fleet.devices[c]._asdict() for c in range(n)],
        "offline": [fleet.availability.offline(c, until) for c in range(min(n, DRAWN))],
        "until": until,
    }

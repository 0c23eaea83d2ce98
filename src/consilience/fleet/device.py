"""Devices from a file or a user's function, checked."""

from __future__ import annotations

import csv
import importlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from consilience.core.errors import ConfigError, DataError, nearest
from consilience.core.messages import Device
from consilience.core.streams import philox

COLUMNS = ("client", "speed", "samples_per_second", "down", "up", "latency", "memory", "watts")
"""Of a csv file: FLOP a second or samples a second, bytes a second, seconds, bytes, watts."""


def check(device: Device, where: str) -> Device:
    """``device`` if it can work; DataError with what is wrong otherwise."""
    for name, value in (("speed", device.speed), ("down", device.down), ("up", device.up)):
        if name == "speed" and device.rate is not None:
            name, value = "samples_per_second", device.rate
        if not (math.isfinite(value) and value > 0):
            what = "bandwidth" if name in ("down", "up") else "speed"
            raise DataError(f"{where}: {name} is {value:g}; a {what} must be above 0 and finite")
    for name, value in (("latency", device.latency), ("memory", device.memory), ("watts", device.watts or 0.0)):
        if not (math.isfinite(value) and value >= 0):
            raise DataError(f"{where}: {name} is {value:g}; it must be at least 0 and finite")
    return device


def read_csv(path: Path, n: int) -> list[Device]:
    """The devices of clients 0 .. n - 1 in a csv file with :data:`COLUMNS`. Raises DataError with the line.

    ``client``, ``down``, ``up`` and one of ``speed`` and ``samples_per_second`` must be there; rows may be in any
    order, one for each client.
    """
    rows = read_rows(path)
    if not rows:
        raise DataError(f"{path}: no devices in it")
    for name in rows[0][1]:
        if name not in COLUMNS:
            raise DataError(f"{path}: unknown column '{name}'{nearest(name, COLUMNS)}")
    given = rows[0][1].keys()
    for name in ("client", "down", "up"):
        if name not in given:
            raise DataError(f"{path}: column '{name}' is missing")
    if "speed" not in given and "samples_per_second" not in given:
        raise DataError(f"{path}: column 'speed' (FLOP a second) or 'samples_per_second' is missing")
    found: dict[int, Device] = {}
    for line, row in rows:
        where = f"{path} line {line}"
        values = {name: number(text, f"{where}, {name}") for name, text in row.items() if text}
        client = client_id(values.get("client"), n, where)
        if client in found:
            raise DataError(f"{where}: client {client} has a device already")
        device = Device(
            values.get("speed", math.nan), values.get("down", math.nan), values.get("up", math.nan),
            values.get("latency", 0.0), values.get("memory", 0.0), values.get("watts"),
            values.get("samples_per_second"),
        )  # fmt: skip
        found[client] = check(device, where)
    missing = [client for client in range(n) if client not in found]
    if missing:
        raise DataError(f"{path}: client {missing[0]} has no device ({len(found)} of {n} clients have one)")
    return [found[client] for client in range(n)]


def read_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """The rows of a csv file with their line numbers, as stripped text by column. Raises DataError."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, skipinitialspace=True, restval="")
            found = []
            for row in reader:
                if None in row:
                    raise DataError(f"{path} line {reader.line_num}: more values than columns")
                found.append((reader.line_num, {key.strip(): (text or "").strip() for key, text in row.items()}))
            return found
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not readable as csv: {error}") from None


def number(text: str, where: str) -> float:
    """A number in a file. Raises DataError."""
    try:
        return float(text)
    except ValueError:
        raise DataError(f"{where}: '{text}' is not a number") from None


def client_id(value: float | None, n: int, where: str) -> int:
    """A client's id in a file. Raises DataError."""
    if value is None or value != value or value != int(value) or not 0 <= value < n:
        shown = "missing" if value is None else f"{value:g}"
        raise DataError(f"{where}: client is {shown}; clients are 0 to {n - 1}")
    return int(value)


def from_function(spec: str, n: int, seed: int) -> list[Device]:
    """The devices that ``package.module:function`` makes, called as ``function(n, rng)``. Raises ConfigError."""
    module, _, attribute = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"fleet '{spec}' cannot be imported: {error}") from error
    rng: np.random.Generator = philox(seed, "fleet", spec)
    return checked(function(n, rng), n, f"fleet '{spec}'")


def checked(devices: Sequence[Device], n: int, where: str) -> list[Device]:
    """``devices`` if there is a good one for each of ``n`` clients. Raises DataError."""
    if len(devices) != n:
        raise DataError(f"{where}: {len(devices)} devices for {n} clients; give one for each")
    return [check(device, f"{where}, client {client}") for client, device in enumerate(devices)]

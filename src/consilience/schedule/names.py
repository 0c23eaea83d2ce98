"""Schedules by name, as ``--schedule`` takes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from consilience.core.errors import ConfigError, nearest
from consilience.core.events import Schedule
from consilience.schedule.buffered import Buffered
from consilience.schedule.compass import Compass
from consilience.schedule.deadline import Deadline
from consilience.schedule.gossip import Gossip
from consilience.schedule.immediate import Immediate
from consilience.schedule.interval import Interval
from consilience.schedule.rounds import Rounds
from consilience.schedule.tiered import Tiered

NAMES = (
    "rounds", "deadline:SECONDS", "buffered:K", "interval:SECONDS", "tiered:K", "async", "compass:LEAST:MOST:SLACK",
    "gossip",
)  # fmt: skip
SYNCHRONOUS = ("rounds", "deadline")
"""Schedules in which a round is combined before the next begins, as methods of several phases need it."""


def make(
    text: str,
    *,
    concurrency: int | None = None,
    over_selection: float = 1.0,
    late: Literal["discard", "partial"] = "discard",
) -> Schedule:
    """The schedule that ``text`` names. SECONDS may be P%: that share of the slowest client's usual job.

    concurrency: jobs in flight of an asynchronous schedule (the cohort). over_selection, late: of ``deadline``.
    Raises ConfigError.
    """
    kind, *parts = text.split(":")
    if over_selection != 1 and kind != "deadline":
        raise ConfigError(f"--over-selection is for --schedule deadline:SECONDS, not {text}")
    if late != "discard" and kind != "deadline":
        raise ConfigError(f"--late is for --schedule deadline:SECONDS, not {text}")
    if concurrency is not None and kind not in ("buffered", "interval", "async", "gossip"):
        raise ConfigError(f"--concurrency is for the schedules buffered, interval, async and gossip, not {text}")
    makers: dict[str, Callable[[], Schedule]] = {
        "rounds": lambda: _plain(text, parts, Rounds()),
        "async": lambda: _plain(text, parts, Immediate(concurrency)),
        "gossip": lambda: _plain(text, parts, Gossip(concurrency)),
        "deadline": lambda: Deadline(*_seconds(text, parts), over_selection, late),
        "interval": lambda: Interval(*_seconds(text, parts), concurrency),
        "buffered": lambda: Buffered(_count(text, parts), concurrency),
        "tiered": lambda: Tiered(_count(text, parts)),
        "compass": lambda: _compass(text, parts),
    }
    if kind not in makers:
        raise ConfigError(f"unknown schedule '{text}'{nearest(kind, [name.partition(':')[0] for name in NAMES])}")
    return makers[kind]()


def _plain(text: str, parts: list[str], schedule: Schedule) -> Schedule:
    if parts:
        raise ConfigError(f"--schedule {text}: takes no numbers")
    return schedule


def _count(text: str, parts: list[str]) -> int:
    if len(parts) != 1 or not parts[0].isdigit() or int(parts[0]) < 1:
        raise ConfigError(f"--schedule {text}: write {text.partition(':')[0]}:K with a whole K of at least 1")
    return int(parts[0])


def _seconds(text: str, parts: list[str]) -> tuple[float | None, float | None]:
    """(seconds, None) or (None, share)."""
    number = parts[0].removesuffix("%") if len(parts) == 1 else ""
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        kind = text.partition(":")[0]
        raise ConfigError(f"--schedule {text}: write {kind}:SECONDS, or {kind}:50% of the slowest client's job")
    return (None, value / 100) if parts[0].endswith("%") else (value, None)


def _compass(text: str, parts: list[str]) -> Compass:
    usage = f"--schedule {text}: write compass or compass:LEAST:MOST:SLACK, as in compass:20:100:1.2"
    try:
        numbers = (int(parts[0]), int(parts[1]), float(parts[2])) if parts else (20, 100, 1.2)
    except (ValueError, IndexError):
        raise ConfigError(usage) from None
    if len(parts) > 3 or not 1 <= numbers[0] <= numbers[1] or not 1 <= numbers[2] < math.inf:
        raise ConfigError(f"{usage}; 1 <= LEAST <= MOST and SLACK at least 1")
    return Compass(*numbers)

"""What it costs to reach a target, where some runs never do: those are censored, neither dropped nor called done."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from consilience.measure.statistics import Recorded

COSTS = ("rounds", "bytes", "samples", "wall_s", "virtual_s")


@dataclass(frozen=True)
class Reach:
    """One run's way to a target: whether it got there, and what it had cost by then, or when it ended without."""

    reached: bool
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Cost:
    """One cost over the seeds of a method.

    median: of the Kaplan-Meier curve; None where less than half of the weight reached the target. least, most: the
    cheapest and the dearest seed; None where no seed, or not every seed, reached it. beyond: the largest cost at
    which a run was seen; a median that is None lies above it, as far as these runs can tell.
    """

    median: float | None
    least: float | None
    most: float | None
    beyond: float


def reach(run: Recorded, keys: Sequence[str], target: float, *, lower: bool = False) -> Reach | None:
    """The first judged round whose value under ``keys`` is at or beyond the target. None: nothing was judged."""
    last: Mapping[str, Any] | None = None
    for line in run.history:
        value = _under(line, keys)
        last = line
        if value is not None and (value <= target if lower else value >= target):
            return Reach(True, _costs(line))
    return None if last is None else Reach(False, _costs(last))


def _under(line: Mapping[str, Any], keys: Sequence[str]) -> float | None:
    at: Any = line
    for key in keys:
        at = at.get(key) if isinstance(at, Mapping) else None
    return float(at) if at is not None and math.isfinite(at) else None


def _costs(line: Mapping[str, Any]) -> dict[str, float]:
    return {
        "rounds": float(line["round"]),
        "bytes": float(line["bytes_up"] + line["bytes_down"]),
        "samples": float(line["samples"]),
        "wall_s": float(line["wall_s"]),
        "virtual_s": float(line["virtual_s"]),
    }


def kaplan_meier_median(times: Sequence[float], reached: Sequence[bool]) -> float | None:
    """The first time by which half of the Kaplan-Meier curve has reached (Kaplan and Meier, 1958); None if never.

    times: when each run reached, or how long it was watched without. A run watched until a time at which another
    reached counts as still under way at it.
    """
    survival = 1.0
    for t in sorted({t for t, hit in zip(times, reached, strict=True) if hit}):
        at_risk = sum(other >= t for other in times)
        events = sum(hit and other == t for other, hit in zip(times, reached, strict=True))
        survival *= 1 - events / at_risk
        if survival <= 0.5 + 1e-12:
            return t
    return None


def cost_of(reaches: Sequence[Reach], key: str) -> Cost:
    """One of ``COSTS`` over the seeds of a method."""
    times, hits = [r.costs[key] for r in reaches], [r.reached for r in reaches]
    done = [t for t, hit in zip(times, hits, strict=True) if hit]
    return Cost(
        kaplan_meier_median(times, hits),
        min(done, default=None),
        max(done) if done and all(hits) else None,
        max(times, default=math.nan),
    )

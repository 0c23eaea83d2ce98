"""The round that a run would be stopped at: the best on validation data, which no test row has a say in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from consilience.measure.statistics import Recorded

Line = Mapping[str, Any]


def validation(line: Line) -> float | None:
    """Mean over the clients that may train of the score on their validation rows, if it was taken in this round."""
    value = ((line.get("clients") or {}).get("valid") or {}).get("mean")
    return float(value) if value is not None and math.isfinite(value) else None


def best_so_far(history: Sequence[Line], *, lower: bool = False) -> Iterator[tuple[Line, Line]]:
    """Of each line with a validation score: that line, and of those until it the one whose score is best (ties go to
    the earliest)."""
    best: tuple[float, Line] | None = None
    for line in history:
        value = validation(line)
        if value is None:
            continue
        if best is None or (value < best[0] if lower else value > best[0]):
            best = value, line
        yield line, best[1]


def best_line(history: Sequence[Line], *, lower: bool = False) -> Line | None:
    """The line of the round that is best on validation data; None if nothing was judged on any."""
    return max(best_so_far(history, lower=lower), key=lambda pair: pair[0]["round"], default=(None, None))[1]


class Best(NamedTuple):
    """The round that is best on validation data, and what it scores on test data."""

    round: int
    score: float


def best_scores(runs: Sequence[Recorded], metric: str, *, lower: bool = False) -> dict[int, Best]:
    """One method's test scores at each run's best round, by seed. metric: ``global`` or ``clients.mean``. A run without
    validation scores is left out, as is one whose best round has no score that is a number."""
    keys = ("global", "loss" if lower else "accuracy") if metric == "global" else ("clients", "mean")
    found = {}
    for run in runs:
        line = best_line(run.history, lower=lower)
        value = None if line is None else (line.get(keys[0]) or {}).get(keys[1])
        if line is not None and value is not None and math.isfinite(value):
            found[run.seed] = Best(int(line["round"]), float(value))
    return found


def best_clients(run: Recorded, *, lower: bool = False) -> dict[int, Line]:
    """The lines at a run's best round of the clients that took part in training and have test data, by client."""
    line = best_line(run.history, lower=lower)
    if line is None:
        return {}
    own = (of for of in run.clients if of["round"] == line["round"])
    return {int(of["client"]): of for of in own if of.get("seen", True) and of.get("n", 1)}

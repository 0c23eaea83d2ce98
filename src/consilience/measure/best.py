"""The round that a run would be stopped at: the best on validation data, which no test row has a say in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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

"""Intervals, paired tests and the leaderboard: what may be said about methods after a few seeds.

Few seeds make bad bootstraps: at 5 seeds a nominal 95 % BCa interval covers 84 %, a t interval 95 %. Hence
:func:`mean_interval` takes the t interval below 20 values and BCa from there on.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, median, stdev
from typing import Any, Protocol

FEW = 20
"""From this many values on, a BCa interval replaces the t interval."""


class Recorded(Protocol):
    """What is read of a run: :class:`consilience.report.load.RunFolder` has it."""

    @property
    def label(self) -> str: ...

    @property
    def seed(self) -> int: ...

    @property
    def history(self) -> Sequence[Mapping[str, Any]]: ...

    @property
    def clients(self) -> Sequence[Mapping[str, Any]]: ...


def _stats() -> Any:
    """scipy.stats, imported late: it takes longer to start than the command line does."""
    return importlib.import_module("scipy.stats")


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean; needs two values."""
    n = len(values)
    if n < 2:
        raise ValueError("a t interval needs at least two values")
    half = float(_stats().t.ppf(0.5 + level / 2, n - 1)) * stdev(values) / math.sqrt(n)
    centre = fmean(values)
    return centre - half, centre + half


def bca_interval(values: Sequence[float], level: float = 0.95, resamples: int = 9999) -> tuple[float, float]:
    """Bias-corrected accelerated bootstrap interval of the mean, from a fixed stream: same values, same interval."""
    if len(values) < 2:
        raise ValueError("a bootstrap interval needs at least two values")
    if min(values) == max(values):  # scipy answers nan here
        return values[0], values[0]
    numpy = importlib.import_module("numpy")
    found = (
        _stats()
        .bootstrap(
            (numpy.asarray(values, dtype=float),),
            numpy.mean,
            confidence_level=level,
            n_resamples=resamples,
            method="BCa",
            random_state=numpy.random.default_rng(0),
        )
        .confidence_interval
    )
    return float(found.low), float(found.high)


def mean_interval(values: Sequence[float], level: float = 0.95, *, share: bool = False) -> tuple[float, float] | None:
    """The interval to report for a mean; None for a single value, which has none. share: the values are shares, so
    the interval ends at 0 and 1, beyond which no mean can be (its coverage stays the same)."""
    if len(values) < 2:
        return None
    low, high = t_interval(values, level) if len(values) < FEW else bca_interval(values, level)
    return (max(0.0, low), min(1.0, high)) if share else (low, high)


def paired_test(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of a paired t-test; nan with fewer than two pairs.

    Differences that are all the same leave the t-test without a spread, and it would call two seeds a certainty;
    the sign test, 2^(1-n), is what can be said then.
    """
    if len(a) != len(b):
        raise ValueError("paired samples differ in length")
    n = len(a)
    if n < 2:
        return math.nan
    differences = [x - y for x, y in zip(a, b, strict=True)]
    largest = max(abs(d) for d in differences)
    if largest == 0:
        return 1.0
    if max(differences) - min(differences) <= 1e-12 * largest:
        return 2.0 ** (1 - n)
    return float(_stats().ttest_rel(a, b).pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down correction. A nan, a test that could not be made, stays one and is not counted."""
    made = sorted((p, i) for i, p in enumerate(ps) if not math.isnan(p))
    adjusted = [math.nan] * len(ps)
    running = 0.0
    for step, (p, i) in enumerate(made):
        running = max(running, min(1.0, p * (len(made) - step)))
        adjusted[i] = running
    return adjusted


@dataclass(frozen=True)
class Comparison:
    """Methods in order, best first, and which differences between them are real."""

    order: list[str]
    p: dict[tuple[str, str], float]
    rank: dict[str, int]
    cliques: list[list[str]]
    detectable: float | None
    tested: bool

    def differs(self, a: str, b: str, alpha: float = 0.05) -> bool:
        """Whether a and b differ significantly; False where no test could be made."""
        return self.p[a, b] < alpha


def compare_scores(
    scores: Mapping[str, Mapping[int, float]], *, lower: bool = False, alpha: float = 0.05
) -> Comparison:
    """Paired tests over the seeds that two methods share, Holm-corrected over all pairs.

    Rank is one plus the number of significantly better methods; a clique is a maximal stretch of neighbours of
    which no two differ; ``detectable`` is the difference that such a test finds four times out of five.
    """
    sign = -1.0 if lower else 1.0
    order = sorted(scores, key=lambda m: (-sign * fmean(scores[m].values()), m))
    pairs = list(combinations(order, 2))
    raw, spreads, counts = [], [], []
    for a, b in pairs:
        seeds = sorted(scores[a].keys() & scores[b].keys())
        left, right = [scores[a][s] for s in seeds], [scores[b][s] for s in seeds]
        raw.append(paired_test(left, right))
        if len(seeds) >= 2:
            spreads.append(stdev(x - y for x, y in zip(left, right, strict=True)))
            counts.append(len(seeds))
    p: dict[tuple[str, str], float] = {}
    for (a, b), value in zip(pairs, holm(raw), strict=True):
        p[a, b] = p[b, a] = value
    rank = {m: 1 + sum(p[o, m] < alpha for o in order[:i]) for i, m in enumerate(order)}
    cliques = _cliques(order, p, alpha) if spreads else []
    return Comparison(order, p, rank, cliques, _detectable(spreads, counts, alpha), bool(spreads))


def _cliques(order: Sequence[str], p: Mapping[tuple[str, str], float], alpha: float) -> list[list[str]]:
    found: list[list[str]] = []
    reached = 0
    for start in range(len(order)):
        end = start + 1
        while end < len(order) and not any(p[m, order[end]] < alpha for m in order[start:end]):
            end += 1
        if end - start >= 2 and end > reached:
            found.append(list(order[start:end]))
            reached = end
    return found


def _detectable(spreads: Sequence[float], counts: Sequence[int], alpha: float) -> float | None:
    if not spreads:
        return None
    t, n = _stats().t, min(counts)
    level = alpha / len(spreads)  # the first step of Holm
    return float((t.ppf(1 - level / 2, n - 1) + t.ppf(0.8, n - 1)) * median(spreads) / math.sqrt(n))


@dataclass(frozen=True)
class Scores:
    """The last score of every run: ``values[label][seed]``. ``lower``: it is a loss, and lower is better."""

    metric: str
    lower: bool
    values: dict[str, dict[int, float]]


def last_clients(run: Recorded) -> dict[int, Mapping[str, Any]]:
    """The last line of every client that took part in training and has test data, by client."""
    return {int(line["client"]): line for line in run.clients if line.get("seen", True) and line.get("n", 1)}


def last_of(run: Recorded, *keys: str) -> float | None:
    """The last value under nested keys in a run's history, from the last line that has it."""
    for line in reversed(run.history):
        at: Any = line
        for key in keys:
            at = at.get(key) if isinstance(at, Mapping) else None
        if at is not None:
            return float(at)
    return None


def final_scores(runs: Sequence[Recorded]) -> Scores:
    """Global accuracy if every run has a global model, else the unweighted client mean; loss where there is none.

    A run that diverged to no number has no score.
    """
    lines = [line for run in runs for line in (run.history[-1].get("global"), *run.clients) if line]
    lower = bool(lines) and not any(line.get("accuracy") is not None for line in lines)
    metric = "global" if all(run.history[-1].get("global") for run in runs) else "clients.mean"
    keys = ("global", "loss" if lower else "accuracy") if metric == "global" else ("clients", "mean")
    values: dict[str, dict[int, float]] = {}
    for run in runs:
        score = last_of(run, *keys)
        if score is not None and math.isfinite(score):
            values.setdefault(run.label, {})[run.seed] = score
    return Scores(metric, lower, values)


def leaderboard(runs: Sequence[Recorded]) -> list[dict[str, Any]]:
    """One row a method, best first, with the keys of ``leaderboard.json``; means are over seeds.

    A task without accuracy has ``accuracy`` None and its ``loss`` and ``loss_ci`` beside it. A method without any
    score comes last.
    """
    scores = final_scores(runs)
    rows = []
    for label in dict.fromkeys(run.label for run in runs):
        own = [run for run in runs if run.label == label]
        by_seed = scores.values.get(label, {})
        values = [by_seed[seed] for seed in sorted(by_seed)]
        interval = mean_interval(values, share=not scores.lower)
        score, ci = _mean(values), None if interval is None else list(interval)
        last = [run.history[-1] for run in own]
        row: dict[str, Any] = {
            "method": label,
            "metric": scores.metric,
            "accuracy": None if scores.lower else score,
            "accuracy_ci": None if scores.lower else ci,
            "clients_mean": _mean([last_of(run, "clients", "mean") for run in own]),
            "worst10": _mean([last_of(run, "clients", "worst10") for run in own]),
            "bytes": round(fmean(line["bytes_up"] + line["bytes_down"] for line in last)),
            "wall_s": fmean(line["wall_s"] for line in last),
            "virtual_s": fmean(line["virtual_s"] for line in last),
            "seeds": len(values),
        }
        if scores.lower:
            row |= {"loss": score, "loss_ci": ci}
        rows.append(row)
    key, sign = ("loss", 1) if scores.lower else ("accuracy", -1)
    return sorted(rows, key=lambda r: (r[key] is None, sign * (r[key] or 0.0), r["method"]))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None and math.isfinite(v)]
    return fmean(known) if known else None

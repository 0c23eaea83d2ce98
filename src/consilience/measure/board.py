"""What a comparison says of each method beyond its score: who pays, what it differs by, what a target costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from consilience.measure.best import best_scores
from consilience.measure.contrasts import Difference, differences
from consilience.measure.statistics import Recorded, final_scores, last_clients, last_of, leaderboard
from consilience.measure.target import COSTS, Cost, cost_of, reach

LOCAL = "local"
WITHSTOOD = ("clean", "pgd", "square", "both")
"""Shares of rows that a global model gets right: as they are, under each attack on inputs, and under both."""


def board(
    runs: Sequence[Recorded], *, reference: str | None = None, target: float | None = None
) -> list[dict[str, Any]]:
    """The rows of ``leaderboard.json``: :func:`~consilience.measure.statistics.leaderboard`, and for each method how
    even it is between clients, its gain over training alone, differences between groups, its difference from the
    reference and its cost to the target. What cannot be said is None."""
    rows = leaderboard(runs)
    scores = final_scores(runs)
    held = differences(scores.values, reference) if reference is not None else {}
    alone = [run for run in runs if run.label == LOCAL]
    for row in rows:
        own = [run for run in runs if run.label == row["method"]]
        row |= _evenness(own)
        row |= _best(own, scores.metric, scores.lower)
        row["gain"] = None if row["method"] == LOCAL or not alone else gain(own, alone, lower=scores.lower)
        row["groups"] = group_means(own) or None
        row["robustness"] = withstood(own)
        row["reference"] = reference
        row |= _difference(held.get(row["method"]))
        row |= _target(own, scores.metric, target, scores.lower)
    return rows


def _evenness(runs: Sequence[Recorded]) -> dict[str, float | None]:
    std = [v for run in runs if (v := last_of(run, "clients", "std")) is not None and math.isfinite(v)]
    return {
        "variance": fmean(v * v for v in std) if std else None,
        "jain": _mean([last_of(run, "clients", "jain") for run in runs]),
        "entropy": _mean([last_of(run, "clients", "entropy") for run in runs]),
    }


def _best(runs: Sequence[Recorded], metric: str, lower: bool) -> dict[str, Any]:
    """The score at the round that is best on validation data, mean over seeds, and each seed's round."""
    found = best_scores(runs, metric, lower=lower)
    if len(found) < len(runs):
        return {"best_accuracy": None, "best_rounds": None}
    return {
        "best_accuracy": fmean(best.score for best in found.values()),
        "best_rounds": [best.round for best in found.values()],
    }


def client_gains(run: Recorded, alone: Recorded, *, lower: bool = False) -> dict[int, float]:
    """How much better each client is off than by training alone on the same partition, by client."""
    key = "loss" if lower else "accuracy"
    base = last_clients(alone)
    found = {}
    for client, line in last_clients(run).items():
        before, after = base.get(client, {}).get(key), line.get(key)
        if before is not None and after is not None and math.isfinite(before) and math.isfinite(after):
            found[client] = before - after if lower else after - before
    return found


def gain(runs: Sequence[Recorded], alone: Sequence[Recorded], *, lower: bool = False) -> dict[str, Any] | None:
    """Over clients and seeds: the mean gain over training alone, the worst, and how many of how many lose."""
    by_seed = {run.seed: run for run in alone}
    values = [
        v for run in runs if run.seed in by_seed for v in client_gains(run, by_seed[run.seed], lower=lower).values()
    ]
    if not values:
        return None
    return {"mean": fmean(values), "worst": min(values), "lose": sum(v < 0 for v in values), "of": len(values)}


def withstood(runs: Sequence[Recorded]) -> dict[str, Any] | None:
    """How the last global models do on inputs that were changed by ``eps``: means over seeds of ``WITHSTOOD``, the
    standard deviation of ``both`` (None for one seed), and how many ``seeds`` were judged so; None: not one."""
    found = [run.history[-1]["robustness"] for run in runs if run.history[-1].get("robustness")]
    if not found:
        return None
    both = [of["both"] for of in found]
    means = {key: fmean(of[key] for of in found) for key in WITHSTOOD}
    return {"eps": found[0]["eps"], **means, "std": stdev(both) if len(both) > 1 else None, "seeds": len(found)}


def group_tables(run: Recorded) -> dict[str, dict[int, Any]]:
    """The last counts ``[z, y, p]`` of every client that took part in training, by attribute and client."""
    found: dict[str, dict[int, Any]] = {}
    for client, line in sorted(last_clients(run).items()):
        for name, table in (line.get("groups") or {}).items():
            found.setdefault(name, {})[client] = table
    return found


def group_summary(tables: Mapping[int, Any]) -> dict[str, float]:
    """One attribute in one run: the differences over everybody, the worst client's, and disparities in bits."""
    from consilience.measure.decomposition import decompose
    from consilience.measure.fairness import accuracy, chance, stacked, summary

    counts = stacked(list(tables.values()))
    told = summary(list(tables.values()))
    parts = decompose(counts.sum(axis=2).transpose(1, 2, 0))
    by_chance = chance(counts)
    return {
        **{key: told[key] for key in ("demographic_parity", "equal_opportunity", "equalised_odds")},
        **{f"worst_{key}": math.nan if of is None else of["worst"] for key, of in told["clients"].items()},
        "accuracy": accuracy(counts),
        "global_bits": parts.global_,
        "local_bits": parts.local,
        "unique": parts.unique,
        "redundant": parts.redundant,
        "masked": parts.masked,
        "chance_global": by_chance[0],
        "chance_local": by_chance[1],
    }


def group_means(runs: Sequence[Recorded]) -> dict[str, dict[str, float | None]]:
    """:func:`group_summary` by attribute, mean over seeds."""
    found: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        for name, tables in group_tables(run).items():
            found.setdefault(name, []).append(group_summary(tables))
    return {name: {key: _mean([of[key] for of in each]) for key in each[0]} for name, each in found.items()}


def _difference(found: Difference | None) -> dict[str, Any]:
    keys = ("difference", "difference_ci", "pairs", "p", "p_holm", "p_exact", "p_exact_holm", "p_smallest")
    if found is None:
        return dict.fromkeys(keys)
    interval = None if found.interval is None else list(found.interval)
    values = (found.mean, interval, found.pairs, found.p, found.p_holm, found.p_exact, found.p_exact_holm)
    return dict(zip(keys, [_number(v) for v in (*values, found.p_smallest)], strict=True))


def _target(runs: Sequence[Recorded], metric: str, target: float | None, lower: bool) -> dict[str, Any]:
    if target is None:
        return {"target": None, "reached": None, "to_target": None}
    costs = costs_to_target(runs, metric, target, lower=lower)
    reached = sum(r.reached for r in _reaches(runs, metric, target, lower))
    told = {key: {k: _number(v) for k, v in vars(cost).items()} for key, cost in costs.items()}
    return {"target": target, "reached": reached, "to_target": told or None}


def _reaches(runs: Sequence[Recorded], metric: str, target: float, lower: bool) -> list[Any]:
    keys = ("global", "loss" if lower else "accuracy") if metric == "global" else ("clients", "mean")
    return [found for run in runs if (found := reach(run, keys, target, lower=lower)) is not None]


def costs_to_target(runs: Sequence[Recorded], metric: str, target: float, *, lower: bool = False) -> dict[str, Cost]:
    """One method's costs to reach a target of the metric that ranks, by the names in ``COSTS``."""
    reaches = _reaches(runs, metric, target, lower)
    return {key: cost_of(reaches, key) for key in COSTS} if reaches else {}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None and math.isfinite(v)]
    return fmean(known) if known else None


def _number(value: Any) -> Any:
    """JSON has no nan."""
    return None if isinstance(value, float) and not math.isfinite(value) else value

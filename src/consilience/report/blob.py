"""The numbers that the page's script draws: curves, strips and the federation, as one JSON value."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from consilience.measure.best import best_so_far, validation
from consilience.measure.statistics import t_interval
from consilience.report.facts import SLOTS, Dot, Entry, Facts
from consilience.report.groups import plane_blob
from consilience.report.words import Unit, byte_unit, count_unit, time_unit

POINTS = 200
"""A curve is thinned to so many points: more cannot be seen."""


HEAT = 120
"""The picture of a federation has so many rows; beyond, neighbours are averaged."""


class Measure(NamedTuple):
    """What the vertical axis of the learning curves may show."""

    key: str
    keys: tuple[str, ...]
    short: str
    title: str


ACCURACIES = (
    Measure("global", ("global", "accuracy"), "Global test", "Accuracy of the global model on the global test set"),
    Measure("mean", ("clients", "mean"), "Client mean", "Client mean accuracy, models as deployed"),
    Measure("worst10", ("clients", "worst10"), "Worst 10 %", "Accuracy of the worst 10 % of clients"),
    Measure("before", ("clients", "before", "mean"), "Before training", "Client mean accuracy before local training"),
    Measure("after", ("clients", "after", "mean"), "After training", "Client mean accuracy after local training"),
    Measure("unseen", ("unseen", "mean"), "Unseen clients", "Mean accuracy of clients that did not take part"),
    Measure("merged", ("merged", "accuracy"), "Mean of nodes", "Accuracy of the mean of all nodes' models"),
)
LOSSES = (
    Measure("global", ("global", "loss"), "Global test", "Loss of the global model on the global test set"),
    Measure("mean", ("clients", "mean"), "Client mean", "Client mean loss, models as deployed"),
    Measure("before", ("clients", "before", "mean"), "Before training", "Client mean loss before local training"),
    Measure("after", ("clients", "after", "mean"), "After training", "Client mean loss after local training"),
    Measure("unseen", ("unseen", "mean"), "Unseen clients", "Mean loss of clients that did not take part"),
    Measure("merged", ("merged", "loss"), "Mean of nodes", "Loss of the mean of all nodes' models"),
)


def at(line: Mapping[str, Any], keys: Sequence[str]) -> float | None:
    """The number under nested keys, if it is there and is one: a run that diverged has a curve that ends."""
    value: Any = line
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if value is not None and math.isfinite(value) else None


def measures(facts: Facts) -> list[Measure]:
    """The measures that at least one run has, the one that ranks first."""
    known = [
        m
        for m in (LOSSES if facts.lower else ACCURACIES)
        if any(at(line, m.keys) is not None for run in facts.runs for line in run.history)
    ]
    return sorted(known, key=lambda m: m.key != ("global" if facts.metric == "global" else "mean"))


class Point(NamedTuple):
    """A point of a curve: the mean over seeds, with half of its 95 % interval."""

    round: int
    bytes: float
    samples: float
    wall: float
    virtual: float
    mean: float
    half: float
    shown: tuple[int, int]
    """First and last of the rounds that the seeds' values are of: its own round, or those that are best until it."""

    def interval(self, *, share: bool) -> tuple[float, float]:
        """Its ends, of a share within 0 and 1."""
        low, high = self.mean - self.half, self.mean + self.half
        return (max(0.0, low), min(1.0, high)) if share else (low, high)


def curve(entry: Entry, keys: Sequence[str], *, best: bool = False) -> list[Point]:
    """A method's curve over the rounds at which any of its seeds was evaluated. best: at each round that was judged on
    validation data, the value of the round that is best on it so far."""
    by_round: dict[int, list[tuple[Mapping[str, Any], float, int]]] = {}
    for run in entry.runs:
        pairs = best_so_far(run.history, lower=not entry.share) if best else ((line, line) for line in run.history)
        for line, shown in pairs:
            if (value := at(shown, keys)) is not None:
                by_round.setdefault(int(line["round"]), []).append((line, value, int(shown["round"])))
    rounds = sorted(by_round)
    if len(rounds) > POINTS:
        rounds = [rounds[round(i * (len(rounds) - 1) / (POINTS - 1))] for i in range(POINTS)]
    points = []
    for number in rounds:
        lines, values, of = zip(*by_round[number], strict=True)
        # with many seeds a bootstrap for every point would take minutes, and show no other band
        interval = t_interval(values) if len(values) > 1 else None
        points.append(
            Point(
                number,
                fmean(line["bytes_up"] + line["bytes_down"] for line in lines) / entry.clients,
                fmean(line["samples"] for line in lines),
                fmean(line["wall_s"] for line in lines),
                fmean(line["virtual_s"] for line in lines),
                fmean(values),
                (interval[1] - interval[0]) / 2 if interval else 0.0,
                (min(of), max(of)),
            )
        )
    return points


class Axis(NamedTuple):
    """A horizontal axis of the learning curves."""

    key: str
    short: str
    title: str
    unit: Unit


def axes(facts: Facts) -> list[Axis]:
    """Rounds, and of the others those along which something happened."""

    def last(key: str) -> list[float]:
        return [e.last(key) or 0.0 for e in facts.entries]

    traffic = [e.traffic for e in facts.entries]
    samples, wall, virtual = last("samples"), last("wall_s"), last("virtual_s")
    found = [Axis("round", "Rounds", "Round", Unit("", 1, 0))]
    for values, axis in (
        (traffic, Axis("bytes", "Bytes", "Traffic so far per client", byte_unit(traffic))),
        (samples, Axis("samples", "Samples", "Training samples processed", count_unit(samples))),
        (wall, Axis("wall", "Wall time", "Wall time on this machine", time_unit(wall))),
        (virtual, Axis("virtual", "Virtual time", "Virtual time", time_unit(virtual))),
    ):
        if max(values) > 0:
            found.append(axis)
    return found


def judged_on_validation(facts: Facts) -> bool:
    """Whether any run knows more than one round's validation score, so that one of them can be best."""
    return any(sum(validation(line) is not None for line in run.history) > 1 for run in facts.runs)


def _significant(value: float) -> float:
    return float(f"{value:.5g}")


def curves_blob(facts: Facts) -> dict[str, Any]:
    """Axes, measures and every curve, in the units of the axes."""
    shown = measures(facts)
    across, factor = axes(facts), facts.scale.factor

    def drawn(measure: Measure, *, best: bool) -> dict[str, Any]:
        return {
            e.label: {
                **{a.key: [_significant(getattr(p, a.key) / a.unit.factor) for p in points] for a in across},
                "y": [_significant(p.mean * factor) for p in points],
                "e": [_significant(p.half * factor) for p in points],
            }
            for e in facts.entries
            if (points := curve(e, measure.keys, best=best))
        }

    return {
        "axes": [
            {
                "key": a.key,
                "title": f"{a.title}, {a.unit.name}" if a.unit.name else a.title,
                "unit": a.unit.name,
                "digits": a.unit.digits,
            }
            for a in across
        ],
        "measures": [m._asdict() for m in shown],
        "of": {m.key: drawn(m, best=False) for m in shown},
        "best": {m.key: drawn(m, best=True) for m in shown} if judged_on_validation(facts) else None,
    }


def strips(facts: Facts, *, best: bool = False) -> dict[str, list[Dot]]:
    """By method but Local, every client's gain over Local, or without Local its score. best: at the round that is best
    on validation data, Local's own too."""
    entries = [e for e in facts.entries if e is not facts.local]
    if facts.local is None:
        return {e.label: e.accuracies(facts.lower, best=best) for e in entries}
    return {e.label: e.best_gains if best else e.gains for e in entries}


def strip_blob(facts: Facts) -> dict[str, Any]:
    """Every client's gain over Local, or without Local its score, by method."""

    def drawn(dots: Mapping[str, Sequence[Dot]]) -> dict[str, Any]:
        return {
            label: [[d.seed, d.client, _significant(d.value * facts.scale.factor)] for d in of]
            for label, of in dots.items()
            if of
        }

    return {
        "gain": facts.local is not None,
        "dots": drawn(strips(facts)),
        "best": (drawn(strips(facts, best=True)) or None) if judged_on_validation(facts) else None,
    }


def partitions(facts: Facts) -> list[tuple[int, Mapping[str, Any]]]:
    """A federation for every seed whose partition differs from those before it; none that is not drawn."""
    found: list[tuple[int, Mapping[str, Any]]] = []
    for seed in facts.seeds if facts.drawn else ():
        federation = next(run.federation for run in facts.runs if run.seed == seed)
        if not any(all(f.get(key) == federation.get(key) for key in ("counts", "sizes")) for _, f in found):
            found.append((seed, federation))
    return found


def client_order(federation: Mapping[str, Any]) -> list[int]:
    """Clients by group, else by the class they hold most of, so that the picture shows structure."""
    counts, groups = federation.get("counts"), federation.get("groups")
    sizes = [int(n) for n in federation["sizes"]]

    def key(i: int) -> tuple[Any, ...]:
        group = str(groups[i]) if groups else ""
        if not counts or not counts[i]:
            return group, 0, -sizes[i], i
        top = max(range(len(counts[i])), key=lambda c: counts[i][c])
        return group, top, -counts[i][top] / max(1, sizes[i]), i

    return sorted(range(len(sizes)), key=key)


def federation_blob(facts: Facts) -> list[dict[str, Any]]:
    """Who holds what, for every seed's partition; nothing where there are too many clients to draw."""
    if "sizes" not in facts.federation:
        return []
    return [
        {
            "seed": seed,
            "order": client_order(f),
            "classes": [str(c) for c in f.get("classes") or ()],
            "counts": f.get("counts") or None,
            "sizes": f["sizes"],
            "unseen": f.get("unseen") or [],
            "groups": f.get("groups"),
        }
        for seed, f in partitions(facts)
    ]


def page_blob(facts: Facts) -> str:
    """The JSON for the page's script element: no ``<`` occurs in it, so nothing can end or nest it."""
    value = {
        "methods": [
            {
                "id": e.label,
                "name": e.name,
                "slot": e.slot,
                "ref": e.reference if e.slot < 0 else "",
                "best": len(facts.ranked) > 1 and e is facts.best,
            }
            for e in facts.entries
        ],
        "slots": SLOTS,
        "rows": HEAT,
        "seeds": facts.seeds,
        "scale": {
            "noun": facts.scale.noun,
            "unit": facts.scale.unit,
            "points": facts.scale.points,
            "digits": facts.scale.digits,
            "lower": facts.lower,
        },
        "curves": curves_blob(facts),
        "strip": strip_blob(facts),
        "federation": federation_blob(facts),
        "plane": plane_blob(facts),
    }
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")

"""Which methods did well on the federations of the committed benchmark whose profiles are nearest."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib.resources import files
from statistics import fmean
from typing import Any

NEAR = 3
"""So many rows of the benchmark are looked at."""
FAR = 0.2
"""Rows further away than this suggest nothing."""
PARTS = ("label_skew", "feature_skew", "concept_shift", "quantity_skew")


def benchmark() -> dict[str, Any]:
    """The committed benchmark: how it was made, and its rows (a profile and every method's accuracy each)."""
    text = (files("consilience.measure") / "files" / "profiles.json").read_text("utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def place(bits: Mapping[str, Mapping[str, float]], clients: int, rows: int) -> list[float]:
    """Where a profile lies: four kinds of skew as shares of their maxima; clients and rows a client, weakly.

    A factor of two in the number of clients, or of four in the rows of each, weighs as much as 2 % of a skew's
    maximum.
    """
    shares = [bits[name]["value"] / bits[name]["max"] if bits[name]["max"] > 0 else 0.0 for name in PARTS]
    return [*shares, 0.02 * math.log2(max(clients, 1)), 0.01 * math.log2(max(rows / max(clients, 1), 1))]


def suggest(profile: Mapping[str, Any]) -> dict[str, Any]:
    """``suggestions`` and ``nearest`` for a profile.

    nearest: the rows of the benchmark with their distance, nearest first. suggestions: methods, best first, by how
    far they were behind the best of each row on average over the rows within ``FAR``; each cites those rows with its
    accuracy (mean over clients, each on its own test rows, at the last round) and the best method's. Empty where no
    row is near. These are results of small federations: a reason to try a method first, no proof.
    """
    made = benchmark()
    of = profile["federation"]
    here = place(profile["bits"], of["profiled"], of["rows"])
    ranked = sorted(
        ((math.dist(here, place(row["bits"], row["clients"], row["rows"])), row["id"], row) for row in made["rows"]),
        key=lambda item: item[:2],
    )[:NEAR]
    nearest = [
        {
            "id": name,
            "distance": round(distance, 3),
            **{key: row[key] for key in ("data", "partition", "clients", "rounds", "model", "seeds")},
            "accuracy": row["accuracy"],
            "interval": row["interval"],
        }
        for distance, name, row in ranked
    ]
    near = [row for row in nearest if row["distance"] <= FAR]
    methods = [m for m in (near[0]["accuracy"] if near else {}) if all(m in row["accuracy"] for row in near)]
    suggestions = [
        {
            "method": method,
            "behind": round(fmean(max(row["accuracy"].values()) - row["accuracy"][method] for row in near), 4),
            "first": sum(row["accuracy"][method] == max(row["accuracy"].values()) for row in near),
            "rows": [
                {
                    "id": row["id"],
                    "distance": row["distance"],
                    "accuracy": row["accuracy"][method],
                    "best": max(row["accuracy"], key=row["accuracy"].get),
                }
                for row in near
            ],
        }
        for method in methods
    ]
    return {
        "suggestions": sorted(suggestions, key=lambda row: (row["behind"], row["method"])),
        "nearest": nearest,
        "benchmark": {"file": made["file"], "command": made["command"]},
    }

"""The table, from the results that there are."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from benchmarks.reproduction.rows import BASELINES, ROWS, Row
from benchmarks.reproduction.run import needed, stored
from benchmarks.reproduction.settings import SETTINGS
from consilience.measure.contrasts import Difference, differences


def values(row: Row, result: dict[str, Any]) -> list[float]:
    """A result's score on each seed."""
    if row.score == "final":
        return [curve[-1] for curve in result["curve"]]
    found: list[float] = result[row.score]
    return found


def compared(row: Row) -> dict[str, Difference] | None:
    """The row's method less each baseline, positive where it is better; None until all have run."""
    found = [stored(setting, label) for setting, label in needed(row)]
    if any(result is None for result in found):
        return None
    sign = -100 if row.score == "ece" else 100
    scores = {
        name: {seed: sign * value for seed, value in zip(r["seeds"], values(row, r), strict=True)}
        for name, r in zip((*BASELINES, row.name), found, strict=True)
        if r is not None
    }
    return {base: differences({base: scores[base], row.name: scores[row.name]}, base)[row.name] for base in BASELINES}


def verdict(row: Row, found: dict[str, Difference]) -> str:
    """holds: above every baseline named, with the interval of the mean difference above 0."""
    needed_ones = [found[base] for base in row.beats]
    if all(d.interval is not None and d.interval[0] > 0 for d in needed_ones):
        word = "holds"
    elif all(d.mean > 0 for d in needed_ones):
        word = "does not: higher, but not beyond chance"
    else:
        word = "does not"
    if row.missing:
        return f"not testable here ({row.missing})"
    return word


def shown(d: Difference) -> str:
    """A difference with its interval."""
    if d.interval is None or math.isnan(d.mean):
        return f"{d.mean:+.1f}"
    return f"{d.mean:+.1f} [{d.interval[0]:+.1f}, {d.interval[1]:+.1f}]"


def means(row: Row) -> list[str]:
    """Mean scores in per cent of FedAvg, SCAFFOLD and the method, with the lr that its trials chose."""
    found: list[dict[str, Any]] = [r for s, label in needed(row) if (r := stored(s, label)) is not None]
    chosen = [r["tuned"]["trials"][r["tuned"]["best"]]["options"]["lr"] for r in found]
    return [f"{100 * fmean(values(row, r)):.1f} (lr {lr:.2g})" for r, lr in zip(found, chosen, strict=True)]


def table() -> str:
    """A table for each setting, in the order of rows; rows that are not complete say so."""
    lines = []
    for setting, (text, _) in SETTINGS.items():
        rows = [row for row in ROWS if row.setting == setting]
        if not rows:
            continue
        head = ("method", "the paper's claim", "FedAvg", "SCAFFOLD", "ours", "less FedAvg", "less SCAFFOLD", "verdict")
        lines += [f"\n**{text}**\n", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for row in rows:
            name = f"[{row.name}](methods/{row.method.partition(':')[0]}.md)"
            name += {"ece": ", calibration error", "final": ", last round"}.get(row.score, "")
            found = compared(row)
            if found is None:
                lines.append(f"| {name} | {row.claim} |  |  |  |  |  | not run yet |")
                continue
            numbers = " | ".join(means(row))
            gaps = " | ".join(shown(found[base]) for base in BASELINES)
            lines.append(f"| {name} | {row.claim} | {numbers} | {gaps} | {verdict(row, found)} |")
    return "\n".join(lines).strip() + "\n"

"""The leaderboard and the differences from a reference as LaTeX tables, for the package booktabs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from consilience.report.words import MINUS, NBSP, NONE, Scale, byte_unit, time_unit

SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {char: f"\\{char}" for char in "&%$#_{}"}
SPECIAL |= {MINUS: "$-$", NONE: "--", NBSP: "~", "±": r"$\pm$", "…": r"\,\ldots\,", "<": "$<$", ">": "$>$", "²": "$^2$"}


def escaped(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return re.sub("|".join(map(re.escape, SPECIAL)), lambda m: SPECIAL[m[0]], text)


def latex_tables(boards: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """``leaderboard`` and, where a reference was given, ``differences``, one tabular for every federation."""
    found: dict[str, list[str]] = {}
    for name, rows in boards.items():
        made = {"leaderboard": leaderboard(rows)}
        if any(row["difference"] is not None for row in rows):
            made["differences"] = differences(rows)
        for table, text in made.items():
            found.setdefault(table, []).append((f"% federation {name}\n" if name else "") + text)
    return {table: "\n".join(texts) for table, texts in found.items()}


def tabular(heads: Sequence[str], rows: Sequence[Sequence[str]], about: str) -> str:
    """A tabular whose first column is text and whose others are numbers; only the cells are escaped here."""
    lines = [f"% {about}", "% \\usepackage{booktabs}", f"\\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", "\\toprule"]
    lines += [" & ".join(map(escaped, heads)) + r" \\", "\\midrule"]
    lines += [" & ".join(map(escaped, row)) + r" \\" for row in rows]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def _scale(rows: Sequence[Mapping[str, Any]]) -> Scale:
    return Scale(bool(rows) and rows[0]["accuracy"] is None)


def leaderboard(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of ``leaderboard.json``: score with its interval, clients, traffic and time."""
    scale = _scale(rows)
    key, unit = scale.noun, f" ({scale.unit})" if scale.unit else ""
    traffic, wall = byte_unit(r["bytes"] for r in rows), time_unit(r["wall_s"] for r in rows)
    virtual = time_unit(r["virtual_s"] for r in rows)
    moved, metric = any(r["virtual_s"] for r in rows), rows[0]["metric"] if rows else "global"
    both = metric == "global"  # else the clients' mean is the score
    heads = ["Method", f"{key.capitalize()}{unit}", *([f"Clients{unit}"] if both else []), f"Worst tenth{unit}"]
    heads += [f"Traffic ({traffic.name})", f"Wall ({wall.name})", *([f"Virtual ({virtual.name})"] if moved else [])]
    body = []
    for row in rows:
        score, ci = row[key], row[f"{key}_ci"]
        beside = f" ± {scale.number((ci[1] - ci[0]) / 2)}" if ci and _even(ci, score) else ""
        beside = beside or (f" ({scale.number(ci[0])}…{scale.number(ci[1])})" if ci else "")
        cells = [str(row["method"]), scale.number(score) + beside]
        cells += [scale.number(row["clients_mean"])] if both else []
        cells += [scale.number(row["worst10"]), traffic.number(row["bytes"]) if row["bytes"] else NONE]
        body.append([*cells, wall.number(row["wall_s"]), *([virtual.number(row["virtual_s"])] if moved else [])])
    of = "the global model" if metric == "global" else "the mean over clients"
    seeds = {row["seeds"] for row in rows}
    about = f"{key} of {of} at the last round, mean and 95 % interval over {max(seeds, default=0)} seeds"
    return tabular(heads, body, about)


def _even(ci: Sequence[float], mean: float) -> bool:
    """Whether an interval reaches equally far to both sides: one that was cut at 100 % does not."""
    return abs((ci[1] - mean) - (mean - ci[0])) < 5e-4 * max(1.0, abs(mean))


def differences(rows: Sequence[Mapping[str, Any]]) -> str:
    """Each method less the reference, with intervals and tests."""
    scale = _scale(rows)
    unit = f" ({scale.points})" if scale.points else ""
    body = []
    for row in rows:
        if row["difference"] is None:
            continue
        ci = row["difference_ci"]
        interval = f"{scale.signed(ci[0])}…{scale.signed(ci[1])}" if ci else NONE
        ps = [row[key] for key in ("p", "p_holm", "p_exact_holm")]
        cells = [str(row["method"]), scale.signed(row["difference"]), interval]
        told = [NONE if p is None else "<0.001" if p < 0.001 else f"{p:.3f}" for p in ps]
        body.append([*cells, *told, str(row["pairs"])])
    heads = ["Method", f"Difference{unit}", "95 % interval", "p", "p, Holm", "p, sign flips, Holm", "Pairs"]
    return tabular(heads, body, f"{scale.noun} less that of {rows[0]['reference']}, paired by seed")

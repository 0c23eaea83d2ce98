"""The same comparison on several federations: a folder with a comparison for each, and what they say together."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from consilience import experiment
from consilience.config import Settings, settle
from consilience.core.checkpoint import write_atomically
from consilience.core.errors import ConfigError, Refused
from consilience.experiment import OnLine
from consilience.measure.ranks import Ranks, rank_methods


def parts(settings: Settings) -> dict[str, Settings]:
    """The settings of each federation, by the name of its folder."""
    found: dict[str, Settings] = {}
    if len(settings.federations) < 2:
        raise ConfigError("--federation: give at least two to rank methods over, or put its options among the others")
    for number, own in enumerate(settings.federations, 1):
        given: dict[str, Any] = {**settings.flat(), **own, "reference": settings.reference}
        given |= {"target": settings.target, "tune": settings.tune}
        found[f"{number}-{_slug(title(own))}"] = settle(given)
    if len({title(own) for own in settings.federations}) < len(found):
        raise ConfigError("--federation: the same federation is given twice")
    return found


def title(federation: Mapping[str, Any]) -> str:
    """How a federation is called: its options."""
    return ", ".join(f"{key}={value}" for key, value in federation.items())


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=-]+", "_", text)[:60]


def labels(settings: Settings, names: Sequence[str]) -> list[str]:
    """Names of all runs, for the progress display."""
    return [f"{part}/{spec.name}" for part, own in parts(settings).items() for spec in experiment.specs(own, names)]


def compare_on_all(
    settings: Settings,
    names: Sequence[str],
    folder: Path,
    *,
    command: str,
    on_line: OnLine,
    tell: Callable[[str], None] = lambda text: None,
    resume: bool = False,
) -> list[dict[str, Any]]:
    """:func:`consilience.experiment.compare` on one federation after another, then ranks over them."""
    each = parts(settings)
    if len(names) < 2:
        raise ConfigError("--federation ranks methods over federations; name two methods at least")
    if not resume:
        experiment.free(folder)
        for options, own in zip(settings.federations, each.values(), strict=True):
            try:
                experiment.check_all(own, experiment.specs(own, names))
            except Refused as error:
                raise type(error)(f"federation {title(options)}: {error}") from None
    with experiment.on_cluster(settings.config):
        if not resume:
            folder.mkdir(parents=True, exist_ok=True)
            experiment.record(settings, names, folder, command)
        for part, own in each.items():
            experiment.compare(
                own,
                names,
                folder / part,
                command=command,
                on_line=lambda label, line, part=part: on_line(f"{part}/{label}", line),  # type: ignore[misc]
                tell=lambda text, part=part: tell(f"{part}: {text}"),  # type: ignore[misc]
                resume=(folder / part / "compare.yaml").exists(),
            )
    return conclude(folder)


def conclude(folder: Path) -> list[dict[str, Any]]:
    """Judge all federations anew: each one's own files, and leaderboard.json, ranks.json and report.html over them."""
    from consilience.report.overview import write_overview

    settings, _ = experiment.read_comparison(folder)
    boards = {part: experiment.conclude(folder / part) for part in parts(settings)}
    titles = dict(zip(boards, map(title, settings.federations), strict=True))
    ranks = rank(boards)
    rows = rank_rows(boards, ranks)
    write_atomically(folder / "leaderboard.json", json.dumps(rows, indent=1))
    write_atomically(folder / "ranks.json", json.dumps(vars(ranks), indent=1))
    write_overview(folder, titles, boards, ranks)
    return rows


def rank(boards: Mapping[str, Sequence[Mapping[str, Any]]]) -> Ranks:
    """Ranks of the methods by their scores in each federation."""
    lower = any(row.get("loss") is not None for rows in boards.values() for row in rows)
    key = "loss" if lower else "accuracy"
    scores = {part: {r["method"]: r[key] for r in rows if r.get(key) is not None} for part, rows in boards.items()}
    return rank_methods(scores, lower=lower)


def rank_rows(boards: Mapping[str, Sequence[Mapping[str, Any]]], ranks: Ranks) -> list[dict[str, Any]]:
    """A row a method, best mean rank first: numbers are means over federations."""
    found = []
    for method in ranks.order:
        own = [next(row for row in rows if row["method"] == method) for rows in boards.values()]
        row: dict[str, Any] = {"method": method, "metric": own[0]["metric"], "mean_rank": ranks.mean[method]}
        for key in ("accuracy", "loss", "clients_mean", "worst10", "bytes", "wall_s", "virtual_s"):
            values = [r[key] for r in own if r.get(key) is not None]
            if values or key != "loss":
                row[key] = fmean(values) if values else None
        row |= {"accuracy_ci": None, "seeds": min(r["seeds"] for r in own), "federations": len(own)}
        if "loss" in row:
            row["loss_ci"] = None
        found.append(row)
    return found

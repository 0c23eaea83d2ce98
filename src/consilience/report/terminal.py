"""Tables and live progress in the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import unescape
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from consilience.report.load import RunFolder
from consilience.report.words import NONE, Scale, Unit, byte_unit, count_unit, plural, time_unit

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID
    from rich.table import Table


def _method_column(table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Labels of up to 20 letters stand in one line; a longer one folds before any number does."""
    longest = max((len(str(row["method"])) for row in rows), default=0)
    table.add_column("Method", overflow="fold", min_width=min(longest, 20))


def _in_two(head: str) -> str:
    """A heading of two words in two lines, so that the table fits a narrow terminal."""
    return head if head == "95 % CI" else head.replace(" ", "\n", 1)


def _grid(title: str, header: bool = True) -> Table:
    from rich import box
    from rich.table import Table

    return Table(
        title=title,
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD if header else None,
        show_header=header,
        pad_edge=False,
        min_width=len(title),  # a title is folded to the width of its table
    )


def leaderboard_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of ``leaderboard.json`` as a table."""
    scale = Scale(bool(rows) and rows[0]["accuracy"] is None)
    key = scale.noun
    traffic = byte_unit(r["bytes"] for r in rows)
    wall, virtual = time_unit(r["wall_s"] for r in rows), time_unit(r["virtual_s"] for r in rows)
    moved = any(r["virtual_s"] for r in rows)
    metric = "global model" if rows and rows[0]["metric"] == "global" else "client mean"
    unit = f" {scale.unit}" if scale.unit else ""
    table = _grid(f"{key.capitalize()} of the {metric}, mean over seeds")
    _method_column(table, rows)
    both = not scale.lower and metric == "global model"
    heads = [f"{key.capitalize()}{unit}", "95 % CI", *(["Clients %"] if both else [])]
    heads += [] if scale.lower else ["Worst 10 %"]
    heads += [traffic.name, f"Wall {wall.name}", *([f"Virtual {virtual.name}"] if moved else []), "Seeds"]
    for head in heads:
        table.add_column(_in_two(head), justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        ci = row[f"{key}_ci"]
        cells = [scale.number(row[key]), f"{scale.number(ci[0])}…{scale.number(ci[1])}" if ci else NONE]
        cells += [scale.number(row["clients_mean"])] if both else []
        cells += [] if scale.lower else [scale.number(row["worst10"])]
        cells += [traffic.number(row["bytes"]) if row["bytes"] else NONE, wall.number(row["wall_s"])]
        if moved:
            cells.append(virtual.number(row["virtual_s"]))
        table.add_row(str(row["method"]), *cells, str(row["seeds"]), style="bold" if i == 0 and len(rows) > 1 else "")
    return table


def show_comparison(console: Console, rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """A comparison's table, the answer in words, and what was asked for beside it."""
    console.print(leaderboard_table(rows))
    if (folder / "ranks.json").is_file():
        from consilience.report.overview import verdict_of

        console.print(_wrapped(verdict_of(folder)), markup=False, highlight=False)
        return
    from consilience.report.answer import first, losers
    from consilience.report.certainty import differences_finding, reference_of
    from consilience.report.facts import gather
    from consilience.report.trust import finding, guarded

    facts = gather(folder)
    said = [first(facts)]
    if reference_of(facts) is not None and len(facts.seeds) > 1:
        from consilience.measure.contrasts import differences

        scores = {entry.label: entry.scores for entry in facts.entries}
        said.append(differences_finding(facts, differences(scores, str(reference_of(facts)))))
        console.print(difference_table(rows))
    if facts.compare.get("target") is not None:
        console.print(target_table(rows))
    if any(row["robustness"] for row in rows):
        console.print(robustness_table(rows))
    for sentence in [*said, losers(facts), finding(facts) if guarded(facts) else ""]:
        if sentence:
            console.print(_wrapped(sentence), markup=False, highlight=False)


def _wrapped(html: str) -> str:
    """A sentence of the report as plain text."""
    return unescape(re.sub(r"<[^>]*>", "", html))


def difference_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Each method less the reference, with tests (Holm-corrected but for the first p) and the smallest p that sign
    flips can give."""
    scale = Scale(bool(rows) and rows[0]["accuracy"] is None)
    unit = f" {scale.points}" if scale.points else ""
    table = _grid(f"Difference from {rows[0]['reference']}, paired by seed; p of a t-test and by sign flips")
    _method_column(table, rows)
    for head in (f"Difference{unit}", "95 % CI", "p", "Holm", "Flips", "Least"):
        table.add_column(_in_two(head), justify="right", no_wrap=True)
    for row in rows:
        if row["difference"] is None:
            continue
        ci = row["difference_ci"]
        cells = [scale.signed(row["difference"]), f"{scale.signed(ci[0])}…{scale.signed(ci[1])}" if ci else NONE]
        ps = [row[key] for key in ("p", "p_holm", "p_exact_holm", "p_smallest")]
        table.add_row(str(row["method"]), *cells, *(NONE if p is None else f"{p:.3f}" for p in ps))
    return table


def target_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What reaching the target cost: medians over seeds, ">" where most runs did not get there."""
    scale = Scale(bool(rows) and rows[0]["accuracy"] is None)
    table = _grid(f"Cost to reach {scale.text(rows[0]['target'])}, median over seeds")
    _method_column(table, rows)
    known = [row for row in rows if row["to_target"]]

    def largest(key: str) -> list[float]:
        return [row["to_target"][key]["beyond"] for row in known]

    units = {"rounds": Unit("rounds", 1, 0), "bytes": byte_unit(largest("bytes"))}
    units |= {"samples": count_unit(largest("samples")), "wall_s": time_unit(largest("wall_s"))}
    if any(largest("virtual_s")):
        units["virtual_s"] = time_unit(largest("virtual_s"))
    heads = {"rounds": "Rounds", "bytes": "Traffic", "samples": "Samples", "wall_s": "Wall", "virtual_s": "Virtual"}
    for head in ("Reached", *(f"{heads[k]} {u.name if k != 'rounds' else ''}".strip() for k, u in units.items())):
        table.add_column(_in_two(head), justify="right", no_wrap=True)
    for row in known:
        costs = [(row["to_target"][key], unit) for key, unit in units.items()]
        cells = [
            unit.number(c["median"]) if c["median"] is not None else f"> {unit.number(c['beyond'])}"
            for c, unit in costs
        ]
        table.add_row(str(row["method"]), f"{row['reached']} of {row['seeds']}", *cells)
    return table


def robustness_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Shares of test rows that last global models get right as they are, and when each input is changed to mislead."""
    scale, known = Scale(lower=False), [(row, row["robustness"]) for row in rows if row["robustness"]]
    table = _grid(f"Test rows right where inputs move by {known[0][1]['eps']:g} at most, %, mean over seeds")
    _method_column(table, [row for row, _ in known])
    for head in ("As they are", "PGD", "Square", "Both", "SD", "Seeds"):
        table.add_column(_in_two(head), justify="right", no_wrap=True)
    for row, of in sorted(known, key=lambda pair: -pair[1]["both"]):
        cells = [scale.number(of[key]) for key in ("clean", "pgd", "square", "both")]
        spread = NONE if of["std"] is None else scale.number(of["std"])
        table.add_row(str(row["method"]), *cells, spread, str(of["seeds"]))
    return table


CLUSTERS = 8
"""So many clusters of a run are told."""


def run_summary(run: RunFolder) -> Table:
    """What a run came to: its last scores and what it cost."""
    from consilience.measure.statistics import last_of
    from consilience.report.clusters import clusters_of
    from consilience.report.trust import conditions

    last = run.history[-1]
    table = _grid(
        f"{run.label} on {run.federation.get('name', 'a federation')}, {plural(int(last['round']), 'round')}",
        header=False,
    )
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    loss = Scale(lower=True)
    accuracy = Scale(lower=bool(run.clients) and not any("accuracy" in row for row in run.clients))
    for title, keys, scale in (
        ("Global accuracy", ("global", "accuracy"), accuracy),
        ("Global loss", ("global", "loss"), loss),
        ("Client mean", ("clients", "mean"), accuracy),
        ("Worst 10 % of clients", ("clients", "worst10"), accuracy),
        ("Clients, trained once more", ("clients", "after", "mean"), accuracy),
        ("Unseen clients", ("unseen", "mean"), accuracy),
        ("Mean of nodes' models", ("merged", "accuracy"), accuracy),
    ):
        value = last_of(run, *keys)
        if value is not None:
            table.add_row(title, scale.text(value))
    rows = {seen: [row["n"] for row in run.clients if row["seen"] is seen] for seen in (True, False)}
    if rows[False] and any(rows[True]) and not any(rows[False]):
        table.add_row("Unseen clients", "no model for somebody new")
    for title, key in (
        ("Clusters against true groups", "rand"),
        ("Clusters of unseen clients", "rand_unseen"),
    ):
        index = last_of(run, "clusters", key)
        if index is not None:
            table.add_row(title, f"adjusted Rand {index:.3f}")
    if hard := last.get("robustness"):
        for title, key in (("PGD", "pgd"), ("Square", "square"), ("both", "both")):
            table.add_row(f"Inputs moved by {hard['eps']:g}, {title}", accuracy.text(hard[key]))
    for number, of in list(clusters_of(run).items())[:CLUSTERS]:
        table.add_row(f"Cluster {number}", f"{plural(of['clients'], 'client')}, {accuracy.text(of['mean'])}")
    for name in run.federation.get("sensitive") or ():
        gap = last_of(run, "clients", "groups", name, "demographic_parity")
        if gap is not None:
            table.add_row(f"Parity between groups by {name}", f"{accuracy.gap(gap)} apart")
    if told := conditions([run]):
        table.add_row("Conditions", ", ".join(told))
    for title, key, unit in (
        ("Bytes up", "bytes_up", byte_unit),
        ("Bytes down", "bytes_down", byte_unit),
        ("Samples", "samples", count_unit),
        ("Steps", "steps", count_unit),
        ("Wall time", "wall_s", time_unit),
        ("Virtual time", "virtual_s", time_unit),
    ):
        if last.get(key):
            table.add_row(title, unit([last[key]]).text(last[key]))
    return table


def line_score(line: Mapping[str, Any]) -> str:
    """How a run stands at a line of its history: the global model's accuracy or loss. Where there is no global model,
    the clients' mean, named, and as a plain number, since the line does not say whether it is a loss."""
    model, mean = line.get("global") or {}, (line.get("clients") or {}).get("mean")
    if model.get("accuracy") is not None:
        return Scale(lower=False).text(model["accuracy"])
    if model.get("loss") is not None:
        return f"loss {Scale(lower=True).text(model['loss'])}"
    return "" if mean is None else f"clients {Scale(lower=True).text(mean)}"


class Progress:
    """A line for every run with its rounds, score and time left; without a terminal, a line when a run ends.

    ``with Progress(console, labels=[...], rounds=R) as p: p.update(label, line)``, with lines of a history.
    """

    def __init__(self, console: Console, labels: Sequence[str], rounds: int) -> None:
        self._console, self._labels, self._rounds = console, list(labels), rounds
        self._tasks: dict[str, TaskID] = {}
        self._live: Any = None

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Live

            self._live = Live(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[score]}", justify="right"),
                TimeRemainingColumn(),
                console=self._console,
            )
            for label in self._labels:
                # a run that waits for its turn has no time left to tell
                self._tasks[label] = self._live.add_task(label, total=self._rounds, start=False, score="")
            self._live.start()
        return self

    def update(self, label: str, line: Mapping[str, Any]) -> None:
        """Tell that a run has come to this line of its history."""
        score, number = line_score(line), int(line["round"])
        if self._live is not None:
            task = self._tasks[label]
            if not self._live.tasks[task].started:
                self._live.start_task(task)
            fields = {"score": score} if score else {}
            self._live.update(task, completed=number, **fields)
        elif number >= self._rounds:
            told = f", {score}" if score else ""
            took = time_unit([line["wall_s"]]).text(line["wall_s"])
            self._console.print(f"{label}: {plural(number, 'round')}{told}, {took}", markup=False, highlight=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

"""Tables and live progress in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from consilience.report.load import RunFolder
from consilience.report.words import NONE, Scale, byte_unit, count_unit, plural, time_unit

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID
    from rich.table import Table


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
    table.add_column("Method", overflow="fold")  # a long label folds before any number does
    both = not scale.lower and metric == "global model"
    heads = [f"{key.capitalize()}{unit}", "95 % CI", *(["Clients %"] if both else [])]
    heads += [] if scale.lower else ["Worst 10 %"]
    heads += [traffic.name, f"Wall {wall.name}", *([f"Virtual {virtual.name}"] if moved else []), "Seeds"]
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
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


def run_summary(run: RunFolder) -> Table:
    """What a run came to: its last scores and what it cost."""
    from consilience.measure.statistics import last_of

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
        ("Unseen clients", ("unseen", "mean"), accuracy),
    ):
        value = last_of(run, *keys)
        if value is not None:
            table.add_row(title, scale.text(value))
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

"""Tables and progress as they are printed."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from consilience.cli import main
from consilience.measure.statistics import leaderboard
from consilience.report.blob import measures
from consilience.report.facts import gather
from consilience.report.load import RunFolder, read_runs
from consilience.report.terminal import Progress, leaderboard_table, line_score, run_summary


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)


def printed(what: object) -> str:
    out = console()
    out.print(what)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_leaderboard_table(make_compare: Callable[..., Path]) -> None:
    text = printed(leaderboard_table(leaderboard(read_runs(make_compare(["fedavg", "scaffold"], 2)))))
    lines = text.splitlines()
    assert "Accuracy of the global model" in lines[0]
    assert text.index("scaffold") < text.index("fedavg")
    assert "…" in text
    assert "Virtual" not in text


def test_leaderboard_table_with_one_seed_has_no_interval(make_compare: Callable[..., Path]) -> None:
    text = printed(leaderboard_table(leaderboard(read_runs(make_compare(["local", "fedavg"], 1)))))
    assert " to " not in text
    assert "client mean" in text


def test_leaderboard_table_of_a_regression(make_compare: Callable[..., Path]) -> None:
    text = printed(leaderboard_table(leaderboard(read_runs(make_compare(["fedavg", "scaffold"], 2, regression=True)))))
    assert "Loss" in text
    assert "Worst" not in text


def test_run_summary(make_run: Callable[..., Path]) -> None:
    text = printed(run_summary(RunFolder.read(make_run("fedavg"))))
    assert "fedavg on digits" in text
    for word in ("Global accuracy", "Client mean", "Bytes up", "210", "Wall time"):
        assert word in text
    assert "Virtual" not in text


def line(number: int, accuracy: float | None = None, **more: Any) -> dict[str, Any]:
    scores = {} if accuracy is None else {"global": {"accuracy": accuracy, "loss": 1.0}}
    return {"round": number, "wall_s": 2.5 * number, **scores, **more}


def test_progress_without_a_terminal_says_a_line_at_the_end() -> None:
    out = console()
    with Progress(out, labels=["fedavg", "scaffold"], rounds=3) as progress:
        for r in (1, 2):
            progress.update("fedavg", line(r, 0.5))
        assert isinstance(out.file, io.StringIO)
        assert out.file.getvalue() == ""
        progress.update("fedavg", line(3, 0.913))
    assert out.file.getvalue() == "fedavg: 3 rounds, 91.3\u00a0%, 7.5\u00a0s\n"


def test_progress_knows_how_long_a_run_of_one_line_took() -> None:
    out = console()
    with Progress(out, labels=["fedavg"], rounds=1) as progress:
        progress.update("fedavg", line(1, 0.5))
    assert isinstance(out.file, io.StringIO)
    assert out.file.getvalue() == "fedavg: 1 round, 50.0\u00a0%, 2.50\u00a0s\n"


def test_progress_says_what_its_score_is() -> None:
    assert line_score(line(1, 0.5, clients={"mean": 0.7})) == "50.0\u00a0%"
    assert line_score(line(1, clients={"mean": 0.7})) == "clients 0.700"
    assert line_score({"global": {"loss": 0.25, "rmse": 0.5}, "clients": {"mean": 0.3}}) == "loss 0.250"
    assert line_score(line(1)) == ""


def test_progress_in_a_terminal_draws_every_run() -> None:
    out = console(terminal=True)
    with Progress(out, labels=["fedavg", "scaffold"], rounds=4) as progress:
        progress.update("fedavg", line(2, 0.5))
        progress.update("fedavg", line(4))
    assert isinstance(out.file, io.StringIO)
    text = out.file.getvalue()
    assert "fedavg" in text
    assert "scaffold" in text
    assert "4/4" in text
    assert "50.0" in text


def test_the_mean_of_nodes_is_told(tmp_path: Path) -> None:
    """Without a server: in the summary, and as a curve to choose."""
    folder = tmp_path / "nodes"
    with pytest.raises(SystemExit) as end:
        main(["run", "dpsgd", "--topology", "ring", "--clients", "4", "--rounds", "2", "--model", "logistic",
              "--executor", "serial", "--out", str(folder)])  # fmt: skip
    assert not end.value.code
    run = RunFolder.read(folder)
    told = re.sub(r"\s+", " ", printed(run_summary(run)))
    assert f"Mean of nodes' models {100 * run.history[-1]['merged']['accuracy']:.1f} %" in told
    assert "merged" in {measure.key for measure in measures(gather(folder))}
